"""The recipe of a pretraining run: from its configuration to the live `Run`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pretrain.config import Config
from trainworks import models
from trainworks.data.cache import digest
from trainworks.errors import ConfigError
from trainworks.image_models import new_image_processor
from trainworks.models import initialise, load, load_processor
from trainworks.preparation import assemble, begin, check_model
from trainworks.resuming import resume
from trainworks.run import Run
from trainworks.samples import Source, equipped, prepare_data, read_rows
from trainworks.schema import FromScratch, NewImageProcessor, NewTokenizer, Pretrained, RunConfig
from trainworks.tasks import Processor, Task
from trainworks.tokenizer_training import trained_tokenizer

__all__ = ["prepare", "processor_of", "train_tokenizer"]


def prepare(config: Config) -> Run:
    """Load, shard and line up everything; train nothing. All ranks.

    When the output folder holds this very run, it goes on from the newest checkpoint that is whole. Raises
    ToolkitErrors, the cheap ones first: the folder, the devices, the source and its columns, and only then the model.
    """
    world = begin(config)
    sources = read_rows(config)
    task = sources[0].task
    processor = equipped(sources, processor_of(config, sources))
    check_model(config, task, processor, world)
    data = prepare_data(config, sources, processor, world)
    model = _model(config, task, processor)
    return resume(assemble(config, "pretrain", task=task, world=world, processor=processor, model=model, data=data))


def processor_of(config: RunConfig[Any], sources: Sequence[Source]) -> Processor:
    """Load what turns rows to tensors, or train the tokenizer that the configuration asks for; kept by content."""
    model, task = config.model, config.task
    if isinstance(model, Pretrained):
        return models.processor_of(model, task.reads)
    if isinstance(model.image_processor, NewImageProcessor):
        return new_image_processor(model.image_processor)
    if isinstance(model.tokenizer, NewTokenizer):
        texts = (text for source in sources for text in source.rows.train[task.text])
        return trained_tokenizer(model.tokenizer, texts, key=digest(*(source.rows.fingerprint for source in sources)))
    return load_processor(task.reads, model.image_processor or model.tokenizer or "")


def train_tokenizer(config: Config) -> Processor:
    """Train the tokenizer that a run asks for on its training text, or find it where it was trained before; ConfigError
    when the run takes one that is there already."""
    if not (isinstance(config.model, FromScratch) and isinstance(config.model.tokenizer, NewTokenizer)):
        raise ConfigError("model.tokenizer: this run takes a tokenizer that is there; {vocab_size: N} trains one")
    return processor_of(config, read_rows(config))


def _model(config: Config, task: Task, processor: Processor) -> Any:
    if isinstance(config.model, FromScratch):
        return initialise(config.model, task.auto_class, processor, head=task.head(), seed=config.seed)
    return load(config.model, task.auto_class, task.head(), processor, seed=config.seed)
