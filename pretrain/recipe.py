"""The recipe of a pretraining run: from its configuration to the live `Run`."""

from __future__ import annotations

from typing import Any

from pretrain.config import Config
from trainworks.models import initialise, load, load_processor, new_tokenizer
from trainworks.preparation import assemble, begin, check_model, prepare_data, read_rows
from trainworks.resuming import resume
from trainworks.run import Run
from trainworks.schema import FromScratch, NewTokenizer, Pretrained
from trainworks.tasks import Processor, Task

__all__ = ["prepare"]


def prepare(config: Config) -> Run:
    """Load, shard and line up everything; train nothing. All ranks.

    When the output folder holds this very run, it goes on from the newest checkpoint that is whole. Raises
    ToolkitErrors, the cheap ones first: the folder, the devices, the source and its columns, and only then the model.
    """
    world = begin(config)
    rows, task = read_rows(config)
    processor = task.equip(_processor(config, rows.train))
    check_model(config, task, processor)
    data = prepare_data(rows, task, processor, world)
    model = _model(config, task, processor)
    return resume(assemble(config, "pretrain", task=task, world=world, processor=processor, model=model, data=data))


def _processor(config: Config, train: Any) -> Processor:
    model, task = config.model, config.task
    if isinstance(model, Pretrained):
        return load_processor(task.reads, model.name, model.revision)
    if isinstance(model.tokenizer, NewTokenizer):
        return new_tokenizer(model.tokenizer, train[task.text])
    return load_processor(task.reads, model.tokenizer)


def _model(config: Config, task: Task, processor: Processor) -> Any:
    if isinstance(config.model, FromScratch):
        return initialise(config.model, task.auto_class, processor, seed=config.seed)
    return load(config.model, task.auto_class, task.head(), processor)
