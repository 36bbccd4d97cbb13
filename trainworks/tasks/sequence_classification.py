"""Text classification: one class for a text or a pair of texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, Strict

from trainworks.data.bad_rows import BadRow, BadRowsError, excerpt
from trainworks.data.cache import Prepared, ragged, table
from trainworks.data.columns import Kind, class_ids, class_names
from trainworks.data.text import pad
from trainworks.errors import ConfigError, DataError
from trainworks.metrics import Accuracy, MacroF1, Metric, Prediction
from trainworks.tasks.base import Baseline, Processor, Task

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedModel

    from trainworks.data.loading import Batch, Row

__all__ = ["SequenceClassification"]


class SequenceClassification(Task):
    """Tell the class of a text, such as its sentiment."""

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    pipeline_tag: ClassVar[str] = "text-classification"

    type: Literal["sequence-classification"] = "sequence-classification"
    text: str = "text"
    """Column of the text."""
    pair: str | None = None
    """Column of a second text, for tasks on pairs."""
    label: str = "label"
    """Column of the class: a name or a number."""
    labels: tuple[str, ...] = ()
    """Class names in the order of their numbers; found in the training rows when empty."""
    max_length: Annotated[int, Strict(), Field(gt=1)] = 512
    """Longest text in tokens, special ones included."""
    too_long: Literal["truncate", "error"] = "truncate"
    """What becomes of a longer one; tokens cut are counted in the record."""

    def columns(self) -> dict[str, Kind]:
        """Return the texts and the label."""
        texts: dict[str, Kind] = {self.text: "text"} if self.pair is None else {self.text: "text", self.pair: "text"}
        return {**texts, self.label: "label"}

    def flaws(self, rows: Dataset) -> Iterator[BadRow]:
        """Yield rows without a label, or with one that is no class."""
        try:
            class_ids(rows, self.label, self.labels)
        except BadRowsError as error:
            yield from error.problems

    def resolve(self, rows: Dataset) -> Self:
        """Return the task with its class names."""
        names = self.labels or class_names(rows, self.label)
        if len(names) < 2:
            found = excerpt(repr(names[0]))
            raise DataError(f"column {self.label!r} has one class only ({found}): there is nothing to tell apart")
        return self.model_copy(update={"labels": names})

    def equip(self, processor: Processor) -> Processor:
        """Pad with the end token where there is no padding token."""
        if processor.pad_token_id is None:
            if processor.eos_token is None:
                raise ConfigError(
                    f"the tokenizer of {processor.name_or_path} has neither padding nor end token to batch with"
                )
            processor.pad_token = processor.eos_token
        return processor

    def head(self) -> dict[str, Any]:
        """Return the classes for the model's configuration."""
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {name: number for number, name in enumerate(self.labels)},
        }

    def prepare(self, rows: Dataset, processor: Processor, *, first: int = 0) -> Prepared:
        """Return one sample a row; texts longer than `max_length` are cut and the tokens cut are counted.

        BadRowsError for texts without a token, as an empty one is where the tokenizer puts nothing around it.
        """
        texts = (rows[self.text][:],) if self.pair is None else (rows[self.text][:], rows[self.pair][:])
        whole = dict(processor(*texts, verbose=False))
        if empty := [row for row, ids in enumerate(whole["input_ids"], start=first) if not ids]:
            raise BadRowsError([BadRow("no tokens", "give it a text", row=row, column=self.text) for row in empty])
        cut = [max(0, len(ids) - self.max_length) for ids in whole["input_ids"]]
        if any(cut) and self.too_long == "error":
            number = int(np.argmax(np.array(cut) > 0))
            raise DataError(
                f"row {first + number}: {self.max_length + cut[number]} tokens, task.max_length is {self.max_length}; "
                "raise it, or say task.too_long: truncate"
            )
        encoded = dict(processor(*texts, truncation=True, max_length=self.max_length)) if any(cut) else whole
        columns: dict[str, Any] = {name: ragged(ids, np.int32) for name, ids in encoded.items()}
        columns["labels"] = class_ids(rows, self.label, self.labels, first=first)
        columns["length"] = [len(ids) for ids in encoded["input_ids"]]
        return Prepared(table(columns), {"tokens cut": sum(cut)})

    def facts(self, samples: Dataset) -> dict[str, Any]:
        """Return the tokens, one counted label a row, and the rows of each class."""
        rows = Counter(samples["labels"][:])
        labels = {name: rows[number] for number, name in enumerate(self.labels)}
        return super().facts(samples) | {"counted": len(samples), "labels": labels}

    def collate(self, rows: Sequence[Row], processor: Processor, *, train: bool) -> Batch:
        """Return the model's inputs, [rows, longest], and `labels`, [rows]."""
        import torch

        fills = {
            "input_ids": processor.pad_token_id,
            "attention_mask": 0,
            "token_type_ids": processor.pad_token_type_id,
        }
        batch = {
            name: torch.from_numpy(pad([row[name] for row in rows], fill))
            for name, fill in fills.items()
            if name in rows[0]
        }
        return batch | {"labels": torch.tensor([int(row["labels"]) for row in rows])}

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """Return one for each row."""
        import torch

        return {"loss": torch.ones_like(batch["labels"])}

    def loss(self, model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
        """Return each row's cross-entropy in nats."""
        from torch.nn.functional import cross_entropy

        logits = model(**self.inputs(batch)).logits.float()
        return {"loss": cross_entropy(logits, batch["labels"], reduction="none")}

    def predict(self, model: PreTrainedModel, batch: Batch, processor: Processor) -> dict[int, Prediction]:
        """Return the likeliest class of each row."""
        said = model(**self.inputs(batch)).logits.argmax(-1).tolist()
        return {
            index: Prediction(prediction, reference)
            for index, prediction, reference in zip(
                batch["index"].tolist(), said, batch["labels"].tolist(), strict=True
            )
        }

    def metrics(self) -> dict[str, Metric]:
        """Return accuracy and the mean F1 over the classes."""
        return {"accuracy": Accuracy(), "macro_f1": MacroF1(classes=tuple(range(len(self.labels))))}

    def baselines(self, train: Dataset, evaluation: Dataset) -> dict[str, Baseline]:
        """Return `majority class`: always the commonest class of the training rows, each as likely as it is often
        there."""
        counts = Counter(train["labels"][:])
        majority = max(counts, key=lambda label: (counts[label], -label))
        share = np.array([(counts[number] + 1) / (len(train) + len(self.labels)) for number in range(len(self.labels))])
        truth = np.asarray(evaluation["labels"][:])
        losses = np.stack([-np.log(share[truth]), np.ones(len(truth))], axis=1)
        return {
            "majority class": Baseline(
                losses, {row: Prediction(majority, int(label)) for row, label in enumerate(truth)}
            )
        }
