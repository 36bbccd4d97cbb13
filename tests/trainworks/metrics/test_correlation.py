"""Correlations are scipy's, on every resample, ties and all."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from trainworks.evaluation import estimate
from trainworks.metrics import Correlation, Prediction


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_a_correlation_is_scipys_on_every_resample(name: str) -> None:
    rng = np.random.default_rng(0)
    wanted = rng.integers(6, size=80).astype(float)
    metric = Correlation(name)  # type: ignore[arg-type]
    pairs = [Prediction(p, r) for p, r in zip(wanted + rng.normal(size=80), wanted, strict=True)]
    statistics = metric.statistics(pairs)
    theirs = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}[name]
    for size in (80, 20):
        rows = rng.integers(80, size=size)
        assert metric.value(statistics[rows]) == pytest.approx(theirs(*statistics[rows].T).statistic)
    found = estimate(metric, statistics)
    assert found.low < found.value < found.high


@pytest.mark.parametrize("pairs", [[], [(1.0, 2.0)], [(1.0, 2.0), (1.0, 3.0)]], ids=["none", "one", "constant"])
def test_where_nothing_varies_there_is_no_correlation(pairs: list[tuple[float, float]]) -> None:
    metric = Correlation("spearman")
    assert np.isnan(metric.value(metric.statistics([Prediction(*pair) for pair in pairs])))
