"""The command: accelerate launch -m finetune CONFIG [KEY=VALUE ...]."""

from __future__ import annotations

from finetune.config import Config
from trainworks.command import Prepare, run_command, run_process


def _recipe() -> Prepare:
    from finetune.recipe import prepare

    return prepare


if __name__ == "__main__":
    run_process(run_command("finetune", Config, _recipe))
