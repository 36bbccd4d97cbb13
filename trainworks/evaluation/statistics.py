"""Intervals, paired comparisons and merging over ranks, alike for every metric (Efron and Tibshirani 1993, ch. 13)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from trainworks.errors import EvaluationError
from trainworks.metrics import Metric, Statistics
from trainworks.record import Estimate

__all__ = ["compare", "estimate", "merge"]

OUTSIDE = 0.05
"""Share of the resamples that a 95% interval leaves out, half on each side."""


def estimate(
    metric: Metric,
    statistics: Statistics,
    *,
    clusters: Statistics | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Return the metric's value with its 95% percentile interval, from resampling examples with replacement.

    `clusters` [examples] says by equal numbers which examples hang together, such as answers to one question: they are
    drawn together then, as the interval should be no narrower for examples that say the same again (Davison and Hinkley
    1997, section 3.8).

    `statistics` is [examples, k] as the metric made it. The same rows and seed give the same interval. At most the
    metric's `max_resamples` are drawn; one where the metric is undefined is left out. Below two examples,
    or two clusters, both ends are NaN.
    """
    return _bootstrap(
        metric,
        len(statistics),
        lambda rows: metric.value(statistics.take(rows, axis=0)),
        clusters=clusters,
        resamples=resamples,
        seed=seed,
    )


def compare(
    metric: Metric,
    candidate: Statistics,
    baseline: Statistics,
    *,
    clusters: Statistics | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Return candidate minus baseline with its paired 95% interval: both are resampled by the same examples, or
    clusters of them (see `estimate`).

    Row i of both must be the same example (see `merge`); EvaluationError when the shapes differ.
    """
    if candidate.shape != baseline.shape:
        raise EvaluationError(
            f"{metric.name}: a paired comparison needs the same examples on both sides; found statistics of shape "
            f"{candidate.shape} and {baseline.shape}; evaluate both models on the same split"
        )

    def difference(rows: Statistics) -> float:
        return metric.value(candidate.take(rows, axis=0)) - metric.value(baseline.take(rows, axis=0))

    return _bootstrap(metric, len(candidate), difference, clusters=clusters, resamples=resamples, seed=seed)


def merge(parts: Sequence[tuple[Sequence[int] | Statistics, Statistics]]) -> tuple[Statistics, Statistics]:
    """Join the (example numbers, statistics) of all ranks: sorted by example number, each example once.

    Ranks pad their share of a split with repeated examples; the first one met is kept. The result does not depend on
    how the examples were spread, so neither do an estimate and its interval. There is at least one part; a rank without
    examples gives an empty one. EvaluationError when a part has not as many numbers as rows.
    """
    for rank, (numbers, statistics) in enumerate(parts):
        if len(numbers) != len(statistics):
            raise EvaluationError(
                f"part {rank}: {len(numbers)} example numbers for {len(statistics)} rows of statistics; "
                "give each row its number"
            )
    every = np.concatenate([np.asarray(numbers, dtype=np.int64) for numbers, _ in parts])
    unique, first = np.unique(every, return_index=True)
    return unique, np.concatenate([statistics for _, statistics in parts])[first]


def _bootstrap(
    metric: Metric,
    num_examples: int,
    value_of: Callable[[Statistics], float],
    *,
    clusters: Statistics | None,
    resamples: int,
    seed: int,
) -> Estimate:
    # Rows are taken with `take`: indexing [n, 2] by an array is ten times slower in numpy.
    rng = np.random.default_rng(seed)
    value = value_of(np.arange(num_examples))
    units, draw = _by_example(num_examples, rng) if clusters is None else _by_cluster(clusters, rng)
    draws = min(resamples, metric.max_resamples) if units > 1 else 0
    low, high = _interval([value_of(draw()) for _ in range(draws)])
    return Estimate(value=value, low=low, high=high, n=num_examples, higher_is_better=metric.higher_is_better)


Draws = tuple[int, Callable[[], Statistics]]
"""How many units are resampled, and what draws as many of them: the numbers of their rows."""


def _by_example(num_examples: int, rng: np.random.Generator) -> Draws:
    return num_examples, lambda: np.asarray(rng.integers(num_examples, size=num_examples))


def _by_cluster(clusters: Statistics, rng: np.random.Generator) -> Draws:
    rows = np.argsort(clusters, kind="stable")
    _, begins = np.unique(clusters[rows], return_index=True)
    members = np.split(rows, begins[1:])
    units = len(begins)
    return units, lambda: np.concatenate([members[number] for number in rng.integers(units, size=units)])


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """Order statistics, not interpolated: infinite values (the perplexity of a diverged model) stay what they are."""
    ordered = np.sort([value for value in values if not np.isnan(value)])
    if not len(ordered):
        return float("nan"), float("nan")
    skipped = int(len(ordered) * OUTSIDE / 2)
    return float(ordered[skipped]), float(ordered[-1 - skipped])
