"""A mask covers what the assistant says and where it stops, whatever the template, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from chat_templates import CHATML, COUNTING, FORCED, GENERATION, THINKING, with_template

from trainworks.data.cache import table
from trainworks.data.conversations import Dialogue, dialogues
from trainworks.data.templates import Conversation, agreement, answer_ends, encode_dialogues
from trainworks.errors import DataError
from trainworks.schema import NewTokenizer
from trainworks.tokenizer_training import new_tokenizer

MESSAGES = [
    {"role": "system", "content": "be nice"},
    {"role": "user", "content": "a cat"},
    {"role": "assistant", "content": "sees a dog"},
    {"role": "user", "content": "and"},
    {"role": "assistant", "content": "a bird"},
]


@pytest.fixture(scope="module")
def chatml() -> Any:
    """Return a tokenizer whose turns end with <|im_end|>, its end token being another."""
    tokenizer = new_tokenizer(NewTokenizer(vocab_size=320), [" ".join(tiny.WORDS)] * 8)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return with_template(tokenizer, CHATML)


@pytest.fixture(scope="module")
def smollm2(shared_data: Path) -> Any:
    """Return SmolLM2's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shared_data / "smollm2_tokenizer")


def encode(tokenizer: Any, messages: list[dict[str, Any]] = MESSAGES, *learned: int, **options: Any) -> Conversation:
    turns = learned or tuple(turn for turn, message in enumerate(messages) if message["role"] == "assistant")
    (conversation,) = encode_dialogues([Dialogue(7, messages, turns, **options)], tokenizer)
    return conversation


def said(tokenizer: Any, conversation: Conversation) -> str:
    return str(tokenizer.decode(conversation.input_ids[conversation.trained]))


@pytest.mark.parametrize("template", [CHATML, GENERATION])
def test_every_assistant_turn_is_learned_with_its_end_and_nothing_else(chatml: Any, template: str) -> None:
    tokenizer = with_template(chatml, template)
    assert said(tokenizer, encode(tokenizer)) == "sees a dog<|im_end|>a bird<|im_end|>"
    assert said(tokenizer, encode(tokenizer, MESSAGES, 4)) == "a bird<|im_end|>"
    assert encode(tokenizer).input_ids.tolist() == tokenizer.apply_chat_template(MESSAGES)["input_ids"]


def test_a_line_break_that_ends_turns_is_learned(chatml: Any) -> None:
    plain = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    tokenizer = with_template(chatml, plain + "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
    assert said(tokenizer, encode(tokenizer)) == " sees a dog\n a bird\n"


def test_thoughts_of_the_last_turn_are_learned(chatml: Any) -> None:
    tokenizer = with_template(chatml, THINKING)
    messages = [*MESSAGES[:4], {"role": "assistant", "content": "<think>\nred\n</think>\n\na bird"}]
    assert said(tokenizer, encode(tokenizer, messages, 4)) == "<think>\nred\n</think>\n\na bird<|im_end|>"


def test_a_template_that_strips_earlier_thoughts_is_refused_for_all_turns_and_not_for_turns_apart(chatml: Any) -> None:
    tokenizer = with_template(chatml, THINKING)
    with pytest.raises(DataError, match=r"row 7: turn 2: the chat template does not nest.*task\.turns: apart"):
        encode(tokenizer)
    rows = table({"messages": [MESSAGES]})
    (group,) = dialogues(rows, "messages", turns="apart")
    assert [said(tokenizer, part) for part in encode_dialogues(group, tokenizer)] == [
        "<think>\n\n</think>\n\nsees a dog<|im_end|>",
        "<think>\n\n</think>\n\na bird<|im_end|>",
    ]


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (COUNTING, MESSAGES, "row 7: turn 2: the chat template does not nest"),
        (FORCED, MESSAGES, r"row 7: turn 2: .* answer ends in '<think>\\n', the turn itself goes on with 'sees a dog"),
        ("{{ raise_exception('no system turn') }}", MESSAGES, "row 7: .* refused by the chat template: no system turn"),
        (CHATML, MESSAGES[2:], "row 7: turn 0: nothing comes before the assistant"),
        (GENERATION.replace("{% generation %}", "{% generation %}{% endgeneration %}", 1), MESSAGES, "refused|marks"),
        (
            GENERATION.replace("{% generation %}{{ message['content'] + ", "{% generation %}{{ 'x' + "),
            MESSAGES,
            r"row 7: .* marks 2 parts .* and turn 2 is not among them",
        ),
    ],
)
def test_a_template_that_fails_is_named_with_its_row(
    chatml: Any, template: str, messages: list[Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        encode(with_template(chatml, template), messages)


def test_one_bad_row_among_many_is_the_one_that_is_named(chatml: Any) -> None:
    rows = [Dialogue(number, MESSAGES, (2, 4)) for number in range(3)]
    rows[1] = Dialogue(1, [{"role": "user"}, *MESSAGES], (3,))
    with pytest.raises(DataError, match="row 1: the conversation is refused"):
        encode_dialogues(rows, chatml)


def test_tools_and_calls_go_through_the_template(chatml: Any) -> None:
    template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{{ m['content'] if 'content' in m else m['tool_calls'] | tojson }}{{ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = with_template(chatml, template)
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    conversation = encode(tokenizer, [MESSAGES[1], call], tools=[{"name": "f"}])
    assert tokenizer.decode(conversation.input_ids).startswith('[{"name": "f"}]<|im_start|>user')
    assert said(tokenizer, conversation) == '[{"function": {"name": "f", "arguments": {"x": 1}}}]<|im_end|>'


@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("answer", ["dog", " dog", "\n\ndog\n", "🐕", "x 🐕", "é\u0301"])
def test_borders_hold_whatever_the_answer_begins_and_ends_with(chatml: Any, answer: str, trim: bool) -> None:
    from tokenizers import processors

    for template in (CHATML, GENERATION):
        tokenizer = with_template(chatml, template)
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
        messages = [MESSAGES[1], {"role": "assistant", "content": answer}]
        assert said(tokenizer, encode(tokenizer, messages)) == f"{answer}<|im_end|>"


def test_a_token_that_holds_some_of_the_answer_is_learned_and_told_from_inference() -> None:
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer = with_template(new_tokenizer(NewTokenizer(vocab_size=300), ["aab " * 50]), template)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "ab aab"}]
    messages.append({"role": "user", "content": "a"})
    conversation = encode(tokenizer, messages, 1)
    assert tokenizer.convert_ids_to_tokens(conversation.input_ids) == ["aab", "Ġaab", "a"]
    assert conversation.trained.tolist() == [True, True, False]
    # The same ids, but at inference the model is given "a" to answer, which it never sees in training.
    assert agreement([Dialogue(0, messages, (1,))], tokenizer) == (1, 1, 0)


def test_an_answer_ends_with_the_templates_token_and_the_tokenizers(chatml: Any) -> None:
    ids = chatml.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert answer_ends(chatml) == tuple(sorted(ids))
    without = GENERATION.replace("message['content'] + '<|im_end|>' }}{% endgen", "message['content'] }}{% endgen")
    without = without.replace("{% endgeneration %}", "{% endgeneration %}{{ '<|im_end|>' }}")
    assert answer_ends(with_template(chatml, without)) == tuple(sorted(ids))
    assert answer_ends(tiny.tokenizer()) == (tiny.tokenizer().eos_token_id,)


# Real data


def dolly(folder: Path, number: int) -> list[Dialogue]:
    rows = json.loads((folder / "sft_dolly3k" / "dolly_3k.json").read_text(encoding="utf-8"))[:number]
    columns = {name: [row[name] for row in rows] for name in ("instruction", "input", "output")}
    return [dialogue for group in dialogues(table(columns), "instruction") for dialogue in group]


def nl2bash(folder: Path, number: int) -> list[Dialogue]:
    lines = {
        name: (folder / "sft_nl2bash" / name).read_text(encoding="utf-8").splitlines() for name in ("all.nl", "all.cm")
    }
    columns = {"prompt": lines["all.nl"][:number], "completion": lines["all.cm"][:number]}
    return [dialogue for group in dialogues(table(columns), "prompt-completion") for dialogue in group]


def by_hand(ids: list[int], tokenizer: Any) -> np.ndarray[Any, Any]:
    """Mark what follows `<|im_start|>assistant` and a line break, up to and with `<|im_end|>`."""
    header = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    mask, inside = np.zeros(len(ids), dtype=bool), False
    for place, token in enumerate(ids):
        inside = inside or (place >= len(header) and ids[place - len(header) : place] == header)
        mask[place] = inside
        inside = inside and token != end
    return mask


@pytest.mark.data
@pytest.mark.parametrize("rows", [dolly, nl2bash])
@pytest.mark.parametrize("style", ["own", GENERATION, THINKING], ids=["own", "generation", "thinking"])
def test_masks_of_real_rows_are_those_made_by_hand(shared_data: Path, smollm2: Any, style: str, rows: Any) -> None:
    read = rows(shared_data, 1000)
    assert len(read) == 1000
    tokenizer = smollm2 if style == "own" else with_template(smollm2, style)
    for dialogue, conversation in zip(read, encode_dialogues(read, tokenizer), strict=True):
        ids = conversation.input_ids.tolist()
        np.testing.assert_array_equal(conversation.trained, by_hand(ids, tokenizer), err_msg=str(dialogue.row))
        assert conversation.trained.any()
    compared = agreement(read[:200], tokenizer)
    assert compared.equal == compared.continued == 200


@pytest.mark.data
@pytest.mark.parametrize("rows", [dolly, nl2bash])
@pytest.mark.parametrize("style", [FORCED, COUNTING], ids=["forced", "counting"])
def test_a_template_that_fails_is_named_on_real_rows(shared_data: Path, smollm2: Any, style: str, rows: Any) -> None:
    with pytest.raises(DataError, match=r"row 0: turn 1: the chat template does not nest"):
        encode_dialogues(rows(shared_data, 10), with_template(smollm2, style))
