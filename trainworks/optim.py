"""Optimizer, learning-rate schedule and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from trainworks.schema import Optim

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

__all__ = ["build_optimizer", "clip", "learning_rate", "num_moments", "take_step"]

_SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


def learning_rate(optim: Optim, step: int, num_steps: int) -> float:
    """Return the rate of step `step` of `num_steps`, counted from 0; a pure function, so a resumed run needs no
    scheduler's state.

    >>> [learning_rate(Optim(lr=1.0, schedule="linear", warmup=2), step, 6) for step in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    warmup = optim.warmup if isinstance(optim.warmup, int) else round(optim.warmup * num_steps)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    shape = _SHAPES[optim.schedule](progress)
    return optim.lr * (optim.min_lr_ratio + (1.0 - optim.min_lr_ratio) * shape)


def build_optimizer(optim: Optim, module: nn.Module) -> Optimizer:
    """Build the optimizer over what `module` trains; one-dimensional weights (norms, biases) are not decayed."""
    import torch

    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": optim.weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if optim.name == "sgd":
        sgd = torch.optim.SGD(groups, lr=optim.lr, momentum=optim.betas[0], fused=True)
        if optim.betas[0]:
            # torch 2.13 leaves the momentum uninitialised where the very first step is one that must not count.
            sgd.state.update({each: {"momentum_buffer": torch.zeros_like(each)} for each in trained})
        return sgd
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def num_moments(optim: Optim) -> int:
    """Return how many numbers the optimizer keeps for each weight."""
    return {"adamw": 2, "sgd": 1 if optim.betas[0] else 0}[optim.name]


def take_step(optimizer: Optimizer, lr: float, spoiled: Tensor) -> None:
    """Change the weights at the rate `lr`, and forget the gradients; where `spoiled`, a scalar on the device, is 1.0,
    weights and moments stay as they are.

    It is torch's way to leave out a step whose scaled gradients overflowed, and takes no look at the device.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.found_inf = spoiled  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad()


def clip(parameters: Iterable[Tensor], limit: float) -> Tensor:
    """Scale the gradients so that their global norm is at most `limit`, and return the norm before that, a scalar on
    the device. All ranks."""
    import torch
    from torch.distributed.tensor import DTensor

    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    whole: Tensor = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return whole
