"""Fine-tune as `python -m finetune` does, but let one rank break at a given place, once: FAULT=rank:place:how:mark.

Places: preparing, evaluating, saving, and a step's number. `mark` is a file: made at the break, and where it is there
already nothing breaks.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distributed import let_fsdp_run_on_cpu


def _raise() -> None:
    raise ValueError("broken on purpose, hf_abcdefghijklmnopqrstuvwx")


def _stand_still() -> None:
    while True:
        time.sleep(60)


HOW: dict[str, Callable[[], Any]] = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "exits": lambda: os._exit(0),
    "raises": _raise,
    "stands": _stand_still,
}
AT_ONCE = ("killed", "exits")
"""A process that is gone tells no more where it was, so it stays there until its signs of life have told."""


def break_at(place: str, how: str, mark: Path) -> None:
    """Break in the first exchange at a place: that is inside an evaluation, a save, a step."""
    from trainworks.parallel.launch import World
    from trainworks.parallel.watchdog import BEAT

    steps = 0

    def breaking(name: str, caller: str, after: int) -> None:
        exchange = getattr(World, name)

        def broken(self: World, *arguments: Any, **options: Any) -> Any:
            nonlocal steps
            if sys._getframe(1).f_globals["__name__"].startswith(caller):
                steps += 1
                if steps > after:
                    time.sleep(3 * BEAT if how in AT_ONCE else 0.0)
                    mark.touch()
                    HOW[how]()
            return exchange(self, *arguments, **options)

        setattr(World, name, broken)

    if place == "preparing":
        breaking("wait_patiently", "trainworks.samples", 0)
    elif place == "evaluating":
        breaking("gather", "trainworks.evaluation", 0)
    elif place == "saving":
        breaking("gather", "trainworks.checkpoint.saving", 4)  # a saver that is entered and looks for room takes four
    else:
        breaking("total", "trainworks.loop", 2 * int(place))  # two sums a step


if __name__ == "__main__":
    rank, place, how, mark = os.environ["FAULT"].split(":")
    if rank == os.environ.get("RANK", "0") and not Path(mark).exists():
        break_at(place, how, Path(mark))
    if os.environ.get("ACCELERATE_TORCH_DEVICE") == "cpu":
        let_fsdp_run_on_cpu()
    runpy.run_module("finetune", run_name="__main__", alter_sys=True)
