"""An end before the budget is used up: once evaluations no longer get better."""

from __future__ import annotations

from collections.abc import Iterator

from trainworks.evaluation.harness import metrics_of
from trainworks.loop import TrainStep, train_steps
from trainworks.run import Run

__all__ = ["stalled", "steps_until_stalled"]


def steps_until_stalled(run: Run) -> Iterator[TrainStep]:
    """Take training steps as `train_steps` does, and no more once the evaluations made meanwhile have stalled, as
    `early_stop` says; a note of the record then says why. All ranks, which see the same evaluations."""
    if not stalled(run):
        for step in train_steps(run):
            yield step
            if stalled(run):
                break
    if (why := stalled(run)) and why not in run.record.notes:
        run.note(notes=(*run.record.notes, why))


def stalled(run: Run) -> str:
    """Return why the run should end, by the evaluations in its record, or nothing while it should go on."""
    rule = run.config.early_stop
    if rule is None:
        return ""
    sign = 1 if metrics_of(run)[rule.metric].higher_is_better else -1
    reports = [report for report in run.record.reports if not report.is_baseline and report.name != "final"]
    best, since, at = float("-inf"), 0, 0
    for report in reports:
        value = sign * report.metrics[rule.metric].value
        since += 1
        if value > best + rule.min_gain or best == float("-inf"):
            best, since, at = value, 0, report.step
        if since == rule.patience:
            return (
                f"Ended at step {report.step}: {rule.metric} was best at step {at} ({sign * best:.4g}), and "
                f"{since} evaluations since then were not better (early_stop)."
            )
    return ""
