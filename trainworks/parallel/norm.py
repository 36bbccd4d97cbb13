"""The global norm of gradients that lie on the ranks in any layout."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from trainworks.parallel.launch import World

__all__ = ["gradient_norm"]


def gradient_norm(parameters: Iterable[Tensor], world: World | None = None) -> Tensor:
    """Return the global norm of the gradients, a float32 scalar on the device at least. All ranks.

    Every rank adds up the squares of what it holds, divided by the number of ranks that hold the same; so weights may
    be whole, sharded in one dimension or in several, or on some ranks only.
    """
    alike: dict[int, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            alike[1 if world is None else _holders(parameter, world)].append(_local(parameter.grad))
    if world is None or not world.layout.spreads_weights:
        return _norm([gradient for gradients in alike.values() for gradient in gradients])
    squares = [_norm(gradients).square() / holders for holders, gradients in alike.items()]
    total = torch.stack(squares).sum() if squares else torch.zeros((), device=world.device)
    return world.sum(total.to(world.device)).sqrt()


def _norm(gradients: list[Tensor]) -> Tensor:
    # torch's own total rounds each gradient's norm to the gradient's type.
    short = [gradient for gradient in gradients if gradient.dtype.itemsize < 4]
    if not short:
        return torch.nn.utils.get_total_norm(gradients)
    norms = list(torch._foreach_norm(short, dtype=torch.float32))
    if long := [each for each in gradients if each.dtype.itemsize >= 4]:  # the norm of none lies on the host
        norms.append(torch.nn.utils.get_total_norm(long))
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _holders(parameter: Tensor, world: World) -> int:
    """Return how many ranks hold the same part of a weight."""
    shards = 1
    if isinstance(parameter, DTensor):
        for size, placement in zip(parameter.device_mesh.shape, parameter.placements, strict=True):
            shards *= 1 if placement.is_replicate() else size
    return world.layout.processes // (world.layout.pipeline * shards)
