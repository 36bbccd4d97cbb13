"""The order of samples: a pure function of (seed, epoch, position), so a run resumes anywhere in no time.

Nothing here is drawn in sequence. The sample at any position of any epoch is computed by itself, whatever came before
and however many processes share the work; that is why a resumed run, or one on another number of devices, sees what the
uninterrupted one would have seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from trainworks.errors import ConfigError

__all__ = ["Key", "Plan", "deal", "mix", "permuted"]

Integers = NDArray[np.int64]
Words = NDArray[np.uint64]

_ROUNDS = 8


class Key(NamedTuple):
    """One sample to fetch: its number, the pass over the data it belongs to, and 1.0, or 0.0 for a filler that must not
    count."""

    sample: int
    epoch: int
    weight: float


def mix(*words: int | Integers | Words) -> Words:
    """Hash whole numbers (element by element) to 64 well-mixed bits, by SplitMix64's finaliser (Steele et al. 2014)."""
    state = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for word in words:
            state = (state ^ np.asarray(word, dtype=np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def permuted(indices: Integers, size: int, *key: int) -> Integers:
    """Send each of the `indices` in [0, size) to its place in the permutation of that range that `key` names.

    A Feistel network over the next power of four, walked until it lands inside the range (Black & Rogaway 2002): no
    table is built, so one element of a permutation of 10^12 costs as much as one of ten.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    places = _feistel(indices.astype(np.uint64), half, mask, key)
    while (outside := places >= size).any():
        places[outside] = _feistel(places[outside], half, mask, key)
    return places.astype(np.int64)


def _feistel(words: Words, half: int, mask: np.uint64, key: tuple[int, ...]) -> Words:
    left, right = words >> np.uint64(half), words & mask
    for number in range(_ROUNDS):
        left, right = right, left ^ (mix(*key, number, right) & mask)
    return (left << np.uint64(half)) | right


@dataclass(frozen=True)
class Plan:
    """Which samples every optimizer step takes.

    Steps follow one another without a seam at the end of an epoch, so only the run's very last step can be short.
    """

    seed: int
    num_samples: int
    """Samples in one epoch."""
    per_step: int
    """Samples per optimizer step, over all processes."""
    total: int
    """Samples in the whole run."""
    first_step: int = 0
    """The step it holds from; those before may have been taken by another plan."""
    first_position: int = 0
    """Samples that were taken before that step."""
    origin: int = 0
    """The position at which its order begins: there the run went on with other data."""

    @property
    def num_steps(self) -> int:
        """Optimizer steps in the whole run."""
        return self.first_step - (self.first_position - self.total) // self.per_step

    @property
    def identity(self) -> str:
        """What decides the order besides the rows: plans that have it in common take the same sample from each
        position."""
        return f"seed {self.seed}, {self.num_samples} samples"

    def position(self, number: int) -> int:
        """Return how many samples are taken before step `number`."""
        return self.first_position + (number - self.first_step) * self.per_step

    def size(self, number: int) -> int:
        """Samples in step `number`: `per_step`, or what is left for the last."""
        return min(self.per_step, self.total - self.position(number))

    def step(self, number: int) -> tuple[Integers, Integers]:
        """Return (samples, epochs), each [samples of step `number`]; steps count from 0."""
        positions = self.position(number) - self.origin + np.arange(self.size(number), dtype=np.int64)
        epochs = positions // self.num_samples + self.origin  # no pass is like one from before the origin
        samples = np.empty_like(positions)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            samples[inside] = permuted(positions[inside] % self.num_samples, self.num_samples, self.seed, int(epoch))
        return samples, epochs

    def idle(self, ranks: int) -> float:
        """Return the share of the ranks' time that fillers take, where a step's samples do not divide among them."""
        return 1.0 - self.per_step / (ranks * -(-self.per_step // ranks))

    def going_on(self, *, step: int, position: int, origin: int = 0, steps: int | None = None) -> Self:
        """Return the plan of a run that has taken `step` steps over `position` samples, however many each took.

        It ends with the same total, or with step `steps` where the budget was given in steps. ConfigError when that is
        past already.
        """
        total = self.total if steps is None else position + (steps - step) * self.per_step
        if total < position:
            raise ConfigError(
                f"budget: it is used up: the run stands at step {step:,}, after {position:,} samples; give it more, or "
                "name another output"
            )
        return replace(self, total=total, first_step=step, first_position=position, origin=origin)


def deal(keys: Sequence[Key], *, ranks: int, rank: int, micro: int) -> list[list[Key]]:
    """Split one step's samples into the micro-batches of one rank.

    Every rank gets the same number of micro-batches, for they meet in collectives; a rank with none left repeats the
    step's first sample with weight 0. Neighbours in `keys` share a micro-batch, so sorting them by length beforehand
    saves padding and changes no sum.
    """
    rounds = [keys[start : start + ranks * micro] for start in range(0, len(keys), ranks * micro)]
    filler = [keys[0]._replace(weight=0.0)]
    return [list(together[rank::ranks]) or filler for together in rounds]
