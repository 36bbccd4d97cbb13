"""Compile a model's layers where they stand."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from trainworks.heads import repeated_layers

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["can_compile", "compile_layers"]


def can_compile(device: torch.device) -> bool:
    """Tell whether compiling pays on a device and the machine has what it takes: Triton's launchers need a C
    compiler."""
    return device.type == "cuda" and any(map(shutil.which, ("cc", "gcc", "clang")))


def compile_layers(model: PreTrainedModel, *, each_shape: bool = False) -> int:
    """Compile every repeated layer of a model in place, before it is sharded, and return how many there are.

    With `each_shape`, a layer is compiled once more for each shape that batches come in, up to torch's limit of eight,
    and runs as it is for the rest. Layers cut over tensor ranks want it: of weights that know their place in the whole
    (DTensor), torch 2.13 compiles no layer for shapes of any size, and ends by a RecursionError.

    A layer is compiled once for all that are like it, which takes seconds where the whole model takes minutes; and in
    place, because `torch.compile(layer)` returns another module, which the hooks of FSDP do not know.
    """
    layers = repeated_layers(model)
    for layer in layers:
        layer.compile(dynamic=False if each_shape else None)
    return len(layers)
