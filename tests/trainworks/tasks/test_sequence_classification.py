"""Classes with weights, and several classes a row: torch's own losses, in every micro-batch."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from datasets import ClassLabel, Dataset, Features, List, Value
from sklearn.metrics import f1_score
from torch import nn

import finetune
from trainworks import SequenceClassification, export, train_steps
from trainworks.data.columns import class_names, class_sets
from trainworks.errors import ConfigError, DataError
from trainworks.metrics import MultiLabelF1, Prediction

CLASSES = ("bad", "good", "so-so")


def texts(number: int = 60, *, several: bool) -> list[dict[str, Any]]:
    rng = random.Random(3)
    labels = {True: lambda: rng.sample(CLASSES, rng.choice([0, 1, 2, 2])), False: lambda: rng.choice("a" * 14 + "bc")}
    return [{"text": tiny.sentence(rng), "label": labels[several]()} for _ in range(number)]


def config(folder: Path, name: str, *, several: bool, micro: int = 8, **options: Any) -> finetune.Config:
    path = folder / "rows.jsonl"
    if not path.exists():
        tiny.save_model(folder / "model", "sequence-classification")
        path.write_text("".join(json.dumps(row) + "\n" for row in texts(several=several)), encoding="utf-8")
    made = tiny.config("sequence-classification", folder / "model", path, folder / name, micro=micro)
    return made.model_copy(update={"task": made.task.model_copy(update=options)})


@pytest.mark.parametrize("several", [True, False])
def test_the_weighted_loss_is_torchs_and_the_same_for_every_micro_batch(several: bool, tmp_path: Path) -> None:
    run = finetune.prepare(config(tmp_path, "eight", several=several, class_weights="balanced"))
    (window, *_) = run.windows()
    (batch,) = window.batches
    weights = batch["class_weights"]
    assert len(set(weights.tolist())) > 1
    model = run.model.eval()
    with torch.no_grad():
        logits = model(**run.task.inputs(batch)).logits
        ours = run.task.loss(model, batch)["loss"].sum() / run.task.count(batch)["loss"].sum()
    theirs = (
        nn.BCEWithLogitsLoss(pos_weight=weights)(logits, batch["labels"])
        if several
        else nn.CrossEntropyLoss(weight=weights)(logits, batch["labels"].argmax(-1))
    )
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    whole = [(step.loss.item(), step.grad_norm.item()) for step in train_steps(run)]
    assert whole[0][0] == pytest.approx(theirs.item(), rel=1e-6)
    apart = finetune.prepare(config(tmp_path, "three", several=several, micro=3, class_weights="balanced"))
    for expected, step in zip(whole, train_steps(apart), strict=True):
        assert (step.loss.item(), step.grad_norm.item()) == pytest.approx(expected, rel=1e-6)


def test_weights_far_below_one_are_a_mean_all_the_same(tmp_path: Path) -> None:
    losses = []
    for name, weight in (("one", 1.0), ("little", 1e-3)):
        weights = dict.fromkeys("abc", weight)
        run = finetune.prepare(config(tmp_path, name, several=False, class_weights=weights, labels=tuple("abc")))
        losses.append([step.loss.item() for step in train_steps(run)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_balanced_weights_give_every_class_the_same_sum() -> None:
    rows = Dataset.from_list([{"text": "a", "label": name} for name in "aaaaaabbbc"])
    task = SequenceClassification(class_weights="balanced").resolve(rows)
    assert task.class_weights == pytest.approx({"a": 10 / 18, "b": 10 / 9, "c": 10 / 3})
    lists = Dataset.from_list([{"text": "a", "label": names} for names in (["a"], ["a", "b"], ["a"], [])])
    several = SequenceClassification(class_weights="balanced").resolve(lists)
    assert several.multi_label is True
    assert several.class_weights == pytest.approx({"a": 1 / 3, "b": 3.0})


def test_a_weight_of_no_class_is_refused_with_the_nearest() -> None:
    rows = Dataset.from_list([{"text": "a", "label": name} for name in ("good", "bad")])
    with pytest.raises(ConfigError, match=r"task\.class_weights\.goood: no such class.*'good'"):
        SequenceClassification(class_weights={"goood": 2.0}).resolve(rows)
    task = SequenceClassification(class_weights={"good": 2.0}).resolve(rows)
    assert task.class_weights == {"bad": 1.0, "good": 2.0}


def test_classes_that_are_uneven_are_noted_and_so_is_what_they_weigh(tmp_path: Path) -> None:
    (note,) = finetune.prepare(config(tmp_path, "plain", several=False)).record.notes
    assert note.startswith("The classes are uneven: of the training rows ")
    (note,) = finetune.prepare(config(tmp_path, "even", several=False, class_weights="balanced")).record.notes
    assert note.startswith("The loss weighs the classes: a 0.")


def test_several_classes_a_row_are_measured_and_exported(tmp_path: Path) -> None:
    run = finetune.prepare(config(tmp_path, "run", several=True))
    record = finetune.fit(run)
    assert [report.name for report in record.reports] == ["class shares", "untuned", "final"]
    assert record.final is not None
    assert {"loss", "micro_f1", "macro_f1", "subset_accuracy"} == set(record.final.metrics)
    assert sum(record.data.splits[0].labels.values()) != record.data.splits[0].samples
    classify = transformers.pipeline("text-classification", model=str(export(run)), top_k=None)
    scores = {each["label"]: each["score"] for each in classify(["the old cat"])[0]}
    assert scores.keys() == set(CLASSES)
    assert sum(scores.values()) != pytest.approx(1.0, abs=1e-3), "each class has a probability of its own"


def test_lists_of_declared_classes_are_read_by_their_names() -> None:
    features = Features({"label": List(ClassLabel(names=["no", "yes"]))})
    rows = Dataset.from_dict({"label": [[1], [], [0, 1, 1]]}, features=features)
    assert class_names(rows, "label") == ("no", "yes")
    assert class_sets(rows, "label", ("yes", "no")) == [[0], [], [0, 1]]
    strings = Dataset.from_dict({"label": [["a", None]]}, features=Features({"label": List(Value("string"))}))
    with pytest.raises(DataError, match=r"row 4.*unknown label"):
        class_sets(strings, "label", ("a", "None"), first=4)


@pytest.mark.parametrize("name", ["micro_f1", "macro_f1"])
def test_f1_over_several_classes_is_scikit_learns_on_every_resample(name: str) -> None:
    rng = np.random.default_rng(5)
    wanted = rng.random((200, 4)) < [0.5, 0.2, 0.05, 0.01]
    said = wanted ^ (rng.random((200, 4)) < 0.1)
    metric = MultiLabelF1(name, 4)  # type: ignore[arg-type]
    pairs = [
        Prediction(np.flatnonzero(p).tolist(), np.flatnonzero(r).tolist()) for p, r in zip(said, wanted, strict=True)
    ]
    statistics = metric.statistics(pairs)
    for size in (200, 20, 5):
        rows = rng.integers(200, size=size)
        theirs = f1_score(wanted[rows], said[rows], average=name.removesuffix("_f1"), zero_division=np.nan)
        assert metric.value(statistics[rows]) == pytest.approx(theirs)
    assert np.isnan(metric.value(metric.statistics([])))
