"""Exact resume: a run that is stopped five times in a pass over its data equals the undisturbed one in every bit."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset

import finetune
from trainworks import Batch, Budget, Data, Every, LoRA, Mixture, Part, Run, RunRecord, Speed, read_record
from trainworks.checkpoint import checkpoints
from trainworks.config import dump
from trainworks.data.loading import Window
from trainworks.errors import EXIT_PREEMPTED

pytestmark = pytest.mark.faults
ROOT = Path(__file__).parents[2]
ALL = os.environ.get("TRAINWORKS_FAULTS") == "all"
KINDS = {
    "plain": "sft",
    "packed": "sft",
    "mixed": "sft",
    "mixed and packed": "sft",
    "causal-lm": "causal-lm",
    "sequence-classification": "sequence-classification",
    "image-classification": "image-classification",
    "masked-image": "masked-image",
    "object-detection": "object-detection",
    "semantic-segmentation": "semantic-segmentation",
}
"""What is trained on, and by which task."""
RESUMES = 5


@dataclass(frozen=True)
class Cell:
    """One way to train."""

    kind: str
    tuning: str
    accumulation: int = 1
    """Micro-batches a step."""
    workers: int = 0

    def __str__(self) -> str:
        return f"{self.kind}, {self.tuning}, {self.accumulation} a step, {self.workers} workers"

    def config(self, folder: Path, output: str, **changes: Any) -> finetune.Config:
        """Return a run of a pass and a third over its data, with dropout and nothing held out."""
        task, packed = KINDS[self.kind], "packed" in self.kind
        per_step = 4 if packed else 8
        settings: dict[str, Any] = {
            "batch": Batch(per_step=per_step, micro=per_step // self.accumulation, pack=160 if packed else "off"),
            "epochs": 1.3,
            "every": Every(log=1, save="end", keep=1),
        }
        data = changes.pop("data", self.data()).model_copy(update={"workers": self.workers})
        made = tiny.config(task, folder / "model" / task, data, folder / output, **(settings | changes))
        return made.model_copy(update={"tuning": LoRA(rank=4, dropout=0.1)} if self.tuning == "lora" else {})

    def data(self) -> Data | Mixture:
        """Return some rows in memory, nothing held out."""
        if "mixed" not in self.kind:
            rows = tiny.rows(KINDS[self.kind], 160 if self.kind == "packed" else 80)
            return Data(source=Dataset.from_list(rows), holdout=0.0)
        number = 80 if "packed" in self.kind else 40
        parts = {
            name: Part(source=Dataset.from_list(tiny.rows("sft", number, seed)), holdout=0.0, weight=weight)
            for name, seed, weight in (("questions", 1, 1.0), ("talks", 2, 2.0))
        }
        return Mixture(sources=parts)


CELLS = [
    Cell(kind, tuning, accumulation, workers)
    for workers, accumulation, tuning, kind in product((0, 2), (1, 4), ("full", "lora"), KINDS)
]
OFTEN = [
    Cell("plain", "full", 1),
    Cell("plain", "lora", 4),
    Cell("packed", "full", 4),
    Cell("packed", "lora", 1),
    Cell("mixed", "full", 1),
    Cell("mixed", "lora", 4, workers=2),
    Cell("mixed and packed", "full", 4),
    Cell("mixed and packed", "lora", 1),
    Cell("causal-lm", "full", 4),
    Cell("causal-lm", "lora", 1),
    Cell("sequence-classification", "full", 4),
    Cell("sequence-classification", "lora", 1),
    Cell("image-classification", "full", 4),
    Cell("image-classification", "lora", 1),
    Cell("masked-image", "full", 4),
    Cell("masked-image", "lora", 1),
    Cell("object-detection", "full", 4),
    Cell("object-detection", "lora", 1),
    Cell("semantic-segmentation", "full", 4),
    Cell("semantic-segmentation", "lora", 1),
]
"""The cells of every day: each kind and tuning once; starting workers takes seconds, so few have any."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("matrix")
    for task in sorted(set(KINDS.values())):
        tiny.save_model(place / "model" / task, task, dropout=0.1)
    return place


@dataclass
class Watched:
    """What the steps of a run were made of, and when it is asked to stop."""

    stop_at: int = 0
    """The step during which a signal comes; 0 for none."""
    stop_in_batch: int = 0
    """The batch of evaluations, counted through all of them, before which a signal comes; 0 for none."""
    steps: list[list[list[int]]] = field(default_factory=list)
    """By step and micro-batch, the numbers of the rows."""
    batches: int = 0
    """Batches of evaluations so far."""


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    seen, windows, batches = Watched(), Run.windows, Run.evaluation_batches

    def recorded(run: Run) -> Iterator[Window]:
        for window in windows(run):
            seen.steps.append([batch["index"].tolist() for batch in window.batches])
            if len(seen.steps) == seen.stop_at:
                os.kill(os.getpid(), signal.SIGUSR1)
            yield window

    def counted(run: Run, rows: Dataset) -> Iterator[Any]:
        for batch in batches(run, rows):
            seen.batches += 1
            if seen.batches == seen.stop_in_batch:
                os.kill(os.getpid(), signal.SIGUSR1)
            yield batch

    monkeypatch.setattr(Run, "windows", recorded)
    monkeypatch.setattr(Run, "evaluation_batches", counted)
    return seen


def poison(number: int) -> None:
    """Leave every random state as another process would have it."""
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002, what libraries draw from
    torch.manual_seed(number)


@dataclass(frozen=True)
class Result:
    """All that two runs are compared by."""

    steps: list[list[list[int]]]
    curve: list[dict[str, Any]]
    """Losses and gradient norms to the bit, with samples, tokens and rates."""
    weights: str
    reports: list[dict[str, Any]]
    best: list[int]
    """The checkpoints that are marked as best."""


def result(run: Run, record: RunRecord, seen: Watched) -> Result:
    state = {name: value.detach().numpy().tobytes() for name, value in run.model.state_dict().items()}
    return Result(
        steps=seen.steps,
        curve=[point.model_dump(exclude={"seconds"}) for point in record.curve],
        weights=hashlib.sha256(b"".join(state[name] for name in sorted(state))).hexdigest(),
        reports=[report.model_dump(exclude={"seconds"}) for report in record.reports],
        best=[checkpoint.step for checkpoint in checkpoints(run.folder) if checkpoint.is_best],
    )


def undisturbed(config: finetune.Config, seen: Watched) -> tuple[Run, Result]:
    run = finetune.prepare(config)
    whole = result(run, finetune.fit(run), seen)
    assert len(whole.curve) == len(whole.steps) == run.plan.num_steps
    seen.steps, seen.batches = [], 0
    return run, whole


def disturbed(config: finetune.Config, seen: Watched, stops: list[int]) -> Result:
    """Run to the end through a stop in each of these steps, each time from a run that is prepared anew."""
    for number, stop in enumerate([*stops, 0]):
        poison(1000 + number)
        seen.stop_at = stop
        run = finetune.prepare(config)
        assert run.progress.step == (stops[number - 1] if number else 0)
        record = finetune.fit(run)
        assert (record.status, record.step) == (("preempted", stop) if stop else ("complete", run.plan.num_steps))
    assert record.resumed_at == tuple(stops)
    return result(run, record, seen)


def in_one_pass(run: Run) -> list[int]:
    """Return steps spread over the first pass over the data, which ends before the run does."""
    steps = run.plan.num_samples // run.plan.per_step
    assert RESUMES < steps < run.plan.num_steps
    return [steps * number // (RESUMES + 1) for number in range(1, RESUMES + 1)]


def check(cell: Cell, folder: Path, tmp_path: Path, seen: Watched, **changes: Any) -> None:
    run, whole = undisturbed(cell.config(folder, str(tmp_path / "whole"), **changes), seen)
    assert {len(step) for step in whole.steps[:-1]} == {cell.accumulation}
    parts = disturbed(cell.config(folder, str(tmp_path / "parts"), **changes), seen, in_one_pass(run))
    assert parts.steps == whole.steps
    assert parts.curve == whole.curve
    assert parts == whole


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS if ALL else OFTEN, ids=str)
def test_five_resumes_a_pass_change_no_bit(cell: Cell, folder: Path, tmp_path: Path, watched: Watched) -> None:
    check(cell, folder, tmp_path, watched)


def test_the_matrix_is_whole() -> None:
    assert len(CELLS) == len(set(CELLS)) == 8 * len(KINDS) >= 48
    assert set(OFTEN) <= set(CELLS)
    assert {(cell.kind, cell.tuning) for cell in OFTEN} == set(product(KINDS, ("full", "lora")))


CELLS_WITH_EVALUATIONS = [Cell("mixed and packed", "full", 4), Cell("sequence-classification", "lora")]


def held_out(data: Data | Mixture) -> Data | Mixture:
    """Return data of which a fifth is held out."""
    if isinstance(data, Data):
        return data.model_copy(update={"holdout": 0.2})
    parts = {name: part.model_copy(update={"holdout": 0.2}) for name, part in data.sources.items()}
    return data.model_copy(update={"sources": parts})


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS_WITH_EVALUATIONS, ids=str)
@pytest.mark.parametrize("background", [False, True], ids=["saved at once", "saved in the background"])
def test_five_resumes_with_evaluations_and_saves_between_change_no_bit(
    cell: Cell, background: bool, folder: Path, tmp_path: Path, watched: Watched
) -> None:
    changes = {
        "data": held_out(cell.data()),
        "epochs": 1.6,
        "every": Every(log=1, evaluate=2, save=3, keep=1),
        "speed": Speed(background_saving=background),
    }
    check(cell, folder, tmp_path, watched, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("cell", [Cell("mixed", "full"), Cell("plain", "lora")], ids=str)
def test_a_stop_in_any_evaluation_makes_that_evaluation_again(
    cell: Cell, folder: Path, tmp_path: Path, watched: Watched
) -> None:
    settings = {"data": held_out(cell.data()), "every": Every(log=1, evaluate=3, save="end", keep=1)}
    run, whole = undisturbed(cell.config(folder, str(tmp_path / "whole"), **settings), watched)
    own = [report for report in run.record.reports if report.name not in run.task.baselines(run.train, run.validation)]
    each = -(-len(run.validation) // run.micro)  # type: ignore[arg-type]
    assert each > 1
    assert [report.step for report in own] == [0, 3, 6, 9, run.plan.num_steps]

    config = cell.config(folder, str(tmp_path / "parts"), **settings)
    for number, report in enumerate(own):
        poison(number)
        watched.batches, watched.stop_in_batch = 0, 1 if number == 0 else each + 1
        stopped = finetune.prepare(config)
        record = finetune.fit(stopped)
        assert (record.status, record.step) == ("preempted", report.step)
        assert report.name not in [kept.name for kept in record.reports]
    watched.stop_in_batch = 0
    last = finetune.prepare(config)
    record = finetune.fit(last)
    assert record.status == "complete"
    assert record.resumed_at == tuple(report.step for report in own if report.step)
    assert result(last, record, watched) == whole
    assert record.comparisons == run.record.comparisons != ()


# Across processes

STEPS = 100
SECONDS = 120.0
COMMANDS = [
    Cell("mixed and packed", "lora", 4),
    Cell("plain", "full", 4),
    Cell("packed", "lora"),
    Cell("mixed", "full", workers=2),
    Cell("causal-lm", "full"),
    Cell("sequence-classification", "lora", 4),
]


def on_disk(data: Data | Mixture, folder: Path) -> Data | Mixture:
    """Return data whose rows are read from files."""
    if isinstance(data, Data):
        return data.model_copy(update={"source": written(data.source, folder / "rows.jsonl")})
    parts = {
        name: part.model_copy(update={"source": written(part.source, folder / f"{name}.jsonl")})
        for name, part in data.sources.items()
    }
    return data.model_copy(update={"sources": parts})


def written(rows: Dataset, path: Path) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def started(file: Path, output: Path, *overrides: str, **environment: str) -> subprocess.Popen[bytes]:
    """Start the command on a run file."""
    # Sums over threads would have to be cut the same way for the weights to be equal bit for bit.
    own = {"OMP_NUM_THREADS": "1", "TRAINWORKS_CACHE": str(file.parent / ".cache"), "PYTHONPATH": str(ROOT)}
    with output.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "finetune", str(file), f"output={output}", *overrides],
            env=dict(os.environ) | own | environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def done(output: Path) -> int:
    """Return the newest step in the log."""
    path = output / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.startswith(b'{"kind": "CurvePoint"')), default=0)


def killed(file: Path, output: Path, point: str) -> None:
    """Run until the process gets to a place where it is killed, in the middle of a save."""
    process = started(file, output, TRAINWORKS_FAIL_AT=point)
    assert process.wait(SECONDS) == -signal.SIGKILL, output.with_suffix(".log").read_text()[-3000:]


def stopped(file: Path, output: Path) -> None:
    """Run for ten more steps at least, then ask the process to stop."""
    wanted, process = done(output) + 10, started(file, output)
    deadline = time.monotonic() + SECONDS
    while done(output) < wanted:
        assert process.poll() is None, output.with_suffix(".log").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(SECONDS) == EXIT_PREEMPTED, output.with_suffix(".log").read_text()[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("cell", COMMANDS if ALL else COMMANDS[:1], ids=str)
def test_commands_that_are_killed_and_stopped_end_with_the_same_bits(cell: Cell, folder: Path, tmp_path: Path) -> None:
    data = on_disk(cell.data(), tmp_path)
    changes = {"data": data, "budget": Budget(steps=STEPS), "every": Every(log=1, save=1, keep=2)}
    file, parts = tmp_path / "run.yaml", tmp_path / "parts"
    file.write_text(dump(cell.config(folder, str(parts), **changes)), encoding="utf-8")
    assert started(file, tmp_path / "whole", "every.save=end").wait(SECONDS) == 0

    killed(file, parts, "save.part:13")
    stopped(file, parts)
    if ALL:
        killed(file, parts, "save.renamed:7")
        stopped(file, parts)
        killed(file, parts, "save.begun:5")
    last = started(file, parts)
    assert last.wait(SECONDS) == 0, parts.with_suffix(".log").read_text()[-3000:]

    one, other = read_record(tmp_path / "whole"), read_record(parts)
    assert (len(other.resumed_at), len(other.curve)) == (5 if ALL else 2, STEPS)
    assert [point.model_dump(exclude={"seconds"}) for point in other.curve] == [
        point.model_dump(exclude={"seconds"}) for point in one.curve
    ]
    names = [path.name for path in sorted((tmp_path / "whole" / "model").glob("*.safetensors"))]
    assert names
    for name in names:
        assert (parts / "model" / name).read_bytes() == (tmp_path / "whole" / "model" / name).read_bytes()
