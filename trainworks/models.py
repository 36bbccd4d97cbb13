"""Where weights come from: an architecture and sizes, or a name; and the two halves of a language model, backbone and
head."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainworks.errors import AccessError, ConfigError, Problem, nearest
from trainworks.schema import FromScratch, NewTokenizer, Pretrained

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["Head", "backbone", "initialise", "load", "load_processor", "new_tokenizer", "revision_of"]

END, TURN, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The ChatML layout; a tokenizer trained here carries it, so that its models can be tuned on conversations."""


def load_processor(kind: str, name: str, revision: str = "main") -> Any:
    """Load a `tokenizer` or an `image_processor` by Hub name or folder."""
    import transformers

    auto: Any = {"tokenizer": transformers.AutoTokenizer, "image_processor": transformers.AutoImageProcessor}[kind]
    return _reaching(name, lambda: auto.from_pretrained(name, revision=revision))


def new_tokenizer(settings: NewTokenizer, texts: Iterable[str]) -> Any:
    """Train a byte-level BPE tokenizer (Sennrich et al. 2016, over bytes as in GPT-2) with a chat template.
    Deterministic."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [END, TURN, TURN_END]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if settings.vocab_size < len(alphabet) + len(special):
        raise ConfigError(
            f"model.tokenizer.vocab_size: {settings.vocab_size}; a byte-level tokenizer needs at least "
            f"{len(alphabet) + len(special)}"
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=settings.vocab_size,
            min_frequency=settings.min_frequency,
            special_tokens=special,
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=END,
        extra_special_tokens=[TURN, TURN_END],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def initialise(settings: FromScratch, auto_class: str, tokenizer: Any, *, seed: int) -> PreTrainedModel:
    """Build a new model of the architecture and sizes asked for, its weights drawn from `seed`.

    Sizes that the architecture does not know are refused, with the nearest spelling.
    """
    import torch
    import transformers

    config = _architecture(settings, tokenizer)
    torch.manual_seed(seed)
    model: PreTrainedModel = getattr(transformers, auto_class).from_config(config, dtype=getattr(torch, settings.dtype))
    return model


def _architecture(settings: FromScratch, tokenizer: Any) -> PretrainedConfig:
    """Return the transformers configuration that `settings` describe, with the tokenizer's vocabulary."""
    from transformers import CONFIG_MAPPING

    if settings.architecture not in CONFIG_MAPPING:
        raise ConfigError(
            f"model.architecture: transformers has no {settings.architecture!r}"
            f"{nearest(settings.architecture, CONFIG_MAPPING.keys())}"
        )
    kind = CONFIG_MAPPING[settings.architecture]
    known = {*kind().to_dict(), *kind.attribute_map}
    problems = [
        Problem("", f"model.sizes.{name}", f"{settings.architecture} has no such setting{nearest(name, known)}")
        for name in settings.sizes
        if name not in known
    ]
    if problems:
        raise ConfigError(problems)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config: PretrainedConfig = kind(**({"vocab_size": len(tokenizer)} | ids | settings.sizes))
    return config


def load(settings: Pretrained, auto_class: str, head: dict[str, Any], processor: Any) -> PreTrainedModel:
    """Load weights by Hub name or folder for the task's Auto class; `head` goes into the model's configuration.

    Only safetensors are read and no code of the model's repository runs. ConfigError when the tokenizer knows more
    tokens than the model.
    """
    import torch
    import transformers

    def read() -> Any:
        return getattr(transformers, auto_class).from_pretrained(
            settings.name,
            revision=settings.revision,
            dtype=getattr(torch, settings.dtype),
            use_safetensors=True,
            **head,
        )

    model: PreTrainedModel = _reaching(settings.name, read)
    embeddings: Any = model.get_input_embeddings().num_embeddings
    if len(processor) > embeddings:
        raise ConfigError(
            f"model.name: {settings.name}: the tokenizer has {len(processor)} tokens, the model {embeddings} embeddings"
        )
    if model.config.pad_token_id is None:
        model.config.pad_token_id = processor.pad_token_id
    return model


def revision_of(model: PreTrainedModel) -> str | None:
    """Return the Hub commit the weights came from, or None for a local folder or new weights."""
    commit: str | None = getattr(model.config, "_commit_hash", None)
    return commit


def _reaching(name: str, read: Callable[[], Any]) -> Any:
    """Call `read`, and turn what the Hub or the folder answers into an error that says what to do."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    if name.startswith((".", "/")) and not Path(name).is_dir():
        raise ConfigError(f"model.name: no folder {name}{_siblings(name)}")
    try:
        return read()
    except (OSError, ValueError) as error:
        cause = next((e for e in _chain(error) if isinstance(e, HfHubHTTPError)), None)
        if isinstance(cause, GatedRepoError):
            raise AccessError(f"{name} is gated: accept its terms on the Hub, then `hf auth login`") from error
        if isinstance(cause, RepositoryNotFoundError):
            raise AccessError(
                f"{name}: no such model on the Hub, or it is private and the token (HF_TOKEN) does not open it"
            ) from error
        if isinstance(error, ValueError) and cause is None:
            raise ConfigError(f"model: {name}: {_first_line(error)}") from error
        raise AccessError(f"model: {name}: {_first_line(error)}") from error


def _chain(error: BaseException | None) -> Iterable[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:300]


def _siblings(name: str) -> str:
    parent = Path(name).parent
    return (
        nearest(Path(name).name, [entry.name for entry in parent.iterdir() if entry.is_dir()])
        if parent.is_dir()
        else ""
    )


def backbone(model: PreTrainedModel) -> nn.Module:
    """Return the part of a language model that ends in hidden states."""
    inner: nn.Module = model.base_model
    return inner


_SCALES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "logit_scale": lambda logits, scale: logits * scale,
    "logits_scaling": lambda logits, scale: logits / scale,
    "final_logit_softcapping": lambda logits, cap: (logits / cap).tanh() * cap,
}
"""What some architectures do to their logits, by the name of the setting that says how much (Cohere; Granite; Gemma
2)."""


@dataclass(frozen=True)
class Head:
    """The output head of a language model: hidden states to logits, scaled or capped as the architecture says."""

    model: PreTrainedModel

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return logits [..., vocabulary] of states [..., width]."""
        logits: Tensor = self.model.get_output_embeddings()(hidden)
        for name, apply in _SCALES.items():
            amount = getattr(self.model.config, name, None)
            logits = logits if amount is None else apply(logits, amount)
        return logits
