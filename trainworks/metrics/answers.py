"""Exact match and F1 of answers that are texts, as the SQuAD evaluation scripts define them.

Version 1.1 is of Rajpurkar et al. 2016 (arXiv:1606.05250), 2.0, with questions that have no answer, of Rajpurkar et al.
2018 (arXiv:1806.03822). Both are shares from 0 to 1 here; the scripts give percentages.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from trainworks.metrics.base import Prediction, Statistics

__all__ = ["AnswerF1", "ExactMatch", "Questions", "Version"]

Version = Literal["1.1", "2.0"]
"""2.0 leaves out answers of which nothing is left once they are normalised, and takes a question without answers to
want the empty text."""
Questions = Literal["all", "answerable", "unanswerable"]
"""Which questions are counted."""

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True)
class ExactMatch:
    """Count the questions whose prediction is one of the answers, but for case, punctuation, articles and white space.

    A prediction is a text, a reference the texts of the answers.
    """

    version: Version = "1.1"
    questions: Questions = "all"
    name: str = "exact_match"
    higher_is_better: ClassVar[bool] = True
    max_resamples: ClassVar[int] = 10_000

    def statistics(self, predictions: Sequence[Prediction]) -> Statistics:
        """Return [examples, 2]: 1 where an answer is met, and whether the question is counted."""
        return _statistics(predictions, _equal, self.version, self.questions)

    def value(self, statistics: Statistics) -> float:
        """Return the share that is met; NaN where no question is counted."""
        return _mean(statistics)


@dataclass(frozen=True)
class AnswerF1:
    """Average over questions how far the words of the prediction are those of an answer: their F1, with the answer
    that gives the most."""

    version: Version = "1.1"
    questions: Questions = "all"
    name: str = "f1"
    higher_is_better: ClassVar[bool] = True
    max_resamples: ClassVar[int] = 10_000

    def statistics(self, predictions: Sequence[Prediction]) -> Statistics:
        """Return [examples, 2]: the F1, and whether the question is counted."""
        overlap = {"1.1": _overlap, "2.0": _overlap_or_nothing}[self.version]
        return _statistics(predictions, overlap, self.version, self.questions)

    def value(self, statistics: Statistics) -> float:
        """Return the mean F1; NaN where no question is counted."""
        return _mean(statistics)


def _normalised(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _statistics(
    predictions: Sequence[Prediction], score: Callable[[str, str], float], version: Version, questions: Questions
) -> Statistics:
    rows = np.zeros((len(predictions), 2), dtype=np.float64)
    for row, each in zip(rows, predictions, strict=True):
        wanted = [_normalised(answer) for answer in each.reference]
        wanted = [answer for answer in wanted if answer or version == "1.1"]
        counted = questions == "all" or bool(wanted) == (questions == "answerable")
        said = _normalised(each.prediction)
        row[:] = counted and max(score(said, answer) for answer in wanted or [""]), counted
    return rows


def _equal(said: str, wanted: str) -> float:
    return float(said == wanted)


def _overlap(said: str, wanted: str) -> float:
    ours, theirs = said.split(), wanted.split()
    same = (Counter(ours) & Counter(theirs)).total()
    if not same:
        return 0.0
    precision, recall = same / len(ours), same / len(theirs)
    return 2 * precision * recall / (precision + recall)


def _overlap_or_nothing(said: str, wanted: str) -> float:
    return _overlap(said, wanted) if said and wanted else _equal(said, wanted)


def _mean(statistics: Statistics) -> float:
    counted = statistics[:, 1].sum()
    return float(statistics[:, 0].sum() / counted) if counted else float("nan")
