"""How far numbers that are predicted rise and fall with those that are wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from trainworks.metrics.base import Prediction, Statistics

__all__ = ["Correlation"]


def _ranks(values: Statistics) -> Any:
    from scipy.stats import rankdata

    return rankdata(values)


_AS: dict[str, Callable[[Statistics], Any]] = {"pearson": np.asarray, "spearman": _ranks}


@dataclass(frozen=True)
class Correlation:
    """Compute Pearson's correlation of predictions and references, or that of their ranks (Spearman's), ties sharing
    their mean rank."""

    name: Literal["pearson", "spearman"]
    higher_is_better: ClassVar[bool] = True
    max_resamples: ClassVar[int] = 1_000

    def statistics(self, predictions: Sequence[Prediction]) -> Statistics:
        """Return [examples, 2]: prediction and reference."""
        rows = [(float(each.prediction), float(each.reference)) for each in predictions]
        return np.array(rows, dtype=np.float64).reshape(len(rows), 2)

    def value(self, statistics: Statistics) -> float:
        """Return the correlation; NaN where either side is all one number, or there are fewer than two examples."""
        sides = [_AS[self.name](statistics[:, side]) for side in (0, 1)]
        if len(statistics) < 2 or any(np.ptp(side) == 0 for side in sides):
            return float("nan")
        return float(np.corrcoef(*sides)[0, 1])
