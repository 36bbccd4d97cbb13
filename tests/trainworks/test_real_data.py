"""Real text and real weights: what training reaches, not only that it runs."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from pictures import encode

import finetune
import pretrain
from trainworks import (
    Batch,
    Budget,
    CausalLM,
    Data,
    FromScratch,
    ImageClassification,
    Limit,
    NewImageProcessor,
    Optim,
    Pretrained,
    QuestionAnswering,
    SemanticSegmentation,
    SequenceClassification,
    TokenClassification,
)
from trainworks.image_models import new_image_processor
from trainworks.models import initialise

pytestmark = [pytest.mark.slow, pytest.mark.data]


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


ADAMW = {"schedule": "linear", "warmup": 0.1, "weight_decay": 0.01, "betas": (0.9, 0.999)}


def test_minilm_learns_names(shared_data: Path, minilm: Path, tmp_path: Path) -> None:
    config = finetune.Config(
        output=str(tmp_path / "run"),
        task=TokenClassification(max_length=256),
        model=Pretrained(str(minilm)),
        data=Data(
            source=str(shared_data / "ner_wnut17"),
            train=("wnut17train.conll",),
            validation=("emerging.dev.conll",),
            limit=Limit(train=1600, validation=400),
        ),
        batch=Batch(per_step=8),
        budget=Budget(epochs=1.0),
        optim=Optim(lr=5e-4, **ADAMW),
    )
    record = finetune.fit(finetune.prepare(config))
    final = record.final
    assert final is not None
    assert final.num_examples == 400
    # 0.31 where it was tried; all of the training rows, three times in steps of 16, reach 0.52.
    assert final.metrics["f1"].value > 0.15
    for baseline in ("untuned", "commonest tag"):
        difference = next(c.difference for c in record.comparisons if (c.metric, c.baseline) == ("f1", baseline))
        assert difference.low > 0.08


def test_minilm_learns_to_answer_the_questions_it_was_shown(shared_data: Path, minilm: Path, tmp_path: Path) -> None:
    """Of other texts these questions, made to be hard, teach little: see benchmarks/question_answering.py."""
    lines = (shared_data / "qa_adversarial_quoref" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    short = [row for row in map(json.loads, lines) if len(row["context"]) < 600]
    rows = Dataset.from_list(short[::5][:24])
    config = finetune.Config(
        output=str(tmp_path / "run"),
        task=QuestionAnswering(max_length=192, stride=64),
        model=Pretrained(str(minilm)),
        data=Data(source=DatasetDict(train=rows, test=rows), validation=("test",)),
        batch=Batch(per_step=4),
        budget=Budget(epochs=10.0),
        optim=Optim(lr=5e-4, **ADAMW),
    )
    record = finetune.fit(finetune.prepare(config))
    final, untuned = record.final, next(report for report in record.reports if report.name == "untuned")
    assert final is not None
    assert final.num_examples == 24
    assert untuned.metrics["f1"].value < 0.3
    assert final.metrics["exact_match"].value > 0.9
    assert final.metrics["f1"].value > 0.95
    differences = [c.difference for c in record.comparisons if c.metric in ("exact_match", "f1")]
    assert len(differences) == 6
    assert min(difference.low for difference in differences) > 0.4


def gaps(book: Path, number: int) -> list[dict[str, Any]]:
    """Return questions on passages of 40 words: which word belongs into a gap, of which eight words around are told."""
    rng = random.Random(0)
    words = book.read_text(encoding="utf-8").split()
    rows: list[dict[str, Any]] = []
    while len(rows) < number:
        begin, place = rng.randrange(len(words) - 40), rng.randrange(4, 36)
        passage = words[begin : begin + 40]
        if len(passage[place]) < 4 or not passage[place].isalpha():
            continue
        question = " ".join([*passage[place - 4 : place], "what", *passage[place + 1 : place + 5]])
        answers = {"text": [passage[place]], "answer_start": [len(" ".join(passage[:place])) + 1]}
        rows.append({"question": question, "context": " ".join(passage), "answers": answers})
    return rows


def test_minilm_learns_to_find_in_another_book_what_a_question_leaves_out(
    shared_data: Path, minilm: Path, tmp_path: Path
) -> None:
    books = shared_data / "gutenberg_books"
    train = [row for name in ("98-0", "pg345", "pg84") for row in gaps(books / f"{name}.txt", 140)]
    rows = DatasetDict(train=Dataset.from_list(train), test=Dataset.from_list(gaps(books / "pg1342.txt", 100)))
    config = finetune.Config(
        output=str(tmp_path / "run"),
        task=QuestionAnswering(max_length=192, stride=64),
        model=Pretrained(str(minilm)),
        data=Data(source=rows, validation=("test",)),
        batch=Batch(per_step=8),
        budget=Budget(epochs=1.0),
        optim=Optim(lr=5e-4, **ADAMW),
    )
    record = finetune.fit(finetune.prepare(config))
    final = record.final
    assert final is not None
    assert final.num_examples == final.num_clusters == 100
    assert final.metrics["f1"].value > 0.6  # 0.82 where it was tried
    for baseline in ("untuned", "first sentence", "usual place"):
        difference = next(c.difference for c in record.comparisons if (c.metric, c.baseline) == ("f1", baseline))
        assert difference.low > 0.5, baseline


def digits(folder: Path, train: int, test: int) -> DatasetDict:
    """Return handwritten digits as PNG, from the files of MNIST."""
    packed = (
        gzip.decompress((folder / f"t10k-{name}-ubyte.gz").read_bytes()) for name in ("images-idx3", "labels-idx1")
    )
    images, labels = next(packed)[16:], next(packed)[8:]
    pictures = np.frombuffer(images, np.uint8).reshape(-1, 28, 28)
    rows = [{"image": encode(picture), "label": label} for picture, label in zip(pictures, labels, strict=True)]
    return DatasetDict(train=Dataset.from_list(rows[:train]), test=Dataset.from_list(rows[-test:]))


def test_a_small_resnet_learns_handwritten_digits(shared_data: Path, tmp_path: Path) -> None:
    layers = {"embedding_size": 32, "hidden_sizes": [32, 64, 128], "depths": [1, 1, 1], "layer_type": "basic"}
    config = pretrain.Config(
        output=str(tmp_path / "run"),
        task=ImageClassification(augment={"crop": 0.8}, batch_norm="live"),
        model=FromScratch(architecture="resnet", sizes=layers, image_processor=NewImageProcessor(size=28)),
        data=Data(source=digits(shared_data / "img_mnist_t10k", 8000, 2000), validation=("test",)),
        batch=Batch(per_step=64),
        budget=Budget(epochs=2),
        optim=Optim(lr=2e-3, schedule="cosine", warmup=0.05, weight_decay=0.05),
    )
    final = pretrain.fit(pretrain.prepare(config)).final
    assert final is not None
    assert final.metrics["accuracy"].value > 0.97


def test_a_small_resnet_learns_photographs(shared_data: Path, tmp_path: Path) -> None:
    layers = {"embedding_size": 32, "hidden_sizes": [32, 64, 128], "depths": [1, 1, 1], "layer_type": "basic"}
    config = pretrain.Config(
        output=str(tmp_path / "run"),
        task=ImageClassification(augment={"crop": 0.5, "flip": True}, batch_norm="live"),
        model=FromScratch(architecture="resnet", sizes=layers, image_processor=NewImageProcessor(size=32)),
        data=Data(source=str(shared_data / "img_cifar10_subset"), layout="class-folders", validation=("test",)),
        batch=Batch(per_step=64),
        budget=Budget(epochs=6),
        optim=Optim(lr=3e-3, schedule="cosine", warmup=0.05, weight_decay=0.05),
    )
    final = pretrain.fit(pretrain.prepare(config)).final
    assert final is not None
    assert final.num_examples == 500
    assert final.metrics["accuracy"].low > 0.33, "chance is 0.1"


def save_new(folder: Path, model: FromScratch, auto_class: str, size: int) -> Pretrained:
    """Write a model with new weights, and its image processor, to a folder."""
    processor = new_image_processor(NewImageProcessor(size=size))
    initialise(model, auto_class, processor, seed=0).save_pretrained(folder)
    processor.save_pretrained(folder)
    return Pretrained(str(folder))


def test_a_small_segformer_finds_nuclei(shared_data: Path, tmp_path: Path) -> None:
    sizes = {"depths": [1] * 4, "hidden_sizes": [16, 32, 64, 128], "num_attention_heads": [1, 2, 4, 8]}
    rest = {"decoder_hidden_size": 64, "drop_path_rate": 0.0, "classifier_dropout_prob": 0.0}
    model = FromScratch(architecture="segformer", sizes=sizes | rest, image_processor="unused")
    config = finetune.Config(
        output=str(tmp_path / "run"),
        task=SemanticSegmentation(holds="instances", augment={"crop": 0.3, "flip": True}, batch_norm="live"),
        model=save_new(tmp_path / "model", model, "AutoModelForSemanticSegmentation", 128),
        data=Data(source=str(shared_data / "seg_nuclei_dsb2018"), layout="masks", validation=("test",)),
        batch=Batch(per_step=8),
        budget=Budget(steps=240),
        optim=Optim(lr=2e-3, schedule="cosine", warmup=0.05),
    )
    record = finetune.fit(finetune.prepare(config))
    final = record.final
    assert final is not None
    baseline = next(report for report in record.reports if report.name == "commonest class")
    assert final.metrics["mean_iou"].value > 0.75 > 0.5 > baseline.metrics["mean_iou"].value
