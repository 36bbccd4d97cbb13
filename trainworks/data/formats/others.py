"""Plain text, one document a file; Parquet and Arrow files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from trainworks.data.bad_rows import BadRow, BadRows, BadRowsError, excerpt
from trainworks.data.columns import holds_bytes
from trainworks.data.formats.base import Chunk
from trainworks.data.formats.lines import whole_text
from trainworks.data.nesting import DEEPEST, is_deep_schema

__all__ = ["arrow_rows", "parquet_rows", "text_rows"]

_DOCUMENT_BYTES = 2**30
_BATCH = 10_000
_WIDE_BATCH = 200
"""Rows that are read together; fewer where they hold bytes."""


def text_rows(path: Path, bad: BadRows) -> Iterator[Chunk]:
    """Yield a file of plain text as one row, its document; nothing for one of white space."""
    mend = "cut it into documents: several files, or the rows of a .jsonl file with a column `text`"
    try:
        text = whole_text(path, most=_DOCUMENT_BYTES, mend=mend).replace("\r\n", "\n")
    except BadRowsError as error:
        bad.extend([replace(problem, row=0) for problem in error.problems])
        return
    if text.strip():
        yield Chunk(pa.table({"text": pa.array([text], pa.string())}), np.array([0]), np.array([1]))


def parquet_rows(path: Path, bad: BadRows) -> Iterator[Chunk]:
    """Yield the rows of a Parquet file, some thousands at a time."""
    from pyarrow import parquet

    with parquet.ParquetFile(path, memory_map=True) as file:
        size = _WIDE_BATCH if holds_bytes(file.schema_arrow) else _BATCH
        yield from _checked((pa.Table.from_batches([batch]) for batch in file.iter_batches(size)), path, bad)


def arrow_rows(path: Path, bad: BadRows) -> Iterator[Chunk]:
    """Yield the rows of an Arrow stream or file, mapped into memory."""
    file = pa.memory_map(str(path))
    try:
        table = pa.ipc.open_stream(file).read_all()
    except pa.ArrowInvalid:
        table = pa.ipc.open_file(file).read_all()
    yield from _checked((pa.Table.from_batches([batch]) for batch in table.to_batches()), path, bad)


def _checked(tables: Iterable[pa.Table], path: Path, bad: BadRows) -> Iterator[Chunk]:
    """Yield the tables without the rows whose text is not text."""
    start = 0
    for table in filter(len, tables):
        _check_layout(table, path)
        rows = start + np.arange(len(table))
        start += len(table)
        if wrong := _wrong(table):
            bad.extend([replace(wrong[place], file=str(path), row=int(rows[place])) for place in sorted(wrong)])
            keep = np.setdiff1d(np.arange(len(table)), list(wrong))
            table, rows = table.take(keep), rows[keep]
        if len(table):
            yield Chunk(table, rows)


def _check_layout(table: pa.Table, path: Path) -> None:
    """Refuse columns that no row can be read of: deep ones, two of a name, and those whose bytes lead elsewhere."""
    twice = [name for name, times in Counter(table.column_names).items() if times > 1]
    if twice:
        mend = "give each column a name of its own"
        raise BadRowsError([BadRow("column named twice", mend, excerpt(", ".join(twice)), file=str(path))])
    if is_deep_schema(table.schema):
        detail = f"over {DEEPEST} levels of lists and objects in a column"
        raise BadRowsError([BadRow("nested too deep", "write what is deeper as text", detail, file=str(path))])
    for cells in table.columns:
        for part in cells.chunks:
            plain = part.storage if isinstance(part, pa.ExtensionArray) else part
            plain.view(_as_bytes(plain.type)).validate(full=True)


def _as_bytes(kind: pa.DataType) -> pa.DataType:
    """Return the type with bytes in place of text, which is looked at row by row."""
    if pa.types.is_string(kind):
        return pa.binary()
    if pa.types.is_large_string(kind):
        return pa.large_binary()
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_as_bytes(field.type)) for field in kind])
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        item = kind.value_field.with_type(_as_bytes(kind.value_type))
        return pa.list_(item) if pa.types.is_list(kind) else pa.large_list(item)
    return kind


def _wrong(table: pa.Table) -> dict[int, BadRow]:
    """Return, by row, the first text in a table of one batch that is not text, however deep it lies."""
    wrong: dict[int, BadRow] = {}
    for name, cells in zip(table.column_names, table.columns, strict=True):
        for texts, rows in _texts(pa.concat_arrays(cells.chunks), np.arange(len(table))):
            raw = pc.cast(texts, pa.large_binary())
            if pc.any(pc.match_substring(raw, b"\0")).as_py() or not _is_valid(texts):
                for place, problem in _wrong_cells(raw, name):
                    wrong.setdefault(int(rows[place]), problem)
    return wrong


def _texts(cells: pa.Array, rows: NDArray[np.int64]) -> Iterator[tuple[pa.Array, NDArray[np.int64]]]:
    """Yield the arrays of text in a column, those inside lists and objects, too, and the row of each text."""
    if pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type):
        yield cells, rows
    elif pa.types.is_list(cells.type) or pa.types.is_large_list(cells.type):
        yield from _texts(pc.list_flatten(cells), rows[pc.list_parent_indices(cells).to_numpy()])
    elif pa.types.is_struct(cells.type):
        for inner in cells.flatten():
            yield from _texts(inner, rows)


def _is_valid(cells: Any) -> bool:
    try:
        cells.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _wrong_cells(cells: Any, column: str) -> Iterator[tuple[int, BadRow]]:
    for place, cell in enumerate(cells.to_pylist()):
        text = (cell or b"").decode(errors="backslashreplace")
        try:
            at = (cell or b"").decode().find("\0")
        except UnicodeDecodeError as error:
            detail = f"byte {error.start} of the cell is 0x{error.object[error.start]:02x}"
            yield (
                place,
                BadRow("not UTF-8", "write the file again with text in UTF-8", detail, excerpt(text), column=column),
            )
        else:
            if at >= 0:
                yield place, BadRow("NUL character", "remove such characters", excerpt=excerpt(text, at), column=column)
