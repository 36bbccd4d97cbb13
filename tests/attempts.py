"""Attempts at a tiny run that saves often, each in a child of `forking.Nursery`, and what must have come of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
from distributed import Mode
from forking import Forked, Nursery
from ranks import file_digest

import finetune
from trainworks import Every, Faults, Optim, Run, Speed, export, read_record
from trainworks.checkpoint import checkpoints, verify
from trainworks.training import fit

STEPS, INTERVAL, KEEP = 24, 2, 2


@dataclass(frozen=True)
class Place:
    """A folder with a tiny model, with dropout, and rows; the runs lie in it."""

    folder: Path
    nursery: Nursery
    ranks: int = 1
    mode: Mode = "ddp"

    @classmethod
    def made(cls, folder: Path, nursery: Nursery) -> Place:
        """Write model and rows."""
        tiny.save_model(folder / "model", "sequence-classification", dropout=0.1)
        tiny.save_rows(folder / "rows.jsonl", "sequence-classification", 60)
        return cls(folder, nursery)

    def start(self, name: str, environment: Mapping[str, str] | None = None, **arguments: Any) -> Forked:
        """Start a run of that name, or go on with it."""
        return self.nursery.start(
            f"{__file__}:attempt",
            {"output": str(self.folder / name)} | arguments,
            environment={"TRAINWORKS_CACHE": str(self.folder / "cache")} | dict(environment or {}),
            ranks=self.ranks,
            mode=self.mode,
        )

    def finish(self, name: str, **arguments: Any) -> None:
        """Let a run get to its end, undisturbed."""
        children = self.start(name, **arguments)
        codes = children.wait()
        assert not any(codes), f"ended by {codes}:\n{children.tail()}"

    def lost(self, name: str) -> int:
        """Return the most steps that a run had to take again."""
        text = (self.folder / f"{name}.attempts").read_text(encoding="utf-8")
        return max(logged - begun for logged, begun in map(json.loads, text.splitlines()))

    def assert_same(self, name: str, expected: str) -> None:
        """See that two runs came to the same end, bit for bit, and that the first has left nothing half done."""
        assert self._end(name) == self._end(expected)
        folder = self.folder / name
        for checkpoint in checkpoints(folder):
            verify(checkpoint)
        assert [path for path in folder.rglob("*") if path.name.startswith((".", "damaged"))] == []

    def _end(self, name: str) -> dict[str, Any]:
        record = read_record(self.folder / name)
        return {
            "result": json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8")),
            "status": record.status,
            "curve": [(point.step, point.loss, point.grad_norm) for point in record.curve],
            "reports": [(report.name, report.metrics) for report in record.reports],
            "comparisons": record.comparisons,
            "notes": record.notes,
            "checkpoints": [(checkpoint.step, checkpoint.is_best) for checkpoint in checkpoints(self.folder / name)],
        }


def settings(output: Path, **changes: Any) -> finetune.Config:
    """Return a run that saves and evaluates often."""
    often = {
        "every": Every(log=1, save=INTERVAL, evaluate=4, keep=KEEP),
        "epochs": STEPS / 6,
        "micro": 4,
        "optim": Optim(lr=2e-4, schedule="constant", warmup=0),  # slow, so that many a checkpoint is the best so far
    }
    rows, model = output.parent / "rows.jsonl", output.parent / "model"
    return tiny.config("sequence-classification", model, rows, output, **(often | changes))


def attempt(output: str, background: bool = False, full_disk: str = "stop") -> None:
    """Go on with the run to its end. `<output>.attempts` says how far each attempt found the log and where it began
    itself, `<output>.json` what came of the run."""
    folder = Path(output)
    config = settings(folder, speed=Speed(background_saving=background), faults=Faults(full_disk=full_disk))
    run = finetune.prepare(config)
    if run.world.is_main:
        with folder.with_suffix(".attempts").open("a", encoding="utf-8") as file:
            file.write(json.dumps([logged(folder), run.progress.step]) + "\n")
    fit(run)
    exported = export(run)
    result = {"weights": weights(run), "exported": file_digest(exported / "model.safetensors")}
    if run.world.is_main:
        folder.with_suffix(".json").write_text(json.dumps(result), encoding="utf-8")
    run.world.leave()


def logged(folder: Path) -> int:
    """Return the step of the log's last line."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def weights(run: Run) -> str:
    """Return a digest of the weights and the optimizer's state. All ranks."""
    from torch.distributed.tensor import DTensor

    from trainworks.checkpoint.pieces import named_tensors

    total = hashlib.sha256()
    for name, value in sorted(named_tensors(run).items()):
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        total.update(name.encode() + whole.detach().numpy().tobytes())
    return total.hexdigest()
