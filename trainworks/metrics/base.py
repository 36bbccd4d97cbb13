"""What a metric is: predictions to one row of numbers per example, and any selection of rows to a value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

__all__ = ["Metric", "Prediction", "RankedPrediction", "Statistics"]

Statistics = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Prediction:
    """What a model said of one example, and what was wanted; both small enough to be kept for a whole split."""

    prediction: Any
    reference: Any


@dataclass(frozen=True)
class RankedPrediction(Prediction):
    """A prediction of one class, and how many classes were held to be likelier than the right one."""

    rank: int


class Metric(Protocol):
    """Measure predictions through statistics of single examples.

    Intervals, paired comparisons, slices and merging over ranks follow from these rows; a metric needs none of its own.
    """

    max_resamples: ClassVar[int]
    """Most bootstrap resamples its interval may take; few where a value is slow to compute."""

    @property
    def name(self) -> str:
        """The name it is reported under."""

    @property
    def higher_is_better(self) -> bool:
        """The direction of improvement."""

    def statistics(self, predictions: Sequence[Prediction]) -> Statistics:
        """Return an array [examples, k] whose row i depends on prediction i alone."""

    def value(self, statistics: Statistics) -> float:
        """Return the metric over these rows: any subset, in any order, repeats allowed; NaN where it is undefined."""
