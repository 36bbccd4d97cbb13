"""Where the phases of a cleaning run: processes of this machine, Slurm jobs, a Ray cluster; the same steps in each."""

from __future__ import annotations

import inspect
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from trainworks.cleaning import Clean
from trainworks.data.hygiene.stages import Phase, output
from trainworks.data.hygiene.workspace import Workspace, logs_folder
from trainworks.data.workers import Worker, python_path
from trainworks.errors import ConfigError, LaunchError, nearest

__all__ = ["check_installed", "executor"]

Run = Callable[[Phase], None]
"""Do a phase to its end, or raise LaunchError."""

_POLL_SECONDS = 2.0
_GRACE_SECONDS = 60.0
"""How long a finished job's files may take to be seen on a shared disk."""


def check_installed(settings: Clean) -> None:
    """Raise LaunchError for a package that the settings need and that is not there."""
    for name in ("datatrove", "py3langid"):
        if find_spec(name) is None:
            raise LaunchError(
                f"data.clean: {name} is not installed; `pip install 'trainworks[hygiene]'`, or leave it out"
            )
    if settings.executor.type == "ray" and find_spec("ray") is None:
        raise LaunchError("data.clean.executor: ray is not installed; `pip install ray`, or leave out executor")


@contextmanager
def executor(space: Workspace) -> Iterator[Run]:
    """Yield what runs a phase where the settings say."""
    with _KINDS[space.settings.executor.type](space) as run:
        yield run


def _missing(space: Workspace, phase: Phase) -> list[int]:
    return [rank for rank in range(phase.ranks) if not output(space, phase.jobs[-1], rank).exists()]


def _logs(space: Workspace, phase: Phase) -> Path:
    return logs_folder(space.folder) / phase.name


# This machine


@contextmanager
def _local(space: Workspace) -> Iterator[Run]:
    idle: SimpleQueue[Worker] = SimpleQueue()
    workers: list[Worker] = []

    def do(phase: Phase, rank: int) -> None:
        worker = idle.get()
        try:
            _ask(worker, space, phase, rank)
        finally:
            idle.put(worker)

    def run(phase: Phase) -> None:
        missing = _missing(space, phase)
        while len(workers) < min(space.settings.workers, len(missing)):
            workers.append(Worker("trainworks.data.hygiene.steps", str(space.folder.absolute())))
            idle.put(workers[-1])
        with ThreadPoolExecutor(max(1, len(workers))) as threads:
            results = [threads.submit(do, phase, rank) for rank in missing]
            try:
                for result in results:
                    result.result()
            finally:
                for result in results:
                    result.cancel()

    try:
        yield run
    finally:
        for worker in workers:
            worker.close()


def _ask(worker: Worker, space: Workspace, phase: Phase, rank: int) -> None:
    if worker.ask({"jobs": phase.jobs, "ranks": phase.ranks, "rank": rank}) is None:
        raise LaunchError(
            f"the process that cleaned shard {rank} ({phase.name}) ended with code {worker.code()} (-9: killed, as "
            f"when memory runs out); its log is in {_logs(space, phase)}. The same command goes on from there"
        )


# Clusters


@contextmanager
def _slurm(space: Workspace) -> Iterator[Run]:
    from datatrove.executor import SlurmPipelineExecutor

    from trainworks.data.hygiene.steps import steps

    chosen = space.settings.executor.model_dump(exclude={"type"})
    path = f"{shlex.quote(str(Path(sys.executable).parent))}:$PATH"
    options = {
        "workers": space.settings.workers,
        "skip_completed": False,  # the files themselves say what is done
        "env_command": f"export PATH={path} PYTHONPATH={shlex.quote(python_path())}",
        **_checked(SlurmPipelineExecutor, chosen.pop("options")),
        **chosen,
    }

    def run(phase: Phase) -> None:
        if _missing(space, phase):
            made = SlurmPipelineExecutor(
                steps(space.folder, phase),
                tasks=phase.ranks,
                logging_dir=str(_logs(space, phase)),
                job_name=f"clean-{phase.name}",
                **options,
            )
            made.run()
            _await(space, phase, made.job_id)

    yield run


def _await(space: Workspace, phase: Phase, job: Any) -> None:
    """Wait for a phase's files; LaunchError once no job is left that would make them."""
    ended: float | None = None
    while missing := _missing(space, phase):
        if ended is not None and time.monotonic() - ended > _GRACE_SECONDS:
            raise LaunchError(
                f"Slurm job {job} ({phase.name}) is over, and shards {missing[:5]} are not done; its log is in "
                f"{_logs(space, phase)}. The same command goes on from there"
            )
        listed = subprocess.run(
            ["squeue", "--noheader", "--job", str(job)], capture_output=True, text=True, check=False
        )
        ended = None if listed.stdout.strip() else (ended or time.monotonic())
        time.sleep(_POLL_SECONDS)


@contextmanager
def _ray(space: Workspace) -> Iterator[Run]:
    from datatrove.executor import RayPipelineExecutor

    from trainworks.data.hygiene.steps import steps

    options = _checked(RayPipelineExecutor, space.settings.executor.model_dump()["options"])

    def run(phase: Phase) -> None:
        if _missing(space, phase):
            RayPipelineExecutor(
                steps(space.folder, phase),
                tasks=phase.ranks,
                logging_dir=str(_logs(space, phase)),
                **{"workers": space.settings.workers, "skip_completed": False, **options},
            ).run()
        if missing := _missing(space, phase):
            raise LaunchError(f"Ray did not do shards {missing[:5]} of {phase.name}; logs: {_logs(space, phase)}")

    yield run


def _checked(kind: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options that an executor knows; ConfigError for another."""
    ours = {"self", "pipeline", "tasks", "logging_dir", "job_name", "workers", "depends", "skip_completed"}
    known = set(inspect.signature(kind).parameters) - ours
    for name in options:
        if name not in known:
            raise ConfigError(
                f"data.clean.executor.options: {kind.__name__} has no option '{name}' to set{nearest(name, known)}; "
                f"there are {', '.join(sorted(known))}"
            )
    return dict(options)


_KINDS = {"local": _local, "slurm": _slurm, "ray": _ray}
