"""Fine-tune as `python -m finetune` does, but slowly: EVALUATION_SECONDS for each batch of an evaluation that training
makes on its way, STEP_SECONDS for step 7. For tests of signals."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

from finetune.config import Config
from finetune.recipe import prepare
from trainworks.command import run_command, run_process
from trainworks.data.loading import Batch
from trainworks.run import Run
from trainworks.tracking import Log

EVALUATION, STEP = (float(os.environ.get(name, "0")) for name in ("EVALUATION_SECONDS", "STEP_SECONDS"))
honest_batches, honest_log = Run.evaluation_batches, Log.step


def slow_batches(self: Run, rows: Any) -> Iterator[Batch]:
    for batch in honest_batches(self, rows):
        time.sleep(EVALUATION if 0 < self.progress.step < self.plan.num_steps else 0)
        yield batch


def slow_log(self: Log, step: Any) -> None:
    time.sleep(STEP if step.number == 7 else 0)
    honest_log(self, step)


if __name__ == "__main__":
    Run.evaluation_batches, Log.step = slow_batches, slow_log  # type: ignore[method-assign]
    run_process(run_command("finetune", Config, lambda: prepare))
