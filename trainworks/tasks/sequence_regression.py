"""Text regression: a number for a text or a pair of texts, such as how alike two sentences are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from trainworks.data.bad_rows import BadRow, excerpt
from trainworks.data.cache import Prepared, table
from trainworks.data.columns import Kind
from trainworks.metrics import Correlation, Metric, Prediction
from trainworks.tasks.base import Baseline, Processor
from trainworks.tasks.text import TextTask, padded

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedModel

    from trainworks.data.loading import Batch, Row

__all__ = ["SequenceRegression"]


class SequenceRegression(TextTask):
    """Tell a number of a text or a pair of texts, by the least squared error."""

    pipeline_tag: ClassVar[str] = "text-classification"

    type: Literal["sequence-regression"] = "sequence-regression"
    label: str = "score"
    """Column of the number. The model learns it as it is: numbers far from 0 want many steps, or another scale."""

    def columns(self) -> dict[str, Kind]:
        """Return the texts and the number."""
        return {**super().columns(), self.label: "number"}

    def flaws(self, rows: Dataset) -> Iterator[BadRow]:
        """Yield rows without a number."""
        values = rows.with_format("arrow")[self.label][:].to_pylist()
        for row, value in enumerate(values):
            if value is None or not np.isfinite(value):
                yield BadRow("no number", "give it one", excerpt=excerpt(repr(value)), row=row, column=self.label)

    def head(self) -> dict[str, Any]:
        """Return a single output."""
        return {"num_labels": 1, "problem_type": "regression"}

    def prepare(self, rows: Dataset, processor: Processor, *, first: int = 0) -> Prepared:
        """Return one sample a row, with its number; texts longer than `max_length` are cut and the tokens cut are
        counted. BadRowsError for texts without a token."""
        columns, dropped = self._encoded(rows, processor, first)
        return Prepared(table({**columns, "labels": _numbers(rows, self.label)}), dropped)

    def facts(self, samples: Dataset) -> dict[str, Any]:
        """Return the tokens, and one counted number a row."""
        return super().facts(samples) | {"counted": len(samples)}

    def collate(self, rows: Sequence[Row], processor: Processor, *, train: bool) -> Batch:
        """Return the model's inputs, [rows, longest], and `labels`, [rows]."""
        import torch

        return padded(rows, processor) | {"labels": torch.tensor([float(row["labels"]) for row in rows])}

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """Return one for each row."""
        import torch

        return {"loss": torch.ones_like(batch["labels"])}

    def loss(self, model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
        """Return each row's squared error; the run's loss is their mean."""
        return {"loss": (model(**self.inputs(batch)).logits[:, 0].float() - batch["labels"]).square()}

    def predict(self, model: PreTrainedModel, batch: Batch, processor: Processor) -> dict[int, Prediction]:
        """Return the number of each row."""
        said = model(**self.inputs(batch)).logits[:, 0].float().tolist()
        return {
            index: Prediction(prediction, reference)
            for index, prediction, reference in zip(
                batch["index"].tolist(), said, batch["labels"].tolist(), strict=True
            )
        }

    def metrics(self) -> dict[str, Metric]:
        """Return both correlations; the mean squared error is the loss."""
        return {"pearson": Correlation("pearson"), "spearman": Correlation("spearman")}

    def baselines(self, train: Dataset, evaluation: Dataset) -> dict[str, Baseline]:
        """Return `mean`: always the mean of the training rows' numbers."""
        errors = np.square(_numbers(evaluation, "labels") - _numbers(train, "labels").mean())
        return {"mean": Baseline(losses=np.stack([errors, np.ones_like(errors)], axis=1))}


def _numbers(rows: Dataset, column: str) -> NDArray[np.float64]:
    return np.asarray(rows.with_format("arrow")[column][:].to_numpy(), dtype=np.float64)
