"""A block of JSON lines parsed by Arrow at once, where the rows are surely those that Python's own parser gives."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import json as arrow_json

from trainworks.data.formats.base import ARROW_ERRORS, unified
from trainworks.data.nesting import is_deep_schema

__all__ = ["parsed_at_once"]

_BRACKETS = 200
_NULL_IN_LIST = re.compile(rb"[\[,]\s*null")
_NO_BRACKETS = bytes(set(range(256)) - set(b"{[\n"))
_EXACT = 1e15
"""Beyond it, a whole number beside fractions may have come back rounded."""


def parsed_at_once(content: bytes, before: pa.Schema) -> pa.Table | None:
    """Return the rows of whole lines, one object each, or None where a mistake, or a doubt, asks for more care.

    `before` has the columns of earlier blocks; None also when these rows do not go with them.
    """
    if not _is_plain(content):
        return None
    try:
        table = _parse(content, [])
        if texts := [field for field in table.schema if _holds(field.type, pa.types.is_temporal)]:
            names = table.column_names
            table = _parse(content, [pa.field(field.name, _as_text(field.type)) for field in texts]).select(names)
        unified([before, table])
    except ARROW_ERRORS:
        return None
    if not table.num_columns or is_deep_schema(table.schema) or len(table) != content.rstrip(b"\n").count(b"\n") + 1:
        return None
    return table if all(_is_sure(chunk) for column in table.columns for chunk in column.chunks) else None


def _is_plain(content: bytes) -> bool:
    """Say whether each line looks like one object, in UTF-8, not deep enough to overflow the parser's stack."""
    count = content.count(b"\n") + (not content.endswith(b"\n"))
    if content.count(b"}\n{") != count - 1 or not content.startswith(b"{") or b"\0" in content or rb"\u0000" in content:
        return False
    # Of [null, "a"] in a list, Arrow 26 makes values that are not there, and may read past its memory.
    if b"null" in content and _NULL_IN_LIST.search(content):
        return False
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    # Arrow 26 follows brackets by recursion, and ends the process where there are some ten thousand.
    return max(map(len, content.translate(None, _NO_BRACKETS).split(b"\n"))) <= _BRACKETS


def _parse(content: bytes, fields: list[pa.Field]) -> pa.Table:
    return arrow_json.read_json(
        io.BytesIO(content),
        read_options=arrow_json.ReadOptions(use_threads=False, block_size=len(content) + 1),
        parse_options=arrow_json.ParseOptions(explicit_schema=pa.schema(fields) if fields else None),
    )


def _holds(kind: pa.DataType, is_wanted: Callable[[pa.DataType], bool]) -> bool:
    """Say whether a type, or one inside it, is as wanted."""
    return is_wanted(kind) or any(_holds(kind.field(place).type, is_wanted) for place in range(kind.num_fields))


def _is_sure(values: pa.Array) -> bool:
    """Say whether an array surely holds what was written: a large fraction may have been a whole number, and lost
    digits."""
    if pa.types.is_floating(values.type):
        largest = pc.max(pc.abs(values)).as_py()
        return largest is None or not largest >= _EXACT
    if pa.types.is_list(values.type):
        return _is_sure(values.flatten())
    return not pa.types.is_struct(values.type) or all(map(_is_sure, values.flatten()))


def _as_text(kind: pa.DataType) -> pa.DataType:
    """Return the type with text in place of the times that Arrow sees in it."""
    if pa.types.is_temporal(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_as_text(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _as_text(field.type)) for field in kind])
    return kind
