"""AdamW that needs less memory: bfloat16 weights that are rounded at random, moments in two bytes or in one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from trainworks.chance import chances, mixed

__all__ = ["CompactAdamW", "Moments"]

Moments = Literal["float32", "bfloat16", "8bit"]

_AT_ONCE = 2**22
"""Numbers that are changed at once: the float32 copies of so many are held, not those of a whole weight."""
_BLOCK = 256
"""Numbers that share a scale where moments are kept in a byte."""
_FEW = 4096
"""Weights of fewer numbers keep their moments in float32, as in bitsandbytes: norms and biases want them exact."""


class CompactAdamW(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101) whose update is computed in float32 and kept in fewer bits.

    Where weights are bfloat16 and `stochastic`, each is rounded up or down at random, so that it is right on average.
    Which way is a pure function of (seed, step, weight, place in the weight): a resumed run does the same, on any
    number of ranks. Moments in bfloat16 are rounded likewise. `grad_scale` and `found_inf` are heeded as torch's fused
    AdamW does: the device is not looked at.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    number = 0
    """The run's step."""

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, moments: Moments, stochastic: bool, seed: int, **settings: Any
    ) -> None:
        super().__init__(list(groups), settings)
        self._kept = moments
        self._stochastic = stochastic
        self._seed = seed

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Change the weights by their gradients."""
        weights = [(weight, group) for group in self.param_groups for weight in group["params"]]
        for place, (weight, group) in enumerate(weights):
            if weight.grad is not None:
                self._update(weight, group, place)

    def _update(self, weight: Tensor, group: Mapping[str, Any], place: int) -> None:
        state, store = self._state(weight)
        one = torch.ones((), device=weight.device)
        spoiled = one - one if self.found_inf is None else self.found_inf
        state["step"] += one - spoiled
        scale = one if self.grad_scale is None else self.grad_scale
        change = _Change(group, state["step"], scale, spoiled == 0)
        values, gradient = (_local(tensor).view(-1) for tensor in (weight.detach(), weight.grad.contiguous()))  # type: ignore[union-attr]
        key, first = mixed(mixed(self._seed) ^ mixed(self.number << 32 | place)), _first(weight)
        for begin in range(0, len(values), _AT_ONCE):
            part = slice(begin, begin + _AT_ONCE)
            places = torch.arange(first + begin, first + begin + len(values[part]), device=weight.device)
            chance = chances(places, key)
            mean, square = (store.read(state, name, part) for name in ("exp_avg", "exp_avg_sq"))
            new = change(values[part].float(), gradient[part].float(), mean, square)
            _keep(values[part], new, change.good, chance if self._stochastic else None)
            store.write(state, "exp_avg", part, mean, change.good, chance >> 16)
            store.write(state, "exp_avg_sq", part, square, change.good, chance >> 32)

    def _state(self, weight: Tensor) -> tuple[dict[str, Any], _Store]:
        state: dict[str, Any] = self.state[weight]
        store = _STORES["float32" if weight.numel() < _FEW else self._kept]
        if "step" not in state:
            state["step"] = torch.zeros((), device=weight.device)
            state |= store.begin("exp_avg", weight) | store.begin("exp_avg_sq", weight)
        return state, store


@dataclass(frozen=True)
class _Change:
    """One step of AdamW on some numbers of a weight."""

    group: Mapping[str, Any]
    count: Tensor
    scale: Tensor
    good: Tensor

    def __call__(self, weight: Tensor, gradient: Tensor, mean: Tensor, square: Tensor) -> Tensor:
        """Return the new weight, and put the new moments in the place of the old; all float32."""
        first, second = self.group["betas"]
        gradient = gradient / self.scale
        mean.lerp_(gradient, 1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        # 1 - beta ** count, without the digits that are lost when a number next to 1 is taken from it.
        of_mean, of_square = (
            -torch.expm1(self.count * (math.log(beta) if beta else -math.inf)) for beta in (first, second)
        )
        change = mean / of_mean / ((square / of_square).sqrt() + self.group["eps"])
        new: Tensor = weight - self.group["lr"] * (self.group["weight_decay"] * weight + change)
        return new


class _Store(Protocol):
    """How moments are kept."""

    def begin(self, name: str, weight: Tensor) -> dict[str, Tensor]: ...
    def read(self, state: Mapping[str, Tensor], name: str, part: slice) -> Tensor:
        """Return some of a moment as float32, a copy."""

    def write(
        self, state: Mapping[str, Tensor], name: str, part: slice, new: Tensor, good: Tensor, chance: Tensor
    ) -> None:
        """Keep some of a moment where the step is `good`."""


@dataclass(frozen=True)
class _Plain:
    """Moments as numbers of some type."""

    dtype: torch.dtype

    def begin(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        return {name: torch.zeros_like(weight, dtype=self.dtype)}

    def read(self, state: Mapping[str, Tensor], name: str, part: slice) -> Tensor:
        return _local(state[name]).view(-1)[part].to(torch.float32, copy=True)

    def write(
        self, state: Mapping[str, Tensor], name: str, part: slice, new: Tensor, good: Tensor, chance: Tensor
    ) -> None:
        _keep(_local(state[name]).view(-1)[part], new, good, chance)


class _Byte:
    """Moments as bytes that name places in bitsandbytes' dynamic map, times the largest number of their block."""

    def begin(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        blocks = -(-weight.numel() // _BLOCK)
        zero = int(_map(name, weight.device).abs().argmin())
        return {
            name: torch.full_like(weight, zero, dtype=torch.uint8),
            f"{name}_scale": torch.zeros(blocks, device=weight.device),
        }

    def read(self, state: Mapping[str, Tensor], name: str, part: slice) -> Tensor:
        from bitsandbytes.functional import dequantize_blockwise

        code, (kept, scales) = _map(name, state[name].device), self._parts(state, name, part)
        values: Tensor = dequantize_blockwise(kept, absmax=scales, code=code, blocksize=_BLOCK)
        return values

    def write(
        self, state: Mapping[str, Tensor], name: str, part: slice, new: Tensor, good: Tensor, chance: Tensor
    ) -> None:
        from bitsandbytes.functional import quantize_blockwise

        kept, scales = self._parts(state, name, part)
        rounded, about = quantize_blockwise(new, code=_map(name, new.device), blocksize=_BLOCK)
        kept.copy_(torch.where(good, rounded, kept))
        scales.copy_(torch.where(good, about.absmax, scales))

    def _parts(self, state: Mapping[str, Tensor], name: str, part: slice) -> tuple[Tensor, Tensor]:
        blocks = slice(part.start // _BLOCK, part.stop // _BLOCK)
        return state[name].view(-1)[part], state[f"{name}_scale"][blocks]


@cache
def _map(name: str, device: torch.device) -> Tensor:
    from bitsandbytes.functional import create_dynamic_map

    places: Tensor = create_dynamic_map(signed=name == "exp_avg")  # type: ignore[no-untyped-call]
    return places.to(device)


_STORES: dict[Moments, _Store] = {"float32": _Plain(torch.float32), "bfloat16": _Plain(torch.bfloat16), "8bit": _Byte()}


def _keep(kept: Tensor, new: Tensor, good: Tensor, chance: Tensor | None) -> None:
    """Write `new` over what is kept where the step is `good`, rounded by `chance` where that takes fewer bits."""
    if kept.dtype == torch.bfloat16 and chance is not None:
        new = _rounded(new, chance)
    kept.copy_(torch.where(good, new, kept))


def _rounded(new: Tensor, chance: Tensor) -> Tensor:
    """Return float32 numbers that bfloat16 can hold: up or down by the lowest 16 bits of `chance`, in proportion to
    how near they are."""
    bits = new.view(torch.int32) + (chance & 0xFFFF).to(torch.int32)
    return (bits & -0x10000).view(torch.float32)


def _local(tensor: Tensor) -> Tensor:
    local: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local


def _first(weight: Tensor) -> int:
    """Return where in the whole weight, laid out flat, this rank's part begins; FSDP2 gives each rank whole rows."""
    if not isinstance(weight, DTensor):
        return 0
    _, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    return int(offset[0]) * math.prod(weight.shape[1:]) if offset else 0
