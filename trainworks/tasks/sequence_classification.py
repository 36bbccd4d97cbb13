"""Text classification: the class, or the classes, of a text or a pair of texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

from trainworks.data.bad_rows import BadRow, BadRowsError, excerpt
from trainworks.data.cache import Prepared, ragged, table
from trainworks.data.columns import Kind, class_ids, class_names, class_sets, holds_lists
from trainworks.errors import ConfigError, DataError, nearest
from trainworks.metrics import Accuracy, MacroF1, Metric, MultiLabelF1, Prediction
from trainworks.settings import Name, Rate
from trainworks.tasks.base import Baseline, Processor
from trainworks.tasks.text import TextTask, classes, padded

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedModel

    from trainworks.data.loading import Batch, Row
    from trainworks.record import DataFacts

__all__ = ["SequenceClassification"]


_UNEVEN = 10
"""How many times the rows of the rarest class those of the commonest may be before it is noted."""


class SequenceClassification(TextTask):
    """Tell the class of a text, such as its sentiment, or all of several that it has."""

    pipeline_tag: ClassVar[str] = "text-classification"

    type: Literal["sequence-classification"] = "sequence-classification"
    label: str = "label"
    """Column of the class: a name or a number; or a list of them."""
    labels: tuple[str, ...] = ()
    """Class names in the order of their numbers; found in the training rows when empty."""
    multi_label: bool | Literal["auto"] = "auto"
    """Whether a row may have several classes, or none, `label` then being a list; `auto` tells it by the column."""
    class_weights: Literal["off", "balanced"] | dict[Name, Rate] = "off"
    """What the rows of a class weigh in the loss, by its name; of one that is not named, 1. The loss is the weighted
    mean, as in torch's CrossEntropyLoss. `balanced` is rows / (classes x rows of the class). Where rows have several
    classes, it is what having a class weighs against not having it (`pos_weight`), `balanced` being rows without it /
    rows with it."""

    def columns(self) -> dict[str, Kind]:
        """Return the texts and the label."""
        return {**super().columns(), self.label: "labels" if self.multi_label is True else "label"}

    def flaws(self, rows: Dataset) -> Iterator[BadRow]:
        """Yield rows without a label, or with one that is no class."""
        try:
            self._classes(rows)
        except BadRowsError as error:
            yield from error.problems

    def _classes(self, rows: Dataset, first: int = 0) -> list[list[int]]:
        """Return each row's classes, by their numbers."""
        if self.multi_label is True:
            return class_sets(rows, self.label, self.labels, first=first)
        return [[number] for number in class_ids(rows, self.label, self.labels, first=first)]

    def resolve(self, rows: Dataset) -> Self:
        """Return the task with its class names, what they weigh, and whether a row has several."""
        several = holds_lists(rows, self.label) if self.multi_label == "auto" else self.multi_label
        names = self.labels or class_names(rows, self.label)
        if len(names) < 2 and not several:
            found = excerpt(repr(names[0]))
            raise DataError(f"column {self.label!r} has one class only ({found}): there is nothing to tell apart")
        task = self.model_copy(update={"labels": names, "multi_label": several})
        return task.model_copy(update={"class_weights": task._weighed(rows)})

    def _weighed(self, rows: Dataset) -> Literal["off"] | dict[str, float]:
        if self.class_weights == "off":
            return "off"
        if isinstance(self.class_weights, dict):
            for name in self.class_weights.keys() - {*self.labels}:
                raise ConfigError(f"task.class_weights.{name}: no such class{nearest(name, self.labels)}")
            return {name: self.class_weights.get(name, 1.0) for name in self.labels}
        counts = Counter(number for row in self._classes(rows) for number in row)
        often = {name: max(1, counts[number]) for number, name in enumerate(self.labels)}
        if self.multi_label is True:
            return {name: (len(rows) - count) / count for name, count in often.items()}
        return {name: len(rows) / (len(often) * count) for name, count in often.items()}

    def _weights(self) -> list[float]:
        """Return what each class weighs."""
        given = self.class_weights
        return [given.get(name, 1.0) if isinstance(given, dict) else 1.0 for name in self.labels]

    def shared(self) -> dict[str, Any]:
        """Return classes and weights."""
        return self.head() | {"class_weights": self.class_weights}

    def notes(self, data: DataFacts) -> tuple[str, ...]:
        """Say what the classes weigh, or else how uneven they are, if they are."""
        if self.class_weights != "off":
            said = ", ".join(f"{name} {weight:.3g}" for name, weight in zip(self.labels, self._weights(), strict=True))
            return (f"The loss weighs the classes: {excerpt(said)}.",)
        counts = next(split.labels for split in data.splits if split.name == "train")
        often, rarely = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
        if counts[often] <= _UNEVEN * counts[rarely]:
            return ()
        return (
            f"The classes are uneven: of the training rows {counts[often]:,} are {excerpt(often)}, {counts[rarely]:,} "
            f"{excerpt(rarely)}; task.class_weights: balanced would make up for it.",
        )

    def head(self) -> dict[str, Any]:
        """Return the classes for the model's configuration."""
        return {
            **classes(self.labels),
            **({"problem_type": "multi_label_classification"} if self.multi_label is True else {}),
        }

    def prepare(self, rows: Dataset, processor: Processor, *, first: int = 0) -> Prepared:
        """Return one sample a row, with its classes; texts longer than `max_length` are cut and the tokens cut are
        counted. BadRowsError for texts without a token."""
        columns, dropped = self._encoded(rows, processor, first)
        columns["labels"] = ragged([np.array(row) for row in self._classes(rows, first)], np.int32)
        return Prepared(table(columns), dropped)

    def facts(self, samples: Dataset) -> dict[str, Any]:
        """Return the tokens, one counted label a row, and the rows of each class."""
        rows = Counter(number for row in samples["labels"][:] for number in row)
        labels = {name: rows[number] for number, name in enumerate(self.labels)}
        return super().facts(samples) | {"counted": len(samples), "labels": labels}

    def collate(self, rows: Sequence[Row], processor: Processor, *, train: bool) -> Batch:
        """Return the model's inputs, [rows, longest], `labels`, [rows, classes]: 1 where a row has the class, and
        `class_weights`, [classes]."""
        import torch

        labels = torch.zeros(len(rows), len(self.labels))
        for line, row in zip(labels, rows, strict=True):
            line[row["labels"].tolist()] = 1.0
        return padded(rows, processor) | {"labels": labels, "class_weights": torch.tensor(self._weights())}

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """Return what each row's class weighs; where rows have several, the number of classes."""
        if self.multi_label is True:
            return {"loss": batch["labels"].new_full((len(batch["labels"]),), len(self.labels))}
        return {"loss": batch["labels"] @ batch["class_weights"]}

    def loss(self, model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
        """Return each row's weighted cross-entropy in nats, or the sum of its classes' binary ones."""
        from torch.nn.functional import binary_cross_entropy_with_logits, log_softmax

        logits, labels, weights = model(**self.inputs(batch)).logits.float(), batch["labels"], batch["class_weights"]
        if self.multi_label is True:
            apart = binary_cross_entropy_with_logits(logits, labels, pos_weight=weights, reduction="none")
            return {"loss": apart.sum(-1)}
        return {"loss": -(log_softmax(logits, -1) * labels) @ weights}

    def predict(self, model: PreTrainedModel, batch: Batch, processor: Processor) -> dict[int, Prediction]:
        """Return the likeliest class of each row, or all that are likelier than not."""
        logits, labels = model(**self.inputs(batch)).logits, batch["labels"]
        if self.multi_label is True:
            said, wanted = map(_numbers, (logits > 0, labels > 0))
        else:
            said, wanted = logits.argmax(-1).tolist(), labels.argmax(-1).tolist()
        return {
            index: Prediction(prediction, reference)
            for index, prediction, reference in zip(batch["index"].tolist(), said, wanted, strict=True)
        }

    def metrics(self) -> dict[str, Metric]:
        """Return accuracy and the mean F1 over the classes; where rows have several, accuracy is that of whole sets."""
        if self.multi_label is True:
            size = len(self.labels)
            scores = {name: MultiLabelF1(name, size) for name in ("micro_f1", "macro_f1")}
            return scores | {"subset_accuracy": Accuracy(name="subset_accuracy")}
        return {"accuracy": Accuracy(), "macro_f1": MacroF1(classes=tuple(range(len(self.labels))))}

    def baselines(self, train: Dataset, evaluation: Dataset) -> dict[str, Baseline]:
        """Return `majority class`: always the commonest class of the training rows, each as likely as it is often
        there. Where rows have several, `class shares`: those that more than half of the rows have."""
        counts = Counter(number for row in train["labels"][:] for number in row)
        wanted, weights = evaluation["labels"][:], np.array(self._weights())
        often = np.array([counts[number] for number in range(len(self.labels))])
        if self.multi_label is True:
            return {"class shares": _of_shares((often + 1) / (len(train) + 2), wanted, weights)}
        majority = int(np.argmax(often))
        nats, truth = -np.log((often + 1) / (len(train) + len(often))), np.array([row[0] for row in wanted])
        losses = np.stack([nats[truth] * weights[truth], weights[truth]], axis=1)
        said = {row: Prediction(majority, int(label)) for row, label in enumerate(truth)}
        return {"majority class": Baseline(losses, said)}


def _numbers(flags: Tensor) -> list[tuple[int, ...]]:
    """Return the places that are true in each row."""
    return [tuple(place for place, flag in enumerate(row) if flag) for row in flags.tolist()]


def _of_shares(shares: NDArray[np.float64], wanted: Sequence[Sequence[int]], weights: NDArray[np.float64]) -> Baseline:
    there = np.zeros((len(wanted), len(shares)))
    for line, row in zip(there, wanted, strict=True):
        line[list(row)] = 1.0
    nats = -there * np.log(shares) * weights - (1 - there) * np.log(1 - shares)
    said = tuple(np.flatnonzero(shares > 0.5).tolist())
    losses = np.stack([nats.sum(1), np.full(len(wanted), len(shares))], axis=1)
    return Baseline(losses, {row: Prediction(said, tuple(classes)) for row, classes in enumerate(wanted)})
