"""An `evaluate` module from a local folder is a metric like any other, and what is wrong with one is said."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from trainworks.errors import EvaluationError
from trainworks.evaluation.statistics import estimate
from trainworks.metrics import HuggingFaceMetric, Prediction

MODULE = """
import datasets
import evaluate


class Agreement(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        same = sum(p == r for p, r in zip(predictions, references)) / len(references)
        return RESULT
"""
PREDICTIONS = [Prediction(p, r) for p, r in [(0, 0), (1, 1), (1, 0), (1, 1)]]


def write_module(tmp_path: Path, result: str, name: str = "agreement") -> Path:
    folder = tmp_path / name
    folder.mkdir()
    (folder / f"{name}.py").write_text(MODULE.replace("RESULT", result))
    return folder


def value(spec: object) -> float:
    metric = HuggingFaceMetric(str(spec))
    return metric.value(metric.statistics(PREDICTIONS))


def test_a_local_module_is_a_metric(tmp_path: Path) -> None:
    folder = write_module(tmp_path, '{"same": same}')
    assert value(folder) == 0.75
    assert value(folder / "agreement.py") == 0.75


def test_a_key_chooses_among_the_modules_numbers(tmp_path: Path) -> None:
    folder = write_module(tmp_path, '{"agreement": same, "error": 1 - same}')
    assert value(folder) == 0.75
    assert value(f"{folder}:error") == 0.25


def test_its_interval_takes_few_resamples(tmp_path: Path) -> None:
    metric = HuggingFaceMetric(str(write_module(tmp_path, '{"same": same}')))
    found = estimate(metric, metric.statistics(PREDICTIONS), resamples=20)
    assert (found.value, found.n, found.higher_is_better) == (0.75, 4, True)
    assert 0 <= found.low <= 0.75 <= found.high <= 1
    assert metric.max_resamples < 1000
    assert math.isnan(metric.value(metric.statistics([])))


def test_a_missing_key_names_those_there_are(tmp_path: Path) -> None:
    folder = write_module(tmp_path, '{"same": same, "error": 1 - same}')
    with pytest.raises(EvaluationError, match=r"no 'eror' \(did you mean 'error'\?\); it has error, same"):
        value(f"{folder}:eror")
    with pytest.raises(EvaluationError, match=r"no 'agreement'; it has error, same; write .*:KEY"):
        value(folder)


def test_a_result_that_is_no_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="one number"):
        value(write_module(tmp_path, '{"same": [same]}'))


def test_predictions_of_another_kind_are_refused(tmp_path: Path) -> None:
    metric = HuggingFaceMetric(str(write_module(tmp_path, '{"same": same}')))
    with pytest.raises(EvaluationError, match="refused the task's predictions, such as \\['a cat'\\]"):
        metric.value(metric.statistics([Prediction("a cat", "a dog")]))


def test_a_missing_module_says_how_to_give_a_local_one(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"nowhere/nowhere\.py"):
        value(tmp_path / "nowhere")


def test_a_module_whose_package_is_missing_says_so(tmp_path: Path) -> None:
    folder = write_module(tmp_path, '{"same": same}')
    script = folder / "agreement.py"
    script.write_text("import a_package_nobody_has\n" + script.read_text())
    with pytest.raises(EvaluationError, match="a_package_nobody_has"):
        value(folder)


def test_the_name_is_the_modules_own_with_its_key() -> None:
    assert HuggingFaceMetric("accuracy").name == "accuracy"
    assert HuggingFaceMetric("someone/rouge:rouge1").name == "rouge:rouge1"
    assert HuggingFaceMetric("metrics/agreement/agreement.py:error").name == "agreement:error"
    assert HuggingFaceMetric("C:/metrics/agreement").name == "agreement"
