"""The training loop: one generator, one optimizer step per turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainworks.data.loading import Batch
from trainworks.optim import learning_rate, take_step
from trainworks.parallel.norm import gradient_norm
from trainworks.run import Run

__all__ = ["TrainStep", "train_steps"]


_NOTHING = 1e-6
"""What is divided by where nothing is counted; below any count there is, and any sum of class weights."""


@dataclass(frozen=True)
class TrainStep:
    """What one optimizer step did; its tensors are on the device, equal on all ranks, and reading one waits for it."""

    number: int
    """Steps done so far, this one included."""
    num_steps: int
    lr: float
    loss: Tensor
    source_losses: Tensor
    """The loss of each of the run's sources, [sources]; not a number where the step saw nothing of one."""
    grad_norm: Tensor
    spoiled: Tensor
    """1.0 where the step was bad and did not reach the weights, else 0.0."""

    @property
    def is_last(self) -> bool:
        """Whether the run's budget is used up."""
        return self.number == self.num_steps


def train_steps(run: Run) -> Iterator[TrainStep]:
    """Take the run's remaining optimizer steps, yielding after each. All ranks.

    The step's loss is, summed over the task's terms, everything they add up to on every rank and micro-batch over
    everything they count there. The counts are known beforehand, so each micro-batch's backward pass already carries
    the right weight. A step that `run.watch` finds bad leaves weights and moments as they are.

    Where `run` is put back to a checkpoint between two steps, it goes on from there.
    """
    run.step.train()
    while run.progress.step < run.plan.num_steps:
        for window in run.windows():
            number = run.progress.step + 1
            counts = run.world.total(_by_source(run, window.batches, [run.task.count(each) for each in window.batches]))
            whole = {name: count.sum().clamp(min=_NOTHING) for name, count in counts.items()}
            shared = run.coupled(window.batches)
            done = run.passes.backward([batch | shared for batch in window.batches], whole)
            sums = run.world.total(_by_source(run, window.batches, done))
            total = torch.stack([sums[name].sum() / count for name, count in whole.items()]).sum()
            apart = torch.stack([sums[name] / count for name, count in counts.items()]).sum(0)
            norm = gradient_norm(run.trained().values(), run.world)
            spoiled = run.world.largest(run.watch.judge(number, total, norm))
            lr = learning_rate(run.config.optim, number - 1, run.plan.num_steps)
            take_step(run.optimizer, run.config.optim, number=number, lr=lr, norm=norm, spoiled=spoiled)
            run.progress.step = number
            run.progress.samples += window.samples
            run.progress.tokens += window.tokens
            yield TrainStep(number, run.plan.num_steps, lr, total, apart, norm, spoiled)
            if run.progress.step != number:
                break


def _by_source(run: Run, batches: Sequence[Batch], values: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Add up, by name, what the rows of each source have: [sources]."""
    numbers = torch.arange(len(run.sources), device=run.world.device)
    rows = [(batch["source"][:, None] == numbers) * batch["weight"][:, None] for batch in batches]
    return {
        name: torch.stack([part[name].float() @ own for part, own in zip(values, rows, strict=True)]).sum(0)
        for name in values[0]
    }
