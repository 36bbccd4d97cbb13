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


def compile_layers(model: PreTrainedModel) -> int:
    """Compile every repeated layer of a model in place, before it is sharded, and return how many there are.

    A layer is compiled once for all that are like it, which takes seconds where the whole model takes minutes; and in
    place, because `torch.compile(layer)` returns another module, which the hooks of FSDP do not know.
    """
    layers = repeated_layers(model)
    for layer in layers:
        layer.compile()
    return len(layers)
