"""Extractive question answering: where in a text the answer to a question stands, or that it does not."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field, Strict

from trainworks.data.bad_rows import BadRow, BadRowsError, excerpt
from trainworks.data.cache import Prepared, ragged, table
from trainworks.data.columns import Kind, numbers_of, require_columns
from trainworks.data.text import pad, padded_by_end
from trainworks.errors import DataError
from trainworks.metrics import AnswerF1, ExactMatch, Metric, Prediction
from trainworks.record import Sample
from trainworks.tasks.base import Baseline, Processor, Task
from trainworks.tasks.text import padded

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedModel

    from trainworks.data.loading import Batch, Row

__all__ = ["QuestionAnswering"]

_SHOWN = 3
_SENTENCE = re.compile(r"(?<=[.!?])\s")


class QuestionAnswering(Task):
    """Find the answer to a question in a text.

    A long text is cut to parts that overlap, each with the question before it. The answer that is said is the likeliest
    of all parts; that there is none is as likely as in the part where it is least so. Questions on the same text hang
    together: intervals of held-out metrics are drawn by text. `data.holdout_by: context` holds a text out with all of
    them.
    """

    auto_class: ClassVar[str] = "AutoModelForQuestionAnswering"
    pipeline_tag: ClassVar[str] = "question-answering"

    type: Literal["question-answering"] = "question-answering"
    question: str = "question"
    """Column of the question."""
    context: str = "context"
    """Column of the text that it is about."""
    answers: str = "answers"
    """Column of the answers, `{text: [...], answer_start: [...]}`, each beginning at that character of the context. The
    first is learned, any counts as right; both lists are empty where there is no answer."""
    unanswerable: Literal["auto", "yes", "no"] = "auto"
    """Whether a question may have no answer, as in SQuAD 2.0; `auto`: where a training row has none."""
    null_threshold: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    """That there is no answer is said where its score is above the best answer's by more than this."""
    max_length: Annotated[int, Strict(), Field(gt=4)] = 384
    """Longest part in tokens, question and special ones included."""
    stride: Annotated[int, Strict(), Field(ge=0)] = 128
    """Tokens that a part has in common with the one before it; an answer longer than these may stand whole in none."""
    max_answer: Annotated[int, Strict(), Field(gt=0)] = 30
    """Longest answer in tokens that is said."""

    def columns(self) -> dict[str, Kind]:
        """Return the texts and the answers."""
        return {self.question: "text", self.context: "text", self.answers: "answers"}

    def equip(self, processor: Processor) -> Processor:
        """Pad with the end token where there is no padding token; ConfigError for a tokenizer that cannot serve."""
        return padded_by_end(processor)

    def resolve(self, rows: Dataset) -> Self:
        """Return the task with whether questions may have no answer; DataError where none of them has one."""
        require_columns(rows.select(range(0)), self.columns(), source="train")
        counts = pc.list_value_length(pc.struct_field(_arrow(rows, self.answers), "text"))
        if not pc.any(pc.greater(counts, 0)).as_py():
            raise DataError(f"column {self.answers!r}: no question has an answer: there is nothing to learn")
        found = "yes" if pc.any(pc.equal(counts, 0)).as_py() else "no"
        return self if self.unanswerable != "auto" else self.model_copy(update={"unanswerable": found})

    def stated(self) -> str:
        """Return whether a question may have no answer, for the log."""
        what = {"yes": "a question may have no answer", "no": "every question has an answer"}
        return what.get(self.unanswerable, "")

    def flaws(self, rows: Dataset) -> Iterator[BadRow]:
        """Yield rows that ask nothing, have nothing to read, or whose answers do not stand where they say."""
        columns = (rows[name][:] for name in (self.question, self.context, self.answers))
        for number, (question, context, answers) in enumerate(zip(*columns, strict=True)):
            if flaw := self._flaw(question, context, answers, number):
                yield flaw

    def _flaw(self, question: str, context: str, answers: dict[str, Any], row: int) -> BadRow | None:
        for column, text in ((self.question, question), (self.context, context)):
            if not text.strip():
                return BadRow(f"empty {column}", "give it a text, or leave the row out", row=row, column=column)
        texts, starts = answers["text"], answers["answer_start"]
        if texts is None or starts is None or len(texts) != len(starts):
            mend = "give each answer its text and where it starts; two empty lists where there is none"
            return BadRow("answers without places", mend, excerpt=excerpt(str(answers)), row=row, column=self.answers)
        if not texts and self.unanswerable == "no":
            mend = "give it an answer, or say task.unanswerable: yes"
            return BadRow("no answer", mend, excerpt=excerpt(question), row=row, column=self.answers)
        flaws = (_misplaced(context, text, start) for text, start in zip(texts, starts, strict=True))
        reason, detail, mend, found = next(filter(None, flaws), ("", "", "", ""))
        return BadRow(reason, mend, detail, excerpt(found), row=row, column=self.answers) if reason else None

    def prepare(self, rows: Dataset, processor: Processor, *, first: int = 0) -> Prepared:
        """Return the parts of each row, one after the other: the tokens, where each stands in the part's `text`, and
        the span that is learned, which is the place of `null` where the answer does not stand whole in the part.

        BadRowsError for a question that leaves no room for the text, and for a text without a token.
        """
        questions = [question.strip() for question in rows[self.question][:]]
        contexts, answers = rows[self.context][:], rows[self.answers][:]
        self._check_room(questions, processor, first)
        encoded = processor(
            questions,
            contexts,
            truncation="only_second",
            max_length=self.max_length,
            stride=self.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        parts = [_part(encoded, number, contexts, answers) for number in range(len(encoded["input_ids"]))]
        if empty := sorted({part.row for part in parts if not part.ends.any()}):
            mend = "give it a text"
            raise BadRowsError([BadRow("no tokens", mend, row=first + row, column=self.context) for row in empty])
        names = [name for name in encoded if name in ("input_ids", "attention_mask", "token_type_ids")]
        columns: dict[str, Any] = {name: ragged(encoded[name], np.int32) for name in names}
        columns["length"] = [len(ids) for ids in encoded["input_ids"]]
        columns["part"] = [part.number for part in parts]
        clusters = numbers_of(contexts)
        columns["cluster"] = [clusters[part.row] for part in parts]
        columns["text"] = [part.text for part in parts]
        columns |= {name: ragged([getattr(part, name) for part in parts], np.int32) for name in ("begins", "ends")}
        columns["null"] = nulls = [_null(ids, processor) for ids in encoded["input_ids"]]
        spans = [part.span or (null, null) for part, null in zip(parts, nulls, strict=True)]
        columns["start"], columns["end"] = zip(*spans, strict=True)
        columns["question"] = [questions[part.row] for part in parts]
        # Of questions that all have none, Arrow would not know that answers are texts.
        columns["answers"] = pa.array([answers[part.row]["text"] for part in parts], pa.list_(pa.string()))
        found = {part.row for part in parts if part.span}
        lost = sum(bool(held["text"]) and row not in found for row, held in enumerate(answers))
        return Prepared(table(columns), {"answers in no part": lost} if lost else {})

    def _check_room(self, questions: Sequence[str], processor: Processor, first: int) -> None:
        sizes = [len(ids) for ids in processor(questions, add_special_tokens=False, verbose=False)["input_ids"]]
        room = self.max_length - processor.num_special_tokens_to_add(pair=True)
        long = {row: size for row, size in enumerate(sizes, start=first) if room - size <= self.stride}
        mend = "raise it, lower the stride, or shorten the question"
        said = (
            f"of task.max_length {self.max_length} too few are left for a text, of which {self.stride} are task.stride"
        )
        if long:
            raise BadRowsError(
                [
                    BadRow("question too long", mend, f"{size:,} tokens; {said}", row=row, column=self.question)
                    for row, size in long.items()
                ]
            )

    def facts(self, samples: Dataset) -> dict[str, Any]:
        """Return the tokens, one counted span a part and, where questions may have no answer, how many have."""
        facts = super().facts(samples) | {"counted": len(samples)}
        if self.unanswerable != "yes":
            return facts
        answered = [bool(answers) for answers in _of_examples(samples)["answers"][:]]
        return facts | {"labels": {"answerable": sum(answered), "unanswerable": len(answered) - sum(answered)}}

    def collate(self, rows: Sequence[Row], processor: Processor, *, train: bool) -> Batch:
        """Return the model's inputs, [rows, longest], `context` of the same shape, which tells the text's tokens, and
        the places `null`, `start` and `end`, each [rows]."""
        import torch

        context = pad([row["ends"] > row["begins"] for row in rows], 0)
        places = {name: torch.tensor([int(row[name]) for row in rows]) for name in ("null", "start", "end")}
        return padded(rows, processor) | places | {"context": torch.from_numpy(context).bool()}

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """Return one for each row."""
        import torch

        return {"loss": torch.ones_like(batch["start"])}

    def loss(self, model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
        """Return each row's mean cross-entropy of the span's start and end in nats, over the text's tokens and
        `null`."""
        from torch.nn.functional import cross_entropy

        start, end = self._scores(model, batch)
        losses = [cross_entropy(*pair, reduction="none") for pair in ((start, batch["start"]), (end, batch["end"]))]
        return {"loss": (losses[0] + losses[1]) / 2}

    def _scores(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the scores of start and end, [rows, longest], minus infinity where a span cannot begin or end."""
        output = model(**self.inputs(batch))
        allowed = batch["context"].scatter(1, batch["null"][:, None], True)
        start, end = (
            scores.float().masked_fill(~allowed, float("-inf")) for scores in (output.start_logits, output.end_logits)
        )
        return start, end

    def predict(self, model: PreTrainedModel, batch: Batch, processor: Processor) -> dict[int, Prediction]:
        """Return what each part says, as a `_Said`; the reference is left to `join`."""
        from torch.nn.functional import pad as widened

        start, end = self._scores(model, batch)
        null = (start + end).gather(1, batch["null"][:, None]).squeeze(1)
        start, end = (scores.masked_fill(~batch["context"], float("-inf")) for scores in (start, end))
        # Every start with each of the ends from there on: [rows, longest, max_answer].
        ends = widened(end, (0, self.max_answer - 1), value=float("-inf")).unfold(1, self.max_answer, 1)
        best, place = (start[:, :, None] + ends).flatten(1).max(1)
        begin = place // self.max_answer
        said = (values.tolist() for values in (best, null, begin, begin + place % self.max_answer))
        return {
            index: Prediction(_Said(*each), None) for index, *each in zip(batch["index"].tolist(), *said, strict=True)
        }

    def join(self, parts: Sequence[Prediction], rows: Mapping[str, Sequence[Any]]) -> Prediction:
        """Return the answer's text, empty where there is said to be none, and the texts of the right ones."""
        said: list[_Said] = [part.prediction for part in parts]
        place = max(range(len(said)), key=lambda number: said[number].score)
        best, null = said[place], min(each.null for each in said)
        begin, end = rows["begins"][place][best.start], rows["ends"][place][best.end]
        silent = self.unanswerable == "yes" and null - best.score > self.null_threshold
        return Prediction("" if silent else rows["text"][place][begin:end].strip(), list(rows["answers"][0]))

    def show(self, model: PreTrainedModel, rows: Dataset, processor: Processor) -> tuple[Sample, ...]:
        """Return the first questions with their answers, right and said."""
        import torch

        ends = [*np.flatnonzero(_parts(rows) == 0).tolist(), len(rows)][: _SHOWN + 1]
        some = rows.select(range(ends[-1]))
        batch = self.collate(list(some.with_format("numpy")), processor, train=False)
        batch = {name: values.to(model.device) for name, values in batch.items()} | {"index": torch.arange(len(some))}
        said = self.predict(model, batch, processor)
        shown = []
        for first, end in pairwise(ends):
            columns = some[first:end]
            joined = self.join([said[row] for row in range(first, end)], columns)
            right, answer = (text or "(no answer)" for text in (" | ".join(joined.reference), joined.prediction))
            shown.append(Sample(prompt=columns["question"][0], reference=right, output=answer))
        return tuple(shown)

    def metrics(self) -> dict[str, Metric]:
        """Return exact match and F1; where questions may have no answer, also the F1 of those that have one and of
        those that have none."""
        if self.unanswerable != "yes":
            return {"exact_match": ExactMatch(), "f1": AnswerF1()}
        return {
            "exact_match": ExactMatch("2.0"),
            "f1": AnswerF1("2.0"),
            "f1_answerable": AnswerF1("2.0", "answerable", "f1_answerable"),
            "f1_unanswerable": AnswerF1("2.0", "unanswerable", "f1_unanswerable"),
        }

    def baselines(self, train: Dataset, evaluation: Dataset) -> dict[str, Baseline]:
        """Return `first sentence`: always that of the text; `usual place`: always the tokens that are, counted from the
        text's first, most often an answer's first and as many as most answers have; and `no answer`: to say always that
        there is none, where that may be so."""
        firsts = np.flatnonzero(_parts(evaluation) == 0).tolist()
        examples = _of_examples(evaluation)
        texts, wanted = examples["text"][:], examples["answers"][:]
        said = {
            "first sentence": [_SENTENCE.split(text.strip(), maxsplit=1)[0] for text in texts],
            "usual place": _at_usual_place(_of_examples(train), examples),
        }
        if self.unanswerable == "yes":
            said["no answer"] = [""] * len(texts)
        return {
            name: Baseline(predictions=dict(zip(firsts, map(Prediction, answers, wanted), strict=True)))
            for name, answers in said.items()
        }


class _Said(NamedTuple):
    """What a model says of one part."""

    score: float
    """Of the best span in the text: its start's score plus its end's."""
    null: float
    """The same of `null`, which stands for no answer."""
    start: int
    end: int
    """Its first and its last token."""


class _Part(NamedTuple):
    """A part of a row: a stretch of its context."""

    row: int
    number: int
    text: str
    begins: NDArray[np.int64]
    ends: NDArray[np.int64]
    """Where each token begins and ends in `text`, [tokens]; both 0 for tokens of anything else."""
    span: tuple[int, int] | None
    """The first and the last token of the answer, where all of it is there."""


def _part(encoded: Any, place: int, contexts: Sequence[str], answers: Sequence[dict[str, Any]]) -> _Part:
    owners = encoded["overflow_to_sample_mapping"]
    row, number = owners[place], place - bisect_left(owners, owners[place])
    is_last = place + 1 == len(owners) or owners[place + 1] != row
    offsets = np.array(encoded["offset_mapping"][place])
    inside = np.array([which == 1 for which in encoded.sequence_ids(place)]) & (offsets[:, 1] > offsets[:, 0])
    begins, ends = np.where(inside, offsets.T, 0)
    left, right = (int(begins[inside].min()), int(ends.max())) if inside.any() else (0, 0)
    reach = 0 if number == 0 else left, len(contexts[row]) if is_last else right
    span = _span(begins, ends, answers[row], reach)
    begins, ends = np.where(inside, (begins - left, ends - left), 0)
    return _Part(row, number, contexts[row][left:right], begins, ends, span)


def _span(
    begins: NDArray[np.int64], ends: NDArray[np.int64], answers: dict[str, Any], reach: tuple[int, int]
) -> tuple[int, int] | None:
    """Return the tokens of the first answer, where it stands within the characters that the part reaches over."""
    if not answers["text"]:
        return None
    text, start = answers["text"][0], answers["answer_start"][0]
    first, last = start + len(text) - len(text.lstrip()), start + len(text.rstrip())
    inside = (ends > first) & (begins < last) & (ends > begins)
    if first < reach[0] or last > reach[1] or not inside.any():
        return None
    tokens = np.flatnonzero(inside)
    return int(tokens[0]), int(tokens[-1])


def _misplaced(context: str, text: str | None, start: int | None) -> tuple[str, str, str, str] | None:
    """Return reason, detail, mend and what was found of an answer that does not stand where it says."""
    if text is None or start is None or not text.strip():
        return "empty answer", "", "leave it out; two empty lists where there is no answer", str(text)
    if start >= 0 and context.startswith(text, start):
        return None
    places = [found.start() for found in re.finditer(re.escape(text), context)]
    if not places:
        return "answer not in the context", "", "an answer is a part of the context, sign by sign", text
    nearest = min(places, key=lambda place: abs(place - start))
    detail = f"answer_start is {start}, the answer stands at {nearest}"
    return "answer at another place", detail, f"set it to {nearest}: it counts characters, from 0", text


def _null(ids: Sequence[int], processor: Processor) -> int:
    """Return the place that stands for no answer: that of the token for the whole text, or the first."""
    return ids.index(processor.cls_token_id) if processor.cls_token_id in ids else 0


def _at_usual_place(train: Dataset, examples: Dataset) -> list[str]:
    """Return what stands in each example's text where answers most often do in training."""
    rows = train.with_format("numpy")
    starts, spans = rows["start"][:] - _text_begins(rows), rows["end"][:] - rows["start"][:]
    there = rows["start"][:] != rows["null"][:]
    start, span = (int(np.bincount(values[there], minlength=1).argmax()) for values in (starts, spans))
    found = []
    for row, begin in zip(examples.with_format("numpy"), _text_begins(examples.with_format("numpy")), strict=True):
        last = int(np.flatnonzero(row["ends"])[-1])
        first = min(begin + start, last)
        found.append(row["text"][row["begins"][first] : row["ends"][min(first + span, last)]].strip())
    return found


def _text_begins(rows: Dataset) -> NDArray[np.int64]:
    """Return the place of the first token of each part's text."""
    return np.array([int((ends > 0).argmax()) for ends in rows["ends"][:]])


def _arrow(rows: Dataset, column: str) -> Any:
    return rows.select_columns([column]).with_format("arrow")[:].column(column)


def _parts(rows: Dataset) -> NDArray[np.int64]:
    return np.asarray(rows.with_format("numpy")["part"][:])


def _of_examples(rows: Dataset) -> Dataset:
    """Return the first part of each example."""
    return rows.with_format(None).select(np.flatnonzero(_parts(rows) == 0))
