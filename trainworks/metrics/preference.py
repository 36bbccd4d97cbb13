"""Metrics of answers that are compared: how often the better one is preferred, and by how much.

A prediction is the reward of the chosen answer over the rejected one's, and its reference True; or, where every example
is one answer, its reward over what divides wanted answers from others, and whether it is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from trainworks.metrics.base import Prediction, Statistics

__all__ = ["Mean", "PreferenceAccuracy", "RewardGap"]


@dataclass(frozen=True)
class PreferenceAccuracy:
    """Count the examples whose reward has the sign it should; half of one where it is exactly nothing."""

    name: str = "accuracy"
    higher_is_better: ClassVar[bool] = True
    max_resamples: ClassVar[int] = 10_000

    def statistics(self, predictions: Sequence[Prediction]) -> Statistics:
        """Return [examples, 1]: 1 where the sign is right."""
        signed = [each.prediction if each.reference else -each.prediction for each in predictions]
        return (np.sign(np.array(signed, dtype=np.float64).reshape(-1, 1)) + 1) / 2

    def value(self, statistics: Statistics) -> float:
        """Return the share that is right; NaN of no examples."""
        return float(statistics[:, 0].mean()) if len(statistics) else float("nan")


@dataclass(frozen=True)
class Mean:
    """Average a number of each example, such as the margin of a pair of answers."""

    name: str
    higher_is_better: bool = True
    max_resamples: ClassVar[int] = 10_000

    def statistics(self, predictions: Sequence[Prediction]) -> Statistics:
        """Return [examples, 1]: the predictions."""
        return np.array([each.prediction for each in predictions], dtype=np.float64).reshape(-1, 1)

    def value(self, statistics: Statistics) -> float:
        """Return the mean; NaN of no examples."""
        return float(statistics[:, 0].mean()) if len(statistics) else float("nan")


@dataclass(frozen=True)
class RewardGap:
    """Subtract the mean reward of the answers that are not wanted from that of those that are."""

    name: str
    higher_is_better: ClassVar[bool] = True
    max_resamples: ClassVar[int] = 10_000

    def statistics(self, predictions: Sequence[Prediction]) -> Statistics:
        """Return [examples, 2]: the reward, and 1 where the answer is wanted."""
        rows = [(float(each.prediction), float(each.reference)) for each in predictions]
        return np.array(rows, dtype=np.float64).reshape(len(rows), 2)

    def value(self, statistics: Statistics) -> float:
        """Return the difference of the means; NaN where there is none of either kind."""
        rewards, wanted = statistics[:, 0], statistics[:, 1] > 0
        if wanted.all() or not wanted.any():
            return float("nan")
        return float(rewards[wanted].mean() - rewards[~wanted].mean())
