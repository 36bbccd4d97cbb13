"""`fit`: measured against baselines, evaluated without a trace, recorded, and taken up again wherever it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import finetune
from trainworks import Data, EarlyStop, Every, Goal, Optim, Run, RunRecord, evaluate, read_record, train_steps
from trainworks.checkpoint import checkpoints, save
from trainworks.data.order import mix
from trainworks.errors import ConfigError, DataError, TrainingError
from trainworks.tasks import TASKS

WITHOUT_MODEL = {
    "causal-lm": ["unigram"],
    "image-classification": ["majority class"],
    "masked-lm": ["unigram"],
    "question-answering": ["first sentence", "usual place", "no answer"],
    "semantic-segmentation": ["commonest class"],
    "sequence-classification": ["majority class"],
    "sequence-regression": ["mean"],
    "token-classification": ["commonest tag"],
}


@pytest.fixture(params=sorted(TASKS))
def task(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def prepared(task: str, folder: Path, name: str = "run", **changes: Any) -> Run:
    if not (folder / "model").exists():
        tiny.save_model(folder / "model", task, dropout=0.1)
        tiny.save_rows(tiny.rows_file(folder, task), task, 60)
    return finetune.prepare(tiny.config(task, folder / "model", tiny.rows_file(folder, task), folder / name, **changes))


def losses(record: RunRecord) -> list[tuple[int, float, float]]:
    return [(point.step, point.loss, point.grad_norm) for point in record.curve]


def test_a_run_is_measured_against_its_baselines(task: str, tmp_path: Path) -> None:
    record = finetune.fit(prepared(task, tmp_path))
    without_model = WITHOUT_MODEL.get(task, [])
    assert [report.name for report in record.reports] == [*without_model, "untuned", "final"]
    assert record.status == "complete"
    assert (record.step, record.samples) == (record.steps_total, record.curve[-1].samples)
    assert {comparison.baseline for comparison in record.comparisons} == {*without_model, "untuned"}
    final = record.final
    assert final is not None
    for comparison in record.comparisons:
        baseline = next(report for report in record.reports if report.name == comparison.baseline)
        expected = final.metrics[comparison.metric].value - baseline.metrics[comparison.metric].value
        assert comparison.difference.value == pytest.approx(expected)
    assert read_record(tmp_path / "run") == record


def test_evaluating_leaves_no_trace_in_training(task: str, tmp_path: Path) -> None:
    plain = finetune.fit(prepared(task, tmp_path, "plain"))
    watched = finetune.fit(prepared(task, tmp_path, "watched", every=Every(log=1, evaluate=1, save=3)))
    assert losses(watched) == losses(plain)
    assert len([report for report in watched.reports if not report.is_baseline]) == watched.steps_total


def test_the_evaluation_loss_weighs_every_token_alike(task: str, tmp_path: Path) -> None:
    run = prepared(task, tmp_path, micro=3)
    report = evaluate(run)
    assert run.validation is not None
    run.step.eval()
    held = run.validation.with_format("numpy")
    rows = [held[number] | {"seed": int(mix(0, 0, number))} for number in range(len(held))]
    batch = run.task.collate(rows, run.processor, train=False)
    with torch.no_grad():
        sums, counts = run.step(batch), run.task.count(batch)
    loss = sum((sums[name].sum() / counts[name].sum()).item() for name in counts)
    assert report.metrics["loss"].value == pytest.approx(loss, rel=1e-5)
    assert report.metrics["loss"].n == len(rows)


def test_a_run_stopped_after_its_last_step_is_still_evaluated_and_ended(tmp_path: Path) -> None:
    run = prepared("sft", tmp_path)
    run.save_record()
    for step in train_steps(run):
        if step.is_last:
            save(run)
    record = finetune.fit(prepared("sft", tmp_path))
    assert record.status == "complete"
    assert record.final is not None
    assert record.final.name == "final"
    assert record.final.step == record.steps_total


def test_a_resumed_record_goes_on_where_the_first_one_stopped(tmp_path: Path) -> None:
    whole = finetune.fit(prepared("sft", tmp_path, "whole"))

    class EnoughError(Exception):
        pass

    run = prepared("sft", tmp_path, "parts", every=Every(log=1, evaluate=2, save=2))
    steps = 0

    def interrupt(*args: Any, **kwargs: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 5:
            raise EnoughError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainworks.tracking._point", _after(interrupt))
        with pytest.raises(EnoughError):
            finetune.fit(run)
    resumed = finetune.fit(prepared("sft", tmp_path, "parts", every=Every(log=1, evaluate=2, save=2)))
    assert resumed.resumed_at == (4,)
    assert losses(resumed) == losses(whole)
    assert [report.name for report in resumed.reports] == ["untuned", "step 2", "step 4", "step 6", "final"]
    assert resumed.comparisons == whole.comparisons


def _after(action: Any) -> Any:
    from trainworks import tracking

    original = tracking._point

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        action()
        return original(*args, **kwargs)

    return wrapped


@pytest.mark.parametrize(
    ("goal", "met"), [(Goal(metric="loss", at_most=99.0), True), (Goal(metric="loss", at_most=0.1), False)]
)
def test_the_goal_is_judged(goal: Goal, met: bool, tmp_path: Path) -> None:
    record = finetune.fit(prepared("sft", tmp_path, goal=goal))
    assert record.goal is not None
    assert record.goal.met is met
    assert record.goal.wanted == f"<= {goal.at_most:g}"


@pytest.mark.filterwarnings("ignore:overflow")
def test_a_loss_that_is_no_number_ends_the_run_before_it_is_saved(tmp_path: Path) -> None:
    run = prepared("sft", tmp_path, optim=Optim(name="sgd", lr=1e30, max_grad_norm="off"), every=Every(log=1, save=1))
    with pytest.raises(TrainingError, match=r"step \d is bad \(not a number\): the loss is (nan|inf).*Lower optim.lr"):
        finetune.fit(run)
    saved = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert len(saved) <= 1


def test_the_cost_is_recorded(tmp_path: Path) -> None:
    cost = finetune.fit(prepared("sft", tmp_path)).cost
    assert 0 < cost.train_seconds < cost.seconds
    assert cost.tokens_per_second is not None
    assert cost.peak_memory_bytes is not None
    assert cost.peak_memory_bytes > 10**7
    assert cost.energy_joules is not None or cost.energy_source.startswith("not measured: ")


def test_the_best_step_is_saved_whatever_the_interval(tmp_path: Path) -> None:
    record = finetune.fit(prepared("sft", tmp_path, every=Every(log=1, evaluate=1, save="end", keep=1)))
    measured = [report for report in record.reports if not report.is_baseline and report.name != "final"]
    best = min(measured, key=lambda report: report.metrics["loss"].value)
    assert [each.step for each in checkpoints(tmp_path / "run") if each.is_best] == [best.step]


def test_evaluating_during_training_needs_rows_to_evaluate_on(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "model", "sft")
    rows = tiny.save_rows(tmp_path / "rows.jsonl", "sft", 8)
    config = tiny.config("sft", tmp_path / "model", rows, tmp_path / "run", every=Every(evaluate=2))
    with pytest.raises(ConfigError, match=r"every.evaluate: there are no rows held out"):
        finetune.prepare(config.model_copy(update={"data": Data(source=str(rows), holdout=0.0)}))


def test_a_null_text_is_named_by_its_row(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "model", "sft")
    lines = [{"prompt": "a cat", "completion": "runs"}, {"prompt": "a dog", "completion": None}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    with pytest.raises(DataError, match=r"row 1 \(from 0\), column 'completion': null text"):
        finetune.prepare(tiny.config("sft", tmp_path / "model", tmp_path / "rows.jsonl", tmp_path / "run"))


def test_preparing_twice_finds_what_was_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINWORKS_CACHE", str(tmp_path / "cache"))
    for name in ("first", "second"):
        prepared("sequence-classification", tmp_path, name)
        assert len(list((tmp_path / "cache" / "prepared").glob("[!.]*"))) == 2


RISING = EarlyStop(metric="loss", patience=2)


def stalling(folder: Path, name: str, **changes: Any) -> Run:
    """Return a run whose loss gets worse: what it learns by heart is not what is held out."""
    every = Every(log=1, evaluate=2, save="end")
    optim = Optim(lr=0.3, schedule="constant")
    return prepared("sft", folder, name, optim=optim, every=every, epochs=4.0, early_stop=RISING, **changes)


def test_a_run_whose_evaluations_stall_ends_and_says_why(tmp_path: Path) -> None:
    record = finetune.fit(stalling(tmp_path, "run"))
    own = [report for report in record.reports if not report.is_baseline and report.name != "final"]
    values = [report.metrics["loss"].value for report in own]
    best = values.index(min(values))
    assert record.status == "complete"
    assert record.step == own[best].step + 4 < record.steps_total
    assert record.notes[-1].startswith(f"Ended at step {record.step}: loss was best at step {own[best].step} (")
    assert checkpoints(tmp_path / "run")[0].step == record.step
    again = finetune.fit(stalling(tmp_path, "run"))
    assert (again.step, again.notes) == (record.step, record.notes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"every": Every(evaluate=2), "early_stop": EarlyStop(metric="los")}, r"early_stop.metric: 'los'.*'loss'"),
        ({"early_stop": EarlyStop()}, "nothing is evaluated before the end; say every.evaluate"),
    ],
)
def test_an_early_end_that_cannot_come_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        prepared("sft", tmp_path, **changes)
