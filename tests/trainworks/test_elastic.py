"""Elastic ranks: a run goes on with another number of processes in the middle of a pass, on the same samples."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from distributed import Mode, run_ranks
from torch.distributed.tensor import DTensor

import finetune
from trainworks import Batch, Budget, Every, Mixture, Part, Run, train_steps
from trainworks.checkpoint import save
from trainworks.command import _opening
from trainworks.data.loading import Window

pytestmark = [pytest.mark.faults, pytest.mark.slow]
ALL = os.environ.get("TRAINWORKS_FAULTS") == "all"
TOLERANCE = 1e-6
STEPS = 12


def config(folder: str, output: str, kind: str, per_step: int, model: str) -> finetune.Config:
    """Return a run of 12 steps, which end in the second pass over the data."""
    place, packed = Path(folder), "packed" in kind
    parts = {
        name: Part(source=str(place / f"{name}.jsonl"), holdout=0.0, weight=weight)
        for name, weight in (("questions", 1.0), ("talks", 2.0))
    }
    mixture = Mixture(sources=parts if "mixed" in kind else {"questions": parts["questions"]})
    return tiny.config(
        "sft",
        place / model,
        mixture,
        place / output,
        batch=Batch(per_step=per_step, micro=2, pack=160 if packed else "off"),
        budget=Budget(steps=STEPS),
        every=Every(log=1, save="end"),
    )


def part(folder: str, output: str, kind: str, until: int, per_step: int = 8, model: str = "model") -> dict[str, Any]:
    """Go on with a run until some step, on this rank; return what every step was made of and came to."""
    run = finetune.prepare(config(folder, output, kind, per_step, model))
    begun, curve, rows, windows = run.progress.step, [], [], run.windows
    run.windows = lambda: map(partial(noted, rows), windows())  # type: ignore[method-assign]
    run.save_record()
    for step in train_steps(run):
        curve.append([step.loss.item(), step.grad_norm.item()])
        if step.number == until:
            break
    save(run)
    return {
        "begun": begun,
        "curve": curve,
        "rows": rows,
        "pass": run.plan.num_samples,
        "per_step": per_step,
        "notes": list(run.record.notes),
        "weights": digest(run),
    }


def noted(rows: list[list[list[int]]], window: Window) -> Window:
    """Write down a step's rows, as [number, source], without fillers, which do not count."""
    columns = [(batch["index"], batch["source"], batch["weight"]) for batch in window.batches]
    whole = zip(*(torch.cat(parts).tolist() for parts in zip(*columns, strict=True)), strict=True)
    rows.append([[index, source] for index, source, weight in whole if weight])
    return window


def digest(run: Run) -> str:
    state = run.model.state_dict()
    whole = {name: each.full_tensor() if isinstance(each, DTensor) else each for name, each in state.items()}
    return hashlib.sha256(b"".join(whole[name].numpy().tobytes() for name in sorted(whole))).hexdigest()


@dataclass(frozen=True)
class Outcome:
    """All the steps of a run, over its parts and ranks."""

    rows: list[list[list[int]]]
    curve: list[list[float]]
    weights: str


def chain(folder: Path, output: str, kind: str, ranks: list[int], mode: Mode = "ddp", **options: Any) -> Outcome:
    """Train one run on so many processes in turn, all but the last part in the first pass over the data."""
    rows, curve = [], []
    for number, count in enumerate(ranks):
        begun, until = STEPS * number // len(ranks), STEPS * (number + 1) // len(ranks)
        arguments = {"folder": str(folder), "output": output, "kind": kind, "until": until} | options
        everyone = run_ranks(f"{__file__}:part", arguments, ranks=count, mode=mode, timeout=300)
        first = everyone[0]
        assert [rank["begun"] for rank in everyone] == [begun] * count
        assert begun == 0 or begun * first["per_step"] % first["pass"], "it should go on in the middle of a pass"
        assert all((rank["curve"], rank["weights"]) == (first["curve"], first["weights"]) for rank in everyone)
        curve += first["curve"]
        rows += [sorted(row for rank in everyone for row in rank["rows"][step]) for step in range(until - begun)]
        moved = number > 0 and ranks[number - 1] != count
        assert moved == any(f"step {begun} on {count} processes instead of" in note for note in first["notes"])
    assert len(rows) == STEPS
    return Outcome(rows, curve, first["weights"])


def assert_alike(found: Outcome, expected: Outcome) -> None:
    assert found.rows == expected.rows
    for one, other in zip(found.curve, expected.curve, strict=True):
        assert one == pytest.approx(other, rel=TOLERANCE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, the same with dropout, and the rows of two sources."""
    place = tmp_path_factory.mktemp("elastic")
    tiny.save_model(place / "model", "sft")
    tiny.save_model(place / "dropout", "sft", dropout=0.1)
    for seed, name in enumerate(("questions", "talks")):
        rows = tiny.rows("sft", 60, seed)
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def alone(folder: Path) -> Callable[[str, int], Outcome]:
    """Return what a run on one process that nothing disturbs sees and comes to."""

    @cache
    def whole(kind: str, per_step: int) -> Outcome:
        done = part(str(folder), f"alone, {kind}, {per_step}", kind, STEPS, per_step)
        return Outcome([sorted(step) for step in done["rows"]], done["curve"], done["weights"])

    return whole


KINDS = ["plain", "packed", "mixed", "mixed and packed"]
MOVES: list[tuple[str, Mode, list[int]]] = [
    ("mixed and packed", "ddp", [1, 2, 4, 1]),
    ("mixed", "fsdp2", [4, 2, 1, 4]),
    ("plain", "ddp", [2, 1]),
    ("packed", "fsdp2", [1, 2]),
]
MODES: tuple[Mode, ...] = ("ddp", "fsdp2")
EVERY_MOVE = list(product(KINDS, MODES, ([1, 2, 4, 1], [4, 2, 1, 4])))


@pytest.mark.parametrize(("kind", "mode", "ranks"), EVERY_MOVE if ALL else MOVES, ids=str)
def test_another_number_of_processes_goes_on_with_the_same_samples_and_losses(
    kind: str, mode: Mode, ranks: list[int], folder: Path, alone: Callable[[str, int], Outcome]
) -> None:
    per_step = 4 if "packed" in kind else 8
    found = chain(folder, f"{kind}, {mode}, {ranks}", kind, ranks, mode, per_step=per_step)
    assert_alike(found, alone(kind, per_step))


SAME: list[tuple[str, Mode, int]] = [("mixed and packed", "fsdp2", 2)]
ALL_THE_SAME = [*product(KINDS, MODES, (2,)), *product(("mixed and packed",), MODES, (4,))]


@pytest.mark.parametrize(("kind", "mode", "ranks"), ALL_THE_SAME if ALL else SAME, ids=str)
def test_the_same_number_of_processes_goes_on_bit_for_bit_with_dropout(
    kind: str, mode: Mode, ranks: int, folder: Path
) -> None:
    options = {"per_step": 4 if "packed" in kind else 8, "model": "dropout"}
    whole = chain(folder, f"whole, {kind}, {mode}, {ranks}", kind, [ranks], mode, **options)
    assert chain(folder, f"parts, {kind}, {mode}, {ranks}", kind, [ranks, ranks], mode, **options) == whole


def test_a_command_says_how_much_of_their_time_processes_have_nothing_to_do(folder: Path, tmp_path: Path) -> None:
    run = finetune.prepare(config(str(folder), str(tmp_path), "plain", 8, "model"))
    assert [round(run.plan.idle(ranks), 3) for ranks in (1, 2, 3, 5, 8, 16)] == [0.0, 0.0, 0.111, 0.2, 0.0, 0.5]
    assert "idle" not in _opening(run)
    run.world = SimpleNamespace(ranks=3)  # type: ignore[assignment]
    assert "3 x 2 at once (11% idle: 8 is no multiple of 3)" in _opening(run)


UNEVEN: list[tuple[int, Mode, list[int]]] = [(8, "ddp", [1, 3]), (2, "ddp", [3])]
UNEVENLY = list(product((8, 2), MODES, ([1, 3], [3, 1])))


@pytest.mark.parametrize(("per_step", "mode", "ranks"), UNEVENLY if ALL else UNEVEN, ids=str)
def test_steps_that_do_not_divide_among_the_processes_come_to_the_same(
    per_step: int, mode: Mode, ranks: list[int], folder: Path, alone: Callable[[str, int], Outcome]
) -> None:
    found = chain(folder, f"{per_step}, {mode}, {ranks}", "mixed", ranks, mode, per_step=per_step)
    assert_alike(found, alone("mixed", per_step))
