"""The metrics written here agree with scikit-learn, on whole splits and on resamples that miss a class."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from trainworks.errors import EvaluationError
from trainworks.metrics import Accuracy, BinaryF1, MacroF1, Metric, Prediction, Ratio


def pairs(predicted: Any, wanted: Any) -> list[Prediction]:
    return [Prediction(p, r) for p, r in zip(predicted, wanted, strict=True)]


def labels(num_classes: int, n: int = 300) -> tuple[list[int], list[int]]:
    rng = np.random.default_rng(3)
    wanted = rng.choice(num_classes, size=n, p=np.arange(1, num_classes + 1) / sum(range(1, num_classes + 1)))
    predicted = np.where(rng.random(n) < 0.7, wanted, rng.integers(num_classes, size=n))
    return predicted.tolist(), wanted.tolist()


def test_a_ratio_weighs_examples_by_their_length() -> None:
    loss = Ratio("loss", higher_is_better=False)
    statistics = loss.statistics([Prediction(30.0, 10), Prediction(2.0, 2)])
    assert loss.value(statistics) == pytest.approx(32 / 12)
    assert Ratio("perplexity", False, "exp").value(statistics) == pytest.approx(math.exp(32 / 12))


def test_a_ratio_of_nothing_is_not_a_number() -> None:
    loss = Ratio("loss", higher_is_better=False)
    assert math.isnan(loss.value(loss.statistics([Prediction(0.0, 0)])))
    assert math.isnan(loss.value(loss.statistics([])))


def test_the_perplexity_of_a_diverged_model_is_infinite() -> None:
    perplexity = Ratio("perplexity", False, "exp")
    assert perplexity.value(perplexity.statistics([Prediction(1e6, 1)])) == math.inf
    assert perplexity.value(perplexity.statistics([Prediction(math.inf, 1)])) == math.inf


def test_accuracy_is_scikit_learns() -> None:
    predicted, wanted = labels(4)
    metric = Accuracy()
    assert metric.value(metric.statistics(pairs(predicted, wanted))) == pytest.approx(accuracy_score(wanted, predicted))


def test_f1_of_one_class_is_scikit_learns() -> None:
    predicted, wanted = labels(2)
    for positive in (0, 1):
        metric = BinaryF1(positive=positive)
        value = metric.value(metric.statistics(pairs(predicted, wanted)))
        assert value == pytest.approx(f1_score(wanted, predicted, pos_label=positive))


def test_macro_f1_is_scikit_learns_on_every_resample() -> None:
    predicted, wanted = labels(5)
    metric = MacroF1(range(5))
    statistics = metric.statistics(pairs(predicted, wanted))
    rng = np.random.default_rng(0)
    missing = 0
    for size in (3, 10, 300):
        for _ in range(20):
            rows = rng.integers(300, size=size)
            there, guessed = np.array(wanted)[rows], np.array(predicted)[rows]
            missing += len({*there, *guessed}) < 5
            expected = f1_score(there, guessed, average="macro")
            assert metric.value(statistics[rows]) == pytest.approx(expected)
    assert missing > 20


def test_macro_f1_takes_names_and_refuses_unknown_ones() -> None:
    metric = MacroF1(("no", "yes"))
    predictions = pairs(["no", "yes", "yes"], ["no", "yes", "no"])
    expected = f1_score(["no", "yes", "no"], ["no", "yes", "yes"], average="macro")
    assert metric.value(metric.statistics(predictions)) == pytest.approx(expected)
    with pytest.raises(EvaluationError, match=r"'maybe'.*\['no', 'yes'\]"):
        metric.statistics([Prediction("maybe", "yes")])


OWN: list[Metric] = [Ratio("loss", False), Ratio("perplexity", False, "exp"), Accuracy(), BinaryF1(), MacroF1(range(2))]


@pytest.mark.parametrize("metric", OWN, ids=lambda metric: metric.name)
def test_the_order_of_examples_does_not_matter(metric: Metric) -> None:
    statistics = metric.statistics(pairs([1, 0, 1, 1, 0, 1], [1, 1, 0, 1, 1, 0]))
    assert len(statistics) == 6
    shuffled = statistics[[5, 2, 0, 1, 4, 3]]
    assert metric.value(shuffled) == pytest.approx(metric.value(statistics), rel=1e-12)


@pytest.mark.parametrize("metric", OWN, ids=lambda metric: metric.name)
def test_statistics_of_a_part_are_a_part_of_the_statistics(metric: Metric) -> None:
    predictions = pairs([1, 0, 1, 1], [1, 1, 0, 1])
    assert np.array_equal(metric.statistics(predictions)[1:3], metric.statistics(predictions[1:3]))
    assert metric.statistics([]).shape == metric.statistics(predictions)[:0].shape
    assert math.isnan(metric.value(metric.statistics([])))
