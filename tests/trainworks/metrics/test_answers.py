"""Exact match and F1 of answers are SQuAD's: by hand, and against torchmetrics."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from torchmetrics.text import SQuAD

from trainworks.metrics import AnswerF1, ExactMatch, Prediction
from trainworks.metrics.answers import Version

BY_HAND = [
    # said, wanted, exact match, F1
    ("Paris", ["Paris"], 1, 1.0),
    ("the Eiffel Tower", ["Eiffel  tower."], 1, 1.0),
    ("Eiffel", ["the Eiffel Tower"], 0, 2 / 3),
    ("in Paris, France", ["Paris", "Paris France"], 0, 4 / 5),
    ("green green cat", ["green cat green dog"], 0, 6 / 7),
    ("a", ["an apple"], 0, 0.0),
    ("U.S.", ["US", "United States"], 1, 1.0),
    ("theatre", ["atre"], 0, 0.0),
    ("anthem of an ant", ["anthem of ant"], 1, 1.0),
    ("one-two", ["onetwo"], 1, 1.0),
    ("‘quoted’", ["quoted"], 0, 0.0),
    ("20 °C", ["20°C"], 0, 0.0),
    ("", ["Paris"], 0, 0.0),
    ("Ｐaris", ["paris"], 0, 0.0),
]


@pytest.mark.parametrize("version", ["1.1", "2.0"])
@pytest.mark.parametrize(("said", "wanted", "exact", "f1"), BY_HAND)
def test_an_answer_scores_what_it_does_by_hand(
    said: str, wanted: list[str], exact: int, f1: float, version: Version
) -> None:
    predictions = [Prediction(said, wanted)]
    assert ExactMatch(version).statistics(predictions).tolist() == [[exact, 1]]
    assert AnswerF1(version).statistics(predictions)[0, 0] == pytest.approx(f1)


@pytest.mark.parametrize(
    ("version", "said", "wanted", "exact", "f1"),
    [
        ("1.1", "the", ["a"], 1, 0.0),  # nothing is left of either: no word in common
        ("2.0", "the", ["a"], 1, 1.0),  # the answer is none, and so nothing is wanted
        ("2.0", "", [], 1, 1.0),
        ("2.0", "Paris", [], 0, 0.0),
        ("2.0", ",.", [], 1, 1.0),
        ("2.0", "", ["the", "cat"], 0, 0.0),
        ("1.1", "", ["the", "cat"], 1, 0.0),
    ],
)
def test_the_versions_differ_where_nothing_is_wanted(
    version: Version, said: str, wanted: list[str], exact: int, f1: float
) -> None:
    predictions = [Prediction(said, wanted)]
    found = [metric.value(metric.statistics(predictions)) for metric in (ExactMatch(version), AnswerF1(version))]
    assert found == [exact, f1]


def test_questions_with_and_without_an_answer_are_measured_apart() -> None:
    predictions = [Prediction("Paris", ["Paris"]), Prediction("cat", ["a red cat"]), Prediction("dog", [])]

    def f1(questions: str) -> float:
        metric = AnswerF1("2.0", questions)  # type: ignore[arg-type]
        return metric.value(metric.statistics(predictions))

    assert f1("all") == pytest.approx((1 + 2 / 3) / 3)
    assert f1("answerable") == pytest.approx((1 + 2 / 3) / 2)
    assert f1("unanswerable") == 0
    nothing = AnswerF1("2.0", "unanswerable")
    assert math.isnan(nothing.value(nothing.statistics(predictions[:2])))


PIECES = [
    "the",
    "A",
    "an",
    "cat",
    "Cats",
    "cat.",
    "U.S.",
    "--",
    "“dog”",
    "re-do",
    "12%",
    "é",
    "\u00a0",
    "thé",
    "\t",
    "\n",
    "a.n",
]


def tricky(rng: random.Random) -> str:
    return rng.choice(["", " ", " "]).join(rng.choices(PIECES, k=rng.randint(1, 6)))


def test_random_answers_score_what_torchmetrics_says() -> None:
    rng, compared = random.Random(0), 0
    for _ in range(100):
        predictions = [
            Prediction(tricky(rng), [tricky(rng) for _ in range(rng.randint(1, 3))]) for _ in range(rng.randint(1, 5))
        ]
        said = [{"prediction_text": each.prediction, "id": str(number)} for number, each in enumerate(predictions)]
        wanted = [
            {"answers": {"answer_start": [0], "text": each.reference}, "id": str(number)}
            for number, each in enumerate(predictions)
        ]
        expected = SQuAD()(said, wanted)
        exact, f1 = ExactMatch("1.1"), AnswerF1("1.1")
        assert 100 * exact.value(exact.statistics(predictions)) == pytest.approx(expected["exact_match"].item())
        # torchmetrics gives nothing for nothing an F1 of 1, as version 2.0 does; the script of 1.1 does not.
        if not any(is_empty(text) for each in predictions for text in (each.prediction, *each.reference)):
            compared += 1
            for version in ("1.1", "2.0"):
                f1 = AnswerF1(version)
                assert 100 * f1.value(f1.statistics(predictions)) == pytest.approx(expected["f1"].item(), rel=1e-5)
    assert compared > 20


def is_empty(text: str) -> bool:
    return bool(ExactMatch("1.1").statistics([Prediction(text, [""])])[0, 0])


def test_statistics_of_a_part_are_a_part_of_the_statistics() -> None:
    predictions = [Prediction(said, wanted) for said, wanted, *_ in BY_HAND]
    for metric in (ExactMatch(), AnswerF1()):
        assert np.array_equal(metric.statistics(predictions)[3:5], metric.statistics(predictions[3:5]))
        assert math.isnan(metric.value(metric.statistics([])))
