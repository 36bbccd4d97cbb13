"""AdamW that reads and writes large weights once a step: clipping, update and rounding in one pass over memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from trainworks.speed.compiling import can_compile
from trainworks.speed.working_weights import WorkingWeights

__all__ = ["OnePassAdamW"]

_LARGE = 2**20
"""Numbers in a weight from which on a pass of its own pays, where it can be compiled; smaller ones go through torch's
fused AdamW, many at a time."""
_LINE = 1024


class OnePassAdamW(torch.optim.AdamW):
    """torch's fused AdamW, with the same state under the same names, for weights that have rounded copies.

    The update of a large weight takes its gradient in the rounded type too, divides it by `grad_scale`, leaves
    everything as it was where `found_inf` is 1.0 (both as torch's gradient scaler sets them), and rounds the new weight
    into its copy. The gradient is used up by it.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(self, groups: Iterable[dict[str, Any]], rounded: WorkingWeights, **settings: Any) -> None:
        super().__init__(groups, fused=True, **settings)
        self._rounded = rounded
        self._large = {weight for weight in rounded.weights() if weight.requires_grad and _is_large(weight)}
        rounded.follow(self)

    def allow_rounded_gradients(self) -> None:
        """Let gradients of large weights come as the backward pass makes them; right where a step has one
        micro-batch, so that nothing is added to them."""
        for weight in self._large:
            weight.grad_dtype = self._rounded.dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Change the weights by their gradients."""
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight in self._large and weight.grad is not None]
            if weights:
                self._update(weights, group)
        super().step(closure)

    def _update(self, weights: Sequence[Tensor], group: dict[str, Any]) -> None:
        one = torch.ones((), device=weights[0].device)
        spoiled = one - one if self.found_inf is None else self.found_inf
        scale = one if self.grad_scale is None else self.grad_scale
        rate, counts = one * group["lr"], one - spoiled
        settings = {"decay": group["weight_decay"], "betas": group["betas"], "eps": group["eps"]}
        for weight in weights:
            # Taken off first: torch 2.11 cannot trace a weight whose gradient is of another type.
            gradient, weight.grad = weight.grad, None
            state = self._state(weight)
            state["step"] += counts
            tensors = (weight.detach(), gradient, state["exp_avg"], state["exp_avg_sq"], self._rounded.copy_of(weight))
            lines = [tensor.view(-1, _LINE) for tensor in tensors if tensor is not None]
            _compiled()(lines, (state["step"], scale, spoiled, rate), **settings)
            self._rounded.written(weight)

    def _state(self, weight: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), device=weight.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        return state


def _is_large(weight: Tensor) -> bool:
    fits = weight.numel() >= _LARGE and weight.numel() % _LINE == 0 and weight.is_contiguous()
    return fits and can_compile(weight.device)


def _update(
    lines: Sequence[Tensor], scalars: Sequence[Tensor], *, decay: float, betas: tuple[float, float], eps: float
) -> None:
    """Loshchilov and Hutter 2019 (arXiv:1711.05101), algorithm 2, in operations that a compiler makes one pass of."""
    weight, gradient, mean, square, copy = lines
    count, scale, spoiled, rate = scalars
    first, second = betas
    gradient = gradient.float() / scale
    new_mean = mean + (1 - first) * (gradient - mean)
    new_square = second * square + (1 - second) * gradient * gradient
    # 1 - beta ** count, without the digits that are lost when a number next to 1 is taken from it.
    of_mean, of_square = (-torch.expm1(count * (math.log(beta) if beta else -math.inf)) for beta in betas)
    change = new_mean / of_mean / ((new_square / of_square).sqrt() + eps)
    new = weight - rate * (decay * weight + change)
    good = spoiled == 0
    weight.copy_(torch.where(good, new, weight))
    copy.copy_(torch.where(good, new, weight))
    mean.copy_(torch.where(good, new_mean, mean))
    square.copy_(torch.where(good, new_square, square))


@cache
def _compiled() -> Callable[..., None]:
    """Return the update, compiled once for the first number of lines and once for any."""
    return torch.compile(_update)
