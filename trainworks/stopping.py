"""Stopping on request: a signal is remembered, all ranks agree on it between two steps, and the run is saved."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Self

from trainworks.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED

if TYPE_CHECKING:
    from trainworks.parallel.launch import World

__all__ = ["Stop", "Stopped", "follow_launcher"]

_CODES = {signal.SIGINT: EXIT_INTERRUPTED, signal.SIGTERM: EXIT_PREEMPTED, signal.SIGUSR1: EXIT_PREEMPTED}


class Stopped(BaseException):
    """A signal asked the process to end while there was nothing to save yet; no error, and not to be caught as one."""


class Stop:
    """Listen for Ctrl-C, SIGTERM and SIGUSR1 while inside.

    The first signal decides: after Ctrl-C a dying launcher sends SIGTERM as well. A second Ctrl-C interrupts at once.
    Outside the main thread, where Python allows no handlers, nothing is listened for.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._code = 0

    def __enter__(self) -> Self:
        listening = threading.current_thread() is threading.main_thread()
        self._before = {number: signal.signal(number, self._remember) for number in _CODES} if listening else {}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._code == EXIT_INTERRUPTED and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._code = self._code or _CODES[signal.Signals(number)]

    def agreed(self) -> int:
        """Return the largest exit code any rank's signal asks for, 0 for none. All ranks."""
        return self.world.most(self._code)


def follow_launcher() -> None:
    """End when the launcher is told to, and when it dies; call it first thing in a command's process.

    `accelerate launch` passes no signal on: it dies of SIGTERM and leaves its child behind. So the child asks Linux for
    a SIGTERM at its parent's death. Until training begins a SIGTERM raises `Stopped`; then `Stop` takes over.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGUSR1, stop)
    launched = "ACCELERATE_DYNAMO_BACKEND" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if launched and sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGTERM, 0, 0, 0)
        if os.getppid() == 1 and not _is_launcher(Path("/proc/1/cmdline")):  # it died before the call above
            raise Stopped


def _is_launcher(command_line: Path) -> bool:
    """Tell a launcher from an init process; in a container the launcher itself may be process 1."""
    return any(name in command_line.read_bytes() for name in (b"accelerate", b"torchrun", b"torch.distributed"))
