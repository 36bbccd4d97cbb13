"""Which tokens of a text are masked, and what is put in their place (Devlin et al. 2018, arXiv:1810.04805)."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["BEGINS", "GOES_ON", "NEVER", "chosen", "content_seed", "kinds", "replaced", "target"]

NEVER, BEGINS, GOES_ON = 0, 1, 2
"""What a token is to masking: special, the beginning of what is masked together, or the rest of it."""

Kinds = NDArray[np.uint8]
Places = NDArray[np.int64]


def kinds(ids: NDArray[Any], words: Sequence[int | None], special: Sequence[int]) -> Kinds:
    """Return each token's kind, [tokens], by the number of its word; a token without a word is one by itself.

    >>> kinds(np.array([2, 7, 8, 9, 3]), [None, 0, 0, 1, None], special=[2, 3]).tolist()
    [0, 1, 2, 1, 0]
    """
    numbers = np.array([-1 if word is None else word for word in words], dtype=np.int64)
    goes_on = np.zeros(len(ids), dtype=np.bool_)
    goes_on[1:] = (numbers[1:] == numbers[:-1]) & (numbers[1:] >= 0)
    return np.where(np.isin(ids, special), NEVER, np.where(goes_on, GOES_ON, BEGINS)).astype(np.uint8)


def content_seed(ids: NDArray[Any]) -> int:
    """Return a seed that is a function of the tokens alone."""
    return int.from_bytes(blake2b(np.ascontiguousarray(ids, dtype="<i4").tobytes(), digest_size=8).digest(), "little")


def target(able: int, share: float) -> int:
    """Return how many of so many tokens are masked, one at least."""
    return max(1, round(share * able))


def chosen(row: Kinds, share: float, draw: np.random.Generator) -> Places:
    """Return the places of the tokens to predict, in order: `share` of those that are not special.

    Words are taken whole, in a drawn order, while they fit; the first in any case. What a block's border has cut off a
    word is a word. None are chosen where all tokens are special.
    """
    able: Places = np.flatnonzero(row != NEVER)
    if not len(able):
        return able
    words = np.cumsum(row[able] == BEGINS)
    words -= words[0]
    sizes = np.bincount(words)
    order = draw.permutation(len(sizes))
    fitting = int(np.searchsorted(np.cumsum(sizes[order]), target(len(able), share), side="right"))
    taken = np.zeros(len(sizes), dtype=np.bool_)
    taken[order[: max(1, fitting)]] = True
    places: Places = able[taken[words]]
    return places


def replaced(
    ids: NDArray[Any], places: Places, draw: np.random.Generator, *, mask: int, vocabulary: int, mixed: bool
) -> NDArray[Any]:
    """Return the tokens with those at `places` masked.

    When `mixed`, of these 80% become the `mask`, 10% a random token, and 10% stay, so that the model cannot take a
    token it sees for the right one.
    """
    masked = ids.copy()
    masked[places] = mask
    if mixed:
        lot = draw.random(len(places))
        others = draw.integers(vocabulary, size=len(places))
        masked[places] = np.where(lot < 0.8, mask, np.where(lot < 0.9, others, ids[places]))
    return masked
