"""How evenly a mixture of experts is used."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["imbalance"]


def imbalance(router_logits: Sequence[Tensor], learned: Tensor, top_k: int) -> Tensor:
    """Return each token's part of the balancing loss, [tokens], of the layers' logits [tokens, experts]; 0 where
    nothing is learned. All ranks.

    A layer's loss is, over experts, the share of learned tokens that choose it times their mean probability for it,
    summed and multiplied by the number of experts (Fedus et al. 2021, arXiv:2101.03961); it is `top_k` where all are
    used alike. Layers are averaged. The shares, which carry no gradient, are those of all ranks' tokens together (Qiu
    et al. 2025, arXiv:2501.11873), so that a rank whose tokens are of one kind may use the experts for that kind.
    """
    chosen = torch.stack([_chosen(logits, learned, top_k) for logits in router_logits])
    told = torch.cat([chosen.flatten(), learned.sum()[None].to(chosen.dtype)])
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(told)
    shares = (told[:-1] / told[-1].clamp(min=1)).view_as(chosen)
    parts = [torch.softmax(logits.float(), -1) @ share for logits, share in zip(router_logits, shares, strict=True)]
    return torch.stack(parts).mean(0) * learned * shares.shape[1]


def _chosen(logits: Tensor, learned: Tensor, top_k: int) -> Tensor:
    """Return how many learned tokens choose each expert, [experts]."""
    picks = logits.detach().topk(top_k, dim=-1).indices
    counts = torch.zeros(logits.shape[1], device=logits.device)
    return counts.index_add_(0, picks.flatten(), learned.float().repeat_interleave(top_k))
