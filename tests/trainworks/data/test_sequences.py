"""No sequence is longer than the limit, what is lost is counted, and a row that teaches nothing is named."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
from chat_templates import CHATML, GENERATION, with_template
from datasets import Dataset

from trainworks.data.bad_rows import BadRowsError
from trainworks.errors import DataError
from trainworks.tasks import SFT

LONG = [
    {"role": "system", "content": "be nice"},
    *(
        {"role": role, "content": f"{number} {word}"}
        for number in range(5)
        for role, word in (("user", "a cat"), ("assistant", "a dog"))
    ),
]


@pytest.fixture(params=[CHATML, GENERATION], ids=["derived", "generation"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    """Return a tokenizer to which a turn's end is plain text."""
    return with_template(tiny.tokenizer(), request.param.replace("<|im_end|>", "<|endoftext|>"))


def prepare(rows: list[dict[str, Any]], tokenizer: Any, *, first: int = 0, **options: Any) -> tuple[list[Any], Any]:
    """Return each sample as its text and the text that is learned, and what was left out."""
    task = SFT(**({"max_length": 64} | options)).resolve(Dataset.from_list(rows))
    prepared = task.prepare(Dataset.from_list(rows), tokenizer, first=first)
    assert prepared.samples["length"][:] == [len(row) - 1 for row in prepared.samples["input_ids"][:]]
    samples = prepared.samples.with_format("numpy")
    texts = [
        (tokenizer.decode(row["input_ids"]), tokenizer.decode(row["input_ids"][row["trained"]])) for row in samples
    ]
    assert all(len(row["input_ids"]) <= task.max_length for row in samples)
    return texts, prepared.dropped


def test_a_long_conversation_is_split_before_user_turns_and_nothing_learned_is_lost(tokenizer: Any) -> None:
    parts, dropped = prepare([{"messages": LONG}], tokenizer, too_long="split")
    assert len(parts) > 1
    assert dropped == {"rows split": 1}
    assert "".join(learned for _, learned in parts) == "".join(f"{number} a dog<|endoftext|>" for number in range(5))
    for text, _ in parts:
        assert text.startswith("<|im_start|>system\nbe nice<|endoftext|>\n<|im_start|>user\n")
        assert text.count("system") == 1


def test_a_part_in_which_nothing_is_learned_is_left_out_and_counted(tokenizer: Any) -> None:
    (part,), dropped = prepare([{"messages": LONG}], tokenizer, too_long="split", learn="last")
    assert part[1] == "4 a dog<|endoftext|>"
    assert dropped == {"rows split": 1, "parts with nothing to learn": dropped["parts with nothing to learn"]}
    assert dropped["parts with nothing to learn"] >= 1


def test_an_exchange_that_cannot_be_split_is_named(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"row 3 .*turn 1 and its answer alone are \d+ tokens, task.max_length is 20"):
        prepare([{"messages": LONG}], tokenizer, first=3, too_long="split", max_length=20)


def test_too_long_rows_are_refused_cut_or_dropped_as_asked(tokenizer: Any) -> None:
    rows = [{"messages": LONG[:3]}, {"messages": LONG}, {"messages": LONG[:9]}]
    with pytest.raises(BadRowsError, match=r"row 6 .*too long, \d+ tokens, task.max_length is 64.*\nrow 7 ") as caught:
        prepare(rows, tokenizer, first=5)
    assert [problem.row for problem in caught.value.problems] == [6, 7]
    whole, _ = prepare(rows, tokenizer, max_length=500)
    lengths = [len(tokenizer(text)["input_ids"]) for text, _ in whole]
    cut, dropped = prepare(rows, tokenizer, too_long="truncate")
    assert dropped == {"rows cut": 2, "tokens cut": sum(lengths[1:]) - 128}
    assert all(text.startswith(part) for (text, _), (part, _) in zip(whole, cut, strict=True))
    assert prepare(rows, tokenizer, too_long="drop") == ([whole[0]], {"too long": 2})


def test_rows_with_nothing_to_learn_are_an_error_with_their_numbers_or_dropped(tokenizer: Any) -> None:
    rows = [{"messages": LONG[:2]} for _ in range(7)] + [{"messages": LONG[:3]}]
    with pytest.raises(BadRowsError, match=r"row 2 .*nothing to learn.*nothing_to_learn: drop") as caught:
        prepare(rows, tokenizer, first=2)
    assert [problem.row for problem in caught.value.problems] == list(range(2, 9))
    kept, dropped = prepare(rows, tokenizer, nothing_to_learn="drop")
    assert (len(kept), dropped) == (1, {"nothing to learn": 7})
    with pytest.raises(DataError, match=r"row 0 .*nothing to learn"):  # all that is learned was cut away
        prepare([{"messages": LONG[:3]}], tokenizer, too_long="truncate", max_length=10)


def test_no_row_is_left_of_a_part_without_an_error(tokenizer: Any) -> None:
    assert prepare([{"messages": LONG[:2]}], tokenizer, nothing_to_learn="drop") == ([], {"nothing to learn": 1})


def test_plain_text_is_learned_whole_with_its_end_and_split_without_loss() -> None:
    tokenizer = tiny.tokenizer()
    ((text, learned),), _ = prepare([{"text": "a red cat"}], tokenizer)
    assert text == learned == "a red cat<|endoftext|>"
    story = " ".join(tiny.WORDS)
    ids = [*tokenizer(story)["input_ids"], tokenizer.eos_token_id]
    task = SFT(max_length=9, too_long="split", format="text")
    parts = task.prepare(Dataset.from_list([{"text": story}]), tokenizer).samples["input_ids"][:]
    assert [parts[0][0], *(token for part in parts for token in part[1:])] == ids
    with pytest.raises(DataError, match=r"row 0 .*nothing to learn"):
        prepare([{"text": " "}], tokenizer)


@pytest.mark.parametrize(
    "mask", [{"labels": [-100, -100, 7]}, {"trained": [False, False, True]}, {"assistant_masks": [0, 0, 1]}, {}]
)
def test_tokenized_rows_keep_their_mask(mask: dict[str, Any]) -> None:
    rows = Dataset.from_list([{"input_ids": [5, 6, 7], **mask}])
    (row,) = SFT(max_length=8, format="tokens").prepare(rows, tiny.tokenizer()).samples
    assert row["input_ids"] == [5, 6, 7]
    assert row["trained"] == ([False, False, True] if mask else [True, True, True])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [5, 9999]}, r"row 0 .*'input_ids': unknown token; .*0 to 319"),
        ({"input_ids": "5 6"}, r"row 0 .*'input_ids': not whole numbers; found 5 6"),
        ({"input_ids": [5, 6], "labels": [5]}, r"row 0 .*2 input_ids and 1 labels; they must be as many"),
        ({"input_ids": [5, 6], "labels": [-100, -100]}, r"row 0 .*nothing to learn"),
        ({"input_ids": [5, 6], "labels": None}, r"row 0 .*'labels': not whole numbers"),
        ({"input_ids": [5, 6], "labels": ["5", "6"]}, r"row 0 .*'labels': not whole numbers"),
        ({"input_ids": [5, 6, 7], "labels": [6, 7, -100]}, r"row 0 .*'labels': labels of other tokens"),
        ({"input_ids": [5, 6], "trained": 3}, r"row 0 .*'trained': not whole numbers"),
    ],
)
def test_tokenized_rows_that_cannot_be_learned_are_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare([row], tiny.tokenizer())
