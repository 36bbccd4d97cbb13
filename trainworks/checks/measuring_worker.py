"""The process that measures: python -m trainworks.checks.measuring_worker RECIPE RUN_FILE RESULT packed|unpacked."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from trainworks.checks.measuring import measure, unpack
from trainworks.config import load
from trainworks.errors import ToolkitError
from trainworks.run import Run

__all__: list[str] = []

_LAID_OUT: dict[str, Callable[[Run], object]] = {"packed": bool, "unpacked": unpack}


def _main(recipe: str, run_file: str, result: str, layout: str) -> None:
    """Measure a run; the main process writes what came of it. All ranks."""
    package = import_module(recipe)
    run: Run = package.prepare(load(run_file, model=package.Config))
    _LAID_OUT[layout](run)
    measured = measure(run)
    if run.world.is_main:
        measured.write(Path(result))
    run.world.leave()


def _end(code: int) -> None:
    """End the process; one of several at once, for gloo's threads may abort it while its interpreter winds up (torch
    2.13)."""
    sys.stdout.flush()
    sys.stderr.flush()
    if "RANK" in os.environ:
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    try:
        _main(*sys.argv[1:])
    except ToolkitError as error:
        print(f"error: {error}", file=sys.stderr)
        _end(error.exit_code)
    _end(0)
