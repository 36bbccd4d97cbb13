"""Metrics of generated text against one reference: ROUGE, as rouge-score has it, BLEU and chrF, as sacreBLEU has
them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any, ClassVar, Literal

import numpy as np

from trainworks.errors import EvaluationError
from trainworks.metrics.base import Prediction, Statistics

__all__ = ["CorpusScore", "Rouge"]


def _require(metric: str, module: str) -> None:
    if find_spec(module) is None:
        raise EvaluationError(
            f"metric {metric!r} needs the package {module.replace('_', '-')}: pip install 'trainworks[generation]'"
        )


@dataclass(frozen=True)
class Rouge:
    """Average ROUGE's F1 over the examples, from 0 to 1, with Porter's stemmer (Lin 2004).

    `rouge1` and `rouge2` count words and pairs of words, `rougeL` the longest common subsequence. Words are runs of
    a to z and digits, as in the published package: of a text in another script nothing is seen. EvaluationError where
    the package is missing.
    """

    name: Literal["rouge1", "rouge2", "rougeL"]
    higher_is_better: ClassVar[bool] = True
    max_resamples: ClassVar[int] = 10_000

    def __post_init__(self) -> None:
        _require(self.name, "rouge_score")

    def statistics(self, predictions: Sequence[Prediction]) -> Statistics:
        """Return [examples, 1]: each example's F1."""
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([self.name], use_stemmer=True)
        scores = [scorer.score(each.reference, each.prediction)[self.name].fmeasure for each in predictions]
        return np.array(scores, dtype=np.float64).reshape(-1, 1)

    def value(self, statistics: Statistics) -> float:
        """Return the mean; NaN of no examples."""
        return float(statistics[:, 0].mean()) if len(statistics) else float("nan")


@dataclass(frozen=True)
class CorpusScore:
    """Compute BLEU (Papineni et al. 2002) or chrF (Popović 2015) of a corpus, from 0 to 100.

    Both are made of counts that are added up over the examples, and are no means of examples' scores; so is their
    interval. BLEU's words are those of sacreBLEU's `13a`, which suits languages that put blanks between words; chrF
    suits all. EvaluationError where the package is missing.
    """

    name: Literal["bleu", "chrf"]
    higher_is_better: ClassVar[bool] = True
    max_resamples: ClassVar[int] = 10_000

    def __post_init__(self) -> None:
        _require(self.name, "sacrebleu")

    @cached_property
    def _metric(self) -> Any:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF

        # It would warn of texts that end in a blank and a full stop, which is what some tokenizers decode to.
        return BLEU(force=True) if self.name == "bleu" else CHRF()

    def statistics(self, predictions: Sequence[Prediction]) -> Statistics:
        """Return [examples, k]: each example's counts of n-grams, said, wanted and in common."""
        if not predictions:
            return np.zeros((0, self._width), dtype=np.int64)
        said, wanted = [each.prediction for each in predictions], [each.reference for each in predictions]
        # What sacreBLEU's own bootstrap works on has no public name (2.6).
        return np.array(self._metric._extract_corpus_statistics(said, [wanted]), dtype=np.int64)

    @property
    def _width(self) -> int:
        return len(self._metric._extract_corpus_statistics(["a"], [["a"]])[0])

    def value(self, statistics: Statistics) -> float:
        """Return the score of the counts' sums; NaN of no examples."""
        if not len(statistics):
            return float("nan")
        return float(self._metric._compute_score_from_stats(statistics.sum(axis=0).tolist()).score)
