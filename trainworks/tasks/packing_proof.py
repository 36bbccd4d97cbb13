"""Whether a model keeps rows apart that share a line of a batch, found out by asking it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["agree", "keeps_apart"]

Ids = NDArray[np.int64]
States = Callable[[Sequence[Ids], Sequence[int]], "Tensor"]
"""From rows, and the line each is on, to the states [tokens, width] of all their tokens but the last, row by row."""

_LEAK = 1e-5
_ROUNDING = 1e-4
_ROUNDINGS = 16.0


def keeps_apart(states: States, vocabulary: int, *, eps: float) -> bool:
    """Tell whether rows that share a line have the states they have alone, and whether none moves with another.

    Four short rows, two on each of two lines of unlike length, so that there is padding as well. The measure of both
    differences is what is seen when the two rows of a line are one, for states differ in size from model to model. A
    row alone is computed in other shapes and so rounded otherwise, to the `eps` of the weights' type; but what another
    row's tokens change must be next to nothing in any type.
    """
    rows = np.split(np.arange(1, 29) % vocabulary, [8, 16, 22])
    changed = [(row + 1 - place % 2) % vocabulary for place, row in enumerate(rows)]
    joined = [np.concatenate([first[:-1], second]) for first, second in (rows[:2], rows[2:])]
    second = np.repeat([False, True, False, True], [len(row) - 1 for row in rows])
    apart, shared = states(rows, [0, 1, 2, 3])[second], states(rows, [0, 0, 1, 1])[second]
    seen = (states(joined, [0, 1])[second] - apart).norm()
    leaked = (states(changed, [0, 0, 1, 1])[second] - shared).norm()
    return bool(leaked <= _LEAK * seen) and agree((shared - apart).norm(), seen, eps=eps)


def agree(difference: Tensor, seen: Tensor, *, eps: float) -> bool:
    """Tell whether states differ by rounding alone, next to what is `seen` where the model is given other tokens."""
    return bool(difference <= max(_ROUNDING, _ROUNDINGS * eps) * seen)
