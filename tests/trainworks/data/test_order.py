"""The order of samples is a pure function, and each rank's share of it fits the others'."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from trainworks.data.order import Key, Plan, deal, mix, permuted
from trainworks.errors import ConfigError


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65, 1000, 4097])
def test_every_epoch_holds_every_sample_once(size: int) -> None:
    for epoch in range(3):
        assert sorted(permuted(np.arange(size), size, 5, epoch)) == list(range(size))


def test_one_place_of_a_huge_permutation_is_found_without_the_others() -> None:
    size = 10**15
    places = permuted(np.array([0, 1, size - 1]), size, 1)
    assert len(set(places.tolist())) == 3
    assert all(0 <= place < size for place in places)


def test_all_orders_are_about_equally_likely() -> None:
    seen: dict[tuple[int, ...], int] = {}
    for seed in range(4800):
        order = tuple(permuted(np.arange(4), 4, seed).tolist())
        seen[order] = seen.get(order, 0) + 1
    assert len(seen) == 24
    # 200 expected each; chi-squared with 23 degrees of freedom stays under 50 in 999 of 1,000 cases.
    assert sum((count - 200) ** 2 / 200 for count in seen.values()) < 50


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(permuted(np.arange(50), 50, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_a_hash_depends_on_every_word_and_on_their_order() -> None:
    assert len({int(mix(1, 2)), int(mix(2, 1)), int(mix(1, 3)), int(mix(1)), int(mix(1, 2, 0))}) == 5


def test_steps_follow_one_another_without_a_seam() -> None:
    plan = Plan(seed=3, num_samples=10, per_step=4, total=25)
    assert plan.num_steps == 7
    assert [plan.size(step) for step in range(7)] == [4, 4, 4, 4, 4, 4, 1]
    steps = [plan.step(step) for step in range(7)]
    rows = np.concatenate([rows for rows, _ in steps])
    epochs = np.concatenate([epochs for _, epochs in steps])
    assert epochs.tolist() == [0] * 10 + [1] * 10 + [2] * 5
    assert sorted(rows[:10]) == sorted(rows[10:20]) == list(range(10))
    assert rows[:10].tolist() != rows[10:20].tolist()


def drawn(plan: Plan, begin: int, end: int) -> list[tuple[int, int]]:
    """Return the (sample, epoch) of each place of some steps."""
    steps = [plan.step(number) for number in range(begin, end)]
    return [pair for step in steps for pair in zip(*(part.tolist() for part in step), strict=True)]


@pytest.mark.parametrize("per_step", [1, 3, 4, 5, 16, 100])
def test_a_plan_goes_on_from_any_position_with_any_number_of_samples_a_step(per_step: int) -> None:
    whole = Plan(seed=3, num_samples=10, per_step=4, total=25)
    for step in range(whole.num_steps + 1):
        position = min(4 * step, 25)
        rest = replace(whole, per_step=per_step).going_on(step=step, position=position)
        assert drawn(whole, 0, step) + drawn(rest, step, rest.num_steps) == drawn(whole, 0, whole.num_steps)
        assert rest.num_steps == step + -(-(25 - position) // per_step)


def test_a_longer_plan_goes_on_behind_a_short_last_step() -> None:
    short = Plan(seed=3, num_samples=10, per_step=4, total=25)
    longer = replace(short, total=40).going_on(step=short.num_steps, position=25)
    undisturbed = Plan(seed=3, num_samples=10, per_step=4, total=40)
    assert drawn(short, 0, 7) + drawn(longer, 7, longer.num_steps) == drawn(undisturbed, 0, 10)
    with pytest.raises(ConfigError, match="used up: the run stands at step 7, after 25 samples"):
        replace(short, total=24).going_on(step=7, position=25)


def test_a_budget_of_steps_ends_with_its_step_however_many_samples_were_taken() -> None:
    plan = Plan(seed=3, num_samples=10, per_step=8, total=80).going_on(step=4, position=16, steps=10)
    assert (plan.num_steps, plan.total) == (10, 16 + 6 * 8)


def test_a_new_order_begins_where_it_is_said_and_is_like_none_before() -> None:
    old = Plan(seed=3, num_samples=10, per_step=4, total=60)
    new = old.going_on(step=3, position=12, origin=12)
    pairs = drawn(new, 3, new.num_steps)
    assert len(pairs) == 48
    for begin in (0, 10, 20, 30):
        assert sorted(sample for sample, _ in pairs[begin : begin + 10]) == list(range(10))
    assert not {epoch for _, epoch in drawn(old, 0, old.num_steps)} & {epoch for _, epoch in pairs}
    later = new.going_on(step=7, position=28, origin=12)
    assert drawn(later, 7, later.num_steps) == pairs[16:]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("micro", [1, 2, 5])
@pytest.mark.parametrize("number", [1, 2, 7, 8, 13])
def test_the_ranks_shares_are_the_step_and_as_many(ranks: int, micro: int, number: int) -> None:
    keys = [Key(row, 0, 1.0) for row in range(100, 100 + number)]
    shares = [deal(keys, ranks=ranks, rank=rank, micro=micro) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    assert all(1 <= len(batch) <= micro for share in shares for batch in share)
    counted = [key.sample for share in shares for batch in share for key in batch if key.weight]
    assert sorted(counted) == list(range(100, 100 + number))
    assert all(key.sample == 100 for share in shares for batch in share for key in batch if not key.weight)
