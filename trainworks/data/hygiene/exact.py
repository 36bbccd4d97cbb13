"""Exact duplicates: texts that are the same, character by character; the first of them stays."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

__all__ = ["exact_duplicates", "first_of_each", "text_digests"]


def text_digests(texts: Sequence[str]) -> NDArray[np.uint64]:
    """Return 128 bits of BLAKE2b of each text, as [number of texts, 2]."""
    joined = b"".join(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for text in texts)
    return np.frombuffer(joined, "<u8").reshape(-1, 2)


def first_of_each(digests: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return which rows of `digests` are not the same as one before them."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable, so that equal rows keep their order
    first = np.ones(len(digests), np.bool_)
    first[order[1:]] = (digests[order[1:]] != digests[order[:-1]]).any(axis=1)
    return first


def exact_duplicates(texts: Sequence[str]) -> NDArray[np.bool_]:
    """Return which texts to keep: all but those that stood before.

    >>> exact_duplicates(["a", "b", "a"]).tolist()
    [True, True, False]
    """
    return first_of_each(text_digests(texts))
