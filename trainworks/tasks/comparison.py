"""What the tasks on compared answers have in common: rows of a chosen and a rejected answer, or of one with a label."""

from __future__ import annotations

from abc import ABC
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, Strict

from trainworks.data.bad_rows import BadRow, BadRowsError
from trainworks.data.cache import Prepared, ragged, table
from trainworks.data.columns import Kind, numbers_of
from trainworks.data.comparisons import SHAPES, Compared, compared, flaws, recognised
from trainworks.data.sequences import learns
from trainworks.data.templates import Agreement, Conversation, agreement, encode_dialogues
from trainworks.tasks.base import Processor, Task
from trainworks.tasks.chat import check_template, put_template

if TYPE_CHECKING:
    from datasets import Dataset

    from trainworks.data.loading import Row

__all__ = ["Comparison", "Line", "lines"]

_COMPARED = 200

Line = dict[str, Any]
"""One answer behind its prompt: `input_ids` and `trained`, [tokens], and the row's `weight`."""


def lines(row: Row) -> list[Line]:
    """Return a prepared row's answers, each behind the prompt."""
    borders = np.cumsum(row["sizes"])[:-1]
    parts = zip(np.split(row["input_ids"], borders), np.split(row["trained"], borders), strict=True)
    return [{"input_ids": ids, "trained": trained, "weight": row.get("weight", 1.0)} for ids, trained in parts]


class Comparison(Task, ABC):
    """Prepared rows hold all of their answers, each behind the prompt, one after the other: `input_ids` and `trained`
    [tokens of all], `sizes` and `desirable` [answers]."""

    format: Literal["auto", "pairs", "pairs-messages", "pairs-conversations", "labelled", "labelled-messages"] = "auto"
    """Shape of the rows: `prompt`, `chosen` and `rejected` (texts, or lists of messages), `chosen` and `rejected` that
    begin with the same messages, or `prompt`, `completion` and `label`. `auto` tells it by the columns there are."""
    max_length: Annotated[int, Strict(), Field(gt=1)]
    """Longest prompt with an answer in tokens, template included."""
    too_long: Literal["error", "truncate", "drop"] = "error"
    """What becomes of a row with a longer one; `truncate` cuts its end. What is cut or dropped is counted in the
    record."""
    template: str | None = None
    """A .jinja file with a chat template, for a tokenizer that has none, or to replace its own."""
    cluster: str | None = None
    """Column whose equal values mark rows that hang together, such as a question's number: intervals of held-out
    metrics then draw them together. Hold none of them out apart from the others."""

    def columns(self) -> dict[str, Kind]:
        """Return the columns of the resolved format, and that of the cluster."""
        beside: dict[str, Kind] = dict.fromkeys(self._beside(), "any")
        return SHAPES[self.format].columns | beside

    def _beside(self) -> tuple[str, ...]:
        """Return the columns that are read beside the answers."""
        return () if self.cluster is None else (self.cluster,)

    @property
    def is_paired(self) -> bool:
        """Whether a row of the resolved format holds two answers."""
        return SHAPES[self.format].is_paired

    def resolve(self, rows: Dataset) -> Self:
        """Return the task with its format told by the columns; DataError when they tell none."""
        return self if self.format != "auto" else self.model_copy(update={"format": recognised(rows)})

    def flaws(self, rows: Dataset) -> Iterator[BadRow]:
        """Yield rows whose answers are empty, the same, or to different prompts, and conversations with wrong roles."""
        return flaws(rows, self.format)

    def stated(self) -> str:
        """Return how rows are read, for the log."""
        return f"format {self.format} (columns {', '.join(SHAPES[self.format].columns)})"

    def equip(self, processor: Processor) -> Processor:
        """Put the template in place; ConfigError when there is none, or when it cannot be trained with."""
        return check_template(put_template(super().equip(processor), self.template))

    def agreement(self, rows: Dataset, processor: Processor) -> Agreement:
        """Compare the answers of the first rows with what the template gives at inference."""
        some = rows.select(range(min(_COMPARED, len(rows))))
        groups = compared(some, self.format)
        return agreement([answer for group in groups for row in group for answer in row.answers], processor)

    def prepare(self, rows: Dataset, processor: Processor, *, first: int = 0) -> Prepared:
        """Return a sample for each row; those that are too long are treated as the task says.

        BadRowsError for rows that are, and for those whose answers are cut away or to the same.
        """
        counts: Counter[str] = Counter()
        kept: list[tuple[Compared, list[Conversation]]] = []
        refused: list[BadRow] = []
        for group in compared(rows, self.format, first=first, beside=self._beside()):
            encoded = iter(encode_dialogues([answer for row in group for answer in row.answers], processor))
            for row in group:
                fitted = self._fitted(row, [next(encoded) for _ in row.answers], counts)
                if isinstance(fitted, BadRow):
                    refused.append(fitted)
                elif fitted:
                    kept.append((row, fitted))
        if refused:
            raise BadRowsError(refused)
        columns = _columns([answers for _, answers in kept]) | self._own([row for row, _ in kept])
        return Prepared(table(columns), {reason: count for reason, count in counts.items() if count})

    def _fitted(self, row: Compared, answers: list[Conversation], counts: Counter[str]) -> list[Conversation] | BadRow:
        """Return a row's answers under the length limit, none of a row that is dropped, or what is wrong with it."""
        longest = max(len(answer.input_ids) for answer in answers)
        if longest > self.max_length:
            if self.too_long == "error":
                mend = "raise it, or say what becomes of longer rows: task.too_long: truncate or drop"
                return self._bad(row, "too long", mend, f"{longest:,} tokens, task.max_length is {self.max_length}")
            if self.too_long == "drop":
                counts["too long"] += 1
                return []
            counts["rows cut"] += 1
            counts["tokens cut"] += sum(max(0, len(answer.input_ids) - self.max_length) for answer in answers)
            answers = [answer.cut(0, self.max_length) for answer in answers]
        if not all(map(learns, answers)):
            detail = f"no token of an answer stands before task.max_length: {self.max_length}"
            return self._bad(row, "prompt too long", "shorten the prompt, or raise task.max_length", detail)
        if any(np.array_equal(answers[0].input_ids, other.input_ids) for other in answers[1:]):
            detail = f"chosen and rejected are the same {len(answers[0].input_ids):,} tokens"
            return self._bad(row, "same answers", "raise task.max_length, or leave out the row", detail)
        return answers

    def _bad(self, row: Compared, reason: str, mend: str, detail: str) -> BadRow:
        return BadRow(reason, mend, detail, row=row.row, column=next(iter(SHAPES[self.format].reads)))

    def _own(self, rows: Sequence[Compared]) -> dict[str, Any]:
        """Return further columns of the samples."""
        told = {"desirable": ragged([np.array(row.desirable) for row in rows], np.bool_)}
        return (
            told
            if self.cluster is None
            else told | {"cluster": numbers_of([row.columns[self.cluster] for row in rows])}
        )


def _columns(rows: Sequence[list[Conversation]]) -> dict[str, Any]:
    sizes = [np.array([len(answer.input_ids) for answer in answers]) for answers in rows]
    return {
        "input_ids": ragged([np.concatenate([answer.input_ids for answer in answers]) for answers in rows], np.int32),
        "trained": ragged([np.concatenate([answer.trained for answer in answers]) for answers in rows], np.bool_),
        "sizes": ragged(sizes, np.int32),
        "length": np.array([size.sum() for size in sizes], dtype=np.int64),
    }
