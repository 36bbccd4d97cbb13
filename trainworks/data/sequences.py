"""Rows of any format as token sequences with a mask of what is learned, none longer than a limit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainworks.data.bad_rows import BadRow, BadRowsError, excerpt
from trainworks.data.conversations import Dialogue, Row, batches, dialogues
from trainworks.data.templates import Conversation, encode_dialogues

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["POLICIES", "Encoded", "encoded", "fitted", "learns", "split_dialogue"]

Tokenizer = Any

IGNORED = -100
MASKS = ("labels", "trained", "assistant_masks")
"""Columns that say which tokens of a tokenized row are learned; `labels` with -100 for those that are not."""


class Encoded(NamedTuple):
    """A row as tokens."""

    row: int
    conversation: Conversation
    split: Callable[[int], list[Conversation]]
    """Return it in parts of at most so many tokens."""


def learns(conversation: Conversation) -> bool:
    """Tell whether there is anything to learn; nothing predicts the first token."""
    return bool(conversation.trained[1:].any())


# Rows to tokens


def encoded(
    rows: Dataset, shape: str, tokenizer: Tokenizer, *, learn: str = "all", turns: str = "together", first: int = 0
) -> Iterator[Encoded]:
    """Yield every row of a format as tokens; `learn` and `turns` are those of `dialogues`, for formats that go through
    the chat template.

    BadRowsError names a row, numbered from `first`, that cannot be used; DataError one that cannot be rendered.
    """
    if shape in _PLAIN:
        for batch in batches(rows, first=first):
            yield from _PLAIN[shape](batch, tokenizer)
        return
    for group in dialogues(rows, shape, learn=learn, turns=turns, first=first):
        for dialogue, conversation in zip(group, encode_dialogues(group, tokenizer), strict=True):
            yield Encoded(dialogue.row, conversation, partial(split_dialogue, dialogue, tokenizer))


def _refused(row: int, column: str, reason: str, mend: str, detail: str = "", found: Any = "") -> BadRowsError:
    return BadRowsError([BadRow(reason, mend, detail, excerpt(str(found)), row=row, column=column)])


def _texts(batch: list[tuple[int, Row]], tokenizer: Tokenizer) -> Iterator[Encoded]:
    """Yield texts, every token learned, the end token last."""
    texts = [row["text"] for _, row in batch]
    for (number, _), ids in zip(batch, tokenizer(texts, verbose=False)["input_ids"], strict=True):
        closed = ids if ids and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]
        # The end token alone would teach to say nothing.
        yield _sequence(number, closed, np.full(len(closed), bool(texts[number - batch[0][0]].strip())))


def _tokenized(batch: list[tuple[int, Row]], tokenizer: Tokenizer) -> Iterator[Encoded]:
    """Yield rows that are token ids already; a column of masks, where there is one, says what is learned of each."""
    for number, row in batch:
        ids, name = row["input_ids"], next((name for name in MASKS if name in row), None)
        for column, values in (("input_ids", ids), *([(name, row[name])] if name else [])):
            if not isinstance(values, list) or not all(isinstance(value, int) for value in values):
                raise _refused(number, column, "not whole numbers", "give a list of whole numbers", found=values)
        if not all(0 <= token < len(tokenizer) for token in ids):
            raise _refused(
                number, "input_ids", "unknown token", f"numbers go from 0 to {len(tokenizer) - 1:,}", found=ids
            )
        held = row[name] if name else [1] * len(ids)
        if name and len(held) != len(ids):
            detail = f"{len(ids)} input_ids and {len(held)} {name}"
            raise _refused(number, name, "other length", "they must be as many", detail)
        if name == "labels" and any(label not in (IGNORED, token) for label, token in zip(held, ids, strict=True)):
            mend = (
                f"a label is {IGNORED} or the token of input_ids at the same place; labels are not shifted beforehand"
            )
            raise _refused(number, name, "labels of other tokens", mend, found=held)
        yield _sequence(number, ids, np.array(held) != IGNORED if name == "labels" else np.array(held, dtype=np.bool_))


def _sequence(number: int, ids: Sequence[int], trained: NDArray[np.bool_]) -> Encoded:
    conversation = Conversation(np.array(ids, dtype=np.int32), trained)
    return Encoded(number, conversation, partial(_chunks, conversation))


_PLAIN: dict[str, Callable[[list[tuple[int, Row]], Tokenizer], Iterator[Encoded]]] = {
    "text": _texts,
    "tokens": _tokenized,
}
"""The formats that no template touches."""


# To a length


def _chunks(conversation: Conversation, limit: int) -> list[Conversation]:
    """Cut to pieces that share a token, so that each but the very first is predicted once."""
    starts = range(0, len(conversation.input_ids) - 1, limit - 1)
    return [conversation.cut(start, start + limit) for start in starts]


def split_dialogue(dialogue: Dialogue, tokenizer: Tokenizer, limit: int) -> list[Conversation]:
    """Cut a dialogue before user turns, as few times as its length asks for; every part begins with the system turn.

    In a part there may be nothing to learn. BadRowsError when one exchange alone is too long.
    """
    head = next(
        (turn for turn, message in enumerate(dialogue.messages) if message["role"] not in ("system", "developer")), 0
    )
    borders = [turn for turn, message in enumerate(dialogue.messages) if message["role"] == "user" and turn > head]
    edges = [head, *borders, len(dialogue.messages)]
    parts: list[Conversation] = []
    begin = 0
    while begin < len(edges) - 1:
        end, part = _longest(dialogue, head, edges[begin:], tokenizer, limit)
        begin += end
        parts.append(part)
    return parts


def _longest(
    dialogue: Dialogue, head: int, edges: Sequence[int], tokenizer: Tokenizer, limit: int
) -> tuple[int, Conversation]:
    """Return how many exchanges from the first of `edges` on fit, and their tokens."""
    best: tuple[int, Conversation] | None = None
    shift = edges[0] - head
    for count, end in enumerate(edges[1:], 1):
        part = dialogue._replace(
            messages=[*dialogue.messages[:head], *dialogue.messages[edges[0] : end]],
            learned=tuple(turn - shift for turn in dialogue.learned if edges[0] <= turn < end),
        )
        (conversation,) = encode_dialogues([part], tokenizer)
        if len(conversation.input_ids) > limit:
            break
        best = count, conversation
    if best is None and not part.learned:
        return 1, conversation  # left out, as every part in which nothing is learned
    if best is None:
        size = len(conversation.input_ids)
        detail = f"turn {edges[0]} and its answer alone are {size} tokens, task.max_length is {limit}"
        mend = "raise it, or say task.too_long: truncate or drop"
        raise _refused(dialogue.row, "messages", "too long to split", mend, detail)
    return best


Fit = Callable[[Encoded, int, Counter[str]], list[Conversation]]


def fitted(source: Encoded, limit: int, policy: str, counts: Counter[str]) -> list[Conversation]:
    """Return what becomes of a row under a length limit; `counts` learns what was lost."""
    if len(source.conversation.input_ids) <= limit:
        return [source.conversation]
    return POLICIES[policy](source, limit, counts)


def _truncate(source: Encoded, limit: int, counts: Counter[str]) -> list[Conversation]:
    counts["rows cut"] += 1
    counts["tokens cut"] += len(source.conversation.input_ids) - limit
    return [source.conversation.cut(0, limit)]


def _split(source: Encoded, limit: int, counts: Counter[str]) -> list[Conversation]:
    counts["rows split"] += 1
    return source.split(limit)


def _drop(source: Encoded, limit: int, counts: Counter[str]) -> list[Conversation]:
    counts["too long"] += 1
    return []


POLICIES: dict[str, Fit] = {"truncate": _truncate, "split": _split, "drop": _drop}
"""What can become of a row that is too long, where that is no error."""
