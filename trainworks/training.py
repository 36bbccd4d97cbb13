"""`fit`: a plain `for` over the training steps, with visible lines for log, evaluate and save."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Literal

from trainworks.checkpoint import save
from trainworks.cost import CostMeter
from trainworks.errors import EXIT_INTERRUPTED, TrainingError
from trainworks.evaluation import compare_with_baselines, evaluate, evaluate_baselines, goal_outcome, is_best
from trainworks.loop import TrainStep, train_steps
from trainworks.record import CurvePoint, RunRecord
from trainworks.run import Run
from trainworks.schema import Pretrained
from trainworks.settings import Count
from trainworks.stopping import Stop
from trainworks.tracking import Log

__all__ = ["fit"]


def fit(run: Run) -> RunRecord:
    """Train to the end of the budget, measured against baselines, logged and saved as the configuration says. All
    ranks.

    Returns the record: `complete`, or `preempted` or `interrupted` when a signal asked to stop. All is saved then, and
    the same call on a run prepared anew goes on from there.
    """
    every, costs = run.config.every, CostMeter(run)
    run.save_record()
    with Stop(run.world) as stop, Log(run) as log:
        if run.progress.step == 0:
            with costs.paused():
                _measure_baselines(run, log)
        for step in train_steps(run):
            stopped, best = stop.agreed(), False
            if step.is_last or _due(every.log, step):
                costs.lap()
                log.step(_point(run, step))
            if not step.is_last and _due(every.evaluate, step):
                with costs.paused():
                    _checked(step)
                    log.report(evaluate(run))
                    best = is_best(run)
            if stopped or best or step.is_last or _due(every.save, step):
                with costs.paused():
                    _checked(step)
                    run.note(cost=costs.cost())
                    run.save_record()  # first: what it holds beyond the checkpoint, a resume leaves out
                    save(run, best=best)
            if stopped and not step.is_last:
                return _close(run, "interrupted" if stopped == EXIT_INTERRUPTED else "preempted")
        if run.validation is not None:
            with costs.paused():
                log.report(evaluate(run, "final"))
            run.note(comparisons=compare_with_baselines(run), goal=goal_outcome(run))
        run.note(cost=costs.cost())
    return _close(run, "complete")


def _due(interval: Count | Literal["end"], step: TrainStep) -> bool:
    return interval != "end" and step.number % interval == 0


def _measure_baselines(run: Run, log: Log) -> None:
    if run.validation is None:
        return
    for report in evaluate_baselines(run):
        log.report(report)
    if isinstance(run.config.model, Pretrained):
        log.report(evaluate(run, "untuned", is_baseline=True))
    run.save_record()


def _point(run: Run, step: TrainStep) -> CurvePoint:
    _checked(step)
    return CurvePoint(
        step=step.number,
        samples=run.progress.samples,
        tokens=run.progress.tokens,
        loss=step.loss.item(),
        lr=step.lr,
        grad_norm=step.grad_norm.item(),
        seconds=run.progress.seconds,
        source_losses=_apart(run, step),
    )


def _apart(run: Run, step: TrainStep) -> dict[str, float]:
    losses = zip(run.sources, step.source_losses.tolist(), strict=True)
    return {name: loss for name, loss in losses if math.isfinite(loss)} if len(run.sources) > 1 else {}


def _checked(step: TrainStep) -> None:
    """Refuse to log or save what is no longer a number; the checkpoints before it stay."""
    loss, norm = step.loss.item(), step.grad_norm.item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise TrainingError(
            f"step {step.number}: the loss is {loss} and the gradient's norm {norm}; lower optim.lr, or set "
            "optim.max_grad_norm, and train again into another output folder"
        )


def _close(run: Run, status: Literal["complete", "preempted", "interrupted"]) -> RunRecord:
    """Bring the record up to date and write it."""
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
