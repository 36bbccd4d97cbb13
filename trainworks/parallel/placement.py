"""Where each rank's part of a tensor lies in the whole, who writes it, and the whole put together on one host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from trainworks.parallel.launch import World

__all__ = ["Box", "collect", "is_keeper", "local_part"]

Box = tuple[tuple[int, int], ...]
"""A block of a tensor: (start, stop) in each dimension."""


def local_part(tensor: Tensor) -> tuple[Tensor, Box]:
    """Return this rank's part of a tensor, and where it lies in the whole."""
    box = [(0, size) for size in tensor.shape]
    if not isinstance(tensor, DTensor):
        return tensor, tuple(box)
    mesh = tensor.device_mesh
    places = zip(mesh.get_coordinate() or (), mesh.shape, tensor.placements, strict=True)
    # The last dimension of a mesh cuts first, as a tensor group does before its shards are sharded; torch says so by a
    # placement of its own, whose offsets it does not offer. Pieces are as even as torch.chunk makes them.
    for place, size, placement in reversed(list(places)):
        if not placement.is_replicate():
            dimension: int = placement.dim  # type: ignore[attr-defined]
            start, stop = box[dimension]
            each = -(-(stop - start) // size)
            box[dimension] = (min(start + place * each, stop), min(start + (place + 1) * each, stop))
    return tensor.to_local(), tuple(box)


def is_keeper(tensor: Tensor, world: World) -> bool:
    """Tell whether this process is the one to write its part of a tensor, which others may hold as well."""
    numbers = {"share": world.share, "tensor": world.process % world.layout.tensor}
    if isinstance(tensor, DTensor):
        names, places = tensor.device_mesh.mesh_dim_names or (), tensor.device_mesh.get_coordinate() or ()
        sharded = {name for name, each in zip(names, tensor.placements, strict=True) if not each.is_replicate()}
        numbers["share"] = 0 if "shard" in names else numbers["share"]
        numbers |= dict(zip(names, places, strict=True))
        numbers = {name: 0 if name in sharded else number for name, number in numbers.items()}
    return not any(numbers.values())


@dataclass(frozen=True)
class _Part:
    name: str
    shape: tuple[int, ...]
    box: Box
    dtype: torch.dtype


def collect(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Return whole tensors in the main process's memory, nothing on the others. All ranks, each with those it knows.

    The parts travel one at a time from host to host, so that no device holds more than its own.
    """
    own = [(name, tensor.detach()) for name, tensor in tensors.items() if is_keeper(tensor, world)]
    parts = [(_Part(name, tuple(each.shape), local_part(each)[1], each.dtype), each) for name, each in own]
    index = world.gather([part for part, _ in parts])
    with world.waiting(patient=True):
        if not world.is_main:
            for _, tensor in parts:
                _send(local_part(tensor)[0], world)
            return {}
        whole: dict[str, Tensor] = {}
        for process, told in enumerate(index):
            for number, part in enumerate(told):
                target = whole.setdefault(part.name, torch.empty(part.shape, dtype=part.dtype))
                place = target[tuple(slice(*each) for each in part.box)]
                place.copy_(
                    local_part(parts[number][1])[0] if process == world.process else _received(place, process, world)
                )
    return whole


def _send(tensor: Tensor, world: World) -> None:
    if tensor.numel():
        torch.distributed.send(tensor.cpu().contiguous(), 0, group=world.patient)


def _received(like: Tensor, process: int, world: World) -> Tensor:
    part = torch.empty(like.shape, dtype=like.dtype)
    if part.numel():
        torch.distributed.recv(part, process, group=world.patient)
    return part
