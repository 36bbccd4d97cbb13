"""Blocks lose no token, and a mask covers what the assistant says and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import tiny

from trainworks.data.cache import table
from trainworks.data.text import blocks, conversations
from trainworks.errors import DataError

MESSAGES = [
    {"role": "system", "content": "be nice"},
    {"role": "user", "content": "a cat"},
    {"role": "assistant", "content": "sees a dog"},
    {"role": "user", "content": "and"},
    {"role": "assistant", "content": "a bird"},
]


def learned(row: dict[str, Any], shape: str, tokenizer: Any = None) -> tuple[str, str]:
    """Return the whole text of a row and the part that is learned."""
    tokenizer = tokenizer or tiny.tokenizer()
    (conversation,) = conversations(table({key: [value] for key, value in row.items()}), shape, tokenizer)
    trained = conversation.input_ids[conversation.trained]
    return tokenizer.decode(conversation.input_ids), tokenizer.decode(trained)


def test_every_assistant_turn_is_learned_with_its_end_and_nothing_else() -> None:
    text, trained = learned({"messages": MESSAGES}, "messages")
    assert text == tiny.tokenizer().apply_chat_template(MESSAGES, tokenize=False)
    assert trained == "sees a dog<|endoftext|>a bird<|endoftext|>"


def test_the_ids_are_those_the_template_gives_at_inference() -> None:
    tokenizer = tiny.tokenizer()
    (conversation,) = conversations(table({"messages": [MESSAGES]}), "messages", tokenizer)
    assert conversation.input_ids.tolist() == tokenizer.apply_chat_template(MESSAGES)["input_ids"]


def test_prompt_and_instruction_rows_become_two_turns() -> None:
    text, trained = learned({"prompt": "a cat", "completion": "runs"}, "prompt-completion")
    assert text == "<|im_start|>user\na cat<|endoftext|><|im_start|>assistant\nruns<|endoftext|>"
    assert trained == "runs<|endoftext|>"
    row = {"instruction": "say", "input": "a dog", "output": "a dog", "system": "be nice"}
    text, trained = learned(row, "instruction")
    assert "system\nbe nice<|endoftext|>" in text
    assert "user\nsay\n\na dog<|endoftext|>" in text
    assert trained == "a dog<|endoftext|>"


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([{"role": "robot", "content": "hi"}], r"row 0: turn 0: role 'robot'; allowed: system, user, assistant, tool"),
        ([{"role": "user", "content": "hi"}], "row 0: no assistant turn with text in it"),
        ([{"role": "user", "content": "hi"}, {"role": "assistant", "content": " "}], "row 0: no assistant turn"),
        (
            [{"role": "user", "content": None}, {"role": "assistant", "content": "x"}],
            r"row 0: turn 0 \(user\): content",
        ),
    ],
)
def test_a_conversation_that_cannot_be_learned_is_named(messages: list[Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        learned({"messages": messages}, "messages")


def test_a_template_that_rewrites_earlier_turns_is_refused_with_its_turn() -> None:
    import copy

    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.chat_template = "{% for m in messages %}{{ loop.revindex }}{{ m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match=r"row 0: turn 2: the chat template does not nest"):
        learned({"messages": MESSAGES}, "messages", tokenizer)


@pytest.mark.parametrize("size", [2, 3, 5, 100])
def test_blocks_predict_every_token_but_the_first_once(size: int) -> None:
    documents = [[1, 2, 3], [4], [], [5, 6, 7, 8, 9, 0]]
    cut = blocks(documents, size, end=0)
    stream = [1, 2, 3, 0, 4, 0, 0, 5, 6, 7, 8, 9, 0]
    assert [token for block in cut for token in block[1:]] == stream[1:]
    assert all(len(block) == size + 1 for block in cut[:-1])
    assert [block[0] for block in cut[1:]] == [block[-1] for block in cut[:-1]]
