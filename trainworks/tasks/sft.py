"""Supervised fine-tuning on conversations: learn what the assistant says, given what comes before it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, Strict

from trainworks.data.cache import Prepared, table
from trainworks.data.columns import Kind
from trainworks.data.text import FORMATS, Conversation, conversations
from trainworks.errors import ConfigError, DataError
from trainworks.tasks.base import Processor
from trainworks.tasks.language import LanguageTask

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["SFT"]


class SFT(LanguageTask):
    """Learn the assistant's turns of chat or instruction rows, through the tokenizer's own chat template."""

    type: Literal["sft"] = "sft"
    format: Literal["auto", "messages", "prompt-completion", "instruction"] = "auto"
    """Shape of the rows; `auto` tells it by the columns there are."""
    max_length: Annotated[int, Strict(), Field(gt=1)]
    """Longest conversation in tokens, template included."""
    too_long: Literal["error", "truncate", "drop"] = "error"
    """What becomes of a longer one; what is cut or dropped is counted in the record."""
    template: str | None = None
    """A .jinja file with a chat template, for a tokenizer that has none, or to replace its own."""

    def columns(self) -> dict[str, Kind]:
        """Return the columns of the resolved format."""
        return {name: "messages" if name == "messages" else "text" for name in FORMATS[self.format][0]}

    def resolve(self, rows: Dataset) -> Self:
        """Return the task with its format told by the columns."""
        if self.format != "auto":
            return self
        for name, (needed, _) in FORMATS.items():
            if set(needed) <= set(rows.column_names):
                return self.model_copy(update={"format": name})
        shapes = "; ".join(f"{name}: {', '.join(needed)}" for name, (needed, _) in FORMATS.items())
        raise DataError(
            f"no known shape of conversation: the columns are {', '.join(rows.column_names)}; known are {shapes}. "
            "Rename yours, as in data.columns: {prompt: question, completion: answer}"
        )

    def equip(self, processor: Processor) -> Processor:
        """Put the template in place; ConfigError when there is none."""
        processor = super().equip(processor)
        if self.template is not None:
            processor.chat_template = self._read_template(self.template)
        if processor.chat_template is None:
            raise ConfigError(
                f"the tokenizer of {processor.name_or_path} has no chat template; name a .jinja file in task.template"
            )
        return processor

    def _read_template(self, name: str) -> str:
        try:
            return Path(name).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"task.template: {name}: cannot be read: {error.strerror}") from error

    def prepare(self, rows: Dataset, processor: Processor) -> Prepared:
        """Return conversations as `input_ids` and `trained`, with the over-long ones treated as the task says."""
        dropped = {"too long": 0, "tokens cut": 0}
        kept: list[Conversation] = []
        for number, conversation in enumerate(conversations(rows, self.format, processor)):
            fitted = self._fit(conversation, number, dropped)
            kept.extend(fitted)
        if not kept:
            raise DataError("no conversation is left to learn from: all were longer than task.max_length")
        columns = {
            "input_ids": [conversation.input_ids for conversation in kept],
            "trained": [conversation.trained for conversation in kept],
            "length": [len(conversation.input_ids) - 1 for conversation in kept],
        }
        return Prepared(table(columns), {reason: count for reason, count in dropped.items() if count})

    def _fit(self, conversation: Conversation, number: int, dropped: dict[str, int]) -> list[Conversation]:
        excess = len(conversation.input_ids) - self.max_length
        if excess <= 0:
            return [conversation]
        if self.too_long == "error":
            raise DataError(
                f"row {number}: {len(conversation.input_ids)} tokens, task.max_length is {self.max_length}; raise it, "
                "or say task.too_long: truncate or drop"
            )
        shortened = Conversation(conversation.input_ids[: self.max_length], conversation.trained[: self.max_length])
        if self.too_long == "drop" or not shortened.trained[1:].any():
            dropped["too long"] += 1
            return []
        dropped["tokens cut"] += excess
        return [shortened]

    def facts(self, samples: Dataset) -> dict[str, Any]:
        """Return the tokens, and how many of them are learned."""
        learned = sum(int(row[1:].sum()) for row in samples.with_format("numpy")["trained"][:])
        return super().facts(samples) | {"counted": learned}

    def prompt(self, row: dict[str, Any]) -> int:
        """Give everything before the first token that is learned."""
        return max(1, int(np.argmax(row["trained"])))
