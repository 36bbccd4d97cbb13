"""Causal language modelling: predict every next token of running text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, Strict

from trainworks.data.cache import Prepared, table
from trainworks.data.columns import Kind
from trainworks.data.text import blocks, encode
from trainworks.tasks.base import Baseline, Processor
from trainworks.tasks.language import LanguageTask

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["CausalLM"]


class CausalLM(LanguageTask):
    """Predict the next token of documents joined end to end and cut to blocks."""

    type: Literal["causal-lm"] = "causal-lm"
    text: str = "text"
    """Column of the documents."""
    block: Annotated[int, Strict(), Field(gt=1)]
    """Tokens predicted per sample; documents are joined, an end token between them, and cut to this length."""

    def columns(self) -> dict[str, Kind]:
        """Return the one column it reads."""
        return {self.text: "text"}

    def prepare(self, rows: Dataset, processor: Processor) -> Prepared:
        """Return blocks of `block` + 1 tokens; nothing is dropped."""
        cut = blocks(encode(rows[self.text], processor), self.block, end=processor.eos_token_id)
        return Prepared(table({"input_ids": cut, "length": [len(block) - 1 for block in cut]}), {})

    def prompt(self, row: dict[str, Any]) -> int:
        """Give the first quarter of a block, 32 tokens at most."""
        return max(1, min(32, len(row["input_ids"]) // 4))

    def baselines(self, train: Dataset, evaluation: Dataset) -> dict[str, Baseline]:
        """Return `unigram`: every token as likely as it is often in the training text (add-one smoothing)."""
        rows = [row[1:] for row in evaluation.with_format("numpy")["input_ids"][:]]
        seen = np.concatenate([row[1:] for row in train.with_format("numpy")["input_ids"][:]])
        counts = 1 + np.bincount(seen, minlength=1 + max(row.max() for row in rows))
        nats = np.log(counts.sum()) - np.log(counts)
        return {"unigram": Baseline(losses=np.array([(nats[row].sum(), len(row)) for row in rows]))}
