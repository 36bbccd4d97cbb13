"""A mixture keeps its shares at every moment, in an order that depends on nothing but seed and position."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from trainworks.data.mixture import Ingredient, MixedPlan, mixed, shares
from trainworks.errors import ConfigError

WEIGHTS = {"web": 0.6, "books": 0.3, "code": 0.1}


def ingredients(epochs: float = float("inf")) -> list[Ingredient]:
    draw = np.random.default_rng(0)
    counts, longest = (9_000, 700, 2_500), (900, 4_000, 300)
    return [
        Ingredient(name, draw.integers(1, most, count), weight, epochs)
        for (name, weight), count, most in zip(WEIGHTS.items(), counts, longest, strict=True)
    ]


def drawn(plan: MixedPlan, start: int = 0) -> np.ndarray:
    return np.concatenate([plan.step(number)[0] for number in range(start, plan.num_steps)])


def test_shares_hold_to_half_a_percent_in_any_million_tokens() -> None:
    parts = ingredients()
    plan = mixed(parts, seed=3, per_step=64, total=40_000)
    sizes = np.concatenate([part.sizes for part in parts])[drawn(plan)]
    passed = np.cumsum(sizes)
    assert passed[-1] > 15_000_000
    worst = 0.0
    for begin in range(0, len(sizes), 97):
        before = passed[begin - 1] if begin else 0
        end = int(np.searchsorted(passed, before + 1_000_000))
        if end >= len(sizes):
            break
        window = sizes[begin:end]
        got = np.bincount(plan.sources[begin:end], weights=window, minlength=3) / window.sum()
        worst = max(worst, float(np.abs(got - list(WEIGHTS.values())).max()))
    assert 0.0 < worst < 0.005


def test_shares_may_be_of_rows() -> None:
    parts = [Ingredient(name, np.ones(50, dtype=np.int64), weight) for name, weight in WEIGHTS.items()]
    plan = mixed(parts, seed=0, per_step=10, total=1_000)
    assert Counter(plan.sources[:500].tolist()) == {0: 300, 1: 150, 2: 50}


def test_every_sample_of_a_source_comes_once_in_each_of_its_passes() -> None:
    plan = mixed(ingredients(), seed=1, per_step=64, total=30_000)
    passes: Counter[tuple[int, int]] = Counter()
    for number in range(plan.num_steps):
        passes.update(zip(*(values.tolist() for values in plan.step(number)), strict=True))
    assert max(passes.values()) == 1
    books = [key for key in passes if 9_000 <= key[0] < 9_700]
    assert len([sample for sample, epoch in books if epoch == 0]) == 700
    assert max(epoch for _, epoch in books) >= 2


def test_any_step_is_found_without_those_before_it_and_whatever_the_total() -> None:
    plan, longer = (mixed(ingredients(), seed=5, per_step=32, total=total) for total in (5_000, 20_000))
    assert np.array_equal(drawn(plan)[: 32 * 100], np.concatenate([longer.step(number)[0] for number in range(100)]))
    assert np.array_equal(drawn(plan)[32 * 57 :], drawn(plan, start=57))
    assert not np.array_equal(drawn(plan), drawn(mixed(ingredients(), seed=6, per_step=32, total=5_000)))


def test_a_source_that_may_not_be_repeated_leaves_its_share_to_the_others() -> None:
    web, books, code = ingredients()
    plan = mixed([web, Ingredient("books", books.sizes, 0.3, epochs=1), code], seed=0, per_step=64, total=20_000)
    assert (plan.sources == 1).sum() == 700
    rest = plan.sources[-5_000:]
    sizes = np.concatenate([part.sizes for part in (web, books, code)])[drawn(plan)][-5_000:]
    assert sizes[rest == 0].sum() / sizes.sum() == pytest.approx(6 / 7, abs=0.005)


def test_a_budget_beyond_what_the_sources_may_give_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"their epochs allow 12,200 samples, the budget asks for 12,201"):
        mixed(ingredients(epochs=1), seed=0, per_step=8, total=12_201)
    assert len(drawn(mixed(ingredients(epochs=1), seed=0, per_step=8, total=12_200))) == 12_200


def test_temperature_evens_shares_out_and_weights_take_its_place() -> None:
    assert shares([90.0, 10.0], [None, None]) == [0.9, 0.1]
    assert shares([90.0, 10.0], [None, None], temperature=1e9) == pytest.approx([0.5, 0.5])
    assert shares([90.0, 10.0], [1, 3]) == [0.25, 0.75]
    with pytest.raises(ConfigError, match="every source a weight, or none"):
        shares([1.0, 1.0], [1.0, None])


@pytest.mark.parametrize(("count", "epochs"), [(3, 1.5), (7, 0.1), (100, 0.29), (1001, 0.5), (1001, 2.5)])
def test_a_part_of_a_pass_is_a_whole_number_of_samples(count: int, epochs: float) -> None:
    sizes = np.full(count, 5)
    allowed = max(1, round(count * epochs))
    plan = mixed(
        [Ingredient("a", sizes, 1.0, epochs), Ingredient("b", sizes, 1.0)], seed=0, per_step=4, total=6 * count
    )
    assert (plan.sources == 0).sum() == allowed
    alone = mixed([Ingredient("a", sizes, 1.0, epochs)], seed=0, per_step=4, total=allowed)
    assert len(drawn(alone)) == allowed


def test_a_mixture_goes_on_from_any_position_with_the_same_samples() -> None:
    whole = mixed(ingredients(), seed=5, per_step=32, total=5_000)
    longer = mixed(ingredients(), seed=5, per_step=32, total=9_000)
    for step, position, per_step in ((157, 5_000, 32), (10, 320, 7), (40, 999, 64)):
        rest = replace(longer, per_step=per_step).going_on(step=step, position=position)
        assert np.array_equal(drawn(rest, step), drawn(longer)[position:])
    assert np.array_equal(drawn(whole), drawn(longer)[:5_000])
    steps = whole.going_on(step=10, position=320, steps=200)
    assert np.array_equal(drawn(steps, 10), drawn(longer)[320 : 320 + 190 * 32])


def test_a_new_order_of_a_mixture_passes_over_every_source_anew() -> None:
    plan = mixed(ingredients(), seed=5, per_step=64, total=40_000)
    new = plan.going_on(step=100, position=6_400, origin=6_400)
    pairs = [pair for number in range(100, new.num_steps) for pair in zip(*map(list, new.step(number)), strict=True)]
    assert len(pairs) == len(set(pairs)) == 33_600
    assert min(epoch for _, epoch in pairs) == 6_400
    books = [sample for sample, epoch in pairs if 9_000 <= sample < 9_700 and epoch == 6_400]
    assert sorted(books) == list(range(9_000, 9_700))
    again = new.going_on(step=200, position=12_800, origin=6_400)
    assert np.array_equal(drawn(again, 200), drawn(new, 100)[6_400:])
