"""A decoder cut into the stages of a pipeline: each rank keeps its own layers, under the names they have in the whole
model."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainworks.errors import ConfigError
from trainworks.heads import backbone

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "SCHEDULES",
    "Plan",
    "Schedule",
    "check_can_cut",
    "cut",
    "layers_of",
    "plan_stages",
    "stage_of",
    "tied_weight",
]


@dataclass(frozen=True)
class Schedule:
    """An order in which the stages of a pipeline work, as `torch.distributed.pipelining` knows it."""

    torch_name: str
    stages_per_rank: int = 1
    is_v: bool = False
    """Whether a rank's second stage comes on the way back, so that the first rank also has the last stage."""
    splits_backward: bool = False
    """Whether gradients by weights are made later than those by inputs, which compiled layers cannot do."""
    in_rounds: bool = False
    """Whether micro-batches go through in rounds of one size."""

    def name_for(self, number: int, ranks: int) -> str:
        """Return the name to use for so many micro-batches; 1F1B of fewer than there are ranks is GPipe."""
        return "GPipe" if self.torch_name == "1F1B" and number < ranks else self.torch_name

    def filled(self, number: int, ranks: int) -> int:
        """Return the least number of micro-batches, from `number` on, that the schedule can take."""
        while self.in_rounds and number % max(1, number // ranks):
            number += 1
        return number


SCHEDULES = {
    "gpipe": Schedule("GPipe"),
    "1f1b": Schedule("1F1B"),
    "interleaved": Schedule("Interleaved1F1B", stages_per_rank=2, in_rounds=True),
    "zero-bubble": Schedule("InterleavedZeroBubble", stages_per_rank=2, splits_backward=True, in_rounds=True),
    "zero-bubble-v": Schedule("ZBVZeroBubble", stages_per_rank=2, is_v=True, splits_backward=True),
}
"""GPipe (Huang et al. 2019, arXiv:1811.06965); one forward, one backward (Narayanan et al. 2019, arXiv:1806.03377) and
its interleaved form (2021, arXiv:2104.04473); zero bubble ZB1P and ZB-V (Qi et al. 2023, arXiv:2401.10241)."""


@dataclass(frozen=True)
class Plan:
    """Which layers each stage has, and which stages each rank of the pipeline."""

    schedule: Schedule
    ranks: int
    layers: tuple[range, ...]
    """Of each stage, in the order that a batch goes through them."""

    def stages(self, rank: int) -> tuple[int, ...]:
        """Return the stages of a rank, in order."""
        return tuple(stage for stage in range(len(self.layers)) if self.rank(stage) == rank)

    def rank(self, stage: int) -> int:
        """Return the rank that has a stage."""
        turn, place = divmod(stage, self.ranks)
        return self.ranks - 1 - place if self.schedule.is_v and turn % 2 else place

    @property
    def last(self) -> int:
        """The number of the last stage, which makes the loss."""
        return len(self.layers) - 1


@dataclass(frozen=True)
class _Parts:
    """The names of what a backbone is cut into."""

    embedding: str
    layers: str
    ending: tuple[str, ...]
    """What holds weights and is neither: the norm behind the layers."""


class _Elsewhere(nn.Module):
    """Stands for a part that another stage has: passes states on, and has the settings that a backbone may ask for."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.__dict__.update(
            {name: value for name, value in vars(part).items() if isinstance(value, (bool, int, float, str))}
        )

    def forward(self, states: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return the states as they are."""
        return states


def plan_stages(model: PreTrainedModel, schedule: Schedule, ranks: int) -> Plan:
    """Spread a model's layers over a pipeline of so many ranks, so that the costliest stage costs least; ConfigError
    where that cannot be.

    A layer costs what weights it has, and the last stage those of the head besides; an embedding is a lookup and costs
    nothing. The model may be on the meta device.
    """
    layers = _layers(model)
    stages = ranks * schedule.stages_per_rank
    if len(layers) < stages:
        raise ConfigError(
            f"layout.pipeline: {ranks} ranks with {schedule.stages_per_rank} stages each make {stages} stages, and the "
            f"model has {len(layers)} layers; take fewer ranks"
        )
    costs = [_size(layer) for layer in layers]
    costs[-1] += _size(model.get_output_embeddings())
    return Plan(schedule, ranks, tuple(_split(costs, stages)))


def _split(costs: Sequence[int], parts: int) -> list[range]:
    """Cut a row of costs into so many parts that are not empty, the costliest of which costs least."""
    until = [0, *itertools.accumulate(costs)]
    # best[i]: the costliest part, and the cuts, when the first i costs are in as many parts as rounds were made.
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, (0,))] + [(float("inf"), ())] * len(costs)
    for _ in range(parts):
        best = [
            min(
                ((max(best[cut][0], until[end] - until[cut]), (*best[cut][1], end)) for cut in range(end)),
                default=(float("inf"), ()),
            )
            for end in range(len(costs) + 1)
        ]
    return [range(start, stop) for start, stop in itertools.pairwise(best[-1][1])]


def cut(model: PreTrainedModel, plan: Plan, rank: int) -> None:
    """Take from a model, in place, what the rank's stages do not need.

    What stays has the names it had, and they tell which weights the rank has to read. A model whose head shares the
    embedding's weight keeps both on the first and on the last stage. Adapters may be added before or after.
    """
    own = plan.stages(rank)
    _keep(model, {layer for stage in own for layer in plan.layers[stage]}, is_first=0 in own, is_last=plan.last in own)


def stage_of(model: PreTrainedModel, plan: Plan, stage: int) -> PreTrainedModel:
    """Return a model of the same modules in which only those of one stage are left."""
    parts = _parts(model)
    inner = _shallow(backbone(model))
    inner._modules[parts.layers] = nn.ModuleList(_layers(model))
    made: PreTrainedModel = _shallow(model)
    made._modules[model.base_model_prefix] = inner
    _keep(made, plan.layers[stage], is_first=stage == 0, is_last=stage == plan.last)
    return made


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """Return the layers that are here of a model that was cut."""
    return [layer for layer in _layers(model) if not isinstance(layer, _Elsewhere)]


def tied_weight(model: PreTrainedModel) -> nn.Parameter | None:
    """Return the weight that a model's embedding and head share, or None; also where neither of them is here."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return next((weight for weight in embedding.parameters() for other in head.parameters() if weight is other), None)


def check_can_cut(model: PreTrainedModel, plan: Plan, *, is_sharded: bool = False) -> None:
    """Prove of a whole model that its backbone is embedding, layers and norm and nothing else, and that every stage
    has something to train; ConfigError where it is not so.

    Each stage goes through the whole backbone with the other stages' parts left out. Without any, states must come out
    as they went in, and what a layer is told besides must come of the batch alone: a later stage knows no more. No
    weight is looked at, so that the model may be on the meta device.
    """
    parts, calls = _parts(model), _Calls()
    hollow = _shallow(backbone(model))
    layers = [_Listening(layer, f"layer {number}", calls) for number, layer in enumerate(_layers(model))]
    hollow._modules[parts.layers] = nn.ModuleList(layers)
    for name in (parts.embedding, *parts.ending):
        hollow._modules[name] = _Listening(getattr(hollow, name), name, calls)
    _put_on_cpu(hollow)
    told = []
    for seed in range(2):
        calls.clear()
        states = torch.randn(1, 8, model.config.hidden_size, generator=torch.Generator().manual_seed(seed))
        try:
            with torch.no_grad():
                out = hollow(inputs_embeds=states, use_cache=False).last_hidden_state
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise _not_cut(model, f"its backbone does more with its parts than call them ({error})") from error
        if [name for name, *_ in calls] != [*(layer.name for layer in layers), *parts.ending]:
            raise _not_cut(model, "its backbone does not call its layers in turn, and its norm after them")
        if not _equal(out, states):
            raise _not_cut(model, "its backbone changes the states outside of its layers, and every stage would do so")
        told.append(list(calls))
    for one, other in zip(*told, strict=True):
        if not all(map(_equal, one[1:], other[1:])):
            raise _not_cut(model, f"its {one[0]} is told more than states and batch, which is all that a stage has")
    _check_tied(model, plan, is_sharded=is_sharded)
    for stage in range(len(plan.layers)):
        if not any(weight.requires_grad for weight in stage_of(model, plan, stage).parameters()):
            raise ConfigError(
                f"layout.pipeline: tuning leaves nothing to train in stage {stage} (layers {plan.layers[stage]}), and "
                "no gradient would get there; tune some weights of every layer, or leave layout.pipeline out"
            )


def _check_tied(model: PreTrainedModel, plan: Plan, *, is_sharded: bool) -> None:
    weight = tied_weight(model)
    if weight is None:
        return
    if is_sharded and plan.rank(0) == plan.rank(plan.last):
        raise ConfigError(
            "layout.schedule: zero-bubble-v has the first and the last stage on one rank, and FSDP cannot shard the "
            "weight that these share; say zero-bubble"
        )
    if any(_size(end) != weight.numel() for end in (model.get_input_embeddings(), model.get_output_embeddings())):
        raise ConfigError(
            "layout.pipeline: an adapter on an embedding that the head shares would stand on two stages; take "
            "embedding and head out of tuning.targets"
        )


_Calls = list[tuple[str, tuple[Any, ...], tuple[tuple[str, Any], ...]]]
"""The parts that were called, with what besides the states."""


class _Listening(_Elsewhere):
    """Stands for a part and notes what it is called with."""

    def __init__(self, part: nn.Module, name: str, calls: _Calls) -> None:
        super().__init__(part)
        self.name, self.calls = name, calls

    def forward(self, states: Tensor, *arguments: Any, **named: Any) -> Tensor:
        self.calls.append((self.name, arguments, tuple(named.items())))
        return states


def _equal(one: Any, other: Any) -> bool:
    """Compare what a part was called with twice; what parts could pass on to one another in it is never equal."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return not isinstance(one, (dict, list)) and bool(one == other)


def _put_on_cpu(hollow: nn.Module) -> None:
    """Give a backbone without weights copies of its buffers that can be computed with: ones."""
    for name, child in hollow.named_children():
        hollow._modules[name] = copied = _shallow(child)
        _put_on_cpu(copied)
    for name, buffer in hollow._buffers.items():
        hollow._buffers[name] = None if buffer is None else torch.ones_like(buffer, device="cpu")


def _not_cut(model: PreTrainedModel, reason: str) -> ConfigError:
    return ConfigError(
        f"layout.pipeline: {type(model).__name__} cannot be cut into stages: {reason}; leave layout.pipeline out, or "
        "take another architecture, such as a Llama, Qwen or Mistral model"
    )


def _parts(model: PreTrainedModel) -> _Parts:
    children = dict(backbone(model).named_children())
    layers = [name for name, child in children.items() if isinstance(child, nn.ModuleList)]
    embedding = [name for name, child in children.items() if child is model.get_input_embeddings()]
    if len(layers) != 1 or len(embedding) != 1 or _head(model) is None:
        raise _not_cut(model, "its backbone does not show one embedding and one list of layers, or there is no head")
    others = (name for name in children if name not in (*layers, *embedding))
    return _Parts(embedding[0], layers[0], tuple(name for name in others if _ends_backbone(children[name])))


def _ends_backbone(child: nn.Module) -> bool:
    """Whether a part of a backbone that is neither embedding nor layers is the norm behind these: it has weights."""
    return isinstance(child, _Elsewhere) or next(child.parameters(), None) is not None


def _head(model: PreTrainedModel) -> str | None:
    """Return the name of the output head."""
    head = model.get_output_embeddings()
    return next((name for name, child in model.named_children() if child is head), None)


def _layers(model: PreTrainedModel) -> nn.ModuleList:
    layers: nn.ModuleList = getattr(backbone(model), _parts(model).layers)
    return layers


def _size(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _keep(model: PreTrainedModel, layers: Collection[int], *, is_first: bool, is_last: bool) -> None:
    """Put `_Elsewhere` in the place of all but some layers, and of the ends that do not belong to them."""
    parts, inner = _parts(model), backbone(model)
    own = _layers(model)
    for number, layer in enumerate(own):
        if number not in layers:
            own[number] = _Elsewhere(layer)
    tied = tied_weight(model) is not None and (is_first or is_last)
    leaving = [
        *([] if is_first or tied else [(inner, parts.embedding)]),
        *([] if is_last else [(inner, name) for name in parts.ending]),
        *([] if is_last or tied else [(model, str(_head(model)))]),
    ]
    for owner, name in leaving:
        owner._modules[name] = _Elsewhere(getattr(owner, name))


def _shallow(module: Any) -> Any:
    """Return a copy of a module with the same parts, which can be given others."""
    made = copy.copy(module)
    made._modules, made._buffers = dict(module._modules), dict(module._buffers)
    return made
