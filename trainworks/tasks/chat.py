"""What the tasks on conversations share: the chat template, put in place and tried."""

from __future__ import annotations

from pathlib import Path

from trainworks.data.templates import answer_ends
from trainworks.errors import ConfigError, DataError
from trainworks.tasks.base import Processor

__all__ = ["check_template", "put_template"]


def put_template(processor: Processor, file: str | None) -> Processor:
    """Return the processor with the template of a .jinja file for its own, where one is named; ConfigError when it
    cannot be read."""
    if file is not None:
        try:
            processor.chat_template = Path(file).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"task.template: {file}: cannot be read: {error.strerror}") from error
    return processor


def check_template(processor: Processor) -> Processor:
    """Return the processor; ConfigError when it has no chat template, or one that cannot be trained with."""
    if processor.chat_template is None:
        raise ConfigError(
            f"the tokenizer of {processor.name_or_path} has no chat template; name a .jinja file in task.template"
        )
    try:
        answer_ends(processor)
    except DataError as error:
        raise ConfigError(f"the chat template, tried on one question and its answer: {error}") from error
    return processor
