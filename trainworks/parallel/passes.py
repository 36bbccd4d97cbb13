"""Forward and backward over the micro-batches of one optimizer step, whatever the model is spread over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from trainworks.data.loading import Batch
    from trainworks.parallel.launch import World
    from trainworks.parallel.pipeline import Pipeline

__all__ = ["Passes", "PipelinePasses"]


class Passes:
    """How a wrapped `Step` is called: one micro-batch after the other, all of it on every rank."""

    def __init__(self, world: World, step: nn.Module) -> None:
        self._world = world
        self._step = step

    @property
    def repeated(self) -> frozenset[str]:
        """The names of this rank's weights that are to be counted and saved by another rank, which has them, too."""
        return frozenset()

    def backward(self, batches: Sequence[Batch], whole: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """Add each micro-batch's share of the step's gradient to the weights, and return its sums, [rows] by name. All
        ranks.

        The step's loss is, over names, what all sums of all ranks add up to, over the step's count in `whole`.
        """
        done = []
        for batch in batches:
            with self._world.accumulating(self._step, sync=batch is batches[-1]):
                terms: dict[str, Tensor] = self._step(batch)
                shares = [(terms[name] * batch["weight"]).sum() / count for name, count in whole.items()]
                loss = torch.stack(shares).sum()
                (loss * self._world.averaged).backward()  # ranks are averaged when gradients meet
            done.append({name: term.detach() for name, term in terms.items()})
        return done

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return a batch's sums, [rows] by name, without a gradient. All ranks."""
        return self._world.joined(self._step(self._world.local(batch)))


class PipelinePasses(Passes):
    """How a pipeline is called: with all of a step's micro-batches at once."""

    _step: Pipeline

    @property
    def repeated(self) -> frozenset[str]:
        """The name of the embedding on the last rank, where the head shares it."""
        return self._step.repeated

    def backward(self, batches: Sequence[Batch], whole: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """Do the same, all batches under way at once."""
        return self._step.backward(batches, whole)
