"""A disk that gets full, at any size and at any file: a message with the numbers, nothing half done, and a way on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attempts
import pytest
from attempts import INTERVAL, STEPS, Place
from forking import Nursery

import finetune
from trainworks import Faults, Speed, fail_points, read_record, train_steps
from trainworks.checkpoint import checkpoints, save, saving, snapshot, verify
from trainworks.errors import CheckpointError
from trainworks.tracking import Log
from trainworks.training import fit

pytestmark = [pytest.mark.faults, pytest.mark.slow]

FULL = os.environ.get("TRAINWORKS_FAULTS") == "all"
FILLED, ROOM_AGAIN = 6, 9
"""The steps at which the disk gets full, and empty again where the run goes on."""
DISK = 2**26
PAGE = 4096
FREE = (0, PAGE, 3 * PAGE, 7 * PAGE, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99)
"""Room that is left: bytes, or a share of what a checkpoint takes."""
POINTS = ("metrics.written", "file.staged", *fail_points.FAIL_POINTS[4:9])
"""Where the disk is said to be full on a machine that lets no test mount one."""
CASES = [
    (free, policy, background, checked)
    for number, free in enumerate(FREE)
    for policy in ("stop", "go_on")
    for background in (False, True)
    for checked in (True, False)
    if FULL or (background == (number % 2 == 1) and checked == (number % 4 < 2))
]


def may_mount(folder: Path) -> bool:
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", str(folder)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def mounts(tmp_path_factory: pytest.TempPathFactory) -> bool:
    return may_mount(tmp_path_factory.mktemp("mount"))


@pytest.fixture(scope="module")
def place(mounts: bool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with Nursery(["unshare", "-rm"] if mounts else []) as nursery:
        yield Place.made(tmp_path_factory.mktemp("full"), nursery)


@pytest.fixture(scope="module")
def whole(place: Place) -> dict[str, Any]:
    """What an undisturbed run ends with."""
    place.finish("whole")
    result: dict[str, Any] = json.loads((place.folder / "whole.json").read_text())
    return result


# In the child


class Disk:
    """A disk of its own for a run, that can be filled; without the right to mount one, errors that say it is full."""

    def __init__(self, place: Path, mounted: bool, size: int = DISK) -> None:
        self.folder, self.mounted = place / f"disk-{os.getpid()}", mounted
        self.folder.mkdir()
        if mounted:
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(self.folder)], check=True)
        shutil.copytree(place / "model", self.folder / "model")
        shutil.copy(place / "rows.jsonl", self.folder)

    def fill(self, free: int, number: int) -> None:
        if not self.mounted:
            os.environ["TRAINWORKS_FAIL_AT"] = f"{POINTS[number % len(POINTS)]}=full"
            return
        with (self.folder / "filler").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(PAGE, shutil.disk_usage(self.folder).free - free))

    def empty(self) -> None:
        os.environ.pop("TRAINWORKS_FAIL_AT", None)
        (self.folder / "filler").unlink(missing_ok=True)


def run_on_it(
    place: str, mounted: bool, free: float, policy: str, background: bool, checked: bool, result: str
) -> None:
    """Train on a disk that gets full, before a save looks at the room there is or just after, and say how it went."""
    disk = Disk(Path(place), mounted)
    faults, speed = Faults(full_disk=policy), Speed(background_saving=background)
    run = finetune.prepare(attempts.settings(disk.folder / "run", faults=faults, speed=speed))
    honest_log, honest_point, filled = Log.step, saving.reached, []

    def fill() -> None:
        if run.progress.step >= FILLED and not filled:
            filled.append(True)
            size = free if isinstance(free, int) else int(free * snapshot.snapshot(run).num_bytes)
            disk.fill(size, FREE.index(free))

    def log(self: Log, step: Any) -> None:
        if checked:
            fill()
        if step.number == ROOM_AGAIN:
            disk.empty()
        honest_log(self, step)

    def point(name: str) -> None:
        if name == "save.staged" and not checked:
            fill()
        honest_point(name)

    Log.step, saving.reached = log, point
    said: dict[str, Any] = {"message": None}
    try:
        fit(run)
    except CheckpointError as error:
        said["message"] = str(error)
    said["half done"] = [str(path) for path in run.folder.rglob(".*")]
    said["kept"] = [checkpoint.step for checkpoint in checkpoints(run.folder)]
    for checkpoint in checkpoints(run.folder):
        verify(checkpoint)
    disk.empty()
    Log.step, saving.reached = honest_log, honest_point
    if said["message"]:
        run = finetune.prepare(run.config)
        said["resumed"] = run.progress.step
        fit(run)
    said |= {"notes": run.record.notes, "weights": attempts.weights(run), "folder": str(run.folder)}
    said |= {"curve": [point.step for point in read_record(run.folder).curve]}
    said["last"] = next(checkpoint.step for checkpoint in checkpoints(run.folder))
    Path(result).write_text(json.dumps(said))


def start_on_a_small_one(place: str, mounted: bool, policy: str, result: str) -> None:
    """Begin a run on a disk that is too small for its checkpoints, and say how it went."""
    disk = Disk(Path(place), mounted, size=2**21)
    if not mounted:
        saving.shutil.disk_usage = lambda folder: shutil._ntuple_diskusage(2**20, 0, 2**20)  # type: ignore[attr-defined]
    run = finetune.prepare(attempts.settings(disk.folder / "run", faults=Faults(full_disk=policy)))
    said: dict[str, Any] = {"message": None, "folder": str(run.folder)}
    try:
        fit(run)
    except CheckpointError as error:
        said["message"] = str(error)
    said |= {"notes": run.record.notes, "steps": run.progress.step, "weights": attempts.weights(run)}
    Path(result).write_text(json.dumps(said))


# In the test


def told(place: Place, function: str, mounts: bool, **arguments: Any) -> dict[str, Any]:
    result = place.folder / "said.json"
    result.unlink(missing_ok=True)
    given = {"place": str(place.folder), "mounted": mounts, "result": str(result)} | arguments
    place.nursery.run(f"{__file__}:{function}", given, environment={"TRAINWORKS_CACHE": str(place.folder / "cache")})
    said: dict[str, Any] = json.loads(result.read_text())
    return said


def assert_clear(message: str, folder: str) -> None:
    """A message names the folder and how much is free there."""
    assert f"{folder} has " in message, message
    assert " free" in message, message


@pytest.mark.parametrize(("free", "policy", "background", "checked"), CASES)
def test_a_disk_that_gets_full_costs_no_checkpoint_and_no_weight(
    free: float, policy: str, background: bool, checked: bool, place: Place, mounts: bool, whole: dict[str, Any]
) -> None:
    said = told(place, "run_on_it", mounts, free=free, policy=policy, background=background, checked=checked)
    assert said["half done"] == []
    assert said["weights"] == whole["weights"]
    assert said["last"] == STEPS
    if policy == "stop":
        assert_clear(said["message"], said["folder"])
        assert max(said["kept"]) == said["resumed"] >= FILLED - INTERVAL  # almost enough room may be enough
        assert said["curve"] == list(range(1, STEPS + 1))
    else:
        assert said["message"] is None
        for note in said["notes"]:
            assert "The disk was full at times" in note or f"{said['folder']} has " in note
        assert said["notes"]
        assert said["kept"][0] == STEPS


@pytest.mark.parametrize("policy", ["stop", "go_on"])
def test_a_disk_too_small_for_all_checkpoints_is_known_before_the_first_step(
    policy: str, place: Place, mounts: bool, whole: dict[str, Any]
) -> None:
    said = told(place, "start_on_a_small_one", mounts, policy=policy)
    text = said["message"] if policy == "stop" else said["notes"][0]
    assert_clear(text, said["folder"])
    assert "4 checkpoints of" in text
    if policy == "stop":
        assert said["steps"] == 0
    else:
        assert (said["steps"], said["weights"]) == (STEPS, whole["weights"])


FILES = ["metrics.written:6"] + [f"file.staged:{time}" for time in ((1, 2, 3, 4, 6, 8, 9, 10) if FULL else (1, 4, 9))]
FILES += [
    f"{name}:2" for name in ("save.staged", "save.part", "save.rank", "save.state", "save.manifest", "save.marked")
]


@pytest.mark.parametrize("background", [False, True] if FULL else [False])
@pytest.mark.parametrize("point", FILES)
def test_a_disk_that_is_full_at_one_file_stops_with_a_message_and_the_same_command_goes_on(
    point: str, background: bool, place: Place, whole: dict[str, Any]
) -> None:
    name = f"stop-{point}-{background}".replace(".", "-")
    child = place.start(name, {"TRAINWORKS_FAIL_AT": f"{point}=full"}, background=background)
    assert child.wait() == [1]
    message = child.tail().strip().splitlines()[-1]
    assert message.startswith("trainworks.errors.CheckpointError: "), child.tail()
    assert_clear(message, str(place.folder / name))
    assert list((place.folder / name).rglob(".*")) == []
    place.finish(name, background=background)
    place.assert_same(name, "whole")


@pytest.mark.parametrize("background", [False, True] if FULL else [True])
@pytest.mark.parametrize("point", [point for point in FILES if point != "file.staged:1"])  # no run without a record
def test_a_disk_that_is_full_at_one_file_is_outlasted_where_that_is_asked_for(
    point: str, background: bool, place: Place, whole: dict[str, Any]
) -> None:
    name = f"go-on-{point}-{background}".replace(".", "-")
    environment = {"TRAINWORKS_FAIL_AT": f"{point}=full"}
    child = place.start(name, environment, background=background, full_disk="go_on")
    assert child.wait() == [0], child.tail()
    assert json.loads((place.folder / f"{name}.json").read_text()) == whole
    assert read_record(place.folder / name).notes


def test_what_a_checkpoint_will_take_is_known_before_the_first_step(place: Place) -> None:
    run = finetune.prepare(attempts.settings(place.folder / "expected"))
    expected = snapshot.expected_bytes(run)
    next(train_steps(run))
    save(run)
    (checkpoint,) = checkpoints(run.folder)
    assert checkpoint.size() <= expected <= checkpoint.size() + 2**16
    assert expected == pytest.approx(snapshot.expected_bytes(run), rel=0.01)
