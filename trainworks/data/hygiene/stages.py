"""The stages of a cleaning in their order, and the jobs that each is made of.

A job works on one shard, on one band of keys, or once for all rows, and leaves one file. A stage's last job gives a
verdict on every row. What a stage works on are the rows that the one before let stay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trainworks.data.hygiene.contamination import Index, contaminated
from trainworks.data.hygiene.exact import first_of_each, text_digests
from trainworks.data.hygiene.language import languages
from trainworks.data.hygiene.length import count_words
from trainworks.data.hygiene.near import Bands, are_near, band_keys, candidates, clusters, shingle_sets
from trainworks.data.hygiene.pii import KINDS, count_personal_data
from trainworks.data.hygiene.words import Ragged
from trainworks.data.hygiene.workspace import GONE, STAYS, Workspace, write_arrays, write_table

__all__ = ["INDEX", "Job", "Phase", "Stage", "chosen", "kept_rows", "output", "perform", "phases", "verdicts"]

INDEX = "index"
"""The job name under which the index of evaluation items is kept."""

Arrays = Mapping[str, NDArray[Any]]
Codes = NDArray[np.uint8]


@dataclass(frozen=True)
class Job:
    """Work that leaves one file for each rank: shards, bands, or one."""

    name: str
    per: Literal["shard", "band", "run"]
    make: Callable[[Workspace, int], Arrays]

    def ranks(self, space: Workspace) -> int:
        """Return how many there are of it."""
        bands = Bands.at(space.settings.near.threshold).number if space.settings.near else 0
        return {"shard": len(space.sizes), "band": bands, "run": 1}[self.per]


@dataclass(frozen=True)
class Stage:
    """A stage: its name is its key in `data.clean`, its last job gives the verdicts, `reasons` say what they mean."""

    name: str
    jobs: tuple[Job, ...]
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Phase:
    """Jobs that one process can do one after the other for a rank; a phase begins when the one before has ended."""

    jobs: tuple[str, ...]
    ranks: int

    @property
    def name(self) -> str:
        """The jobs' names, joined."""
        return "+".join(self.jobs)


# A stage's part on one shard


def _alive(space: Workspace, stage: str, shard: int) -> NDArray[np.int64]:
    """Return the places in a shard of the rows that reach a stage."""
    before = [other.name for other in chosen(space)]
    before = before[: before.index(stage)] if stage in before else before
    if not before:
        return np.arange(space.sizes[shard])
    return np.flatnonzero(verdicts(space, before[-1], shard) == STAYS)


def verdicts(space: Workspace, stage: str, shard: int) -> Codes:
    """Return a stage's verdict on each row of a shard."""
    job = _STAGES[stage].jobs[-1]
    if job.per == "run":
        whole: Codes = space.arrays(job.name, 0)["verdicts"]
        return whole[space.starts[shard] : space.starts[shard + 1]]
    part: Codes = space.arrays(job.name, shard)["verdicts"]
    return part


def _judge(
    space: Workspace, stage: str, shard: int, judge: Callable[[list[str]], tuple[Codes, Mapping[str, int]]]
) -> Arrays:
    """Return the verdicts of a stage that looks at each text by itself, and what it counted."""
    places = _alive(space, stage, shard)
    codes, found = judge(space.texts(shard, places))
    result = np.full(space.sizes[shard], GONE, np.uint8)
    result[places] = codes
    return {"verdicts": result, **_counted(found)}


def _counted(found: Mapping[str, int]) -> Arrays:
    names = sorted(name for name, count in found.items() if count)
    return {"found": np.array(names, np.str_), "counts": np.array([found[name] for name in names], np.int64)}


def _length(space: Workspace, shard: int) -> Arrays:
    wanted = space.settings.length
    assert wanted is not None

    def judge(texts: list[str]) -> tuple[Codes, Mapping[str, int]]:
        counts = count_words(texts)
        longest = np.iinfo(np.int64).max if wanted.max_words is None else wanted.max_words
        codes = np.select([counts < wanted.min_words, counts > longest], [1, 2], STAYS)
        return codes.astype(np.uint8), {"words": int(counts.sum())}

    return _judge(space, "length", shard, judge)


def _language(space: Workspace, shard: int) -> Arrays:
    wanted = space.settings.language
    assert wanted is not None

    def judge(texts: list[str]) -> tuple[Codes, Mapping[str, int]]:
        told = languages(texts)
        codes = [1 if code not in wanted.keep else 2 if score < wanted.min_score else STAYS for code, score in told]
        return np.array(codes, np.uint8), Counter(f"texts in {code}" for code, _ in told)

    return _judge(space, "language", shard, judge)


def _decontaminate(space: Workspace, shard: int) -> Arrays:
    held = space.arrays(INDEX, 0)
    index = Index(held["hashes"], held["items"], held["places"], held["needed"], int(held["num_short"]))

    def judge(texts: list[str]) -> tuple[Codes, Mapping[str, int]]:
        items = contaminated(texts, index)
        sets = held["sets"][items[items >= 0]]
        codes = np.where(items >= 0, 1, STAYS).astype(np.uint8)
        return codes, Counter(f"texts with items of {held['names'][number]}" for number in sets.tolist())

    return _judge(space, "decontaminate", shard, judge)


def _pii(space: Workspace, shard: int) -> Arrays:
    def judge(texts: list[str]) -> tuple[Codes, Mapping[str, int]]:
        counts = count_personal_data(texts)
        found = {
            f"texts with {kind}": int(number) for kind, number in zip(KINDS, (counts > 0).sum(axis=0), strict=True)
        }
        return np.full(len(texts), STAYS, np.uint8), found

    return _judge(space, "pii", shard, judge)


# Duplicates: rows compared across shards


def _digests(space: Workspace, shard: int) -> Arrays:
    places = _alive(space, "exact", shard)
    return {"rows": places + space.starts[shard], "digests": text_digests(space.texts(shard, places))}


def _exact(space: Workspace, _: int) -> Arrays:
    parts = [space.arrays("exact-digests", shard) for shard in range(len(space.sizes))]
    first = first_of_each(np.concatenate([part["digests"] for part in parts]))
    return _outcome(space, np.concatenate([part["rows"] for part in parts]), ~first)


def _outcome(space: Workspace, rows: NDArray[np.int64], removed: NDArray[np.bool_]) -> Arrays:
    """Return the verdicts on all rows, of which `rows` reached the stage."""
    result = np.full(space.starts[-1], GONE, np.uint8)
    result[rows] = removed
    return {"verdicts": result, **_counted({})}


def _near_keys(space: Workspace, shard: int) -> Arrays:
    wanted = space.settings.near
    assert wanted is not None
    places = _alive(space, "near", shard)
    keys, filled = band_keys(space.texts(shard, places), Bands.at(wanted.threshold), ngram=wanted.ngram)
    bands = {f"band-{number}": band[filled] for number, band in enumerate(keys)}
    return {"rows": places + space.starts[shard], "filled": filled, **bands}


def _near_candidates(space: Workspace, band: int) -> Arrays:
    rows, keys = [np.empty(0, np.int64)], [np.empty(0, np.uint64)]
    for shard in range(len(space.sizes)):
        with np.load(space.path("near-keys", shard)) as held:  # reads the arrays that are named, not all bands
            rows.append(held["rows"][held["filled"]])
            keys.append(held[f"band-{band}"])
    return {"pairs": candidates(np.concatenate(keys), np.concatenate(rows))}


def _near_pairs(space: Workspace, shard: int) -> Arrays:
    """Verify the pairs whose later row stands in this shard."""
    wanted = space.settings.near
    assert wanted is not None
    pairs = [np.empty((0, 2), np.int64)]
    for band in range(Bands.at(wanted.threshold).number):
        found = space.arrays("near-candidates", band)["pairs"]
        here = (found[:, 1] >= space.starts[shard]) & (found[:, 1] < space.starts[shard + 1])
        pairs.append(found[here])
    distinct = np.unique(np.concatenate(pairs), axis=0)
    rows = np.unique(distinct)
    sets = _sets(space, rows, wanted.ngram)
    return {"pairs": distinct[are_near(sets, np.searchsorted(rows, distinct), wanted.threshold)]}


def _sets(space: Workspace, rows: NDArray[np.int64], ngram: int) -> Ragged:
    """Return the shingles of rows from any shards; `rows` ascend."""
    shards = np.searchsorted(space.starts, rows, side="right") - 1
    parts = [
        shingle_sets(space.texts(shard, rows[shards == shard] - space.starts[shard]), ngram=ngram)
        for shard in np.unique(shards).tolist()
    ]
    counts = np.concatenate([[0], *(part.counts for part in parts)])
    return Ragged(np.concatenate([np.empty(0, np.uint64), *(part.hashes for part in parts)]), np.cumsum(counts))


def _near(space: Workspace, _: int) -> Arrays:
    shards = range(len(space.sizes))
    rows = np.concatenate([space.arrays("near-keys", shard)["rows"] for shard in shards])
    pairs = np.concatenate([space.arrays("near-pairs", shard)["pairs"] for shard in shards])
    concerned = np.unique(pairs)
    roots = clusters(np.searchsorted(concerned, pairs), len(concerned))
    later = concerned[roots != np.arange(len(concerned))]
    return _outcome(space, rows, np.isin(rows, later))


_ALL = (
    Stage("length", (Job("length", "shard", _length),), ("too short", "too long")),
    Stage("language", (Job("language", "shard", _language),), ("another language", "language not sure")),
    Stage(
        "exact",
        (Job("exact-digests", "shard", _digests), Job("exact", "run", _exact)),
        ("same text as a row before",),
    ),
    Stage(
        "near",
        (
            Job("near-keys", "shard", _near_keys),
            Job("near-candidates", "band", _near_candidates),
            Job("near-pairs", "shard", _near_pairs),
            Job("near", "run", _near),
        ),
        ("nearly the same text as a row before",),
    ),
    Stage("decontaminate", (Job("decontaminate", "shard", _decontaminate),), ("holds an evaluation item",)),
    Stage("pii", (Job("pii", "shard", _pii),)),
)
_STAGES = {stage.name: stage for stage in _ALL}
_JOBS = {job.name: job for stage in _ALL for job in stage.jobs}
_WRITE = "rows"


def chosen(space: Workspace) -> list[Stage]:
    """Return the stages that the settings ask for, in their order."""
    return [stage for stage in _ALL if getattr(space.settings, stage.name)]


def phases(space: Workspace) -> Iterator[Phase]:
    """Yield what is to be done, in order: neighbouring jobs on the same shards together."""
    jobs = [(job.name, job.per, job.ranks(space)) for stage in chosen(space) for job in stage.jobs]
    jobs.append((_WRITE, "shard", len(space.sizes)))
    for (_, ranks), group in groupby(jobs, key=lambda job: job[1:]):
        yield Phase(tuple(name for name, *_ in group), ranks)


def kept_rows(space: Workspace) -> NDArray[np.int64]:
    """Return the numbers of the rows that stay, over all shards."""
    parts = [space.starts[shard] + _alive(space, _WRITE, shard) for shard in range(len(space.sizes))]
    return np.concatenate(parts)


def output(space: Workspace, job: str, rank: int) -> Path:
    """Return the file a job leaves."""
    return space.kept(rank) if job == _WRITE else space.path(job, rank)


def perform(space: Workspace, job: str, rank: int) -> None:
    """Do a job for one rank, unless its file is there."""
    path = output(space, job, rank)
    if path.exists():
        return
    if job == _WRITE:
        write_table(path, space.rows(rank).take(_alive(space, _WRITE, rank)))
    else:
        write_arrays(path, _JOBS[job].make(space, rank))
