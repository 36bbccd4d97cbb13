"""Metrics of one class per example: accuracy and F1, as scikit-learn defines them.

Only their sums are written here: scikit-learn's functions are too slow for a thousand resamples. Tests compare the two.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from trainworks.errors import EvaluationError
from trainworks.metrics.base import Prediction, Statistics

__all__ = ["Accuracy", "BinaryF1", "MacroF1"]


@dataclass(frozen=True)
class Accuracy:
    """Count the examples whose prediction equals the reference."""

    name: str = "accuracy"
    higher_is_better: ClassVar[bool] = True
    max_resamples: ClassVar[int] = 10_000

    def statistics(self, predictions: Sequence[Prediction]) -> Statistics:
        """Return [examples, 1]: 1 where the prediction is right."""
        hits = [each.prediction == each.reference for each in predictions]
        return np.array(hits, dtype=np.float64).reshape(-1, 1)

    def value(self, statistics: Statistics) -> float:
        """Return the share that is right; NaN of no examples."""
        return float(statistics[:, 0].mean()) if len(statistics) else float("nan")


@dataclass(frozen=True)
class BinaryF1:
    """Compute the F1 of one class of two: the harmonic mean of its precision and recall."""

    positive: Hashable = 1
    name: str = "f1"
    higher_is_better: ClassVar[bool] = True
    max_resamples: ClassVar[int] = 10_000

    def statistics(self, predictions: Sequence[Prediction]) -> Statistics:
        """Return [examples, 2]: whether the class was predicted, and whether it was there."""
        rows = [(each.prediction == self.positive, each.reference == self.positive) for each in predictions]
        return np.array(rows, dtype=bool).reshape(len(rows), 2)

    def value(self, statistics: Statistics) -> float:
        """Return 2 TP / (predicted + there); NaN where the class is neither predicted nor there."""
        predicted, there = statistics[:, 0], statistics[:, 1]
        total = np.count_nonzero(predicted) + np.count_nonzero(there)
        return 2 * np.count_nonzero(predicted & there) / total if total else float("nan")


@dataclass(frozen=True)
class MacroF1:
    """Average the F1 of the classes, each weighing the same.

    A class that is neither predicted nor there has no F1 and is left out of the mean, as scikit-learn's
    `f1_score(references, predictions, average="macro")` does; so a resample without a rare class is not punished.
    """

    classes: Sequence[Hashable]
    """Every class there is, such as `range(3)`."""
    name: str = "macro_f1"
    higher_is_better: ClassVar[bool] = True
    max_resamples: ClassVar[int] = 10_000

    def statistics(self, predictions: Sequence[Prediction]) -> Statistics:
        """Return [examples, 1]: the cell of the confusion table, row by row; EvaluationError for an unknown class."""
        numbers = {name: number for number, name in enumerate(self.classes)}
        try:
            cells = [numbers[each.reference] * len(numbers) + numbers[each.prediction] for each in predictions]
        except KeyError as error:
            raise EvaluationError(
                f"{self.name}: found class {error.args[0]!r}, allowed are {list(self.classes)}; "
                "give the metric every class of the task"
            ) from None
        return np.array(cells, dtype=np.int64).reshape(-1, 1)

    def value(self, statistics: Statistics) -> float:
        """Return the mean F1 of the classes seen in these rows; NaN of no examples."""
        size = len(self.classes)
        table = np.bincount(statistics[:, 0], minlength=size * size).reshape(size, size)
        totals = table.sum(axis=0) + table.sum(axis=1)
        seen = totals > 0
        return float(np.mean(2 * table.diagonal()[seen] / totals[seen])) if seen.any() else float("nan")
