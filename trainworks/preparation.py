"""The steps from a configuration to a `Run` that pretraining and fine-tuning share."""

from __future__ import annotations

import math
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from trainworks import models, tuning
from trainworks.config import resolved
from trainworks.data.cache import Prepared, cached, digest
from trainworks.data.columns import require_columns
from trainworks.data.loading import lengths
from trainworks.data.order import Plan, mix
from trainworks.data.sources import Rows, read
from trainworks.errors import ConfigError, DataError, nearest
from trainworks.evaluation.harness import measured
from trainworks.metrics import HuggingFaceMetric
from trainworks.optim import build_optimizer
from trainworks.output import check_folder
from trainworks.parallel.launch import World, start
from trainworks.record import DataFacts, Environment, ModelFacts, RunRecord, SplitFacts
from trainworks.run import Run, Step
from trainworks.schema import Batch, Budget, RunConfig
from trainworks.tasks import Processor, Task
from trainworks.tracking import check_trackers

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

__all__ = ["PreparedData", "assemble", "begin", "check_model", "prepare_data", "read_rows"]

Config = RunConfig[Any]


def begin(config: Config) -> World:
    """Join the other processes, and see that the output folder is free, or holds this very run, and that the model can
    be had. All ranks."""
    tuning.check(config.tuning)
    check_folder(config)
    models.check(config.model)
    check_trackers(config.trackers)
    return start(
        seed=config.seed,
        deterministic=config.deterministic,
        trackers=config.trackers,
        folder=str(Path(config.output) / "trackers"),
    )


def read_rows(config: Config) -> tuple[Rows, Task]:
    """Read the source and return it with the task it resolves; columns, metrics and goal are checked before anything is
    loaded."""
    rows = read(config.data, seed=config.seed)
    task: Task = config.task.resolve(rows.train)
    for part in (rows.train, rows.validation):
        if part is not None:
            require_columns(part, task.columns(), source=rows.source)
    _check_metrics(config, rows, task)
    return rows, task


def _check_metrics(config: Config, rows: Rows, task: Task) -> None:
    """Load the metrics that are asked for, and see that the goal's is among those there are."""
    if config.metrics and not task.metrics():
        raise ConfigError(f"metrics: task {task.type} makes no predictions that {config.metrics[0]} could measure")
    if config.goal is not None and rows.validation is None:
        raise ConfigError("goal: there are no rows to measure it on; name data.validation, or set data.holdout above 0")
    if config.every.evaluate != "end" and rows.validation is None:
        raise ConfigError(
            "every.evaluate: there are no rows held out; name data.validation, or set data.holdout above 0"
        )
    known = measured(task, config.metrics)
    for spec in config.metrics:
        _ = HuggingFaceMetric(spec).module
    if config.goal is not None and config.goal.metric not in known:
        raise ConfigError(
            f"goal.metric: {config.goal.metric!r} is not measured{nearest(config.goal.metric, known)}; there are "
            f"{', '.join(known)}"
        )


def check_model(config: Config, task: Task, processor: Processor) -> None:
    """Build the model without its weights, and tune that, so that what does not fit is known before they load."""
    outline = models.outline(config.model, task.auto_class, task.head(), processor)
    tuning.rehearse(config.tuning, outline, auto_class=task.auto_class)


@dataclass(frozen=True)
class PreparedData:
    """Both splits as training sequences, and what the record says of them."""

    train: Dataset
    validation: Dataset | None
    facts: DataFacts


def prepare_data(rows: Rows, task: Task, processor: Processor, world: World) -> PreparedData:
    """Turn both splits into training sequences; once per machine, kept by content. All ranks."""
    splits = {"train": rows.train} | ({} if rows.validation is None else {"validation": rows.validation})
    tools = task.fingerprint(processor)  # before it is used: a tokenizer remembers how it was called
    with world.first_on_node():
        parts = {name: _prepared(part, name, rows, task, processor, tools) for name, part in splits.items()}
    facts = DataFacts(
        source=rows.source,
        subset=rows.subset,
        revision=rows.revision,
        fingerprint=rows.fingerprint,
        license=rows.license,
        splits=tuple(
            SplitFacts(
                name=name,
                rows=len(splits[name]),
                samples=len(part.samples),
                dropped=part.dropped,
                **task.facts(part.samples),
            )
            for name, part in parts.items()
        ),
    )
    return PreparedData(parts["train"].samples, parts["validation"].samples if "validation" in parts else None, facts)


def _prepared(part: Dataset, name: str, rows: Rows, task: Task, processor: Processor, tools: str) -> Prepared:
    software = (version("trainworks"), version("transformers"), version("tokenizers"))
    key = digest(rows.fingerprint, name, task.model_dump_json(), tools, *software)
    try:
        return cached(key, lambda: task.prepare(part, processor))
    except DataError as error:
        raise DataError(f"{rows.source} ({name}): {error}") from error


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
    task.verify(model)
    tuned = tuning.tune(config.tuning, model, auto_class=task.auto_class)
    facts = _model_facts(config, model)
    step = world.wrap(Step(model, task, processor))
    # Alike on all ranks until here, so that new weights are; from here on each rank drops out in its own places.
    torch.manual_seed(int(mix(config.seed, world.rank)) % 2**63)
    micro = _micro(config.batch, data.train, world, models.vocabulary(model))
    plan = _plan(config, data.train)
    record = RunRecord(
        kind=kind,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        command=_command(kind),
        config=resolved(config),
        task=task.type,
        pipeline_tag=task.pipeline_tag,
        data=data.facts,
        model=facts,
        environment=_environment(world),
        per_step=plan.per_step,
        micro=micro,
        steps_total=plan.num_steps,
    )
    return Run(
        config=config,
        task=task,
        world=world,
        step=step,
        tuned=tuned,
        processor=processor,
        optimizer=build_optimizer(config.optim, step),
        train=data.train,
        validation=data.validation,
        plan=plan,
        micro=micro,
        record=record,
    )


def _plan(config: Config, train: Dataset) -> Plan:
    return Plan(
        seed=config.seed,
        num_samples=len(train),
        per_step=config.batch.per_step,
        total=_total(config.budget, config.batch, train),
    )


def _total(budget: Budget, batch: Batch, train: Dataset) -> int:
    """Return the samples the budget pays for."""
    if budget.epochs is not None:
        return max(1, round(budget.epochs * len(train)))
    if budget.steps is not None:
        return budget.steps * batch.per_step
    sizes = lengths(train)
    if sizes is None or budget.tokens is None:
        raise ConfigError("budget.tokens: this task's samples are not counted in tokens; give epochs or steps")
    return max(1, math.ceil(budget.tokens / float(sizes.mean())))


_AUTO_TOKENS = {"cpu": 8_192, "cuda": 32_768}
_AUTO_LOGITS = 2**29
"""Most logits a device holds at once: about 16 bytes each, with their copies and gradients, so 8 GiB."""


def _micro(batch: Batch, train: Dataset, world: World, vocabulary: int) -> int:
    """Return the micro-batch: as asked, or what keeps the longest rows, and their logits, within fixed bounds."""
    share = math.ceil(batch.per_step / world.ranks)
    if isinstance(batch.micro, int):
        return min(batch.micro, share)
    sizes = lengths(train)
    longest = 1 if sizes is None else int(sizes.max())
    tokens = min(_AUTO_TOKENS.get(world.device.type, 8_192), _AUTO_LOGITS // vocabulary)
    return max(1, min(share, tokens // longest))


def _model_facts(config: Config, model: PreTrainedModel) -> ModelFacts:
    return ModelFacts(
        name=getattr(config.model, "name", None),
        revision=models.revision_of(model),
        architecture=type(model).__name__,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_trainable=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        tuning=config.tuning.type,
        dtype=str(model.dtype).removeprefix("torch."),
    )


def _command(kind: str) -> str:
    """Return what was typed, or the call a notebook makes."""
    if Path(sys.argv[0]).parts[-2:] == (kind, "__main__.py"):
        return shlex.join(["accelerate", "launch", "-m", kind, *sys.argv[1:]])
    return f"{kind}.fit({kind}.prepare(config))"


_PACKAGES = ("trainworks", "torch", "transformers", "accelerate", "peft", "datasets", "tokenizers")


def _environment(world: World) -> Environment:
    commit = _git("rev-parse", "HEAD")
    return Environment(
        python=platform.python_version(),
        platform=platform.platform(),
        versions={name: version(name) for name in _PACKAGES},
        device=torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else _processor_name(),
        world_size=world.accelerator.num_processes,
        distributed=world.accelerator.distributed_type.value,
        mixed_precision=world.accelerator.mixed_precision,
        git_commit=commit,
        git_dirty=None if commit is None else bool(_git("status", "--porcelain")),
    )


def _processor_name() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return f"{names[0]} ({len(names)} cores)" if names else platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
