"""Processes for tests that kill them: forked from one that has imported everything, so that each is there at once.

`Nursery` starts that parent; a child calls a function of a test file with arguments that travel as JSON.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from distributed import ENVIRONMENT, LAUNCHER_VARIABLES, RANK_VARIABLES, Mode, free_port, let_fsdp_run_on_cpu, load

__all__ = ["Forked", "Nursery"]

ROOT = Path(__file__).parents[1]
IMPORTED = (
    "pandas",
    "transformers.models.bert.modeling_bert",
    "finetune.recipe",
    "trainworks.exporting",
    "trainworks.training",
)


class Forked:
    """Children that run one function together, as so many ranks."""

    def __init__(self, nursery: Nursery, log: Path, pids: list[int]) -> None:
        self._nursery, self.log, self.pids = nursery, log, pids

    def send(self, number: signal.Signals) -> None:
        """Send a signal to those that are still there."""
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def ended(self, seconds: float = 0.0) -> bool:
        """Tell whether they have all ended, after so long at most."""
        return self._nursery.has_answer(seconds)

    def wait(self) -> list[int]:
        """Return how each ended, as `Popen.returncode` says it. Once one has failed, its launcher kills the others."""
        codes: list[int] = self._nursery.answer()
        return codes

    def tail(self) -> str:
        """Return the end of what they printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-3000:]


class Nursery:
    """A process without threads that has imported the toolkit, and forks the children of a test. One set at a time."""

    def __init__(self, prefix: Sequence[str] = ()) -> None:
        self._prefix = prefix

    def __enter__(self) -> Self:
        inherited = {
            key: value
            for key, value in os.environ.items()
            if key not in RANK_VARIABLES and not key.startswith(LAUNCHER_VARIABLES)
        }
        self._folder = tempfile.TemporaryDirectory(prefix="forking-")
        self._process = subprocess.Popen(
            [*self._prefix, sys.executable, __file__],
            cwd=ROOT,
            env=inherited | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.answer() == "ready"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._folder.cleanup()

    def start(
        self,
        target: str,
        arguments: Mapping[str, Any],
        *,
        environment: Mapping[str, str] | None = None,
        ranks: int = 1,
        mode: Mode = "ddp",
    ) -> Forked:
        """Call `target(**arguments)`, where `target` is `path/to/file.py:function`, in a child for each rank."""
        log = Path(self._folder.name) / "log"
        log.unlink(missing_ok=True)
        port = free_port()
        launched = [
            dict(zip(RANK_VARIABLES, map(str, (rank, rank, ranks, ranks, "127.0.0.1", port)), strict=True))
            if ranks > 1
            else {}
            for rank in range(ranks)
        ]
        common = ENVIRONMENT[mode] | dict(environment or {})
        asked = {
            "target": target,
            "arguments": dict(arguments),
            "environments": [common | own for own in launched],
            "log": str(log),
        }
        assert self._process.stdin
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return Forked(self, log, self.answer())

    def run(self, target: str, arguments: Mapping[str, Any], **options: Any) -> None:
        """Start children and see them all end well."""
        children = self.start(target, arguments, **options)
        codes = children.wait()
        assert not any(codes), f"ended by {codes}:\n{children.tail()}"

    def has_answer(self, seconds: float) -> bool:
        """Tell whether the parent has said something, after so long at most."""
        return bool(select.select([self._process.stdout], [], [], seconds)[0])

    def answer(self) -> Any:
        """Return the next thing the parent says."""
        assert self._process.stdout
        line = self._process.stdout.readline()
        assert line, "the parent of all children is gone"
        return json.loads(line)


def _child(target: str, arguments: dict[str, Any], environment: dict[str, str], log: str) -> None:
    os.environ.update(environment)
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for own in (1, 2):
            os.dup2(descriptor, own)
        if "ACCELERATE_USE_FSDP" in environment:
            let_fsdp_run_on_cpu()
        load(target)(**arguments)
        code = 0
    except BaseException:  # noqa: BLE001, whatever it is, the child must not go on as its parent
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(pids: list[int]) -> list[int]:
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid]:
            for other in set(pids) - codes.keys():
                os.kill(other, signal.SIGKILL)
    return [codes[pid] for pid in pids]


def _say(value: Any, stream: Any) -> None:
    stream.write(json.dumps(value) + "\n")
    stream.flush()


def _main() -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    _say("ready", sys.stdout)
    for line in sys.stdin:
        asked = json.loads(line)
        pids = []
        for environment in asked["environments"]:
            pid = os.fork()
            if not pid:
                _child(asked["target"], asked["arguments"], environment, asked["log"])
            pids.append(pid)
        _say(pids, sys.stdout)
        _say(_wait(pids), sys.stdout)


if __name__ == "__main__":
    _main()
