"""Entities are counted as seqeval counts them in its default mode; all values here were counted by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trainworks.metrics import EntityScore, Prediction, TagAccuracy
from trainworks.metrics.entities import are_entity_tags, entities, is_broken

READ = {
    # tags, the entities they mark as (type, first, last)
    "B-X I-X O B-Y": [("X", 0, 1), ("Y", 3, 3)],
    "B-X B-X I-X": [("X", 0, 0), ("X", 1, 2)],
    "I-X I-X O I-X": [("X", 0, 1), ("X", 3, 3)],
    "O I-X B-X": [("X", 1, 1), ("X", 2, 2)],
    "B-X I-Y I-Y": [("X", 0, 0), ("Y", 1, 2)],
    "I-X B-X I-X I-Y O": [("X", 0, 0), ("X", 1, 2), ("Y", 3, 3)],
    "S-X B-X I-X E-X O": [("X", 0, 0), ("X", 1, 3)],
    "B-X E-X E-X": [("X", 0, 1), ("X", 2, 2)],
    "E-X I-X I-X": [("X", 0, 0), ("X", 1, 2)],
    "S-X I-X E-X": [("X", 0, 0), ("X", 1, 2)],
    "B-X S-X I-X": [("X", 0, 0), ("X", 1, 1), ("X", 2, 2)],
    "B-X-y I-X-y I-X": [("X-y", 0, 1), ("X", 2, 2)],
    "B I O I": [("_", 0, 1), ("_", 3, 3)],
    "O O": [],
    "": [],
}


@pytest.mark.parametrize("tags", READ)
def test_tags_mark_the_entities_that_seqeval_reads(tags: str) -> None:
    assert [tuple(entity) for entity in entities(tags.split())] == READ[tags]


def test_tags_that_begin_inside_an_entity_are_broken() -> None:
    broken = [tags for tags in READ if is_broken(tags.split())]
    whole = ["B-X I-X O B-Y", "B-X B-X I-X", "S-X B-X I-X E-X O", "O O", ""]
    assert sorted(broken) == sorted(set(READ) - set(whole))


def test_schemes_are_told_from_other_tags() -> None:
    assert are_entity_tags(["O", "B-X", "I-X", "E-X", "S-X"])
    assert are_entity_tags(["I-X", "O"])
    for others in (["NOUN", "VERB"], ["O", "L-X", "U-X"], ["O"], ["O", "o"]):
        assert not are_entity_tags(others)


WANTED = ["B-PER I-PER O B-LOC", "O O O", "B-LOC O B-PER I-PER"]
SAID = ["B-PER I-PER O B-PER", "O B-LOC O", "I-LOC O B-PER O"]


def predictions() -> list[Prediction]:
    return [Prediction(said.split(), wanted.split()) for said, wanted in zip(SAID, WANTED, strict=True)]


def test_every_score_is_the_one_counted_by_hand() -> None:
    # right: PER in the first, LOC in the third; predicted: 2 + 1 + 2; there: 2 + 0 + 2
    assert EntityScore().statistics(predictions()).tolist() == [[1, 2, 2], [0, 1, 0], [1, 2, 2]]
    expected = {
        EntityScore(): 4 / 9,
        EntityScore("precision"): 2 / 5,
        EntityScore("recall"): 2 / 4,
        EntityScore(type="LOC"): 2 / 4,
        EntityScore(type="PER"): 2 / 5,
        EntityScore("precision", "LOC"): 1 / 2,
        EntityScore("recall", "PER"): 1 / 2,
    }
    for score, value in expected.items():
        assert score.value(score.statistics(predictions())) == pytest.approx(value), score.name
    accuracy = TagAccuracy()
    assert accuracy.value(accuracy.statistics(predictions())) == pytest.approx(7 / 11)


def test_a_score_is_nothing_where_one_side_is_empty_and_no_number_where_both_are() -> None:
    said, none = Prediction(["B-X"], ["O"]), Prediction(["O"], ["O"])
    for measure in ("f1", "precision", "recall"):
        score = EntityScore(measure)  # type: ignore[arg-type]
        assert score.value(score.statistics([said, none])) == 0
        assert math.isnan(score.value(score.statistics([none])))
        assert score.statistics([]).shape == (0, 3)


def test_statistics_of_a_part_are_a_part_of_the_statistics() -> None:
    for metric in (EntityScore(), TagAccuracy()):
        assert np.array_equal(metric.statistics(predictions())[1:], metric.statistics(predictions()[1:]))
