"""Train a tokenizer on a run's own text, once: what was trained is kept by content."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

from trainworks.data.cache import digest, folder, once
from trainworks.errors import ConfigError
from trainworks.schema import NewTokenizer

__all__ = ["new_tokenizer", "trained_tokenizer"]

END, TURN = "<|endoftext|>", "<|im_start|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|endoftext|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""Near ChatML, but a turn ends with the token that ends a document: a model pretrained here knows it already, and an
adapter, which trains no embeddings, could hardly learn a new one. A tokenizer trained here carries it."""


def trained_tokenizer(settings: NewTokenizer, texts: Iterable[str], *, key: str) -> Any:
    """Return the tokenizer that `new_tokenizer` makes of `texts`, from disk where it is there.

    `key` stands for the texts. Any process may call it, any number at once: one trains and the others wait for it.
    """
    from transformers import PreTrainedTokenizerFast

    code = Path(__file__).read_text(encoding="utf-8")
    name = digest(key, settings.model_dump_json(), version("tokenizers"), code)
    place = folder() / "tokenizers" / name

    def make() -> None:
        staged = place.with_name(f".{name}.{uuid4().hex}")
        new_tokenizer(settings, texts).save_pretrained(staged)
        staged.rename(place)

    once(place, make)
    return PreTrainedTokenizerFast.from_pretrained(place)


def new_tokenizer(settings: NewTokenizer, texts: Iterable[str]) -> Any:
    """Train a byte-level BPE tokenizer (Sennrich et al. 2016, over bytes as in GPT-2) with a chat template.
    Deterministic."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [END, TURN]
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
        extra_special_tokens=[TURN],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
