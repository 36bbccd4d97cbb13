"""A run on several processes from where one is: a notebook, or a script."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from trainworks.config import dump
from trainworks.errors import LaunchError
from trainworks.record import RunRecord, read_outcome, read_record
from trainworks.schema import RunConfig

__all__ = ["run_on"]

_SHOWN = 20
"""Lines of the processes' output that an error quotes."""
_OF_LAUNCHERS = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "TORCHELASTIC_")


def run_on(hardware: str | Path, config: RunConfig[Any], *, processes: int | None = None) -> RunRecord:
    """Train, evaluate and export a run on the processes that a hardware file says, and return its record.

    Everything happens in processes of their own, so that it does not matter what a notebook did with the GPU before;
    what they say is printed as it comes. An interrupt is passed on: the run is saved, and the same call goes on.
    `processes` takes the place of the file's `num_processes`. LaunchError, with the last lines, where the run fails.
    """
    kind = type(config).__module__.partition(".")[0]
    with tempfile.TemporaryDirectory(prefix="trainworks-") as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(dump(config), encoding="utf-8")
        lines = list(_shown([*_command(Path(hardware), processes), "-m", kind, str(path)]))
    outcome = read_outcome(Path(config.output))
    if outcome.code not in (0, 75, 130):
        raise LaunchError("\n".join([f"the run ended with {outcome.code}: {outcome.reason}", *lines[-_SHOWN:]]))
    return read_record(config.output)


def _command(hardware: Path, processes: int | None) -> list[str]:
    """Return the launcher's words: accelerate's, or on the processor, where it starts one process only, torchrun's."""
    settings = yaml.safe_load(hardware.read_text(encoding="utf-8"))
    number = str(processes or settings["num_processes"])
    if settings.get("use_cpu"):
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", number]
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    return [*launcher, "--config_file", str(hardware), "--num_processes", number]


def _shown(command: list[str]) -> Iterator[str]:
    """Print what a command says, line by line, and yield it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_OF_LAUNCHERS)}
    on_cpu = "torch.distributed.run" in command
    with subprocess.Popen(
        command,
        env=environment | ({"ACCELERATE_USE_CPU": "1"} if on_cpu else {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        while line := _next(process):
            print(line, end="", flush=True)
            yield line.rstrip("\n")


def _next(process: subprocess.Popen[str]) -> str:
    """Return the next line; an interrupt meanwhile is passed on, and waited for."""
    assert process.stdout is not None
    while True:
        try:
            return process.stdout.readline()
        except KeyboardInterrupt:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
