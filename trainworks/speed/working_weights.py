"""Weights as the forward pass reads them: rounded once, not at each use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["WorkingWeights"]


class WorkingWeights:
    """The float32 matrices of a module in a shorter type, which its forward pass computes with instead of them.

    Autocast rounds a weight whenever it is read, forwards and backwards, and leaves the states between layers in
    float32, since the embeddings are. Here every weight is rounded when it has changed, and the states are of the
    shorter type, as under FSDP2's mixed precision. The module keeps its float32 weights: they are what is trained,
    saved and exported, and their gradients come in float32 (or as `grad_dtype` says). Vectors (norms, biases) stay as
    they are, since they cost nothing.

    A change is told by the weight's version, which operations in place count up, and by `follow` for those of an
    optimizer, which need not (torch's fused AdamW does not). Nothing tells of one on `weight.data`.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._places = [
            (part, name)
            for part in module.modules()
            for name, weight in part.named_parameters(recurse=False)
            if weight.dtype == torch.float32 and weight.ndim > 1
        ]
        self._copies: dict[Tensor, Tensor] = {}
        self._versions: dict[Tensor, int] = {}
        """Of which version of a weight its copy is."""
        self._written: set[Tensor] = set()

    def weights(self) -> set[nn.Parameter]:
        """Return the weights that have copies."""
        return {part.get_parameter(name) for part, name in self._places}

    def follow(self, optimizer: Optimizer) -> None:
        """Round anew after each of the optimizer's steps, but for what it has `written` itself."""
        optimizer.register_step_post_hook(lambda *_: self._stepped())

    def copy_of(self, weight: Tensor) -> Tensor:
        """Return a weight's copy, which whoever changes the weight may write, and then says that it is `written`."""
        if weight not in self._copies or self._copies[weight].device != weight.device:
            self._copies[weight] = torch.empty_like(weight, dtype=self.dtype, requires_grad=False)
            self._versions.pop(weight, None)
        return self._copies[weight]

    def written(self, weight: Tensor) -> None:
        """Take a weight's copy for what the weight is now."""
        self._versions[weight] = weight._version
        self._written.add(weight)

    def _stepped(self) -> None:
        self._versions = {weight: self._versions[weight] for weight in self._written}
        self._written.clear()

    @contextmanager
    def used(self) -> Iterator[None]:
        """Let the module compute with the rounded weights inside the block."""
        weights = [part.get_parameter(name) for part, name in self._places]
        self._round(weights)
        # A weight that several places share stays one.
        short = {
            weight: _Rounded.apply(weight, self._copies[weight]) if weight.requires_grad else self._copies[weight]  # type: ignore[no-untyped-call]
            for weight in weights
        }
        try:
            for (part, name), weight in zip(self._places, weights, strict=True):
                part._parameters[name] = short[weight]  # type: ignore[assignment]
            yield
        finally:
            for (part, name), weight in zip(self._places, weights, strict=True):
                part._parameters[name] = weight

    @torch.no_grad()
    def _round(self, weights: list[nn.Parameter]) -> None:
        copies = {weight: self.copy_of(weight) for weight in weights}
        stale: list[Tensor] = [weight for weight in copies if self._versions.get(weight) != weight._version]
        if stale:
            torch._foreach_copy_([self._copies[weight] for weight in stale], stale)
            self._versions |= {weight: weight._version for weight in stale}


class _Rounded(torch.autograd.Function):
    """A weight's rounded copy, whose gradient is the weight's."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = weight.grad_dtype
        return copy.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.dtype), None
