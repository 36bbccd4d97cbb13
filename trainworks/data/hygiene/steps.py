"""Our jobs as datatrove's pipeline steps, and the process in which they run on this machine.

python -m trainworks.data.hygiene.steps FOLDER      reads `{"jobs": [...], "ranks": N, "rank": R}` line by line
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from trainworks.data.hygiene.plan import open_workspace
from trainworks.data.hygiene.stages import Phase, perform
from trainworks.data.hygiene.workspace import logs_folder
from trainworks.data.workers import requests

__all__ = ["JobStep", "steps"]


class JobStep(PipelineStep):  # type: ignore[misc]
    """One job of a cleaning; it reads and writes the cleaning's folder, so nothing passes from step to step."""

    type = "trainworks"

    def __init__(self, folder: str, job: str) -> None:
        self.name = job  # before datatrove names its statistics by it
        super().__init__()
        self.folder = folder

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Do the job for this rank."""
        with self.track_time():
            perform(open_workspace(Path(self.folder)), self.name, rank)


def steps(folder: Path, phase: Phase) -> list[JobStep]:
    """Return a phase as the pipeline of an executor."""
    return [JobStep(str(folder.absolute()), job) for job in phase.jobs]


class _Worker(LocalPipelineExecutor):  # type: ignore[misc]
    """datatrove's local executor for the ranks that its caller names.

    Its own `run` (datatrove 0.10) starts a manager process that outlives a killed caller, and imports the caller's
    script again.
    """

    def do(self, rank: int) -> None:
        """Run the pipeline for a rank; its log goes to a file, errors to stderr as well."""
        self._run_for_rank(rank, local_rank=1)


def _work(folder: Path) -> None:
    for asked, answer in requests():
        phase = Phase(tuple(asked["jobs"]), asked["ranks"])
        logs = str(logs_folder(folder) / phase.name)
        _Worker(steps(folder, phase), tasks=phase.ranks, logging_dir=logs, skip_completed=False).do(asked["rank"])
        answer(asked["rank"])


if __name__ == "__main__":
    _work(Path(sys.argv[1]))
