"""Intervals cover what they say, pairing helps, and merging ranks forgets how the examples were spread."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import pytest

from trainworks.errors import EvaluationError
from trainworks.evaluation.statistics import compare, estimate, merge
from trainworks.metrics import Accuracy, BinaryF1, MacroF1, Mean, Ratio


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    metric, truth, draws = Accuracy(), 0.8, 300
    covered = 0
    for draw in range(draws):
        found = estimate(metric, (rng.random((200, 1)) < truth).astype(float), resamples=400, seed=draw)
        covered += found.low <= truth <= found.high
    assert 0.90 <= covered / draws <= 0.99


def test_the_interval_of_a_ratio_covers_the_truth() -> None:
    rng = np.random.default_rng(2)
    metric, draws = Ratio("loss", higher_is_better=False), 300
    covered = 0
    for draw in range(draws):
        tokens = rng.integers(1, 50, size=200)
        losses = tokens * (3 + rng.normal(scale=0.5, size=200))
        found = estimate(metric, np.stack([losses, tokens], axis=1), resamples=400, seed=draw)
        covered += found.low <= 3 <= found.high
    assert 0.90 <= covered / draws <= 0.99


def test_an_estimate_says_what_it_is_of_and_repeats() -> None:
    metric = Ratio("loss", higher_is_better=False)
    statistics = np.random.default_rng(0).random((50, 2)) + 1
    found = estimate(metric, statistics, seed=7)
    assert found.value == metric.value(statistics)
    assert found.low < found.value < found.high
    assert (found.n, found.higher_is_better) == (50, False)
    assert found == estimate(metric, statistics, seed=7)
    assert found != estimate(metric, statistics, seed=8)


def test_below_two_examples_there_is_no_interval() -> None:
    for n, value in ((1, 1.0), (0, math.nan)):
        found = estimate(Accuracy(), np.ones((n, 1)))
        assert found.n == n
        assert found.value == pytest.approx(value, nan_ok=True)
        assert math.isnan(found.low)
        assert math.isnan(found.high)


def test_the_interval_by_clusters_covers_the_truth_where_one_by_examples_does_not() -> None:
    rng = np.random.default_rng(3)
    draws, by_cluster, by_example = 100, 0, 0
    clusters = np.repeat(np.arange(40), 10)
    for draw in range(draws):
        values = np.repeat(rng.normal(size=40), 10) + rng.normal(scale=0.3, size=400)
        statistics = values[:, None]
        together = estimate(Mean("margin"), statistics, clusters=clusters, resamples=200, seed=draw)
        apart = estimate(Mean("margin"), statistics, resamples=200, seed=draw)
        by_cluster += together.low <= 0 <= together.high
        by_example += apart.low <= 0 <= apart.high
    assert 0.88 <= by_cluster / draws <= 0.99
    assert by_example / draws < 0.7


def test_clusters_of_one_example_each_give_the_interval_by_examples() -> None:
    statistics = np.random.default_rng(0).random((50, 1))
    plain = estimate(Mean("margin"), statistics, seed=5)
    assert estimate(Mean("margin"), statistics, clusters=np.arange(50), seed=5) == plain
    assert estimate(Mean("margin"), statistics, clusters=np.arange(50) * 7, seed=5) == plain


def test_a_difference_is_drawn_by_clusters_too() -> None:
    rng = np.random.default_rng(4)
    before, gain = rng.normal(size=(300, 1)), np.repeat(rng.normal(size=30), 10)[:, None]
    clusters = np.repeat(np.arange(30), 10)
    together = compare(Mean("margin"), before + gain, before, clusters=clusters)
    apart = compare(Mean("margin"), before + gain, before)
    assert together.value == apart.value == pytest.approx(gain.mean())
    assert together.high - together.low > 2 * (apart.high - apart.low)


def test_one_cluster_has_no_interval() -> None:
    found = estimate(Accuracy(), np.ones((20, 1)), clusters=np.zeros(20, dtype=np.int64))
    assert math.isnan(found.low)
    assert (found.value, found.n) == (1.0, 20)


def test_resamples_where_the_metric_is_undefined_are_left_out() -> None:
    statistics = np.array([[True, True], [False, False], [False, False]])
    found = estimate(BinaryF1(), statistics, resamples=200)
    assert (found.low, found.value, found.high) == (1, 1, 1)


def test_an_infinite_metric_has_an_infinite_interval() -> None:
    found = estimate(Ratio("loss", False), np.array([[math.inf, 1.0]] * 5), resamples=50)
    assert (found.low, found.value, found.high) == (math.inf, math.inf, math.inf)


def test_a_metric_bounds_its_resamples() -> None:
    class Slow(Accuracy):
        max_resamples = 3
        calls = 0

        def value(self, statistics: Any) -> float:
            Slow.calls += 1
            return super().value(statistics)

    estimate(Slow(), np.ones((5, 1)))
    assert Slow.calls == 1 + 3


def correlated(n: int = 500) -> tuple[Any, Any]:
    rng = np.random.default_rng(5)
    baseline = (rng.random((n, 1)) < 0.7).astype(float)
    return np.where(rng.random((n, 1)) < 0.05, 1.0, baseline), baseline


def test_pairing_narrows_the_interval_of_correlated_models() -> None:
    candidate, baseline = correlated()
    metric = Accuracy()
    paired = compare(metric, candidate, baseline)
    alone = [estimate(metric, each) for each in (candidate, baseline)]
    unpaired = math.hypot(*(each.high - each.low for each in alone))
    assert paired.value == pytest.approx(alone[0].value - alone[1].value)
    assert 0 < paired.low < paired.value < paired.high
    assert paired.high - paired.low < unpaired / 2


def test_comparing_a_model_with_itself_finds_nothing() -> None:
    candidate, _ = correlated()
    found = compare(Accuracy(), candidate, candidate)
    assert (found.low, found.value, found.high) == (0, 0, 0)


def test_a_comparison_is_the_negative_of_its_mirror() -> None:
    candidate, baseline = correlated()
    one, other = compare(Accuracy(), candidate, baseline), compare(Accuracy(), baseline, candidate)
    assert (one.value, one.low, one.high) == pytest.approx((-other.value, -other.high, -other.low))


def test_a_comparison_over_other_examples_is_refused() -> None:
    with pytest.raises(EvaluationError, match=r"same examples.*\(5, 1\) and \(4, 1\)"):
        compare(Accuracy(), np.ones((5, 1)), np.ones((4, 1)))


def test_merging_sorts_the_examples_and_drops_padding() -> None:
    statistics = np.random.default_rng(0).random((7, 2))
    ranks = [[0, 2, 4, 6], [1, 3, 5, 0]]
    numbers, merged = merge([(each, statistics[each]) for each in ranks])
    assert numbers.tolist() == list(range(7))
    assert np.array_equal(merged, statistics)


def test_the_estimate_does_not_depend_on_how_examples_were_spread() -> None:
    metric = Ratio("loss", higher_is_better=False)
    statistics = np.random.default_rng(0).random((101, 2)) + 1
    shuffled = np.random.default_rng(1).permutation(101)
    spreads: list[list[Any]] = [[range(101)], [shuffled], [shuffled[:50], shuffled[40:], []]]
    merged = [merge([(each, statistics[np.asarray(each, dtype=int)]) for each in spread])[1] for spread in spreads]
    assert estimate(metric, merged[0]) == estimate(metric, merged[1]) == estimate(metric, merged[2])


def test_merging_keeps_texts_as_they_are() -> None:
    rows = np.array([["b", "b"], ["a", "c"]], dtype=object)
    numbers, merged = merge([([1, 0], rows), ([], rows[:0])])
    assert numbers.tolist() == [0, 1]
    assert merged.tolist() == [["a", "c"], ["b", "b"]]


def test_a_row_without_its_number_is_refused() -> None:
    with pytest.raises(EvaluationError, match="part 1: 1 example numbers for 2 rows"):
        merge([([0], np.ones((1, 1))), ([1], np.ones((2, 1)))])


@pytest.mark.parametrize(
    "metric", [Ratio("loss", False), MacroF1(range(3)), Accuracy()], ids=lambda metric: metric.name
)
def test_a_hundred_thousand_examples_take_moments(metric: Any) -> None:
    statistics = np.random.default_rng(0).integers(2, size=(100_000, 2))
    began = time.process_time()
    found = estimate(metric, statistics, resamples=100)
    assert time.process_time() - began < 1
    assert found.low < found.value < found.high
