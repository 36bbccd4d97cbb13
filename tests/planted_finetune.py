"""`python -m finetune` with a mistake in how it goes on, named by PLANTED_MISTAKE, for a check that is to find it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import finetune
from trainworks import resuming
from trainworks.command import run_command, run_process


def moments_are_lost(run: Any) -> Any:
    found = right_restore(run)
    if found:
        run.optimizer.state.clear()
    return found


def random_state_is_lost(run: Any) -> Any:
    import torch

    found = right_restore(run)
    torch.manual_seed(7)
    return found


def nothing_is_found(run: Any) -> None:
    return None


MISTAKES: dict[str, Callable[[Any], Any]] = {
    "moments": moments_are_lost,
    "random state": random_state_is_lost,
    "nothing": nothing_is_found,
}
right_restore = resuming.restore


if __name__ == "__main__":
    resuming.restore = MISTAKES[os.environ["PLANTED_MISTAKE"]]
    run_process(run_command("finetune", finetune.Config, lambda: finetune.prepare))
