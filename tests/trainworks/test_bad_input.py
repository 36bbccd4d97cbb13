"""Bad input as a run meets it: a row, a column, a tokenizer that cannot be used is refused with its place and mend."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

import finetune
from trainworks import Data, Preference
from trainworks.errors import ToolkitError
from trainworks.samples import read_rows


@dataclass(frozen=True)
class Fixture:
    """Rows with a mistake in row 3, and what must be said of it."""

    task: str
    wrong: dict[str, Any]
    words: tuple[str, ...]
    good: dict[str, Any] = field(default_factory=lambda: {"text": "a cat", "label": "good"})


ASK = {"role": "user", "content": "a cat?"}
SAY = {"role": "assistant", "content": "a dog"}
RULE = {"role": "system", "content": "be brief"}
TALK = {"messages": [ASK, SAY]}
PAIR = {"prompt": "a", "completion": "b"}
WRITTEN = {"source": "a cat", "target": "a dog"}
DUEL = {"prompt": "a", "chosen": "b", "rejected": "c"}
TALKS = {"chosen": [ASK, SAY], "rejected": [ASK, SAY | {"content": "a bird"}]}
SINGLE = {"prompt": "a", "completion": "b", "label": True}
PLACE = "rows.jsonl:4: row 3 (from 0)"
WORDS = {"tokens": ["a", "cat"], "ner_tags": ["O", "B-animal"]}
ASKED = {"question": "who?", "context": "a red cat", "answers": {"text": ["cat"], "answer_start": [6]}}
TAGGED, ASKING = "token-classification", "question-answering"


def answered(text: str, start: int) -> dict[str, Any]:
    return ASKED | {"answers": {"text": [text], "answer_start": [start]}}


FIXTURES = {
    "null text": Fixture(
        "sequence-classification", {"text": None, "label": "good"}, (PLACE, "column 'text': null text")
    ),
    "no text": Fixture("sequence-classification", {"label": "good"}, (PLACE, "column 'text': null text")),
    "no document": Fixture("masked-lm", {"text": ""}, (PLACE, "column 'text': no tokens"), {"text": "a cat"}),
    "null answer": Fixture("sft", {"prompt": "a", "completion": None}, (PLACE, "column 'completion': null text"), PAIR),
    "no tokens": Fixture("sequence-classification", {"text": "", "label": "good"}, (PLACE, "column 'text': no tokens")),
    "null label": Fixture(
        "sequence-classification", {"text": "a", "label": None}, (PLACE, "column 'label': null label")
    ),
    "unknown label among several": Fixture(
        "sequence-classification",
        {"text": "a", "label": ["good", None]},
        (PLACE, "column 'label': unknown label"),
        {"text": "a cat", "label": ["good"]},
    ),
    "too long a target": Fixture(
        "seq2seq", {"source": "a", "target": "a dog " * 40}, (PLACE, "column 'target': too long"), WRITTEN
    ),
    "no number": Fixture(
        "sequence-regression",
        {"text": "a", "score": None},
        (PLACE, "column 'score': no number"),
        {"text": "a cat", "score": 0.5},
    ),
    "blank source": Fixture("seq2seq", {"source": " ", "target": "a"}, (PLACE, "column 'source': blank text"), WRITTEN),
    "null messages": Fixture("sft", {"messages": None}, (PLACE, "column 'messages': null messages"), TALK),
    "unknown role": Fixture(
        "sft", {"messages": [ASK, SAY | {"role": "robot"}]}, (PLACE, "unknown role, turn 1: role 'robot'", "user"), TALK
    ),
    "no answer": Fixture("sft", {"messages": [ASK]}, (PLACE, "nothing to learn"), TALK),
    "too long": Fixture("sft", {"messages": [ASK, SAY | {"content": "a dog " * 200}]}, (PLACE, "too long"), TALK),
    "no list of calls": Fixture("sft", {"messages": [ASK, SAY | {"tool_calls": 7}]}, (PLACE, "no tool call"), TALK),
    "two system turns": Fixture(
        "sft", {"messages": [RULE, ASK, RULE, SAY]}, (PLACE, "two system turns, turns 0"), TALK
    ),
    "no turns": Fixture("sft", {"messages": []}, (PLACE, "no messages, column", "must be a list of messages"), TALK),
    "null content": Fixture(
        "sft", {"messages": [ASK, SAY | {"content": None}]}, (PLACE, "content is not text, turn 1"), TALK
    ),
    "content of parts": Fixture("sft", {"messages": [ASK, SAY | {"content": ["a"]}]}, (PLACE, "mixed types"), TALK),
    "null rejected": Fixture("preference", DUEL | {"rejected": None}, (PLACE, "column 'rejected': null text"), DUEL),
    "same answers": Fixture(
        "preference", DUEL | {"rejected": "b"}, (PLACE, "column 'chosen': same answers", "say the same"), DUEL
    ),
    "empty rejected": Fixture(
        "reward", DUEL | {"rejected": " "}, (PLACE, "empty answer, column 'rejected' says nothing"), DUEL
    ),
    "no shared prompt": Fixture(
        "preference",
        TALKS | {"rejected": [ASK | {"content": "another?"}, SAY]},
        (PLACE, "prompt is not shared", "begin with different messages"),
        TALKS,
    ),
    "no answer to the prompt": Fixture(
        "reward", TALKS | {"rejected": [ASK, ASK]}, (PLACE, "prompt is not shared", "role 'user'"), TALKS
    ),
    "no chosen at all": Fixture("reward", TALKS | {"chosen": [ASK]}, (PLACE, "empty answer, column 'chosen'"), TALKS),
    "robot in a pair": Fixture(
        "preference", TALKS | {"chosen": [ASK, SAY | {"role": "robot"}]}, (PLACE, "unknown role", "'robot'"), TALKS
    ),
    "long pair": Fixture(
        "preference", DUEL | {"prompt": "a dog " * 200}, (PLACE, "too long", "task.too_long: truncate or drop"), DUEL
    ),
    "null words": Fixture(TAGGED, WORDS | {"tokens": None}, (PLACE, "column 'tokens': null words"), WORDS),
    "no words": Fixture(TAGGED, {"tokens": [], "ner_tags": []}, (PLACE, "column 'tokens': no words"), WORDS),
    "words without tags": Fixture(
        TAGGED, WORDS | {"ner_tags": ["O"]}, (PLACE, "words without tags, 2 words and 1 tags"), WORDS
    ),
    "null tag": Fixture(
        TAGGED, WORDS | {"ner_tags": ["O", None]}, (PLACE, "column 'ner_tags': unknown label; found None"), WORDS
    ),
    "no token": Fixture(TAGGED, {"tokens": [""], "ner_tags": ["O"]}, (PLACE, "column 'tokens': no tokens"), WORDS),
    "null answers": Fixture(ASKING, ASKED | {"answers": None}, (PLACE, "column 'answers': null answers"), ASKED),
    "empty question": Fixture(ASKING, ASKED | {"question": " "}, (PLACE, "empty question"), ASKED),
    "empty context": Fixture(ASKING, ASKED | {"context": ""}, (PLACE, "empty context"), ASKED),
    "answer elsewhere": Fixture(
        ASKING,
        answered("cat", 4),
        (PLACE, "answer at another place, answer_start is 4, the answer stands at 6; found cat; set it to 6"),
        ASKED,
    ),
    "answer nowhere": Fixture(ASKING, answered("dog", 6), (PLACE, "answer not in the context", "found dog"), ASKED),
    "empty answer": Fixture(ASKING, answered("", 6), (PLACE, "empty answer"), ASKED),
    "answer without a place": Fixture(
        ASKING, ASKED | {"answers": {"text": ["cat"], "answer_start": []}}, (PLACE, "answers without places"), ASKED
    ),
    "long question": Fixture(ASKING, ASKED | {"question": "who? " * 30}, (PLACE, "question too long"), ASKED),
    "text for messages": Fixture("sft", {"messages": "a cat?"}, (PLACE, "column 'messages': type changes"), TALK),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINWORKS_CACHE", str(tmp_path / "cache"))


def run(fixture: Fixture, folder: Path, policy: str = "error") -> finetune.Config:
    path = folder / "rows.jsonl"
    rows = [dict(fixture.good) for _ in range(12)]
    for row in rows[::2]:
        row |= {"label": ["bad"] if isinstance(row["label"], list) else "bad"} if "label" in row else {}
    rows[3] = fixture.wrong
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    model = folder / "model"
    if not model.exists():
        tiny.save_model(model, fixture.task)
    config = tiny.config(fixture.task, model, path, folder / "out")
    return config.model_copy(update={"data": Data(source=str(path), holdout=0, bad_rows=policy)})


@pytest.mark.parametrize("name", FIXTURES)
def test_a_row_that_cannot_be_learned_from_is_refused_with_its_number(name: str, tmp_path: Path) -> None:
    with pytest.raises(ToolkitError) as caught:
        finetune.prepare(run(FIXTURES[name], tmp_path))
    assert all(word in str(caught.value) for word in FIXTURES[name].words), caught.value


@pytest.mark.parametrize("policy", ["skip", "quarantine"])
@pytest.mark.parametrize("name", [name for name, fixture in FIXTURES.items() if PLACE in fixture.words])
def test_the_record_says_what_was_left_out_and_where_it_is_listed(name: str, policy: str, tmp_path: Path) -> None:
    prepared = finetune.prepare(run(FIXTURES[name], tmp_path, policy))
    (split,) = prepared.record.data.splits
    assert (split.rows, split.samples) == (12, 11)
    (reason,) = split.dropped
    assert reason in str(FIXTURES[name].words)
    listings = [Path(listing) for listing in prepared.record.data.listings]
    rows = [json.loads(line) for listing in listings for line in listing.read_text().splitlines()]
    assert [row["row"] for row in rows] == ([3] if policy == "quarantine" else [])


def test_an_unknown_tag_is_named_with_those_there_are(tmp_path: Path) -> None:
    config = run(Fixture(TAGGED, WORDS | {"ner_tags": ["O", "B-plant"]}, (), WORDS), tmp_path)
    task = config.task.model_copy(update={"labels": ("O", "B-animal")})
    with pytest.raises(ToolkitError) as caught:
        read_rows(config.model_copy(update={"task": task}))
    assert f"{PLACE}, column 'ner_tags': unknown label; found 'B-plant'; the 2 classes are: O, B-animal" in str(
        caught.value
    )


def test_a_column_that_is_missing_is_named_with_those_there_are(tmp_path: Path) -> None:
    row = {"sentence": "a", "label": "b"}
    with pytest.raises(ToolkitError, match=r"no column 'text'.*data.columns: \{text: sentence\}"):
        read_rows(run(Fixture("sequence-classification", row, (), row), tmp_path, "skip"))


def cut(length: int, row: dict[str, Any], folder: Path, policy: str = "error") -> finetune.Config:
    config = run(Fixture("preference", row, (), DUEL), folder, policy)
    return config.model_copy(update={"task": Preference(max_length=length, too_long="truncate")})


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused_or_left_out(tmp_path: Path) -> None:
    long = DUEL | {"prompt": "a dog " * 200}
    with pytest.raises(
        ToolkitError, match=r"row 3 \(from 0\), column 'chosen': prompt too long, no token of an answer"
    ):
        finetune.prepare(cut(64, long, tmp_path))
    (split,) = finetune.prepare(cut(64, long, tmp_path, "skip")).record.data.splits
    assert (split.samples, split.dropped["prompt too long"]) == (11, 1)


def test_answers_that_are_cut_to_the_same_tokens_are_refused(tmp_path: Path) -> None:
    row = DUEL | {"chosen": "a dog " * 50 + "yes", "rejected": "a dog " * 50 + "no"}
    with pytest.raises(ToolkitError, match=r"row 3 .*same answers, chosen and rejected are the same 64 tokens"):
        finetune.prepare(cut(64, row, tmp_path))


def test_labels_of_answers_are_true_or_false(tmp_path: Path) -> None:
    fixture = Fixture("preference", SINGLE | {"label": 2}, (), SINGLE | {"label": 1})
    config = run(fixture, tmp_path)
    config = config.model_copy(update={"task": Preference(max_length=64, objective={"type": "kto"})})
    path = tmp_path / "rows.jsonl"
    path.write_text(path.read_text().replace('"bad"', "0"))
    with pytest.raises(ToolkitError, match=r"row 3 .*unknown label, label 2; .*true \(wanted\) or false"):
        finetune.prepare(config)


def test_columns_that_hold_no_pair_are_named(tmp_path: Path) -> None:
    row = {"question": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(ToolkitError, match=r"column 'chosen' holds string; the task reads messages"):
        read_rows(run(Fixture("preference", row, (), row), tmp_path))
    with pytest.raises(ToolkitError, match=r"no known shape.*pairs: prompt, chosen, rejected;"):
        read_rows(run(Fixture("reward", PAIR, (), PAIR), tmp_path))


def test_a_tokenizer_without_an_end_token_is_refused_and_one_without_padding_is_not(tmp_path: Path) -> None:
    config = run(Fixture("sft", PAIR, (), PAIR), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    prepared = finetune.prepare(config)
    assert prepared.processor.pad_token_id == prepared.processor.eos_token_id
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ToolkitError, match=r"has no end-of-text token.*set eos_token"):
        finetune.prepare(config)


def test_a_vocabulary_larger_than_the_models_is_refused(tmp_path: Path) -> None:
    config = run(Fixture("sft", PAIR, (), PAIR), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model.resize_token_embeddings(300)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(
        ToolkitError, match=r"tokenizer has 3\d\d tokens, the model 300 embeddings; take the model's own"
    ):
        finetune.prepare(config)
