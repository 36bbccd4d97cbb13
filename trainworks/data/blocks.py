"""Documents' tokens to blocks of one length: joined end to end, or each document by itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["closed", "cut", "joined"]

Ids = NDArray[Any]
"""Token ids, or anything else of which each token has one."""


def closed(document: Sequence[int], end: int) -> Ids:
    """Return a document's tokens with the `end` token after them, once."""
    ids = document if len(document) and document[-1] == end else [*document, end]
    return np.asarray(ids, dtype=np.int32)


def cut(tokens: Ids, size: int, *, shared: int = 1) -> list[Ids]:
    """Cut tokens to blocks of `size` + `shared`, each of which has its last `shared` in common with the next.

    By default a block is one of `size` predictions, and every token but the very first is predicted exactly once. The
    last block is as short as what is left.

    >>> [block.tolist() for block in cut(np.arange(6), 3)]
    [[0, 1, 2, 3], [3, 4, 5]]
    """
    return [tokens[start : start + size + shared] for start in range(0, len(tokens) - shared, size)]


def joined(parts: Iterable[Ids], size: int, *, shared: int = 1) -> Iterator[list[Ids]]:
    """Yield the blocks of all parts joined end to end, some at a time; how they come in parts makes no difference.

    >>> [[block.tolist() for block in blocks] for blocks in joined([np.arange(3), np.arange(3, 6)], 3)]
    [[], [[0, 1, 2, 3]], [[3, 4, 5]]]
    """
    left: Ids = np.empty(0, dtype=np.int32)
    for part in parts:
        tokens = np.concatenate([left, part])
        whole = max(0, len(tokens) - shared) // size
        yield cut(tokens[: whole * size + shared], size, shared=shared)
        left = tokens[whole * size :]
    yield cut(left, size, shared=shared)
