"""`fit`: a plain `for` over the training steps, with visible lines for log, evaluate and save."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal, NamedTuple

from trainworks.checkpoint import Saver
from trainworks.cost import CostMeter
from trainworks.evaluation import compare_with_baselines, evaluate, evaluate_baselines, goal_outcome, is_best
from trainworks.evaluation.early_stopping import stalled, steps_until_stalled
from trainworks.record import RunRecord
from trainworks.remedies import remedied
from trainworks.run import Run
from trainworks.schema import Pretrained
from trainworks.settings import Count
from trainworks.stopping import AskedToStop, Stop
from trainworks.tracking import Log

__all__ = ["fit"]


def fit(run: Run) -> RunRecord:
    """Train to the end of the budget, or until evaluations stall, measured against baselines, logged and saved as the
    configuration says. All ranks.

    Returns the record: `complete`, or `preempted` or `interrupted` when a signal asked to stop. All is saved then, and
    the same call on a run prepared anew goes on from there.
    """
    run.save_record()
    with Stop(run) as stop, Log(run) as log, Saver(run) as saver:
        costs = CostMeter(run)
        try:
            with costs.paused():
                saver.check_room()
                _measure_first(run, log, saver, costs)
            for step in steps_until_stalled(run):
                stopped = stop.agreed()
                due = _due(run, step.number, stopped=stopped != 0)
                if any(due) and remedied(run, log, saver):
                    continue
                if due.log:
                    costs.lap()
                    log.step(step)
                if due.evaluate or due.save:
                    with costs.paused():
                        _evaluate_and_save(run, log, saver, costs, due)
                if stopped and not step.is_last:
                    return _close(run, saver, stop.status)
            if run.validation is not None:
                with costs.paused():
                    log.report(evaluate(run, "final"))
                run.note(comparisons=compare_with_baselines(run), goal=goal_outcome(run))
        except AskedToStop:  # in the middle of an evaluation, which the resumed run makes again
            _evaluate_and_save(run, log, saver, costs, _Due(log=False, evaluate=False, save=run.progress.step > 0))
            return _close(run, saver, stop.status)
        run.note(cost=costs.cost())
        return _close(run, saver, "complete")


class _Due(NamedTuple):
    log: bool
    evaluate: bool
    save: bool


def _due(run: Run, step: int, *, stopped: bool) -> _Due:
    def at(interval: Count | Literal["end"]) -> bool:
        return interval != "end" and step % interval == 0

    every, last = run.config.every, step == run.plan.num_steps
    return _Due(last or at(every.log), at(every.evaluate) and not last, stopped or last or at(every.save))


def _measure_first(run: Run, log: Log, saver: Saver, costs: CostMeter) -> None:
    """Measure the baselines of a new run; of one that was stopped in an evaluation, make that one again."""
    step = run.progress.step
    if step == 0:
        if run.validation is not None:
            for report in evaluate_baselines(run):
                log.report(report)
            if isinstance(run.config.model, Pretrained):
                log.report(evaluate(run, "untuned", is_baseline=True))
            run.save_record()
        if "rollback" in (run.config.faults.not_finite, run.config.faults.spike):
            saver.save()
    elif all(report.is_baseline or report.step < step for report in run.record.reports):
        _evaluate_and_save(run, log, saver, costs, _due(run, step, stopped=False)._replace(save=False))


def _evaluate_and_save(run: Run, log: Log, saver: Saver, costs: CostMeter, due: _Due) -> None:
    best = False
    if due.evaluate:
        log.report(evaluate(run))
        best = is_best(run)
    if due.save or best or stalled(run):
        run.note(cost=costs.cost())
        run.save_record()  # first: what it holds beyond the checkpoint, a resume leaves out
        if problem := saver.save(best=best):
            log.say(problem)


def _close(run: Run, saver: Saver, status: Literal["complete", "preempted", "interrupted"]) -> RunRecord:
    """Wait for what is being saved, bring the record up to date and write it."""
    saver.finish()
    run.note(
        status=status,
        step=run.progress.step,
        samples=run.progress.samples,
        tokens=run.progress.tokens,
        epochs=run.progress.samples / run.plan.num_samples,
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    run.save_record()
    return run.record
