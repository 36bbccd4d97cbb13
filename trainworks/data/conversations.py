"""Shapes of conversation rows: which columns tell one, and how a row becomes messages for a chat template."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from trainworks.data.bad_rows import BadRow, excerpt
from trainworks.data.columns import Kind, listed
from trainworks.data.nesting import DEEPEST, is_deep
from trainworks.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "FORMATS",
    "LEARN",
    "Dialogue",
    "FlawError",
    "Format",
    "Read",
    "batches",
    "dialogue_of",
    "dialogues",
    "exchange",
    "flaws",
    "recognised",
    "turns_of",
]

Message = dict[str, Any]
Row = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
_BESIDE = {"system", "tools", "input", "labels", "trained", "assistant_masks"}
"""Columns that are read where they are there, and tell no format. Any other may hold sound that cannot be decoded."""
_BATCH = 1000
_EXAMPLE = "{prompt: question, completion: answer}"


class Dialogue(NamedTuple):
    """A conversation as a chat template takes it."""

    row: int
    """Its row's number in the split."""
    messages: list[Message]
    learned: tuple[int, ...]
    """The turns that are learned, as places in `messages`; all of them the assistant's."""
    tools: list[dict[str, Any]] | None = None


class FlawError(ValueError):
    """What is wrong with a row: the kind of mistake, what it is here, and the mend."""

    def __init__(self, reason: str, detail: str, mend: str = "mend or leave out the row") -> None:
        self.reason, self.detail, self.mend = reason, detail, mend
        super().__init__(f"{detail}; {mend}")


class Read(NamedTuple):
    """What a row says, before it is decided what is learned."""

    messages: list[Any]
    given: int = 0
    """Leading messages that are given and never learned."""


class Format(NamedTuple):
    """A shape of rows."""

    columns: dict[str, Kind]
    """The columns that tell it."""
    read: Callable[[Row], Read] | None
    """How a row becomes messages; None for rows that no template touches."""


def _from_messages(row: Row) -> Read:
    return Read(turns_of(row["messages"], "messages"))


def _from_sharegpt(row: Row) -> Read:
    turns = turns_of(row["conversations"], "conversations")
    return Read([*_system(row), *(_openai(turn, number) for number, turn in enumerate(turns))])


def _from_prompt(row: Row) -> Read:
    return exchange(row, row["prompt"], row["completion"])


def _from_prompt_messages(row: Row) -> Read:
    given = turns_of(row["prompt"], "prompt")
    return Read([*given, *turns_of(row["completion"], "completion")], len(given))


def _from_instruction(row: Row) -> Read:
    context = row.get("input")
    prompt = f"{row['instruction']}\n\n{context}" if context else row["instruction"]
    return exchange(row, prompt, row["output"])


FORMATS: dict[str, Format] = {
    "messages": Format({"messages": "messages"}, _from_messages),
    "sharegpt": Format({"conversations": "any"}, _from_sharegpt),
    "prompt-completion": Format({"prompt": "text", "completion": "text"}, _from_prompt),
    "prompt-completion-messages": Format({"prompt": "messages", "completion": "messages"}, _from_prompt_messages),
    "instruction": Format({"instruction": "text", "output": "text"}, _from_instruction),
    "tokens": Format({"input_ids": "any"}, None),
    "text": Format({"text": "text"}, None),
}
"""Every shape there is, in the order in which they are looked for."""


def turns_of(value: Any, column: str) -> list[Any]:
    """Return a column's messages; FlawError when they are none."""
    if not isinstance(value, list) or not value:
        raise FlawError("no messages", f"column '{column}' must be a list of messages, found {value!r:.80}")
    return value


def _system(row: Row) -> list[Message]:
    return [{"role": "system", "content": row["system"]}] if row.get("system") else []


def exchange(row: Row, prompt: str, answer: str) -> Read:
    """Return a question and its answer as messages, behind what the row's `system` says."""
    return Read([*_system(row), {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}])


def _openai(turn: Any, number: int) -> Message:
    """Return a ShareGPT turn (`from` and `value`, or `role` and `content`) as an OpenAI message."""
    if not isinstance(turn, Mapping):
        raise FlawError("no message", f"turn {number}: expected an object with from and value, found {turn!r:.80}")
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    role, said = turn.get("from") or turn.get("role"), turn.get("value", turn.get("content"))
    if role == "function_call":
        call = _json(said, f"turn {number} (function_call)")
        calls = call if isinstance(call, list) else [call]
        return rest | {
            "role": "assistant",
            "tool_calls": [{"type": "function", "function": function} for function in calls],
        }
    return rest | {"role": _SHAREGPT_ROLES.get(str(role), role), "content": said}


def _json(value: Any, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        held = json.loads(value)
        json.dumps(held, ensure_ascii=False).encode()  # halves of a character, which no tokenizer takes
    except (ValueError, RecursionError) as error:
        detail = f"{where}: expected JSON, found {value!r:.80} ({excerpt(str(error))})"
        raise FlawError("broken JSON", detail) from error
    if is_deep(held):
        raise FlawError("nested too deep", f"{where}: over {DEEPEST} levels of lists and objects")
    return held


def batches(rows: Dataset, *, first: int, columns: Iterable[str] | None = None) -> Iterator[list[tuple[int, Row]]]:
    """Yield rows with their numbers, counted from `first`, a thousand at a time; of the columns named, or that some
    format reads, and of those read beside them."""
    named = columns or (name for shape in FORMATS.values() for name in shape.columns)
    known = {*named} | _BESIDE
    read = [name for name in rows.column_names if name in known]
    for columns in _values(rows.select_columns(read), read):
        count = len(next(iter(columns.values())))
        yield [(first + place, {name: values[place] for name, values in columns.items()}) for place in range(count)]
        first += count


def _values(rows: Dataset, columns: list[str]) -> Iterator[dict[str, list[Any]]]:
    try:
        yield from rows.with_format(None).iter(_BATCH)
    except (ImportError, OSError, OverflowError, ValueError) as error:  # a time that Python cannot hold, no picture
        found = excerpt(str(error))
        raise DataError(f"columns {listed(columns)}: a value cannot be read: {found}; mend or rename it") from error


def recognised(rows: Dataset, formats: Mapping[str, Any] = FORMATS, *, example: str = _EXAMPLE) -> str:
    """Return the format that the columns tell, of those there are (each with its `columns`); DataError, with an example
    of a mend, when they tell none."""
    from pyarrow import types

    schema = rows.features.arrow_schema
    texts = {field.name for field in schema if types.is_string(field.type) or types.is_large_string(field.type)}
    told = [name for name, shape in formats.items() if shape.columns.keys() <= {*rows.column_names}]
    for name in told:
        if all((column in texts) == (kind == "text") for column, kind in formats[name].columns.items()):
            return name
    if told:
        return told[0]
    shapes = "; ".join(f"{name}: {', '.join(shape.columns)}" for name, shape in formats.items())
    raise DataError(
        f"no known shape of conversation: the columns are {listed(rows.column_names)}; known are {shapes}. "
        f"Rename yours, as in data.columns: {example}"
    )


def dialogues(
    rows: Dataset, shape: str, *, learn: str = "all", turns: str = "together", first: int = 0
) -> Iterator[list[Dialogue]]:
    """Yield the rows of a format as dialogues, a batch at a time.

    `learn` is a key of `LEARN`. With `turns="apart"` each learned turn has a dialogue of its own that ends with it.
    DataError names the row, numbered from `first`, and the turn whose role or content is wrong.
    """
    read = FORMATS[shape].read
    assert read is not None
    for batch in batches(rows, first=first):
        group = [_dialogue(number, row, read, LEARN[learn]) for number, row in batch]
        yield group if turns == "together" else [part for dialogue in group for part in _apart(dialogue)]


def _apart(dialogue: Dialogue) -> list[Dialogue]:
    parts = [dialogue._replace(messages=dialogue.messages[: turn + 1], learned=(turn,)) for turn in dialogue.learned]
    return parts or [dialogue]


def flaws(rows: Dataset, shape: str, *, learn: str = "all") -> Iterator[BadRow]:
    """Yield what is wrong with rows of a format, one problem a row, by the row's number from 0; `learn` is a key of
    `LEARN`."""
    shape_of = FORMATS[shape]
    if shape_of.read is None:
        return
    for batch in batches(rows, first=0):
        for number, row in batch:
            try:
                dialogue_of(number, row, shape_of.read, LEARN[learn])
            except FlawError as flaw:
                column = next(iter(shape_of.columns))
                found = excerpt(repr(row[column]))
                yield BadRow(flaw.reason, flaw.mend, flaw.detail, found, row=number, column=column)


def _dialogue(number: int, row: Row, read: Callable[[Row], Read], learn: Learn) -> Dialogue:
    try:
        return dialogue_of(number, row, read, learn)
    except FlawError as flaw:
        raise DataError(f"row {number}: {flaw}") from flaw


def dialogue_of(number: int, row: Row, read: Callable[[Row], Read], learn: Learn) -> Dialogue:
    """Return what a row says, checked; a FlawError says what is wrong with it."""
    said = read(row)
    messages = [_checked(message, turn) for turn, message in enumerate(said.messages)]
    _check_roles([message["role"] for message in messages])
    weights = {turn: _weight(message, turn) for turn, message in enumerate(messages)}
    answers = [turn for turn, message in enumerate(messages) if turn >= said.given and _answers(message)]
    return Dialogue(number, messages, tuple(learn(answers, weights)), _tools(row))


def _check_roles(roles: list[str]) -> None:
    systems = [turn for turn, role in enumerate(roles) if role in ("system", "developer")]
    if len(systems) > 1:
        raise FlawError("two system turns", f"turns {systems[0]} and {systems[1]}", "put them together in the first")


def _checked(message: Any, turn: int) -> Message:
    """Return a message without the nulls that a table puts where another row has a key."""
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        found = message.get("role") if isinstance(message, Mapping) else message
        raise FlawError("unknown role", f"turn {turn}: role {found!r:.80}", f"allowed: {', '.join(ROLES)}")
    held: Message = {key: _without_nulls(value) for key, value in message.items() if value is not None}
    if not isinstance(held.get("tool_calls", []), list):
        raise FlawError("no tool call", f"turn {turn}: tool_calls must be a list, found {held['tool_calls']!r:.80}")
    if "tool_calls" in held:
        held["tool_calls"] = [_call(call, turn) for call in held["tool_calls"]]
    if not isinstance(held.get("content"), str) and not held.get("tool_calls"):
        detail = f"turn {turn} ({held['role']}): content must be text, found {held.get('content')!r:.80}"
        raise FlawError("content is not text", detail)
    return held


def _call(call: Any, turn: int) -> Message:
    """Return a tool call with its arguments as an object, which is what templates of transformers write out."""
    if not isinstance(call, Mapping) or not isinstance(call.get("function", call), Mapping):
        raise FlawError("no tool call", f"turn {turn}: expected an object with a function, found {call!r:.80}")
    function = call.get("function", call)
    parsed: Message = dict(function)
    parsed["arguments"] = _json(function.get("arguments", {}), f"turn {turn}: arguments of a tool call")
    return {**call, "function": parsed} if "function" in call else parsed


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(held) for key, held in value.items() if held is not None}
    return [_without_nulls(held) for held in value] if isinstance(value, list) else value


def _tools(row: Row) -> list[dict[str, Any]] | None:
    tools = _without_nulls(_json(row.get("tools") or None, "column 'tools'"))
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise FlawError("no tools", f"column 'tools' must be a list of objects, or its JSON; found {tools!r:.80}")
    return tools or None


def _weight(message: Message, turn: int) -> bool:
    """Take a message's weight out of it."""
    weight = message.pop("weight", 1)
    if weight not in (0, 1):
        raise FlawError("no weight", f"turn {turn}: weight {weight!r}", "a turn is learned (1) or not (0)")
    return bool(weight)


def _answers(message: Message) -> bool:
    """Tell whether the assistant says something here: text, thoughts or a call."""
    spoken = any(str(message.get(key, "")).strip() for key in ("content", "reasoning_content", "thinking"))
    return message["role"] == "assistant" and (spoken or bool(message.get("tool_calls")))


Learn = Callable[[list[int], Mapping[int, bool]], list[int]]


def _all(answers: list[int], weights: Mapping[int, bool]) -> list[int]:
    for turn in answers:
        if not weights[turn]:
            detail = f"turn {turn} has weight 0, but task.learn: all trains on it"
            raise FlawError("weight is not heeded", detail, "say task.learn: weighted")
    return answers


LEARN: dict[str, Learn] = {
    "all": _all,
    "last": lambda answers, weights: answers[-1:],
    "weighted": lambda answers, weights: [turn for turn in answers if weights[turn]],
}
"""Which of the assistant's turns are learned, given those that say something and every turn's weight."""
