"""From a run's sources to its training samples: rows read and checked, prepared, packed, and put in their order."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from trainworks.data.bad_rows import BadRowsError
from trainworks.data.building import build
from trainworks.data.cache import Prepared, code_digest, digest, folder
from trainworks.data.columns import require_columns
from trainworks.data.loading import Samples, lengths
from trainworks.data.mixture import Ingredient, mixed, shares
from trainworks.data.order import Integers, Plan
from trainworks.data.packing import Packs, alone, pack
from trainworks.data.screening import located, screened
from trainworks.data.sources import Rows, read
from trainworks.errors import ConfigError, DataError, nearest
from trainworks.evaluation.harness import measured
from trainworks.metrics import HuggingFaceMetric
from trainworks.record import DataFacts, PackingFacts, SplitFacts
from trainworks.schema import Batch, Mixture, RunConfig
from trainworks.tasks import Processor, Task

if TYPE_CHECKING:
    from datasets import Dataset

    from trainworks.parallel.launch import World

__all__ = ["PreparedData", "Source", "equipped", "plan", "prepare_data", "prepared_splits", "read_rows"]

Config = RunConfig[Any]


@dataclass(frozen=True)
class Source:
    """One of the run's sources: its rows, and the task with what they alone could tell filled in."""

    name: str
    rows: Rows
    task: Task


def read_rows(config: Config) -> tuple[Source, ...]:
    """Read the sources; columns, labels, metrics and goal are checked before anything is loaded. All ranks."""
    sources = tuple(_source(config, name, reading) for name, reading in config.data.readings().items())
    _check_alike(sources)
    _check_metrics(config, sources)
    return sources


def _source(config: Config, name: str, reading: Any) -> Source:
    rows = read(reading, seed=config.seed)
    task: Task
    rows, task = screened(rows, "train", config.task.resolve)
    for split in rows.splits:
        check = partial(require_columns, wanted=task.columns(), source=rows.source)
        rows, _ = screened(rows, split, check)
        rows = _flawless(rows, split, task)
    return Source(name, rows, task)


def _flawless(rows: Rows, split: str, task: Task) -> Rows:
    """Return the rows without those that the task finds something wrong with; a split in which it found nothing once
    is not looked through again."""
    key = digest("flawless", rows.fingerprint, split, task.model_dump_json(), _code(task))
    mark = folder() / "checked" / key
    if mark.exists():
        return rows

    def check(part: Dataset) -> None:
        if problems := list(task.flaws(part)):
            raise BadRowsError(problems)

    checked, _ = screened(rows, split, check)
    if checked is rows:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    return checked


def _code(task: Task) -> str:
    return code_digest(*(kind for kind in type(task).__mro__ if issubclass(kind, Task)))


def _check_alike(sources: Sequence[Source]) -> None:
    """See that the sources ask for one and the same model."""
    first, *others = sources
    for other in others:
        if other.task.head() != first.task.head():
            raise ConfigError(
                f"data.sources: {first.name} and {other.name} have different classes; name them all in task.labels"
            )


def _check_metrics(config: Config, sources: Sequence[Source]) -> None:
    """Load the metrics that are asked for, and see that the goal's is among those there are."""
    task = sources[0].task
    held_out = any(source.rows.validation is not None for source in sources)
    if config.metrics and not task.metrics():
        raise ConfigError(f"metrics: task {task.type} makes no predictions that {config.metrics[0]} could measure")
    mend = "name data.validation, or set data.holdout above 0"
    if config.goal is not None and not held_out:
        raise ConfigError(f"goal: there are no rows to measure it on; {mend}")
    if config.every.evaluate != "end" and not held_out:
        raise ConfigError(f"every.evaluate: there are no rows held out; {mend}")
    known = measured(task, config.metrics)
    for spec in config.metrics:
        _ = HuggingFaceMetric(spec).module
    if config.goal is not None and config.goal.metric not in known:
        raise ConfigError(
            f"goal.metric: {config.goal.metric!r} is not measured{nearest(config.goal.metric, known)}; there are "
            f"{', '.join(known)}"
        )


def equipped(sources: Sequence[Source], processor: Processor) -> Processor:
    """Return the processor made ready for the task of every source; ConfigError when it cannot serve one."""
    for source in sources:
        processor = source.task.equip(processor)
    return processor


@dataclass(frozen=True)
class PreparedData:
    """Both splits as prepared rows, each with the number of its source, and what the record says of them."""

    train: Dataset
    packs: Packs
    """Which rows of `train` make one sample."""
    counts: tuple[int, ...]
    """How many samples each source makes; they stand one source after the other."""
    validation: Dataset | None
    facts: DataFacts
    ends: tuple[int, ...]
    """The tokens that end an answer, of whichever source."""

    @property
    def samples(self) -> Samples:
        """What is trained on."""
        return Samples(self.train, self.packs)

    def packing(self, batch: Batch) -> PackingFacts | None:
        """Return what packing came to, or None where rows are not packed."""
        sizes = self.samples.lengths()
        if batch.pack == "off" or sizes is None:
            return None
        full = float(sizes.sum()) / (batch.pack * len(sizes))
        return PackingFacts(size=batch.pack, rows=len(self.train), samples=len(sizes), utilisation=full)


def prepare_data(config: Config, sources: Sequence[Source], processor: Processor, world: World) -> PreparedData:
    """Turn every source's splits into training sequences; by one process of each machine, kept by content. All
    ranks."""
    tools = sources[0].task.fingerprint(processor)  # before it is used: a tokenizer remembers how it was called
    parts = [prepared_splits(config, source, processor, tools) for source in sources]
    world.wait_patiently()
    packs = [_packs(config.batch, part["train"].samples, source) for part, source in zip(parts, sources, strict=True)]
    train = _joined(part["train"].samples for part in parts)
    assert train is not None, "a source without training rows is refused where it is read"
    return PreparedData(
        train=train,
        packs=Packs.joined(packs),
        counts=tuple(map(len, packs)),
        validation=_joined(part["validation"].samples if "validation" in part else None for part in parts),
        facts=_facts(
            {source.name: _source_facts(source, part, tools) for source, part in zip(sources, parts, strict=True)}
        ),
        ends=tuple(sorted({end for source in sources for end in source.task.ends(processor)})),
    )


def prepared_splits(config: Config, source: Source, processor: Processor, tools: str) -> dict[str, Prepared]:
    """Return a source's splits as training sequences, kept by content; `tools` is the processor's fingerprint, taken
    before it was used."""
    splits = {"train": source.rows.train, "validation": source.rows.validation}
    return {
        name: _prepared(config, source, name, rows, processor, tools)
        for name, rows in splits.items()
        if rows is not None
    }


def _prepared(config: Config, source: Source, split: str, rows: Dataset, processor: Processor, tools: str) -> Prepared:
    task, where = source.task, f"{source.rows.source} ({split})"
    software = (version("transformers"), version("tokenizers"), _code(task))
    key = digest(source.rows.fingerprint, split, task.model_dump_json(), tools, *software)
    prepare: Callable[..., Prepared] = partial(task.prepare, processor=processor)
    try:
        prepared = build(key, rows, prepare, task.arrange, workers=_workers(config, task), name=where)
    except BadRowsError as error:
        raise located(error, source.rows.origins[split]) from error
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    if not len(prepared.samples):
        left_out = ", ".join(f"{reason} {count:,}" for reason, count in prepared.dropped.items())
        raise DataError(f"{where}: no sample is left to learn from ({left_out or 'the rows hold no tokens'})")
    return prepared


def _workers(config: Config, task: Task) -> int:
    """Return how many processes prepare; a task written in a notebook or script can be found by this one alone."""
    if type(task).__module__ == "__main__":
        return 1
    wanted = config.data.prepare_workers
    return len(os.sched_getaffinity(0)) if wanted == "auto" else wanted


def _packs(batch: Batch, train: Dataset, source: Source) -> Packs:
    sizes = lengths(train)
    if batch.pack == "off" or sizes is None:
        return alone(len(train))
    try:
        return pack(sizes, batch.pack)
    except DataError as error:
        raise DataError(f"{source.rows.source} (train): {error}") from error


def _joined(parts: Iterable[Dataset | None]) -> Dataset | None:
    """Put the sources' rows one after the other, each with its source's number in the column `source`."""
    from datasets import concatenate_datasets

    numbered = [
        rows.add_column("source", np.full(len(rows), number, dtype=np.int16))
        for number, rows in enumerate(parts)
        if rows is not None
    ]
    return concatenate_datasets(numbered) if numbered else None


def _source_facts(source: Source, parts: dict[str, Prepared], tools: str) -> DataFacts:
    rows = source.rows
    counts = {"train": rows.train, "validation": rows.validation}
    return DataFacts(
        source=rows.source,
        subset=rows.subset,
        revision=rows.revision,
        fingerprint=rows.fingerprint,
        processor=tools,
        license=rows.license,
        listings=tuple(map(str, rows.listings)),
        cleaning=rows.cleaning,
        splits=tuple(
            SplitFacts(
                name=name,
                rows=len(counts[name] or ()) + sum(rows.dropped.get(name, {}).values()),
                samples=len(part.samples),
                dropped={**rows.dropped.get(name, {}), **part.dropped},
                **source.task.facts(part.samples),
            )
            for name, part in parts.items()
        ),
    )


def _facts(parts: dict[str, DataFacts]) -> DataFacts:
    """Return what the record says of the only source, or of all together."""
    first, *others = parts.values()
    if not others:
        return first
    names = dict.fromkeys(split.name for part in parts.values() for split in part.splits)
    named = {name: [same for part in parts.values() for same in part.splits if same.name == name] for name in names}
    return DataFacts(
        source=" + ".join(parts),
        fingerprint=digest(*(part.fingerprint for part in parts.values())),
        processor=first.processor,
        listings=tuple(listing for part in parts.values() for listing in part.listings),
        splits=tuple(_added(name, splits) for name, splits in named.items()),
        parts=parts,
    )


def _added(name: str, splits: Sequence[SplitFacts]) -> SplitFacts:
    dropped: Counter[str] = Counter()
    labels: Counter[str] = Counter()
    for split in splits:
        dropped.update(split.dropped)
        labels.update(split.labels)
    whole = {key: sum(getattr(split, key) for split in splits) for key in ("rows", "samples", "tokens", "counted")}
    return SplitFacts(name=name, dropped=dict(dropped), labels=dict(labels), **whole)


def plan(config: Config, data: PreparedData) -> Plan:
    """Return which samples every step takes: of one source in a permuted order, of several by their shares.

    ConfigError when tokens are asked for and the samples have none, or the sources may not be passed over often enough.
    """
    sizes = data.samples.lengths()
    if isinstance(config.data, Mixture):
        ingredients = _ingredients(config.data, data, sizes)
        rate = sum(part.weight / float(part.sizes.mean()) for part in ingredients)
        mean = 1 / rate if config.data.shares == "tokens" else None
        total = _total(config, data, sizes, mean)
        return mixed(ingredients, seed=config.seed, per_step=config.batch.per_step, total=total)
    total = _total(config, data, sizes)
    return Plan(seed=config.seed, num_samples=len(data.packs), per_step=config.batch.per_step, total=total)


def _ingredients(mixture: Mixture, data: PreparedData, sizes: Integers | None) -> list[Ingredient]:
    """Return each source with what its samples weigh: their tokens, or how many rows they are made of."""
    if mixture.shares == "tokens" and sizes is None:
        raise ConfigError("data.shares: this task's samples are not counted in tokens; say rows")
    weights = sizes if mixture.shares == "tokens" and sizes is not None else np.diff(data.packs.offsets)
    own = np.split(weights, np.cumsum(data.counts)[:-1])
    wanted = [part.weight for part in mixture.sources.values()]
    given = shares([float(part.sum()) for part in own], wanted, temperature=mixture.temperature)
    return [
        Ingredient(name, part, share, math.inf if source.epochs == "any" else source.epochs)
        for (name, source), part, share in zip(mixture.sources.items(), own, given, strict=True)
    ]


def _total(config: Config, data: PreparedData, sizes: Integers | None, mean: float | None = None) -> int:
    """Return the samples the budget pays for; `mean` is the tokens of a sample, where not all are equally likely."""
    budget = config.budget
    if budget.epochs is not None:
        return max(1, round(budget.epochs * len(data.packs)))
    if budget.steps is not None:
        return budget.steps * config.batch.per_step
    if sizes is None or budget.tokens is None:
        raise ConfigError("budget.tokens: this task's samples are not counted in tokens; give epochs or steps")
    return max(1, math.ceil(budget.tokens / (mean or float(sizes.mean()))))
