"""Random histories of saves, kills, damage and resumes: the best and the last checkpoint are always there and whole."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainworks import record
from trainworks.checkpoint import Checkpoint, Saver, checkpoints, folder, restore, restoring, saving, verify
from trainworks.fail_points import FAIL_POINTS
from trainworks.parallel.launch import World
from trainworks.record import file_sha256
from trainworks.run import Progress
from trainworks.schema import Every, Faults, Speed

pytestmark = pytest.mark.faults

ONE_RANK: Any = SimpleNamespace(num_processes=1, process_index=0, is_main_process=True)

HISTORIES, ACTS = (500 if os.environ.get("TRAINWORKS_FAULTS") == "all" else 100), 20


class Killed(BaseException):
    """What a SIGKILL leaves on the disk."""


@dataclass
class Snapshot:
    """One small file."""

    step: int
    num_bytes: int = 100

    @property
    def state(self) -> dict[str, Any]:
        return {"progress": {"step": self.step}}

    def write(self, staged: Path) -> dict[str, str]:
        path = staged / "rank-00000-00000.safetensors"
        path.write_bytes(self.step.to_bytes(8, "little"))
        saving.reached("save.part")
        return {path.name: file_sha256(path)}


class Run(SimpleNamespace):
    """What saving and restoring ask of a run."""

    def note(self, **facts: Any) -> None:
        self.record = SimpleNamespace(**facts)


def made(place: Path, keep: int) -> Any:
    config = SimpleNamespace(every=Every(keep=keep), speed=Speed(), faults=Faults())
    record = SimpleNamespace(notes=())
    return Run(folder=place, config=config, world=World(ONE_RANK), progress=Progress(), record=record, optimizer=None)


@dataclass
class History:
    """A run, what happens to it, and what must be in its folder."""

    run: Any
    rng: random.Random
    fail: Callable[[str, int], None]
    """Have the next save be killed when it gets to a point so many times."""
    last: int = 0
    best: int = 0
    """The step of the best that was saved; 0 while there is none."""
    scores: dict[int, float] = field(default_factory=dict)
    pinned: set[int] = field(default_factory=set)
    damaged: set[int] = field(default_factory=set)

    @property
    def steps(self) -> list[int]:
        return [checkpoint.step for checkpoint in checkpoints(self.run.folder)]

    def path(self, step: int) -> Path:
        return Path(self.run.folder / "checkpoints" / f"step-{step:08d}")

    def save(self) -> None:
        """Train for some steps and save; not for one, when the run is stopped right after a save."""
        self.run.progress.step += self.rng.choice([0, 1, 1, 2, 3] if self.last else [1, 2])
        self.write(best=self.evaluate())
        newest = self.steps[: self.run.config.every.keep]
        assert set(self.steps) <= {*newest, self.best, *self.pinned}
        marked = [checkpoint.step for checkpoint in checkpoints(self.run.folder) if checkpoint.is_best]
        assert marked == [step for step in [self.best] if step]

    def write(self, *, best: bool) -> None:
        with Saver(self.run) as saver:
            saver.save(best=best)
        self.last = self.run.progress.step
        self.damaged.discard(self.last)
        if best:
            self.best = self.last

    def evaluate(self) -> bool:
        """Measure the model every other time, and tell whether it is the best so far."""
        if self.rng.random() < 0.5:
            return False
        score = self.rng.random()
        best = all(score > earlier for step, earlier in self.scores.items() if step != self.run.progress.step)
        self.scores[self.run.progress.step] = score
        return best and self.best != self.run.progress.step

    def be_killed(self) -> None:
        """Be killed somewhere in a save, and go on."""
        self.run.progress.step += self.rng.randint(1, 3)
        best = self.evaluate()
        self.fail(self.rng.choice(FAIL_POINTS), self.rng.randint(1, 2))
        try:
            self.write(best=best)
        except Killed:
            if self.run.progress.step in self.steps:  # the new one has got its place
                self.last = self.run.progress.step
                self.best = self.last if best else self.best
        self.fail("", 0)
        self.assert_kept()
        self.resume()

    def pin(self) -> None:
        if self.steps:
            step = self.rng.choice(self.steps)
            (self.path(step) / "pin").touch()
            self.pinned.add(step)

    def be_damaged(self) -> None:
        """Have a bit flipped in one of the checkpoints, mostly the last, and go on."""
        if self.steps:
            step = self.rng.choice([*self.steps, self.last, self.last])
            path = self.path(step) / self.rng.choice(["state.json", "manifest.json", "rank-00000-00000.safetensors"])
            content = bytearray(path.read_bytes())
            content[self.rng.randrange(len(content) - 1)] ^= 16
            path.write_bytes(content)
            self.damaged.add(step)
        self.resume()

    def resume(self) -> None:
        """Start again, as after a kill."""
        whole = [step for step in self.steps if step not in self.damaged]
        self.last = whole[0] if whole else 0
        gone = {step for step in self.steps if step > self.last}
        if self.best in gone:  # the best before it counts again where a kill had left it its mark
            marked = [checkpoint.step for checkpoint in checkpoints(self.run.folder) if checkpoint.is_best]
            self.best = max((step for step in marked if step <= self.last), default=0)
        self.pinned, self.damaged = self.pinned - gone, self.damaged - gone
        self.run.progress.step = 0
        taken = restore(self.run)
        assert (taken.step if taken else 0) == self.last == self.run.progress.step
        self.scores = {step: score for step, score in self.scores.items() if step <= self.last}

    def assert_kept(self) -> None:
        wanted = {step for step in (self.last, self.best) if step} | self.pinned
        assert wanted <= set(self.steps)
        for step in wanted - self.damaged:
            verify(Checkpoint(self.path(step)))
        assert not self.best or Checkpoint(self.path(self.best)).is_best


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Let saves be made of small files, not seen on the disk itself, and be killed where that is asked for."""
    asked: dict[str, int] = {}

    def reached(name: str) -> None:
        if name in asked:
            asked[name] -= 1
            if not asked[name]:
                raise Killed

    def fail(name: str, time: int) -> None:
        asked.clear()
        asked[name] = time

    for module in (folder, record, saving):
        monkeypatch.setattr(module, "reached", reached)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(saving, "snapshot", lambda run: Snapshot(run.progress.step))
    monkeypatch.setattr(restoring, "_load", lambda run, found: setattr(run, "progress", Progress(step=found.step)))
    return fail


@pytest.mark.parametrize("keep", [1, 2, 3, 4])
def test_best_last_and_pinned_are_always_there_and_whole(
    keep: int, fail: Callable[[str, int], None], tmp_path: Path
) -> None:
    kills = 0
    for number in range(HISTORIES // 4):
        history = History(made(tmp_path / str(number), keep), random.Random(number * 4 + keep), fail)
        acts = history.rng.choices(
            [history.save, history.be_killed, history.pin, history.be_damaged, history.resume],
            weights=[8, 4, 1, 1, 1],
            k=ACTS,
        )
        for act in acts:
            act()
            history.assert_kept()
            kills += act == history.be_killed
        history.save()
        assert not list(history.run.folder.rglob(".*"))
    assert kills > HISTORIES // 2
