"""Shapes of preference rows: which columns tell one, and how a row becomes answers to one prompt.

A row is a pair, a chosen and a rejected answer, or one answer with a label that says whether it is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from trainworks.data.bad_rows import BadRow, excerpt
from trainworks.data.columns import Kind
from trainworks.data.conversations import (
    LEARN,
    Dialogue,
    FlawError,
    Read,
    Row,
    batches,
    dialogue_of,
    exchange,
    turns_of,
)
from trainworks.data.conversations import recognised as recognised_among
from trainworks.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["SHAPES", "Compared", "Shape", "compared", "flaws", "recognised"]

CHOSEN, REJECTED = "chosen", "rejected"
_ASKING = ("system", "developer", "user", "tool")
_LABELS = (True, False, 0, 1)


class Compared(NamedTuple):
    """A row's answers: the chosen and the rejected one, or the only one."""

    row: int
    """The row's number in the split."""
    answers: tuple[Dialogue, ...]
    desirable: tuple[bool, ...]
    """Whether each is an answer that is wanted."""
    columns: Row
    """The row as it was read."""


class Shape(NamedTuple):
    """A shape of rows."""

    columns: dict[str, Kind]
    """The columns that tell it."""
    reads: dict[str, Callable[[Row], Read]]
    """How each answer is read, by the column it is in."""

    @property
    def is_paired(self) -> bool:
        """Whether a row holds two answers."""
        return len(self.reads) == 2


def _text(column: str) -> Callable[[Row], Read]:
    def read(row: Row) -> Read:
        said = exchange(row, row["prompt"], row[column])
        return said._replace(given=len(said.messages) - 1)

    return read


def _messages(column: str) -> Callable[[Row], Read]:
    def read(row: Row) -> Read:
        given = turns_of(row["prompt"], "prompt")
        return Read([*given, *turns_of(row[column], column)], len(given))

    return read


def _whole(column: str) -> Callable[[Row], Read]:
    def read(row: Row) -> Read:
        chosen, rejected = (turns_of(row[name], name) for name in (CHOSEN, REJECTED))
        shared = next(
            (place for place, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other),
            min(len(chosen), len(rejected)),
        )
        return Read(turns_of(row[column], column), shared)

    return read


def _shape(read: Callable[[str], Callable[[Row], Read]], prompt: Kind | None, *answers: str) -> Shape:
    kind = prompt or "messages"
    columns = ({} if prompt is None else {"prompt": prompt}) | dict.fromkeys(answers, kind)
    labels: dict[str, Kind] = {"label": "label"} if len(answers) == 1 else {}
    return Shape(columns | labels, {answer: read(answer) for answer in answers})


SHAPES: dict[str, Shape] = {
    "pairs": _shape(_text, "text", CHOSEN, REJECTED),
    "pairs-messages": _shape(_messages, "messages", CHOSEN, REJECTED),
    "pairs-conversations": _shape(_whole, None, CHOSEN, REJECTED),
    "labelled": _shape(_text, "text", "completion"),
    "labelled-messages": _shape(_messages, "messages", "completion"),
}
"""Every shape there is, in the order in which they are looked for."""


def recognised(rows: Dataset) -> str:
    """Return the shape that the columns tell; DataError when they tell none."""
    return recognised_among(rows, SHAPES, example="{prompt: question, chosen: better, rejected: worse}")


def compared(rows: Dataset, shape: str, *, first: int = 0, beside: tuple[str, ...] = ()) -> Iterator[list[Compared]]:
    """Yield the rows of a shape, a batch at a time, with the columns named in `beside`.

    DataError names a row, numbered from `first`, that cannot be used.
    """
    of = SHAPES[shape]
    for batch in batches(rows, first=first, columns=(*of.columns, *beside)):
        group = []
        for number, row in batch:
            try:
                group.append(_compared(number, row, of))
            except FlawError as flaw:
                raise DataError(f"row {number}: {flaw}") from flaw
        yield group


def flaws(rows: Dataset, shape: str) -> Iterator[BadRow]:
    """Yield what is wrong with rows of a shape, one problem a row, by the row's number from 0."""
    of = SHAPES[shape]
    for batch in batches(rows, first=0, columns=of.columns):
        for number, row in batch:
            try:
                _compared(number, row, of)
            except FlawError as flaw:
                column = next(iter(of.reads))
                yield BadRow(flaw.reason, flaw.mend, flaw.detail, excerpt(repr(row[column])), row=number, column=column)


def _compared(number: int, row: Row, shape: Shape) -> Compared:
    said = {column: read(row) for column, read in shape.reads.items()}
    for column, read in said.items():
        _check_answer(read, column)
    first, *others = said.values()
    if any(first.messages[first.given :] == other.messages[other.given :] for other in others):
        raise FlawError("same answers", "chosen and rejected say the same")
    answers = tuple(dialogue_of(number, row, lambda _, read=read: read, LEARN["all"]) for read in said.values())  # type: ignore[misc]
    for column, answer in zip(said, answers, strict=True):
        if not answer.learned:
            raise FlawError("empty answer", f"column '{column}' says nothing after the prompt")
    return Compared(number, answers, (True, False) if shape.is_paired else (_label(row["label"]),), row)


def _check_answer(read: Read, column: str) -> None:
    """See that what follows the prompt is an answer to it."""
    if not read.given:
        detail = f"{CHOSEN} and {REJECTED} begin with different messages"
        raise FlawError("prompt is not shared", detail, "both must begin with the same prompt, or name it in `prompt`")
    after = read.messages[read.given :]
    if after and isinstance(after[0], dict) and after[0].get("role") in _ASKING:
        detail = f"column '{column}' goes on with role {after[0]['role']!r:.80} where the assistant should answer"
        raise FlawError("prompt is not shared", detail, "both answers must follow the same prompt")


def _label(value: Any) -> bool:
    if value not in _LABELS:
        raise FlawError("unknown label", f"label {value!r:.80}", "a label is true (wanted) or false (not)")
    return bool(value)
