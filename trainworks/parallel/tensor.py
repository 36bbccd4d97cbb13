"""Layers shared out over the ranks of a tensor group, by the plans that transformers has for its models.

A layer's first matrices are cut by columns, so that each rank has some of the heads or inner states, and its last one
by rows, whose results are added up (Megatron-LM, arXiv:1909.08053). What a plan says nothing of, and embeddings and
head, which the loss reads directly, stays whole on each rank of the group. The cuts are torch's, which are tensors that
know their place in the whole; transformers' own need the model to be loaded by it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from trainworks.errors import LaunchError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from transformers import PretrainedConfig, PreTrainedModel

    from trainworks.parallel.launch import World

__all__ = ["check", "parallelise"]

_KEY = "parallelism_config_tp_size"
_WHOLE = ("colwise_gather_output", "rowwise_split_input")
"""Styles of layers that take and give whole states, and so may be left whole."""
_EXPERTS = ("moe_tp_experts", "ep_dispatch_experts")
_SHARED_SIZES = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "moe_intermediate_size")


def check(model: PreTrainedModel, size: int) -> None:
    """Raise LaunchError where a model cannot be shared out over `size` ranks; it may be without weights."""
    kind = type(model).__name__
    if not _plan(model):
        raise LaunchError(f"{_KEY}: transformers has no tensor-parallel plan for {kind}; shard it with FSDP instead")
    if unknown := sorted({*_plan(model).values()} - {*_STYLES, *_WHOLE}):
        raise LaunchError(
            f"{_KEY}: the plan of {kind} asks for {', '.join(unknown)}, which this version does not know; shard the "
            "model with FSDP instead"
        )
    sizes = _sizes(model.config.get_text_config())
    if any(amount % size for amount in sizes.values()):
        serve = [n for n in range(1, min(sizes.values()) + 1) if not any(amount % n for amount in sizes.values())]
        told = ", ".join(f"{name} {amount}" for name, amount in sizes.items())
        raise LaunchError(f"{_KEY}: {size} does not divide {told}; {', '.join(map(str, serve))} do")
    if any(len(getattr(part, "lora_magnitude_vector", ())) for part in model.modules()):
        raise LaunchError(f"{_KEY}: DoRA takes norms of whole matrices; shard the model with FSDP instead")


def parallelise(model: PreTrainedModel, world: World) -> None:
    """Cut a model's layers in place over the mesh's `tensor` ranks. All ranks, which hold the same weights."""
    check(model, world.layout.tensor)
    assert world.mesh is not None
    mesh = world.mesh["tensor"]
    plan = _plan(model)
    for name, module in list(model.named_modules()):
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
        if style in _STYLES:
            for part, cut in _STYLES[style](module):
                parallelize_module(part, mesh, cut, src_data_rank=None)


def _plan(model: PreTrainedModel) -> dict[str, str]:
    """Return the plan's styles by module, `*` for a layer's number; without embeddings, head and experts."""
    whole: dict[str, str] = dict(model.tp_plan or {})
    experts = [name for name, style in whole.items() if style in _EXPERTS]
    outside = {model.get_input_embeddings(), model.get_output_embeddings()}
    named = {name for name, module in model.named_modules() if module in outside}
    return {
        name: style
        for name, style in whole.items()
        if name not in named and not any(name == each or name.startswith(f"{each}.") for each in experts)
    }


def _sizes(config: PretrainedConfig) -> dict[str, int]:
    found = {name: getattr(config, name, None) for name in _SHARED_SIZES[:3]}
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
        group, forward = device_mesh.get_group(), module.forward

        def summed(*arguments: Any, **options: Any) -> Any:
            weights = {name: _Summed.apply(weight, group) for name, weight in module.named_parameters()}  # type: ignore[no-untyped-call]
            module.forward = forward
            try:
                return torch.func.functional_call(module, weights, arguments, options)
            finally:
                module.forward = summed

        module.forward = summed
        return module


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient, group=ctx.group)
        return gradient, None
