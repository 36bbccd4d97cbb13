"""Attention of rows that share a line of a batch, each by itself, without a mask of tokens x tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["rows_apart"]

_NAME = "rows_apart"


@contextmanager
def rows_apart(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Iterator[dict[str, Any]]:
    """Yield what a backbone is called with besides its inputs, so that rows that share a line attend to themselves.

    `bounds` [rows + 1] of the batch says where each row begins in the lines laid end to end, and at last where they
    end; the first dimension of `longest` is no less than the longest row. Inside the block the model's attention is
    ours, for which transformers builds no mask. Where that does not serve (a batch without bounds, attention that is
    not torch's, float32 on a GPU), nothing is yielded, and `position_ids` and a mask keep the rows apart.
    """
    if "bounds" not in batch or not _serves(model, batch["bounds"].device):
        yield {}
        return
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _attention)
    bounds, longest = batch["bounds"], len(batch["longest"])
    before, model.config._attn_implementation = model.config._attn_implementation, _NAME
    try:
        yield {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
    finally:
        model.config._attn_implementation = before


def _serves(model: PreTrainedModel, device: torch.device) -> bool:
    if model.config._attn_implementation != "sdpa" or not model._supports_attention_backend:
        return False
    kind = device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype
    return kind == "cpu" or (kind == "cuda" and dtype.itemsize == 2)


def _attention(  # noqa: PLR0913, transformers decides
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers asks its attention functions to: from [lines, heads, tokens, width], keys and values of
    fewer heads, to [lines, tokens, heads, width]."""
    lines, heads, tokens, width = query.shape
    query, key, value = (each.transpose(1, 2).flatten(0, 1) for each in (query, key, value))
    fits = width <= 256 and width % 8 == 0 and width == value.shape[-1]
    attend = _KERNELS[query.device.type] if fits else _by_rows
    out = attend(query, key, value, _Rows(cu_seq_lens_q, max_length_q, dropout, scaling, sliding_window))
    return out.view(lines, tokens, heads, -1), None


class _Rows(NamedTuple):
    """How rows attend: where each begins, and what is asked of attention besides."""

    bounds: Tensor
    longest: int
    dropout: float
    scaling: float | None
    window: int | None


def _flash(query: Tensor, key: Tensor, value: Tensor, rows: _Rows) -> Tensor:
    """FlashAttention-2 over rows of any length; torch's `varlen_attn` is the same kernel, but wants as many heads of
    keys as of queries until torch 2.12, and has no dropout."""
    out: Tensor = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        rows.bounds,
        rows.bounds,
        rows.longest,
        rows.longest,
        rows.dropout,
        True,
        False,
        scale=rows.scaling,
        window_size_left=None if rows.window is None else rows.window - 1,
        window_size_right=None if rows.window is None else 0,
    )[0]
    return out


def _by_rows(query: Tensor, key: Tensor, value: Tensor, rows: _Rows) -> Tensor:
    """The same, row by row; reads `bounds` from the device."""
    outs = []
    for start, end in itertools.pairwise(rows.bounds.tolist()):
        own, keys, values = (each[start:end].transpose(0, 1)[None] for each in (query, key, value))
        outs.append(
            scaled_dot_product_attention(
                own,
                keys,
                values,
                attn_mask=None if rows.window is None else _band(end - start, rows.window, query.device),
                dropout_p=rows.dropout,
                is_causal=rows.window is None,
                scale=rows.scaling,
                enable_gqa=True,
            )[0].transpose(0, 1)
        )
    return torch.cat(outs)


def _band(size: int, window: int, device: torch.device) -> Tensor:
    """Return which of a row's tokens [size, size] each sees: itself and those before it, `window` in all."""
    behind = torch.arange(size, device=device)[:, None] - torch.arange(size, device=device)
    return (behind >= 0) & (behind < window)


_KERNELS: dict[str, Callable[..., Tensor]] = {"cuda": _flash, "cpu": _by_rows}
