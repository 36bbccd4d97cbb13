"""Cross-entropy of every token, with one copy of the vocabulary-sized numbers instead of three."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["token_losses"]


def token_losses(logits: Tensor, labels: Tensor, *, ignored: int) -> Tensor:
    """Return -log p(label) in nats, [tokens] in float32 at least, of logits [tokens, vocabulary] of any float type; 0
    where the label is `ignored`.

    The logarithms are taken in float32 (of doubles in float64), and in the backward pass the gradient is written over
    them: torch's own cross-entropy keeps a float32 copy of half-precision logits, and allocates the gradient twice. A
    second backward pass through it is refused by autograd.

    >>> token_losses(torch.zeros(2, 4), torch.tensor([1, -100]), ignored=-100)
    tensor([1.3863, 0.0000])
    """
    losses: Tensor = _CrossEntropy.apply(logits, labels, ignored)  # type: ignore[no-untyped-call]
    return losses


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignored: int) -> Tensor:
        logs = torch.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
        learned = labels != ignored
        places = labels.where(learned, 0)[:, None]
        ctx.save_for_backward(logs, places, learned)
        ctx.dtype = logits.dtype
        return -logs.gather(1, places)[:, 0] * learned

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logs, places, learned = ctx.saved_tensors
        scale = (gradient * learned)[:, None]
        # softmax - onehot, times what comes from above; in place, so the saved logarithms are gone.
        logs.exp_().mul_(scale).scatter_add_(1, places, -scale)
        return logs.to(ctx.dtype), None, None
