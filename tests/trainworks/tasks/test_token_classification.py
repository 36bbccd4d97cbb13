"""Tags of words: which token learns which, what becomes of words without a token, and what is said of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from datasets import ClassLabel, Dataset, Features, List, Value
from transformers import AutoTokenizer, pipeline

import finetune
from trainworks import TokenClassification, export
from trainworks.data.text import IGNORED
from trainworks.errors import DataError
from trainworks.tasks.token_classification import _aligned

TAGS = ("B-X", "I-X", "O")


def dataset(*rows: tuple[list[str], list[str]]) -> Dataset:
    return Dataset.from_dict({"tokens": [words for words, _ in rows], "ner_tags": [tags for _, tags in rows]})


def prepared(rows: Dataset, **options: Any) -> tuple[dict[str, Any], dict[str, int]]:
    made = TokenClassification(labels=TAGS, **options).prepare(rows, tiny.tokenizer())
    return made.samples.with_format(None)[0], made.dropped


def test_a_word_learns_its_tag_at_its_first_token() -> None:
    row, dropped = prepared(dataset((["the", "zebra", "cat"], ["O", "B-X", "I-X"])))
    pieces = [tiny.tokenizer().decode(token) for token in row["input_ids"]]
    learned = [(piece.strip(), TAGS[tag]) for piece, tag in zip(pieces, row["labels"], strict=True) if tag != IGNORED]
    assert learned[0] == ("the", "O")
    assert [tag for _, tag in learned] == ["O", "B-X", "I-X"]
    assert len(row["labels"]) == len(row["input_ids"]) == row["length"] > 3
    assert row["tags"] == [2, 0, 1]
    assert not dropped


def test_all_tokens_of_a_word_may_learn_and_those_after_a_beginning_go_on() -> None:
    row, _ = prepared(dataset((["the", "zebra", "cat"], ["O", "B-X", "I-X"])), learn="all")
    begins = row["starts"]
    zebra = row["labels"][begins[1] : begins[2]]
    assert len(zebra) > 1
    assert [TAGS[tag] for tag in zebra] == ["B-X"] + ["I-X"] * (len(zebra) - 1)
    assert row["labels"].count(IGNORED) == 1, "the blank before zebra is a token of no word"


WORDS = ["A", "naïve", "“quoted”", "100%", "日本", "don't", "\u200b", "", "x" * 40, "🤗🤗", "a b", "."]


@pytest.mark.parametrize("name", ["bytes", "minilm"])
def test_every_token_belongs_to_the_word_its_signs_are_of(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = (
        tiny.tokenizer() if name == "bytes" else AutoTokenizer.from_pretrained(request.getfixturevalue("minilm"))
    )
    text = " ".join(WORDS)
    offsets = np.array(tokenizer(text, return_offsets_mapping=True)["offset_mapping"])
    aligned = _aligned(WORDS, offsets)
    begins = np.cumsum([0, *(len(word) + 1 for word in WORDS)])
    for owner, (begin, end) in zip(aligned.owners, offsets, strict=True):
        word = text[begins[owner] : begins[owner] + len(WORDS[owner])]
        piece = text[begin:end].strip(" ")
        assert piece in word if owner >= 0 else not piece
    for number, start in enumerate(aligned.starts):
        owned = np.flatnonzero(aligned.owners == number)
        assert start == (owned[0] if len(owned) else -1)
    assert aligned.starts[WORDS.index("")] == -1
    assert (aligned.starts[[0, 1, 2, 3, 5, 8, 10, 11]] >= 0).all()


def test_words_that_are_cut_count_as_outside_and_are_told() -> None:
    words, tags = ["cat"] * 40, ["B-X"] * 40
    row, dropped = prepared(dataset((words, tags)), max_length=8)
    kept = sum(start >= 0 for start in row["starts"])
    assert 0 < kept < 40
    assert dropped == {"words without a token": 40 - kept}
    task = TokenClassification(labels=TAGS, max_length=8)
    numbers = {name: np.array(row[name]) for name in ("input_ids", "attention_mask", "labels", "tags", "starts")}
    batch = task.collate([numbers], tiny.tokenizer(), train=False) | {"index": torch.tensor([7])}
    found = task.predict(AlwaysFirst(), batch, tiny.tokenizer())[7]  # type: ignore[arg-type]
    assert found.reference == tags
    assert found.prediction == ["B-X"] * kept + ["O"] * (40 - kept)
    with pytest.raises(DataError, match=r"row 0 .*too long, .* task.max_length is 8"):
        prepared(dataset((words, tags)), max_length=8, too_long="error")


class AlwaysFirst:
    """A model that gives every token the first tag."""

    def __call__(self, input_ids: torch.Tensor, **_: Any) -> Any:
        logits = torch.zeros(*input_ids.shape, len(TAGS))
        logits[..., 0] = 1
        return transformers.modeling_outputs.TokenClassifierOutput(logits=logits)


def test_tags_of_the_hub_are_known_by_their_declared_names() -> None:
    features = Features(tokens=List(Value("string")), ner_tags=List(ClassLabel(names=["O", "B-X", "I-X"])))
    rows = Dataset.from_dict({"tokens": [["a", "cat"], ["dog"]], "ner_tags": [[0, 1], [0]]}, features=features)
    task = TokenClassification().resolve(rows)
    assert task.labels == ("O", "B-X", "I-X")
    assert list(task.flaws(rows)) == []
    assert task.prepare(rows, tiny.tokenizer()).samples.with_format(None)["tags"][:] == [[0, 1], [0]]
    named = TokenClassification(labels=("I-X", "B-X", "O"))
    assert named.prepare(rows, tiny.tokenizer()).samples.with_format(None)["tags"][:] == [[2, 1], [2]]


def test_broken_tags_are_kept_and_counted_unless_they_are_to_be_refused() -> None:
    rows = dataset((["a", "cat"], ["O", "I-X"]), (["a", "cat"], ["B-X", "I-X"]))
    kept = TokenClassification(labels=TAGS)
    assert list(kept.flaws(rows)) == []
    assert kept.prepare(rows, tiny.tokenizer()).dropped == {"rows with broken tags, kept": 1}
    refused = TokenClassification(labels=TAGS, broken="error")
    assert [(flaw.row, flaw.reason) for flaw in refused.flaws(rows)] == [(0, "broken tags")]
    inside_only = TokenClassification(labels=("I-X", "O"), broken="error")
    assert list(inside_only.flaws(dataset((["a", "cat"], ["O", "I-X"])))) == []


def test_one_tag_alone_is_refused() -> None:
    with pytest.raises(DataError, match=r"column 'ner_tags' has one tag only \('O'\)"):
        TokenClassification().resolve(dataset((["a"], ["O"])))


def test_entities_are_measured_by_type_and_other_tags_by_the_word() -> None:
    names = TokenClassification(labels=("B-LOC", "B-PER", "I-PER", "O")).metrics()
    assert list(names) == ["f1", "precision", "recall", "f1_LOC", "f1_PER", "accuracy"]
    assert [metric.name for metric in names.values()] == list(names)
    assert list(TokenClassification(labels=("NOUN", "VERB")).metrics()) == ["accuracy"]
    assert list(TokenClassification(labels=TAGS).metrics()) == ["f1", "precision", "recall", "accuracy"]


def test_an_exported_model_tags_words_in_a_pipeline(tmp_path: Path) -> None:
    task = "token-classification"
    tiny.save_model(tmp_path / "model", task)
    config = tiny.config(task, tmp_path / "model", tiny.save_rows(tmp_path / "rows.jsonl", task, 40), tmp_path / "run")
    run = finetune.prepare(config)
    folder = export(run)
    said = pipeline(task, model=str(folder), aggregation_strategy="simple")("the red cat sees a dog")
    assert {entity["entity_group"] for entity in said} <= {"animal", "colour"}
    words = ["the", "red", "cat", "sees", "a", "dog"]
    rows = run.task.prepare(dataset((words, ["O"] * 6)), run.processor).samples.with_format("numpy")
    batch = run.task.collate([rows[0]], run.processor, train=False) | {"index": torch.tensor([0])}
    with torch.no_grad():
        live = run.task.predict(run.model.eval(), batch, run.processor)[0]
    single = pipeline(task, model=str(folder), ignore_labels=[])("the red cat sees a dog")
    assert [each["entity"] for each in single] == live.prediction, "each of these words is one token"
