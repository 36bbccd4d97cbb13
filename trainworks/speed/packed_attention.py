"""Attention of rows that share a line of a batch, each by itself, without a mask of tokens x tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from trainworks.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["SPREAD", "Rows", "attend", "rounded", "rows_apart", "without_kernel"]

_NAME = "rows_apart"
SPREAD = "rows_apart_over_"
"""How the names begin of attention that works on slices of the lines, which `trainworks.parallel.context` registers."""


@contextmanager
def rows_apart(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Iterator[dict[str, Any]]:
    """Yield what a backbone is called with besides its inputs, so that rows that share a line attend to themselves.

    `bounds` [rows + 1] of the batch says where each row begins in the lines laid end to end, and at last where they
    end; the first dimension of `longest` is no less than the longest row. Inside the block the model's attention is
    ours, for which transformers builds no mask. Where that does not serve (a batch without bounds, attention that is
    not torch's, float32 on a GPU), nothing is yielded, and `position_ids` and a mask keep the rows apart.

    Where the batch is a slice of the lines, the model's attention has to be spread already, and else it must not be;
    RuntimeError where the two do not go together.
    """
    spread = model.config._attn_implementation.startswith(SPREAD)
    if spread != ("slices" in batch):
        raise RuntimeError(
            f"{'whole lines' if spread else 'slices of lines'} came to attention over "
            f"{'slices of lines' if spread else 'whole lines'}"
        )
    if not spread and ("bounds" not in batch or not _serves(model, batch["bounds"].device)):
        yield {}
        return
    bounds, longest = batch["bounds"], len(batch["longest"])
    told = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
    if spread:
        yield told
        return
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _attention)
    before, model.config._attn_implementation = model.config._attn_implementation, _NAME
    try:
        yield told
    finally:
        model.config._attn_implementation = before


def without_kernel(config: PreTrainedConfig) -> str:
    """Return what an architecture asks of attention that the kernels here do not do, in words; empty where they do
    all."""
    text = config.get_text_config()
    if getattr(text, "attn_logit_softcapping", None) is not None:
        return "caps its scores (attn_logit_softcapping)"
    if "chunked_attention" in (getattr(text, "layer_types", None) or ()):
        return "sees chunks of a row (chunked_attention)"
    return ""


def _serves(model: PreTrainedModel, device: torch.device) -> bool:
    if model.config._attn_implementation != "sdpa" or not model._supports_attention_backend:
        return False
    if without_kernel(model.config):
        return False
    kind = device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype
    return kind == "cpu" or (kind == "cuda" and dtype.itemsize == 2)


def _attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **told: Any
) -> tuple[Tensor, None]:
    """Attend as transformers asks its attention functions to."""
    return attend(query, key, value, Rows.of(attention_mask, told)), None


_UNDONE = ("softcap", "s_aux", "position_bias")


class Rows(NamedTuple):
    """How rows attend: where each begins, and what is asked of attention besides."""

    bounds: Tensor
    longest: int
    dropout: float
    scaling: float | None
    window: int | None

    @classmethod
    def of(cls, attention_mask: Tensor | None, told: Mapping[str, Any]) -> Self:
        """Return what transformers tells an attention function; ConfigError for what no kernel here does."""
        undone = [name for name in _UNDONE if told.get(name) is not None]
        undone += ["attention_mask"] if attention_mask is not None else []
        if undone:
            raise ConfigError(
                f"its attention is given {undone[0]}, which no kernel here that keeps rows apart knows of"
            )
        if "cu_seq_lens_q" not in told:
            raise ConfigError("its attention is not told where rows begin")
        return cls(
            told["cu_seq_lens_q"],
            told["max_length_q"],
            told.get("dropout", 0.0),
            told.get("scaling"),
            told.get("sliding_window"),
        )


def attend(query: Tensor, key: Tensor, value: Tensor, rows: Rows) -> Tensor:
    """Attend from [lines, heads, tokens, width], keys and values of fewer heads, to [lines, tokens, heads, width]."""
    lines, heads, tokens, _ = query.shape
    query, key, value = (each.transpose(1, 2).flatten(0, 1) for each in rounded(query, key, value))
    return _KERNELS[query.device.type](query, key, value, rows).view(lines, tokens, heads, -1)


def rounded(*tensors: Tensor) -> list[Tensor]:
    """Return tensors of the type that autocast wants for attention, where it is on: norms may have left float32."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return list(tensors)
    return [tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors]


def _flash(query: Tensor, key: Tensor, value: Tensor, rows: Rows) -> Tensor:
    """FlashAttention-2 over rows of any length; torch's `varlen_attn` is the same kernel, but wants as many heads of
    keys as of queries until torch 2.12, and has no dropout. Row by row where it does not fit."""
    width = query.shape[-1]
    if width > 256 or width % 8 or width != value.shape[-1] or query.dtype.itemsize != 2:
        return _by_rows(query, key, value, rows)
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


def _by_rows(query: Tensor, key: Tensor, value: Tensor, rows: Rows) -> Tensor:
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
