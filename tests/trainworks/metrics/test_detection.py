"""Mean average precision is COCO's, and small."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import pytest

from trainworks.evaluation.statistics import estimate
from trainworks.metrics import Boxes, MeanAveragePrecision, Prediction

CLASSES = 4


def boxes(chance: np.random.Generator, number: int) -> np.ndarray:
    corner, size = chance.uniform(0, 80, (number, 2)), chance.uniform(4, 60, (number, 2))
    return np.concatenate([corner, corner + size], axis=1).astype(np.float32)


def example(chance: np.random.Generator) -> Prediction:
    """Return things, some in crowds, and detections that lie near some of them, with equal scores among them."""
    there = boxes(chance, int(chance.integers(0, 9)))
    kinds = chance.integers(0, CLASSES - 1, len(there))
    near = np.repeat(there, 2, axis=0) + chance.normal(0, 3, (2 * len(there), 4)).astype(np.float32)
    near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
    found = np.concatenate([near, boxes(chance, 5)])
    said = np.concatenate([np.repeat(kinds, 2), chance.integers(0, CLASSES, 5)])
    scores = np.round(chance.uniform(0, 1, len(found)), 1).astype(np.float32)
    crowd = chance.random(len(there)) < 0.2
    return Prediction(Boxes(found, said, scores=scores), Boxes(there, kinds, crowd=crowd))


def coco(examples: list[Prediction], evaluator: tuple[Any, Any]) -> tuple[float, float, float]:
    """Return COCO's own figures for all, 50 and 75."""
    load, evaluate = evaluator
    images = [{"id": number} for number in range(1, len(examples) + 1)]
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for number, each in enumerate(examples, 1):
        for place, corners in enumerate(each.reference.corners.astype(float)):
            size = corners[2:] - corners[:2]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": int(each.reference.kinds[place]),
                    "bbox": [*corners[:2], *size],
                    "area": float(size.prod()),
                    "iscrowd": int(each.reference.crowd[place]),
                }
            )
        for place, corners in enumerate(each.prediction.corners.astype(float)):
            results.append(
                {
                    "image_id": number,
                    "category_id": int(each.prediction.kinds[place]),
                    "bbox": [*corners[:2], *(corners[2:] - corners[:2])],
                    "score": float(each.prediction.scores[place]),
                }
            )
    truth = load()
    truth.dataset = {
        "info": {},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": kind, "name": str(kind)} for kind in range(CLASSES)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found = evaluate(truth, truth.loadRes(results), "bbox")
        found.evaluate()
        found.accumulate()
        found.summarize()
    return tuple(float(value) for value in found.stats[:3])


@pytest.mark.parametrize("package", ["pycocotools", "faster_coco_eval"])
def test_it_is_what_coco_measures(package: str) -> None:
    if package == "pycocotools":
        evaluator = (
            pytest.importorskip("pycocotools.coco").COCO,
            pytest.importorskip("pycocotools.cocoeval").COCOeval,
        )
    else:
        found = pytest.importorskip("faster_coco_eval")
        evaluator = (found.COCO, found.COCOeval_faster)
    chance = np.random.default_rng(3)
    examples = [example(chance) for _ in range(60)]
    ours = []
    for at in ("all", 50, 75):
        metric = MeanAveragePrecision(CLASSES, at=at)
        ours.append(metric.value(metric.statistics(examples)))
    assert 0.1 < ours[0] < ours[1] < 1
    assert ours == pytest.approx(coco(examples, evaluator), abs=1e-6)


def test_parts_of_it_may_be_measured_apart_and_put_together() -> None:
    chance = np.random.default_rng(4)
    examples = [example(chance) for _ in range(20)]
    metric = MeanAveragePrecision(CLASSES)
    whole = metric.statistics(examples)
    apart = np.concatenate([metric.statistics(examples[:7]), metric.statistics(examples[7:])])
    assert metric.value(apart) == metric.value(whole)
    interval = estimate(metric, whole)
    assert interval.low < interval.value < interval.high


def test_a_detection_keeps_few_bytes() -> None:
    example_of_many = Prediction(
        Boxes(np.tile(np.float32([0, 0, 9, 9]), (100, 1)), np.zeros(100, int), scores=np.ones(100, np.float32)),
        Boxes(np.float32([[0, 0, 9, 9]]), np.zeros(1, int)),
    )
    kept = MeanAveragePrecision(1).statistics([example_of_many])[0]
    assert sum(len(cell) for cell in kept) <= 32 * 100


def test_nothing_there_is_no_number_and_nothing_found_is_zero() -> None:
    none = Boxes(np.zeros((0, 4), np.float32), np.zeros(0, int), scores=np.zeros(0, np.float32))
    one = Boxes(np.float32([[0, 0, 9, 9]]), np.zeros(1, int))
    metric = MeanAveragePrecision(2)
    assert np.isnan(metric.value(metric.statistics([Prediction(none, none)])))
    assert metric.value(metric.statistics([Prediction(none, one)])) == 0
