"""Layers shared out over the ranks of a tensor group, by the plans that transformers has for its models.

A layer's first matrices are cut by columns, so that each rank has some of the heads or inner states, and its last one
by rows, whose results are added up (Megatron-LM, arXiv:1909.08053). What a plan says nothing of, and embeddings and
head, which the loss reads directly, stays whole on each rank of the group. The cuts are torch's, which are tensors that
know their place in the whole; transformers' own need the model to be loaded by it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from trainworks.errors import LaunchError
from trainworks.heads import embeddings

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from transformers import PretrainedConfig, PreTrainedModel

    from trainworks.parallel.launch import World
    from trainworks.parallel.layout import Layout

__all__ = ["check", "parallelise"]

_KEY = "parallelism_config_tp_size"
_WHOLE = ("colwise_gather_output", "rowwise_split_input")
"""Styles of layers that take and give whole states, and so may be left whole."""
_EXPERTS = ("moe_tp_experts", "ep_dispatch_experts")


def check(model: PreTrainedModel, layout: Layout) -> None:
    """Raise LaunchError where a model cannot be shared out so; it may be without weights."""
    kind, size = type(model).__name__, layout.tensor
    if not _plan(model):
        raise LaunchError(f"{_KEY}: transformers has no tensor-parallel plan for {kind}; shard it with FSDP instead")
    if unknown := sorted({*_plan(model).values()} - {*_STYLES, *_WHOLE, *_EXPERTS}):
        raise LaunchError(
            f"{_KEY}: the plan of {kind} asks for {', '.join(unknown)}, which this version does not know; shard the "
            "model with FSDP instead"
        )
    if layout.expert > 1 and not {*_plan(model).values()} & {*_EXPERTS}:
        raise LaunchError(f"layout.expert: {kind} has no experts that transformers has a plan for; leave it out")
    sizes = _sizes(model.config.get_text_config(), layout)
    if any(amount % size for amount in sizes.values()):
        serve = [n for n in range(1, min(sizes.values()) + 1) if not any(amount % n for amount in sizes.values())]
        told = ", ".join(f"{name} {amount}" for name, amount in sizes.items())
        raise LaunchError(f"{_KEY}: {size} does not divide {told}; {', '.join(map(str, serve))} do")
    if any(len(getattr(part, "lora_magnitude_vector", ())) for part in model.modules()):
        raise LaunchError(f"{_KEY}: DoRA takes norms of whole matrices; shard the model with FSDP instead")


def parallelise(model: PreTrainedModel, world: World) -> None:
    """Cut a model's layers in place over the mesh's `tensor` ranks. All ranks, which hold the same weights."""
    check(model, world.layout)
    assert world.mesh is not None
    mesh = world.mesh["tensor"]
    plan = _plan(model)
    for name, module in list(model.named_modules()):
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name), "")
        if style in _EXPERTS and world.layout.expert > 1:
            parallelize_module(module, mesh, _Experts())
        elif style in _STYLES:
            for part, cut in _STYLES[style](module):
                parallelize_module(part, mesh, cut, src_data_rank=None)


def _plan(model: PreTrainedModel) -> dict[str, str]:
    """Return the plan's styles by module, `*` for a layer's number; without embeddings, head and what is inside
    experts."""
    whole: dict[str, str] = dict(model.tp_plan or {})
    experts = [name for name, style in whole.items() if style in _EXPERTS]
    outside = {embeddings(model), model.get_output_embeddings()}
    named = {name for name, module in model.named_modules() if module in outside}
    return {
        name: style
        for name, style in whole.items()
        if name not in named and not any(name.startswith(f"{each}.") for each in experts)
    }


def _sizes(config: PretrainedConfig, layout: Layout) -> dict[str, int]:
    """Return what the ranks have to divide, as a model's configuration names it."""
    names = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "num_experts", "num_local_experts")
    found = {name: getattr(config, name, None) for name in (names if layout.expert > 1 else names[:3])}
    return {name: size for name, size in found.items() if size is not None}


def _by_columns(module: nn.Module) -> Iterator[tuple[nn.Module, ParallelStyle]]:
    """Cut a linear layer by its outputs; of an adapter's two matrices, the second."""
    yield getattr(module, "base_layer", module), ColwiseParallel()
    yield from ((part, ColwiseParallel()) for part in getattr(module, "lora_B", nn.ModuleDict()).values())


def _by_rows(module: nn.Module) -> Iterator[tuple[nn.Module, ParallelStyle]]:
    """Cut a linear layer by its inputs; of an adapter's two matrices, the first."""
    yield getattr(module, "base_layer", module), RowwiseParallel()
    yield from ((part, RowwiseParallel()) for part in getattr(module, "lora_A", nn.ModuleDict()).values())


def _on_parts(module: nn.Module) -> Iterator[tuple[nn.Module, ParallelStyle]]:
    yield module, _OnParts()


_STYLES: dict[str, Callable[[nn.Module], Iterator[tuple[nn.Module, ParallelStyle]]]] = {
    "colwise": _by_columns,
    "rowwise": _by_rows,
    "replicated_with_grad_allreduce": _on_parts,
}


class _OnParts(ParallelStyle):
    """A layer whose weights are whole and see this rank's heads only, so that their gradients are added up."""

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        group = device_mesh.get_group()

        def summed(call: Callable[..., Any], *arguments: Any) -> Any:
            return call({name: _seen(weight, group) for name, weight in module.named_parameters()}, *arguments)

        return _around(module, summed)


class _Experts(ParallelStyle):
    """A layer's experts, some on each rank, which all see all tokens; what they make of them is added up."""

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        group, rank = device_mesh.get_group(), device_mesh.get_local_rank()
        for name, weights in module.named_parameters():
            part = distribute_tensor(weights.detach(), device_mesh, [Shard(0)], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(part, requires_grad=weights.requires_grad))
        own: int = module.num_experts // device_mesh.size()
        # What transformers' experts pass over: a number they do not have, where they are told that there are others.
        module.num_experts, module._is_expert_parallel = own, True  # type: ignore[assignment]

        def shared(call: Callable[..., Any], hidden: Tensor, chosen: Tensor, share: Tensor) -> Any:
            weights: dict[str, Any] = dict(module.named_parameters())
            local = {name: each.to_local() for name, each in weights.items()}
            here = chosen - rank * own
            is_here = (here >= 0) & (here < own)
            tokens, shares = _seen(hidden, group), _seen(share, group) * is_here
            return _Total.apply(call(local, tokens, here.where(is_here, own), shares), group)  # type: ignore[no-untyped-call]

        return _around(module, shared)


def _around(module: nn.Module, around: Callable[..., Any]) -> nn.Module:
    """Let a module's forward be `around(call, *arguments)`, where `call(weights, *arguments)` is the one it had, with
    these weights."""
    inner = copy(module)  # shares its weights, whoever changes them, and keeps the forward

    def call(weights: dict[str, Tensor], *arguments: Any) -> Any:
        return torch.func.functional_call(inner, weights, arguments)

    module.forward = partial(around, call)
    return module


def _seen(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """Return a tensor that every rank of the group has; its gradient is the sum of theirs."""
    same: Tensor = _Seen.apply(tensor, group)  # type: ignore[no-untyped-call]
    return same


class _Seen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _summed(gradient, ctx.group), None


class _Total(torch.autograd.Function):
    """The sum of the ranks' tensors, which all of them have; its gradient is everyone's."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup) -> Tensor:
        return _summed(tensor, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _summed(tensor: Tensor, group: ProcessGroup) -> Tensor:
    total = tensor.contiguous().clone()
    torch.distributed.all_reduce(total, group=group)
    return total
