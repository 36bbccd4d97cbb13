"""CSV and TSV: the first line names the columns, each cell is text, and a column is numbers where all its cells are."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainworks.data.bad_rows import BadRow, BadRows, BadRowsError, excerpt
from trainworks.data.formats.base import Chunk
from trainworks.data.formats.lines import LONGEST, blocks, lines

__all__ = ["narrowest", "separated"]

_BATCH_ROWS = 10_000
_BATCH_BYTES = 16 * 2**20
_QUOTES = "a cell with quotes stands in quotes, each one inside doubled"


def separated(delimiter: str) -> Callable[[Path, BadRows], Iterator[Chunk]]:
    """Return a reader of files whose cells the delimiter parts."""

    def chunks(path: Path, bad: BadRows) -> Iterator[Chunk]:
        limit = csv.field_size_limit(LONGEST)  # a cell may be a whole document
        try:
            yield from _Records(path, delimiter, bad).chunks()
        finally:
            csv.field_size_limit(limit)

    return chunks


class _Records:
    """The rows of one file. A record may take several lines, and a line that cannot be used spoils its record."""

    problem: BadRow | None
    """What is wrong with the lines of the record that is being read."""

    def __init__(self, path: Path, delimiter: str, bad: BadRows) -> None:
        self.path, self.bad = path, bad
        self.problem = None
        self.first = ""
        self.size = 0
        self.row = -1
        self.reader = csv.reader(self._texts(), delimiter=delimiter, strict=True)

    def _texts(self) -> Iterator[str]:
        for block in blocks(self.path):
            for line in lines(block, self.path):
                self.problem = self.problem or line.problem
                self.first = self.first or line.text
                self.size += len(line.text)
                yield line.text if not block.too_long else "\n"

    def chunks(self) -> Iterator[Chunk]:
        names = self._names()
        places: list[tuple[int, int]] = []
        rows: list[list[str | None]] = []
        for line, cells in self._records(len(names)):
            places.append((self.row, line))
            rows.append([cell or None for cell in cells])
            if len(rows) == _BATCH_ROWS or self.size > _BATCH_BYTES:
                yield _chunk(names, rows, places)
                rows, places, self.size = [], [], 0
        if rows:
            yield _chunk(names, rows, places)
        if self.row < 0:
            self._refuse(
                "no rows", f"only a header: {excerpt(', '.join(names))}", "leave the file out, or write it again"
            )

    def _records(self, width: int) -> Iterator[tuple[int, list[str]]]:
        """Yield the good records, each with the line it begins in."""
        while True:
            problem: BadRow | None = None
            line = self._begin()
            try:
                cells = next(self.reader)
            except StopIteration:
                return
            except csv.Error as error:
                cells, problem = [], self.problem or self._unquoted(str(error), line)
            else:
                problem = self.problem or self._ragged(cells, width, line)
            if problem is not None:
                self.row += 1
                self.bad.add(replace(problem, row=self.row))
            elif cells:
                self.row += 1
                yield line, cells

    def _begin(self) -> int:
        """Forget the last record; return the line in which the next one begins."""
        self.problem, self.first = None, ""
        return int(self.reader.line_num) + 1

    def _ragged(self, cells: Sequence[str], width: int, line: int) -> BadRow | None:
        if len(cells) in (0, width):
            return None
        detail = f"{len(cells)} cells, but the header names {width}"
        mend = "give the row a cell for each column; a cell with a separator or line end in it stands in quotes"
        return BadRow("ragged row", mend, detail, excerpt(self.first), str(self.path), line)

    def _unquoted(self, error: str, line: int) -> BadRow:
        """Return what is wrong with the quotes; raise it where everything after it has been swallowed."""
        problem = BadRow("broken quotes", _QUOTES, excerpt(error), excerpt(self.first), str(self.path), line)
        if "unexpected end" in error or "field larger" in error:
            mend = f"a quote opened in this row is never closed; {_QUOTES}"
            raise BadRowsError([replace(problem, mend=mend, row=self.row + 1)])
        return problem

    def _names(self) -> list[str]:
        try:
            cells = next(self.reader, [])
        except csv.Error as error:
            self._refuse("broken quotes", excerpt(str(error)), _QUOTES)
        if self.problem is not None:
            raise BadRowsError([self.problem])
        names = [cell.strip() or f"column_{number}" for number, cell in enumerate(cells, start=1)]
        if all(re.fullmatch(_FLOAT, cell) for cell in cells):
            self._refuse(
                "no header", f"found {excerpt(', '.join(cells)) or 'nothing'}", "the first line must name the columns"
            )
        if len(set(names)) < len(names):
            self._refuse("column named twice", excerpt(", ".join(names)), "give each column a name of its own")
        return names

    def _refuse(self, reason: str, detail: str, mend: str) -> NoReturn:
        raise BadRowsError([BadRow(reason, mend, detail, file=str(self.path), line=1)]) from None


def _chunk(names: Sequence[str], rows: Sequence[Sequence[str | None]], places: Sequence[tuple[int, int]]) -> Chunk:
    columns = zip(*rows, strict=True)
    table = pa.table({name: pa.array(cells, pa.string()) for name, cells in zip(names, columns, strict=True)})
    numbers = np.array(places, np.int64)
    return Chunk(table, numbers[:, 0], numbers[:, 1])


# What would not come back as it was written (007, or more digits than a float holds) stays text.
_INTEGER = r"^-?(0|[1-9]\d{0,17})$"
_FLOAT = r"^(-?(0|[1-9]\d{0,14})(\.\d+)?([eE][-+]?\d+)?)?$"


def narrowest(tables: Sequence[pa.Table]) -> pa.Schema:
    """Return the narrowest type that all cells of a column have: whole numbers, numbers, else text."""
    return pa.schema([(name, _narrowest([table.column(name) for table in tables])) for name in tables[0].column_names])


def _narrowest(parts: Sequence[Any]) -> pa.DataType:
    if all(cells.null_count == len(cells) for cells in parts):
        return pa.string()
    for pattern, kind in ((_INTEGER, pa.int64()), (_FLOAT, pa.float64())):
        if all(pc.all(pc.match_substring_regex(cells, pattern)).as_py() is not False for cells in parts):
            return kind
    return pa.string()
