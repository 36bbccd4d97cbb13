"""A resumed run equals the uninterrupted one, bit for bit."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
from distributed import run_ranks
from safetensors.torch import load_file, save_file

import finetune
from trainworks import Every, Run, read_record, train_steps
from trainworks.checkpoint import checkpoints, save
from trainworks.errors import CheckpointError, ConfigError
from trainworks.tasks import TASKS

RANKS = str(Path(__file__).parents[1] / "ranks.py")
Curve = list[tuple[float, float]]


def prepared(folder: Path, task: str, output: Path, *, micro: int = 4, **changes: Any) -> Run:
    return finetune.prepare(
        tiny.config(task, folder / "model", tiny.rows_file(folder, task), output, epochs=1.7, micro=micro, **changes)
    )


def some_steps(run: Run, number: int | None = None) -> Curve:
    curve = []
    for step in train_steps(run):
        curve.append((step.loss.item(), step.grad_norm.item()))
        if len(curve) == number:
            break
    return curve


def weights(run: Run) -> str:
    state = {name: value.detach().numpy().tobytes() for name, value in run.model.state_dict().items()}
    return hashlib.sha256(b"".join(state[name] for name in sorted(state))).hexdigest()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def lay_out(folder: Path, task: str) -> Path:
    tiny.save_model(folder / "model", task, dropout=0.1)
    tiny.save_rows(tiny.rows_file(folder, task), task, 60)
    return folder


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("task", sorted(TASKS))
def test_five_steps_a_new_run_and_the_rest_equal_one_run(task: str, tuning: str, tmp_path: Path) -> None:
    lay_out(tmp_path, task)
    whole = prepared(tmp_path, task, tmp_path / "whole", tuning=tuning)
    expected = some_steps(whole)
    assert len(expected) >= 10
    first = prepared(tmp_path, task, tmp_path / "parts", tuning=tuning)
    first.save_record()
    begun = some_steps(first, 5)
    save(first)
    second = prepared(tmp_path, task, tmp_path / "parts", tuning=tuning)
    assert (second.progress.step, second.progress.samples) == (5, 40)
    assert second.record.resumed_at == (5,)
    assert begun + some_steps(second) == expected
    assert weights(second) == weights(whole)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_two_processes_resume_bit_for_bit(mode: Any, tmp_path: Path) -> None:
    lay_out(tmp_path, "sft")
    common = {"folder": str(tmp_path), "task": "sft", "micro": 2}
    whole = run_ranks(f"{RANKS}:train", common | {"output": str(tmp_path / "whole")}, ranks=2, mode=mode)
    parts = common | {"output": str(tmp_path / "parts")}
    first = run_ranks(f"{RANKS}:train", parts | {"stop_after": 3}, ranks=2, mode=mode)
    second = run_ranks(f"{RANKS}:train", parts, ranks=2, mode=mode)
    assert [rank["ranks"] for rank in first + second] == [2] * 4
    assert first[0]["steps"] + second[0]["steps"] == whole[0]["steps"]
    assert second[0]["weights"] == whole[0]["weights"]


@pytest.mark.slow
def test_a_sharded_run_goes_on_with_one_process(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "model", "sft")
    tiny.save_rows(tmp_path / "rows.jsonl", "sft", 60)
    common = {"folder": str(tmp_path), "task": "sft", "micro": 2}
    whole = run_ranks(f"{RANKS}:train", common | {"output": str(tmp_path / "whole")}, ranks=1)
    parts = common | {"output": str(tmp_path / "parts")}
    first = run_ranks(f"{RANKS}:train", parts | {"stop_after": 3}, ranks=2, mode="fsdp2")
    second = run_ranks(f"{RANKS}:train", parts, ranks=1)
    steps = first[0]["steps"] + second[0]["steps"]
    for expected, found in zip(whole[0]["steps"], steps, strict=True):
        assert found == pytest.approx(expected, rel=1e-6)
    assert "on 1 processes instead of 2" in second[0]["notes"][0]


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """A folder with a run in `parts`, saved after steps 2 and 4."""
    lay_out(tmp_path, "sft")
    run = prepared(tmp_path, "sft", tmp_path / "parts")
    run.save_record()
    for step in train_steps(run):
        if step.number % 2 == 0:
            save(run)
        if step.number == 4:
            break
    assert [checkpoint.step for checkpoint in checkpoints(tmp_path / "parts")] == [4, 2]
    return tmp_path


@pytest.mark.parametrize("name", ["rank-00000-00000.safetensors", "rank-00000.json", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_taken(stopped: Path, name: str, damage: str) -> None:
    file = stopped / "parts" / "checkpoints" / "step-00000004" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    {
        "flip": lambda: file.write_bytes(content),
        "truncate": lambda: file.write_bytes(content[:-1]),
        "delete": file.unlink,
    }[damage]()
    run = prepared(stopped, "sft", stopped / "parts")
    assert run.progress.step == 2
    assert (stopped / "parts" / "checkpoints" / "damaged-step-00000004").is_dir()
    assert "step-00000004 was damaged" in run.record.notes[0]


def test_a_changed_configuration_is_refused_with_its_keys(stopped: Path) -> None:
    before = sorted((path, path.read_bytes()) for path in (stopped / "parts").rglob("*") if path.is_file())
    with pytest.raises(ConfigError, match=r"another run.*\n  seed: 0 -> 7"):
        prepared(stopped, "sft", stopped / "parts", seed=7)
    assert sorted((path, path.read_bytes()) for path in (stopped / "parts").rglob("*") if path.is_file()) == before


def test_changed_rows_are_refused(stopped: Path) -> None:
    tiny.save_rows(stopped / "rows.jsonl", "sft", 61)
    with pytest.raises(ConfigError, match="other rows"):
        prepared(stopped, "sft", stopped / "parts")


def test_intervals_may_change(stopped: Path) -> None:
    run = prepared(stopped, "sft", stopped / "parts", every=Every(log=3, save=1))
    assert run.progress.step == 4


def test_old_checkpoints_are_pruned_but_the_best_and_the_pinned_stay(tmp_path: Path) -> None:
    lay_out(tmp_path, "sft")
    run = prepared(tmp_path, "sft", tmp_path / "run", every=Every(keep=2))
    for step in train_steps(run):
        save(run, best=step.number == 2)
        if step.number == 3:
            (tmp_path / "run" / "checkpoints" / "step-00000003" / "pin").touch()
        if step.number == 7:
            break
    assert [checkpoint.step for checkpoint in checkpoints(tmp_path / "run")] == [7, 6, 3, 2]
    assert [checkpoint.step for checkpoint in checkpoints(tmp_path / "run") if checkpoint.is_best] == [2]


def change_one_weight(path: Path) -> None:
    tensors = load_file(path)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, path, metadata={"format": "pt"})


def test_weights_that_changed_under_the_same_name_are_refused(stopped: Path) -> None:
    shutil.rmtree(stopped / "model")
    tiny.save_model(stopped / "model", "causal-lm")
    change_one_weight(stopped / "model" / "model.safetensors")
    with pytest.raises(ConfigError, match=r"other weights than model has now"):
        prepared(stopped, "sft", stopped / "parts")


def test_a_template_that_changed_under_the_same_name_is_refused(stopped: Path) -> None:
    path = stopped / "model" / "chat_template.jinja"
    path.write_text(path.read_text(encoding="utf-8").replace("<|im_start|>", "<|im_start|> "), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"other tokens than the processor has now"):
        prepared(stopped, "sft", stopped / "parts")


def test_a_checkpoint_of_another_model_is_refused(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(stopped / "model")
    tiny.save_model(stopped / "model", "causal-lm", tied=True)
    same = read_record(stopped / "parts").model.fingerprint
    monkeypatch.setattr("trainworks.models.fingerprint", lambda *_, **__: same)
    with pytest.raises(CheckpointError, match="another model"):
        prepared(stopped, "sft", stopped / "parts")


def test_a_number_of_samples_at_once_that_is_asked_for_is_heeded(stopped: Path) -> None:
    assert prepared(stopped, "sft", stopped / "parts").micro == 4
    assert prepared(stopped, "sft", stopped / "parts", micro=2).micro == 2
