"""Text to token ids: documents to blocks, conversations to a template's text with a mask of what is learned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainworks.data.cache import digest
from trainworks.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["FORMATS", "Conversation", "blocks", "conversations", "encode", "pad", "tokenizer_digest"]

Ids = NDArray[np.int32]
Tokenizer = Any
Message = Mapping[str, Any]

ROLES = ("system", "user", "assistant", "tool")
IGNORED = -100
_BATCH = 1000


class Conversation(NamedTuple):
    """One conversation as tokens: `input_ids` [length] and, of the same shape, which of them are learned."""

    input_ids: Ids
    trained: NDArray[np.bool_]


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Return a SHA-256 of everything that decides what a tokenizer makes of a text."""
    return digest(
        tokenizer.backend_tokenizer.to_str(),
        str(tokenizer.chat_template),
        str(sorted(tokenizer.special_tokens_map.items())),
    )


def encode(texts: Iterable[str], tokenizer: Tokenizer, *, special: bool = True) -> Iterator[list[int]]:
    """Yield the ids of each text, many texts at a time; `special` adds what the tokenizer puts around a text by
    itself."""
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == _BATCH:
            yield from tokenizer(batch, add_special_tokens=special, verbose=False)["input_ids"]
            batch = []
    if batch:
        yield from tokenizer(batch, add_special_tokens=special, verbose=False)["input_ids"]


def blocks(documents: Iterable[Sequence[int]], size: int, *, end: int) -> list[Ids]:
    """Join documents, each closed by the `end` token, and cut them to blocks of `size` predictions.

    A block holds `size` + 1 tokens and shares its last with the next one's first, so that every token but the very
    first is predicted exactly once. The last block is as short as what is left.
    """
    stream = np.concatenate([np.asarray(_closed(document, end), dtype=np.int32) for document in documents])
    return [stream[start : start + size + 1] for start in range(0, len(stream) - 1, size)]


def _closed(document: Sequence[int], end: int) -> list[int]:
    return [*document] if document and document[-1] == end else [*document, end]


def _from_messages(row: Message) -> list[Message]:
    return list(row["messages"])


def _from_prompt(row: Message) -> list[Message]:
    return _turns(row, row["prompt"], row["completion"])


def _from_instruction(row: Message) -> list[Message]:
    context = row.get("input")
    prompt = f"{row['instruction']}\n\n{context}" if context else row["instruction"]
    return _turns(row, prompt, row["output"])


def _turns(row: Message, prompt: str, answer: str) -> list[Message]:
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return [*system, {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Message], list[Message]]]] = {
    "messages": (("messages",), _from_messages),
    "prompt-completion": (("prompt", "completion"), _from_prompt),
    "instruction": (("instruction", "output"), _from_instruction),
}
"""Shapes of conversation rows: the columns that tell one, and how it becomes messages."""


def conversations(rows: Dataset, shape: str, tokenizer: Tokenizer) -> Iterator[Conversation]:
    """Yield each row through the tokenizer's own chat template, with a mask of the assistant's tokens.

    DataError names the row whose roles or texts are wrong, or whose template does not nest, so that no mask can be
    trusted.
    """
    from jinja2 import TemplateError

    to_messages = FORMATS[shape][1]
    for number, row in enumerate(rows):
        try:
            messages = _checked(to_messages(row))
            yield _render(messages, tokenizer)
        except (ValueError, TemplateError) as error:
            raise DataError(f"row {number}: {error}") from error


def _checked(messages: list[Message]) -> list[Message]:
    for turn, message in enumerate(messages):
        if message.get("role") not in ROLES:
            raise ValueError(f"turn {turn}: role {message.get('role')!r}; allowed: {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise ValueError(
                f"turn {turn} ({message['role']}): content must be text, found {message.get('content')!r:.80}"
            )
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        raise ValueError("no assistant turn with text in it, so there is nothing to learn")
    return messages


def _render(messages: list[Message], tokenizer: Tokenizer) -> Conversation:
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = np.array([start for start, _ in tokens["offset_mapping"]])
    trained = np.zeros(len(starts), dtype=bool)
    for begin, end in _spans(messages, text, tokenizer):
        trained |= (starts >= begin) & (starts < end)
    return Conversation(np.asarray(tokens["input_ids"], dtype=np.int32), trained)


def _spans(messages: list[Message], text: str, tokenizer: Tokenizer) -> Iterator[tuple[int, int]]:
    """Yield where each assistant turn stands in the text, found by rendering the conversation up to it and through
    it."""
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:turn], tokenize=False, add_generation_prompt=True)
        through = tokenizer.apply_chat_template(messages[: turn + 1], tokenize=False)
        if not (text.startswith(through) and through.startswith(before)):
            raise ValueError(
                f"turn {turn}: the chat template does not nest (the text up to this turn is not how the whole "
                "conversation begins), so what the assistant said cannot be told from the rest; use a template that "
                "appends turns, as a .jinja file in task.template"
            )
        yield len(before), len(through)


def pad(rows: Sequence[NDArray[Any]], value: int) -> NDArray[np.int64]:
    """Stack rows of different length to [rows, longest], filled up on the right."""
    padded = np.full((len(rows), max(map(len, rows))), value, dtype=np.int64)
    for place, row in enumerate(rows):
        padded[place, : len(row)] = row
    return padded
