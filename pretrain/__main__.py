"""The command: accelerate launch -m pretrain CONFIG [KEY=VALUE ...]."""

from __future__ import annotations

from pretrain.config import Config
from trainworks.command import Prepare, run_command, run_process


def _recipe() -> Prepare:
    from pretrain.recipe import prepare

    return prepare


if __name__ == "__main__":
    run_process(run_command("pretrain", Config, _recipe))
