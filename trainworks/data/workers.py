"""Processes that work for this one: asked and answering in JSON, a line at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

from trainworks.redaction import redacted_tracebacks

__all__ = ["Worker", "python_path", "requests"]


def python_path() -> str:
    """Return where this process finds modules, for another's PYTHONPATH; it may be this one's own doing, as a
    notebook's folder is."""
    return os.pathsep.join(path or os.getcwd() for path in sys.path)


class Worker:
    """A process that runs a module, which answers `requests`.

    It is a plain subprocess: multiprocessing's would import the caller's script again, and a fork of a process with
    threads or a GPU can hang. It ends when the process it works for is gone.
    """

    def __init__(self, module: str, *arguments: str) -> None:
        environment = {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | environment,
            text=True,
        )

    def send(self, request: Any) -> None:
        """Ask something; a worker that is gone does not answer."""
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass

    def receive(self) -> Any:
        """Wait for an answer and return it, or None when the worker is gone."""
        assert self._process.stdout
        return json.loads(self._process.stdout.readline() or "null")

    def ask(self, request: Any) -> Any:
        """Return the answer to a request, or None when the worker is gone."""
        self.send(request)
        return self.receive()

    def fileno(self) -> int:
        """Return what `select` waits on for an answer."""
        assert self._process.stdout
        return self._process.stdout.fileno()

    def code(self) -> int:
        """Return the exit code of a worker that is gone."""
        return self._process.wait()

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()  # closes the pipes, too


def requests() -> Iterator[tuple[Any, Callable[[Any], None]]]:
    """Yield, in a worker, what is asked and the function that answers it, until the other side closes."""
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever else is printed must not pass for an answer

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    with redacted_tracebacks():
        for line in sys.stdin:
            yield json.loads(line), answer
