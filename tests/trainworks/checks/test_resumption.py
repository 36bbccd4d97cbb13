"""`trainworks verify-resume`: a run that is killed twice and equals the undisturbed one, and runs that do not."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
from typer.testing import CliRunner

import pretrain
from trainworks import Data, FromScratch, NewTokenizer
from trainworks.cli import app
from trainworks.config import dump
from trainworks.schema import RunConfig
from trainworks.tasks import TASKS

ALL = os.environ.get("TRAINWORKS_FAULTS") == "all"
MISTAKES = [
    ("moments", r"a resumed run parts from the undisturbed one at step [5-8]: (loss|grad_norm) \S+ and \S+"),
    ("random state", r"parts from the undisturbed one at step \d: loss [\d.]+ and [\d.]+"),
    ("nothing", r"the run did not go on from the checkpoint of step 4"),
]


def write_run_file(folder: Path, task: str, *, dropout: float = 0.0, **changes: Any) -> str:
    tiny.save_model(folder / "model", task, dropout=dropout)
    tiny.save_rows(tiny.rows_file(folder, task), task, 60)
    return write(folder, tiny.config(task, folder / "model", tiny.rows_file(folder, task), folder / "run", **changes))


def write(folder: Path, config: RunConfig[Any]) -> str:
    (folder / "run.yaml").write_text(dump(config), encoding="utf-8")
    return str(folder / "run.yaml")


def verify(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["verify-resume", *arguments])


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("task", sorted(TASKS) if ALL else ["sequence-classification"])
def test_an_adapter_beside_dropout_is_equal_bit_for_bit(task: str, tmp_path: Path) -> None:
    result = verify(write_run_file(tmp_path, task, dropout=0.1, tuning="lora"), "--steps", "4")
    assert result.exit_code == 0, result.stderr
    found = re.fullmatch(r"equal: 8 losses and (\d+) tensors, bit for bit\n", result.stdout)
    assert found
    assert int(found[1]) > 20
    stages = [line.split(" ...")[0] for line in result.stderr.splitlines()]
    assert stages[:2] == ["undisturbed: 8 steps", "1 process, killed after step 6"]
    assert len(stages) == 4
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("dropout", [0.0, 0.1] if ALL else [0.0])
def test_a_model_from_scratch_is_moved_to_two_processes_and_back(dropout: float, tmp_path: Path) -> None:
    tiny.save_rows(tmp_path / "rows.jsonl", "causal-lm", 60)
    likeness = tiny.config("causal-lm", tmp_path, tmp_path / "rows.jsonl", tmp_path / "run")
    sizes = tiny.SIZES | {"attention_dropout": dropout}
    model = FromScratch(architecture="llama", sizes=sizes, tokenizer=NewTokenizer(vocab_size=300))
    settings = {name: getattr(likeness, name) for name in ("output", "task", "batch", "budget", "optim")}
    config = pretrain.Config(**settings, model=model, data=Data(source=str(tmp_path / "rows.jsonl"), holdout=0.2))
    result = verify(write(tmp_path, config), "--steps", "4", "--ranks", "2")
    assert result.exit_code == 0, result.stderr
    bits, there, back = result.stdout.splitlines()
    assert bits.startswith("equal: 8 losses and ")
    same = (
        "dropout draws other numbers there; 8 steps took as many samples and tokens" if dropout else "8 losses within "
    )
    assert there.startswith(f"moved from 1 to 2 processes: {same}")
    assert back.startswith(f"moved from 2 to 1 process: {same}")


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize(("mistake", "told"), MISTAKES if ALL else MISTAKES[:2])
def test_what_is_not_restored_is_found_and_said(
    mistake: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainworks.checks.resumption.recipe_of", lambda _: "planted_finetune")
    monkeypatch.setenv("PLANTED_MISTAKE", mistake)
    result = verify(write_run_file(tmp_path, "sft", dropout=0.1), "--steps", "4")
    assert result.exit_code == 3
    assert re.search(told, result.stderr), result.stderr
    assert result.stdout == ""


def test_more_processes_than_gpus_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_run_file(tmp_path, "sft")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    result = verify(file, "--ranks", "2")
    assert (result.exit_code, result.stdout) == (3, "")
    assert "each process takes a GPU, and there are 1" in result.stderr
