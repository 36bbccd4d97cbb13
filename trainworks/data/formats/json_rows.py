"""JSON lines, and a JSON file that is one list: each object a row, each key a column."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from trainworks.data.bad_rows import BadRow, BadRows, BadRowsError, excerpt
from trainworks.data.formats.arrow_json import parsed_at_once
from trainworks.data.formats.base import ARROW_ERRORS, Chunk, unified
from trainworks.data.formats.lines import Line, blocks, lines, open_bytes, whole_text
from trainworks.data.nesting import DEEPEST, is_deep
from trainworks.errors import DataError

__all__ = ["json_lines", "json_rows"]

_LIST_BYTES = 256 * 2**20
_ESCAPES = re.compile(r"\\u(0000|[dD][89a-fA-F])")
_GAP = re.compile(r"[^\s,]")
_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


class _Row(NamedTuple):
    """A parsed row and its place."""

    value: Any
    row: int
    line: int | None = None


def json_rows(path: Path, bad: BadRows) -> Iterator[Chunk]:
    """Yield the rows of a file that holds one list of objects, or an object per line."""
    with open_bytes(path) as file:
        begins = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    return _list(path, bad) if begins.startswith(b"[") else json_lines(path, bad)


def json_lines(path: Path, bad: BadRows) -> Iterator[Chunk]:
    """Yield the rows of a file that holds an object per line; blank lines are none.

    Arrow parses a block at once where there is nothing wrong with it. Any other is parsed line by line, to the same
    rows, with each mistake at its place.
    """
    schema, row = pa.schema([]), 0
    for block in blocks(path):
        table = None if block.too_long else parsed_at_once(block.content, schema)
        if table is not None:
            number = len(table)
            chunk = Chunk(table, row + np.arange(number), block.line + np.arange(number))
        else:
            there = [line for line in lines(block, path) if line.problem or line.text.strip()]
            number = len(there)
            rows = _good((_parsed(line, row + place, path) for place, line in enumerate(there)), bad)
            chunk = _chunk(rows, schema, path, bad)
        row += number
        schema = unified([schema, chunk.table])
        yield chunk


def _good(rows: Iterator[_Row | BadRow], bad: BadRows) -> list[_Row]:
    good = []
    for row in rows:
        if isinstance(row, BadRow):
            bad.add(row)
        else:
            good.append(row)
    return good


def _parsed(line: Line, row: int, path: Path) -> _Row | BadRow:
    if line.problem is not None:
        return replace(line.problem, row=row)
    try:
        value = json.loads(line.text)
    except (ValueError, RecursionError) as error:
        return _broken(line, row, path, error)
    flaw = _flaw(value, line.text)
    return _Row(value, row, line.number) if flaw is None else replace(flaw, file=str(path), row=row, line=line.number)


def _broken(line: Line, row: int, path: Path, error: Exception) -> BadRow:
    # Only the last line of a file may lack its end, and what is cut off there is wrong at its very end.
    at, detail = getattr(error, "pos", 0), _wrong(error)
    cut = not line.text.endswith("\n") and (at >= len(line.text) or detail.startswith("Unterminated string"))
    reason = "truncated last line" if cut else "broken JSON"
    allowed = "one JSON object per line" + (", or one list of objects" if ".json" in path.suffixes else "")
    mend = f"the file ends too early: write or fetch it again; expected {allowed}" if cut else f"expected {allowed}"
    return BadRow(reason, mend, detail, excerpt(line.text, at), str(path), line.number, row)


def _wrong(error: Exception) -> str:
    return "nested too deep" if isinstance(error, RecursionError) else getattr(error, "msg", str(error))


def _flaw(value: Any, text: str) -> BadRow | None:
    """Return what makes a value unusable as a row, though it is JSON; its place is left to the caller."""
    if not isinstance(value, dict):
        shown = "" if is_deep(value) else excerpt(json.dumps(value))
        return BadRow("not an object", "write each row as an object {column: value}", excerpt=shown)
    for name, cell in value.items():
        if is_deep(cell):
            detail = f"over {DEEPEST} levels of lists and objects"
            return BadRow("nested too deep", "write what is deeper as text", detail, column=excerpt(name))
    if _ESCAPES.search(text) is None:
        return None
    for name, cell in value.items():
        words = json.dumps({name: cell}, ensure_ascii=False)
        if found := _NUL.search(words):
            mend = r"remove \u0000 from the text"
            return BadRow("NUL character", mend, excerpt=excerpt(words, found.start()), column=name)
        try:
            words.encode()
        except UnicodeEncodeError as error:
            mend = r"a character over \uffff is two escapes, high and low: write the text itself, or escape both halves"
            return BadRow("lone surrogate", mend, excerpt=excerpt(words, error.start), column=excerpt(name))
    return None


def _chunk(rows: list[_Row], schema: pa.Schema, path: Path, bad: BadRows) -> Chunk:
    """Turn rows into a table, without those that hold another type than the rows before them."""
    while True:
        columns: dict[str, pa.Array] = {}
        wrong: dict[int, BadRow] = {}
        for name in dict.fromkeys(chain(schema.names, *(row.value for row in rows))):
            before = schema.field(name).type if name in schema.names else pa.null()
            try:
                columns[name] = pa.array([row.value.get(name) for row in rows])
                _joint(before, columns[name].type)
            except ARROW_ERRORS as error:
                others = _other_types(name, rows, before)
                if not others:
                    raise DataError(f"{path}: column '{excerpt(name)}': {excerpt(str(error))}") from error
                wrong = others | wrong
        if not wrong:
            places = np.array([row.row for row in rows], np.int64)
            numbers = [row.line for row in rows if row.line is not None]
            return Chunk(pa.table(columns), places, np.array(numbers, np.int64) if numbers else None)
        bad.extend([replace(problem, file=str(path)) for _, problem in sorted(wrong.items())])
        rows = [row for place, row in enumerate(rows) if place not in wrong]


def _other_types(name: str, rows: Sequence[_Row], kind: pa.DataType) -> dict[int, BadRow]:
    """Return the problem of each row, by its place among these, whose cell does not go with `kind` and those before."""
    wrong = {}
    for place, (value, row, line) in enumerate(rows):
        found = excerpt(json.dumps(value.get(name), ensure_ascii=False))
        try:
            kind = _joint(kind, pa.array([value.get(name)]).type)
        except pa.ArrowTypeError:
            mend = f"give column '{excerpt(name)}' one type in all rows"
            detail = f"{excerpt(str(kind))} before"
            wrong[place] = BadRow("type changes", mend, detail, found, line=line, row=row, column=name)
        except ARROW_ERRORS as error:
            # Integers over 64 bits, or a list whose items have several types.
            is_large = "too large" in str(error)
            reason, mend = ("value out of bounds", "write it as text") if is_large else ("mixed types", "give them one")
            wrong[place] = BadRow(reason, mend, excerpt(str(error)), found, line=line, row=row, column=name)
    return wrong


def _joint(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    return unified([pa.schema([("value", kind)]) for kind in (one, other)]).field("value").type


def _list(path: Path, bad: BadRows) -> Iterator[Chunk]:
    mend = f"make it JSON lines, which are read in parts: jq -c '.[]' {path.name} > {path.stem}.jsonl"
    try:
        text = whole_text(path, most=_LIST_BYTES, mend=mend)
    except BadRowsError as error:
        raise _placed(error, path) from None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        at, line = getattr(error, "pos", 0), getattr(error, "lineno", 1)
        mend = "expected one list of objects, or one JSON object per line"
        problem = BadRow("broken JSON", mend, _wrong(error), excerpt(text, at), str(path), line, _item(text, at))
        raise BadRowsError([problem]) from None
    flawed = text if _ESCAPES.search(text) else ""
    flaws = ((place, value, _flaw(value, flawed)) for place, value in enumerate(values))
    rows = (
        _Row(value, place) if flaw is None else replace(flaw, file=str(path), row=place) for place, value, flaw in flaws
    )
    yield _chunk(_good(rows, bad), pa.schema([]), path, bad)


def _placed(error: BadRowsError, path: Path) -> BadRowsError:
    """Say which item of the list the problem of a line stands in."""
    problem = error.problems[0]
    if problem.line is None or problem.row is not None:
        return error
    with open_bytes(path) as file:
        before = b"".join(file.readline() for _ in range(problem.line - 1)).decode(errors="replace")
    return BadRowsError([replace(problem, row=_item(before, len(before)))])


def _item(text: str, at: int) -> int:
    """Return which item of a list (from 0) the character `at` stands in, as far as the list can be read."""
    decoder, place, row = json.JSONDecoder(), text.find("[") + 1, 0
    while True:
        rest = _GAP.search(text, place)
        try:
            _, place = decoder.raw_decode(text, len(text) if rest is None else rest.start())
        except (ValueError, RecursionError):
            return row
        if place > at:
            return row
        row += 1
