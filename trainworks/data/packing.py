"""Which rows share a training sample: best-fit-decreasing, planned from their lengths alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainworks.errors import DataError

__all__ = ["Packs", "alone", "pack"]

Integers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Packs:
    """Rows put together to samples; nothing is copied."""

    rows: Integers
    """The row numbers [rows], sample after sample."""
    offsets: Integers
    """Where each sample begins in `rows`, and at last where it ends: [samples + 1]."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def joined(cls, parts: Sequence[Packs]) -> Packs:
        """Return the samples of several sets of rows that stand one after the other."""
        counts = [len(part.rows) for part in parts]
        firsts = np.cumsum(counts) - counts
        rows = [part.rows + first for part, first in zip(parts, firsts, strict=True)]
        ends = [part.offsets[1:] + first for part, first in zip(parts, firsts, strict=True)]
        return cls(np.concatenate(rows), np.concatenate([[0], *ends]))

    def take(self, samples: NDArray[Any]) -> tuple[Integers, Integers]:
        """Return the rows of some samples, in their order, and which of these samples each row belongs to: two arrays
        [rows]."""
        begins, sizes = self.offsets[samples], self.offsets[samples + 1] - self.offsets[samples]
        owners = np.repeat(np.arange(len(samples)), sizes)
        within = np.arange(len(owners)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return self.rows[begins[owners] + within], owners

    def totals(self, lengths: Integers) -> Integers:
        """Return the tokens [samples] of every sample, of the tokens [all rows] of every row."""
        return np.add.reduceat(lengths[self.rows], self.offsets[:-1])


def alone(number: int) -> Packs:
    """Make each of `number` rows a sample of its own."""
    return Packs(np.arange(number), np.arange(number + 1))


def pack(lengths: Integers, size: int) -> Packs:
    """Put rows of these lengths together to samples of at most `size` tokens, leaving few places empty.

    Best-fit-decreasing (Johnson 1973): the longest row first, each into the fullest sample that has room for it (of
    several, the one filled last), or else into a new one. Rows of one length are placed many at a time, so that a
    million takes about a second. The plan depends on nothing but the arguments. Parts of the rows, such as the windows
    of a stream, are packed one by one and `Packs.joined`. DataError when a row is longer than a sample.

    >>> pack(np.array([3, 9, 6, 2]), 10)
    Packs(rows=array([1, 0, 2, 3]), offsets=array([0, 1, 3, 4]))
    """
    _check(lengths, size)
    samples = _best_fit(np.maximum(lengths, 1), size)  # a row without a token still stands somewhere
    # Samples are numbered as they were opened; inside one, rows stand in their own order.
    rows = np.argsort(samples, kind="stable")
    return Packs(rows, np.concatenate([[0], np.cumsum(np.bincount(samples))]))


def _check(lengths: Integers, size: int) -> None:
    if not len(lengths):
        raise DataError("there are no rows to pack")
    longest = int(np.argmax(lengths))
    if lengths[longest] > size:
        raise DataError(
            f"prepared row {longest}: {lengths[longest]:,} tokens, more than the {size:,} of batch.pack; raise "
            "batch.pack, or have the task make shorter rows (task.max_length, task.block)"
        )


class _Open:
    """The samples that still have room, by how much."""

    def __init__(self) -> None:
        self._samples: defaultdict[int, list[int]] = defaultdict(list)
        self._rooms = 0  # bit r is set where a sample has room for r more: the tightest fit is found in one operation

    def tightest(self, length: int) -> int:
        """Return the least room that `length` fits into, or 0 when no sample has as much."""
        fitting = self._rooms >> length
        return length + (fitting & -fitting).bit_length() - 1 if fitting else 0

    def take(self, room: int, number: int) -> list[int]:
        """Take out up to `number` samples with this much room, first the one that was put in last."""
        samples = self._samples[room]
        taken = samples[: -number - 1 : -1]
        del samples[-number:]
        self._rooms ^= (not samples) << room
        return taken

    def put(self, samples: list[int], room: int) -> None:
        if samples:
            self._samples[room].extend(samples)
            self._rooms |= 1 << room


def _best_fit(lengths: Integers, size: int) -> Integers:
    """Return the sample [rows] each row goes to."""
    placed = np.empty_like(lengths)  # in the order of placing: the longest row first
    begun, opened, start = _Open(), 0, 0
    values, counts = np.unique(lengths, return_counts=True)
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        end = start + count
        while start < end:
            # A sample that took a row is now the one with the least room, so it takes the next ones until it has none.
            room = begun.tightest(length)
            each = (room or size) // length
            wanted = -(-(end - start) // each)
            if room:
                taken = begun.take(room, wanted)
            else:
                room, taken, opened = size, list(range(opened, opened + wanted)), opened + wanted
            filled = np.repeat(taken, each)[: end - start]
            placed[start : start + len(filled)] = filled
            start += len(filled)
            rest = len(filled) - each * (len(taken) - 1)
            begun.put(taken[:-1], room - each * length)
            begun.put(taken[-1:], room - rest * length)
    samples = np.empty_like(placed)
    samples[np.argsort(-lengths, kind="stable")] = placed
    return samples
