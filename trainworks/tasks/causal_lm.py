"""Causal language modelling: predict every next token of running text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pyarrow.compute as pc
from pydantic import Field, Strict

from trainworks.data.blocks import Ids, closed, cut, joined
from trainworks.data.cache import Prepared, ragged, table
from trainworks.data.columns import Kind
from trainworks.data.text import encode
from trainworks.tasks.base import Baseline, Processor
from trainworks.tasks.next_token import NextTokenTask

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pyarrow
    from datasets import Dataset

__all__ = ["CausalLM"]

_DOCUMENTS = 1000
"""Documents joined at a time."""


def _samples(ids: Sequence[Ids]) -> Dataset:
    sizes = np.array([len(part) - 1 for part in ids], dtype=np.int64)
    return table({"input_ids": ragged(ids, np.int32), "length": sizes})


class CausalLM(NextTokenTask):
    """Predict the next token of documents joined end to end and cut to blocks."""

    type: Literal["causal-lm"] = "causal-lm"
    text: str = "text"
    """Column of the documents."""
    block: Annotated[int, Strict(), Field(gt=1)]
    """Tokens predicted per sample, at most."""
    across: bool = True
    """Whether a block goes on into the next document: documents are then joined end to end, an end token after each.
    When false, each document is cut by itself, and what is left of it is a short sample (see `batch.pack`)."""

    def columns(self) -> dict[str, Kind]:
        """Return the one column it reads."""
        return {self.text: "text"}

    def prepare(self, rows: Dataset, processor: Processor, *, first: int = 0) -> Prepared:
        """Return each document's tokens, or its blocks; nothing is dropped."""
        documents = [closed(ids, processor.eos_token_id) for ids in encode(rows[self.text], processor)]
        parts = documents if self.across else [block for ids in documents for block in cut(ids, self.block)]
        return Prepared(_samples(parts), {})

    def arrange(self, samples: Dataset) -> Iterator[pyarrow.Table] | None:
        """Yield the blocks of the documents joined end to end."""
        if not self.across:
            return None
        stream = samples.with_format("arrow").iter(_DOCUMENTS)
        parts = (pc.list_flatten(rows["input_ids"]).to_numpy() for rows in stream)
        return (_samples(blocks).data.table for blocks in joined(parts, self.block))

    def prompt(self, row: dict[str, Any]) -> int:
        """Give the first quarter of a block, 32 tokens at most."""
        return max(1, min(32, len(row["input_ids"]) // 4))

    def baselines(self, train: Dataset, evaluation: Dataset) -> dict[str, Baseline]:
        """Return `unigram`: every token as likely as it is often in the training text (add-one smoothing)."""
        rows = [row[1:] for row in evaluation.with_format("numpy")["input_ids"][:]]
        counts = np.ones(1 + max(row.max() for row in rows), dtype=np.int64)
        for part in train.with_format("arrow").iter(_DOCUMENTS):
            ids = part["input_ids"]  # a block's first token is the last of the one before
            for sign, tokens in ((1, pc.list_flatten(ids)), (-1, pc.list_element(ids, 0))):
                seen = np.bincount(tokens.to_numpy(), minlength=len(counts))
                counts = np.pad(counts, (0, len(seen) - len(counts)), constant_values=1) + sign * seen
        nats = np.log(counts.sum()) - np.log(counts)
        return {"unigram": Baseline(losses=np.array([(nats[row].sum(), len(row)) for row in rows]))}
