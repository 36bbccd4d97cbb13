"""A run: the live objects that training, evaluation and checkpoints share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn

from trainworks.averages import Averages
from trainworks.bad_steps import Watch
from trainworks.data.loading import Batch, Samples, Window, evaluation_batches, windows
from trainworks.data.order import Plan
from trainworks.data.packing import Packs
from trainworks.errors import CheckpointError
from trainworks.full_disk import is_full, room
from trainworks.parallel.context import whole_lines
from trainworks.parallel.passes import Passes, PipelinePasses
from trainworks.record import EvalReport, RunRecord
from trainworks.speed.working_weights import WorkingWeights
from trainworks.tasks import Processor, Task

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from torch.optim import Optimizer
    from transformers import PreTrainedModel

    from trainworks.parallel.launch import World
    from trainworks.schema import RunConfig
    from trainworks.tuning import Tuned

__all__ = ["Progress", "Run", "Step"]


class Step(nn.Module):
    """The module that is wrapped for many devices: its forward *is* the task's loss.

    Nothing calls the model past it. A loss taken behind DDP's back gives wrong gradients without an error, and behind
    FSDP's back it mixes sharded and whole tensors.
    """

    def __init__(
        self, model: PreTrainedModel, task: Task, processor: Processor, *, rounded: WorkingWeights | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.processor = processor
        self.rounded = rounded

    def train(self, mode: bool = True) -> Self:
        """Put the model into training mode, but for what its task keeps still."""
        super().train(mode)
        self.task.settle(self.model)
        return self

    def forward(self, given: Any, *, ask: Literal["loss", "predict", "show", "annotate", "couple"] = "loss") -> Any:
        """Return the loss sums of a batch, or its predictions, or worked examples of some rows, or what the task wants
        to know beforehand of each row, or of all rows of a step."""
        with nullcontext() if self.rounded is None else self.rounded.used():
            if ask == "loss":
                return self.task.loss(self.model, given)
            with whole_lines(self.model):
                return getattr(self.task, ask)(self.model, given, self.processor)


@dataclass
class Progress:
    """How far training has come; with the weights, the optimizer's moments and the RNG, all that a resume needs."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """Seconds spent in training steps, over all the run's processes in turn."""
    order: str = ""
    """A digest of what decides the order of the samples."""
    origin: int = 0
    """Samples that were taken before that order began: in another one, of other data."""


_GAPS = "The disk was full at times: lines of metrics.jsonl, or files of evaluations, may be missing."

Statistics = dict[str, tuple["np.ndarray[Any, Any]", "np.ndarray[Any, Any]"]]
"""By metric: example numbers [n] and sufficient statistics [n, k]."""


@dataclass
class Run:
    """Everything a training run holds; made by `pretrain.prepare` or `finetune.prepare`, driven by `train_steps` or
    `fit`."""

    config: RunConfig[Any]
    task: Task
    """The configuration's task, with what only the data could tell filled in."""
    world: World
    step: nn.Module
    """The wrapped `Step`."""
    tuned: Tuned
    processor: Processor
    optimizer: Optimizer
    watch: Watch
    """Keeps bad steps from the weights."""
    train: Dataset
    """The prepared rows."""
    packs: Packs
    """Which of them make one training sample."""
    validation: Dataset | None
    ends: tuple[int, ...]
    """The tokens that end an answer, of whichever source."""
    plan: Plan
    micro: int
    record: RunRecord
    progress: Progress = field(default_factory=Progress)
    statistics: dict[str, Statistics] = field(default_factory=dict)
    """Per evaluation, what comparisons are computed from."""
    averages: Averages | None = None
    """Of the weights over the steps, where the configuration asks for them."""
    between_batches: Callable[[], object] = bool
    """Called between the batches of an evaluation; what it raises ends the evaluation. All ranks."""

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model itself, adapters inside it."""
        return self.tuned.model

    def trained(self) -> dict[str, Tensor]:
        """Return this rank's weights that are trained, by name; one that two ranks of a pipeline have, on one of
        them."""
        repeated = self.passes.repeated
        named = self.model.named_parameters()
        return {name: weight for name, weight in named if weight.requires_grad and name not in repeated}

    @property
    def passes(self) -> Passes:
        """How the step is called on micro-batches."""
        kind = PipelinePasses if self.world.layout.pipeline > 1 else Passes
        return kind(self.world, self.step)

    @property
    def samples(self) -> Samples:
        """What is trained on."""
        return Samples(self.train, self.packs, self.task.paired())

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of the sources its rows come from."""
        return tuple(self.config.data.readings())

    @property
    def folder(self) -> Path:
        """The run's output folder."""
        return Path(self.config.output)

    def stand_at(self, progress: Progress) -> None:
        """Go on from where a checkpoint stands: in the order that it was trained in, or where that is another one, at
        the beginning of the run's own."""
        if progress.order != self.progress.order:
            progress = replace(progress, order=self.progress.order, origin=progress.samples)
        self.progress = progress
        self.plan = self.plan.going_on(
            step=progress.step,
            position=progress.samples,
            origin=progress.origin,
            steps=self.config.budget.steps,
        )

    def windows(self) -> Iterator[Window]:
        """Yield the optimizer steps still to do, each as this rank's micro-batches on its device."""
        collate = partial(self.task.collate, processor=self.processor, train=True)
        todo = windows(
            self.samples,
            self.plan,
            collate,
            start=self.progress.step,
            ranks=self.world.ranks,
            rank=self.world.rank,
            micro=self.micro,
            workers=self.config.data.workers,
            pin=self.world.on_gpu,
        )
        for window in todo:
            yield Window(
                [self.world.move(self.world.local(batch)) for batch in window.batches], window.samples, window.tokens
            )

    def evaluation_batches(self, rows: Dataset) -> Iterator[Batch]:
        """Yield this rank's share of `rows` on its device, every row once, fillers with weight 0."""
        collate = partial(self.task.collate, processor=self.processor, train=False)
        shares = evaluation_batches(
            rows,
            collate,
            ranks=self.world.ranks,
            rank=self.world.rank,
            micro=self.micro,
            workers=self.config.data.workers,
            pin=self.world.on_gpu,
        )
        for batch in shares:
            self.between_batches()
            yield self.world.move(batch)

    def averaged(self, use: Literal["evaluate", "export"]) -> AbstractContextManager[None]:
        """Put the averages in the place of the weights inside the block, if they are for that."""
        average = self.config.optim.average
        wanted = average is not None and use in average.use
        return self.averages.used() if wanted and self.averages is not None else nullcontext()

    def coupled(self, batches: Iterable[Batch]) -> Batch:
        """Return what the rows of these batches share, summed over all of them and all ranks, for a task whose loss
        couples rows; nothing for any other. It belongs into each of the batches. All ranks."""
        if not self.task.couples:
            return {}
        totals: dict[str, Tensor] = {}
        with torch.no_grad():
            for batch in batches:
                for name, values in self.step(batch, ask="couple").items():
                    totals[name] = totals.get(name, 0) + (values * batch["weight"]).sum()[None]
        return self.world.total(totals)

    def note(self, **facts: Any) -> None:
        """Replace fields of the record; `save_record` writes it."""
        self.record = self.record.model_copy(update=facts)

    def add_report(self, report: EvalReport, statistics: Mapping[str, Any]) -> None:
        """Append an evaluation, in place of an earlier one of the same name."""
        self.statistics[report.name] = dict(statistics)
        before = (old.without_pictures() for old in self.record.reports if old.name != report.name)
        self.note(reports=(*before, report))

    def save_record(self) -> None:
        """Write `run.json`; only the main process does."""
        if self.world.is_main:
            with self.writing():
                self.record.write(self.folder)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Write inside what the run keeps of itself; main process only. CheckpointError where that cannot be done.

        A full disk is passed over with a note where the run is to go on all the same (`faults.full_disk`), but not
        before the record is there, nor when it is to say how the run ended.
        """
        try:
            yield
        except OSError as error:
            if not is_full(error):
                raise CheckpointError(f"{self.folder} cannot be written to: {error}") from error
            last = self.record.status != "running" or not (self.folder / "run.json").exists()
            if last or self.config.faults.full_disk == "stop":
                raise CheckpointError(
                    f"the disk is full: {self.folder} has {room(self.folder)} free ({error})"
                ) from error
            if _GAPS not in self.record.notes:
                self.note(notes=(*self.record.notes, _GAPS))

    def _repr_html_(self) -> str:
        from html import escape

        model, held_out = self.record.model, 0 if self.validation is None else len(self.validation)
        facts = {
            "run": f"{self.record.kind}: {self.task.pipeline_tag}",
            "model": f"{model.architecture}, {model.num_parameters:,} parameters, {model.num_trainable:,} trained",
            "data": f"{self.record.data.source}: {self.plan.num_samples:,} samples, {held_out:,} held out",
            "steps": f"{self.progress.step:,} of {self.plan.num_steps:,}, {self.plan.per_step} samples each",
            "machine": f"{self.world.processes} x {self.record.environment.device}",
            "output": str(self.folder),
        }
        left = 'style="text-align: left"'
        rows = "".join(
            f"<tr><th {left}>{escape(name)}</th><td {left}>{escape(value)}</td></tr>" for name, value in facts.items()
        )
        return f"<table>{rows}</table>"
