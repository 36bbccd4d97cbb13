"""Stopping on request: a signal is remembered, all ranks agree on it between two steps, and the run is saved."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Literal, Self

from trainworks.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED
from trainworks.output import write_outcome
from trainworks.parallel.verdict import Report
from trainworks.parallel.watchdog import exit_status
from trainworks.record import Outcome

if TYPE_CHECKING:
    from trainworks.run import Run

__all__ = ["AskedToStop", "Stop", "Stopped", "follow_launcher"]

_CODES = {signal.SIGINT: EXIT_INTERRUPTED, signal.SIGTERM: EXIT_PREEMPTED, signal.SIGUSR1: EXIT_PREEMPTED}


class Stopped(BaseException):
    """A signal asked the process to end while there was nothing to save yet; no error, and not to be caught as one."""


class AskedToStop(BaseException):
    """All ranks have agreed to stop, in the middle of something that can be done again."""


class Stop:
    """Listen for Ctrl-C, SIGTERM and SIGUSR1 while inside.

    The first signal decides: after Ctrl-C a dying launcher sends SIGTERM as well. A second Ctrl-C interrupts at once.
    An evaluation is left between two batches. After a SIGTERM the sender kills in a while, so once
    `faults.stop_within` seconds have passed the process ends, whatever its main thread waits for; the checkpoint
    before stays. Outside the main thread, where Python allows no handlers, nothing is listened for.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._code = 0
        self._left = threading.Event()

    def __enter__(self) -> Self:
        self._before: dict[signal.Signals, object] = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in _CODES}
            self.run.between_batches = self._check
            self._heard, self._told = socket.socketpair()
            self._told.setblocking(False)
            # Python's own handlers wait for the main thread to come out of a collective; this descriptor does not.
            self._fd_before = signal.set_wakeup_fd(self._told.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._watch_clock, name="deadline", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        self.run.between_batches = bool
        if self._before:
            signal.set_wakeup_fd(self._fd_before)
            self._told.close()
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._code == EXIT_INTERRUPTED and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._code = self._code or _CODES[signal.Signals(number)]

    def _watch_clock(self) -> None:
        with self._heard:
            while heard := self._heard.recv(1):
                if heard[0] == signal.SIGTERM:
                    if not self._left.wait(self.run.config.faults.stop_within):
                        _leave(self.run)
                    return

    def agreed(self) -> int:
        """Return the largest exit code any rank's signal asks for, 0 for none. All ranks."""
        self._code = self.run.world.most(self._code)
        return self._code

    @property
    def status(self) -> Literal["interrupted", "preempted"]:
        """What becomes of the run that was asked."""
        return "interrupted" if self._code == EXIT_INTERRUPTED else "preempted"

    def _check(self) -> None:
        if self.agreed():
            raise AskedToStop


def _leave(run: Run) -> None:
    """End the process at once, for there is no time left to save."""
    reason = (
        f"asked to stop, and not saved within {run.config.faults.stop_within} s (faults.stop_within); the same command "
        "goes on from the last checkpoint"
    )
    if run.world.watchdog is not None:
        run.world.watchdog.failed(Report("stop", EXIT_PREEMPTED, reason))
    if run.world.is_main:
        write_outcome(run.folder, Outcome(code=EXIT_PREEMPTED, reason=reason))
        print(reason, file=sys.stderr, flush=True)
    os._exit(exit_status(EXIT_PREEMPTED))


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
