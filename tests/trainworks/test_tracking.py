"""What is seen of a run: lines, the curve on disk, trackers."""

from __future__ import annotations

import io
import json
import os
import socket
import sqlite3
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from accelerate.utils import is_tensorboard_available, is_trackio_available

import finetune
from trainworks import Run, tracking
from trainworks.errors import LaunchError
from trainworks.tracking import Log, check_trackers, read_curve


def prepared(folder: Path, **changes: Any) -> Run:
    model, data = tiny.save_model(folder / "model", "sft"), tiny.save_rows(folder / "rows.jsonl", "sft", 40)
    return finetune.prepare(tiny.config("sft", model, data, folder / "run", **changes))


@pytest.fixture
def quiet_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the test a home of its own, and refuse it the network."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TRACKIO_DIR", "")
    monkeypatch.delenv("TRACKIO_DIR")  # set first, so that what the test sets is undone

    def refuse(_: socket.socket, address: Any) -> None:
        raise AssertionError(f"connects to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return home


def test_a_piped_run_says_each_logged_step_and_report_on_a_line_of_its_own(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = prepared(tmp_path)
    capfd.readouterr()
    record = finetune.fit(run)
    out, err = capfd.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert [line.split("  ")[0] for line in lines[1:-1]] == [
        f"step {n}/{record.step}" for n in range(1, 1 + record.step)
    ]
    assert lines[0].startswith("untuned on validation (n=8): loss ")
    assert lines[-1].startswith("final on validation (n=8): loss ")
    assert not set(err) & set("\r█|#") - {"|"}
    assert "it/s" not in err


def test_a_terminal_gets_a_bar_with_reports_above_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    run, terminal = prepared(tmp_path), Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    record = finetune.fit(run)
    shown = terminal.getvalue()
    assert f"{record.step}/{record.step}" in shown
    assert f"loss={record.curve[-1].loss:.4f}" in shown
    assert f"step {record.step}/" not in shown
    assert shown.count("untuned on validation") == shown.count("final on validation") == 1


def test_metrics_jsonl_holds_every_logged_step_and_report(tmp_path: Path) -> None:
    run = prepared(tmp_path)
    record = finetune.fit(run)
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    kinds = [line["kind"] for line in lines]
    assert kinds == ["EvalReport", *["CurvePoint"] * record.step, "EvalReport"]
    assert read_curve(run.folder, until=record.step) == record.curve
    assert read_curve(run.folder, until=2) == record.curve[:2]


def test_a_broken_last_line_is_stepped_over_and_the_newest_line_of_a_step_counts(tmp_path: Path) -> None:
    point = {"step": 1, "samples": 8, "tokens": 90, "loss": 5.0, "lr": 0.1, "grad_norm": 1.0, "seconds": 0.5}
    lines = [{"kind": "CurvePoint"} | point, {"kind": "CurvePoint"} | point | {"loss": 4.0}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"kind": "CurvePoint", "step": 2, "sam')
    assert [(found.step, found.loss) for found in read_curve(tmp_path, until=9)] == [(1, 4.0)]


def test_a_folder_without_a_log_has_an_empty_curve(tmp_path: Path) -> None:
    assert read_curve(tmp_path, until=9) == ()


def test_a_line_after_a_broken_one_is_not_lost(tmp_path: Path) -> None:
    run = prepared(tmp_path)
    path = run.folder / "metrics.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text('{"kind": "CurvePoint", "step": 2, "sam')
    record = finetune.fit(run)
    assert read_curve(run.folder, until=record.step) == record.curve
    kinds = [json.loads(line)["kind"] for line in path.read_text().splitlines()[1:]]
    assert kinds.count("EvalReport") == 2


def test_a_tracker_that_is_not_installed_is_an_error_with_the_line_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda _: None)
    with pytest.raises(LaunchError, match=r"pip install 'trainworks\[trackio\]'"):
        check_trackers(["trackio"])
    check_trackers([])


def test_trackers_write_under_the_run_and_nowhere_else(tmp_path: Path, quiet_home: Path) -> None:
    assert is_tensorboard_available()
    assert is_trackio_available()
    run = prepared(tmp_path, trackers=("tensorboard", "trackio"))
    record = finetune.fit(run)
    import trackio  # not before: it reads its folder when it is imported

    trackio.finish()
    trackers = run.folder / "trackers"
    assert list(trackers.rglob("events.out.tfevents.*"))
    with sqlite3.connect(trackers / "trackio" / "trainworks.db") as database:
        logged = [json.loads(row[0]) for row in database.execute("select metrics from metrics order by step")]
    database.close()
    assert [row["loss"] for row in logged if "loss" in row] == pytest.approx([p.loss for p in record.curve])
    assert not list(quiet_home.rglob("*"))
    assert not (Path(os.environ["HF_HOME"]) / "trackio").exists()


def test_the_process_group_outlives_the_trackers(
    tmp_path: Path, quiet_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepared(tmp_path, trackers=("tensorboard",))
    monkeypatch.setattr(run.world.accelerator, "end_training", lambda: pytest.fail("export still needs the group"))
    with Log(run):
        assert len(run.world.accelerator.trackers) == 1
    assert run.world.accelerator.trackers == []
