"""What a format is, and what it yields: some thousand rows at a time, with the place of each in its file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from trainworks.data.bad_rows import BadRows

__all__ = ["ARROW_ERRORS", "Chunk", "Format", "unified"]

ARROW_ERRORS = (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError)
"""What Arrow raises for values that do not go together, or with no type."""


class Chunk(NamedTuple):
    """Some rows of a file, and where they stand in it."""

    table: pa.Table
    rows: NDArray[np.int64]
    """The row of the file that each is, from 0, bad ones counted."""
    lines: NDArray[np.int64] | None = None
    """The line in which each begins, from 1; None in files that have no lines."""
    files: Sequence[str] = ()
    """The file of each, where what is read is a folder; none where all stand in the one that is read."""


def unified(tables: Sequence[pa.Table | pa.Schema]) -> pa.Schema:
    """Return the columns of all the tables with types that hold the values of all; an Arrow error where none does."""
    schemas = dict.fromkeys(table.schema if isinstance(table, pa.Table) else table for table in tables)
    return pa.unify_schemas(list(schemas), promote_options="permissive")


@dataclass(frozen=True)
class Format:
    """How files of one ending are read."""

    chunks: Callable[[Path, BadRows], Iterator[Chunk]]
    """Yield the rows of a file; bad ones go to the BadRows. BadRowsError where reading cannot go on."""
    compressible: bool = True
    """Whether `.gz` or `.zst` may follow the ending."""
    schema: Callable[[Sequence[pa.Table]], pa.Schema] = unified
    """Choose the types of a whole file from all its tables."""
