"""Text to token ids, and ids to padded batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainworks.data.cache import digest
from trainworks.errors import ConfigError

__all__ = ["encode", "encode_words", "pad", "padded_by_end", "tokenizer_digest"]

Tokenizer = Any

IGNORED = -100
_BATCH = 1000


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Return a SHA-256 of everything that decides what a tokenizer makes of a text."""
    return digest(
        tokenizer.backend_tokenizer.to_str(),
        str(tokenizer.chat_template),
        str(sorted(tokenizer.special_tokens_map.items())),
    )


def encode(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Yield the ids of each text, with what the tokenizer puts around a text by itself, many texts at a time."""
    # Past transformers' call, which also makes masks and offsets, as Python numbers.
    for batch in _batches(texts, tokenizer):
        for encoding in tokenizer.backend_tokenizer.encode_batch_fast(batch):
            yield encoding.ids


def encode_words(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[tuple[list[int], list[int | None]]]:
    """Yield the ids of each text as `encode` does, and of each token the number of its word, None for what stands in
    no word."""
    for batch in _batches(texts, tokenizer):
        for encoding in tokenizer.backend_tokenizer.encode_batch(batch):
            yield encoding.ids, encoding.word_ids


def _batches(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[list[str]]:
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    rest = iter(texts)
    while batch := list(islice(rest, _BATCH)):
        yield batch


def padded_by_end(tokenizer: Tokenizer) -> Tokenizer:
    """Return the tokenizer, padding by its end token where it has no token for that; ConfigError where it has neither,
    or is written in Python, so that it does not tell where tokens stand."""
    if not tokenizer.is_fast:
        raise ConfigError(
            f"the tokenizer of {tokenizer.name_or_path} is written in Python; one with a tokenizer.json is needed"
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ConfigError(
                f"the tokenizer of {tokenizer.name_or_path} has neither padding nor end token to batch with"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def pad(rows: Sequence[NDArray[Any]], value: int, *, width: int | None = None) -> NDArray[np.int64]:
    """Stack rows of different length to [rows, longest], or to `width`, filled up on the right."""
    padded = np.full((len(rows), width or max(map(len, rows))), value, dtype=np.int64)
    for place, row in enumerate(rows):
        padded[place, : len(row)] = row
    return padded
