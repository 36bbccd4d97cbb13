"""A connection between two ranks that carries JSON, one value a line, and never keeps its thread waiting."""

from __future__ import annotations

import contextlib
import json
import socket
from typing import Any

__all__ = ["Line"]


class Line:
    """One end of a connection. A peer that stands still fills it up; what is regular is then left out, not kept."""

    def __init__(self, link: socket.socket) -> None:
        link.setblocking(False)
        self._link = link
        self._unsent = b""
        self._unread = b""
        self.closed = False
        """Whether the other end is closed; that of a process that died closes by itself."""

    def fileno(self) -> int:
        """Return what a selector waits on."""
        return self._link.fileno()

    def say(self, value: Any, *, always: bool = False) -> None:
        """Send a value; while an earlier one is stuck, only one that must arrive `always`."""
        if always or not self._unsent:
            self._unsent += json.dumps(value).encode() + b"\n"
        with contextlib.suppress(BlockingIOError):
            while self._unsent and not self.closed:
                self._send()

    def _send(self) -> None:
        try:
            self._unsent = self._unsent[self._link.send(self._unsent) :]
        except (BrokenPipeError, ConnectionError):
            self._unsent = b""  # what the other end said before is still to be read, and then that it is closed

    def heard(self) -> list[Any]:
        """Return what has arrived."""
        with contextlib.suppress(BlockingIOError):
            while not self.closed:
                self._receive()
        *whole, self._unread = self._unread.split(b"\n")
        return [json.loads(line) for line in whole]

    def _receive(self) -> None:
        try:
            part = self._link.recv(2**16)
        except ConnectionError:
            part = b""
        self._unread += part
        self.closed = not part

    def close(self) -> None:
        """Close this end."""
        self._link.close()
        self.closed = True
