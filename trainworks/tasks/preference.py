"""Preference learning: answers that are wanted become likelier than others to the same prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from trainworks.data.cache import ragged
from trainworks.data.templates import answer_ends
from trainworks.data.text import IGNORED
from trainworks.errors import DataError
from trainworks.metrics import Mean, Metric, Prediction, PreferenceAccuracy, RewardGap
from trainworks.tasks.base import Processor
from trainworks.tasks.comparison import Comparison, Line, lines
from trainworks.tasks.language import LanguageTask
from trainworks.tasks.objectives import DPO, IPO, KTO, ORPO, Answers, SimPO

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedModel

    from trainworks.data.loading import Batch, Row
    from trainworks.heads import Head

__all__ = ["Preference"]

_BATCH = 1000
_OTHER = "other_"
"""What the names of a batch's tensors begin with that belong to prompts with answers of other rows."""


class Preference(Comparison, LanguageTask):
    """Learn to prefer one answer to another, or to give answers that are wanted: DPO, IPO, SimPO, ORPO, KTO.

    A row's answers are lines of one batch, so a pair is never cut apart.
    """

    can_pack: ClassVar[bool] = False

    type: Literal["preference"] = "preference"
    objective: Annotated[DPO | IPO | SimPO | ORPO | KTO, Field(discriminator="type")] = DPO()
    """The loss, with its options: `{type: dpo, beta: 0.1}`."""

    def resolve(self, rows: Dataset) -> Self:
        """Return the task with its format told by the columns; DataError when they tell none, or no pairs where the
        objective compares."""
        task = super().resolve(rows)
        if not task.is_paired and not task.objective.takes_single:
            raise DataError(
                f"task.objective: {task.objective.type} compares two answers, and the columns hold one with a label; "
                "say objective: {type: kto}, or give columns prompt, chosen and rejected"
            )
        return task

    def unlike(self, other: Self) -> str:
        """Return that one source has pairs and the other single answers."""
        return "" if other.is_paired == self.is_paired else "hold pairs and single answers; give all of them one shape"

    def stated(self) -> str:
        """Return how rows are read and what is learned of them, for the log."""
        return f"{super().stated()}, objective {self.objective.type}"

    def ends(self, processor: Processor) -> tuple[int, ...]:
        """Return the end token, and the token the template closes a turn with."""
        return answer_ends(processor)

    def arrange(self, samples: Dataset) -> Iterator[pyarrow.Table] | None:
        """Give each row of an objective that couples rows the answers of another one, half of the rows away: those next
        to it may answer the same prompt."""
        return self._with_others(samples) if self.couples else None

    def _with_others(self, samples: Dataset) -> Iterator[pyarrow.Table]:
        numbers = np.arange(len(samples))
        rows = samples.with_format("numpy").select_columns(["input_ids", "trained", "sizes"])
        for start in range(0, len(samples), _BATCH):
            own = numbers[start : start + _BATCH]
            pairs = zip(_rows(rows, own), _rows(rows, (own + len(samples) // 2) % len(samples)), strict=True)
            mixed = [self._mixed(row, other) for row, other in pairs]
            table = samples.with_format("arrow")[own]
            for name, kind in (("input_ids", np.int32), ("trained", np.bool_)):
                values = ragged([np.concatenate([line[name] for line in row]) for row in mixed], kind)
                table = table.append_column(_OTHER + name, values)
            sizes = ragged([np.array([len(line["input_ids"]) for line in row]) for row in mixed], np.int32)
            yield table.append_column(f"{_OTHER}sizes", sizes)

    def _mixed(self, row: Row, other: Row) -> list[Line]:
        """Return a row's prompts, each with the other row's answer at the same place."""
        mixed = []
        for line, instead in zip(lines(row), lines(other), strict=True):
            prompt, answer = int(np.argmax(line["trained"])), int(np.argmax(instead["trained"]))
            whole = {
                name: np.concatenate([line[name][:prompt], instead[name][answer:]])[: self.max_length]
                for name in ("input_ids", "trained")
            }
            mixed.append(whole)
        return mixed

    def facts(self, samples: Dataset) -> dict[str, Any]:
        """Return the tokens, and how many of them belong to answers."""
        learned = sum(int(row.sum()) for row in samples.with_format("numpy")["trained"][:])
        return super().facts(samples) | {"counted": learned}

    def prompt(self, row: dict[str, Any]) -> int:
        """Give everything before the first answer."""
        return max(1, int(np.argmax(row["trained"])))

    def collate(self, rows: Sequence[Row], processor: Processor, *, train: bool) -> Batch:
        """Return what a language task does of all answers, chosen ones first, with `desirable` [answers, rows], and
        `reference` of the same shape where rows are annotated.

        `places` are those of the tokens that belong to answers, in the lines laid end to end. What begins with `other_`
        is the same of prompts with the answers of other rows.
        """
        import torch

        def beside(name: str) -> Tensor:
            return torch.from_numpy(np.stack([np.asarray(row[name]) for row in rows], axis=1))

        batch = self._laid(rows, processor) | {"desirable": beside("desirable")}
        if f"{_OTHER}sizes" in rows[0]:
            others = [row | _others(row) for row in rows]
            batch |= {_OTHER + name: values for name, values in self._laid(others, processor).items()}
        return batch | {name: beside(name) for name in ("reference", f"{_OTHER}reference") if name in rows[0]}

    def _laid(self, rows: Sequence[Row], processor: Processor) -> Batch:
        import torch

        answers = [lines(row) for row in rows]
        batch = super().collate([line for same in zip(*answers, strict=True) for line in same], processor, train=True)
        return batch | {"places": torch.from_numpy(np.flatnonzero(batch["labels"].numpy() != IGNORED))}

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """Return how many comparisons, or answers, each row is."""
        return {"loss": self.objective.counts(batch["desirable"])}

    def loss_from(self, hidden: Tensor, head: Head, batch: Batch) -> dict[str, Tensor]:
        """Return each row's loss from the last states, [lines, longest, width]."""
        return {"loss": self.objective.losses(self._answers(hidden, head, batch))}

    def _answers(self, hidden: Tensor, head: Head, batch: Batch) -> Answers:
        desirable = batch["desirable"]
        drift = (batch["drift"] / batch["drift_answers"]).clamp(min=0) if "drift" in batch else None
        logps = _log_probabilities(hidden, head, batch).view_as(desirable)
        tokens = batch["learned"].view_as(desirable).clamp(min=1)  # a filler's are none
        return Answers(logps, tokens, desirable, batch.get("reference"), drift)

    @property
    def annotates(self) -> bool:
        """Whether the objective has a reference."""
        return self.objective.has_reference

    def annotate(self, model: PreTrainedModel, batch: Batch, processor: Processor) -> dict[str, Tensor]:
        """Return the log-probability of each row's answers as `reference`, [rows, answers]."""
        own = {"reference": self._asked(model, batch)}
        return own | {f"{_OTHER}reference": self._asked(model, _others(batch))} if self.couples else own

    def _asked(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Return the log-probability of each row's answers, [rows, answers]."""
        from trainworks.heads import Head

        logps = _log_probabilities(self.hidden(model, batch), Head(model), batch)
        return logps.view(2 if self.is_paired else 1, -1).t()

    @property
    def couples(self) -> bool:
        """Whether the objective takes the drift."""
        return self.objective.couples

    def couple(self, model: PreTrainedModel, batch: Batch, processor: Processor) -> dict[str, Tensor]:
        """Return what the mean log-ratio of prompts with answers of other rows is made of."""
        ratios = self._asked(model, _others(batch)).t() - batch[f"{_OTHER}reference"]
        return {"drift": ratios.sum(0), "drift_answers": self.objective.counts(batch["desirable"])}

    def predict(self, model: PreTrainedModel, batch: Batch, processor: Processor) -> dict[int, Prediction]:
        """Return how much more reward the chosen answer of a pair has; of a single one, its reward."""
        from trainworks.heads import Head

        rewards = self.objective.rewards(self._answers(self.hidden(model, batch), Head(model), batch))
        said = rewards[0] - rewards[1] if self.is_paired else rewards[0]
        return {
            index: Prediction(prediction, wanted)
            for index, prediction, wanted in zip(
                batch["index"].tolist(), said.tolist(), batch["desirable"][0].tolist(), strict=True
            )
        }

    def metrics(self) -> dict[str, Metric]:
        """Return how often rewards are the right way round, and by how much."""
        margin = Mean("reward_margin") if self.is_paired else RewardGap("reward_margin")
        return {"accuracy": PreferenceAccuracy(), "reward_margin": margin}

    def loss_metrics(self) -> dict[str, Metric]:
        """Return the loss alone: its exponential is no perplexity."""
        return {"loss": super().loss_metrics()["loss"]}


def _log_probabilities(hidden: Tensor, head: Head, batch: Batch) -> Tensor:
    """Return the log-probability of each line's answer, [lines]; only its tokens go through the head."""
    places = batch["places"]
    labels, rows = batch["labels"].flatten()[places], batch["row"].flatten()[places]
    losses = head.losses(hidden.flatten(0, 1).index_select(0, places), labels, ignored=IGNORED, alike=False)
    return -losses.new_zeros(len(batch["learned"])).index_add(0, rows, losses)


def _others(held: dict[str, Any]) -> dict[str, Any]:
    """Return what a row, or a batch, holds of prompts with answers of other rows, under plain names."""
    return {name.removeprefix(_OTHER): values for name, values in held.items() if name.startswith(_OTHER)}


def _rows(rows: Dataset, numbers: Any) -> list[Row]:
    columns = rows[numbers]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
