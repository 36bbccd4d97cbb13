"""The parts of the watch, in one process: how ranks find one another, and what can be told of a process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainworks.errors import LaunchError
from trainworks.parallel import watchdog
from trainworks.parallel.line import Line
from trainworks.parallel.watchdog import Watchdog, exit_status, how_it_ended, join


class Together:
    """Threads that share values as ranks do."""

    def __init__(self, ranks: int) -> None:
        self._barrier = threading.Barrier(ranks, timeout=30)
        self._values: list[Any] = [None] * ranks
        self.shared: list[list[Any]] = []

    def share(self, rank: int) -> Callable[[Any], list[Any]]:
        def share(value: Any) -> list[Any]:
            self._values[rank] = value
            self._barrier.wait()
            values = list(self._values)
            if rank == 0:
                self.shared.append(values)
            self._barrier.wait()
            return values

        return share


def joined(ranks: int, output: Path, before: Callable[[int], None] = lambda rank: None) -> list[Watchdog | LaunchError]:
    together, made = Together(ranks), [None] * ranks

    def one(rank: int) -> None:
        try:
            before(rank)
            made[rank] = join(together.share(rank), rank, timeout=60, output=output)  # type: ignore[call-overload]
        except LaunchError as error:
            made[rank] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return made  # type: ignore[return-value]


def test_every_rank_is_joined_with_rank_0_and_an_old_outcome_is_taken_away(tmp_path: Path) -> None:
    (tmp_path / "outcome.json").write_text("{}")
    made = joined(3, tmp_path)
    peers = [sorted(one._peers) for one in made if isinstance(one, Watchdog)]
    assert peers == [[1, 2], [0], [0]]
    assert not (tmp_path / "outcome.json").exists()
    for one in made:
        assert isinstance(one, Watchdog)
        assert all(peer.here and peer.sign.pid == os.getpid() for peer in one._peers.values())
        one._let_go()


def test_a_stranger_is_not_taken_for_a_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = watchdog._connected
    strangers = []

    def connected(host: str, port: int, secret: str, rank: int) -> Line:
        strangers.append(connect(host, port, "0" * len(secret), rank))
        return connect(host, port, secret, rank)

    monkeypatch.setattr(watchdog, "_connected", connected)
    made = joined(2, tmp_path)
    for one in made:
        assert isinstance(one, Watchdog)
        one._let_go()
    strangers[0].heard()
    assert strangers[0].closed
    strangers[0].close()


def test_a_rank_that_cannot_be_joined_is_named_on_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(host: str, port: int, secret: str, rank: int) -> Line:
        socket.create_connection((host, port)).close()  # or rank 0 would wait for a minute
        raise ConnectionRefusedError("refused")

    monkeypatch.setattr(watchdog, "_connected", refused)
    monkeypatch.setattr(watchdog, "CONNECT", 0.5)
    made = joined(2, tmp_path)
    assert all(isinstance(one, LaunchError) for one in made)
    assert "rank " in str(made[0])
    assert str(made[0]) == str(made[1])


def test_a_line_to_a_peer_that_stands_still_takes_what_must_arrive_and_does_not_wait() -> None:
    one, other = map(Line, socket.socketpair())
    begun = time.monotonic()
    for number in range(20_000):
        one.say({"number": number, "filling": "x" * 200})
    one.say("the last", always=True)
    assert time.monotonic() - begun < 10
    heard: list[Any] = []
    while "the last" not in heard:
        heard += other.heard()
        one.say("more", always=False)
    assert len(heard) < 20_000
    assert [value["number"] for value in heard[:3]] == [0, 1, 2]
    one.close()
    other.heard()
    assert other.closed
    other.say("to nobody", always=True)
    other.close()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how a process ended that is not one's own child")
@pytest.mark.parametrize(
    ("does", "told"),
    [
        (f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})", "was killed by SIGKILL"),
        ("raise SystemExit(7)", "exited with 7"),
        ("", "exited with 0"),
    ],
)
def test_how_a_process_ended_is_told_until_its_parent_asks(does: str, told: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", does])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert how_it_ended(process.pid) == told
    process.wait()
    assert how_it_ended(process.pid) == ""


def test_under_torchrun_a_rank_that_was_asked_to_stop_exits_with_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert [exit_status(code) for code in (0, 3, 75, 130)] == [0, 3, 75, 130]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "some")
    assert [exit_status(code) for code in (0, 3, 75, 130)] == [0, 3, 0, 130]
