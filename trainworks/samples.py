"""From a run's sources to its training samples: rows read and checked, prepared, packed, and put in their order."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from trainworks.data.bad_rows import BadRowsError
from trainworks.data.building import build
from trainworks.data.cache import Prepared, code_digest, digest, folder
from trainworks.data.columns import require_columns
from trainworks.data.loading import Samples, lengths
from trainworks.data.mixture import Ingredient, mixed, shares
from trainworks.data.order import Integers, Plan
from trainworks.data.packing import Packs, alone, pack
from trainworks.data.screening import screened, told
from trainworks.data.sources import Rows, read
from trainworks.errors import ConfigError, DataError, nearest
from trainworks.evaluation.harness import measured
from trainworks.metrics import HuggingFaceMetric
from trainworks.reading import Data, Mixture
from trainworks.record import DataFacts, PackingFacts, SplitFacts
from trainworks.schema import Batch, RunConfig
from trainworks.tasks import Processor, Task

if TYPE_CHECKING:
    from datasets import Dataset

    from trainworks.parallel.launch import World

__all__ = [
    "PreparedData",
    "Source",
    "SourceSamples",
    "equipped",
    "plan",
    "prepare_data",
    "prepare_sources",
    "read_rows",
]

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
        if reason := first.task.unlike(other.task):
            raise ConfigError(f"data.sources: {first.name} and {other.name} {reason}")


def _check_metrics(config: Config, sources: Sequence[Source]) -> None:
    """Load the metrics that are asked for, and see that the goal's is among those there are."""
    task = sources[0].task
    held_out = any(source.rows.validation is not None for source in sources)
    if config.metrics and not task.metrics():
        raise ConfigError(f"metrics: task {task.type} makes no predictions that {config.metrics[0]} could measure")
    mend = "name data.validation, or set data.holdout above 0"
    wanted = {"goal": config.goal, "early_stop": config.early_stop}
    for key, each in wanted.items():
        if each is not None and not held_out:
            raise ConfigError(f"{key}: there are no rows to measure it on; {mend}")
    if config.every.evaluate != "end" and not held_out:
        raise ConfigError(f"every.evaluate: there are no rows held out; {mend}")
    if config.early_stop is not None and config.every.evaluate == "end":
        raise ConfigError("early_stop: nothing is evaluated before the end; say every.evaluate: N, in steps")
    known = measured(task, config.metrics)
    for spec in config.metrics:
        _ = HuggingFaceMetric(spec).module
    for key, each in wanted.items():
        if each is not None and each.metric not in known:
            raise ConfigError(
                f"{key}.metric: {each.metric!r} is not measured{nearest(each.metric, known)}; there are "
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


@dataclass(frozen=True)
class SourceSamples:
    """A source, its rows, and its splits as training sequences."""

    source: Source
    splits: dict[str, Prepared]
    tools: str
    """The fingerprint of what turned its rows to samples."""

    def num_rows(self, split: str) -> int:
        """Return how many rows of a split were read, bad ones included."""
        return len(self.source.rows.splits[split]) + sum(self.source.rows.dropped.get(split, {}).values())

    def left_out(self, split: str) -> dict[str, int]:
        """Return what of a split was left out, cut or split on the way to its samples, by reason."""
        return {**self.source.rows.dropped.get(split, {}), **self.splits[split].dropped}


def prepare_sources(config: Config, sources: Sequence[Source], processor: Processor) -> list[SourceSamples]:
    """Turn every source's splits into training sequences; by one process of each machine, kept by content. All
    ranks."""
    tools = sources[0].task.fingerprint(processor)  # before it is used: a tokenizer remembers how it was called
    return [_source_samples(config, source, processor, tools) for source in sources]


def prepare_data(config: Config, sources: Sequence[Source], processor: Processor, world: World) -> PreparedData:
    """Turn the sources into what a run trains and is evaluated on. All ranks."""
    parts = prepare_sources(config, sources, processor)
    world.wait_patiently()
    packs = [_packs(config.batch, part) for part in parts]
    train = _joined(part.splits.get("train") for part in parts)
    assert train is not None, "a source without training rows is refused where it is read"
    return PreparedData(
        train=train,
        packs=Packs.joined(packs),
        counts=tuple(map(len, packs)),
        validation=_joined(part.splits.get("validation") for part in parts),
        facts=_facts({part.source.name: _source_facts(part) for part in parts}),
        ends=tuple(sorted({end for source in sources for end in source.task.ends(processor)})),
    )


def _source_samples(config: Config, source: Source, processor: Processor, tools: str) -> SourceSamples:
    splits = {}
    for name in source.rows.splits:
        prepared = _prepared(config, source, name, processor, tools)
        rows, left_out = told(source.rows, name, prepared.refused)
        source = replace(source, rows=rows)
        splits[name] = replace(prepared, dropped={**prepared.dropped, **left_out})
    return SourceSamples(source, splits, tools)


def _prepared(config: Config, source: Source, split: str, processor: Processor, tools: str) -> Prepared:
    rows, task = source.rows, source.task
    where = f"{rows.source} ({split})"
    software = (version("transformers"), version("tokenizers"), _code(task))
    key = digest(rows.fingerprint, split, task.model_dump_json(), tools, *software)
    prepare: Callable[..., Prepared] = partial(task.prepare, processor=processor)
    lenient, workers = rows.bad_rows != "error", _workers(config, task)
    try:
        prepared = build(key, rows.splits[split], prepare, task.arrange, workers=workers, lenient=lenient, name=where)
    except BadRowsError as error:
        told(rows, split, error.problems)
        raise
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    if not len(prepared.samples):
        counts = Counter(prepared.dropped) + Counter(problem.reason for problem in prepared.refused)
        left_out = ", ".join(f"{reason} {count:,}" for reason, count in counts.items())
        raise DataError(f"{where}: no sample is left to learn from ({left_out or 'the rows hold no tokens'})")
    return prepared


def _workers(config: Config, task: Task) -> int:
    """Return how many processes prepare; a task written in a notebook or script can be found by this one alone."""
    if type(task).__module__ == "__main__":
        return 1
    wanted = config.data.prepare_workers
    return len(os.sched_getaffinity(0)) if wanted == "auto" else wanted


def _packs(batch: Batch, part: SourceSamples) -> Packs:
    train = part.splits["train"].samples
    sizes = lengths(train)
    if batch.pack == "off" or sizes is None:
        return alone(len(train))
    try:
        return pack(sizes, batch.pack)
    except DataError as error:
        raise DataError(f"{part.source.rows.source} (train): {error}") from error


def _joined(parts: Iterable[Prepared | None]) -> Dataset | None:
    """Put the sources' rows one after the other, each with its source's number in the column `source`."""
    from datasets import concatenate_datasets

    numbered = [
        part.samples.add_column("source", np.full(len(part.samples), number, dtype=np.int16))
        for number, part in enumerate(parts)
        if part is not None
    ]
    return concatenate_datasets(numbered) if numbered else None


def _source_facts(part: SourceSamples) -> DataFacts:
    rows = part.source.rows
    return DataFacts(
        source=rows.source,
        subset=rows.subset,
        revision=rows.revision,
        fingerprint=rows.fingerprint,
        processor=part.tools,
        license=rows.license,
        listings=tuple(map(str, rows.listings)),
        cleaning=rows.cleaning,
        splits=tuple(
            SplitFacts(
                name=name,
                rows=part.num_rows(name),
                samples=len(prepared.samples),
                dropped=part.left_out(name),
                **part.source.task.facts(prepared.samples),
            )
            for name, prepared in part.splits.items()
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
    return _PLANS[type(config.data)](config, data, data.samples.lengths())


def _of_one(config: Config, data: PreparedData, sizes: Integers | None) -> Plan:
    total = _total(config, data, None if sizes is None else float(sizes.mean()))
    return Plan(seed=config.seed, num_samples=len(data.packs), per_step=config.batch.per_step, total=total)


def _of_several(config: Config, data: PreparedData, sizes: Integers | None) -> Plan:
    mixture = cast(Mixture, config.data)
    ingredients = _ingredients(mixture, data, sizes)
    # Of tokens shared out, a source's samples are as many as its share over their mean length.
    rate = sum(part.weight / float(part.sizes.mean()) for part in ingredients)
    mean = None if sizes is None else 1 / rate if mixture.shares == "tokens" else float(sizes.mean())
    total = _total(config, data, mean)
    return mixed(ingredients, seed=config.seed, per_step=config.batch.per_step, total=total)


_PLANS: dict[type, Callable[[Config, PreparedData, Integers | None], Plan]] = {Data: _of_one, Mixture: _of_several}


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


def _total(config: Config, data: PreparedData, mean: float | None) -> int:
    """Return the samples the budget pays for; `mean` is the tokens of one, or None where they are not counted."""
    budget = config.budget
    if budget.epochs is not None:
        return max(1, round(budget.epochs * len(data.packs)))
    if budget.steps is not None:
        return budget.steps * config.batch.per_step
    if mean is None or budget.tokens is None:
        raise ConfigError("budget.tokens: this task's samples are not counted in tokens; give epochs or steps")
    return max(1, math.ceil(budget.tokens / mean))
