"""The text of a row: what its named columns say, whether plain text or a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from trainworks.errors import DataError, nearest

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["check_columns", "documents", "items_of"]

_SAID = ("content", "value", "text")
"""Where a message, or a part of one, keeps what is said: OpenAI's `content`, ShareGPT's `value`, a part's `text`."""


def check_columns(schema: pa.Schema, columns: Sequence[str], *, where: str) -> None:
    """Raise DataError for a column that is not there or holds no text."""
    for name in columns:
        if name not in schema.names:
            raise DataError(
                f"{where}: no column '{name}'{nearest(name, schema.names)}; there are: {', '.join(schema.names)}"
            )
        if not _is_said(schema.field(name).type):
            raise DataError(
                f"{where}: column '{name}' holds {schema.field(name).type}; expected text, or messages with "
                f"{', '.join(_SAID[:-1])} or {_SAID[-1]}"
            )


def _is_said(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_said(kind.value_type)
    if pa.types.is_struct(kind):
        return any(_is_said(kind.field(name).type) for name in _SAID if kind.get_field_index(name) >= 0)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def documents(table: pa.Table, columns: Sequence[str]) -> list[str]:
    """Return the text of every row: the columns' texts with an empty line between them; nulls say nothing."""
    if len(columns) == 1 and not pa.types.is_nested(table.schema.field(columns[0]).type):
        return [value or "" for value in table.column(columns[0]).to_pylist()]
    rows = zip(*(table.column(name).to_pylist() for name in columns), strict=True)
    return ["\n\n".join(said for value in row if (said := _said(value))) for row in rows]


def items_of(rows: Dataset, columns: Sequence[str], *, where: str) -> list[str]:
    """Return the text of every row's columns, each by itself; DataError for a column that cannot be used."""
    check_columns(rows.features.arrow_schema, columns, where=where)
    table = rows.with_format("arrow")[:]
    return [text for name in columns for text in documents(table, [name])]


def _said(value: Any) -> str:
    match value:
        case str():
            return value
        case list():
            return "\n\n".join(said for part in value if (said := _said(part)))
        case dict():
            return next((said for name in _SAID if (said := _said(value.get(name)))), "")
        case _:
            return ""
