"""The output head and its cross-entropy together, some thousand tokens at a time, so that the logits are never held."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from trainworks.speed.compiling import can_compile
from trainworks.speed.cross_entropy import token_losses

__all__ = ["head_losses", "weighed_losses"]

_CHUNK_BYTES = {"cuda": 2**32, "cpu": 2**26}
"""Most bytes of float32 logits at once: large enough for a GPU's matrix products, small enough for a processor's
cache."""

_KEPT = {"cuda": 2, "cpu": 1}
"""Chunks whose gradients by the weights are kept, to be added up in one pass; those of any others are added to the
first."""

Shape = Callable[[Tensor], Tensor]
"""What the architecture does to logits after the product with the weights, element by element."""


def head_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignored: int,
    bias: Tensor | None = None,
    shape: Shape | None = None,
) -> Tensor:
    """Return -log p(label) in nats, [tokens] in float32 at least, of states [tokens, width], head weights
    [vocabulary, width] and, where there is one, its bias [vocabulary]; 0 where the label is `ignored`.

    Memory is that of one chunk of logits, whatever the number of tokens. The gradients are made in the forward pass,
    while a chunk's logits are there (as in Liger kernels, Hsu et al. 2024, arXiv:2410.10989), and scaled in the
    backward pass. So every token's loss must be weighed alike afterwards, as where a row's sum is divided by one count;
    RuntimeError in the backward pass when they are not. Where the weights are not trained, each may be weighed as it
    likes: only the states' gradients are there, and those are scaled one by one.
    """
    losses: Tensor = _HeadLosses.apply(hidden, weight, bias, labels, ignored, shape)  # type: ignore[no-untyped-call]
    return losses


def weighed_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignored: int,
    bias: Tensor | None = None,
    shape: Shape | None = None,
) -> Tensor:
    """Return the same as `head_losses`, where tokens' losses may be weighed apart afterwards, as those of a chosen and
    a rejected answer are.

    What each is weighed by is known in the backward pass only, which makes every chunk's logits a second time.
    """
    trains = any(each is not None and each.requires_grad for each in (weight, bias))
    apply = _WeighedLosses.apply if trains else _HeadLosses.apply
    losses: Tensor = apply(hidden, weight, bias, labels, ignored, shape)  # type: ignore[no-untyped-call]
    return losses


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        ignored: int,
        shape: Shape | None,
    ) -> Tensor:
        device, dtype = hidden.device.type, _computed_in(hidden)
        states, matrix = hidden.to(dtype), weight.to(dtype)
        wants_states, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        exact = torch.promote_types(dtype, torch.float32)
        losses = torch.zeros(len(labels), dtype=exact, device=hidden.device)
        to_states = torch.empty_like(states) if wants_states else None
        to_bias = torch.zeros_like(bias, dtype=exact) if bias is not None and wants_bias else None
        to_weight: list[Tensor] = []
        for part in _chunks(len(labels), len(weight), device):
            logits = torch.nn.functional.linear(states[part], matrix, None if bias is None else bias.to(dtype))
            if not (wants_states or wants_weight or wants_bias):
                losses[part] = _plain(logits, labels[part], ignored, shape)
                continue
            losses[part], gradient = _for(_chunk, device)(logits, labels[part], ignored, shape)
            if to_states is not None:
                torch.mm(gradient, matrix, out=to_states[part])
            if to_bias is not None:
                to_bias += gradient.sum(0, dtype=exact)
            if wants_weight:
                to_weight.append(gradient.t() @ states[part])
                if len(to_weight) > _KEPT[device]:
                    last = to_weight.pop()
                    to_weight[0] = _exact(to_weight[0]).add_(last)
        ctx.save_for_backward(labels != ignored, to_states, to_bias, *to_weight)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return losses

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        learned, to_states, to_bias, *to_weight = ctx.saved_tensors
        of_hidden, of_weight, of_bias = ctx.dtypes
        if not to_weight and to_bias is None:
            return (_exact(to_states) * above[:, None]).to(of_hidden), None, None, None, None, None
        scale = (above * learned).amax()
        # What is not a number passes: the step is then a bad one, and told as such.
        torch._assert_async(~((above - scale).abs() * learned > 0).any(), "head_losses: tokens are not weighed alike")
        summed = _for(_summed, above.device.type)
        states = None if to_states is None else summed([to_states], scale, of_hidden)
        matrix = summed(to_weight, scale, of_weight) if to_weight else None
        added = None if to_bias is None else (to_bias * scale).to(of_bias)
        return states, matrix, added, None, None, None


class _WeighedLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        ignored: int,
        shape: Shape | None,
    ) -> Tensor:
        ctx.dtype, ctx.ignored, ctx.shape = _computed_in(hidden), ignored, shape
        ctx.save_for_backward(hidden, weight, bias, labels)
        states, matrix = hidden.to(ctx.dtype), weight.to(ctx.dtype)
        added = None if bias is None else bias.to(ctx.dtype)
        losses = torch.zeros(len(labels), dtype=torch.promote_types(ctx.dtype, torch.float32), device=hidden.device)
        for part in _chunks(len(labels), len(weight), hidden.device.type):
            logits = torch.nn.functional.linear(states[part], matrix, added)
            losses[part] = _plain(logits, labels[part], ignored, shape)
        return losses

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, None, None, None]:
        hidden, weight, bias, labels = ctx.saved_tensors
        states, matrix = hidden.to(ctx.dtype), weight.to(ctx.dtype)
        added = None if bias is None else bias.to(ctx.dtype)
        to_states = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        to_weight = torch.zeros_like(matrix)
        to_bias = torch.zeros_like(bias, dtype=above.dtype) if ctx.needs_input_grad[2] else None
        for number, part in enumerate(_chunks(len(labels), len(weight), hidden.device.type)):
            # Scaled are the narrow sides of both products, not the gradient as wide as the vocabulary.
            scale = above[part][:, None]
            logits = torch.nn.functional.linear(states[part], matrix, added)
            _, gradient = _for(_chunk, hidden.device.type)(logits, labels[part], ctx.ignored, ctx.shape)
            if to_states is not None:
                to_states[part] = (gradient @ matrix) * scale
            if to_bias is not None:
                to_bias += above[part] @ gradient.to(above.dtype)
            product = gradient.t() @ (states[part] * scale).to(ctx.dtype)
            to_weight = product if number == 0 else _exact(to_weight).add_(product)
        return (
            None if to_states is None else to_states.to(hidden.dtype),
            to_weight.to(weight.dtype),
            None if to_bias is None else to_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _plain(logits: Tensor, labels: Tensor, ignored: int, shape: Shape | None) -> Tensor:
    """Return the losses of a chunk [tokens] alone."""
    return token_losses(logits if shape is None else shape(_exact(logits)), labels, ignored=ignored)


def _computed_in(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _summed(parts: Sequence[Tensor], scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum of the parts times `scale`; in `dtype`, though added up in float32 at least."""
    total = _exact(parts[0])
    for part in parts[1:]:
        total = total + part
    return (total * scale).to(dtype)


def _exact(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _chunks(tokens: int, vocabulary: int, device: str) -> Iterator[slice]:
    size = max(1, _CHUNK_BYTES[device] // (4 * vocabulary))
    return (slice(start, start + size) for start in range(0, tokens, size))


def _chunk(logits: Tensor, labels: Tensor, ignored: int, shape: Shape | None) -> tuple[Tensor, Tensor]:
    """Return the losses of a chunk [tokens] and their gradient by the product's result [tokens, vocabulary], of its
    type."""
    learned = labels != ignored
    places = labels.where(learned, 0)[:, None]
    back: Callable[[Tensor], tuple[Tensor]] | None = None
    shaped = _exact(logits)
    if shape is not None:
        shaped, back = torch.func.vjp(shape, shaped)[:2]
    losses, gradient = _GRADIENTS[logits.device.type](shaped, places, learned)
    return losses, (gradient if back is None else back(gradient)[0]).to(logits.dtype)


def _in_place(logits: Tensor, places: Tensor, learned: Tensor) -> tuple[Tensor, Tensor]:
    logs = torch.log_softmax(logits, -1)
    losses = -logs.gather(1, places)[:, 0] * learned
    return losses, logs.exp_().scatter_add_(1, places, -torch.ones_like(losses)[:, None]).mul_(learned[:, None])


def _fused(logits: Tensor, places: Tensor, learned: Tensor) -> tuple[Tensor, Tensor]:
    """Do the same in operations that a compiler makes one pass of."""
    logs = torch.log_softmax(logits, -1)
    losses = -logs.gather(1, places)[:, 0] * learned
    here = torch.arange(logits.shape[1], device=logits.device)[None] == places
    return losses, (logs.exp() - here.to(logits.dtype)) * learned[:, None]


_GRADIENTS: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {"cpu": _in_place, "cuda": _fused}


@cache
def _for(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """Return the function: compiled on a GPU, where it is bound by passes over memory."""
    return torch.compile(function) if can_compile(torch.device(device)) else function
