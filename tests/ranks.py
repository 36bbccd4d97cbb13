"""What each rank of a test does; started by `distributed.run_ranks`, so everything here travels as JSON."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import tiny

import finetune
from trainworks import Optim, evaluate, export, train_steps
from trainworks.checkpoint import save


def train(
    folder: str,
    task: str,
    output: str,
    tuning: str = "full",
    micro: int = 8,
    stop_after: int = 0,
    epochs: float = 1.3,
    optim: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train to the end, or save and end after some steps; return the curve and a digest of the weights."""
    place = Path(folder)
    config = tiny.config(
        task,
        place / "model",
        tiny.rows_file(place, task),
        Path(output),
        tuning=tuning,
        micro=micro,
        epochs=epochs,
        options=options,
    )
    changes: dict[str, Any] = {"optim": config.optim if optim is None else Optim(**optim)}
    changes["model"] = config.model.model_copy(update=model)
    run = finetune.prepare(config.model_copy(update=changes))
    run.save_record()
    steps = []
    for step in train_steps(run):
        steps.append((step.loss.item(), step.grad_norm.item()))
        if step.number == stop_after:
            save(run)
            break
    exported = export(run)
    return {
        "ranks": run.world.ranks,
        "steps": steps,
        "notes": list(run.record.notes),
        "weights": [file_digest(path) for path in sorted(exported.glob("*.safetensors"))],
    }


def evaluated(folder: str, task: str, output: str, options: dict[str, Any]) -> dict[str, Any]:
    """Evaluate the model as it is; return every metric's value and interval, and the worked examples."""
    place = Path(folder)
    config = tiny.config(task, place / "model", place / "rows.jsonl", Path(output), micro=3)
    config = config.model_copy(update={"task": config.task.model_copy(update=options)})
    run = finetune.prepare(config)
    report = evaluate(run)
    values = {name: [estimate.value, estimate.low, estimate.high] for name, estimate in report.metrics.items()}
    return {
        "ranks": run.world.ranks,
        "rows": len(run.validation or ()),
        "examples": report.num_examples,
        "metrics": values,
        "samples": [sample.model_dump() for sample in report.samples],
    }


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
