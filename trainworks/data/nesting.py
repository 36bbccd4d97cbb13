"""How deep lists and objects may stand inside one another."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyarrow as pa

__all__ = ["DEEPEST", "is_deep", "is_deep_schema"]

DEEPEST = 32
"""Levels of lists and objects in a cell. Arrow's own files hold 63 (pyarrow 26), and Python's recursion ends at some
hundred."""


def is_deep(value: Any) -> bool:
    """Say whether a cell has more levels than it may."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEEPEST):
        level = [inner for outer in level for inner in _inside(outer) if isinstance(inner, dict | list)]
        if not level:
            return False
    return True


def _inside(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def is_deep_schema(schema: pa.Schema) -> bool:
    """Say whether the type of a column has more levels than a cell may."""
    level = schema.types
    for _ in range(DEEPEST + 1):
        level = [kind.field(place).type for kind in level for place in range(kind.num_fields)]
    return bool(level)
