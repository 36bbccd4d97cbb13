"""ROUGE, BLEU and chrF from single examples' numbers are the packages' own, of any selection of examples."""

from __future__ import annotations

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from trainworks.errors import EvaluationError
from trainworks.evaluation import estimate
from trainworks.metrics import CorpusScore, Prediction, Rouge

PAIRS = [
    ("the cat sat on the mat", "the cat was sitting on the mat"),
    ("a dog", "the small dog barks at night"),
    ("", "an answer was wanted"),
    ("he reads the newspaper every morning", "he reads the newspaper every morning"),
    ("completely other words here", "nothing of this is said"),
]
PREDICTIONS = [Prediction(said, wanted) for said, wanted in PAIRS]
SELECTIONS = [[0, 1, 2, 3, 4], [3, 3, 0], [4], [1, 0, 0, 2]]


@pytest.mark.parametrize("rows", SELECTIONS, ids=str)
@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_a_corpus_score_is_that_of_the_corpus_not_a_mean_of_its_sentences(name: str, rows: list[int]) -> None:
    metric = CorpusScore(name)  # type: ignore[arg-type]
    statistics = metric.statistics(PREDICTIONS)[rows]
    said, wanted = zip(*[PAIRS[row] for row in rows], strict=True)
    theirs = {"bleu": BLEU, "chrf": CHRF}[name]().corpus_score(list(said), [list(wanted)]).score
    assert metric.value(statistics) == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_the_mean_f1_of_the_package(name: str) -> None:
    metric = Rouge(name)  # type: ignore[arg-type]
    scorer = RougeScorer([name], use_stemmer=True)
    theirs = np.mean([scorer.score(wanted, said)[name].fmeasure for said, wanted in PAIRS])
    assert metric.value(metric.statistics(PREDICTIONS)) == pytest.approx(theirs)


@pytest.mark.parametrize("metric", [Rouge("rouge1"), CorpusScore("bleu"), CorpusScore("chrf")], ids=lambda m: m.name)
def test_a_metric_has_an_interval_and_none_for_no_examples(metric: Rouge | CorpusScore) -> None:
    found = estimate(metric, metric.statistics(PREDICTIONS), resamples=200)
    assert found.low < found.value < found.high
    assert np.isnan(metric.value(metric.statistics([])))
    assert metric.statistics([]).shape[1] == metric.statistics(PREDICTIONS).shape[1]


@pytest.mark.parametrize(
    ("make", "package"), [(lambda: Rouge("rougeL"), "rouge-score"), (lambda: CorpusScore("chrf"), "sacrebleu")]
)
def test_a_package_that_is_missing_is_named_with_the_line_that_installs_it(
    make: object, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainworks.metrics.generation.find_spec", lambda name: None)
    with pytest.raises(EvaluationError, match=rf"needs the package {package}: pip install 'trainworks\[generation\]'"):
        make()  # type: ignore[operator]
