"""What a task is: one frozen model in one file, its fields the YAML options, its methods the behaviour.

The loop, the evaluation harness and the planner see only this. The loss is returned as *named sums*, one number per
original row, and beforehand as the matching *named counts*; the loop divides the sums of a whole optimizer step by its
counts, over every process. So the gradient does not depend on how the step was cut into micro-batches or spread over
devices.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from trainworks.config import Settings
from trainworks.data.columns import Kind
from trainworks.data.loading import lengths
from trainworks.data.text import tokenizer_digest
from trainworks.errors import ConfigError
from trainworks.metrics import Metric, Prediction, Ratio
from trainworks.models import pad_with, vocabulary

if TYPE_CHECKING:
    import numpy as np
    import pyarrow
    from datasets import Dataset
    from PIL.Image import Image
    from torch import Tensor
    from transformers import PreTrainedModel

    from trainworks.data.bad_rows import BadRow
    from trainworks.data.cache import Prepared
    from trainworks.data.loading import Batch, Row, Samples
    from trainworks.data.templates import Agreement
    from trainworks.heads import Head
    from trainworks.record import DataFacts, Sample

__all__ = ["Baseline", "Processor", "Task"]

_INPUTS = ("input_ids", "attention_mask", "position_ids", "token_type_ids")

Processor = Any
"""A transformers tokenizer, image processor or processor: they share no base class."""


@dataclass(frozen=True)
class Baseline:
    """What a model without training would score: loss statistics [rows, 2] (sum, count), predictions, or both."""

    losses: np.ndarray[Any, Any] | None = None
    predictions: Mapping[int, Prediction] = field(default_factory=dict)


class Task(Settings, ABC):
    """The base of every task; what an easy task does not need has a default here."""

    type: str
    """The YAML tag; each task narrows it to its own."""
    auto_class: ClassVar[str]
    """The transformers Auto class that loads its models."""
    can_pack: ClassVar[bool] = False
    """Whether several rows may share a line of a batch (`batch.pack`): `collate` then heeds each row's `pack`."""
    reads: ClassVar[str] = "tokenizer"
    """What turns its rows into tensors: `tokenizer` or `image_processor`."""

    def whole_because(self) -> str:
        """Return why its models cannot be cut into the stages of a pipeline; empty where they can, by `hidden` and
        `loss_from`."""
        return "its models do not end in a vocabulary head"

    @property
    @abstractmethod
    def pipeline_tag(self) -> str:
        """The Hub's name of the task."""

    def columns(self) -> dict[str, Kind]:
        """Return the columns it reads, each with its kind, such as `text` or `label`; checked before a model loads."""
        return {}

    def flaws(self, rows: Dataset) -> Iterator[BadRow]:
        """Yield the rows that cannot be used, by number from 0, for what their columns' kinds do not tell; none by
        default."""
        return iter(())

    def resolve(self, rows: Dataset) -> Self:
        """Return the task with what only the training rows can tell filled in, such as the class names."""
        return self

    def equip(self, processor: Processor) -> Processor:
        """Return the processor made ready for this task, such as with a padding token; ConfigError when it cannot
        serve."""
        return processor

    def stated(self) -> str:
        """Return what the log says of how rows are read; empty where there is nothing to choose."""
        return ""

    def ends(self, processor: Processor) -> tuple[int, ...]:
        """Return the token ids that end what a model trained on this task says; empty where it says nothing."""
        return ()

    def head(self) -> dict[str, Any]:
        """Return what the model's configuration must say for this task, such as `num_labels`."""
        return {}

    def shared(self) -> dict[str, Any]:
        """Return what must be alike for all sources of a mixture."""
        return self.head()

    def unlike(self, other: Self) -> str:
        """Return why rows of another source, for which `other` is this task, cannot be in a batch with its own, to
        follow both sources' names; empty where they can."""
        if other.shared() == self.shared():
            return ""
        return (
            "have different classes, or classes of different weight; name them all in task.labels, and their weights "
            "in task.class_weights"
        )

    def notes(self, data: DataFacts) -> tuple[str, ...]:
        """Return what a reader of log and card must know of the data it learns from."""
        return ()

    def suits(self, outline: PreTrainedModel, processor: Processor) -> None:
        """See that a model, which may have no weights yet, and the processor go together; ConfigError when not."""
        embeddings = vocabulary(outline)
        if len(processor) > embeddings:
            raise ConfigError(
                f"model: the tokenizer has {len(processor)} tokens, the model {embeddings} embeddings; take the "
                "model's own tokenizer, or resize its embeddings beforehand (model.resize_token_embeddings)"
            )

    def adapt(self, model: PreTrainedModel, processor: Processor) -> None:
        """Write to the model's configuration what it should know of the processor, such as the padding token."""
        pad_with(model, processor)

    def settle(self, model: PreTrainedModel) -> None:
        """Put back into evaluation mode what stays still in training; nothing by default."""

    def fitted(self, model: PreTrainedModel) -> Self:
        """Return the task with what only the model can tell filled in, such as how many boxes it predicts."""
        return self

    def footprint(self, samples: Samples, processor: Processor, model: PreTrainedModel) -> tuple[int, int]:
        """Return the tokens of the largest sample, and the logits the model makes of each, for a guess at memory."""
        sizes = samples.lengths()
        return 1 if sizes is None else int(sizes.max()), vocabulary(model)

    def verify(self, model: PreTrainedModel) -> None:
        """Prove on a few tokens what the task takes for granted of the model; ConfigError when it does not hold."""

    def verify_packing(self, model: PreTrainedModel, processor: Processor) -> None:
        """Prove on a few tokens that the model keeps packed rows apart; ConfigError when it does not. Called where rows
        are packed."""

    @abstractmethod
    def prepare(self, rows: Dataset, processor: Processor, *, first: int = 0) -> Prepared:
        """Turn rows into training sequences; a column `length`, where there is one, counts each one's tokens.

        Called on a part of the rows at a time, in several processes at once, so each row is seen by itself. `first` is
        the number of the part's first row in the split: a DataError names rows by their number there.
        """

    def arrange(self, samples: Dataset) -> Iterator[pyarrow.Table] | None:
        """Yield the samples that all of `prepare`'s make together, where they do not come of one row each; None
        where they do."""
        return None

    def facts(self, samples: Dataset) -> dict[str, Any]:
        """Return what the record says of prepared samples: fields of `SplitFacts`, such as tokens, counted, labels."""
        tokens = 0 if (sizes := lengths(samples)) is None else int(sizes.sum())
        return {"tokens": tokens, "counted": tokens}

    def learned(self, row: Mapping[str, Any]) -> np.ndarray[Any, Any]:
        """Return which of a prepared row's tokens the loss counts, [tokens]; none where its labels are no tokens."""
        import numpy as np

        return np.zeros(len(row["input_ids"]), dtype=np.bool_)

    def agreement(self, rows: Dataset, processor: Processor) -> Agreement | None:
        """Compare some rows with what the model is given at inference; None where nothing can differ."""
        return None

    def fingerprint(self, processor: Processor) -> str:
        """Return a digest of all of the processor that decides what `prepare` makes."""
        return tokenizer_digest(processor)

    @property
    def annotates(self) -> bool:
        """Whether rows are told, once, what the model says of them before it is trained."""
        return False

    def annotate(self, model: PreTrainedModel, batch: Batch, processor: Processor) -> dict[str, Tensor]:
        """Return, of the model before training, columns to be added to the batch's rows, each [rows, any]."""
        raise NotImplementedError(f"{type(self).__name__} annotates no rows")

    @property
    def couples(self) -> bool:
        """Whether a row's loss depends on the other rows of its optimizer step, through sums over all of them."""
        return False

    def couple(self, model: PreTrainedModel, batch: Batch, processor: Processor) -> dict[str, Tensor]:
        """Return the numbers of each row, [rows], whose sums over the whole step every batch of it is then given, each
        [1], under the same names. No gradient flows through them."""
        raise NotImplementedError(f"{type(self).__name__} couples no rows")

    def paired(self) -> bool:
        """Tell whether each training row brings another along, as `partner`; drawn from its seed, so that what is made
        of both does not depend on the micro-batch."""
        return False

    @abstractmethod
    def collate(self, rows: Sequence[Row], processor: Processor, *, train: bool) -> Batch:
        """Stack prepared rows; each row's `seed` is the only source of chance allowed here."""

    def example(self, rows: Dataset, processor: Processor, *, size: int) -> Batch:
        """Return the largest batch of `size` rows the data can ask for."""
        import numpy as np

        sizes = lengths(rows)
        longest = 0 if sizes is None else int(np.argmax(sizes))
        row = rows.with_format("numpy")[longest : longest + 1]
        only = {name: values[0] for name, values in row.items()}
        own = {"index": longest, "epoch": 0, "seed": 0, "source": 0, "weight": 1.0, "partner": only}
        return self.collate([only | own] * size, processor, train=True)

    @abstractmethod
    def count(self, batch: Batch) -> dict[str, Tensor]:
        """Return each loss term's denominators, [original rows]; known before the model runs."""

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Return what the model is called with."""
        return {name: batch[name] for name in _INPUTS if name in batch}

    @abstractmethod
    def loss(self, model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
        """Return each loss term's sums, [original rows], under the same names as `count`."""

    def hidden(self, model: PreTrainedModel, batch: Batch, states: Tensor | None = None) -> Tensor:
        """Return the backbone's last states, or those of a pipeline's stage, which goes on from the ones given."""
        raise NotImplementedError(f"{type(self).__name__} has no backbone of its own")

    def loss_from(self, hidden: Tensor, head: Head, batch: Batch) -> dict[str, Tensor]:
        """Return the sums from the backbone's last states, for tasks whose model ends in a vocabulary head."""
        raise NotImplementedError(f"{type(self).__name__} has no vocabulary head")

    def predict(self, model: PreTrainedModel, batch: Batch, processor: Processor) -> dict[int, Prediction]:
        """Return what the metrics are computed from, by example number."""
        return {}

    def join(self, parts: Sequence[Prediction], rows: Mapping[str, Sequence[Any]]) -> Prediction:
        """Return the prediction of one example from what `predict` said of each of its prepared rows, in order, and the
        columns of these.

        Called where `prepare` makes several rows of one example, one after the other, and says which is which: in a
        column `part`, 0 for the first row of each example. Then `predict` may leave the references to this.
        """
        raise NotImplementedError(f"{type(self).__name__} makes one row of an example")

    def show(self, model: PreTrainedModel, rows: Dataset, processor: Processor) -> tuple[Sample, ...]:
        """Return a few worked examples for people to read. All ranks."""
        return ()

    def metrics(self) -> dict[str, Metric]:
        """Return the metrics of its predictions."""
        return {}

    def pictures(self, samples: Dataset, processor: Processor, *, number: int, train: bool) -> list[Image]:
        """Return the first samples drawn as the model sees them; none for rows that are no images."""
        return []

    def loss_metrics(self) -> dict[str, Metric]:
        """Return the metrics of its loss sums and counts, of each term in turn; they exist for every task."""
        return {"loss": Ratio("loss", higher_is_better=False)}

    def baselines(self, train: Dataset, evaluation: Dataset) -> dict[str, Baseline]:
        """Return, by name, what doing without a model would score on `evaluation`."""
        return {}
