"""Optimizer, learning-rate schedule and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from trainworks.schema import Optim

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from trainworks.speed.working_weights import WorkingWeights

__all__ = ["build_optimizer", "learning_rate", "num_moments", "take_step"]

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


def build_optimizer(
    optim: Optim,
    module: nn.Module,
    rounded: WorkingWeights | None = None,
    *,
    accumulates: bool = True,
    lr_ratio: Callable[[str], float] = lambda name: 1.0,
) -> Optimizer:
    """Build the optimizer over what `module` trains; one-dimensional weights (norms, biases) are not decayed.

    A weight's learning rate is the run's times `lr_ratio` of its name.

    Where the module computes with `rounded` weights, these follow it; and where no gradients are added up, over
    micro-batches or ranks, they may stay as they come.
    """
    import torch

    from trainworks.speed.adamw import OnePassAdamW

    groups = _groups(optim, module, lr_ratio)
    if optim.name == "sgd":
        sgd = torch.optim.SGD(groups, lr=optim.lr, momentum=optim.betas[0], fused=True)
        if optim.betas[0]:
            # torch 2.13 leaves the momentum uninitialised where the very first step is one that must not count.
            sgd.state.update(
                {each: {"momentum_buffer": torch.zeros_like(each)} for group in groups for each in group["params"]}
            )
        if rounded is not None:
            rounded.follow(sgd)
        return sgd
    if rounded is not None:
        adamw = OnePassAdamW(groups, rounded, lr=optim.lr, betas=optim.betas, eps=optim.eps)
        if not accumulates:
            adamw.allow_rounded_gradients()
        return adamw
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def _groups(optim: Optim, module: nn.Module, lr_ratio: Callable[[str], float]) -> list[dict[str, Any]]:
    """Return what is trained, those together that are decayed alike and learn at the same rate."""
    parts: dict[tuple[bool, float], list[Tensor]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            parts.setdefault((parameter.ndim > 1, lr_ratio(name)), []).append(parameter)
    return [
        {"params": part, "weight_decay": optim.weight_decay if decayed else 0.0, "lr_ratio": ratio}
        for (decayed, ratio), part in sorted(parts.items(), key=lambda item: item[0], reverse=True)
    ]


def num_moments(optim: Optim) -> int:
    """Return how many numbers the optimizer keeps for each weight."""
    return {"adamw": 2, "sgd": 1 if optim.betas[0] else 0}[optim.name]


def take_step(optimizer: Optimizer, optim: Optim, *, lr: float, norm: Tensor, spoiled: Tensor) -> None:
    """Change the weights at the rate `lr`, by gradients scaled so that their global `norm` is at most what `optim`
    says, and forget these; where `spoiled`, a scalar on the device, is 1.0, weights and moments stay as they are.

    Both are torch's ways to deal with scaled gradients that may have overflowed: no pass over the gradients, and no
    look at the device.
    """
    limit = float("inf") if optim.max_grad_norm == "off" else optim.max_grad_norm
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_ratio"]
    optimizer.grad_scale = ((norm + 1e-6) / limit).clamp(min=1.0)  # type: ignore[attr-defined]
    optimizer.found_inf = spoiled  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad()
