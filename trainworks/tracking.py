"""What is seen while a run goes on: a progress bar, a line per logged step in `metrics.jsonl`, and trackers."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from trainworks.errors import LaunchError
from trainworks.fail_points import reached
from trainworks.record import CurvePoint, EvalReport
from trainworks.redaction import redacted

if TYPE_CHECKING:
    from trainworks.loop import TrainStep
    from trainworks.run import Run

__all__ = ["Log", "check_trackers", "read_curve"]


def check_trackers(names: Iterable[str]) -> None:
    """Raise LaunchError for a tracker that is not installed; accelerate would leave it out without a word."""
    for name in names:
        if find_spec(name) is None:
            raise LaunchError(f"trackers: {name} is not installed; `pip install 'trainworks[{name}]'`, or leave it out")


class Log:
    """The run's log. Every rank makes one and enters it; only the main process writes and shows anything.

    A terminal and a notebook get a bar, with evaluations as lines above it; anything else, such as a file, gets lines
    alone. Trackers write to the run's `trackers` folder, trackio to TRACKIO_DIR where that is set already: it reads it
    once a process, so later runs of one notebook join the first's.
    """

    def __init__(self, run: Run) -> None:
        from tqdm.auto import tqdm

        self.run = run
        self.path = run.folder / "metrics.jsonl"
        in_notebook = "ipykernel.zmqshell" in sys.modules  # what tqdm.auto asks, too
        self.stream = sys.stdout if in_notebook else sys.stderr  # a notebook paints stderr as if something were wrong
        quiet = not run.world.is_main or not (sys.stderr.isatty() or in_notebook)
        self.bar = tqdm(
            total=run.plan.num_steps, initial=run.progress.step, unit="step", disable=quiet, dynamic_ncols=True
        )
        self.plain = run.world.is_main and quiet

    def __enter__(self) -> Self:
        if self.run.config.trackers:
            _start_trackers(self.run)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()
        # Not `end_training`, which also ends the process group that export still needs.
        trackers = self.run.world.accelerator.trackers
        while trackers:
            trackers.pop().finish()

    def step(self, step: TrainStep) -> None:
        """Log a training step; waits for the device."""
        point = _point(self.run, step)
        self.run.note(curve=(*self.run.record.curve, point))
        self._write(
            point.step,
            {"loss": point.loss, "lr": point.lr, "grad_norm": point.grad_norm, "tokens": point.tokens},
            point,
        )
        amount, unit = (point.tokens, "tokens") if point.tokens else (point.samples, "samples")
        rate = amount / max(point.seconds, 1e-9)
        place = f"step {point.step}/{self.run.plan.num_steps}"
        line = f"{place}  loss {point.loss:.4f}  lr {point.lr:.2e}  |g| {point.grad_norm:.3g}"
        self._show(f"{line}  {rate:,.0f} {unit}/s")
        self.bar.set_postfix(loss=f"{point.loss:.4f}", refresh=False)
        self.bar.update(point.step - self.bar.n)

    def report(self, report: EvalReport) -> None:
        """Log an evaluation."""
        values = {f"{report.split}/{name}": estimate.value for name, estimate in report.metrics.items()}
        self._write(report.step, values, report)
        shown = "  ".join(f"{name} {estimate}" for name, estimate in report.metrics.items())
        self.say(f"{report.name} on {report.split} (n={report.num_examples}): {shown}")

    def say(self, line: str) -> None:
        """Show a line to people, above the bar if there is one."""
        if self.run.world.is_main:
            self.bar.write(redacted(line), file=self.stream)
            self.stream.flush()

    def _show(self, line: str) -> None:
        if self.plain:
            self.say(line)

    def _write(self, step: int, values: dict[str, float], fact: CurvePoint | EvalReport) -> None:
        if self.run.config.trackers:
            self.run.world.accelerator.log(values, step=step)
        if self.run.world.is_main:
            with self.run.writing():
                _append_line(self.path, {"kind": type(fact).__name__} | json.loads(fact.model_dump_json()))


def _point(run: Run, step: TrainStep) -> CurvePoint:
    apart = zip(run.sources, step.source_losses.tolist(), strict=True)
    return CurvePoint(
        step=step.number,
        samples=run.progress.samples,
        tokens=run.progress.tokens,
        loss=step.loss.item(),
        lr=step.lr,
        grad_norm=step.grad_norm.item(),
        seconds=run.progress.seconds,
        source_losses={name: loss for name, loss in apart if math.isfinite(loss)} if len(run.sources) > 1 else {},
    )


def _start_trackers(run: Run) -> None:
    """Start them all. All ranks; accelerate lets only the main process write."""
    os.environ.setdefault("TRACKIO_DIR", str(run.folder.absolute() / "trackers" / "trackio"))
    trackio = {
        "name": str(run.folder),
        "resume": "allow" if run.progress.step else "never",
        "embed": False,  # in a notebook it would start a web server
    }
    run.world.accelerator.init_trackers(
        "trainworks", config=_flat(redacted(run.record.config)), init_kwargs={"trackio": trackio}
    )


def _append_line(path: Path, value: dict[str, Any]) -> None:
    """Append one JSON line; a crash leaves at most one broken line, which is ended here and stepped over by
    `read_curve`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(redacted(value)).encode() + b"\n")
        file.flush()
        reached("metrics.written")
        os.fsync(file.fileno())


def read_curve(folder: str | Path, *, until: int) -> tuple[CurvePoint, ...]:
    """Return the logged training steps up to step `until`, each step's newest line."""
    path = Path(folder) / "metrics.jsonl"
    points: dict[int, CurvePoint] = {}
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            value = json.loads(line)
            if value.pop("kind") == "CurvePoint" and value["step"] <= until:
                points[value["step"]] = CurvePoint.model_validate(value)
        except (AttributeError, KeyError, TypeError, ValueError):
            continue
    return tuple(points[step] for step in sorted(points))


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested configuration as dotted keys with plain values, as trackers want it."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, int | float | bool | str) else str(value)
    return flat
