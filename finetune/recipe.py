"""The recipe of a fine-tuning run: from its configuration to the live `Run`."""

from __future__ import annotations

from finetune.config import Config
from trainworks.models import load, processor_of
from trainworks.preparation import assemble, begin, check_model
from trainworks.resuming import resume
from trainworks.run import Run
from trainworks.samples import equipped, prepare_data, read_rows

__all__ = ["prepare"]


def prepare(config: Config) -> Run:
    """Load, shard and line up everything; train nothing. All ranks.

    When the output folder holds this very run, it goes on from the newest checkpoint that is whole. Raises
    ToolkitErrors, the cheap ones first: the folder, the devices, the source and its columns, and only then the model.
    """
    world = begin(config)
    sources = read_rows(config)
    task = sources[0].task
    processor = equipped(sources, processor_of(config.model, task.reads))
    check_model(config, task, processor, world)
    data = prepare_data(config, sources, processor, world)
    model = load(config.model, task.auto_class, task.head(), processor, seed=config.seed)
    return resume(assemble(config, "finetune", task=task, world=world, processor=processor, model=model, data=data))
