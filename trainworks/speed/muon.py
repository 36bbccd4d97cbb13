"""Muon: matrices are changed by the nearest orthogonal matrix to their momentum, everything else by AdamW."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

__all__ = ["Muon", "orthogonal"]

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5


class Muon(torch.optim.AdamW):
    """Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon) for the `hidden` matrices, and torch's fused AdamW
    for the others, in one optimizer.

    A matrix's step is scaled by 0.2 sqrt(its longer side), to the size of AdamW's, so that one learning rate and weight
    decay serve both (Liu et al. 2025, arXiv:2502.16982). torch 2.13 has a Muon that does the same, without weights that
    are sharded and steps that must not count; here `grad_scale` and `found_inf` are heeded as in torch's fused AdamW.
    Of a sharded weight, each rank gathers the momentum, one matrix after the other.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(
        self, groups: Iterable[dict[str, Any]], hidden: Collection[Tensor], *, momentum: float, **settings: Any
    ) -> None:
        super().__init__(list(groups), fused=True, **settings)
        self._hidden = {id(weight) for weight in hidden}
        self._momentum = momentum

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Change the weights by their gradients, which those of hidden matrices are used up by. All ranks."""
        for group in self.param_groups:
            for weight in group["params"]:
                if id(weight) in self._hidden and weight.grad is not None:
                    gradient, weight.grad = weight.grad, None
                    self._update(weight, gradient, group)
        super().step(closure)

    def _update(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state: dict[str, Tensor] = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        momentum = state["momentum_buffer"]
        if self.grad_scale is not None:
            gradient = gradient / self.grad_scale
        new = momentum.lerp(gradient, 1 - self._momentum)
        step = orthogonal(gradient.lerp(new, self._momentum)).to(weight.dtype)
        rate = group["lr"] * 0.2 * math.sqrt(max(weight.shape[-2:]))
        changed = weight * (1 - group["lr"] * group["weight_decay"]) - rate * step
        good = None if self.found_inf is None else self.found_inf == 0
        momentum.copy_(new if good is None else torch.where(good, new, momentum))
        weight.copy_(changed if good is None else torch.where(good, changed, weight))


def orthogonal(matrix: Tensor) -> Tensor:
    """Return about the nearest matrix with orthonormal rows or columns, in bfloat16, of [..., rows, columns]: five
    rounds of a Newton-Schulz iteration that leave singular values between 0.7 and 1.2."""
    if isinstance(matrix, DTensor):
        mesh, whole = matrix.device_mesh, orthogonal(matrix.full_tensor())
        everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
        part: Tensor = everywhere.redistribute(placements=matrix.placements)
        return part
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[-2] > matrix.shape[-1]
    found: Tensor = matrix.bfloat16().mT if tall else matrix.bfloat16()
    found = found / found.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(_ROUNDS):
        product = found @ found.mT
        found = a * found + (b * product + c * product @ product) @ found
    return found.mT if tall else found
