"""Packing puts every row into one sample, fills the samples, and depends on the lengths alone."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from trainworks.data.packing import Packs, alone, pack
from trainworks.errors import DataError

CASES = [(seed, 1 + seed % 60, random.Random(seed).randint(1, 40)) for seed in range(300)]


def drawn(seed: int, number: int, size: int) -> Any:
    return np.random.default_rng(seed).integers(1, size + 1, number)


def contents(packs: Packs) -> list[list[int]]:
    bounds = zip(packs.offsets[:-1], packs.offsets[1:], strict=True)
    return [packs.rows[begin:end].tolist() for begin, end in bounds]


def naive(lengths: list[int], size: int) -> list[list[int]]:
    """Return best-fit-decreasing as one would write it down: row by row, looking at every sample."""
    samples: list[list[int]] = []
    rooms: list[int] = []
    touched: list[int] = []
    for turn, row in enumerate(sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))):
        fitting = [sample for sample, room in enumerate(rooms) if room >= lengths[row]]
        if fitting:
            best = min(fitting, key=lambda sample: (rooms[sample], -touched[sample]))
        else:
            best = len(samples)
            samples.append([])
            rooms.append(size)
            touched.append(turn)
        samples[best].append(row)
        rooms[best] -= lengths[row]
        touched[best] = turn
    return [sorted(sample) for sample in samples]


def test_it_is_best_fit_decreasing() -> None:
    several = 0
    for seed, number, size in CASES:
        lengths = drawn(seed, number, size)
        found = contents(pack(lengths, size))
        assert found == naive(lengths.tolist(), size)
        several += any(len(sample) > 2 for sample in found)
    assert several > 50


def test_every_row_is_in_one_sample_and_no_sample_is_over_its_size() -> None:
    lengths = np.clip(np.random.default_rng(1).lognormal(4, 1, 20_000), 1, 512).astype(np.int64)
    packs = pack(lengths, 512)
    assert np.array_equal(np.sort(packs.rows), np.arange(20_000))
    totals = packs.totals(lengths)
    assert len(totals) == len(packs)
    assert totals.max() == 512
    assert totals.sum() == lengths.sum()
    assert lengths.sum() / (512 * len(packs)) > 0.999


def test_the_plan_depends_on_the_lengths_alone() -> None:
    lengths = drawn(3, 500, 100)
    random.seed(1)
    first = pack(lengths.copy(), 100)
    random.seed(2)
    again = pack(lengths.copy(), 100)
    assert np.array_equal(first.rows, again.rows)
    assert np.array_equal(first.offsets, again.offsets)


def test_parts_of_the_rows_are_packed_one_by_one_and_joined() -> None:
    lengths = drawn(4, 100, 50)
    parts = [pack(lengths[:30], 50), pack(lengths[30:], 50)]
    joined = Packs.joined(parts)
    after = [[row + 30 for row in sample] for sample in contents(parts[1])]
    assert contents(joined) == contents(parts[0]) + after
    assert joined.totals(lengths).sum() == lengths.sum()


def test_taking_samples_tells_whose_each_row_is() -> None:
    packs = Packs(rows=np.array([4, 1, 0, 2, 3]), offsets=np.array([0, 2, 3, 5]))
    rows, owners = packs.take(np.array([2, 0, 2]))
    assert rows.tolist() == [2, 3, 4, 1, 2, 3]
    assert owners.tolist() == [0, 0, 1, 1, 2, 2]


def test_rows_alone_are_taken_as_they_are() -> None:
    rows, owners = alone(5).take(np.array([3, 1]))
    assert (rows.tolist(), owners.tolist()) == ([3, 1], [0, 1])
    assert alone(3).totals(np.array([5, 6, 7])).tolist() == [5, 6, 7]


def test_a_row_longer_than_a_sample_is_refused_by_its_number() -> None:
    with pytest.raises(DataError, match=r"prepared row 2: 1,001 tokens, more than the 1,000 of batch\.pack"):
        pack(np.array([5, 1000, 1001, 7]), 1000)


def test_no_rows_are_refused() -> None:
    with pytest.raises(DataError, match="no rows to pack"):
        pack(np.array([], dtype=np.int64), 10)


def test_a_row_without_tokens_stands_somewhere_too() -> None:
    assert contents(pack(np.array([0, 10, 0]), 10)) == [[1], [0, 2]]
