"""The steps from a configuration to a `Run` that pretraining and fine-tuning share."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from trainworks import models, optim, tuning
from trainworks.annotation import annotate
from trainworks.averages import Averages
from trainworks.bad_steps import Watch
from trainworks.config import resolved
from trainworks.data.cache import digest
from trainworks.data.order import mix
from trainworks.environment import command, environment
from trainworks.errors import ConfigError, LaunchError
from trainworks.output import check_folder
from trainworks.parallel import context, tensor
from trainworks.parallel.launch import World, start
from trainworks.parallel.stages import SCHEDULES, check_can_cut, plan_stages
from trainworks.record import ModelFacts, RunRecord
from trainworks.run import Progress, Run, Step
from trainworks.samples import PreparedData, plan
from trainworks.schema import Batch, Pretrained, RunConfig
from trainworks.speed.compiling import can_compile, compile_layers
from trainworks.speed.working_weights import WorkingWeights
from trainworks.tasks import Processor, Task
from trainworks.tracking import check_trackers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["assemble", "begin", "check_model"]

Config = RunConfig[Any]


def begin(config: Config) -> World:
    """Join the other processes, and see that the output folder is free, or holds this very run, and that the model can
    be had. All ranks."""
    if config.batch.pack != "off" and not config.task.can_pack:
        raise ConfigError(f"batch.pack: task {config.task.type} has no use for packed rows; leave it out")
    if config.layout.pipeline > 1:
        _check_pipeline(config)
    tuning.check(config.tuning, config.model)
    optim.check(config.optim, config.model)
    check_folder(config)
    models.check(config.model)
    check_trackers(config.trackers)
    return start(
        wish=config.layout,
        seed=config.seed,
        deterministic=config.deterministic,
        trackers=config.trackers,
        output=Path(config.output),
        timeout=config.faults.rank_timeout,
    )


def check_model(config: Config, task: Task, processor: Processor, world: World) -> None:
    """Build the model without its weights, and tune that, so that what does not fit is known before they load."""
    outline = models.outline(config.model, task.auto_class, task.head(), processor)
    task.suits(outline, processor)
    optim.layer_ratios(config.optim, outline)
    if world.layout.context > 1:
        context.check(outline.config, world.layout.context * world.layout.tensor, task)
    new = models.new_ids(config.model, processor)
    tuning.rehearse(config.tuning, outline, auto_class=task.auto_class, new_tokens=new)
    if world.layout.tensor > 1:
        tensor.check(outline, world.layout)
    if config.layout.pipeline > 1:
        plan = plan_stages(outline, SCHEDULES[config.layout.schedule], config.layout.pipeline)
        check_can_cut(outline, plan, is_sharded=True)


def _check_pipeline(config: Config) -> None:
    """Refuse what a pipeline cannot do, before anything is read."""
    if why := config.task.whole_because():
        raise ConfigError(f"layout.pipeline: task {config.task.type}: {why}; leave it out")
    if config.metrics:
        raise ConfigError(
            f"metrics: {', '.join(config.metrics)} looks at predictions, and a pipeline makes none; measure the "
            "exported model, or leave layout.pipeline out"
        )
    if config.speed.compile == "on" and SCHEDULES[config.layout.schedule].splits_backward:
        raise ConfigError(
            f"speed.compile: layout.schedule: {config.layout.schedule} makes gradients in two halves, which compiled "
            "layers do not know; take another schedule, or leave speed.compile out"
        )


def assemble(
    config: Config,
    kind: Literal["pretrain", "finetune"],
    *,
    task: Task,
    world: World,
    processor: Processor,
    model: PreTrainedModel,
    data: PreparedData,
) -> Run:
    """Wrap the model for its devices, build optimizer and plan, and open the record. All ranks."""
    _check_sharding(config, world)
    task.adapt(model, processor)
    task = task.fitted(model)
    task.verify(model)
    packing = data.packing(config.batch)
    if packing is not None:
        task.verify_packing(model, processor)
    longest, logits = task.footprint(data.samples, processor, model)
    if world.context is not None:
        model.to(world.device)  # type: ignore[arg-type]  # where the ranks exchange what is compared
        context.verify(model, world.context)
        context.spread(model, world.context)
    origin = models.fingerprint(config.model, model, seed=config.seed)
    weights = digest(origin, models.head_fingerprint(model)) if task.annotates else origin
    new = models.new_ids(config.model, processor)
    tuned = tuning.tune(config.tuning, model, auto_class=task.auto_class, new_tokens=new)
    task.settle(model)
    facts = _model_facts(config, model, origin)
    if _compiles(config, world):
        compile_layers(model, each_shape=world.layout.tensor > 1)
    rounded = None if world.rounding is None else WorkingWeights(model, world.rounding)
    step = world.wrap(Step(model, task, processor, rounded=rounded))
    # Alike on all ranks until here, so that new weights are; from here on each rank drops out in its own places.
    torch.manual_seed(int(mix(config.seed, world.share)) % 2**63)
    micro = _micro(config.batch, world, longest, logits)
    order = plan(config, data)
    accumulates = world.averaged > 1 or order.per_step > micro
    record = RunRecord(
        kind=kind,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command(kind),
        config=resolved(config),
        task=task.type,
        pipeline_tag=task.pipeline_tag,
        data=data.facts,
        model=facts,
        environment=environment(world),
        per_step=order.per_step,
        micro=micro,
        packing=packing,
        steps_total=order.num_steps,
        notes=(*_notes(config), *task.notes(data.facts), *_pipeline_notes(world)),
    )
    run = Run(
        config=config,
        task=task,
        world=world,
        step=step,
        tuned=tuned,
        processor=processor,
        optimizer=optim.build_optimizer(
            config.optim,
            step,
            rounded,
            accumulates=accumulates,
            lr_ratios=_lr_ratios(config, model),
            hidden=optim.hidden_matrices(model),
            seed=config.seed,
        ),
        watch=Watch(config.faults, world.device),
        train=data.train,
        packs=data.packs,
        ends=data.ends,
        validation=data.validation,
        plan=order,
        micro=micro,
        record=record,
        progress=Progress(order=digest(data.facts.fingerprint, data.facts.processor, order.identity)),
    )
    if config.optim.average is not None:
        run.averages = Averages(config.optim.average.decay)
        run.averages.follow(run.optimizer)
    world.follow(lambda: run.progress.step)
    annotate(run, weights)
    return run


def _pipeline_notes(world: World) -> tuple[str, ...]:
    return ("A pipeline does not generate: no worked examples are shown.",) if world.layout.pipeline > 1 else ()


def _compiles(config: Config, world: World) -> bool:
    if config.speed.compile == "auto":
        in_halves = world.layout.pipeline > 1 and SCHEDULES[world.layout.schedule].splits_backward
        return can_compile(world.device) and not config.deterministic and not in_halves
    return config.speed.compile == "on"


_AUTO_TOKENS = {"cpu": 8_192, "cuda": 32_768}
_AUTO_LOGITS = 2**29
"""Most logits a device holds at once: about 16 bytes each, with their copies and gradients, so 8 GiB."""


def _micro(batch: Batch, world: World, longest: int, logits: int) -> int:
    """Return the micro-batch: as asked, or what keeps the longest samples, and their logits, within fixed bounds."""
    share = math.ceil(batch.per_step / world.ranks)
    if isinstance(batch.micro, int):
        return min(batch.micro, share)
    tokens = min(_AUTO_TOKENS.get(world.device.type, 8_192), _AUTO_LOGITS // logits) * world.layout.context
    return max(1, min(share, tokens // longest))


def _lr_ratios(config: Config, model: PreTrainedModel) -> dict[Tensor, float]:
    by_layer = optim.layer_ratios(config.optim, model)
    return {
        weight: tuning.lr_ratio(config.tuning, name) * by_layer.get(name, 1.0)
        for name, weight in model.named_parameters()
    }


def _check_sharding(config: Config, world: World) -> None:
    if tuning.quantised(config.model) and world.accelerator.is_fsdp2:
        raise LaunchError(
            "model.quantise: weights in a few bits are not sharded by this version; take configs/accelerate/ddp.yaml "
            "or one_gpu.yaml"
        )


def _notes(config: Config) -> tuple[str, ...]:
    """Return what a reader of the card must know of the model beforehand."""
    if not isinstance(config.model, Pretrained) or config.model.quantise is None:
        return ()
    beside = f"Trained beside a base model whose linear layers were rounded to {config.model.quantise.bits} bits."
    merged = "The merged weights are these rounded values, in full precision, with the update added in."
    return (beside, merged) if getattr(config.tuning, "merge", False) else (beside,)


def _model_facts(config: Config, model: PreTrainedModel, origin: str) -> ModelFacts:
    return ModelFacts(
        name=getattr(config.model, "name", None),
        revision=models.revision_of(model),
        fingerprint=origin,
        architecture=type(model).__name__,
        num_parameters=model.num_parameters(),  # which knows how many are in a byte
        num_trainable=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        tuning=config.tuning.type,
        dtype=str(model.dtype).removeprefix("torch."),
    )
