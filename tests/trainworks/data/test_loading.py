"""Windows hold what the plan says, on any number of ranks, and resume by their number alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from trainworks.data.cache import table
from trainworks.data.loading import Batch, Row, Samples, Window, evaluation_batches, windows
from trainworks.data.order import Plan
from trainworks.data.packing import alone, pack

SIZES = [random.Random(0).randint(1, 30) for _ in range(50)]
PLAN = Plan(seed=9, num_samples=50, per_step=12, total=70)


def rows() -> Any:
    return table({"input_ids": [list(range(size)) for size in SIZES], "length": SIZES})


def collate(rows: Sequence[Row]) -> Batch:
    # What an augmentation would draw: a function of the row's own seed, whichever batch it is in.
    return {
        "draw": torch.tensor([random.Random(row["seed"]).random() for row in rows]),
        "line": torch.tensor([row["pack"] for row in rows]),
    }


def taken(ranks: int, *, micro: int = 4, start: int = 0, workers: int = 0) -> list[list[Window]]:
    return [
        list(
            windows(
                Samples(rows(), alone(50)),
                PLAN,
                collate,
                start=start,
                ranks=ranks,
                rank=rank,
                micro=micro,
                workers=workers,
                pin=False,
            )
        )
        for rank in range(ranks)
    ]


def contents(windows_of_ranks: list[list[Window]]) -> list[dict[int, float]]:
    """Return, per step, each counted row and what was drawn for it."""
    steps = []
    for windows_of_step in zip(*windows_of_ranks, strict=True):
        drawn: dict[int, float] = {}
        for window in windows_of_step:
            for batch in window.batches:
                for index, weight, draw in zip(batch["index"], batch["weight"], batch["draw"], strict=True):
                    if weight:
                        assert int(index) not in drawn
                        drawn[int(index)] = float(draw)
        steps.append(drawn)
    return steps


def test_every_number_of_ranks_sees_the_same_samples_and_draws() -> None:
    alone = contents(taken(1))
    assert [len(step) for step in alone] == [12, 12, 12, 12, 12, 10]
    assert all(set(step) == set(PLAN.step(number)[0].tolist()) for number, step in enumerate(alone))
    for ranks, micro in ((2, 3), (4, 1), (3, 5)):
        assert contents(taken(ranks, micro=micro)) == alone


def test_starting_later_gives_what_would_have_come() -> None:
    assert contents(taken(2, start=3)) == contents(taken(2))[3:]


def test_workers_change_nothing() -> None:
    assert contents(taken(1, workers=2)) == contents(taken(1))


def test_a_second_epoch_draws_anew() -> None:
    first, *_, last = contents(taken(1))
    steps = contents(taken(1))
    again = [
        (step[row], other[row])
        for step in steps
        for other in steps
        if step is not other
        for row in step
        if row in other
    ]
    assert len(again) >= 20
    assert all(one != other for one, other in again)
    assert first.keys() != last.keys()


def test_tokens_are_those_of_the_whole_step() -> None:
    for window_of_rank_0, number in zip(taken(3)[0], range(6), strict=True):
        assert window_of_rank_0.tokens == sum(SIZES[row] for row in PLAN.step(number)[0])
        assert window_of_rank_0.samples == PLAN.size(number)


def test_neighbours_in_length_share_a_micro_batch() -> None:
    lengths = [[SIZES[index] for index in batch["index"].tolist()] for batch in taken(1)[0][0].batches]
    assert [size for batch in lengths for size in batch] == sorted((s for b in lengths for s in b), reverse=True)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_evaluation_takes_every_row_once_and_equally_often(ranks: int) -> None:
    shares = [list(evaluation_batches(rows(), collate, ranks=ranks, rank=rank, micro=4)) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    counted = [
        index
        for share in shares
        for batch in share
        for index, weight in zip(batch["index"].tolist(), batch["weight"].tolist(), strict=True)
        if weight
    ]
    assert sorted(counted) == list(range(50))


def test_loading_draws_nothing_from_the_global_states() -> None:
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    taken(2)
    list(evaluation_batches(rows(), collate, ranks=1, rank=0, micro=4))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]  # noqa: NPY002


PACKS = pack(np.array(SIZES), 40)


def taken_packed(ranks: int, *, start: int = 0) -> list[list[Window]]:
    plan = Plan(seed=9, num_samples=len(PACKS), per_step=6, total=len(PACKS) + 4)
    samples = Samples(rows(), PACKS)
    return [
        list(windows(samples, plan, collate, start=start, ranks=ranks, rank=rank, micro=2, workers=0, pin=False))
        for rank in range(ranks)
    ]


def test_packed_samples_bring_all_their_rows() -> None:
    alone_in_epoch = {row: draw for step in contents(taken(1))[:4] for row, draw in step.items()}
    steps = contents(taken_packed(1))
    first = [row for step in steps[: len(PACKS) // 6] for row in step]
    assert len(first) == len(set(first)) > 40
    # What a row draws does not depend on the company it is in.
    drawn = {row: draw for step in steps[: len(PACKS) // 6] for row, draw in step.items()}
    assert len(drawn.keys() & alone_in_epoch.keys()) > 40
    assert all(drawn[row] == alone_in_epoch[row] for row in drawn.keys() & alone_in_epoch.keys())


def test_rows_of_one_sample_stand_on_one_line() -> None:
    owner = {row: sample for sample in range(len(PACKS)) for row in PACKS.take(np.array([sample]))[0].tolist()}
    for window in taken_packed(1)[0]:
        for batch in window.batches:
            lines: dict[int, set[int]] = {}
            for row, line in zip(batch["index"].tolist(), batch["line"].tolist(), strict=True):
                lines.setdefault(line, set()).add(owner[row])
            assert sorted(lines) == list(range(len(lines)))
            assert [len(owners) for owners in lines.values()] == [1] * len(lines)


def test_packed_steps_are_the_same_on_every_number_of_ranks_and_from_any_start() -> None:
    whole = contents(taken_packed(1))
    assert contents(taken_packed(4)) == whole  # three rounds of samples for four ranks: some are fillers
    assert contents(taken_packed(3, start=2)) == whole[2:]


def test_packed_steps_count_samples_and_all_their_tokens() -> None:
    windows_of_rank = taken_packed(2)[1]
    full, rest = divmod(len(PACKS) + 4, 6)
    assert [window.samples for window in windows_of_rank] == [6] * full + ([rest] if rest else [])
    for window, step in zip(windows_of_rank, contents(taken_packed(2)), strict=True):
        assert window.tokens == sum(SIZES[row] for row in step)
