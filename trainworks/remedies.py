"""What is done about bad steps once they are known: go on, go back, or stop."""

from __future__ import annotations

from trainworks.checkpoint import Saver, restore
from trainworks.errors import TrainingError
from trainworks.record import BadStep
from trainworks.run import Run
from trainworks.tracking import Log

__all__ = ["remedied"]

_SAMPLES_SAID = 8


def remedied(run: Run, log: Log, saver: Saver) -> bool:
    """Record the bad steps since the last call, and act on them as the configuration says; return whether the run was
    put back to a checkpoint. All ranks, which see the same. TrainingError where it is to stop."""
    found = [_told(run, bad) for bad in run.watch.read()]
    if not found:
        return False
    run.note(bad_steps=(*run.record.bad_steps, *found))
    run.save_record()
    for bad in found:
        log.say(_said(bad))
    if run.watch.in_a_row > run.config.faults.at_most:
        raise TrainingError(f"{run.watch.in_a_row} bad steps in a row, more than faults.at_most; {_MEND}")
    if stop := next((bad for bad in found if bad.remedy == "stop"), None):
        raise TrainingError(
            f"{_said(stop)}. It did not reach the weights. {_MEND}; or leave such steps out (faults: "
            f"{'spike' if stop.kind == 'spike' else 'not_finite'}: skip). The same command then goes on from the last "
            "checkpoint"
        )
    if any(bad.remedy == "rollback" for bad in found):
        _put_back(run, log, saver)
        return True
    return False


_MEND = "Lower optim.lr, or set optim.max_grad_norm, and look at the samples that faults.bad_steps of run.json lists"


def _told(run: Run, bad: BadStep) -> BadStep:
    remedy = run.config.faults.spike if bad.kind == "spike" else run.config.faults.not_finite
    samples, _ = run.plan.step(bad.step - 1)
    return bad.model_copy(update={"remedy": remedy, "samples": tuple(samples.tolist())})


def _said(bad: BadStep) -> str:
    first = ", ".join(map(str, bad.samples[:_SAMPLES_SAID]))
    more = f" and {len(bad.samples) - _SAMPLES_SAID} more" if len(bad.samples) > _SAMPLES_SAID else ""
    what = {"spike": "a spike"}.get(bad.kind, bad.kind)
    numbers = f"the loss is {bad.loss:.4g}, the gradient's norm {bad.grad_norm:.4g}"
    return f"step {bad.step} is bad ({what}): {numbers}, on training samples {first}{more}"


def _put_back(run: Run, log: Log, saver: Saver) -> None:
    """Go back to the newest checkpoint, and leave out what was bad since then."""
    saver.finish()
    run.watch.left_out |= {bad.step for bad in run.record.bad_steps}
    here, checkpoint = run.progress.step, restore(run)
    if checkpoint is None:
        raise TrainingError(f"step {here} is bad, and there is no whole checkpoint to go back to. {_MEND}")
    step = run.progress.step
    run.note(
        curve=tuple(point for point in run.record.curve if point.step <= step),
        reports=tuple(report for report in run.record.reports if report.is_baseline or report.step <= step),
    )
    log.say(f"put back from step {here} to step {step}; bad steps are left out from here on")
