"""What the tasks have in common that tell something of a text, or of a pair of texts, as a whole."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, Strict

from trainworks.data.bad_rows import BadRow, BadRowsError
from trainworks.data.cache import ragged
from trainworks.data.columns import Kind
from trainworks.data.text import pad, padded_by_end
from trainworks.errors import DataError
from trainworks.tasks.base import Processor, Task

if TYPE_CHECKING:
    from datasets import Dataset

    from trainworks.data.loading import Batch, Row

__all__ = ["TextTask", "classes", "padded"]


class TextTask(Task, ABC):
    """Tell something of a text, through a model with a head over the whole of it."""

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"

    text: str = "text"
    """Column of the text."""
    pair: str | None = None
    """Column of a second text, for tasks on pairs."""
    max_length: Annotated[int, Strict(), Field(gt=1)] = 512
    """Longest text in tokens, special ones included."""
    too_long: Literal["truncate", "error"] = "truncate"
    """What becomes of a longer one; tokens cut are counted in the record."""

    def columns(self) -> dict[str, Kind]:
        """Return the texts."""
        return {self.text: "text"} if self.pair is None else {self.text: "text", self.pair: "text"}

    def equip(self, processor: Processor) -> Processor:
        """Pad with the end token where there is no padding token."""
        return padded_by_end(processor)

    def _encoded(self, rows: Dataset, processor: Processor, first: int) -> tuple[dict[str, Any], dict[str, int]]:
        """Return the columns of the texts' tokens, and how many were cut; BadRowsError for texts without a token, as an
        empty one is where the tokenizer puts nothing around it."""
        texts = (rows[self.text][:],) if self.pair is None else (rows[self.text][:], rows[self.pair][:])
        # Where all rows were refused there are none, which transformers 5.23 cannot encode.
        whole = dict(processor(*texts, verbose=False)) if len(rows) else {"input_ids": []}
        if empty := [row for row, ids in enumerate(whole["input_ids"], start=first) if not ids]:
            raise BadRowsError([BadRow("no tokens", "give it a text", row=row, column=self.text) for row in empty])
        cut = [max(0, len(ids) - self.max_length) for ids in whole["input_ids"]]
        if any(cut) and self.too_long == "error":
            number = int(np.argmax(np.array(cut) > 0))
            raise DataError(
                f"row {first + number}: {self.max_length + cut[number]} tokens, task.max_length is {self.max_length}; "
                "raise it, or say task.too_long: truncate"
            )
        encoded = dict(processor(*texts, truncation=True, max_length=self.max_length)) if any(cut) else whole
        columns: dict[str, Any] = {name: ragged(ids, np.int32) for name, ids in encoded.items()}
        columns["length"] = [len(ids) for ids in encoded["input_ids"]]
        return columns, {"tokens cut": sum(cut)}


def padded(rows: Sequence[Row], processor: Processor) -> Batch:
    """Return the model's inputs of prepared rows, each [rows, longest], filled up on the right."""
    import torch

    fills = {
        "input_ids": processor.pad_token_id,
        "attention_mask": 0,
        "token_type_ids": processor.pad_token_type_id,
    }
    return {
        name: torch.from_numpy(pad([row[name] for row in rows], fill))
        for name, fill in fills.items()
        if name in rows[0]
    }


def classes(labels: Sequence[str]) -> dict[str, Any]:
    """Return what a model's configuration says of its classes."""
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {name: number for number, name in enumerate(labels)},
    }
