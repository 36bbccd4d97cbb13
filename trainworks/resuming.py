"""Continue a run: the newest checkpoint that is whole, and the record up to it."""

from __future__ import annotations

from trainworks.checkpoint import restore
from trainworks.errors import ConfigError
from trainworks.evaluation import read_statistics
from trainworks.record import CurvePoint, RunRecord, read_record
from trainworks.run import Run
from trainworks.tracking import read_curve

__all__ = ["resume"]


def resume(run: Run) -> Run:
    """Bring a freshly assembled run to where its folder's last checkpoint stood; a new run is returned as it is. All
    ranks."""
    if not run.world.gather((run.folder / "run.json").exists())[0]:  # as the main process, which writes it, sees it
        return run
    old = read_record(run.folder)
    _check_same(run, old)
    checkpoint = restore(run)
    step = run.progress.step
    if checkpoint and run.config.batch.micro == "auto" and old.environment.world_size == run.world.ranks:
        # The same cut into micro-batches, whatever `auto` says today: it decides which random numbers dropout draws.
        run.micro = checkpoint.state()["micro"]
    run.note(
        started=old.started,
        reports=tuple(report for report in old.reports if report.step <= step and (step > 0 or report.is_baseline)),
        curve=_curve(run, old, step),
        cost=old.cost,
        resumed_at=(*old.resumed_at, step) if checkpoint else old.resumed_at,
        notes=(
            *old.notes,
            *(note for note in run.record.notes if note not in old.notes),
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


def _check_same(run: Run, old: RunRecord) -> None:
    """Refuse rows, tokens or weights that are not what the run began with, though their names are the same."""
    now, kind = run.record, "other {} than {} has now (their fingerprints differ)"
    compared = {
        kind.format("rows", "data.source"): (old.data.fingerprint, now.data.fingerprint),
        kind.format("tokens", "the processor"): (old.data.processor, now.data.processor),
        kind.format("weights", "model"): (old.model.fingerprint, now.model.fingerprint),
    }
    if changed := [what for what, (before, here) in compared.items() if before != here]:
        raise ConfigError(f"output: {run.folder} holds a run on {'; on '.join(changed)}; name another folder")


def _moved(ranks: int, run: Run) -> list[str]:
    here = run.world.ranks
    return [] if here == ranks else [f"Continued at step {run.progress.step} on {here} processes instead of {ranks}."]
