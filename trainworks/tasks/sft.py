"""Supervised fine-tuning on conversations: learn what the assistant says, given what comes before it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, Strict

from trainworks.data.bad_rows import BadRow, BadRowsError
from trainworks.data.cache import Prepared, ragged, table
from trainworks.data.columns import Kind
from trainworks.data.conversations import FORMATS, dialogues, flaws, recognised
from trainworks.data.retrieval import COLUMNS, Retrieval, asked, document_flaws
from trainworks.data.sequences import encoded, fitted, learns
from trainworks.data.templates import Agreement, Conversation, agreement, answer_ends
from trainworks.data.text import IGNORED
from trainworks.metrics import Accuracy, Metric, Prediction
from trainworks.tasks.base import Processor
from trainworks.tasks.chat import check_template, put_template
from trainworks.tasks.next_token import NextTokenTask

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from trainworks.data.loading import Batch

__all__ = ["SFT"]

_COMPARED = 200


class SFT(NextTokenTask):
    """Learn the assistant's turns of chat or instruction rows, through the tokenizer's own chat template."""

    type: Literal["sft"] = "sft"
    format: Literal[
        "auto",
        "messages",
        "sharegpt",
        "prompt-completion",
        "prompt-completion-messages",
        "instruction",
        "tokens",
        "text",
    ] = "auto"
    """Shape of the rows: OpenAI `messages`, ShareGPT `conversations`, prompt and completion (texts, or lists of
    messages), Alpaca's instruction, input and output, `input_ids` with `labels`, or `text` without a template. `auto`
    tells it by the columns there are."""
    retrieval: Retrieval | None = None
    """Rows of a question, documents and an answer, the documents put before the question (RAFT)."""
    learn: Literal["all", "last", "weighted"] = "all"
    """Which of the assistant's turns are learned: all, the last, or those whose `weight` is not 0."""
    turns: Literal["together", "apart"] = "together"
    """`apart` makes each learned turn a sample of its own that ends with it, as at inference; for templates that
    rewrite earlier turns."""
    max_length: Annotated[int, Strict(), Field(gt=1)]
    """Longest conversation in tokens, template included."""
    too_long: Literal["error", "truncate", "split", "drop"] = "error"
    """What becomes of a longer one; `split` cuts it before user turns and repeats the system turn. What is cut, split
    or dropped is counted in the record."""
    nothing_to_learn: Literal["error", "drop"] = "error"
    """What becomes of a row in which no token is learned; what is dropped is counted in the record."""
    template: str | None = None
    """A .jinja file with a chat template, for a tokenizer that has none, or to replace its own."""
    exact_match: bool = False
    """Whether evaluations also generate, greedily, each row's first answer that is learned, and count those that are
    the one wanted, but for blanks around it. That takes far longer than the loss."""

    def columns(self) -> dict[str, Kind]:
        """Return the columns of the resolved format."""
        return FORMATS[self.format].columns if self.retrieval is None else COLUMNS

    def resolve(self, rows: Dataset) -> Self:
        """Return the task with its format told by the columns; DataError when they tell none."""
        if self.retrieval is not None:
            return self.model_copy(update={"format": "prompt-completion"})
        return self if self.format != "auto" else self.model_copy(update={"format": recognised(rows)})

    def flaws(self, rows: Dataset) -> Iterator[BadRow]:
        """Yield conversations with wrong roles, contents or weights."""
        return flaws(rows, self.format, learn=self.learn) if self.retrieval is None else document_flaws(rows)

    def _read(self, rows: Dataset) -> Dataset:
        return rows if self.retrieval is None else asked(rows, self.retrieval)

    def stated(self) -> str:
        """Return how rows are read, for the log."""
        told, shape = ", ".join(self.columns()), self.format if self.retrieval is None else "retrieval"
        how = {"all": "all of the assistant's turns", "last": "its last turn", "weighted": "turns with weight 1"}
        what = how[self.learn] if self._through_template() else "every token that is not masked"
        return f"format {shape} (columns {told}), learning {what}"

    def _through_template(self) -> bool:
        return FORMATS[self.format].read is not None

    def equip(self, processor: Processor) -> Processor:
        """Put the template in place; ConfigError when there is none, or when it cannot be trained with."""
        processor = put_template(super().equip(processor), self.template)
        return check_template(processor) if self._through_template() else processor

    def ends(self, processor: Processor) -> tuple[int, ...]:
        """Return the end token, and the token the template closes a turn with."""
        return answer_ends(processor) if self._through_template() else super().ends(processor)

    def agreement(self, rows: Dataset, processor: Processor) -> Agreement | None:
        """Compare the first rows with what the template gives at inference; None for rows without a template."""
        if not self._through_template():
            return None
        some = self._read(rows.select(range(min(_COMPARED, len(rows)))))
        groups = dialogues(some, self.format, learn=self.learn, turns=self.turns)
        return agreement([dialogue for group in groups for dialogue in group], processor)

    def prepare(self, rows: Dataset, processor: Processor, *, first: int = 0) -> Prepared:
        """Return conversations as `input_ids` and `trained`; those that are too long, or teach nothing, are treated as
        the task says."""
        counts: Counter[str] = Counter()
        kept: list[Conversation] = []
        barren: list[int] = []
        long: dict[int, int] = {}
        for source in encoded(
            self._read(rows), self.format, processor, learn=self.learn, turns=self.turns, first=first
        ):
            size = len(source.conversation.input_ids)
            if size > self.max_length and self.too_long == "error":
                long[source.row] = size
                continue
            parts = fitted(source, self.max_length, self.too_long, counts) if learns(source.conversation) else None
            useful = [part for part in parts or () if learns(part)]
            if not useful and parts != []:  # none is left of a row that was dropped for its length, and counted
                barren.append(source.row)
            else:
                counts["parts with nothing to learn"] += len(parts or ()) - len(useful)
            kept += useful
        refused = [self._too_long(row, size) for row, size in long.items()]
        if self.nothing_to_learn == "error":
            refused += map(self._nothing, barren)
        if refused:
            raise BadRowsError(sorted(refused, key=lambda problem: problem.row or 0))
        counts["nothing to learn"] = len(barren)
        return Prepared(_samples(kept), {reason: count for reason, count in counts.items() if count})

    def _too_long(self, row: int, size: int) -> BadRow:
        detail = f"{size:,} tokens, task.max_length is {self.max_length}"
        mend = "raise it, or say what becomes of longer rows: task.too_long: truncate, split or drop"
        return BadRow("too long", mend, detail, row=row, column=self._column())

    def _nothing(self, row: int) -> BadRow:
        detail = f"no token that task.learn: {self.learn} trains on stands before task.max_length: {self.max_length}"
        mend = "mend it, or leave such rows out with task.nothing_to_learn: drop"
        return BadRow("nothing to learn", mend, detail, row=row, column=self._column())

    def _column(self) -> str:
        return next(iter(self.columns()))

    def facts(self, samples: Dataset) -> dict[str, Any]:
        """Return the tokens, and how many of them are learned."""
        learned = sum(int(row[1:].sum()) for row in samples.with_format("numpy")["trained"][:])
        return super().facts(samples) | {"counted": learned}

    def metrics(self) -> dict[str, Metric]:
        """Return `exact_match`, where it is asked for."""
        return {"exact_match": Accuracy(name="exact_match")} if self.exact_match else {}

    def predict(self, model: PreTrainedModel, batch: Batch, processor: Processor) -> dict[int, Prediction]:
        """Return the first learned answer of each row, as the model gives it and as it is wanted, where that is
        measured."""
        if not self.exact_match:
            return {}
        from trainworks.generation import continued, until_end

        ends = self.ends(processor)
        rows = (batch[name].cpu().numpy() for name in ("input_ids", "labels"))
        asked = [_exchange(*row) for row in zip(*rows, strict=True)]
        prompts, answers = [prompt for prompt, _ in asked], [until_end(answer, ends) for _, answer in asked]
        most = 1 + max(map(len, answers))
        said = continued(model, prompts, ends=ends, pad=processor.pad_token_id, most=most)
        texts = (
            [text.strip() for text in processor.batch_decode(part, skip_special_tokens=True)]
            for part in (said, answers)
        )
        return {
            index: Prediction(output, reference)
            for index, weight, output, reference in zip(
                batch["index"].tolist(), batch["weight"].tolist(), *texts, strict=True
            )
            if weight  # a filler's labels do not say where its answer is
        }

    def prompt(self, row: dict[str, Any]) -> int:
        """Give everything before the first token that is learned."""
        return max(1, int(np.argmax(row["trained"])))


def _exchange(ids: NDArray[Any], labels: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return what stands before the first learned answer, and the answer; labels are the tokens that follow."""
    learned = labels != IGNORED
    begin = int(np.argmax(learned))
    after = np.flatnonzero(~learned[begin:])
    return ids[: begin + 1], labels[begin : begin + int(after[0])] if len(after) else labels[begin:]


def _samples(conversations: Sequence[Conversation]) -> Dataset:
    return table(
        {
            "input_ids": ragged([conversation.input_ids for conversation in conversations], np.int32),
            "trained": ragged([conversation.trained for conversation in conversations], np.bool_),
            "length": np.array([len(conversation.input_ids) - 1 for conversation in conversations], dtype=np.int64),
        }
    )
