"""Where rows came from: the file, row and line of each, though bad rows, blank lines and long cells stand between."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Origin", "Place", "Places", "runs"]

Numbers = NDArray[np.int64]


class Place(NamedTuple):
    """Where one row stands: in which file, as which of its rows (from 0), from which line (from 1) if it has lines."""

    file: str
    row: int
    line: int | None


@dataclass(frozen=True, eq=False)
class Places:
    """The places of the rows of a table that was read from files."""

    files: tuple[str, ...]
    starts: Numbers
    """Runs of rows that follow one another in a file, line by line, [runs, 4]: the first row in the table, its file's
    index, its row and its line there (0 for none)."""

    def at(self, row: int) -> Place:
        """Return the place of a row of the table."""
        run = int(np.searchsorted(self.starts[:, 0], row, side="right")) - 1
        first, file, number, line = (int(value) for value in self.starts[run])
        return Place(self.files[file], number + row - first, line + row - first if line else None)


def runs(first: int, file: int, rows: Numbers, lines: Numbers | None) -> Numbers:
    """Return the runs, [runs, 4] as in `Places`, of rows that stand in the table from `first` on.

    >>> runs(5, 0, np.array([0, 1, 3]), np.array([1, 2, 4])).tolist()
    [[5, 0, 0, 1], [7, 0, 3, 4]]
    """
    at = np.zeros_like(rows) if lines is None else lines
    breaks = np.diff(rows) != 1
    if lines is not None:
        breaks |= np.diff(lines) != 1
    begin = np.concatenate([[0], np.flatnonzero(breaks) + 1])
    return np.stack([first + begin, np.full(len(begin), file), rows[begin], at[begin]], axis=1)


@dataclass(frozen=True, eq=False)
class Origin:
    """Where the rows of a split come from, though some were held out, left out or taken in another order."""

    source: str
    """The source's name, for rows that are in no file."""
    places: Places | None = None
    """The places of the rows that were read."""
    numbers: Numbers | None = None
    """Which of the rows that were read each is; None where they stand as they were read."""

    def select(self, indices: Numbers) -> Origin:
        """Return the origin of rows that are selected by their numbers."""
        return replace(self, numbers=indices if self.numbers is None else self.numbers[indices])

    def at(self, row: int) -> Place:
        """Return the place of a row of the split."""
        number = row if self.numbers is None else int(self.numbers[row])
        return Place(self.source, number, None) if self.places is None else self.places.at(number)
