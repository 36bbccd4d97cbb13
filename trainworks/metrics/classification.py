"""Metrics of one class per example, or of several: accuracy and F1, as scikit-learn defines them.

Only their sums are written here: scikit-learn's functions are too slow for a thousand resamples. Tests compare the two.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from trainworks.errors import EvaluationError
from trainworks.metrics.base import Prediction, RankedPrediction, Statistics

__all__ = ["Accuracy", "BinaryF1", "MacroF1", "MultiLabelF1", "TopAccuracy"]


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
class TopAccuracy:
    """Count the examples whose reference is among the `top` likeliest classes; it takes RankedPredictions."""

    top: int
    higher_is_better: ClassVar[bool] = True
    max_resamples: ClassVar[int] = 10_000

    @property
    def name(self) -> str:
        """Such as `top5_accuracy`."""
        return f"top{self.top}_accuracy"

    def statistics(self, predictions: Sequence[Prediction]) -> Statistics:
        """Return [examples, 1]: 1 where fewer than `top` classes are likelier than the right one; EvaluationError for
        predictions without a rank."""
        hits = []
        for each in predictions:
            if not isinstance(each, RankedPrediction):
                raise EvaluationError(f"{self.name}: these predictions do not say how likely the other classes are")
            hits.append(each.rank < self.top)
        return np.array(hits, dtype=np.float64).reshape(-1, 1)

    def value(self, statistics: Statistics) -> float:
        """Return the share of such examples; NaN of no examples."""
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


@dataclass(frozen=True)
class MultiLabelF1:
    """Compute the F1 of examples that have any number of classes each.

    `micro_f1` is taken over all pairs of example and class, so that common classes weigh more; `macro_f1` is the mean
    of the classes' own. A class that is neither predicted nor there is left out of the mean, as in scikit-learn's
    `f1_score(..., zero_division=nan)`. A prediction and a reference are the numbers of classes.
    """

    name: Literal["micro_f1", "macro_f1"]
    num_classes: int
    higher_is_better: ClassVar[bool] = True
    max_resamples: ClassVar[int] = 10_000

    def statistics(self, predictions: Sequence[Prediction]) -> Statistics:
        """Return [examples, classes]: 1 where a class is predicted, 2 where it is there, 3 where it is both."""
        cells = np.zeros((len(predictions), self.num_classes), dtype=np.uint8)
        for row, each in zip(cells, predictions, strict=True):
            row[list(each.prediction)] += 1
            row[list(each.reference)] += 2
        return cells

    def value(self, statistics: Statistics) -> float:
        """Return 2 TP / (predicted + there), over all classes or for each; NaN where there is none of either."""
        right, neither = ((statistics == code).sum(axis=0) for code in (3, 0))
        totals = len(statistics) - neither + right  # predicted, and there; the right ones twice
        if self.name == "micro_f1":
            return float(2 * right.sum() / totals.sum()) if totals.sum() else float("nan")
        seen = totals > 0
        return float(np.mean(2 * right[seen] / totals[seen])) if seen.any() else float("nan")
