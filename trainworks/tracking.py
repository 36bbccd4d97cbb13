"""What is seen while a run goes on: a progress bar, a line per logged step in `metrics.jsonl`, and trackers."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from trainworks.record import CurvePoint, EvalReport

if TYPE_CHECKING:
    from trainworks.run import Run

__all__ = ["Log", "read_curve"]


class Log:
    """The run's log. Every rank makes one and enters it; only the main process writes and shows anything."""

    def __init__(self, run: Run) -> None:
        from tqdm.auto import tqdm

        self.run = run
        self.path = run.folder / "metrics.jsonl"
        quiet = not run.world.is_main or not (sys.stderr.isatty() or "ipykernel" in sys.modules)
        self.bar = tqdm(
            total=run.plan.num_steps, initial=run.progress.step, unit="step", disable=quiet, dynamic_ncols=True
        )
        self.plain = run.world.is_main and quiet

    def __enter__(self) -> Self:
        if self.run.config.trackers:
            self.run.world.accelerator.init_trackers("trainworks", config=_flat(self.run.record.config))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()
        if self.run.config.trackers:
            self.run.world.accelerator.end_training()

    def step(self, point: CurvePoint) -> None:
        """Log a training step."""
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
            self.bar.write(line, file=sys.stderr)

    def _show(self, line: str) -> None:
        if self.plain:
            print(line, file=sys.stderr, flush=True)

    def _write(self, step: int, values: dict[str, float], fact: CurvePoint | EvalReport) -> None:
        if self.run.config.trackers:
            self.run.world.accelerator.log(values, step=step)
        if self.run.world.is_main:
            _append_line(self.path, {"kind": type(fact).__name__} | json.loads(fact.model_dump_json()))


def _append_line(path: Path, value: dict[str, Any]) -> None:
    """Append one JSON line; a crash leaves at most one broken last line, which `read_curve` steps over."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_curve(folder: str | Path, *, until: int) -> tuple[CurvePoint, ...]:
    """Return the logged training steps up to step `until`, each step's newest line."""
    path = Path(folder) / "metrics.jsonl"
    points: dict[int, CurvePoint] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            continue
        if value.pop("kind") == "CurvePoint" and value["step"] <= until:
            points[value["step"]] = CurvePoint.model_validate(value)
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
