"""What a run's model says of the rows before it is trained, asked once and kept by content."""

from __future__ import annotations

import sys
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from trainworks.data.cache import code_digest, digest, folder, ragged, table
from trainworks.data.columns import fingerprint
from trainworks.errors import DataError
from trainworks.evaluation import merge
from trainworks.evaluation.harness import undisturbed
from trainworks.record import replace_file
from trainworks.run import Run
from trainworks.tasks import Task

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["annotate"]


def annotate(run: Run, weights: str) -> None:
    """Add to a run's rows what its task asks of the untrained model, such as reference log-probabilities. All ranks.

    The model is asked through the wrapped step, so in the precision it is trained in, and sharded where it is sharded;
    an adapter adds nothing yet. Each rank takes a share of the rows. What it says is kept in the cache by the content
    of the rows and `weights`, the digest of what the run begins from, so that it is found when the run goes on.
    """
    if not run.task.annotates:
        return
    run.train = _annotated(run, run.train, weights)
    if run.validation is not None:
        run.validation = _annotated(run, run.validation, weights)


def _annotated(run: Run, rows: Dataset, weights: str) -> Dataset:
    from datasets import concatenate_datasets

    path = folder() / "annotated" / f"{_key(run, rows, weights)}.safetensors"
    if not all(run.world.gather(path.exists())):
        content = save(_asked(run, rows))

        def write() -> None:
            if run.world.accelerator.is_local_main_process:
                replace_file(path, content)

        if problem := run.world.agree(write):
            raise DataError(f"{path}: cannot be written: {problem.text}; TRAINWORKS_CACHE names another folder")
    return concatenate_datasets([rows, table(_read(path))], axis=1)


def _key(run: Run, rows: Dataset, weights: str) -> str:
    precision = run.world.accelerator.mixed_precision, str(run.model.dtype), run.world.device.type
    kinds = (kind for kind in type(run.task).__mro__ if issubclass(kind, Task))
    software = version("torch"), version("transformers"), code_digest(*kinds)
    return digest(fingerprint(rows), weights, run.task.type, *precision, *software)


def _read(path: Path) -> dict[str, Any]:
    try:
        return {name: ragged([*values], values.dtype) for name, values in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: cannot be read: {error}; remove it, and it is made again") from error


def _asked(run: Run, rows: Dataset) -> dict[str, Any]:
    """Return the columns, in the order of the rows, over all ranks."""
    from tqdm.auto import tqdm

    said: dict[str, list[Any]] = defaultdict(list)
    numbers: list[Any] = []
    quiet = not run.world.is_main or not sys.stderr.isatty()
    with undisturbed(run):
        batches = run.evaluation_batches(rows)
        for batch in tqdm(
            batches, desc="asking the untrained model", unit="batch", delay=2, leave=False, disable=quiet
        ):
            counted = batch["weight"].cpu().numpy() > 0
            numbers.append(batch["index"].cpu().numpy()[counted])
            for name, values in run.step(batch, ask="annotate").items():
                said[name].append(values.float().cpu().numpy()[counted])
    mine = {name: (np.concatenate(numbers), np.concatenate(values)) for name, values in said.items()}
    run.world.wait_patiently()
    parts = run.world.gather(mine)
    return {name: np.ascontiguousarray(merge([part[name] for part in parts])[1]) for name in mine}
