"""Seeded mutations of run files and of files of rows: in their bytes, in what they say, in how they are packed.

A generator in the same state makes the same bytes on any machine.
"""

from __future__ import annotations

import copy
import gzip
import io
import json
import random
from collections.abc import Callable, Sequence
from datetime import date
from decimal import Decimal
from typing import Any, NamedTuple

import hostile
import pyarrow as pa
import yaml
from pyarrow import parquet

__all__ = ["RowFile", "RunFile", "row_file", "run_file"]

Rows = list[dict[str, Any]]

# Bytes

_RAW = [sign.encode() for sign in hostile.SIGNS] + [
    b"\xff",
    b"\xc3",
    b"\xed\xa0\x80",
    b"\xf4\x90\x80\x80",
    b"\xef\xbb\xbf",
]
_MARKS = [b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\x1f\x8b\x08", b"PAR1", b"---\n", b"\0\0"]
_LINE_ENDS = [[b"\r\n"], [b"\r"], [b"\n", b"\r\n"], [b"\n", b"\r", b"\n\n"], [b"\n\t"], [b"\x85"], [b"\n "]]


def damaged(rng: random.Random, raw: bytes) -> bytes:
    """Return bytes with some places flipped, cut, put in, doubled or exchanged."""
    for _ in range(rng.choice([1, 1, 2, 4])):
        raw = rng.choice(_DAMAGES)(rng, raw)
    return raw


def _flipped(rng: random.Random, raw: bytes) -> bytes:
    at = rng.randrange(len(raw) + 1)
    return raw[:at] + bytes(byte ^ 1 << rng.randrange(8) for byte in raw[at : at + 1]) + raw[at + 1 :]


def _deleted(rng: random.Random, raw: bytes) -> bytes:
    at = rng.randrange(len(raw) + 1)
    return raw[:at] + raw[at + rng.choice([1, 1, 2, 5, 40]) :]


def _inserted(rng: random.Random, raw: bytes) -> bytes:
    at = rng.randrange(len(raw) + 1)
    return raw[:at] + rng.choice(_RAW) * rng.choice([1, 1, 1, 3, 100]) + raw[at:]


def _doubled(rng: random.Random, raw: bytes) -> bytes:
    at = rng.randrange(len(raw) + 1)
    part = raw[at : at + rng.choice([1, 8, 60, 400])]
    return raw[:at] + part * rng.choice([2, 2, 3, 20]) + raw[at + len(part) :]


def _truncated(rng: random.Random, raw: bytes) -> bytes:
    return raw[: rng.randrange(len(raw) + 1)]


def _swapped(rng: random.Random, raw: bytes) -> bytes:
    lines = raw.split(b"\n")
    one, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    lines[one], lines[other] = lines[other], lines[one]
    return b"\n".join(lines)


def _ended(rng: random.Random, raw: bytes) -> bytes:
    ends = rng.choice(_LINE_ENDS)
    return b"".join(line + rng.choice(ends) for line in raw.split(b"\n"))


def _marked(rng: random.Random, raw: bytes) -> bytes:
    return rng.choice(_MARKS) + raw


def _recoded(rng: random.Random, raw: bytes) -> bytes:
    return raw.decode(errors="replace").encode(rng.choice(["utf-16", "utf-16-le", "utf-32", "utf-7"]))


_OFTEN = [_flipped, _deleted, _inserted, _doubled, _truncated, _swapped]
_DAMAGES: list[Callable[[random.Random, bytes], bytes]] = [*_OFTEN * 3, _ended, _marked, _recoded]


# Trees: a document or a row, in which a mark stands for raw text until it is written


class Snippets:
    """Raw text that stands in a tree as marks."""

    def __init__(self) -> None:
        self.raw: list[str] = []

    def mark(self, text: str) -> str:
        """Return what stands for `text`."""
        self.raw.append(text)
        return f"@@{len(self.raw) - 1}@@"

    def written(self, text: str, quote: str) -> str:
        """Return the text with each mark, and the quotes around it, replaced."""
        for number, raw in enumerate(self.raw):
            mark = f"@@{number}@@"
            text = text.replace(f"{quote}{mark}{quote}", raw).replace(mark, raw)
        return text


def _ways(tree: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the way to every value in a tree but the whole."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [way for key, value in items for way in ((*above, key), *_ways(value, (*above, key)))]


def _change(rng: random.Random, tree: Any, snippets: Snippets, values: Sequence[str], keys: Sequence[str]) -> None:
    """Change one value, key or section of a tree, if it has any."""
    ways = _ways(tree)
    *above, last = rng.choice(ways) if ways else ("a",)
    holder = tree
    for key in above:
        holder = holder[key]
    held = holder.get(last) if isinstance(holder, dict) else holder[last]
    kind = rng.choice(["value"] * 5 + ["gone", "renamed", "twice", "misspelt", "moved"])
    if kind == "value" or not isinstance(holder, dict):
        holder[last] = snippets.mark(rng.choice(values))
    elif kind == "twice":
        holder[snippets.mark(json.dumps(last))] = snippets.mark(rng.choice(values))
    elif kind == "moved":
        tree[rng.choice([str(last), snippets.mark(rng.choice(keys))])] = copy.deepcopy(held)
    else:
        holder.pop(last, None)
        new = {"renamed": snippets.mark(rng.choice(keys)), "misspelt": _misspelt(rng, str(last))}.get(kind)
        holder |= {} if new is None else {new: held}


def _misspelt(rng: random.Random, word: str) -> str:
    at = rng.randrange(len(word) + 1)
    return rng.choice([word[:at] + word[at + 1 :], word[:at] + word[at : at + 1] * 2 + word[at + 1 :], word.upper()])


# Run files

_KINDS = ["tree", "tree", "tree", "bytes", "bytes", "overrides", "overrides", "tree bytes", "tree overrides", "none"]
_OVERRIDDEN = ["optim.lr", "seed", "faults.sigma", "goal.metric", "", ".", "a..b", "data.", "task.type.x", "=", "é.é"]


_HARMLESS = ["1", "2", "8", "16", "0.5", "0.25", "true", "a", "'a b'", "main"]
_VALUES = [hostile.YAML_VALUES, hostile.YAML_VALUES, _HARMLESS]


class RunFile(NamedTuple):
    """A mutated run file, and overrides to go with it."""

    raw: bytes
    overrides: list[str]


def run_file(rng: random.Random, bases: Sequence[str]) -> RunFile:
    """Return one of the run files changed in what it says, in its bytes, by overrides, or in several of these; now and
    then unchanged."""
    base, kinds = rng.choice(bases), rng.choice(_KINDS)
    raw = (_retold(rng, base) if "tree" in kinds else base).encode()
    if "bytes" in kinds:
        raw = damaged(rng, raw)
    return RunFile(raw, _overrides(rng, base) if "overrides" in kinds else [])


def _retold(rng: random.Random, base: str) -> str:
    tree, snippets, values = yaml.safe_load(base), Snippets(), rng.choice(_VALUES)
    for _ in range(rng.choice([1, 1, 1, 1, 2, 4, 12])):
        _change(rng, tree, snippets, values, hostile.YAML_KEYS)
    flow, width = rng.choice([True, False, False, None]), rng.choice([20, 10**6])
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, default_flow_style=flow, width=width)
    return snippets.written(text, "'")


def _overrides(rng: random.Random, base: str) -> list[str]:
    ways = [".".join(map(str, way)) for way in _ways(yaml.safe_load(base))]
    keys, values = rng.choice([ways, [*ways, *hostile.YAML_KEYS, *_OVERRIDDEN]]), rng.choice(_VALUES)
    words = [f"{rng.choice(keys)}={rng.choice(values)}" for _ in range(rng.choice([1, 1, 2, 9]))]
    return [
        rng.choice([word, word, word, word, word.partition("=")[0], f" {word} ", word.swapcase()]) for word in words
    ]


# Rows as text

_ROW_ENDS = [["\n"]] * 12 + [
    ["\r\n"],
    ["\n", "\r\n"],
    ["\r"],
    ["\n", "\n\n", "\n \n"],
    ["\u2028"],
    ["\n", "\x0b", "\x0c"],
]


def _json_text(rng: random.Random, rows: Rows, *, as_list: bool) -> bytes:
    """Return rows as JSON lines, or as one list, with some values, keys, rows and line ends changed."""
    snippets, rows = Snippets(), copy.deepcopy(rows)
    values = hostile.HUGE if rng.random() < 0.01 else hostile.JSON_VALUES
    for _ in range(rng.choice([1, 1, 2, 5])):
        _change(rng, rng.choice(rows), snippets, values, hostile.JSON_KEYS)
    if rng.random() < 0.1:
        whole = {rng.choice(list(rows[0] or ["text"])): snippets.mark(rng.choice(hostile.JSON_VALUES))}
        rows = [row | whole for row in rows]
    escaped = rng.random() < 0.5
    texts = [snippets.written(json.dumps(row, ensure_ascii=escaped), '"') for row in rows]
    if rng.random() < 0.2:
        texts[rng.randrange(len(texts))] = rng.choice(hostile.ROWS)
    ends = rng.choice(_ROW_ENDS)
    text = f"[{f', {ends[0]}'.join(texts)}]" if as_list else "".join(text + rng.choice(ends) for text in texts)
    return (text[:-1] if rng.random() < 0.1 else text).encode()


def _separated_text(rng: random.Random, rows: Rows, delimiter: str) -> bytes:
    """Return rows as CSV or TSV, with some cells, records and line ends changed."""
    names = list(rows[0])
    table = [names, *([str(row.get(name, "")) for name in names] for row in rows)]
    for _ in range(rng.choice([0, 1, 1, 3])):
        record = rng.choice(table)
        at = rng.randrange(len(record) + 1)
        kind = rng.choice(["cell", "cell", "more", "less", "record"])
        if kind == "record":
            table.insert(rng.randrange(len(table) + 1), [rng.choice(hostile.CELLS)] * rng.choice([0, 1, 2, 2_000]))
        else:
            record[at : at + (kind != "more")] = [] if kind == "less" else [rng.choice(hostile.CELLS)]
    end = rng.choice(["\n"] * 5 + ["\r\n", "\r", "\n\n"])
    return "".join(delimiter.join(record) + end for record in table).encode()


# Rows as tables


def _deep(levels: int) -> Any:
    kind: Any = pa.string()
    for level in range(levels):
        kind = pa.list_(kind) if level % 2 else pa.struct([("a", kind)])
    return kind


def _columns(count: int) -> list[Callable[[], Any]]:
    """Return makers of columns of so many cells, of every type that Arrow has."""
    texts, numbers = [f"a cat {place}" for place in range(count)], list(range(count))
    turns = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]] * count
    large_turn = pa.struct([("role", pa.string()), ("content", pa.large_string())])
    cells: list[tuple[list[Any], Any]] = [
        *((texts, kind) for kind in (pa.string(), pa.large_string(), pa.string_view())),
        *(([text.encode() for text in texts], kind) for kind in (pa.binary(), pa.large_binary(), pa.binary_view())),
        *(([[text] for text in texts], kind(pa.string())) for kind in (pa.list_, pa.large_list, pa.list_view)),
        *(([None] * count, _deep(levels)) for levels in (0, 20, 31, 32, 33, 60, 300)),
        *((numbers, kind) for kind in (pa.int64(), pa.uint64(), pa.float16(), pa.duration("s"))),
        *((numbers, kind) for kind in (pa.time32("s"), pa.time64("us"), pa.timestamp("ns", "Europe/Berlin"))),
        *(([Decimal(place) for place in numbers], kind) for kind in (pa.decimal128(20, 3), pa.decimal256(50, 3))),
        ([None, *texts[1:]], pa.string()),
        (["a\0b"] * count, pa.string()),
        ([place % 3 for place in numbers], pa.int8()),
        ([place % 2 == 0 for place in numbers], pa.bool_()),
        ([float("nan")] * count, pa.float64()),
        ([b"\xff\0"] * count, pa.binary(2)),
        ([date(2024, 1, 1)] * count, pa.date32()),
        ([2**62] * count, pa.timestamp("s")),
        ([(1, 2, 3)] * count, pa.month_day_nano_interval()),
        (turns, None),
        (turns, pa.large_list(large_turn)),
        ([[text] for text in texts], pa.list_(pa.string(), 1)),
        ([[place, 1] for place in numbers], None),
        ([None] * count, pa.list_(pa.struct([]))),
        ([{}] * count, pa.struct([])),
        ([{"a": text} for text in texts], None),
        ([{"bytes": b"no picture", "path": None}] * count, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ([[("a", 1)]] * count, pa.map_(pa.string(), pa.int64())),
    ]
    raw = pa.array([b"caf\xe9"] * count, pa.binary())
    return [
        *(lambda held=held, kind=kind: pa.array(held, kind) for held, kind in cells),
        lambda: pa.array(texts).dictionary_encode(),
        lambda: pa.array(numbers).dictionary_encode(),
        lambda: pa.Array.from_buffers(pa.string(), count, raw.buffers()),
        lambda: pa.UnionArray.from_dense(pa.array([0] * count, pa.int8()), pa.array(numbers, pa.int32()), [raw]),
        lambda: pa.RunEndEncodedArray.from_arrays(pa.array([count], pa.int32()), pa.array(["a"])),
        lambda: pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"a": 1}'] * count)),
        lambda: pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"0" * 16] * count, pa.binary(16))),
    ]


def _table_bytes(rng: random.Random, rows: Rows, ending: str) -> bytes:
    """Return rows as a Parquet or Arrow file, with columns of other types, metadata that lies, and damage."""
    plain = table = pa.Table.from_pylist(rows)
    makers = _columns(len(table))
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        name, cells = rng.choice([*table.column_names, "other", "system", "tools", "", "é"]), rng.choice(makers)()
        at = table.schema.get_field_index(name)
        new = at < 0 or rng.random() < 0.05
        table = table.append_column(name, cells) if new else table.set_column(at, name, cells)
    if rng.random() < 0.2:
        table = table.replace_schema_metadata({"huggingface": rng.choice(hostile.METADATA)})
    if rng.random() < 0.05:
        table = table.slice(0, rng.randrange(2))
    write = _parquet if ending == ".parquet" else _arrow
    try:
        raw = write(rng, table)
    except pa.ArrowException:  # a type that the format has not
        raw = write(rng, plain)
    return damaged(rng, raw) if rng.random() < 0.4 else raw


def _parquet(rng: random.Random, table: pa.Table) -> bytes:
    sink, compression = io.BytesIO(), rng.choice(["none", "snappy", "zstd"])
    parquet.write_table(table, sink, compression=compression, row_group_size=rng.choice([2, 100]))
    return sink.getvalue()


def _arrow(rng: random.Random, table: pa.Table) -> bytes:
    sink, new = io.BytesIO(), rng.choice([pa.ipc.new_file, pa.ipc.new_stream])
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=rng.choice([2, 100]))
    return sink.getvalue()


# Files of rows

_PACKED = [".jsonl.gz", ".jsonl.zst", ".csv.gz", ".json.zst"]
_ENDINGS = [".jsonl"] * 14 + [
    ".json",
    ".json",
    ".csv",
    ".tsv",
    ".parquet",
    ".parquet",
    ".arrow",
    ".arrow",
    ".txt",
    *_PACKED,
]
_DOCUMENTS = ["a cat\nsees a dog", "", " \n", "x" * 200_000, "a\r\nb"]


class RowFile(NamedTuple):
    """A mutated file of rows."""

    name: str
    raw: bytes


def row_file(rng: random.Random, rows: Rows) -> RowFile:
    """Return rows as a file of some format, changed in its values, types, bytes or compression; now and then as they
    are."""
    if rng.random() < 0.1:
        return RowFile("rows.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows).encode())
    ending = rng.choice(_ENDINGS)
    _, kind, *packed = ending.split(".")
    match kind:
        case "parquet" | "arrow":
            return RowFile(f"rows{ending}", _table_bytes(rng, rows, ending))
        case "csv" | "tsv":
            raw = _separated_text(rng, rows, "," if kind == "csv" else "\t")
        case "txt":
            raw = rng.choice(_DOCUMENTS).encode()
        case _:
            raw = _json_text(rng, rows, as_list=kind == "json" and rng.random() < 0.8)
    if rng.random() < 0.35:
        raw = damaged(rng, raw)
    return RowFile(f"rows{ending}", _packed(rng, raw, packed[0]) if packed else raw)


def _packed(rng: random.Random, raw: bytes, kind: str) -> bytes:
    def pack(content: bytes) -> bytes:
        return gzip.compress(content, mtime=0) if kind == "gz" else bytes(pa.compress(content, "zstd", asbytes=True))

    whole, half = pack(raw), len(raw) // 2
    ways: list[Callable[[], bytes]] = [
        lambda: whole,
        lambda: damaged(rng, whole),
        lambda: whole[: rng.randrange(len(whole))],
        lambda: pack(raw[:half]) + pack(raw[half:]),
        lambda: whole + rng.choice(_RAW) * 9,
        lambda: raw,
        lambda: pack(whole),
        lambda: pack(b"x" * 10**7),
    ]
    return rng.choice(ways)()
