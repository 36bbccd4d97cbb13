"""The watch that ranks keep over one another: when one dies, fails or hangs it is named, and all end at once.

A collective that misses a rank waits until it times out, and on a GPU it says nothing even then. So a thread of every
rank gives a sign of life to rank 0 twice a second, over a connection of its own, and rank 0 gives its own back. The
connection of a process that dies is closed by the kernel in the same moment, on whichever machine. Rank 0 judges, and
the others do when they miss rank 0. The main thread only says when it waits for others (`Watchdog.waiting`) and why it
ends early (`Watchdog.failed`); how far it is, and where, the thread looks up by itself.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, ClassVar, NoReturn

from trainworks.errors import EXIT_OK, EXIT_PREEMPTED, LaunchError
from trainworks.output import write_outcome
from trainworks.parallel.line import Line
from trainworks.parallel.verdict import Report, Seen, Sign, Verdict, judge
from trainworks.record import Outcome

__all__ = ["Peer", "Watchdog", "exit_status", "how_it_ended", "join"]

BEAT = 0.5
"""Seconds between two signs of life."""
ANSWER = 10.0
"""Seconds for which a rank that fails waits to hear whether another is the cause."""
CONNECT = 60.0
"""Seconds for which ranks wait for each other's connections."""


@dataclass(frozen=True)
class Peer:
    """A rank that this one is connected with: rank 0 with all, the others with rank 0."""

    line: Line
    sign: Sign
    here: bool
    """Whether its process can be seen from this one."""


@dataclass(frozen=True)
class _Exchange:
    """What the main thread waits in for others, or last did."""

    number: int = 0
    since: float = field(default_factory=time.monotonic)
    patient: bool = False
    is_over: bool = True


class Watchdog:
    """This rank's part in the watch; `join` makes it."""

    current: ClassVar[Watchdog | None] = None
    """The one of this process, while it watches."""

    def __init__(self, rank: int, peers: Mapping[int, Peer], *, timeout: float, output: Path) -> None:
        self.rank = rank
        self.timeout = timeout
        self.output = output
        self.step: Callable[[], int | None] = lambda: None
        """Returns how many optimizer steps are done."""
        self._peers = peers
        self._exchange = _Exchange()
        self._report: Report | None = None
        self._failed_at = ""
        self._left = False
        self._verdict: Verdict | None = None
        now = time.monotonic()
        self._seen = {rank: Seen(self._sign(), now)} | {other: Seen(peer.sign, now) for other, peer in peers.items()}
        self._bell, self._rung = socket.socketpair()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    # What the main thread calls

    def start(self) -> None:
        """Begin to watch."""
        Watchdog.current = self
        os.register_at_fork(after_in_child=self._let_go)
        self._thread.start()

    @contextlib.contextmanager
    def waiting(self, *, patient: bool = False) -> Iterator[None]:
        """Exchange something with all other ranks inside; what is not `patient` may not take longer than the
        timeout."""
        number = self._exchange.number + 1
        self._exchange = begun = _Exchange(number, patient=patient, is_over=False)
        try:
            yield
        finally:
            self._exchange = replace(begun, is_over=True)

    def failed(self, report: Report, trace: TracebackType | None = None) -> Verdict | None:
        """Tell the others why this rank ends before its time, and return what all end by, in a second or two.

        When another rank is the cause, or none, this does not return: the process ends by that. It returns when the
        reason is this rank's own, which the caller has to tell where it has to be told; None when nobody watches.
        """
        self._failed_at = _place(traceback.walk_tb(trace))
        self._report = report
        self._bell.send(b"!")
        self._thread.join(ANSWER)
        return self._verdict

    def stop(self) -> None:
        """Watch no more: this rank needs the others no longer, nor they it."""
        self._left = True
        self._bell.send(b"!")
        self._thread.join(ANSWER)
        self._let_go()

    def _let_go(self) -> None:
        """Close the connections; in a process that was forked off, too, where they would outlive this one."""
        for peer in self._peers.values():
            peer.line.close()
        self._bell.close()
        self._rung.close()
        Watchdog.current = None

    # What its thread does

    def _watch(self) -> None:
        with selectors.PollSelector() as selector:
            selector.register(self._rung, selectors.EVENT_READ)
            for peer in self._peers.values():
                selector.register(peer.line, selectors.EVENT_READ)
            while self._verdict is None and not self._left and self._is_watched():
                ready = [key.fileobj for key, _ in selector.select(BEAT)]
                self._listen()
                self._say()
                if self._verdict is None:  # none has come either
                    self._verdict = self._judged()
                for line in ready:
                    if isinstance(line, Line) and line.closed:
                        selector.unregister(line)
        if self._verdict is not None and not self._left:
            self._pass_on(self._verdict)
            if not self._is_own(self._verdict):
                self._end(self._verdict)

    def _is_watched(self) -> bool:
        return not all(self._seen[rank].sign.left for rank in self._peers)

    def _listen(self) -> None:
        for rank, peer in self._peers.items():
            for value in [] if peer.line.closed else peer.line.heard():
                self._hear(value)
            seen = self._seen[rank]
            if peer.line.closed and seen.gone is None:
                seen.gone, seen.how = time.monotonic(), how_it_ended(seen.sign.pid) if peer.here else ""
        self._take(self._sign())

    def _hear(self, value: dict[str, Any]) -> None:
        if "reason" in value:
            self._verdict = Verdict.read(value)
        else:
            self._take(Sign.read(value))

    def _take(self, sign: Sign) -> None:
        seen, now = self._seen[sign.rank], time.monotonic()
        seen.reported = seen.reported or (now if sign.report else 0.0)
        seen.sign, seen.heard = sign, now

    def _say(self) -> None:
        sign = self._seen[self.rank].sign
        for peer in self._peers.values():
            peer.line.say(asdict(sign), always=sign.left or sign.report is not None)

    def _judged(self) -> Verdict | None:
        """Judge all ranks on rank 0; on the others this one and rank 0, once that is missed."""
        now, above = time.monotonic(), self._seen[0]
        if self.rank == 0 or above.died or now - above.heard > self.timeout:
            return judge(self._seen, now=now, timeout=self.timeout)
        return None

    def _pass_on(self, verdict: Verdict) -> None:
        for peer in self._peers.values():
            peer.line.say(asdict(verdict), always=True)

    def _is_own(self, verdict: Verdict) -> bool:
        """Tell whether the main thread ends by this very thing; it then says so itself."""
        return self._report is not None and self._report == verdict.report

    def _end(self, verdict: Verdict) -> NoReturn:
        """End the process here and now: its main thread may wait for ever."""
        try:
            if not verdict.is_told_by_rank_0:
                self._tell(verdict)
            if verdict.is_fault:
                self._dump_stacks()
            self._kill_silent(verdict)
        finally:
            os._exit(exit_status(verdict.code))

    def _dump_stacks(self) -> None:
        path = self.output / "stacks" / f"rank-{self.rank:05d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file)

    def _tell(self, verdict: Verdict) -> None:
        """Write the outcome and say it: the lowest rank that is left, which is the first to come to it."""
        time.sleep(min(0.02 * self.rank, 2.0))
        if (self.output / "outcome.json").exists():
            return
        stacks = f"; the others' stacks are in {self.output / 'stacks'}" if verdict.is_fault else ""
        outcome = Outcome(code=verdict.code, reason=f"{verdict.reason}{stacks}")
        os.write(sys.stderr.fileno(), f"error: {outcome.reason}\n".encode())
        write_outcome(self.output, outcome)

    def _kill_silent(self, verdict: Verdict) -> None:
        """End a process that no longer can: its connection is open, so the number is still its own."""
        for rank in verdict.ranks:
            seen, peer = self._seen.get(rank), self._peers.get(rank)
            if seen and peer and peer.here and seen.lives and time.monotonic() - seen.heard > self.timeout:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(seen.sign.pid, signal.SIGKILL)

    def _sign(self) -> Sign:
        exchange = self._exchange
        since = time.monotonic() - exchange.since
        return Sign(
            rank=self.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            step=self.step(),
            place=self._failed_at or _place_of_main_thread(),
            exchanges=exchange.number,
            waited=None if exchange.is_over else since,
            since=since,
            patient=exchange.patient,
            report=self._report,
            left=self._left,
        )


def _place(frames: Iterable[tuple[FrameType, int]]) -> str:
    """Return the toolkit's modules on a stack, from the outermost, such as `training > checkpoint`."""
    modules = [str(frame.f_globals.get("__name__", "")) for frame, _ in frames]
    own = [name.removeprefix("trainworks.") for name in modules if name.startswith("trainworks.")]
    return " > ".join(name for name, _ in groupby(own) if name.partition(".")[0] not in ("command", "parallel"))


def _place_of_main_thread() -> str:
    frames = list(traceback.walk_stack(sys._current_frames().get(threading.main_thread().ident or 0)))
    return _place(reversed(frames))


def how_it_ended(pid: int) -> str:
    """Return how a process ended, in words, when its parent has not yet asked; only Linux tells."""
    for _ in range(50):
        try:
            state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:
            return ""
        if state == "Z":
            status = int(fields[-1])
            number = os.waitstatus_to_exitcode(status)
            return f"was killed by {signal.Signals(-number).name}" if number < 0 else f"exited with {number}"
        time.sleep(0.002)
    return ""


def exit_status(code: int) -> int:
    """Return what a process exits with; torchrun starts a rank that did not exit with 0 again, though the run was asked
    to stop."""
    return EXIT_OK if code == EXIT_PREEMPTED and "TORCHELASTIC_RUN_ID" in os.environ else code


# How the ranks find one another


def join(share: Callable[[Any], list[Any]], rank: int, *, timeout: float, output: Path) -> Watchdog:
    """Connect the ranks and return this one's watchdog, not yet started. All ranks.

    `share` returns every rank's value in rank order. Raises LaunchError where rank 0 cannot be reached.
    """
    if rank == 0:  # an earlier process's must not pass for this one's
        (output / "outcome.json").unlink(missing_ok=True)
    machines = share(_machine())
    signs = [Sign(**value) for value in share(asdict(_own_sign(rank)))]
    host = "127.0.0.1" if len(set(machines)) == 1 else os.environ["MASTER_ADDR"]
    server = _listen("127.0.0.1" if len(set(machines)) == 1 else "") if rank == 0 else None
    port, secret = share((server.getsockname()[1], secrets.token_hex(16)) if server else None)[0]
    problem, lines = None, {}
    try:
        lines = _accepted(server, secret, len(signs)) if server else {0: _connected(host, port, secret, rank)}
    except OSError as error:
        problem = f"rank {rank} on {signs[rank].host} cannot be joined with rank 0 at {host}, port {port}: {error}"
    if problem := next(filter(None, share(problem)), None):
        raise LaunchError(problem)
    peers = {other: Peer(line, signs[other], machines[other] == machines[rank]) for other, line in lines.items()}
    return Watchdog(rank, peers, timeout=timeout, output=output)


def _own_sign(rank: int) -> Sign:
    return Sign(rank=rank, host=socket.gethostname(), pid=os.getpid())


def _machine() -> str:
    """Return what is the same for processes that see one another: neither of two machines nor of two containers."""
    name, boot = socket.gethostname(), Path("/proc/sys/kernel/random/boot_id")
    if not boot.exists():
        return name
    return f"{name} {boot.read_text(encoding='ascii').strip()} {os.readlink('/proc/self/ns/pid')}"


def _listen(host: str) -> socket.socket:
    if not host and socket.has_dualstack_ipv6():
        return socket.create_server((host, 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    return socket.create_server((host, 0), backlog=4096)


def _connected(host: str, port: int, secret: str, rank: int) -> Line:
    link = socket.create_connection((host, port), timeout=CONNECT)
    link.sendall(f"{secret} {rank:08d}".encode())
    return Line(link)


def _accepted(server: socket.socket, secret: str, ranks: int) -> dict[int, Line]:
    """Return the connections of all other ranks; a stranger's, who does not know the secret, is closed."""
    lines: dict[int, Line] = {}
    with server:
        server.settimeout(CONNECT)
        while len(lines) < ranks - 1:
            link, _ = server.accept()
            link.settimeout(CONNECT)
            said = link.recv(len(secret) + 9, socket.MSG_WAITALL).decode(errors="replace")
            if secrets.compare_digest(said[: len(secret)].encode(), secret.encode()):
                lines[int(said[len(secret) :])] = Line(link)
            else:
                link.close()
    return lines
