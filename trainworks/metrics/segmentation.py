"""Metrics of masks, from counts of pixels: mean intersection over union, and the share of pixels that are right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from trainworks.metrics.base import Prediction, Statistics

__all__ = ["MeanIoU", "PixelAccuracy"]


@dataclass(frozen=True)
class MeanIoU:
    """Average, over the classes, the pixels right over the pixels predicted or there (Everingham et al. 2010).

    A prediction holds [2, classes]: by class, the pixels that are right and those predicted; a reference those that are
    there, [classes]. Pixels to be ignored are in none. A class that is neither predicted nor there is left out.
    """

    name: str = "mean_iou"
    higher_is_better: ClassVar[bool] = True
    max_resamples: ClassVar[int] = 10_000

    def statistics(self, predictions: Sequence[Prediction]) -> Statistics:
        """Return [examples, 3 x classes]: pixels right, predicted and there."""
        rows = [np.concatenate([*each.prediction, each.reference]) for each in predictions]
        return np.stack(rows).astype(np.int64)

    def value(self, statistics: Statistics) -> float:
        """Return the mean over the classes seen in these rows; NaN where there are none."""
        right, predicted, there = statistics.sum(axis=0).reshape(3, -1)
        union = predicted + there - right
        seen = union > 0
        return float(np.mean(right[seen] / union[seen])) if seen.any() else float("nan")


@dataclass(frozen=True)
class PixelAccuracy:
    """Compute the share of pixels that are right; predictions as for `MeanIoU`."""

    name: str = "pixel_accuracy"
    higher_is_better: ClassVar[bool] = True
    max_resamples: ClassVar[int] = 10_000

    def statistics(self, predictions: Sequence[Prediction]) -> Statistics:
        """Return [examples, 2]: pixels right, and pixels."""
        rows = [(each.prediction[0].sum(), each.reference.sum()) for each in predictions]
        return np.array(rows, dtype=np.int64).reshape(-1, 2)

    def value(self, statistics: Statistics) -> float:
        """Return the share; NaN of no pixels."""
        right, pixels = statistics[:, 0].sum(), statistics[:, 1].sum()
        return float(right / pixels) if pixels else float("nan")
