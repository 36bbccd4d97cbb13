"""The save protocol: stage, write, see it on the disk, checksum, rename, mark the best, and only then prune."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from trainworks.checkpoint.folder import Checkpoint, checkpoints, mark_best, prune, sweep, write_manifest
from trainworks.checkpoint.snapshot import HostCopies, Snapshot, expected_bytes, snapshot
from trainworks.errors import CheckpointError
from trainworks.fail_points import reached
from trainworks.full_disk import amount, room
from trainworks.parallel.launch import Problem
from trainworks.record import file_sha256, sync, write_json
from trainworks.run import Run

__all__ = ["Saver", "save"]

T = TypeVar("T")


def save(run: Run, *, best: bool = False) -> Checkpoint:
    """Write a checkpoint of `run` as it stands between two steps, then prune old ones. All ranks.

    A crash at any moment leaves every earlier checkpoint as it was; so does a CheckpointError, which says why it could
    not be written.
    """
    with Saver(run, background=False) as saver:
        saver.save(best=best)
    return Checkpoint(_path(run.folder, run.progress.step))


class _SaveError(Exception):
    """Some rank could not do its part; all ranks raise it alike."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem


class Saver:
    """Write the checkpoints of a run; with `speed.background_saving`, while training goes on. All ranks make one and
    enter it; what is still being written when it is left is waited for."""

    def __init__(self, run: Run, *, background: bool | None = None) -> None:
        self.run = run
        background = run.config.speed.background_saving if background is None else background
        self._copies = HostCopies(run.optimizer) if background else None
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="saving")
        self._writing: Future[Problem | None] | None = None

    def __enter__(self) -> Self:
        self._alone(lambda: sweep(self.run.folder))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.finish()
        finally:
            self._threads.shutdown(wait=error is None)

    def check_room(self) -> None:
        """See that the disk has room for all the checkpoints that will be there at once; like a save that finds it
        full. All ranks, before the first step."""
        config, folder = self.run.config, self.run.folder
        once = (
            1
            if config.every.save == "end"
            else min(config.every.keep, self.run.plan.num_steps // config.every.save) + 1
        )
        once += config.every.evaluate != "end"
        each = sum(self._gather(expected_bytes(self.run)))

        def check() -> None:
            there = sum(old.size() for old in checkpoints(folder) if not old.is_pinned)
            _check_room(
                folder, once * each - there, f"{once} checkpoints of {amount(each)} at once, as `every` asks for"
            )

        self._alone(check)

    def save(self, *, best: bool = False) -> str | None:
        """Save the run as it stands, after what was still being written.

        Returns what kept a checkpoint from being written, where the disk is full and the run is to go on all the same
        (`faults.full_disk`); of one that is written in the background, the next call says so. CheckpointError
        otherwise.
        """
        problem = self.finish()
        taken = snapshot(self.run)
        final = _path(self.run.folder, taken.step)
        if self._gather(final.exists())[0]:  # a stop right after a save; as the main process sees it
            return self._alone(lambda: self._finish_old(final, best)) or problem
        if self._copies is None:
            return self._settled(self._write(taken, best)) or problem
        self._writing = self._threads.submit(self._write, self._copies.of(taken), best)
        return problem

    @property
    def is_done(self) -> bool:
        """Whether nothing is being written."""
        return self._writing is None or self._writing.done()

    def finish(self) -> str | None:
        """Wait for what is being written; like `save`."""
        if self._writing is None:
            return None
        written, self._writing = self._writing, None
        return self._settled(written.result())

    def _settled(self, problem: Problem | None) -> str | None:
        if problem is None:
            return None
        text = f"saving failed: {problem.text}. Earlier checkpoints are as they were"
        if not (problem.disk_is_full and self.run.config.faults.full_disk == "go_on"):
            raise CheckpointError(text)
        self.run.note(notes=(*self.run.record.notes, text))
        return text

    def _write(self, taken: Snapshot, best: bool) -> Problem | None:
        if self._copies is not None:
            self._copies.wait()
        final = _path(self.run.folder, taken.step)
        staged = final.with_name(f".{final.name}.staged")
        try:
            needed = sum(self._gather(taken.num_bytes))
            self._together(lambda: _stage(staged, needed), main_only=True)
            digests: dict[str, str] = {}
            self._together(lambda: digests.update(taken.write(staged)))
            everyones = {name: value for part in self._gather(digests) for name, value in part.items()}
            self._together(lambda: _publish(staged, final, taken.state, everyones, best=best), main_only=True)
            self._together(self._prune, main_only=True)
        except _SaveError as failure:
            if self.run.world.is_main:
                shutil.rmtree(staged, ignore_errors=True)
            return _with_numbers(failure.problem, self.run.folder, needed)
        return None

    def _finish_old(self, final: Path, best: bool) -> None:
        if best:
            mark_best(final)
        self._prune()

    def _prune(self) -> None:
        prune(self.run.folder, keep=self.run.config.every.keep)
        reached("save.pruned")

    def _alone(self, act: Callable[[], object]) -> str | None:
        """Let the main process act; like `save`. All ranks."""
        try:
            self._together(act, main_only=True)
        except _SaveError as failure:
            return self._settled(failure.problem)
        return None

    def _gather(self, value: T) -> list[T]:
        return self.run.world.gather(value, self.run.world.beside)

    def _together(self, act: Callable[[], object], *, main_only: bool = False) -> None:
        """Act on every rank, or on the main one for all; `_SaveError` on all of them when any could not."""
        if problem := self.run.world.agree(act, main_only=main_only, group=self.run.world.beside):
            raise _SaveError(problem)


def _path(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:08d}"


def _stage(staged: Path, needed: int) -> None:
    reached("save.begun")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    if needed > shutil.disk_usage(staged).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(staged))
    reached("save.staged")


def _publish(staged: Path, final: Path, state: dict[str, Any], digests: dict[str, str], *, best: bool) -> None:
    write_json(staged / "state.json", state)
    reached("save.state")
    write_manifest(staged, digests | {"state.json": file_sha256(staged / "state.json")})
    reached("save.manifest")
    if best:  # before it has its name: a crash in between would leave the best one unknown
        mark_best(staged)
    sync(staged)
    os.replace(staged, final)
    sync(final.parent)
    sync(final.parent.parent)
    reached("save.renamed")


def _check_room(folder: Path, needed: int, what: str) -> None:
    """Raise the error of a full disk, with its numbers, when fewer than `needed` bytes are free where `folder` lies."""
    if needed > shutil.disk_usage(folder).free:
        raise OSError(errno.ENOSPC, f"{folder} has {room(folder)} free, and {what} take {amount(needed)} more")


def _with_numbers(problem: Problem, folder: Path, needed: int) -> Problem:
    if not problem.disk_is_full:
        return problem
    return replace(
        problem, text=f"{folder} has {room(folder)} free, and the checkpoint takes {amount(needed)} ({problem.text})"
    )
