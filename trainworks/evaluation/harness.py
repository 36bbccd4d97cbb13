"""Measure a run's model, and what doing without it would score, on the held-out rows."""

from __future__ import annotations

import json
import random
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trainworks.errors import CheckpointError, EvaluationError
from trainworks.evaluation.statistics import compare, estimate, merge
from trainworks.metrics import HuggingFaceMetric, Metric, Prediction
from trainworks.record import Comparison, Estimate, EvalReport, GoalOutcome, write_json
from trainworks.run import Run, Statistics
from trainworks.tasks import Task

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "compare_with_baselines",
    "evaluate",
    "evaluate_baselines",
    "goal_outcome",
    "is_best",
    "measured",
    "metrics_of",
    "read_statistics",
    "undisturbed",
]


def evaluate(run: Run, name: str | None = None, *, is_baseline: bool = False) -> EvalReport:
    """Measure the model as it stands on the held-out rows, add the report to the record, and return it. All ranks.

    Random states, training mode and the run's position are afterwards what they were before.
    """
    rows = _held_out(run)
    begun = time.perf_counter()
    with undisturbed(run), run.averaged("evaluate"):
        statistics = _measure(run)
        samples = run.step(rows, ask="show")
    report = EvalReport(
        name=name or f"step {run.progress.step}",
        split="validation",
        step=run.progress.step,
        is_baseline=is_baseline,
        num_examples=len(_examples(rows)),
        num_clusters=_num_clusters(run),
        metrics={
            key: estimate(metric, statistics[key][1], clusters=_clusters(run, statistics[key][0]))
            for key, metric in metrics_of(run).items()
        },
        slices=_slices(run, statistics),
        samples=samples,
        seconds=time.perf_counter() - begun,
    )
    _keep(run, report, statistics)
    return report


def _slices(run: Run, statistics: Statistics) -> dict[str, dict[str, Estimate]]:
    """Return every metric on the held-out rows of each source, where there are several."""
    if len(run.sources) == 1:
        return {}
    source_of = np.asarray(_held_out(run).with_format("numpy")["source"][:])
    sliced: dict[str, dict[str, Estimate]] = {}
    for number, name in enumerate(run.sources):
        sliced[name] = {}
        for key, metric in metrics_of(run).items():
            own = source_of[statistics[key][0]] == number
            with suppress(EvaluationError):  # a metric may want more rows than one source has; the whole is measured
                if own.any():
                    numbers, values = (part[own] for part in statistics[key])
                    sliced[name][key] = estimate(metric, values, clusters=_clusters(run, numbers))
    return sliced


def _clusters(run: Run, numbers: Any) -> Any:
    """Return the clusters of some held-out rows, or None where their task tells of none."""
    rows = _held_out(run)
    return np.asarray(rows.with_format("numpy")["cluster"][:])[numbers] if "cluster" in rows.column_names else None


def _num_clusters(run: Run) -> int | None:
    clusters = _clusters(run, slice(None))
    return None if clusters is None else len(np.unique(clusters))


def evaluate_baselines(run: Run) -> list[EvalReport]:
    """Measure what the task offers to be compared with, such as the majority class. All ranks compute the same."""
    rows = _held_out(run)
    reports = []
    for name, baseline in run.task.baselines(run.train, rows).items():
        everyone = np.arange(len(rows))
        statistics: Statistics = {}
        if baseline.losses is not None:
            statistics |= dict.fromkeys(run.task.loss_metrics(), (everyone, baseline.losses))
        if baseline.predictions:
            statistics |= _predicted(run, baseline.predictions)
        metrics = metrics_of(run)
        report = EvalReport(
            name=name,
            split="validation",
            step=0,
            is_baseline=True,
            num_examples=len(_examples(rows)),
            num_clusters=_num_clusters(run),
            metrics={
                key: estimate(metrics[key], values, clusters=_clusters(run, numbers))
                for key, (numbers, values) in statistics.items()
            },
        )
        _keep(run, report, statistics)
        reports.append(report)
    return reports


def compare_with_baselines(run: Run) -> tuple[Comparison, ...]:
    """Return the final model minus each baseline, metric by metric, on the same examples, with paired intervals."""
    final = run.record.final
    if final is None:
        return ()
    metrics, candidate = metrics_of(run), run.statistics[final.name]
    return tuple(
        Comparison(
            metric=key,
            baseline=report.name,
            difference=compare(metrics[key], candidate[key][1], values, clusters=_clusters(run, numbers)),
        )
        for report in run.record.reports
        if report.is_baseline and report.name in run.statistics
        for key, (numbers, values) in run.statistics[report.name].items()
    )


def is_best(run: Run) -> bool:
    """Tell whether the newest report is the best so far, by the goal's metric or else the loss."""
    goal = run.config.goal
    name, sign = ("loss", -1) if goal is None else (goal.metric, -1 if goal.at_least is None else 1)
    values = [sign * report.metrics[name].value for report in run.record.reports if not report.is_baseline]
    return all(values[-1] > earlier for earlier in values[:-1])


def goal_outcome(run: Run) -> GoalOutcome | None:
    """Return whether the final model reached the number the configuration asks for, or None where it asks for none."""
    goal, final = run.config.goal, run.record.final
    if goal is None or final is None:
        return None
    value = final.metrics[goal.metric].value
    if goal.at_most is not None:
        wanted, met = f"<= {goal.at_most:g}", value <= goal.at_most
    if goal.at_least is not None:
        wanted, met = f">= {goal.at_least:g}", value >= goal.at_least
    return GoalOutcome(metric=goal.metric, wanted=wanted, value=value, met=met)


def measured(task: Task, added: Iterable[str]) -> dict[str, Metric]:
    """Return every metric of a task's loss and predictions, and the `evaluate` modules that a configuration adds."""
    own = task.loss_metrics() | task.metrics()
    more = {metric.name: metric for metric in map(HuggingFaceMetric, added)}
    if twice := own.keys() & more.keys():
        raise EvaluationError(f"metrics: {', '.join(sorted(twice))} is measured already; leave it out")
    return own | more


def metrics_of(run: Run) -> dict[str, Metric]:
    """Return every metric of a run."""
    return measured(run.task, run.config.metrics)


@contextmanager
def undisturbed(run: Run) -> Iterator[None]:
    """Evaluate inside without a trace: no gradients, evaluation mode, and every random state put back."""
    python, training = random.getstate(), run.step.training
    numpy_state = np.random.get_state()  # noqa: NPY002, what libraries draw from
    devices = [run.world.device.index or 0] if run.world.device.type == "cuda" else []
    run.step.eval()
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            yield
    finally:
        run.world.reshard(run.step)
        run.step.train(training)
        random.setstate(python)
        np.random.set_state(numpy_state)  # noqa: NPY002


def _held_out(run: Run) -> Any:
    if run.validation is None or not len(run.validation):
        raise EvaluationError("the run holds out no rows: name data.validation, or set data.holdout above 0")
    return run.validation


def _measure(run: Run) -> Statistics:
    """Return every metric's statistics over all ranks, in the order of the examples."""
    losses: dict[int, list[float]] = {}
    predictions: dict[int, Prediction] = {}
    rows = _held_out(run)
    shared = run.coupled(run.evaluation_batches(rows))
    for batch in run.evaluation_batches(rows):
        batch |= shared
        sums, counts = run.passes.losses(batch), run.task.count(batch)
        said = run.step(batch, ask="predict")
        terms = torch.stack([part[name].double() for name in counts for part in (sums, counts)], dim=1)
        own = zip(*(values.tolist() for values in (batch["index"], batch["weight"], terms)), strict=True)
        losses |= {index: values for index, weight, values in own if weight}
        predictions |= {index: prediction for index, prediction in said.items() if index in losses}
    table = np.array(list(losses.values()), dtype=np.float64).reshape(len(losses), -1)
    mine: Statistics = {key: (np.array(list(losses)), table) for key in run.task.loss_metrics()}
    if run.task.metrics() or run.config.metrics:
        mine |= _predicted(run, _joined(run, predictions))
    gathered: dict[str, list[Any]] = defaultdict(list)
    for part in run.world.gather(mine):
        for key, statistics in part.items():
            gathered[key].append(statistics)
    return {key: merge(parts) for key, parts in gathered.items()}


def _examples(rows: Dataset) -> np.ndarray[Any, Any]:
    """Return the first row of each example: every row, but where several make one (see `Task.join`)."""
    if "part" not in rows.column_names:
        return np.arange(len(rows))
    return np.flatnonzero(np.asarray(rows.with_format("numpy")["part"][:]) == 0)


def _joined(run: Run, said: Mapping[int, Prediction]) -> Mapping[int, Prediction]:
    """Return the predictions of examples, by the number of each one's first row. All ranks.

    The rows of an example may have come to several ranks: all that was said is gathered, and the examples are dealt
    round the ranks.
    """
    rows = _held_out(run)
    if "part" not in rows.column_names:
        return said
    everything = {row: part for share in run.world.gather(said) for row, part in share.items()}
    borders = [*_examples(rows).tolist(), len(rows)]
    examples = list(pairwise(borders))[run.world.rank :: run.world.ranks]
    return {
        first: run.task.join([everything[row] for row in range(first, end)], rows[first:end]) for first, end in examples
    }


def _predicted(run: Run, predictions: Mapping[int, Prediction]) -> Statistics:
    numbers = np.array(sorted(predictions), dtype=np.int64)
    ordered = [predictions[number] for number in numbers.tolist()]
    losses = run.task.loss_metrics()
    return {key: (numbers, metric.statistics(ordered)) for key, metric in metrics_of(run).items() if key not in losses}


def _keep(run: Run, report: EvalReport, statistics: Statistics) -> None:
    """Add a report to the record, and keep its per-example numbers beside it, so that a resumed run can still
    compare."""
    run.add_report(report, statistics)
    if run.world.is_main:
        value = {
            key: {"examples": numbers.tolist(), "statistics": values.tolist()}
            for key, (numbers, values) in statistics.items()
        }
        with run.writing():
            write_json(_kept(run, report), value)


def _kept(run: Run, report: EvalReport) -> Path:
    """Return the file of a report's numbers; CheckpointError for a name that leads out of the folder."""
    name = f"{report.name.replace(' ', '-')}.json"
    if Path(name).name != name:
        raise CheckpointError(f"{run.folder / 'run.json'}: a report is named {report.name!r}, which is no file's name")
    return run.folder / "evaluations" / name


def read_statistics(run: Run) -> None:
    """Read back what `evaluate` kept of the reports in the record; for a resumed run. All ranks.

    What is missing is not compared with, which a note says; CheckpointError for what is there and cannot be read.
    """
    for report in run.record.reports:
        path = _kept(run, report)
        if not path.exists():
            note = f"{path.name} of evaluations was lost, so nothing is compared with {report.name}."
            run.note(notes=(*(old for old in run.record.notes if old != note), note))
            continue
        try:
            value = json.loads(path.read_bytes())
            run.statistics[report.name] = {
                key: (np.array(part["examples"], dtype=np.int64), _table(part["statistics"]))
                for key, part in value.items()
            }
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path}: cannot be read: {error}; remove it to go on without comparisons with it"
            ) from error


def _table(rows: list[list[Any]]) -> np.ndarray[Any, Any]:
    return np.array(rows, dtype=object if any(isinstance(cell, str) for row in rows[:1] for cell in row) else None)
