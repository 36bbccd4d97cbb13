"""Local files to one Dataset: JSON, CSV, TSV, Parquet, Arrow and plain text, each mistake at its line."""

from __future__ import annotations

import codecs
import csv
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from trainworks.data.columns import fingerprint
from trainworks.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["READERS", "read_files"]

_BATCH = 10_000
_ARROW_ERRORS = (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError)


def read_files(paths: Sequence[Path]) -> Dataset:
    """Read files that hold the same columns, in any of the formats of `READERS`, as one Dataset.

    DataError names the file and line of what cannot be read, is empty, or has other columns or types.
    """
    from datasets import Dataset

    tables = [_table(path) for path in paths]
    for path, table in zip(paths, tables, strict=True):
        if set(table.column_names) != set(tables[0].column_names):
            raise DataError(
                f"{path}: the columns are {', '.join(table.column_names)}, but {', '.join(tables[0].column_names)} in "
                f"{paths[0]}; name the files that belong together in data.train and data.validation"
            )
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except _ARROW_ERRORS as error:
        raise DataError(f"{paths[0].parent}: the files do not hold the same types: {error}") from error
    # The fingerprint datasets would compute itself pickles the whole table: 4 s for 400 MB (datasets 5.2).
    return Dataset(table, fingerprint=fingerprint(table)[:32])


def _table(path: Path) -> pa.Table:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: cannot read '{path.suffix}' files; there may be: {', '.join(READERS)}")
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty")
        table = reader(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path}: cannot be read as {path.suffix[1:]}: {error}") from error
    if table.num_rows == 0:
        raise DataError(f"{path}: there are no rows")
    return table


def _decoded(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line numbers and lines of a file that must be UTF-8, with or without a byte order mark."""
    with path.open("rb") as file:
        offset = 0
        for number, raw in enumerate(file, start=1):
            try:
                yield number, (raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw).decode()
            except UnicodeDecodeError as error:
                at = offset + raw.index(error.object) + error.start
                byte = error.object[error.start]
                raise DataError(
                    f"{path}:{number}: byte {at} of the file (0x{byte:02x}) is not UTF-8; save the file as UTF-8"
                ) from None
            offset += len(raw)


def _text(path: Path) -> pa.Table:
    text = "".join(line for _, line in _decoded(path)).replace("\r\n", "\n")
    return pa.table({"text": pa.array([text] if text.strip() else [], pa.string())})


def _json(path: Path) -> pa.Table:
    first = next((line.lstrip() for _, line in _decoded(path) if line.strip()), "")
    return _json_list(path) if first.startswith("[") else _json_lines(path)


def _json_list(path: Path) -> pa.Table:
    text = "".join(line for _, line in _decoded(path))
    try:
        rows = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise _broken_json(path, getattr(error, "lineno", 1), text, error) from None
    return _from_objects((f"{path}: row {row} (from 0)", value) for row, value in enumerate(rows))


def _json_lines(path: Path) -> pa.Table:
    def parsed() -> Iterator[tuple[str, Any]]:
        for number, line in _decoded(path):
            if line.strip():
                try:
                    yield f"{path}:{number}", json.loads(line)
                except (json.JSONDecodeError, RecursionError) as error:
                    raise _broken_json(path, number, line, error) from None

    return _from_objects(parsed())


def _broken_json(path: Path, line: int, text: str, error: Exception) -> DataError:
    at = getattr(error, "pos", 0)
    excerpt = text[max(0, at - 40) : at + 40].strip()
    allowed = "one JSON object per line" + (", or one list of objects" if path.suffix.lower() == ".json" else "")
    return DataError(
        f"{path}:{line}: broken JSON, {getattr(error, 'msg', 'nested too deep')}: {excerpt}; expected {allowed}"
    )


def _from_objects(rows: Iterable[tuple[str, Any]]) -> pa.Table:
    """Turn (where, object) pairs into a table, some thousands at a time, so that few are Python objects at once."""
    tables, schema, rest = [], pa.schema([]), iter(rows)
    while batch := list(islice(rest, _BATCH)):
        for where, row in batch:
            if not isinstance(row, dict):
                raise DataError(f"{where}: expected an object {{column: value}}, found {_excerpt(row)}")
        names = dict.fromkeys(chain(schema.names, *(row for _, row in batch)))
        fields = [(name, _column(name, batch, schema)) for name in names]
        schema = pa.schema([(name, kind) for name, (_, kind) in fields])
        tables.append(pa.table({name: values for name, (values, _) in fields}))
    return pa.concat_tables(tables, promote_options="permissive") if tables else pa.table({})


def _column(name: str, batch: list[tuple[str, Any]], schema: pa.Schema) -> tuple[pa.Array, pa.DataType]:
    """Return a column's values in this batch, and its type so far; DataError names the place of another type."""
    before = schema.field(name).type if name in schema.names else pa.null()
    try:
        values = pa.array([row.get(name) for _, row in batch])
        return values, _unified(before, values.type)
    except _ARROW_ERRORS as error:
        kind = before
        for where, row in batch:
            try:
                kind = _unified(kind, pa.array([row.get(name)]).type)
            except pa.ArrowTypeError:
                found = _excerpt(row.get(name))
                raise DataError(
                    f"{where}: column '{name}' holds {kind} before, here {found}; one type per column"
                ) from None
            except _ARROW_ERRORS as alone:
                raise DataError(f"{where}: column '{name}': {alone}; found {_excerpt(row.get(name))}") from None
        raise DataError(f"{batch[0][0]} and after: column '{name}': {error}") from error


def _unified(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    schemas = [pa.schema([("value", kind)]) for kind in (one, other)]
    return pa.unify_schemas(schemas, promote_options="permissive").field("value").type


def _excerpt(value: Any) -> str:
    words = json.dumps(value)
    return words if len(words) <= 80 else f"{words[:77]}..."


def _separated(delimiter: str) -> Callable[[Path], pa.Table]:
    def table(path: Path) -> pa.Table:
        reader = csv.reader((line for _, line in _decoded(path)), delimiter=delimiter, strict=True)
        limit = csv.field_size_limit(sys.maxsize)  # a cell may be a whole document
        try:
            header = _header(path, next(reader, []))
            tables = list(_cells(path, reader, header))
        except csv.Error as error:
            raise DataError(
                f"{path}:{reader.line_num}: {error}; a cell with quotes stands in quotes, each one inside doubled"
            ) from None
        finally:
            csv.field_size_limit(limit)
        return _typed(pa.concat_tables(tables)) if tables else pa.table({})

    return table


def _header(path: Path, cells: list[str]) -> list[str]:
    names = [cell.strip() or f"column_{number}" for number, cell in enumerate(cells, start=1)]
    if all(re.fullmatch(_FLOAT, cell) for cell in cells):
        raise DataError(f"{path}:1: the first line must name the columns, found {', '.join(cells)[:80] or 'nothing'}")
    if len(set(names)) < len(names):
        raise DataError(f"{path}:1: a column is named twice: {', '.join(names)}")
    return names


def _cells(path: Path, reader: Any, header: list[str]) -> Iterator[pa.Table]:
    def even() -> Iterator[list[str | None]]:
        for cells in reader:
            if cells and len(cells) != len(header):
                raise DataError(f"{path}:{reader.line_num}: {len(cells)} cells, but the header names {len(header)}")
            if cells:
                yield [cell or None for cell in cells]

    rows = even()
    while batch := list(islice(rows, _BATCH)):
        columns = zip(*batch, strict=True)
        yield pa.table({name: pa.array(values, pa.string()) for name, values in zip(header, columns, strict=True)})


# What would not come back as it was written (007, or more digits than a float holds) stays text.
_INTEGER = r"^-?(0|[1-9]\d{0,17})$"
_FLOAT = r"^(-?(0|[1-9]\d{0,14})(\.\d+)?([eE][-+]?\d+)?)?$"


def _typed(table: pa.Table) -> pa.Table:
    """Give a column of text the narrowest type that all its cells have: whole numbers, numbers, else text."""
    for index, name in enumerate(table.column_names):
        cells = table.column(index)
        for pattern, kind in ((_INTEGER, pa.int64()), (_FLOAT, pa.float64())):
            if cells.null_count < len(cells) and pc.all(pc.match_substring_regex(cells, pattern)).as_py():
                table = table.set_column(index, name, pc.cast(cells, kind))
                break
    return table


def _parquet(path: Path) -> pa.Table:
    from pyarrow import parquet

    return parquet.ParquetFile(path).read()


def _arrow(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as file:
        try:
            return pa.ipc.open_stream(file).read_all()
        except pa.ArrowInvalid:
            return pa.ipc.open_file(file).read_all()


READERS: dict[str, Callable[[Path], pa.Table]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".parquet": _parquet,
    ".txt": _text,
    ".arrow": _arrow,
}
"""The file endings that can be read, and how."""
