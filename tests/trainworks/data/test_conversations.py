"""Every shape of row becomes the messages it means, and a row that does not is named with its turn."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset, Image

from trainworks.data.conversations import FORMATS, Dialogue, dialogues, recognised
from trainworks.errors import DataError

ASKED, SAID = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
NICE = {"role": "system", "content": "be nice"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}

ROWS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [ASKED, SAID]},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "prompt-completion": {"prompt": "a", "completion": "b"},
    "prompt-completion-messages": {"prompt": [ASKED], "completion": [SAID]},
    "instruction": {"instruction": "a", "input": "", "output": "b"},
    "tokens": {"input_ids": [1, 2], "labels": [-100, 2]},
    "text": {"text": "a b"},
}


def read(row: dict[str, Any], *others: dict[str, Any], learn: str = "all", turns: str = "together") -> list[Dialogue]:
    """Return the dialogues of rows whose format is told by their columns."""
    rows = Dataset.from_list([row, *others])
    return [part for group in dialogues(rows, recognised(rows), learn=learn, turns=turns, first=10) for part in group]


def test_every_format_is_told_by_its_columns() -> None:
    assert ROWS.keys() == FORMATS.keys()
    assert {name: recognised(Dataset.from_list([row])) for name, row in ROWS.items()} == {name: name for name in ROWS}
    with pytest.raises(
        DataError, match=r"no known shape of conversation: the columns are question; known are messages"
    ):
        recognised(Dataset.from_list([{"question": "a"}]))


@pytest.mark.parametrize("shape", [name for name, shape in FORMATS.items() if shape.read])
def test_every_format_says_the_same(shape: str) -> None:
    assert read(ROWS[shape]) == [Dialogue(10, [ASKED, SAID], (1,))]


def test_system_turns_and_inputs_have_their_place() -> None:
    (alpaca,) = read({"instruction": "a", "input": "more", "output": "b", "system": "be nice"})
    assert alpaca.messages == [NICE, {"role": "user", "content": "a\n\nmore"}, SAID]
    turns = [{"from": "system", "value": "be nice"}, *ROWS["sharegpt"]["conversations"]]
    assert read({"conversations": turns})[0].messages == [NICE, ASKED, SAID]
    assert read(ROWS["sharegpt"] | {"system": "be nice"})[0].messages == [NICE, ASKED, SAID]


def test_answers_that_are_given_in_the_prompt_are_not_learned() -> None:
    (dialogue,) = read({"prompt": [ASKED, SAID, ASKED], "completion": [SAID]})
    assert dialogue.learned == (3,)


def test_tools_and_their_calls_lose_the_nulls_of_the_table() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [ASKED, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "name": "f", "content": "2"}, SAID]
    parsed = call | {"function": {"name": "f", "arguments": {"x": 1}}}
    for tools in ([TOOL], json.dumps([TOOL])):
        (dialogue,) = read({"messages": messages, "tools": tools})
        assert dialogue.tools == [TOOL]
        assert dialogue.messages == [ASKED, {"role": "assistant", "tool_calls": [parsed]}, *messages[2:]]
        assert dialogue.learned == (1, 3)
    (plain,) = read({"messages": [ASKED, SAID], "tools": "[]"})
    assert plain.tools is None


def test_sharegpt_calls_become_tool_calls() -> None:
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}
    turns = [
        {"from": "human", "value": "a"},
        call,
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "b"},
    ]
    (dialogue,) = read({"conversations": turns})
    said = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert dialogue.messages[1:3] == [{"role": "assistant", "tool_calls": [said]}, {"role": "tool", "content": "2"}]
    turns[1] = {"from": "function_call", "value": "f(1)"}
    with pytest.raises(DataError, match=r"row 10: turn 1 \(function_call\): expected JSON, found 'f\(1\)'"):
        read({"conversations": turns})


def test_turns_are_learned_as_asked() -> None:
    row = {"messages": [ASKED, SAID, ASKED, SAID, ASKED, {"role": "assistant", "content": " "}]}
    assert read(row)[0].learned == (1, 3)
    assert read(row, learn="last")[0].learned == (3,)
    weighted = {"messages": [ASKED, SAID | {"weight": 0}, ASKED, SAID | {"weight": 1}, ASKED, SAID]}
    (dialogue,) = read(weighted, learn="weighted")
    assert dialogue.learned == (3, 5)
    assert not any("weight" in message for message in dialogue.messages)


def test_turns_apart_end_with_the_one_that_is_learned() -> None:
    row = {"messages": [NICE, ASKED, SAID, ASKED, SAID]}
    first, second = read(row, turns="apart")
    assert (first.messages, first.learned) == ([NICE, ASKED, SAID], (2,))
    assert (second.messages, second.learned) == (row["messages"], (4,))
    assert read({"messages": [ASKED]}, turns="apart") == [Dialogue(10, [ASKED], ())]


def called(words: str) -> dict[str, Any]:
    return {"conversations": [{"from": "function_call", "value": words}]}


def test_a_picture_beside_a_conversation_is_never_decoded() -> None:
    rows = Dataset.from_dict({"messages": [[ASKED, SAID]], "picture": [{"bytes": b"none", "path": None}]})
    rows = rows.cast_column("picture", Image())
    assert [dialogue.messages for (dialogue,) in dialogues(rows, "messages")] == [[ASKED, SAID]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "robot", "content": "a"}]}, r"turn 0: role 'robot'; allowed: system, developer, user"),
        ({"messages": [ASKED, {"role": "assistant", "content": None}]}, r"turn 1 \(assistant\): content must be text"),
        ({"messages": [ASKED, SAID | {"weight": 0.5}]}, r"turn 1: weight 0.5; a turn is learned \(1\) or not \(0\)"),
        ({"messages": [ASKED, SAID | {"weight": 0.0}]}, r"turn 1 has weight 0, but task.learn: all trains on it"),
        ({"messages": [ASKED, SAID], "tools": "{"}, r"column 'tools': expected JSON"),
        ({"messages": [ASKED, SAID], "tools": '{"name": "f"}'}, r"column 'tools' must be a list of objects"),
        ({"conversations": "a"}, r"column 'conversations' must be a list of messages, found 'a'"),
        ({"conversations": [{"from": "alien", "value": "a"}]}, r"turn 0: role 'alien'"),
        ({"messages": []}, r"column 'messages' must be a list of messages"),
        (called("9" * 5_000), r"turn 0 \(function_call\): expected JSON, found '999.*\(Exceeds the limit"),
        (called("[" * 5_000), r"turn 0 \(function_call\): expected JSON, found '\[\[.*\(maximum recursion"),
        (called("[" * 100 + "]" * 100), r"turn 0 \(function_call\): over 32 levels of lists"),
        (called('{"name": "\\ud800"}'), r"turn 0 \(function_call\): expected JSON, found .*can't encode character"),
    ],
)
def test_a_row_that_is_no_conversation_is_named(row: dict[str, Any], message: str) -> None:
    good = {"conversations": "b"} if isinstance(row.get("conversations"), str) else row
    with pytest.raises(DataError, match=f"^row 10: {message}"):
        read(row, good)


def test_a_time_that_python_cannot_hold_is_refused() -> None:
    table = pa.table({"messages": [[ASKED, SAID]], "system": pa.array([2**62], pa.timestamp("s"))})
    with pytest.raises(DataError, match=r"columns messages, system: a value cannot be read: .*too large"):
        list(dialogues(Dataset(table), "messages"))
