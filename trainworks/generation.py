"""What a model says, for many prompts at once and on any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

__all__ = ["continued", "generated", "until_end"]

Ids = NDArray[np.int64]


def continued(
    model: PreTrainedModel, prompts: Sequence[NDArray[Any]], *, ends: Sequence[int], pad: int, most: int, beams: int = 1
) -> list[Ids]:
    """Return what a decoder says after each prompt, at most `most` tokens, without the end token.

    The prompts are padded on the left, so that all answers begin at once. All ranks, with as many calls each.
    """
    import torch

    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad)
    seen = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.from_numpy(np.asarray(prompt, dtype=np.int64))
        seen[row, width - len(prompt) :] = 1
    inputs = {"input_ids": ids.to(model.device), "attention_mask": seen.to(model.device)}
    said = generated(model, inputs, ends=ends, pad=pad, most=most, beams=beams)
    return [until_end(row, ends) for row in said[:, width:].cpu().numpy()]


def generated(
    model: PreTrainedModel, inputs: dict[str, Tensor], *, ends: Sequence[int], pad: int, most: int, beams: int = 1
) -> Tensor:
    """Return what `generate` makes of a batch, [rows, tokens], without sampling: greedily, or by `beams`.

    All ranks, with as many calls each: where weights are sharded, every rank goes on until the last has its answers.
    """
    said: Tensor = model.generate(  # type: ignore[operator]
        **inputs,
        max_new_tokens=most,
        num_beams=beams,
        do_sample=False,
        eos_token_id=list(ends),
        pad_token_id=pad,
        synced_gpus=_is_sharded(model),
    )
    return said


def _is_sharded(model: PreTrainedModel) -> bool:
    """Tell whether a forward pass needs the other ranks; transformers 5.23 itself looks at the outermost module
    alone."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def until_end(ids: Ids, ends: Sequence[int]) -> Ids:
    """Return the tokens before the first that ends an answer."""
    found = np.flatnonzero(np.isin(ids, ends))
    return ids[: found[0]] if len(found) else ids
