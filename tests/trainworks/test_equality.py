"""The loss curve does not depend on how a step is cut up or spread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from distributed import Mode, run_ranks

import finetune
from trainworks import train_steps
from trainworks.tasks import TASKS

RANKS = str(Path(__file__).parents[1] / "ranks.py")
TOLERANCE = 1e-6


@pytest.fixture(scope="module", params=sorted(TASKS))
def task(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(task: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp(task)
    tiny.save_model(place / "model", task)
    tiny.save_rows(tiny.rows_file(place, task), task, 60)
    return place


def curve(folder: Path, task: str, output: Path, **changes: Any) -> list[tuple[float, float]]:
    run = finetune.prepare(tiny.config(task, folder / "model", tiny.rows_file(folder, task), output, **changes))
    assert run.plan.total % run.plan.per_step, "the last step should be short"
    return [(step.loss.item(), step.grad_norm.item()) for step in train_steps(run)]


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_curve_is_the_same_for_every_micro_batch(task: str, tuning: str, folder: Path, tmp_path: Path) -> None:
    whole = curve(folder, task, tmp_path / "8", tuning=tuning, micro=8)
    assert len(whole) >= 7
    for micro in (4, 3, 1):
        for expected, found in zip(
            whole, curve(folder, task, tmp_path / str(micro), tuning=tuning, micro=micro), strict=True
        ):
            assert found == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_the_curve_is_the_same_on_two_processes(
    task: str, tuning: str, mode: Mode, folder: Path, tmp_path: Path
) -> None:
    whole = curve(folder, task, tmp_path / "one", tuning=tuning, micro=8)
    arguments = {"folder": str(folder), "task": task, "tuning": tuning, "micro": 2, "output": str(tmp_path / "two")}
    results = run_ranks(f"{RANKS}:train", arguments, ranks=2, mode=mode)
    assert [result["ranks"] for result in results] == [2, 2]
    assert results[0]["steps"] == results[1]["steps"]
    for expected, found in zip(whole, results[0]["steps"], strict=True):
        assert tuple(found) == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.slow
def test_a_last_step_with_fewer_samples_than_processes_counts_no_filler(tmp_path: Path) -> None:
    task, epochs = "sequence-classification", 1.1875
    tiny.save_model(tmp_path / "model", task)
    tiny.save_rows(tmp_path / "rows.jsonl", task, 60)
    run = finetune.prepare(
        tiny.config(task, tmp_path / "model", tmp_path / "rows.jsonl", tmp_path / "one", epochs=epochs)
    )
    assert run.plan.size(run.plan.num_steps - 1) == 1
    whole = [(step.loss.item(), step.grad_norm.item()) for step in train_steps(run)]
    arguments = {"folder": str(tmp_path), "task": task, "output": str(tmp_path / "two"), "epochs": epochs}
    results = run_ranks(f"{RANKS}:train", arguments, ranks=2)
    assert [result["ranks"] for result in results] == [2, 2]
    for expected, found in zip(whole, results[0]["steps"], strict=True):
        assert tuple(found) == pytest.approx(expected, rel=TOLERANCE)
