"""Context parallelism: ranks that share the tokens of each line, and exchange heads for tokens while they attend.

Everything in a decoder but attention works on tokens one by one. So each rank keeps a slice of every line, and only
within attention every rank has the lines whole, for its share of the heads (DeepSpeed Ulysses, Jacobs et al. 2023,
arXiv:2309.14509). Rows that share a line stay apart, and nothing is approximated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.nn.functional import pad

from trainworks.data.text import IGNORED
from trainworks.errors import ConfigError, LaunchError
from trainworks.heads import backbone
from trainworks.models import vocabulary
from trainworks.speed.packed_attention import SPREAD, Rows, attend, rounded, rows_apart, without_kernel
from trainworks.tasks.packing_proof import agree

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from transformers import PreTrainedConfig, PreTrainedModel

    from trainworks.data.loading import Batch
    from trainworks.tasks import Task

__all__ = ["check", "split", "spread", "verify", "whole_lines"]

_FILLERS = {"input_ids": 0, "labels": IGNORED, "row": 0, "position_ids": 0}
"""What is cut to slices, [lines, tokens], each with what fills a line up."""
_SETTING = "parallelism_config_cp_size"

_MOVING_FREQUENCIES = ("dynamic", "longrope")


def check(config: PreTrainedConfig, size: int, task: Task) -> None:
    """Refuse a task or an architecture whose lines `size` ranks cannot share; LaunchError that names every reason.

    The number of key and value heads does not matter: they are repeated until they divide. Where tensor parallelism
    has divided the heads before, `size` is the product of both.
    """
    if not task.can_pack:  # rows that may share a line are learned token by token
        raise LaunchError(
            f"{_SETTING}: {size}, {config.model_type}: task {task.type} does not learn token by token; the size has to "
            "be 1"
        )
    problems = [*_heads_that_do_not_divide(config, size), *_frequencies_that_move(config)]
    if undone := without_kernel(config):
        problems.append(f"its attention {undone}, for which there is no kernel without a mask; the size has to be 1")
    if problems:
        raise LaunchError("\n".join(f"{_SETTING}: {size}, {config.model_type}: {problem}" for problem in problems))


def _heads_that_do_not_divide(config: PreTrainedConfig, size: int) -> Iterator[str]:
    heads = getattr(config.get_text_config(), "num_attention_heads", None)
    if heads and heads % size:
        fitting = ", ".join(str(number) for number in range(1, heads + 1) if heads % number == 0)
        yield f"{size} ranks cannot share {heads} attention heads evenly; sizes that do: {fitting}"


def _frequencies_that_move(config: PreTrainedConfig) -> Iterator[str]:
    """Name rotary embeddings that follow the longest position of what a forward is given: a slice would not know it."""
    told = getattr(config.get_text_config(), "rope_parameters", None) or {}
    by_kind = [part for part in told.values() if isinstance(part, dict)] or [told]
    for kind in sorted({part.get("rope_type", "default") for part in by_kind}.intersection(_MOVING_FREQUENCIES)):
        yield f"its rotary embedding (rope_type: {kind}) depends on the longest row of a batch; the size has to be 1"


def split(batch: Batch, group: ProcessGroup) -> Batch:
    """Return this rank's slice of a batch that all ranks of the group hold: of every line a stretch of its tokens.

    `input_ids`, `labels`, `row` and `position_ids`, [lines, tokens], are filled up to a multiple of the group's size
    and cut. `learned` [rows] is what of each row is learned here, so that sums and counts of the ranks add up; whatever
    else is per row stays. `bounds` and `longest` are those of the whole lines, with padding as a row of its own, so
    that no mask is needed. The first dimension of `slices` is the group's size. No rank waits for another.
    """
    size, rank = group.size(), group.rank()
    lines, tokens = batch["input_ids"].shape
    width = -(-tokens // size) * size
    whole = {"position_ids": torch.arange(tokens, device=batch["input_ids"].device).expand(lines, -1)} | batch
    own = {
        name: pad(whole[name], (0, width - tokens), value=filler).chunk(size, 1)[rank].contiguous()
        for name, filler in _FILLERS.items()
    }
    learns = (own["labels"] != IGNORED).flatten().to(batch["learned"].dtype)
    told = {
        "learned": torch.zeros_like(batch["learned"]).index_add_(0, own["row"].flatten(), learns),
        "bounds": _bounds(batch, width),
        "longest": torch.empty(_longest(batch, width), 0),
        "slices": torch.empty(size, 0),
    }
    return {name: value for name, value in batch.items() if name != "attention_mask"} | own | told


def _bounds(batch: Batch, width: int) -> Tensor:
    """Return where each row begins in lines of `width` laid end to end, and where they end; what is left of a line is
    a row, too."""
    lines, tokens = batch["input_ids"].shape
    starts = torch.arange(lines, device=batch["input_ids"].device) * width
    inside = batch.get("bounds", starts[:0]).long()
    inside = inside + inside // tokens * (width - tokens)
    used = batch["attention_mask"].sum(1) if "attention_mask" in batch else tokens
    bounds: Tensor = torch.cat([starts, inside, starts + used, starts[-1:] + width]).unique()
    return bounds.int()


def _longest(batch: Batch, width: int) -> int:
    """Return no less than the longest row has; of few values, for each is compiled for."""
    if "bounds" in batch:
        return max(len(batch["longest"]), width - batch["input_ids"].shape[1])
    return 1 << (width - 1).bit_length()


def spread(model: PreTrainedModel, group: ProcessGroup) -> None:
    """Let a model's attention work on slices of lines, from now on: whoever computes a layer once more in the backward
    pass has to find it so.

    Every forward exchanges with all ranks of the group, and is given what `split` made; one that is not raises an
    error. For other forwards there is `whole_lines`.
    """
    from transformers import AttentionInterface

    name = f"{SPREAD}{group.group_name}"
    AttentionInterface.register(name, partial(_attention, group=group))
    model.config._attn_implementation = name


@contextmanager
def whole_lines(model: PreTrainedModel) -> Iterator[None]:
    """Let a model attend to whole lines inside the block, each rank for itself, to predict or to generate; where its
    attention is not spread, it does already. Nothing is learned inside."""
    before = model.config._attn_implementation
    if not before.startswith(SPREAD):
        yield
        return
    model.config._attn_implementation = "sdpa" if model._supports_sdpa else "eager"
    try:
        yield
    finally:
        model.config._attn_implementation = before


def verify(model: PreTrainedModel, group: ProcessGroup) -> None:
    """Prove on a few tokens that slices of lines have the states of the lines. All ranks, with the same whole model.

    LaunchError for models whose layers look at other tokens by other means than attention (convolutions, recurrent
    states), do not heed `position_ids`, or attend in a way of their own.
    """
    training, before = model.training, model.config._attn_implementation
    model.eval()
    try:
        fits = model._supports_attention_backend and _slices_agree(model, group) and _looks_by_attention(model, group)
        found = "its layers look at other tokens than by attention, or do not heed position_ids"
    except ConfigError as error:
        fits, found = False, str(error)
    finally:
        model.config._attn_implementation = before
        model.train(training)
    if not fits:
        raise LaunchError(
            f"{_SETTING}: {group.size()}: {type(model).__name__} cannot work on slices of its lines: {found}; set it "
            "to 1, or take another architecture, such as a Llama, Qwen or GPT-2 model"
        )


def _slices_agree(model: PreTrainedModel, group: ProcessGroup) -> bool:
    """Compare states on slices with those of whole lines; the measure is what a slice is without the rest."""
    batch = _few_tokens(model, group.size())
    own = split(batch, group)
    with torch.no_grad():
        expected = _states(model, batch).chunk(group.size(), 1)[group.rank()]
        cut = _states(model, {name: own[name] for name in ("input_ids", "position_ids")})
        spread(model, group)
        found = _states(model, own)
    learned = own["labels"] != IGNORED
    squares = torch.stack([(states - expected)[learned].double().square().sum() for states in (found, cut)])
    torch.distributed.all_reduce(squares, group=group)
    difference, seen = squares.sqrt()
    return agree(difference, seen, eps=torch.finfo(model.dtype).eps)


def _looks_by_attention(model: PreTrainedModel, group: ProcessGroup) -> bool:
    """Tell whether tokens that attend to themselves alone depend on no others: a gradient that is nothing at all.

    A convolution in new weights adds so little to a state that it passes for rounding; a gradient tells it all the
    same.
    """
    batch = split(_few_tokens(model, group.size()), group)
    alone = {"bounds": torch.arange(batch["input_ids"].numel() * group.size() + 1, device=model.device).int()}
    entered: list[Tensor] = []

    def enter(_module: torch.nn.Module, _inputs: Any, embedded: Tensor) -> Tensor:
        entered.append(embedded.detach().requires_grad_())
        return entered[-1]

    spread(model, group)
    hook = model.get_input_embeddings().register_forward_hook(enter)
    try:
        states = _states(model, batch | alone | {"longest": torch.empty(1, 0)})
    finally:
        hook.remove()
    (gradient,) = torch.autograd.grad(states[:, -1].float().square().sum(), entered)
    others = gradient[:, :-1].abs().sum()
    torch.distributed.all_reduce(others, group=group)
    return not others


def _few_tokens(model: PreTrainedModel, size: int) -> Batch:
    """Return two lines of which each rank has eight tokens, the second with padding."""
    width = 8 * size
    ids = torch.arange(1, 2 * width + 1, device=model.device).view(2, width) % vocabulary(model)
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.where(mask.bool(), IGNORED),
        "row": torch.arange(2, device=model.device)[:, None].expand(-1, width),
        "learned": mask.sum(1),
    }


def _states(model: PreTrainedModel, batch: Batch) -> Tensor:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    with rows_apart(model, batch) as told:
        states: Tensor = backbone(model)(**inputs, **told, use_cache=False).last_hidden_state
    return states


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    group: ProcessGroup,
    **told: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers asks its attention functions to, from slices of lines to slices of lines."""
    size, (lines, heads, _, _) = group.size(), query.shape
    if heads % size:
        raise LaunchError(f"{_SETTING}: {size} ranks cannot share a layer's {heads} attention heads evenly")
    rows = Rows.of(attention_mask, told)
    query, key, value = _to_lines(*rounded(query, *_enough(key, value, size=size)), group=group)
    out = attend(query, key, value, rows).flatten(2)
    slices = out.view(lines, size, -1, out.shape[-1]).transpose(0, 1)
    mine = _exchanged(slices, group).permute(1, 2, 0, 3)
    return mine.reshape(*mine.shape[:2], heads, -1), None


def _enough(*tensors: Tensor, size: int) -> Iterator[Tensor]:
    """Yield keys and values [lines, heads, tokens, width] with each head repeated until every rank has as many."""
    return (each.repeat_interleave(size // math.gcd(each.shape[1], size), 1) for each in tensors)


def _to_lines(*tensors: Tensor, group: ProcessGroup) -> Iterator[Tensor]:
    """Yield, of slices [lines, heads, tokens / size, width], whole lines of this rank's heads [lines, heads / size,
    tokens, width]; one exchange for all of them."""
    parts = [each.unflatten(1, (group.size(), -1)).permute(1, 0, 3, 2, 4) for each in tensors]
    shared = torch.cat([part.flatten(3) for part in parts], -1)
    lines = _exchanged(shared, group).transpose(0, 1).flatten(1, 2)
    taken = lines.split([part.shape[3] * part.shape[4] for part in parts], -1)
    return (own.unflatten(2, part.shape[3:]).transpose(1, 2) for own, part in zip(taken, parts, strict=True))


def _exchanged(parts: Tensor, group: ProcessGroup) -> Tensor:
    """Send each of the parts, laid along the first dimension, to the rank of its number; return what came, by sender.
    Gradients go the other way."""
    return all_to_all_single_autograd(parts.contiguous(), None, None, group)
