"""Numbers of pairs of texts, such as how alike two sentences are."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import tiny
from datasets import Dataset, DatasetDict

import finetune
from trainworks import Data, Every, Optim, SequenceRegression
from trainworks.errors import DataError

PAIR = {"sentence1": "a cat", "sentence2": "the dog", "score": 0.5}


def prepared(*rows: dict[str, Any], **options: Any) -> Dataset:
    task = SequenceRegression(text="sentence1", pair="sentence2", **options)
    return task.prepare(Dataset.from_list(list(rows)), tiny.tokenizer()).samples.with_format(None)


def test_both_texts_are_read_as_the_tokenizer_joins_them() -> None:
    samples = prepared(PAIR, PAIR | {"sentence1": "the dog", "sentence2": "a cat", "score": 1.5})
    joined = tiny.tokenizer()(["a cat", "the dog"], ["the dog", "a cat"])
    assert samples["input_ids"][:] == joined["input_ids"]
    assert samples["input_ids"][0] != samples["input_ids"][1]
    assert samples["labels"][:] == [0.5, 1.5]
    assert SequenceRegression(text="sentence1", pair="sentence2").columns() == {
        "sentence1": "text",
        "sentence2": "text",
        "score": "number",
    }


def test_a_long_pair_is_cut_or_refused() -> None:
    long = PAIR | {"sentence2": "the dog " * 50}
    assert prepared(long, max_length=16)["length"][:] == [16]
    with pytest.raises(DataError, match=r"row 0: \d+ tokens, task.max_length is 16"):
        prepared(long, max_length=16, too_long="error")


def alike(number: int, seed: int) -> list[dict[str, Any]]:
    """Return pairs of sentences whose number only the second one tells."""
    rng = random.Random(seed)
    words = [rng.randrange(3) for _ in range(number)]
    return [
        {"sentence1": tiny.sentence(rng, 3), "sentence2": ("the dog", "red red red", "tree")[word], "score": word / 2}
        for word in words
    ]


@pytest.mark.slow
def test_a_pairs_number_is_learned_and_measured_by_both_correlations(tmp_path: Path) -> None:
    task = "sequence-regression"
    splits = DatasetDict(train=Dataset.from_list(alike(160, 0)), test=Dataset.from_list(alike(60, 1)))
    config = tiny.config(
        task,
        tiny.save_model(tmp_path / "model", task),
        Data(source=splits, validation=("test",)),
        tmp_path / "run",
        epochs=7,
        options={"text": "sentence1", "pair": "sentence2"},
        optim=Optim(lr=2e-3),
        every=Every(save="end", log=30),
    )
    record = finetune.fit(finetune.prepare(config))
    final, untuned = record.final, next(report for report in record.reports if report.name == "untuned")
    assert final is not None
    assert {"pearson", "spearman"} <= final.metrics.keys()
    for name in ("pearson", "spearman"):
        assert abs(untuned.metrics[name].value) < 0.5
        assert final.metrics[name].low > 0.7, final.metrics
    mean = next(report for report in record.reports if report.name == "mean").metrics["loss"]
    assert final.metrics["loss"].high < mean.low
