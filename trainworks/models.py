"""Where weights come from: an architecture and sizes, or a name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from trainworks.data.cache import digest
from trainworks.errors import AccessError, ConfigError, Problem, nearest
from trainworks.heads import backbone
from trainworks.image_models import encoder_alone, finish, image_sizes
from trainworks.schema import FromScratch, Pretrained, Quantise
from trainworks.trust import check_links, check_model, check_processor, inside

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = [
    "check",
    "dequantised",
    "fingerprint",
    "head_fingerprint",
    "initialise",
    "load",
    "load_processor",
    "new_ids",
    "outline",
    "pad_with",
    "processor_of",
    "revision_of",
    "vocabulary",
]

_HUB_SECONDS = 10


def check(settings: Pretrained | FromScratch) -> None:
    """See that the model can be had, before anything loads; ConfigError or AccessError when not.

    The folder holds one, or the Hub lets us in; transformers knows the architecture and its sizes.
    """
    _CHECKS[type(settings)](settings)


def _check_pretrained(settings: Pretrained) -> None:
    if _is_folder("model.name", settings.name):
        _check_folder(Path(settings.name))
        return
    names = _ask_hub(settings.name, settings.revision)
    if names is not None and not any(name.endswith(".safetensors") for name in names):
        raise ConfigError(
            f"model.name: {settings.name} holds no safetensors weights, and no others are read; the Hub may hold a "
            "converted copy: model.revision: refs/pr/N"
        )
    _reaching(settings.name, "the settings", partial(check_model, settings.name, settings.revision))


def _check_scratch(settings: FromScratch) -> None:
    _check_sizes(settings)
    if isinstance(settings.image_processor, str) and not _is_folder("model.image_processor", settings.image_processor):
        _ask_hub(settings.image_processor, "main")
    if isinstance(settings.tokenizer, str) and not _is_folder("model.tokenizer", settings.tokenizer):
        _ask_hub(settings.tokenizer, "main")


def _is_folder(key: str, name: str) -> bool:
    """Tell a local folder from a Hub name; ConfigError when it can be neither."""
    folder = Path(name)
    if not folder.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ConfigError(f"{key}: no folder {name}{_siblings(folder)}")
    return folder.is_dir()


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ConfigError(
                f"model.name: {folder} holds an adapter alone; name a whole model, such as the folder `merged` that a "
                "run with tuning.merge: true writes"
            )
        inside = sorted(str(path.parent) for path in folder.glob("*/config.json"))
        guess = f" (did you mean '{inside[0]}'?)" if inside else ""
        raise ConfigError(f"model.name: {folder} holds no config.json, so it is no Hugging Face model{guess}")
    check_links(folder)
    check_model(str(folder), "main")
    _check_weights(folder)


def _check_weights(folder: Path) -> None:
    """Read the headers of the safetensors files, and see that these are what transformers will read."""
    from safetensors import SafetensorError, safe_open

    if shards := sorted(folder.glob("shard-*-model-*.safetensors")):
        raise ConfigError(
            f"model.name: {folder}: {shards[0].name} is a part of a distributed checkpoint, which would be read "
            "instead of model.safetensors; name a folder with whole weights"
        )
    index = folder / "model.safetensors.index.json"
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
        for name in sorted(names):
            if not inside(folder / name, folder):
                raise ConfigError(f"model.name: {index}: weight_map: {name} is a link to a file outside the folder")
            if not (folder / name).is_file():
                raise ConfigError(f"model.name: {folder} holds no {name}, and only safetensors weights are read")
            with safe_open(folder / name, framework="pt"):
                pass
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ConfigError(f"model.name: {folder}: its safetensors weights cannot be read: {_said(error)}") from error


def _ask_hub(name: str, revision: str) -> list[str] | None:
    """Return the names of a model's files, or None when offline.

    Asked once, with a short timeout, before transformers tries for a minute.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

    try:
        info = HfApi().model_info(name, revision=revision, timeout=_HUB_SECONDS)
    except OfflineModeIsEnabled:
        return None
    except (HTTPError, OSError, ValueError) as error:
        raise _refused(name, error) from None
    return [file.rfilename for file in info.siblings or ()]


def processor_of(settings: Pretrained, kind: str) -> Any:
    """Load a pretrained model's `tokenizer` or `image_processor`, with the tokens that are new to it."""
    processor = load_processor(kind, settings.name, settings.revision)
    if settings.new_tokens:
        _add_tokens(processor, kind, settings.new_tokens)
    return processor


def load_processor(kind: str, name: str, revision: str = "main") -> Any:
    """Load a `tokenizer` or an `image_processor` by Hub name or folder."""
    import transformers

    auto: Any = {"tokenizer": transformers.AutoTokenizer, "image_processor": transformers.AutoImageProcessor}[kind]

    def read() -> Any:
        if Path(name).is_dir():
            check_links(Path(name))
        check_processor(kind, name, revision)
        return auto.from_pretrained(name, revision=revision, trust_remote_code=False)

    return _reaching(name, f"the {kind.replace('_', ' ')}", read)


def _add_tokens(processor: Any, kind: str, new_tokens: Sequence[str]) -> None:
    if kind != "tokenizer":
        raise ConfigError("model.new_tokens: this task reads no text; leave it out")
    if there := [token for token in new_tokens if token in processor.get_vocab()]:
        raise ConfigError(f"model.new_tokens: the tokenizer has {there[0]!r} already; leave it out")
    from tokenizers import AddedToken

    processor.add_tokens([AddedToken(token, normalized=False) for token in new_tokens])


def new_ids(settings: Pretrained | FromScratch, processor: Any) -> list[int]:
    """Return the ids of the tokens that the settings add to a tokenizer."""
    tokens = _new_tokens(settings)
    ids: list[int] = processor.convert_tokens_to_ids(list(tokens)) if tokens else []
    return ids


def _new_tokens(settings: Pretrained | FromScratch) -> tuple[str, ...]:
    return settings.new_tokens if isinstance(settings, Pretrained) else ()


def outline(
    settings: Pretrained | FromScratch, auto_class: str, head: dict[str, Any], processor: Any
) -> PreTrainedModel:
    """Build the model from its configuration alone, on torch's meta device, which takes neither time nor memory;
    ConfigError when there is no such model for the task."""
    import torch
    import transformers

    config = _CONFIGURE[type(settings)](settings, auto_class, head, processor)
    auto: Any = getattr(transformers, auto_class)
    with _refusing("model"), torch.device("meta"), torch.random.fork_rng(devices=[]):
        model: PreTrainedModel = auto.from_config(config)
        if _new_tokens(settings) and len(processor) > vocabulary(model):
            model.resize_token_embeddings(len(processor), mean_resizing=False)
    return model


def initialise(
    settings: FromScratch, auto_class: str, processor: Any, *, seed: int, head: Mapping[str, Any] = MappingProxyType({})
) -> PreTrainedModel:
    """Build a new model of the architecture and sizes asked for, its weights drawn from `seed`; `head` goes into its
    configuration.

    Sizes that the architecture does not know are refused, with the nearest spelling.
    """
    import torch
    import transformers

    config = _from_sizes(settings, head, processor)
    torch.manual_seed(seed)
    model: PreTrainedModel = getattr(transformers, auto_class).from_config(config, dtype=getattr(torch, settings.dtype))
    finish(model)
    return model


def _check_sizes(settings: FromScratch) -> None:
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
    with _refusing(f"model.sizes: {settings.architecture}"):
        kind(**settings.sizes)


def _from_sizes(settings: FromScratch, head: Mapping[str, Any], processor: Any) -> PretrainedConfig:
    """Return the transformers configuration that `settings` describe, with the tokenizer's vocabulary or the image
    processor's size."""
    from transformers import CONFIG_MAPPING

    _check_sizes(settings)
    kind = CONFIG_MAPPING[settings.architecture]
    told = _of_tokenizer(processor, kind) if settings.image_processor is None else image_sizes(processor, kind)
    with _refusing(f"model.sizes: {settings.architecture}"):
        config: PretrainedConfig = kind(**(told | dict(head) | settings.sizes))
    return config


def _of_tokenizer(tokenizer: Any, kind: Any) -> dict[str, Any]:
    # ModernBERT's own numbers for the last two lie outside of a smaller vocabulary.
    names = ("bos_token_id", "eos_token_id", "pad_token_id", *({"cls_token_id", "sep_token_id"} & {*kind().to_dict()}))
    return {"vocab_size": len(tokenizer)} | {name: getattr(tokenizer, name) for name in names}


def _from_name(settings: Pretrained, auto_class: str, head: dict[str, Any], processor: Any) -> PretrainedConfig:
    from transformers import AutoConfig

    def read() -> PretrainedConfig:
        check_model(settings.name, settings.revision)
        told = _told(settings, auto_class, head)
        config: PretrainedConfig = told.get("config") or AutoConfig.from_pretrained(
            settings.name, revision=settings.revision, trust_remote_code=False, **head
        )
        return config

    found: PretrainedConfig = _reaching(settings.name, "the configuration", read)
    return found


_CHECKS: dict[type, Callable[[Any], None]] = {Pretrained: _check_pretrained, FromScratch: _check_scratch}
_CONFIGURE: dict[type, Callable[[Any, str, dict[str, Any], Any], PretrainedConfig]] = {
    Pretrained: _from_name,
    FromScratch: lambda settings, auto_class, head, processor: _from_sizes(settings, head, processor),
}


def load(settings: Pretrained, auto_class: str, head: dict[str, Any], processor: Any, *, seed: int) -> PreTrainedModel:
    """Load weights by Hub name or folder for the task's Auto class.

    `head` goes into the model's configuration, and weights that are not there, or are of other classes, are drawn from
    `seed`.

    Only safetensors are read and no code of the model's repository runs.
    """
    import torch
    import transformers

    def read() -> Any:
        check_model(settings.name, settings.revision)
        return getattr(transformers, auto_class).from_pretrained(
            settings.name,
            revision=settings.revision,
            dtype=getattr(torch, settings.dtype),
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **rounding | _told(settings, auto_class, head),
        )

    rounding = {}
    if settings.quantise is not None:
        rounding = _rounding(settings.quantise, outline(settings, auto_class, head, processor))
    torch.manual_seed(seed)
    model: PreTrainedModel
    model, found = _reaching(settings.name, "the weights", read)
    _check_shapes(settings, model, found["mismatched_keys"])
    if settings.quantise is not None:
        _train_as_it_infers(model)
    if settings.new_tokens:
        _embed(model, new_ids(settings, processor), len(processor))
    return model


def _told(settings: Pretrained, auto_class: str, head: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a model is loaded with: its head's settings or, for an encoder alone, all of its configuration."""
    from transformers import AutoConfig

    whole = AutoConfig.from_pretrained(settings.name, revision=settings.revision, trust_remote_code=False)
    own = None if auto_class == "AutoModelForPreTraining" else encoder_alone(whole, head)
    return dict(head) if own is None else {"config": own}


def _check_shapes(settings: Pretrained, model: PreTrainedModel, differing: Iterable[tuple[str, Any, Any]]) -> None:
    """Refuse weights of other shapes than the model's, but for those that its classes give their first size: they are
    drawn anew."""
    classes = len(model.config.id2label or ())
    if other := [each for each in sorted(differing) if each[2][0] not in (classes, classes + 1)]:
        name, there, wanted = other[0]
        raise ConfigError(
            f"model: the weights of {settings.name}: {name} is {tuple(there)}, and the model wants {tuple(wanted)}"
        )


def _rounding(quantise: Quantise, outline: PreTrainedModel) -> dict[str, Any]:
    """Return what transformers is told to round weights by, which it does as it reads them; the head stays as it is."""
    from transformers import BitsAndBytesConfig

    body = backbone(outline)
    # transformers 5.23 would also convert a classifier with a bias, which is not there to be read, and not round it.
    heads = [name for name, part in outline.named_children() if part is not body]
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": quantise.double}
    return {
        "quantization_config": BitsAndBytesConfig(
            **(four if quantise.bits == 4 else {"load_in_8bit": True}), llm_int8_skip_modules=heads
        ),
        "device_map": {"": "cpu"},  # the run moves it to its device, as it does every model
    }


def _train_as_it_infers(model: PreTrainedModel) -> None:
    """Let 4-bit layers compute in whatever type comes in, in evaluations as in training.

    bitsandbytes 0.50.2 lays the weights out anew at the first evaluation on a processor with AVX512-BF16. Training then
    goes on in bfloat16 and with wrong gradients; delete once it does not.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False
            layer.compute_type_is_set, layer.compute_dtype = True, None


def _embed(model: PreTrainedModel, ids: Sequence[int], size: int) -> None:
    """Make room for `size` tokens, and begin new ones, in the output head too, as the mean of those before them (Hewitt
    2021, https://nlp.stanford.edu/~johnhew/vocab-expansion.html)."""
    import torch

    if size > vocabulary(model):
        model.resize_token_embeddings(size, mean_resizing=False)
    layers: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    with torch.no_grad():
        for weight in {id(layer.weight): layer.weight for layer in layers if layer is not None}.values():
            weight[list(ids)] = weight[: min(ids)].double().mean(0).to(weight.dtype)


def dequantised(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model whose weights were rounded to a few bits with the values of these in its own type, in place."""
    whole: PreTrainedModel = model.dequantize(dtype=model.dtype)
    return whole


def vocabulary(model: PreTrainedModel) -> int:
    """Return how many tokens a model has embeddings for."""
    size: Any = model.get_input_embeddings().num_embeddings
    return int(size)


def pad_with(model: PreTrainedModel, tokenizer: Any) -> None:
    """Tell a model what its tokenizer pads with, where it does not know."""
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id


def revision_of(model: PreTrainedModel) -> str | None:
    """Return the Hub commit the weights came from, or None for a local folder or new weights."""
    commit: str | None = getattr(model.config, "_commit_hash", None)
    return commit


def fingerprint(settings: Pretrained | FromScratch, model: PreTrainedModel, *, seed: int) -> str:
    """Return a SHA-256 of the weights a run begins from.

    Of weights that were read, it is taken over names, shapes, types and contents of the model without its head, on all
    cores; new ones are told by what they are drawn from, for other processors draw other bits.
    """
    return _FINGERPRINTS[type(settings)](settings, model, seed)


def _drawn(settings: FromScratch, model: PreTrainedModel, seed: int) -> str:
    return digest(
        "drawn", settings.architecture, model.config.to_json_string(use_diff=False), settings.dtype, str(seed)
    )


def head_fingerprint(model: PreTrainedModel) -> str:
    """Return a SHA-256 of the weights of a model's vocabulary head, which `fingerprint` leaves out."""
    head: Any = model.get_output_embeddings()
    return _hashed(head.state_dict())


def _contents(settings: Pretrained, model: PreTrainedModel, seed: int) -> str:
    return _hashed(backbone(model).state_dict())


def _hashed(weights: Mapping[str, Tensor]) -> str:
    import hashlib
    from concurrent.futures import ThreadPoolExecutor

    import torch

    def hashed(named: tuple[str, Tensor]) -> str:
        name, tensor = named
        content = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data
        return f"{name} {tuple(tensor.shape)} {tensor.dtype} {hashlib.sha256(content).hexdigest()}"

    with ThreadPoolExecutor() as threads:  # hashlib lets other threads run meanwhile
        return digest(*threads.map(hashed, sorted(weights.items())))


_FINGERPRINTS: dict[type, Callable[[Any, PreTrainedModel, int], str]] = {Pretrained: _contents, FromScratch: _drawn}


def _reaching(name: str, part: str, read: Callable[[], Any]) -> Any:
    """Call `read`, and turn what the Hub or the folder answers into an error that says what to do."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        with _refusing(f"model: {part} of {name}"):
            return read()
    except (OSError, HTTPError) as error:
        if Path(name).is_dir():
            raise ConfigError(f"model: {part} of {name}: {_said(error)}") from error
        cause = next((each for each in _chain(error) if isinstance(each, HTTPError)), error)
        raise _refused(name, cause) from error


def _refused(name: str, error: Exception) -> AccessError:
    """Say what to do about the Hub's answer, or about none; never in its client's words, which may quote the token."""
    from huggingface_hub import errors, is_offline_mode

    if is_offline_mode():
        return AccessError(
            f"{name}: not a folder here, nor in the cache, and the Hub is switched off (HF_HUB_OFFLINE); load it once "
            "online, or name a folder"
        )
    mends: dict[type[Exception], str] = {
        errors.GatedRepoError: f"gated; accept its terms at https://huggingface.co/{name}, then `hf auth login`",
        errors.RevisionNotFoundError: "no such revision on the Hub; check model.revision",
        errors.RepositoryNotFoundError: "not on the Hub (nor a folder here), or private and not open to "
        "the token given; check the spelling, or `hf auth login`",
        errors.HFValidationError: "neither a folder here nor a Hub name (owner/name)",
        UnicodeEncodeError: "the token holds characters that no token has; check HF_TOKEN",
    }
    if mend := next((text for kind, text in mends.items() if isinstance(error, kind)), None):
        return AccessError(f"{name}: {mend}")
    if isinstance(error, errors.HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        refused = "the token (HF_TOKEN) is missing, wrong or expired: `hf auth login`"
        return AccessError(
            f"{name}: the Hub answered {status}; {refused if status in (401, 403) else 'try again later'}"
        )
    return AccessError(
        f"{name}: the Hub cannot be reached ({type(error).__name__}); check the network and HF_ENDPOINT, or set "
        "HF_HUB_OFFLINE=1 to use what is cached"
    )


@contextmanager
def _refusing(where: str) -> Iterator[None]:
    """Turn what transformers raises for settings and files it does not understand into a ConfigError."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    refused = (AttributeError, ImportError, KeyError, RecursionError, TypeError, ValueError)
    try:
        yield
    except BaseException as error:
        # tokenizers 0.23 raises Exception itself for a tokenizer.json that it cannot use.
        if type(error) is Exception or isinstance(error, (*refused, SafetensorError, StrictDataclassError)):
            raise ConfigError(f"{where}: {_said(error)}") from error
        raise


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _said(error: BaseException) -> str:
    """Return a library's message as one line of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return f"no {text}" if isinstance(error, KeyError) else text[:400]


def _siblings(folder: Path) -> str:
    there = folder.parent.iterdir() if folder.parent.is_dir() else ()
    return nearest(folder.name, [entry.name for entry in there if entry.is_dir()])
