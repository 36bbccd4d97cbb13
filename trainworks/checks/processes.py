"""The processes that a check starts: a module on one rank or several, run to its end or killed on the way."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from trainworks.data.workers import python_path
from trainworks.errors import CheckError, ConfigError, LaunchError

__all__ = ["Started", "check_ranks", "on_gpu", "stage"]

_LOOK_SECONDS = 0.0005
_TAIL_LINES = 15


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Say what is run while it runs, and then how long it took."""
    print(f"{name} ...", end="", file=sys.stderr, flush=True)
    begun = time.monotonic()
    try:
        yield
    except BaseException:
        print(file=sys.stderr)
        raise
    print(f" {time.monotonic() - begun:.1f} s", file=sys.stderr, flush=True)


def on_gpu() -> bool:
    """Tell whether the processes will compute on GPUs; none is touched."""
    import torch

    asked_for_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return torch.cuda.is_available() and not asked_for_cpu


def check_ranks(ranks: int) -> None:
    """Raise LaunchError when there are fewer GPUs than processes; a CPU takes any number."""
    import torch

    if on_gpu() and ranks > torch.cuda.device_count():
        raise LaunchError(
            f"--ranks {ranks}: each process takes a GPU, and there are {torch.cuda.device_count()}; ask for fewer, or "
            "set ACCELERATE_USE_CPU=1"
        )


class Started:
    """A module running on `ranks` processes, in the way a user would start it; its output goes to the end of `log`.

    Leaving the block kills what still runs.
    """

    def __init__(self, module: str, *arguments: str, ranks: int, log: Path) -> None:
        self._log = log
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
        on_cpu = {} if ranks == 1 or on_gpu() else {"ACCELERATE_USE_CPU": "1"}
        with log.open("ab") as file:
            self._process = psutil.Popen(
                [sys.executable, *launcher, "-m", module, *arguments],
                env=os.environ | on_cpu | {"PYTHONPATH": python_path()},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self.kill()

    def finish(self) -> None:
        """Wait for its end; CheckError (ConfigError for what a run file can mend) with its last lines when it fails."""
        code = self._process.wait()
        if code:
            lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            kind = ConfigError if code == ConfigError.exit_code else CheckError
            raise kind(f"a process ended with {code}; its last lines:\n  " + "\n  ".join(lines[-_TAIL_LINES:]))

    def kill_when(self, seen: Callable[[], bool]) -> bool:
        """Kill it, by SIGKILL, the moment that `seen` holds, and tell whether it came to that: it may end first."""
        while self._process.poll() is None:
            if seen():
                self.kill()
                return True
            time.sleep(_LOOK_SECONDS)
        self.finish()
        return False

    def kill(self) -> None:
        """Kill all its processes by SIGKILL, and wait until they are gone."""
        with suppress(psutil.NoSuchProcess):
            self._process.suspend()  # a launcher must not see its children die, nor start others
        children = self._process.children(recursive=True)
        for process in (*children, self._process):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        while any(map(_alive, children)):
            time.sleep(_LOOK_SECONDS)


def _alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)  # nobody may be there to bury an orphan
    except psutil.NoSuchProcess:
        return False
