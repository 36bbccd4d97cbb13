"""Mean average precision by COCO's rules, from a few bytes for each detection."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from trainworks.metrics.base import Prediction, Statistics

__all__ = ["MOST_DETECTIONS", "Boxes", "MeanAveragePrecision"]

MOST_DETECTIONS = 100
"""Detections of an image that are looked at, the likeliest first."""
_THRESHOLDS = np.linspace(0.5, 0.95, 10)
_RECALLS = np.linspace(0, 1, 101)
_DETECTION = np.dtype([("score", "<f4"), ("kind", "<i2"), ("right", "<u2"), ("passed", "<u2")])
"""A detection: at which of the ten thresholds it is right, and at which it does not count, a bit each."""
_BITS = 1 << np.arange(10)


@dataclass(frozen=True)
class Boxes:
    """Boxes of an image: the predicted ones, by falling score, or those that are there."""

    corners: NDArray[np.float32]
    """[n, 4]: left, top, right, bottom in pixels."""
    kinds: NDArray[np.int64]
    """Numbers of classes, [n]."""
    scores: NDArray[np.float32] | None = None
    """Of predicted boxes, [n]."""
    crowd: NDArray[np.bool_] | None = None
    """Whether a box that is there stands for a crowd, [n]: what lies in it counts neither as right nor as wrong."""


@dataclass(frozen=True)
class MeanAveragePrecision:
    """Average the precision over recalls, classes and, for `map`, over overlaps from 0.5 to 0.95.

    As COCO measures it (https://cocodataset.org/#detection-eval): a box is right once per thing, the likeliest first,
    where intersection over union reaches the threshold; precision is made monotonous and read at 101 recalls. A class
    of which nothing is there is left out.
    """

    classes: int
    at: Literal["all", 50, 75] = "all"
    """The overlap, in hundredths, that makes a box right."""
    higher_is_better: ClassVar[bool] = True
    max_resamples: ClassVar[int] = 100

    @property
    def name(self) -> str:
        """`map`, `map50` or `map75`."""
        return "map" if self.at == "all" else f"map{self.at}"

    def statistics(self, predictions: Sequence[Prediction]) -> Statistics:
        """Return [examples, 2] of text: the detections, ten bytes each before base64, and how many of each class are
        there."""
        rows = [(_detections(each.prediction, each.reference), self._there(each.reference)) for each in predictions]
        texts = [[_packed(detections), _packed(there)] for detections, there in rows]
        return np.array(texts, dtype=object).reshape(len(texts), 2)

    def _there(self, reference: Boxes) -> NDArray[np.int32]:
        counted = reference.kinds if reference.crowd is None else reference.kinds[~reference.crowd]
        kinds, counts = np.unique(counted, return_counts=True)
        return np.stack([kinds, counts]).astype("<i4")

    def value(self, statistics: Statistics) -> float:
        """Return the mean over the classes that are there in these rows; NaN where nothing is."""
        found = [np.frombuffer(base64.b64decode(cell), _DETECTION) for cell in statistics[:, 0]]
        detections = np.concatenate([*found, np.empty(0, _DETECTION)])
        there = np.zeros(self.classes, np.int64)
        for cell in statistics[:, 1]:
            kinds, counts = np.frombuffer(base64.b64decode(cell), "<i4").reshape(2, -1)
            there[kinds] += counts
        used = _BITS if self.at == "all" else _BITS[[round((self.at - 50) / 5)]]
        precisions = [
            _average_precision(detections[detections["kind"] == kind], int(there[kind]), used)
            for kind in np.flatnonzero(there)
        ]
        return float(np.mean(precisions)) if precisions else float("nan")


def _packed(values: NDArray[np.generic]) -> str:
    return base64.b64encode(values.tobytes()).decode()


def _average_precision(detections: NDArray[np.void], there: int, bits: NDArray[np.int64]) -> float:
    """Return the mean over thresholds and recalls of one class's precision."""
    ordered = detections[np.argsort(-detections["score"], kind="stable")]
    right = (ordered["right"][None] & bits[:, None]) > 0
    passed = (ordered["passed"][None] & bits[:, None]) > 0
    hits, misses = np.cumsum(right & ~passed, axis=1), np.cumsum(~right & ~passed, axis=1)
    recalls = hits / there
    precisions = hits / np.maximum(hits + misses, np.spacing(1))
    precisions = np.maximum.accumulate(precisions[:, ::-1], axis=1)[:, ::-1]
    total = 0.0
    for recall, precision in zip(recalls, precisions, strict=True):
        places = np.searchsorted(recall, _RECALLS, side="left")
        total += float(precision[places[places < len(precision)]].sum())
    return total / (len(_RECALLS) * len(bits))


def _detections(predicted: Boxes, reference: Boxes) -> NDArray[np.void]:
    """Return an image's detections, each with the thresholds at which it is right; those of a class are matched by
    themselves."""
    assert predicted.scores is not None
    made = np.empty(0, _DETECTION)
    crowd = np.zeros(len(reference.kinds), np.bool_) if reference.crowd is None else reference.crowd
    for kind in np.unique(predicted.kinds):
        own = np.flatnonzero(predicted.kinds == kind)
        own = own[np.argsort(-predicted.scores[own], kind="stable")][:MOST_DETECTIONS]
        theirs = np.flatnonzero(reference.kinds == kind)
        theirs = theirs[np.argsort(crowd[theirs], kind="stable")]
        right, passed = _matched(
            _overlaps(predicted.corners[own], reference.corners[theirs], crowd[theirs]), crowd[theirs]
        )
        part = np.empty(len(own), _DETECTION)
        part["score"], part["kind"] = predicted.scores[own], kind
        part["right"], part["passed"] = right @ _BITS, passed @ _BITS
        made = np.concatenate([made, part])
    return made


def _overlaps(
    predicted: NDArray[np.float32], there: NDArray[np.float32], crowd: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Return intersection over union, [predicted, there]; over the predicted box's area where a crowd is there."""
    mine, theirs = predicted[:, None].astype(np.float64), there[None].astype(np.float64)
    sides = np.clip(np.minimum(mine[..., 2:], theirs[..., 2:]) - np.maximum(mine[..., :2], theirs[..., :2]), 0, None)
    both = sides.prod(axis=-1)
    own, other = ((boxes[..., 2:] - boxes[..., :2]).prod(axis=-1) for boxes in (mine, theirs))
    union = np.where(crowd, own, own + other - both)
    return np.where(union > 0, both / np.where(union > 0, union, 1), 0.0)


def _matched(overlaps: NDArray[np.float64], crowd: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return at which thresholds each detection found a thing, and whether that was a crowd, [detections, 10]."""
    right = np.zeros((len(overlaps), len(_THRESHOLDS)), np.bool_)
    passed = np.zeros_like(right)
    for column, threshold in enumerate(_THRESHOLDS):
        taken = np.zeros(len(crowd), np.bool_)
        for place, row in enumerate(overlaps):
            best = _best(row, min(threshold, 1 - 1e-10), taken, crowd)
            if best is not None:
                taken[best] = True
                right[place, column], passed[place, column] = True, crowd[best]
    return right, passed


def _best(
    overlaps: NDArray[np.float64], least: float, taken: NDArray[np.bool_], crowd: NDArray[np.bool_]
) -> int | None:
    """Return the thing that a detection overlaps most, of those that are free; a crowd, which is never taken, only
    where there is no other."""
    for among in (~crowd & ~taken, crowd):
        fitting = np.flatnonzero(among & (overlaps >= least))
        if len(fitting):
            # Of equal ones COCO takes the last.
            return int(fitting[::-1][np.argmax(overlaps[fitting[::-1]])])
    return None
