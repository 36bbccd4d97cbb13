"""Rows that a check refuses: named where they stand in their file, and left out where the run says so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from trainworks.data.bad_rows import BadRow, BadRows, BadRowsError
from trainworks.data.cache import digest, folder
from trainworks.data.columns import fingerprint
from trainworks.data.places import Origin

if TYPE_CHECKING:
    from datasets import Dataset

    from trainworks.data.sources import Rows

__all__ = ["screened", "told"]

T = TypeVar("T")


def screened(rows: Rows, split: str, check: Callable[[Dataset], T]) -> tuple[Rows, T]:
    """Return what `check` says of a split, and the rows without those that it refuses by a BadRowsError.

    The rows of that error are numbers of the split's rows, from 0. A BadRowsError names them where they stand in their
    file: when `data.bad_rows` is `error`, when no row would be left, and when it is no row that was refused.
    """
    while True:
        try:
            return rows, check(rows.splits[split])
        except BadRowsError as error:
            rows = _without(rows, split, error)


def _located(problem: BadRow, origin: Origin) -> BadRow:
    if problem.row is None:
        return problem
    place = origin.at(problem.row)
    return replace(problem, file=place.file, row=place.row, line=place.line)


def told(rows: Rows, split: str, problems: Sequence[BadRow]) -> tuple[Rows, dict[str, int]]:
    """Return the counts of rows that preparation left out, by reason, and the rows with the list of them, where that is
    asked for; they are numbered by the split.

    BadRowsError, over rows of their files, when `data.bad_rows` is `error`.
    """
    if not problems:
        return rows, {}
    listing = _listing(rows, split, "prepared")
    bad = BadRows(rows.bad_rows, listing)
    try:
        bad.extend([_located(problem, rows.origins[split]) for problem in problems])
        bad.finish()
    finally:
        bad.discard()
    return _listed(rows, listing), dict(bad.counts)


def _listing(rows: Rows, split: str, when: str) -> Path:
    return folder() / "quarantine" / f"{digest(rows.fingerprint, split, rows.source, when)[:16]}.jsonl"


def _listed(rows: Rows, listing: Path) -> Rows:
    return replace(rows, listings=(*rows.listings, listing)) if rows.bad_rows == "quarantine" else rows


def _without(rows: Rows, split: str, error: BadRowsError) -> Rows:
    origin, part = rows.origins[split], rows.splits[split]
    refused = {problem.row for problem in error.problems if problem.row is not None}
    found = [_located(problem, origin) for problem in error.problems]
    if not refused:
        raise BadRowsError(found, more=error.more, advice=error.advice) from error
    listing = _listing(rows, split, "read")
    bad = BadRows(rows.bad_rows, listing)
    try:
        bad.extend(found)
        keep = np.setdiff1d(np.arange(len(part)), np.array(sorted(refused)))
        bad.finish()
        if not len(keep):
            bad.raise_first("no row is left without these")
    finally:
        bad.discard()
    splits = rows.splits | {split: part.select(keep)}
    dropped = Counter(rows.dropped.get(split, {})) + bad.counts
    return replace(
        _listed(rows, listing),
        **splits,
        fingerprint=fingerprint(*splits.values()),
        origins={**rows.origins, split: origin.select(keep)},
        dropped={**rows.dropped, split: dict(dropped)},
    )
