"""The training loop: one generator, one optimizer step per turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainworks.data.loading import Batch
from trainworks.optim import clip, learning_rate
from trainworks.run import Run

__all__ = ["TrainStep", "train_steps"]


@dataclass(frozen=True)
class TrainStep:
    """What one optimizer step did. `loss` and `grad_norm` are scalars on the device, equal on all ranks; reading one
    waits for it."""

    number: int
    """Steps done so far, this one included."""
    num_steps: int
    lr: float
    loss: Tensor
    grad_norm: Tensor

    @property
    def is_last(self) -> bool:
        """Whether the run's budget is used up."""
        return self.number == self.num_steps


def train_steps(run: Run) -> Iterator[TrainStep]:
    """Take the run's remaining optimizer steps, yielding after each. All ranks.

    The step's loss is, summed over the task's terms, everything they add up to on every rank and micro-batch over
    everything they count there. The counts are known beforehand, so each micro-batch's backward pass already carries
    the right weight.
    """
    parameters = [parameter for parameter in run.step.parameters() if parameter.requires_grad]
    limit = float("inf") if run.config.optim.max_grad_norm == "off" else run.config.optim.max_grad_norm
    run.step.train()
    for window in run.windows():
        totals = run.world.total(_counted(run, window.batches))
        counts = {name: total.clamp(min=1) for name, total in totals.items()}
        losses = []
        for batch, is_last in zip(window.batches, _last(window.batches), strict=True):
            with run.world.accumulating(run.step, sync=is_last):
                terms = run.step(batch)
                loss = sum((terms[name] * batch["weight"]).sum() / count for name, count in counts.items())
                (loss * run.world.ranks).backward()  # ranks are averaged when gradients meet
                losses.append(loss.detach())
        norm = clip(parameters, limit)
        lr = learning_rate(run.config.optim, run.progress.step, run.plan.num_steps)
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.progress.step += 1
        run.progress.samples += window.samples
        run.progress.tokens += window.tokens
        total = run.world.total({"loss": torch.stack(losses).sum()})["loss"]
        yield TrainStep(run.progress.step, run.plan.num_steps, lr, total, norm)


def _counted(run: Run, batches: Sequence[Batch]) -> dict[str, Tensor]:
    counts = [
        {name: (count * batch["weight"]).sum() for name, count in run.task.count(batch).items()} for batch in batches
    ]
    return {name: torch.stack([count[name] for count in counts]).sum() for name in counts[0]}


def _last(batches: Sequence[Batch]) -> list[bool]:
    return [False] * (len(batches) - 1) + [True]
