"""Texts to hashed words and n-grams, many texts at a time and in whole-number arithmetic alone.

A word is what is left between separators once case, Unicode form (NFKC), punctuation and white space are taken away.
Scripts written without spaces give a word for each character.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Hashes", "Ragged", "batches", "constants", "mix", "ngrams", "read_words"]

Hashes = NDArray[np.uint64]
Numbers = NDArray[np.int64]

_BATCH_CHARACTERS = 1_500_000
"""Characters hashed at a time: some 24 bytes of working memory each."""
_STEP = 0x9E3779B97F4A7C15
_BASE = 0xD6E8FEB86659FD93
_INVERSE = pow(_BASE, -1, 2**64)

_ALONE = re.compile(r"([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff])")
_BETWEEN = re.compile(
    # \w leaves out the marks that belong to letters: accents, and the vowel signs of Hebrew, Arabic and India.
    r"[^\w\u0300-\u036f\u0591-\u05c7\u0610-\u065f\u06d6-\u06ed\u0900-\u0963\u0966-\u0dff\u0e31-\u0e4e]+"
)
_ASCII = bytes(
    code if code >= 128 else ord(chr(code).lower()) if chr(code).isalnum() else ord(" ") for code in range(256)
)


class Ragged(NamedTuple):
    """Hashes of several texts one after the other: those of text `i` are `hashes[offsets[i] : offsets[i + 1]]`."""

    hashes: Hashes
    offsets: Numbers

    @property
    def counts(self) -> Numbers:
        """How many there are of each text."""
        return np.diff(self.offsets)

    @property
    def owners(self) -> Numbers:
        """The text that each hash belongs to."""
        return np.repeat(np.arange(len(self.offsets) - 1), self.counts)


def mix(values: Hashes) -> Hashes:
    """Return 64-bit numbers scrambled one to one, in place (the finaliser of splitmix64, Steele et al. 2014)."""
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def constants(count: int, seed: int) -> Hashes:
    """Return `count` fixed 64-bit numbers that look random; the same on every machine and in every version."""
    return mix((np.arange(1, count + 1, dtype=np.uint64) + np.uint64(seed << 32)) * np.uint64(_STEP))


_BYTES = constants(256, seed=1)


def batches(texts: Sequence[str]) -> Iterator[tuple[int, Sequence[str]]]:
    """Yield the texts in parts that fit in little memory, each with the number of its first."""
    first, size = 0, 0
    for number, text in enumerate(texts):
        if size and size + len(text) > _BATCH_CHARACTERS:
            yield first, texts[first:number]
            first, size = number, 0
        size += len(text)
    if first < len(texts):
        yield first, texts[first:]


def read_words(texts: Sequence[str]) -> Ragged:
    """Return the hashed words of every text."""
    parts = [_normal(text) for text in texts]
    ends = np.cumsum(np.fromiter(map(len, parts), np.int64, len(parts)) + 1)
    letters = np.frombuffer(b" " + b" ".join(parts).translate(_ASCII) + b" ", np.uint8)
    inside = letters != ord(" ")
    edges = np.flatnonzero(inside[1:] != inside[:-1]) + 1
    starts, stops = edges[::2], edges[1::2]
    hashes = _spans(letters, starts, stops)
    return Ragged(hashes, np.concatenate([[0], np.searchsorted(starts, ends, side="right")]))


def _normal(text: str) -> bytes:
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text).casefold()
        text = _BETWEEN.sub(" ", _ALONE.sub(r" \1 ", text))
    return text.encode("utf-8", "surrogatepass")


def _spans(letters: NDArray[np.uint8], starts: Numbers, stops: Numbers) -> Hashes:
    """Hash the bytes between each start and stop, wherever they stand: a polynomial in `_BASE` modulo 2^64."""
    powers = np.full(len(letters), _BASE, np.uint64)
    powers[0] = 1
    np.multiply.accumulate(powers, out=powers)
    sums = _BYTES[letters]
    sums *= powers
    np.cumsum(sums, out=sums)
    powers[:] = _INVERSE
    powers[0] = 1
    np.multiply.accumulate(powers, out=powers)
    # The byte before a word is a separator, so that the sum up to it is the sum of all before the word.
    return mix((sums[stops - 1] - sums[starts - 1]) * powers[starts])


def ngrams(words: Ragged, size: int, *, whole: bool = True) -> Ragged:
    """Return the hash of every `size` words in a row; a text of fewer gives one of all its words, if `whole`."""
    counts = words.counts
    full = np.maximum(counts - size + 1, 0)
    short = (counts > 0) & (counts < size) & whole
    offsets = np.concatenate([[0], np.cumsum(full + short)])
    hashes = np.empty(offsets[-1], np.uint64)
    left = np.repeat(words.offsets[1:], counts) - np.arange(len(words.hashes))
    hashes[np.repeat(~short, full + short)] = _rows(words.hashes, np.flatnonzero(left >= size), size)
    for length in np.unique(counts[short]):
        these = short & (counts == length)
        hashes[offsets[:-1][these]] = _rows(words.hashes, words.offsets[:-1][these], int(length))
    return Ragged(hashes, offsets)


def _rows(hashes: Hashes, starts: Numbers, size: int) -> Hashes:
    total = np.full(len(starts), size, np.uint64)
    for place in range(size):
        total *= np.uint64(_BASE)
        total += hashes[starts + place]
    return mix(total)
