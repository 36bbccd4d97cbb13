"""Tables held in memory while they are few; beyond that in Arrow files, mapped into memory."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

__all__ = ["TableStore", "mapped"]

_ROWS = 10_000


class _Part(NamedTuple):
    table: pa.Table
    group: int
    file: Path | None = None


class TableStore:
    """Tables of one or more groups, in the order in which they are added, in memory or in files of `folder`.

    The folder is made once the tables in memory take more than `most_bytes`.
    """

    def __init__(self, folder: Path, most_bytes: float) -> None:
        self.folder = folder
        self._parts: list[_Part] = []
        self._bytes = 0
        self._most_bytes = most_bytes

    @property
    def is_on_disk(self) -> bool:
        """Whether there was more than memory may hold."""
        return any(part.file for part in self._parts)

    def add(self, table: pa.Table, group: int) -> None:
        """Take a table; groups come one after the other."""
        self._parts.append(_Part(table, group))
        self._bytes += table.nbytes
        if self._bytes > self._most_bytes:
            self._to_disk()

    def tables(self, group: int) -> list[pa.Table]:
        """Return a group's tables, in their order."""
        return [part.table for part in self._parts if part.group == group]

    def finish(self, schema: pa.Schema) -> pa.Table | None:
        """Give all tables the columns and types of `schema`; return them as one table, or None when they are in files.

        The files are then named in the order of their rows.
        """
        if not self.is_on_disk:
            return pa.concat_tables([_fitted(part.table, schema) for part in self._parts])
        self._to_disk()
        for part in self._parts:
            if part.file is not None and not part.table.schema.equals(schema):
                parts = (pa.Table.from_batches([batch]) for batch in part.table.to_batches(_ROWS))
                self._write((_fitted(part, schema) for part in parts), schema, part.file.with_suffix(".new"))
                part.file.with_suffix(".new").replace(part.file)
        return None

    def _to_disk(self) -> None:
        parts = [part for part in self._parts if part.file is not None]
        loose = self._parts[len(parts) :]
        for (group, schema), alike in groupby(loose, key=lambda part: (part.group, part.table.schema)):
            file = self.folder / f"{len(parts):06}.arrow"
            self._write((part.table for part in alike), schema, file)
            parts.append(_Part(mapped(file), group, file))
        self._parts, self._bytes = parts, 0

    def _write(self, tables: Iterable[pa.Table], schema: pa.Schema, file: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for table in tables:
                writer.write_table(table, max_chunksize=_ROWS)


def mapped(file: Path) -> pa.Table:
    """Return the table of an Arrow stream without reading it."""
    return pa.ipc.open_stream(pa.memory_map(str(file))).read_all()


def _fitted(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return the table with the columns and types of a schema that can hold it; nulls where it has no such column."""
    if table.schema.equals(schema):
        return table
    for index, field in enumerate(table.schema):
        wanted = schema.field(field.name)
        if pa.types.is_string(field.type) and pa.types.is_primitive(wanted.type):
            table = table.set_column(index, wanted, pc.cast(table.column(index), wanted.type))
    return pa.concat_tables([schema.empty_table(), table], promote_options="permissive")
