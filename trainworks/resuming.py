"""Continue a run: the newest checkpoint that is whole, and the record up to it."""

from __future__ import annotations

from trainworks.checkpoint import restore
from trainworks.errors import ConfigError
from trainworks.evaluation import read_statistics
from trainworks.output import accepted_changes, accepts
from trainworks.record import CurvePoint, EvalReport, RunRecord, read_record
from trainworks.run import Run
from trainworks.tracking import read_curve

__all__ = ["resume"]


def resume(run: Run) -> Run:
    """Bring a freshly assembled run to where its folder's last checkpoint stood; a new run is returned as it is. All
    ranks.

    ConfigError when rows, tokens or weights are other than they were and `accept` does not say so, or when the budget
    is used up.
    """
    if not run.world.gather((run.folder / "run.json").exists())[0]:  # as the main process, which writes it, sees it
        return run
    old = read_record(run.folder)
    changes = accepted_changes(run.config, old.config) + _other_contents(run, old)
    checkpoint = restore(run)
    step = run.progress.step
    if checkpoint and run.config.batch.micro == "auto" and old.environment.layout == run.world.layout.sizes():
        # The same cut into micro-batches, whatever `auto` says today: it decides which random numbers dropout draws.
        run.micro = checkpoint.state()["micro"]
    run.note(
        started=old.started,
        steps_total=run.plan.num_steps,
        reports=_reports(run, old),
        curve=_curve(run, old, step),
        cost=old.cost,
        resumed_at=(*old.resumed_at, step) if checkpoint else old.resumed_at,
        notes=(
            *old.notes,
            *(note for note in run.record.notes if note not in old.notes),
            *(f"Changed at step {step}: {change}." for change in changes),
            *([] if _measures_the_same(run, old) else _measured_before(run, old)),
            *_moved(old.environment.world_size, run),
        ),
    )
    read_statistics(run)
    return run


def _curve(run: Run, old: RunRecord, step: int) -> tuple[CurvePoint, ...]:
    """Return the curve up to a step: the record's, which is written before every checkpoint, and from the log what a
    full disk kept from the record."""
    points = {point.step: point for point in (*read_curve(run.folder, until=step), *old.curve) if point.step <= step}
    return tuple(points[number] for number in sorted(points))


def _other_contents(run: Run, old: RunRecord) -> list[str]:
    """Return what is other under the same names and accepted; ConfigError for what is not."""
    now = run.record
    compared = {
        ("data", "rows", "data.source"): (old.data.fingerprint, now.data.fingerprint),
        ("model", "tokens", "the processor"): (old.data.processor, now.data.processor),
        ("model", "weights", "model"): (old.model.fingerprint, now.model.fingerprint),
    }
    changed = {what: pair for what, pair in compared.items() if pair[0] != pair[1]}
    refused = [what for what in changed if not accepts(run.config, what[0])]
    if refused:
        which = "; on ".join(
            f"other {kind} than {name} has now (their fingerprints differ)" for _, kind, name in refused
        )
        keys = ", ".join(dict.fromkeys(key for key, _, _ in refused))
        raise ConfigError(
            f"output: {run.folder} holds a run on {which}; name another folder, or go on with them all the same "
            f"(accept: [{keys}])"
        )
    return [f"{kind} of {key}: {before[:12]} -> {here[:12]}" for (key, kind, _), (before, here) in changed.items()]


def _reports(run: Run, old: RunRecord) -> tuple[EvalReport, ...]:
    """Return the evaluations that are not ahead of the checkpoint, and can be compared with those to come."""
    step = run.progress.step
    if not _measures_the_same(run, old):
        return ()
    return tuple(report for report in old.reports if report.step <= step and (step > 0 or report.is_baseline))


def _measures_the_same(run: Run, old: RunRecord) -> bool:
    measured = [(each.data.fingerprint, each.data.processor, each.config["metrics"]) for each in (old, run.record)]
    return measured[0] == measured[1]


def _measured_before(run: Run, old: RunRecord) -> list[str]:
    """Say what became of the evaluations so far."""
    notes = [f"Evaluations before step {run.progress.step} measured other rows or other metrics and are left out."]
    if old.data.fingerprint != run.record.data.fingerprint:
        notes.append("Rows that are held out since then may have been trained on before.")
    return notes if old.reports else []


def _moved(ranks: int, run: Run) -> list[str]:
    here = run.world.processes
    return [] if here == ranks else [f"Continued at step {run.progress.step} on {here} processes instead of {ranks}."]
