"""Reward models: a number for an answer, higher for the one of a pair that people prefer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np

from trainworks.data.bad_rows import BadRow, excerpt
from trainworks.data.comparisons import Compared
from trainworks.data.text import pad, padded_by_end
from trainworks.errors import DataError
from trainworks.metrics import Mean, Metric, Prediction, PreferenceAccuracy
from trainworks.settings import Rate
from trainworks.tasks.base import Processor
from trainworks.tasks.comparison import Comparison, lines

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedModel

    from trainworks.data.loading import Batch, Row

__all__ = ["Reward"]


class Reward(Comparison):
    """Score answers so that the chosen one of a pair gets more (Bradley and Terry 1952; Ouyang et al. 2022,
    arXiv:2203.02155, eq. 1): -log sigmoid(r(y) - r(y') - margin).

    The score is the only output of a sequence classifier, at the last token of prompt and answer.
    """

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    pipeline_tag: ClassVar[str] = "text-classification"

    type: Literal["reward"] = "reward"
    margin: str | None = None
    """Column of a number by how much more, at least, the chosen answer should get (Touvron et al. 2023,
    arXiv:2307.09288, section 3.2.2)."""
    center: Rate = 0.0
    """Weight of the squared sum of both rewards, which keeps them around zero (Eisenstein et al. 2023,
    arXiv:2312.09244)."""

    def _beside(self) -> tuple[str, ...]:
        return super()._beside() if self.margin is None else (*super()._beside(), self.margin)

    def resolve(self, rows: Dataset) -> Self:
        """Return the task with its format told by the columns; DataError when these are no pairs."""
        task = super().resolve(rows)
        if not task.is_paired:
            raise DataError(
                "task reward compares two answers, and the columns hold one with a label; give columns prompt, chosen "
                "and rejected"
            )
        return task

    def flaws(self, rows: Dataset) -> Iterator[BadRow]:
        """Yield rows whose answers cannot be compared, and margins that are no numbers."""
        yield from super().flaws(rows)
        if self.margin is not None:
            for row, value in enumerate(rows[self.margin]):
                if not isinstance(value, int | float) or not np.isfinite(value):
                    found = excerpt(repr(value))
                    yield BadRow("no margin", "give every row a number", excerpt=found, row=row, column=self.margin)

    def equip(self, processor: Processor) -> Processor:
        """Put the template in place, and pad with the end token where there is no padding token."""
        return padded_by_end(super().equip(processor))

    def head(self) -> dict[str, Any]:
        """Return that there is one output."""
        return {"num_labels": 1}

    def _own(self, rows: Sequence[Compared]) -> dict[str, Any]:
        if self.margin is None:
            return super()._own(rows)
        return super()._own(rows) | {"margin": np.array([row.columns[self.margin] for row in rows], dtype=np.float32)}

    def facts(self, samples: Dataset) -> dict[str, Any]:
        """Return the tokens, and one comparison a row."""
        return super().facts(samples) | {"counted": len(samples)}

    def collate(self, rows: Sequence[Row], processor: Processor, *, train: bool) -> Batch:
        """Return `input_ids` and `attention_mask` [lines, longest], chosen answers first, and `margin`, [rows]."""
        import torch

        ids = [line["input_ids"] for same in zip(*map(lines, rows), strict=True) for line in same]
        return {
            "input_ids": torch.from_numpy(pad(ids, processor.pad_token_id)),
            "attention_mask": torch.from_numpy(pad([np.ones(len(line)) for line in ids], 0)),
            "margin": torch.tensor([float(row.get("margin", 0.0)) for row in rows]),
        }

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """Return one for each row."""
        import torch

        return {"loss": torch.ones_like(batch["margin"])}

    def loss(self, model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
        """Return each row's negative log-likelihood of the choice, in nats, with what keeps rewards around zero."""
        from torch.nn.functional import logsigmoid

        chosen, rejected = self._rewards(model, batch)
        losses = -logsigmoid(chosen - rejected - batch["margin"])
        return {"loss": losses + self.center * (chosen + rejected) ** 2}

    def _rewards(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the rewards of chosen and rejected answers, each [rows]."""
        chosen, rejected = model(**self.inputs(batch)).logits.float()[:, 0].chunk(2)
        return chosen, rejected

    def predict(self, model: PreTrainedModel, batch: Batch, processor: Processor) -> dict[int, Prediction]:
        """Return how much more the chosen answer gets."""
        chosen, rejected = self._rewards(model, batch)
        return {
            index: Prediction(prediction, True)
            for index, prediction in zip(batch["index"].tolist(), (chosen - rejected).tolist(), strict=True)
        }

    def metrics(self) -> dict[str, Metric]:
        """Return how often the chosen answer gets more, and how much more."""
        return {"accuracy": PreferenceAccuracy(), "reward_margin": Mean("reward_margin")}
