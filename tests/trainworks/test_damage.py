"""Whatever happens to a file of a run: it is found out, what is whole is gone on with, and nothing else is lost."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attempts
import pytest
import tiny

import finetune
from trainworks import Every, Run
from trainworks.checkpoint import checkpoints, folder, restore
from trainworks.errors import CheckpointError, ConfigError, ToolkitError
from trainworks.evaluation import compare_with_baselines
from trainworks.output import check_folder
from trainworks.resuming import resume
from trainworks.training import fit

pytestmark = pytest.mark.faults

FLIPS = 1000 if os.environ.get("TRAINWORKS_FAULTS") == "all" else 100
LAST, BEFORE, OLDEST = 8, 6, 4
NAMES = ["manifest.json", "rank-00000-00000.safetensors", "rank-00000.json", "state.json"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that has ended, with its last three checkpoints."""
    inside = tmp_path_factory.mktemp("damage")
    tiny.save_model(inside / "model", "sequence-classification", dropout=0.1)
    tiny.save_rows(inside / "rows.jsonl", "sequence-classification", 60)
    often = Every(log=1, save=2, evaluate=4, keep=3)
    made = finetune.prepare(attempts.settings(inside / "run", every=often, epochs=LAST / 6))
    fit(made)
    assert [checkpoint.step for checkpoint in checkpoints(made.folder)] == [LAST, BEFORE, OLDEST]
    return made


@pytest.fixture
def run(trained: Run, tmp_path: Path) -> Iterator[Run]:
    """The same, whose files are put back at the end."""
    shutil.copytree(trained.folder, tmp_path / "copy")
    record, statistics = trained.record, dict(trained.statistics)
    yield trained
    shutil.rmtree(trained.folder)
    shutil.move(tmp_path / "copy", trained.folder)
    trained.record, trained.statistics = record, statistics


def place(run: Run, step: int = LAST) -> Path:
    return run.folder / "checkpoints" / f"step-{step:08d}"


def assert_set_aside(run: Run, *steps: int, left: int | None) -> None:
    """Restoring sets aside the checkpoints of some steps, says so, and takes another one."""
    run.note(notes=())
    taken = restore(run)
    assert (taken and taken.step) == left
    assert [note for note in run.record.notes if "damaged and set aside" not in note] == []
    assert len(run.record.notes) == len(steps)
    for step, note in zip(steps, run.record.notes, strict=True):
        assert note.startswith(f"Checkpoint step-{step:08d} was damaged and set aside (")
        assert not place(run, step).exists()
        assert place(run, step).with_name(f"damaged-step-{step:08d}").is_dir()


def flipped(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


@contextmanager
def damaged(path: Path, content: bytes) -> Iterator[None]:
    """Have other bytes in a file inside."""
    before = path.read_bytes()
    path.write_bytes(content)
    yield
    path.write_bytes(before)


@pytest.mark.slow
def test_one_flipped_bit_anywhere_is_found(run: Run) -> None:
    rng, aside = random.Random(0), place(run).with_name(f"damaged-step-{LAST:08d}")
    assert sorted(path.name for path in place(run).iterdir() if path.name != "best") == NAMES
    for number in range(FLIPS):
        name = NAMES[number % len(NAMES)]
        before = (place(run) / name).read_bytes()
        (place(run) / name).write_bytes(flipped(before, rng))
        assert_set_aside(run, LAST, left=BEFORE)
        (aside / name).write_bytes(before)
        aside.rename(place(run))
    assert_set_aside(run, left=LAST)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", ["empty", "half", "its end", "one byte more", "gone", "a folder", "a link"])
def test_a_file_that_is_cut_or_gone_is_found(damage: str, name: str, run: Run) -> None:
    path = place(run) / name
    content = path.read_bytes()
    cut = {"empty": b"", "half": content[: len(content) // 2], "its end": content[:-2]}  # a line break alone is none
    path.unlink()
    if damage in cut or damage == "one byte more":
        path.write_bytes(cut.get(damage, content + b"\0"))
    if damage == "a folder":
        path.mkdir()
    if damage == "a link":
        (run.folder / "elsewhere").write_bytes(content)
        path.symlink_to(run.folder / "elsewhere")
    assert_set_aside(run, LAST, left=BEFORE)


def swap(left: Path, right: Path) -> None:
    content = left.read_bytes()
    left.write_bytes(right.read_bytes())
    right.write_bytes(content)


@pytest.mark.parametrize("pair", [(a, b) for a in NAMES for b in NAMES if a < b], ids=" and ".join)
def test_two_files_that_change_places_are_found(pair: tuple[str, str], run: Run) -> None:
    swap(*(place(run) / name for name in pair))
    assert_set_aside(run, LAST, left=BEFORE)


@pytest.mark.parametrize("name", NAMES)
def test_two_files_that_change_checkpoints_are_found(name: str, run: Run) -> None:
    swap(place(run) / name, place(run, BEFORE) / name)
    assert_set_aside(run, LAST, BEFORE, left=OLDEST)


def test_a_checkpoint_that_is_named_for_another_step_is_found(run: Run) -> None:
    place(run, OLDEST).rename(place(run, 12))
    assert_set_aside(run, 12, left=LAST)


def test_a_file_that_is_none_of_its_own_is_found(run: Run) -> None:
    (place(run) / "rank-00001.json").write_text("{}")
    assert_set_aside(run, LAST, left=BEFORE)


def test_where_none_is_whole_the_run_begins_anew(run: Run) -> None:
    for step in (LAST, BEFORE, OLDEST):
        (place(run, step) / "state.json").write_text("{}")
    assert_set_aside(run, LAST, BEFORE, OLDEST, left=None)


def test_one_of_another_format_is_refused_by_name_and_stays(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    files = json.loads((place(run) / "manifest.json").read_text())["files"]
    monkeypatch.setattr(folder, "FORMAT", 1)
    folder.write_manifest(place(run), {name: known["sha256"] for name, known in files.items()})
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"step-00000008: is of checkpoint format 1, and this version reads 2"):
        restore(run)
    assert place(run).is_dir()


def goes_on(run: Run) -> bool:
    """Tell whether a run goes on, or ends with a message; anything else is raised."""
    try:
        check_folder(run.config)
        resume(run)
    except ToolkitError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run.json", "evaluations/untuned.json", "evaluations/step-4.json"])
def test_a_damaged_record_is_a_message_and_nothing_is_lost(name: str, run: Run) -> None:
    rng, path = random.Random(0), run.folder / name
    content, refused = path.read_bytes(), 0
    cut = [b"", content[: len(content) // 2], content[:-3], b"[]", b"null", b"\xff"]
    for changed in cut + [flipped(content, rng) for _ in range(FLIPS // 4)]:
        with damaged(path, changed):
            refused += not goes_on(run)
    assert refused >= len(cut)
    assert goes_on(run)
    assert run.progress.step == LAST


@pytest.mark.slow
def test_a_damaged_log_loses_no_point_of_the_curve(run: Run) -> None:
    rng, path, whole = random.Random(0), run.folder / "metrics.jsonl", run.record.curve
    content = path.read_bytes()
    cut = [b"", content[: len(content) // 2], content[:-3], b"[]\n", b"null\n", b"\xff"]
    for changed in cut + [flipped(content, rng) for _ in range(FLIPS // 4)]:
        with damaged(path, changed):
            assert goes_on(run)
            assert run.record.curve == whole


def test_a_log_makes_up_for_what_the_record_lacks(run: Run) -> None:
    whole = run.record.curve
    run.record.model_copy(update={"curve": whole[:3]}).write(run.folder)
    assert goes_on(run)
    assert run.record.curve == whole


def test_a_lost_evaluation_is_noted_and_not_compared_with(run: Run) -> None:
    (run.folder / "evaluations" / "untuned.json").unlink()
    run.statistics.clear()
    assert goes_on(run)
    assert any("untuned.json of evaluations was lost" in note for note in run.record.notes)
    assert {comparison.baseline for comparison in compare_with_baselines(run)} == {"majority class"}


def test_a_lost_record_is_a_message(run: Run) -> None:
    (run.folder / "run.json").unlink()
    with pytest.raises(ConfigError, match="not a run's"):
        check_folder(run.config)
