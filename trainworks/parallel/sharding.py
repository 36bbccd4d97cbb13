"""Weights, gradients and optimizer states sharded over ranks (FSDP2), layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trainworks.heads import embeddings, repeated_layers

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from trainworks.parallel.launch import World
    from trainworks.run import Step

__all__ = ["options", "shard"]


def shard(step: Step, world: World) -> nn.Module:
    """Shard a step's weights in place over the mesh's `shard` ranks, whole on each of its `replicate` ones. All ranks.

    Each layer is gathered by itself, and so are the embeddings; what is left, the last norm and the head, with the
    step, and kept between the forward and the backward pass, which begins with it. accelerate's own preparation looks
    for embeddings on the module it is given, a `Step` here, and knows no meshes on a CPU.
    """
    from torch.distributed.fsdp import fully_shard

    chosen = options(world)
    for part in _parts(step):
        fully_shard(part, **chosen)
    fully_shard(step, **chosen | {"reshard_after_forward": False})
    return step


def options(world: World) -> dict[str, Any]:
    """Return how `fully_shard` is to do it: over which mesh, in what precision, gathered for how long."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy

    plugin = world.accelerator.state.fsdp_plugin if world.layout.is_sharded else None
    rounds = world.accelerator.mixed_precision == "bf16"
    # Gradients are summed in float32, and the loss stays as it is; accelerate's policy does both in bfloat16.
    precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32, None) if rounds else MixedPrecisionPolicy()
    offloads = plugin is not None and isinstance(plugin.cpu_offload, CPUOffloadPolicy)
    return {
        "mesh": _mesh(world),
        "reshard_after_forward": plugin is not None and plugin.reshard_after_forward,
        "mp_policy": precision,
        "offload_policy": CPUOffloadPolicy() if offloads else OffloadPolicy(),
    }


def _mesh(world: World) -> DeviceMesh:
    assert world.mesh is not None
    return world.mesh["shard"] if world.layout.replicate == 1 else world.mesh["replicate", "shard"]


def _parts(step: Step) -> Iterator[nn.Module]:
    """Yield what is gathered by itself: the repeated layers and the embeddings, where they share no weights with what
    is outside of them; torch has such weights in one place only."""
    seen: set[nn.Module] = set()
    first = embeddings(step.model)
    for part in (*repeated_layers(step.model), *([first] if first is not None else [])):
        if not seen & {*part.modules()} and not _shares(part, step):
            yield part
            seen |= {*part.modules()}


def _shares(part: nn.Module, step: Step) -> bool:
    """Tell whether a part has a weight that is also outside of it."""
    inside = {*part.modules()}
    own = {weight for module in inside for weight in module.parameters(recurse=False)}
    outside = (module for module in step.modules() if module not in inside)
    return any(weight in own for module in outside for weight in module.parameters(recurse=False))
