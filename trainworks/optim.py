"""Optimizer, learning-rate schedule and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from trainworks.errors import ConfigError, LaunchError
from trainworks.heads import backbone, embeddings
from trainworks.schema import FromScratch, Optim, Pretrained

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from transformers import PreTrainedModel

    from trainworks.speed.working_weights import WorkingWeights

__all__ = [
    "build_optimizer",
    "check",
    "hidden_matrices",
    "layer_ratios",
    "learning_rate",
    "num_moments",
    "take_step",
]

_SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "wsd": lambda progress: 1.0 - math.sqrt(progress),
}


def learning_rate(optim: Optim, step: int, num_steps: int) -> float:
    """Return the rate of step `step` of `num_steps`, counted from 0; a pure function, so a resumed run needs no
    scheduler's state.

    >>> [learning_rate(Optim(lr=1.0, schedule="linear", warmup=2), step, 6) for step in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    warmup = _steps(optim.warmup, num_steps)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    begin = max(warmup, num_steps - _steps(optim.decay, num_steps)) if optim.schedule == "wsd" else warmup
    progress = max(0, step - begin) / max(1, num_steps - begin)
    shape = _SHAPES[optim.schedule](progress)
    return optim.lr * (optim.min_lr_ratio + (1.0 - optim.min_lr_ratio) * shape)


def _steps(length: float, num_steps: int) -> int:
    return length if isinstance(length, int) else round(length * num_steps)


def check(optim: Optim, model: Pretrained | FromScratch) -> None:
    """Raise ConfigError for what does not fit the model; before it is loaded."""
    if optim.rounding == "stochastic" and model.dtype != "bfloat16":
        raise ConfigError(
            f"optim.rounding: {model.dtype} weights are not rounded after a step; say model.dtype: bfloat16, or leave "
            "it out"
        )


def build_optimizer(
    optim: Optim,
    module: nn.Module,
    rounded: WorkingWeights | None = None,
    *,
    accumulates: bool = True,
    lr_ratios: Mapping[Tensor, float] = MappingProxyType({}),
    hidden: Collection[Tensor] = (),
    seed: int = 0,
) -> Optimizer:
    """Build the optimizer over what `module` trains; one-dimensional weights (norms, biases) are not decayed.

    A weight's learning rate is the run's times what `lr_ratios` has for it. Muon is for the `hidden` matrices.

    Where the module computes with `rounded` weights, these follow it; and where no gradients are added up, over
    micro-batches or ranks, they may stay as they come.
    """
    from trainworks.speed.adamw import OnePassAdamW

    groups = _groups(optim, module, lr_ratios)
    if rounded is not None and optim.name == "adamw" and optim.moments == "float32" and optim.rounding == "nearest":
        one_pass = OnePassAdamW(groups, rounded, lr=optim.lr, betas=optim.betas, eps=optim.eps)
        if not accumulates:
            one_pass.allow_rounded_gradients()
        return one_pass
    optimizer = _BUILD[optim.name](optim, groups, hidden, seed)
    if rounded is not None:
        rounded.follow(optimizer)
    return optimizer


def _sgd(optim: Optim, groups: list[dict[str, Any]], hidden: Collection[Tensor], seed: int) -> Optimizer:
    import torch

    sgd = torch.optim.SGD(groups, lr=optim.lr, momentum=optim.betas[0], fused=True)
    if optim.betas[0]:
        # torch 2.13 leaves the momentum uninitialised where the very first step is one that must not count.
        trained = [weight for group in groups for weight in group["params"]]
        sgd.state.update({each: {"momentum_buffer": torch.zeros_like(each)} for each in trained})
    return sgd


def _adamw(optim: Optim, groups: list[dict[str, Any]], hidden: Collection[Tensor], seed: int) -> Optimizer:
    import torch
    from torch.distributed.tensor import DTensor

    from trainworks.speed.compact_adamw import CompactAdamW

    settings: dict[str, Any] = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps}
    stochastic = optim.rounding == "stochastic"
    if optim.moments == "8bit" and any(isinstance(each, DTensor) for group in groups for each in group["params"]):
        raise LaunchError(
            "optim.moments: 8bit moments are not sharded by this version, since ranks would share their scales; say "
            "bfloat16, or take configs/accelerate/ddp.yaml or one_gpu.yaml"
        )
    if stochastic or optim.moments != "float32":
        return CompactAdamW(groups, moments=optim.moments, stochastic=stochastic, seed=seed, **settings)
    return torch.optim.AdamW(groups, fused=True, **settings)


def _muon(optim: Optim, groups: list[dict[str, Any]], hidden: Collection[Tensor], seed: int) -> Optimizer:
    from trainworks.speed.muon import Muon

    return Muon(groups, hidden, momentum=optim.momentum, lr=optim.lr, betas=optim.betas, eps=optim.eps)


_BUILD: dict[str, Callable[[Optim, list[dict[str, Any]], Collection[Tensor], int], Optimizer]] = {
    "adamw": _adamw,
    "muon": _muon,
    "sgd": _sgd,
}


def layer_ratios(optim: Optim, model: PreTrainedModel) -> dict[str, float]:
    """Return each weight's learning rate over that of the head, by name: `layer_decay` to the power of the layers from
    there. ConfigError for a model without a stack of layers."""
    if optim.layer_decay == 1.0:
        return {}
    from torch import nn

    stacks = {name: part for name, part in model.named_modules() if isinstance(part, nn.ModuleList)}
    stack = max(stacks, key=lambda name: len(stacks[name]), default=None)
    if stack is None:
        raise ConfigError(f"optim.layer_decay: {type(model).__name__} has no stack of layers; leave it out")
    top, passed = len(stacks[stack]), False
    powers = {}
    for name, _ in model.named_parameters():
        inside = name.startswith(f"{stack}.")
        passed = passed or inside
        number = int(name.removeprefix(f"{stack}.").partition(".")[0]) if inside else top if passed else -1
        powers[name] = top - number
    return {name: optim.layer_decay**power for name, power in powers.items()}


def hidden_matrices(model: PreTrainedModel) -> list[Tensor]:
    """Return the matrices between a model's embeddings and its head."""
    from torch import nn

    body = backbone(model)
    first = embeddings(model)
    layers = [part for part in body.modules() if isinstance(part, nn.Embedding) or part is first]
    outside = {id(weight) for part in layers for weight in part.parameters()}
    return [weight for weight in body.parameters() if weight.ndim in (2, 3) and id(weight) not in outside]


def _groups(optim: Optim, module: nn.Module, lr_ratios: Mapping[Tensor, float]) -> list[dict[str, Any]]:
    """Return what is trained, those together that are decayed alike and learn at the same rate."""
    parts: dict[tuple[bool, float], list[Tensor]] = {}
    for parameter in module.parameters():
        if parameter.requires_grad:
            parts.setdefault((parameter.ndim > 1, lr_ratios.get(parameter, 1.0)), []).append(parameter)
    return [
        {"params": part, "weight_decay": optim.weight_decay if decayed else 0.0, "lr_ratio": ratio}
        for (decayed, ratio), part in sorted(parts.items(), key=lambda item: item[0], reverse=True)
    ]


def num_moments(optim: Optim) -> int:
    """Return how many numbers the optimizer keeps for each weight, at most."""
    return {"adamw": 2, "muon": 2, "sgd": 1 if optim.betas[0] else 0}[optim.name]


def take_step(optimizer: Optimizer, optim: Optim, *, number: int = 0, lr: float, norm: Tensor, spoiled: Tensor) -> None:
    """Take the run's step of that `number`: change the weights at the rate `lr`, by gradients scaled so that their
    global `norm` is at most what `optim` says, and forget these; where `spoiled`, a scalar on the device, is 1.0,
    weights and moments stay as they are.

    Both are torch's ways to deal with scaled gradients that may have overflowed: no pass over the gradients, and no
    look at the device.
    """
    limit = float("inf") if optim.max_grad_norm == "off" else optim.max_grad_norm
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)
    # Where weights lie on the host, torch's fused AdamW (2.13) copies both there and does not wait for the copies.
    place = optimizer.param_groups[0]["params"][0].device
    optimizer.grad_scale = ((norm + 1e-6) / limit).clamp(min=1.0).to(place)  # type: ignore[attr-defined]
    optimizer.found_inf = spoiled.to(place)  # type: ignore[attr-defined]
    optimizer.number = number  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad()
