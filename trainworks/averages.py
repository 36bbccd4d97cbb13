"""Weights averaged over the steps of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

__all__ = ["Averages"]


@dataclass
class Averages:
    """Exponential moving averages of the weights that an optimizer trains, in float32 (Polyak & Juditsky 1992,
    doi:10.1137/0330046; for models as here, arXiv:2411.18704).

    They begin as the weights after the first step, and pass over steps that must not count.
    """

    decay: float
    values: dict[Tensor, Tensor] = field(default_factory=dict)
    """By weight, its average, laid out over the ranks as the weight is."""

    def follow(self, optimizer: Optimizer) -> None:
        """Average anew after each of the optimizer's steps."""
        optimizer.register_step_post_hook(self._stepped)

    @torch.no_grad()
    def _stepped(self, optimizer: Any, *_: Any) -> None:
        share = (1 - self.decay) * (1 - optimizer.found_inf)
        for weight in (each for group in optimizer.param_groups for each in group["params"]):
            if weight in self.values:
                average = _local(self.values[weight])
                average.lerp_(_local(weight).to(average.dtype), share)
            else:
                self.values[weight] = weight.detach().to(torch.float32, copy=True)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Put the averages in the place of the weights inside the block, rounded to their type."""
        kept = {weight: weight.detach().clone() for weight in self.values}
        with torch.no_grad():
            for weight, average in self.values.items():
                weight.copy_(average)
        try:
            yield
        finally:
            with torch.no_grad():
                for weight, before in kept.items():
                    weight.copy_(before)


def _local(tensor: Tensor) -> Tensor:
    local: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local
