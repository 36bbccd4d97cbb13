"""A run on several processes from a notebook: what they say is shown, an interrupt saves, a failure says why."""

from __future__ import annotations

import _thread
import threading
import time
from pathlib import Path

import pytest
import tiny

import finetune
from trainworks import Budget, run_on
from trainworks.config import load
from trainworks.errors import LaunchError

CPU = Path(__file__).parents[2] / "configs" / "accelerate" / "cpu.yaml"

pytestmark = pytest.mark.slow


def saved_run(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: object) -> finetune.Config:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    return load(tiny.save_run(folder, output=str(folder / "run"), **changes), model=finetune.Config)


def test_it_runs_on_as_many_processes_and_shows_what_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = saved_run(tmp_path, monkeypatch, budget={"steps": 3})
    record = run_on(CPU, config, processes=2)
    assert (record.status, record.environment.world_size) == ("complete", 2)
    said = capsys.readouterr().out
    assert said.count("step") >= 3
    assert "machine  2 x" in said


def test_an_interrupt_saves_and_the_same_call_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = saved_run(tmp_path, monkeypatch, budget={"steps": 400}, every={"log": 1, "save": 1000})

    def interrupt() -> None:
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            time.sleep(0.05)
        _thread.interrupt_main()

    threading.Thread(target=interrupt, daemon=True).start()
    record = run_on(CPU, config, processes=1)
    assert record.status == "interrupted"
    assert 0 < record.step < 400
    longer = {"accept": ("budget",), "budget": Budget(steps=record.step + 2)}
    assert run_on(CPU, config.model_copy(update=longer), processes=1).status == "complete"


def test_a_run_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = saved_run(tmp_path, monkeypatch, budget={"steps": 3}, data={"source": "nowhere.jsonl"})
    with pytest.raises(LaunchError, match="ended with 2"):
        run_on(CPU, config, processes=1)
