"""The order of samples is a pure function, and each rank's share of it fits the others'."""

from __future__ import annotations

import numpy as np
import pytest

from trainworks.data.order import Key, Plan, deal, mix, permuted


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
