"""Forward and backward through a pipeline: the ranks of a group each hold some of a model's layers, and a step's
micro-batches go through all of them, several at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from trainworks.heads import Head
from trainworks.parallel.sharding import options
from trainworks.parallel.stages import SCHEDULES, Plan, cut, layers_of, plan_stages, stage_of, tied_weight

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work
    from transformers import PreTrainedModel

    from trainworks.data.loading import Batch
    from trainworks.parallel.launch import World
    from trainworks.run import Step
    from trainworks.tasks import Task

__all__ = ["Pipeline", "Stage", "pipelined"]


@dataclass
class _Work:
    """What a rank's stages go through: every stage sees the batches, and only states travel between them."""

    batches: Sequence[Batch]
    whole: Mapping[str, Tensor]
    """What each of the last stage's sums is divided by; nothing where no gradient is wanted."""
    message: int
    """Rows of states in each message; those behind a batch's own tokens are padding."""
    sums: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """Of each batch, by its place; on the rank of the last stage."""


class Stage(nn.Module):
    """One stage of a pipeline: states in, and states out or, at last, the loss. Nothing calls its model past it.

    Its parameters are those of the rank's model.
    """

    def __init__(
        self, model: PreTrainedModel, task: Task, *, is_first: bool, is_last: bool, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.dtype = dtype
        self.is_first = is_first
        self.is_last = is_last
        self.work = _Work((), {}, 0)
        self._turn = 0
        self.around: Callable[[], AbstractContextManager[Any]] = nullcontext
        """Entered around each forward pass, such as autocast."""

    def begin(self, work: _Work) -> None:
        """Lay batches before the stage, whose forward then takes one after the other."""
        self.work, self._turn = work, 0

    def shard(self, **options: Any) -> None:
        """Spread its weights over the ranks of a mesh by FSDP2, layer by layer. All ranks of the mesh.

        `options` are those of `fully_shard`, save `reshard_after_forward`. Weights are gathered once a step, not for
        every micro-batch, and so is their gradient exchanged: torch's schedules see to that where the stage is
        sharded, not its layers alone.
        """
        for part in (*layers_of(self.model), self):
            # Zero-bubble schedules (torch 2.13) lose gradients, in silence, of weights that were given back meanwhile.
            fully_shard(part, **options | {"reshard_after_forward": False})

    def forward(self, message: Tensor) -> Tensor:
        """Return the states [message, width] of the next batch behind this stage, or its share of the loss [1]; what a
        first stage is sent is not looked at.

        All schedules go through batches in their order. A number that comes as a tensor FSDP would lay on the device,
        and reading it there would wait for all that the device has to do.
        """
        turn, self._turn = self._turn, self._turn + 1
        batch = self.work.batches[turn]
        lines, width = batch["input_ids"].shape
        given = None if self.is_first else message[: lines * width].unflatten(0, (lines, width))
        with self.around():
            states = self.task.hidden(self.model, batch, given)
            if not self.is_last:
                # A copy even where there is nothing to pad: torch 2.13 detaches what was sent, which no view allows.
                padding = (0, 0, 0, self.work.message - lines * width)
                return nn.functional.pad(states.flatten(0, 1).to(self.dtype), padding)
            terms = self.task.loss_from(states, Head(self.model), batch)
        self.work.sums[turn] = {name: term.detach() for name, term in terms.items()}
        shares = [(terms[name] * batch["weight"]).sum() / count for name, count in self.work.whole.items()]
        return torch.stack(shares).sum(0, keepdim=True) if shares else states.new_zeros(1)


class Pipeline(nn.Module):
    """A rank's stages, and how batches go through them and the other ranks'; it stands where a `Step` does.

    All ranks of the group make one alike, of a model that was `cut` by the same plan, and call it alike, with the same
    batches: what travels are states alone.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        task: Task,
        plan: Plan,
        group: ProcessGroup,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        averaged: int = 1,
    ) -> None:
        """Make the rank's stages, and the weight that the first and the last one share equal.

        `dtype` is that of the states between stages, `averaged` the number of ranks with samples of their own over
        which gradients are averaged when they meet.
        """
        super().__init__()
        self.model, self.task = model, task
        self._plan, self._group = plan, group
        self._device, self._dtype, self._averaged = device, dtype, averaged
        self._rank = distributed.get_rank(group)
        self._own = plan.stages(self._rank)
        self.stages = [
            Stage(stage_of(model, plan, own), task, is_first=own == 0, is_last=own == plan.last, dtype=dtype)
            for own in self._own
        ]
        self.parts = nn.ModuleList(self.stages)
        self._schedule: Any = None
        self._takes = (0, 0)
        # NCCL wants all ranks of a group in its first exchange, and the next may be one of two.
        distributed.all_reduce(torch.zeros(1, device=device), group=group)
        if (weight := self._shared()) is not None and self._is_last:
            weight.data.copy_(self._partners(weight.data))
        elif weight is not None:
            self._partners(weight.data)

    @property
    def _is_last(self) -> bool:
        return self._plan.last in self._own

    @property
    def repeated(self) -> frozenset[str]:
        """The names of this rank's weights that are to be counted and saved by another rank, which has them, too."""
        weight = self._shared() if self._is_last else None
        return frozenset(name for name, own in self.model.named_parameters() if own is weight)

    def _shared(self) -> nn.Parameter | None:
        """Return the weight of this rank's that another one has, too, or None."""
        return None if 0 in self._own and self._is_last else tied_weight(self.model)

    def _partners(self, tensor: Tensor) -> Tensor:
        """Return what the first rank has on the last one, and the other way round. Both."""
        partner = self._plan.rank(0 if self._is_last else self._plan.last)
        local = tensor.to(self._device).contiguous()
        other = torch.empty_like(local)
        exchange = [
            distributed.P2POp(distributed.isend, local, group=self._group, group_peer=partner),
            distributed.P2POp(distributed.irecv, other, group=self._group, group_peer=partner),
        ]
        for part in distributed.batch_isend_irecv(exchange):
            part.wait()
        return other.to(tensor.device)

    def forward(self, given: Any, *, ask: Literal["loss", "predict", "show"] = "loss") -> Any:
        """Return the loss sums of a batch. There are no predictions and no worked examples: they are made a token at a
        time, by a whole model."""
        if ask == "loss":
            return self.losses([given])[0]
        return {} if ask == "predict" else ()

    def backward(self, batches: Sequence[Batch], whole: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """Add the gradient of an optimizer step's micro-batches to the weights, and return each one's sums, [rows] by
        name, on every rank. All ranks.

        The step's loss is, over names, all sums times their rows' weights, over the step's count in `whole`. Where the
        schedule wants more micro-batches, the last one is gone through again with weight 0.
        """
        filler = batches[-1] | {"weight": torch.zeros_like(batches[-1]["weight"])}
        number = self._plan.schedule.filled(len(batches), self._plan.ranks)
        every = [*batches, *[filler] * (number - len(batches))]
        work = self._begin(every, {name: count / self._averaged for name, count in whole.items()})
        places = torch.arange(number, device=self._device)
        schedule = self._schedule_for(number, work.message)
        schedule.step(*([places] if 0 in self._own else []), target=places, return_outputs=False)
        if (weight := self._shared()) is not None and weight.grad is not None:
            gradient = weight.grad.to_local() if isinstance(weight.grad, DTensor) else weight.grad
            gradient += self._partners(gradient)
        return self._told(work)[: len(batches)]

    @torch.no_grad()
    def losses(self, batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
        """Return each batch's sums, [rows] by name, on every rank, without a gradient. All ranks.

        Several batches at a time keep several ranks busy.
        """
        work = self._begin(batches, {})
        sent: list[tuple[Work | None, Tensor]] = []
        here: list[Tensor] = []
        for own, stage in zip(self._own, self.stages, strict=True):
            goes_to = None if stage.is_last else self._plan.rank(own + 1)
            arriving, here = self._arriving(own, here), []
            for message in arriving:
                states = stage(message)
                if goes_to == self._rank:
                    here.append(states)
                elif goes_to is not None:
                    sent.append((distributed.isend(states, group=self._group, group_dst=goes_to), states))
        for receipt, _ in sent:
            if receipt is not None:
                receipt.wait()
        for part in (part for stage in self.stages for part in stage.modules()):
            if isinstance(part, FSDPModule):
                part.reshard()  # a root (torch 2.13) does so in a backward pass alone
        return self._told(work)

    def _arriving(self, own: int, here: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield what a stage is sent for each batch; all is asked for at once, or ranks would wait for one another."""
        work = self.stages[0].work
        if own == 0:
            return iter([torch.empty(0)] * len(work.batches))
        source = self._plan.rank(own - 1)
        if source == self._rank:
            return iter(here)
        messages = [self._message(work.message, device=self._device) for _ in work.batches]
        asked = [distributed.irecv(message, group=self._group, group_src=source) for message in messages]

        def arrived() -> Iterator[Tensor]:
            for message, receipt in zip(messages, asked, strict=True):
                if receipt is not None:
                    receipt.wait()
                yield message

        return arrived()

    def _begin(self, batches: Sequence[Batch], whole: Mapping[str, Tensor]) -> _Work:
        """Lay batches before this rank's stages."""
        work = _Work(batches, whole, max(batch["input_ids"].numel() for batch in batches))
        for stage in self.stages:
            stage.begin(work)
        return work

    def _told(self, work: _Work) -> list[dict[str, Tensor]]:
        """Return each batch's sums, which the last stage has, on every rank."""
        names = list(self.task.count(work.batches[0]))
        sizes = [len(batch["weight"]) for batch in work.batches for _ in names]
        joined = torch.empty(sum(sizes), dtype=torch.promote_types(self._dtype, torch.float32), device=self._device)
        if self._is_last:
            torch.cat([work.sums[place][name] for place in range(len(work.batches)) for name in names], out=joined)
        distributed.broadcast(joined, group=self._group, group_src=self._plan.rank(self._plan.last))
        parts = iter(joined.split(sizes))
        return [{name: next(parts) for name in names} for _ in work.batches]

    def _message(self, rows: int, *, device: torch.device, grad: bool = False) -> Tensor:
        width = self.model.config.hidden_size
        return torch.empty(rows, width, dtype=self._dtype, device=device, requires_grad=grad)

    def _schedule_for(self, number: int, message: int) -> Any:
        """Return a schedule for so many micro-batches whose messages are long enough; a longer one also serves."""
        if self._takes[0] != number or self._takes[1] < message:
            self._takes = (number, message)
            self._schedule = self._build(number, message)
        self.stages[0].work.message = self._takes[1]
        return self._schedule

    def _build(self, number: int, message: int) -> Any:
        from torch.distributed.pipelining import PipelineStage
        from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

        meta = torch.device("meta")
        states = self._message(message, device=meta, grad=True)
        place, loss = torch.empty(1, dtype=torch.int64, device=meta), states.new_empty(1, requires_grad=True)
        stages = [
            PipelineStage(
                stage,
                own,
                len(self._plan.layers),
                self._device,
                input_args=place if stage.is_first else states,
                output_args=loss if stage.is_last else states,
                group=self._group,
            )
            for own, stage in zip(self._own, self.stages, strict=True)
        ]
        kind = get_schedule_class(self._plan.schedule.name_for(number, self._plan.ranks))
        given = stages[0] if issubclass(kind, PipelineScheduleSingle) else stages
        return kind(given, number, loss_fn=_loss, scale_grads=False)


def _loss(shares: Tensor, place: Tensor) -> Tensor:
    return shares.sum()


def pipelined(step: Step, world: World) -> Pipeline:
    """Return what stands for a step on this rank of a pipeline: its model is cut in place, and sharded over the ranks
    that have the same stages. All ranks."""
    assert world.mesh is not None
    plan = plan_stages(step.model, SCHEDULES[world.layout.schedule], world.layout.pipeline)
    cut(step.model, plan, world.stage)
    step.to(world.device)
    rounds = world.accelerator.mixed_precision == "bf16"
    pipeline = Pipeline(
        step.model,
        step.task,
        plan,
        world.mesh["pipeline"].get_group(),
        device=world.device,
        dtype=torch.bfloat16 if rounds else step.model.dtype,
        averaged=world.averaged,
    )
    for stage in pipeline.stages:
        stage.shard(**options(world))
    return pipeline
