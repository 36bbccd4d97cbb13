"""Precision, recall and F1 of entities, from the tags of words, as seqeval counts them in its default mode.

Its rules are those of the CoNLL-2000 script `conlleval`: an entity is right when its type, its first and its last word
are. Tags are IOB2 (`B-LOC I-LOC O`), IO or BIOES; a sequence that breaks its scheme is read leniently.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np

from trainworks.metrics.base import Prediction, Statistics

__all__ = ["Entity", "EntityScore", "TagAccuracy", "are_entity_tags", "entities", "entity_type", "is_broken"]

_TAG = re.compile(r"O|[BIES](-.*)?", re.DOTALL)


class Entity(NamedTuple):
    """What some words in a row name."""

    type: str
    first: int
    last: int


def are_entity_tags(tags: Sequence[str]) -> bool:
    """Tell whether tags mark entities: each is O, or B, I, E or S with a type after a hyphen."""
    return all(_TAG.fullmatch(tag) for tag in tags) and any(tag != "O" for tag in tags)


def entity_type(tag: str) -> str:
    """Return the type that a tag other than O names; `_` where it names none."""
    return tag[2:] or "_"


def is_broken(tags: Sequence[str]) -> bool:
    """Tell whether a word is tagged as the inside or end of an entity (I, E) that no word before it begins."""
    return any(tag[0] in "IE" and not _continues(before, tag) for before, tag in zip(["O", *tags], tags, strict=False))


def _continues(before: str, tag: str) -> bool:
    return tag[0] in "IE" and before[0] in "BI" and entity_type(tag) == entity_type(before)


def entities(tags: Sequence[str]) -> Iterator[Entity]:
    """Yield the entities that tags mark, in order; an I or E that continues none begins one.

    >>> list(entities(["B-LOC", "I-LOC", "O", "I-PER"]))
    [Entity(type='LOC', first=0, last=1), Entity(type='PER', first=3, last=3)]
    """
    begin = 0
    for place, tag in enumerate(tags):
        if tag == "O":
            continue
        if not _continues(tags[place - 1] if place else "O", tag):
            begin = place
        if place + 1 == len(tags) or not _continues(tag, tags[place + 1]):
            yield Entity(entity_type(tag), begin, place)


@dataclass(frozen=True)
class EntityScore:
    """Compute precision, recall or F1 over all entities, or over those of one type.

    Predictions and references are the tags of an example's words.
    """

    measure: Literal["f1", "precision", "recall"] = "f1"
    type: str | None = None
    """The one type that is looked at; every one where it is None."""
    higher_is_better: ClassVar[bool] = True
    max_resamples: ClassVar[int] = 10_000

    @property
    def name(self) -> str:
        """The measure, with `_TYPE` where it is one type's."""
        return self.measure if self.type is None else f"{self.measure}_{self.type}"

    def statistics(self, predictions: Sequence[Prediction]) -> Statistics:
        """Return [examples, 3]: the entities that are right, those predicted, those there are."""
        rows = np.zeros((len(predictions), 3), dtype=np.int64)
        for row, each in zip(rows, predictions, strict=True):
            said, wanted = (self._found(tags) for tags in (each.prediction, each.reference))
            row[:] = len(said & wanted), len(said), len(wanted)
        return rows

    def _found(self, tags: Sequence[str]) -> set[Entity]:
        return {entity for entity in entities(tags) if self.type is None or entity.type == self.type}

    def value(self, statistics: Statistics) -> float:
        """Return the measure; 0 where it divides by nothing, NaN where there is no entity on either side."""
        right, predicted, there = (int(statistics[:, column].sum()) for column in range(3))
        if not predicted + there:
            return float("nan")
        whole = {"f1": (predicted + there) / 2, "precision": predicted, "recall": there}[self.measure]
        return right / whole if whole else 0.0


@dataclass(frozen=True)
class TagAccuracy:
    """Count the words whose tag is right; each word weighs the same, however long its example."""

    name: str = "accuracy"
    higher_is_better: ClassVar[bool] = True
    max_resamples: ClassVar[int] = 10_000

    def statistics(self, predictions: Sequence[Prediction]) -> Statistics:
        """Return [examples, 2]: the words that are right, and all of them."""
        rows = [(sum(map(str.__eq__, each.prediction, each.reference)), len(each.reference)) for each in predictions]
        return np.array(rows, dtype=np.int64).reshape(len(rows), 2)

    def value(self, statistics: Statistics) -> float:
        """Return the share of words that is right; NaN of no words."""
        words = int(statistics[:, 1].sum())
        return int(statistics[:, 0].sum()) / words if words else float("nan")
