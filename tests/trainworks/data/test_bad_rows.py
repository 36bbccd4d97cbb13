"""Bad input, one mistake each: where it stands, what is said of it, and what the three policies do."""

from __future__ import annotations

import gzip
import json
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from trainworks.data import files
from trainworks.data.bad_rows import BadRow, BadRows, BadRowsError, excerpt
from trainworks.data.formats import json_rows, lines
from trainworks.data.sources import Rows, read
from trainworks.errors import DataError
from trainworks.reading import Data

Content = bytes | Callable[[Path], Any]


@dataclass(frozen=True)
class Fixture:
    """A file with a mistake."""

    file: str
    content: Content
    row: int | None
    """The row it stands in; None where the file as a whole is wrong."""
    line: int | None
    words: str
    """What must be said of it."""
    column: str | None = None
    left: int | None = None
    """How many rows are left without the bad ones; None where reading cannot go on."""
    bad: int = 1


GOOD = b'{"text": "one"}\n'


def with_text(value: bytes, file: str = "rows.parquet") -> Callable[[Path], None]:
    """Write a column of text whose second value has these bytes, without any check."""

    def write(path: Path) -> None:
        raw = pa.array([b"one", value, b"three"], pa.binary())
        table = pa.table({"text": pa.Array.from_buffers(pa.string(), 3, raw.buffers())})
        if file.endswith("parquet"):
            parquet.write_table(table, path)
        else:
            with pa.ipc.new_file(str(path), table.schema) as writer:
                writer.write_table(table)

    return write


def with_messages(value: bytes) -> Callable[[Path], None]:
    """Write conversations of two turns whose second one's answer has these bytes, after a row of none."""

    def write(path: Path) -> None:
        raw = pa.array([b"a", b"b", b"a", value, b"a", b"b"], pa.binary())
        said = pa.Array.from_buffers(pa.string(), 6, raw.buffers())
        turns = pa.StructArray.from_arrays([pa.array(["user", "assistant"] * 3), said], ["role", "content"])
        table = pa.table({"messages": pa.ListArray.from_arrays(pa.array([0, 2, 4, 6], pa.int32()), turns)})
        parquet.write_table(table, path)

    return write


def with_table(make: Callable[[], pa.Table]) -> Callable[[Path], None]:
    """Write a table as a Parquet file or an Arrow stream."""

    def write(path: Path) -> None:
        table = make()
        if path.suffix == ".parquet":
            parquet.write_table(table, path)
        else:
            with pa.ipc.new_stream(str(path), table.schema) as writer:
                writer.write_table(table)

    return write


def with_false_offsets() -> pa.Table:
    """Return text whose second value is said to end before it begins."""
    offsets = pa.array([0, 9, 3, 11], pa.int32()).buffers()[1]
    return pa.table({"text": pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"onetwothree")])})


def with_a_union() -> pa.Table:
    kinds, places = pa.array([0, 0], pa.int8()), pa.array([0, 1], pa.int32())
    return pa.table({"text": pa.UnionArray.from_dense(kinds, places, [pa.array(["one", "two"])])})


def nested(levels: int) -> str:
    return '{"a": ' * levels + "1" + "}" * levels


def metadata(said: str) -> Callable[[], pa.Table]:
    return lambda: pa.table({"text": ["one"]}).replace_schema_metadata({"huggingface": said})


FIXTURES = [
    Fixture("broken.jsonl", GOOD + b'{"text": }\n' + GOOD, 1, 2, "broken JSON, Expecting value", left=2),
    Fixture(
        "blank-lines.jsonl", GOOD + b"\n \n" + b"{text: 1}\n", 1, 4, "broken JSON, Expecting property name", left=1
    ),
    Fixture("quotes.jsonl", b"{'text': 'x'}\n" + GOOD, 0, 1, "broken JSON, Expecting property name", left=1),
    Fixture("two-in-one.jsonl", GOOD + b'{"text": "a"} {"text": "b"}\n', 1, 2, "broken JSON, Extra data", left=1),
    Fixture("truncated.jsonl", GOOD * 3 + b'{"text": "thr', 3, 4, "truncated last line, Unterminated string", left=3),
    Fixture("cut-number.jsonl", GOOD + b'{"text": "x", "n": 1', 1, 2, "truncated last line, Expecting ','", left=1),
    Fixture("number.jsonl", GOOD + b"17\n", 1, 2, "not an object; found 17", left=1),
    Fixture("deep.jsonl", GOOD + b'{"text": ' + b"[" * 100_000 + b"\n", 1, 2, "nested too deep", left=1),
    Fixture("levels.jsonl", GOOD + f'{{"n": {nested(40)}}}\n'.encode(), 1, 2, "nested too deep, over 32", "n", left=1),
    Fixture("levels.json", f'[{{"n": 1}}, {{"n": {nested(900)}}}]'.encode(), 1, None, "nested too deep", "n", left=1),
    Fixture("deep-list.json", b'[{"n": 1}, ' + b"[" * 900 + b"]" * 901, 1, None, "not an object", left=1),
    Fixture("windows.jsonl", b'{"text": "one"}\r\n{"text": "tw\r\n', 1, 2, "broken JSON, Invalid control", left=1),
    Fixture("latin1.jsonl", GOOD + b'{"text": "caf\xe9"}\n', 1, 2, "byte 29 of the file is 0xe9", left=1),
    Fixture("latin1.csv", b"text,n\none,1\n\ncaf\xe9,2\n", 1, 4, "iconv -f cp1252 -t UTF-8 latin1.csv", left=1),
    Fixture("latin1-header.csv", b"caf\xe9,n\none,1\n", None, 1, "byte 3 of the file is 0xe9"),
    Fixture("latin1.txt", b"one\ncaf\xe9\n", 0, 2, "byte 7 of the file is 0xe9", left=0),
    Fixture("latin1.json", b'[{"text": "a"},\n{"text": "caf\xe9"}]', 1, 2, "byte 29 of the file is 0xe9"),
    Fixture("bom-latin1.jsonl", b"\xef\xbb\xbf" + GOOD + b'"\xe9"\n', 1, 2, "byte 20 of the file is 0xe9", left=1),
    Fixture("utf16.jsonl", GOOD.decode().encode("utf-16"), 0, 1, "the file is UTF-16; found {"),
    Fixture("utf16.txt", "one\ntwo\n".encode("utf-16"), 0, 1, "iconv -f UTF-16 -t UTF-8 utf16.txt", left=0),
    Fixture("utf16-be.csv", b"\xfe\xff" + "text,n\none,1\n".encode("utf-16-be"), 0, 1, "the file is UTF-16"),
    Fixture("utf16-le-unmarked.tsv", "text\tn\none\t1\n".encode("utf-16-le"), 0, 1, "the file is UTF-16LE"),
    Fixture("utf16-be-unmarked.jsonl", GOOD.decode().encode("utf-16-be"), 0, 1, "the file is UTF-16BE"),
    Fixture("utf32.jsonl", GOOD.decode().encode("utf-32"), 0, 1, "the file is UTF-32"),
    Fixture("nul.jsonl", GOOD + b'{"text": "a\0b"}\n', 1, 2, "NUL character, at character 11 of the line", left=1),
    Fixture("nul-escape.jsonl", GOOD + rb'{"text": "a\u0000b"}' b"\n", 1, 2, "NUL character", "text", left=1),
    Fixture("nul.csv", b'text,n\n"one\nmore",1\n"t\nw\0o",2\n', 1, 5, "tr -d '\\000' < nul.csv", left=1),
    Fixture("nul.txt", b"one\nt\0wo\n", 0, 2, "NUL character, at character 1 of the line", left=0),
    Fixture("nul.json", b'[{"text": "a"},\n{"text": "\0"}]', 1, 2, "NUL character"),
    Fixture("nul-first.json", b'[{"text": "\0"}]', 0, 1, "NUL character"),
    Fixture("inside.parquet", with_messages(b"t\0wo"), 1, None, "NUL character", "messages", left=2),
    Fixture("torn.parquet", with_messages(b"caf\xe9"), 1, None, "byte 3 of the cell is 0xe9", "messages", left=2),
    Fixture("nul.parquet", with_text(b"t\0wo"), 1, None, "NUL character", "text", left=2),
    Fixture("invalid.parquet", with_text(b"caf\xe9"), 1, None, "byte 3 of the cell is 0xe9", "text", left=2),
    Fixture("invalid.arrow", with_text(b"\xff", "arrow"), 1, None, "byte 0 of the cell is 0xff", "text", left=2),
    Fixture("surrogate.jsonl", GOOD + rb'{"text": "\ud83d"}' b"\n", 1, 2, "lone surrogate", "text", left=1),
    Fixture("low-surrogate.jsonl", GOOD + rb'{"text": "\ude00!"}' b"\n", 1, 2, "lone surrogate", "text", left=1),
    Fixture("key-surrogate.jsonl", GOOD + rb'{"\ud83d": "x"}' b"\n", 1, 2, "lone surrogate", "\\ud83d", left=1),
    Fixture("surrogate.json", rb'[{"text": [{"a": "\udc00"}]}]', 0, None, "lone surrogate", "text", left=0),
    Fixture("empty.jsonl", b"", None, None, "the file is empty"),
    Fixture("mark-only.csv", b"\xef\xbb\xbf", None, 1, "no header"),
    Fixture("blank.jsonl", b"\n \n", None, None, "there are no rows"),
    Fixture("header.csv", b"text,n\n", None, 1, "no rows, only a header: text, n"),
    Fixture("headless.csv", b"1,2.5\n3,4\n", None, 1, "the first line must name the columns"),
    Fixture("twice.csv", b"a,a\n3,4\n", None, 1, "column named twice, a, a"),
    Fixture("short.csv", b"text,n\none,1\ntwo\nthree,3\n", 1, 3, "1 cells, but the header names 2; found two", left=2),
    Fixture("long.tsv", b"text\tn\none\t1\ttoo\n\ntwo\t2\n", 0, 2, "3 cells, but the header names 2", left=1),
    Fixture("ragged.csv", b'text,n\n"a\nb",1\n\n"c\nd",2\nx,y,z\n', 2, 7, "3 cells, but the header names 2", left=2),
    Fixture("quoted.csv", b'text,n\n"a"b,1\nx,2\n', 0, 2, "broken quotes, ',' expected after '\"'", left=1),
    Fixture("quoted.tsv", b'text\tn\n"a"b\t1\nx\t2\n', 0, 2, "'\\t' expected after", left=1),
    Fixture("unclosed.csv", b'text,n\nx,1\n"a,2\nb,3\n', 1, 3, "a quote opened in this row is never closed"),
    Fixture("kind.jsonl", GOOD * 2 + b'{"text": 5}\n', 2, 3, "type changes, string before; found 5", "text", left=2),
    Fixture("flag.jsonl", b'{"n": 1}\n{"n": true}\n{"n": 2}\n', 1, 2, "int64 before; found true", "n", left=2),
    Fixture("inner.jsonl", b'{"m": [{"a": "x"}]}\n{"m": [{"a": 1}]}\n', 1, 2, "type changes, list", "m", left=1),
    Fixture("kind.json", b'[{"n": 1}, {"n": "x"}, {"n": "y"}]', 1, None, "int64 before", "n", left=1, bad=2),
    Fixture("large.jsonl", b'{"n": 1}\n{"n": 18446744073709551616}\n', 1, 2, "value out of bounds", "n", left=1),
    Fixture("list.json", b'[{"text": "a"}, 7]', 1, None, "not an object; found 7", left=1),
    Fixture("broken.json", b'[{"text": "a"},\n{"text": "b"},\n{"text": }]', 2, 3, "broken JSON, Expecting value"),
    Fixture("cut.json", b'[{"text": "a"},\n{"text": "b', 1, 2, "broken JSON, Unterminated string"),
    Fixture("broken.jsonl.gz", gzip.compress(GOOD + b"{\n"), 1, 2, "broken JSON", left=1),
    Fixture("broken.jsonl.zst", pa.compress(GOOD + b"{\n", "zstd", asbytes=True), 1, 2, "broken JSON", left=1),
    Fixture("ragged.csv.gz", gzip.compress(b"a,b\n1,2\n3\n"), 1, 3, "ragged row", left=1),
    Fixture("cut.jsonl.gz", gzip.compress(GOOD)[:-9], None, None, "cannot be read as jsonl.gz: Truncated"),
    Fixture("false.txt.zst", b"not compressed", None, None, "cannot be read as txt.zst: ZSTD"),
    Fixture("offsets.arrow", with_table(with_false_offsets), None, None, "cannot be read as arrow"),
    Fixture("union.arrow", with_table(with_a_union), None, None, "datasets does not know a type of it"),
    Fixture("list.arrow", with_table(metadata("[7]")), None, None, "metadata `huggingface`"),
    Fixture("cut.arrow", with_table(metadata("{")), None, None, "metadata `huggingface`"),
    Fixture("deep.arrow", with_table(metadata("[" * 9_999)), None, None, "metadata `huggingface`"),
    Fixture(
        "twice.parquet",
        with_table(lambda: pa.table([["a"], ["b"]], names=["text", "text"])),
        *(None, None, "column named twice, text"),
    ),
    Fixture(
        "levels.parquet",
        with_table(lambda: pa.table({"n": [json.loads(nested(40))]})),
        *(None, None, "nested too deep, over 32 levels"),
    ),
    Fixture("false.parquet", b"PAR1 but not", None, None, "cannot be read as parquet"),
]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("TRAINWORKS_CACHE", str(folder))
    return folder


@pytest.fixture(params=FIXTURES, ids=lambda fixture: fixture.file)
def fixture(request: pytest.FixtureRequest) -> Fixture:
    found: Fixture = request.param
    return found


def made(fixture: Fixture, folder: Path) -> Path:
    path = folder / fixture.file
    if isinstance(fixture.content, bytes):
        path.write_bytes(fixture.content)
    else:
        fixture.content(path)
    return path


def rows_of(path: Path, policy: str, **options: Any) -> Rows:
    return read(Data(source=str(path), holdout=0, bad_rows=policy, **options), seed=0)


def expect_place(fixture: Fixture, row: int | None, line: int | None, column: str | None, found: str) -> None:
    assert (row, line, column) == (fixture.row, fixture.line, fixture.column)
    assert len(found) <= 80
    assert found.isprintable()


def refused(fixture: Fixture, path: Path, policy: str) -> None:
    with pytest.raises(DataError) as caught:
        rows_of(path, policy)
    assert fixture.words in str(caught.value)
    assert str(path) in str(caught.value)
    assert all(line.isprintable() for line in str(caught.value).split("\n"))
    if isinstance(caught.value, BadRowsError):
        problem = caught.value.problems[0]
        expect_place(fixture, problem.row, problem.line, problem.column, problem.excerpt)
        assert problem.mend in str(caught.value)
        assert len(caught.value.problems) + caught.value.more == fixture.bad
    else:
        assert fixture.row is None


def test_there_are_thirty_fixtures_and_more() -> None:
    assert len(FIXTURES) >= 30
    assert len({fixture.file for fixture in FIXTURES}) == len(FIXTURES)


def test_by_default_a_mistake_ends_the_run_and_is_named_by_its_place(fixture: Fixture, tmp_path: Path) -> None:
    refused(fixture, made(fixture, tmp_path), "error")


def test_bad_rows_are_skipped_and_counted_where_reading_can_go_on(fixture: Fixture, tmp_path: Path) -> None:
    path = made(fixture, tmp_path)
    if not fixture.left:
        refused(fixture, path, "skip")
        return
    rows = rows_of(path, "skip")
    assert len(rows.train) == fixture.left
    assert sum(rows.dropped["train"].values()) == fixture.bad
    assert rows.listings == ()


def test_bad_rows_are_listed_when_they_are_quarantined(fixture: Fixture, tmp_path: Path, cache: Path) -> None:
    path = made(fixture, tmp_path)
    if not fixture.left:
        refused(fixture, path, "quarantine")
        return
    rows = rows_of(path, "quarantine")
    (listing,) = rows.listings
    assert listing.parent == cache / "quarantine"
    listed = [json.loads(line) for line in listing.read_text(encoding="utf-8").splitlines()]
    assert len(listed) == fixture.bad
    first = listed[0]
    assert first["file"] == str(path)
    assert rows.dropped["train"] == {first["reason"]: fixture.bad}
    expect_place(fixture, first["row"], first["line"], first["column"], first["excerpt"])


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.txt", "rows.json"])
def test_a_byte_order_mark_is_accepted(name: str, tmp_path: Path) -> None:
    content = {"rows.jsonl": GOOD, "rows.csv": b"text\none\n", "rows.txt": b"one", "rows.json": b'[{"text": "one"}]'}
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content[name])
    assert rows_of(tmp_path / name, "error").train.to_list() == [{"text": "one"}]


def test_objects_thirty_levels_deep_are_read(tmp_path: Path) -> None:
    content = {"n": json.loads(nested(30))}
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(content)}\n" * 2)
    assert rows_of(tmp_path / "a.jsonl", "error").train.to_list() == [content] * 2


def test_the_first_ten_mistakes_of_a_file_are_named_and_the_others_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes((GOOD + b"{\n") * 13)
    with pytest.raises(BadRowsError) as caught:
        rows_of(path, "error")
    said = str(caught.value).splitlines()
    assert [line.partition(": ")[0] for line in said[:10]] == [f"{path}:{line}" for line in range(2, 22, 2)]
    assert said[10:] == [
        "and 3 more",
        "to leave such rows out: data.bad_rows: skip, or quarantine, which lists them too",
    ]


def test_reading_stops_at_the_thousandth_mistake(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{\n" * 1_500)
    with pytest.raises(BadRowsError, match=r"and 990 more\nreading stopped there; "):
        rows_of(path, "error")
    with pytest.raises(BadRowsError, match=r"and 1,490 more\nno row is left without these"):
        rows_of(path, "skip")


def test_rows_after_a_bad_one_keep_their_numbers_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"\n{\n" + GOOD)
    (tmp_path / "b.csv").write_bytes(b'text\n"x\ny"\nx,y\nz\n')
    origin = rows_of(tmp_path, "skip").origins["train"]
    places = [(Path(place.file).name, place.row, place.line) for place in map(origin.at, range(4))]
    assert places == [("a.jsonl", 0, 1), ("a.jsonl", 2, 4), ("b.csv", 0, 2), ("b.csv", 2, 5)]


def test_held_out_and_limited_rows_are_known_by_their_place_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "{number}"}}\n' for number in range(200)))
    rows = read(Data(source=str(path), holdout=0.3, limit={"train": 40}), seed=3)
    assert len(rows.train) == 40
    for name, part in rows.splits.items():
        for number, row in enumerate(part):
            place = rows.origins[name].at(number)
            assert (place.row, place.line) == (int(row["text"]), int(row["text"]) + 1)


def test_counts_of_files_with_validation_files_go_to_their_own_split(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(GOOD + b"{\n{\n")
    (tmp_path / "validation.jsonl").write_bytes(GOOD + b"7\n")
    rows = rows_of(tmp_path, "skip", validation="validation")
    assert rows.dropped == {"train": {"broken JSON": 2}, "validation": {"not an object": 1}}


COMPRESSED: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "zst": lambda content: pa.compress(content, codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("ending", COMPRESSED)
def test_compressed_text_in_several_frames_is_read_like_the_text(ending: str, tmp_path: Path) -> None:
    press = COMPRESSED[ending]
    for name, parts in {
        "train.jsonl": (b'{"text": "on', b'e"}\n{"text": "two"}'),
        "b.csv": (b"text\non", b"e\ntwo\n"),
        "c.json": (b'[{"text": "one"},', b'{"text": "two"}]'),
    }.items():
        path = tmp_path / f"{name}.{ending}"
        path.write_bytes(b"".join(map(press, parts)))
        assert rows_of(path, "error").train["text"][:] == ["one", "two"]
    assert len(rows_of(tmp_path, "error").train) == 2, "train.jsonl.gz is the file named train"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let little fit in memory: blocks of 1,000 bytes, and tables of 5,000."""
    monkeypatch.setattr(lines, "BLOCK", 1_000)
    monkeypatch.setattr(files, "IN_MEMORY", 5_000)


def many(number: int) -> list[dict[str, Any]]:
    """Return rows whose columns come late, and whose types widen."""
    early = [{"n": row, "text": f"row {row}"} for row in range(number)]
    return early + [{"n": row + 0.5, "text": "late", "more": {"a": [row]}} for row in range(number)]


@pytest.mark.usefixtures("small")
def test_rows_too_many_for_memory_are_mapped_from_the_cache_and_found_there_again(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in many(400)) + "{\n")
    rows = rows_of(path, "quarantine")
    assert {Path(file["filename"]).parents[1] for file in rows.train.cache_files} == {cache / "files"}
    assert rows.train.to_list() == [{"more": None} | row for row in many(400)]
    assert not list((cache / "files").glob(".*")), "what was staged is gone"
    place = rows.origins["train"].at(799)
    assert (place.row, place.line) == (799, 800)

    monkeypatch.setattr(json_rows, "blocks", None)
    again = rows_of(path, "quarantine")
    assert again.train.to_list() == rows.train.to_list()
    assert (again.fingerprint, again.dropped, again.listings) == (rows.fingerprint, rows.dropped, rows.listings)
    for listing in rows.listings:
        listing.unlink()
    with pytest.raises(TypeError, match="not callable"):
        rows_of(path, "quarantine")


def test_rows_are_the_same_in_memory_and_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pa.table({"n": list(range(900)), "text": [f"row {row}" for row in range(900)]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    (tmp_path / "b.csv").write_text("n,text\n" + "".join(f"{row},row {row}\n" for row in range(900)))
    (tmp_path / "c.csv").write_text("n,text\n" + "".join(f"{row / 4},row {row}\n" for row in range(900)))
    held = rows_of(tmp_path, "error")
    monkeypatch.setattr(files, "IN_MEMORY", 5_000)
    mapped = rows_of(tmp_path, "error")
    assert held.train.cache_files == []
    assert len(mapped.train.cache_files) > 1
    assert mapped.train.features == held.train.features
    assert mapped.train.to_list() == held.train.to_list()
    assert mapped.fingerprint == held.fingerprint


def test_a_line_that_is_too_long_is_one_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "BLOCK", 1_000)
    monkeypatch.setattr(lines, "LONGEST", 10_000)
    path = tmp_path / "a.jsonl"
    for length, ending in ((50_000, b"\n"), (50_000, b""), (10_990, b"\n" + GOOD)):
        path.write_bytes(GOOD * 90 + b'{"text": "' + b"x" * length + ending)
        with pytest.raises(BadRowsError) as caught:
            rows_of(path, "error")
        (problem,) = caught.value.problems
        assert (problem.reason, problem.row, problem.line) == ("line too long", 90, 91)
        assert problem.excerpt.startswith('{"text": "xxx')
        assert len(rows_of(path, "skip").train) == 90 + ending.count(GOOD)


_GROWTH = """
import resource, sys
from pathlib import Path
import datasets
from trainworks.data.files import read_files
from trainworks.errors import DataError

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

read_files([Path(sys.argv[1])])
before = peak()
try:
    read_files([Path(sys.argv[2])])
except DataError as error:
    print(error)
print(peak() - before)
"""


def test_a_line_of_100_megabytes_is_refused_and_memory_stays_bounded(tmp_path: Path) -> None:
    (tmp_path / "good.jsonl").write_bytes(GOOD)
    with (tmp_path / "long.jsonl").open("wb") as file:
        file.write(GOOD + b'{"text": "')
        for _ in range(100):
            file.write(b"x" * 2**20)
        file.write(b'"}\n' + GOOD)
    command = [sys.executable, "-c", _GROWTH, str(tmp_path / "good.jsonl"), str(tmp_path / "long.jsonl")]
    said, _, growth = (
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().rpartition("\n")
    )
    assert "long.jsonl:2: row 1 (from 0): line too long, a line of 100 MB; the limit is 64 MB" in said
    assert int(growth) < 128, "megabytes"


def messy(rng: random.Random) -> list[dict[str, Any]]:
    """Return a few rows of one shape, with whatever JSON allows inside, and some of it elsewhere."""
    texts = ["x", "é", "😀", "2018-01-01", "2018-01-01T00:00:00Z", 'a\nb"\\', "", "\\u0000", "null"]
    numbers = [0, 1.5, -0.0, 2**53 + 1, 2**63, 10**16 + 1, 1e300, float("nan")]

    def value(depth: int) -> Any:
        kinds: list[Callable[[], Any]] = [
            lambda: None,
            lambda: rng.choice(texts),
            lambda: rng.choice(numbers),
            lambda: rng.random() < 0.5,
            lambda: [value(depth + 1) for _ in range(rng.randrange(3))],
            lambda: {name: value(depth + 1) for name in rng.sample("pqr", rng.randrange(3))},
        ]
        return rng.choice(kinds[: 6 if depth < 3 else 4])()

    rows = [{name: value(0) for name in rng.sample("abc", 2)}] * 2
    return [rows[0], {**rows[0], "a": rows[0].get("b")}, {"c": value(0)}][: rng.randrange(1, 4)]


def test_rows_parsed_at_once_are_those_parsed_line_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    path = tmp_path / "a.jsonl"
    at_once, counts = json_rows.parsed_at_once, {True: 0, False: 0}

    def everything(parse: Any) -> Any:
        monkeypatch.setattr(json_rows, "parsed_at_once", parse)
        bad = BadRows("skip", tmp_path / "listing")
        chunks = [chunk for chunk in json_rows.json_lines(path, bad) if len(chunk.table)]
        return [
            (chunk.table.schema, repr(chunk.table.to_pylist()), *map(list, chunk[1:])) for chunk in chunks
        ], bad.counts

    def counted(content: bytes, schema: pa.Schema) -> Any:
        table = at_once(content, schema)
        counts[table is not None] += 1
        return table

    for _ in range(1_500):
        path.write_text("".join(f"{json.dumps(row)}\n" for row in messy(rng)))
        try:
            slowly = everything(lambda content, schema: None)
        except DataError:
            continue
        assert everything(counted) == slowly, path.read_text()
    assert min(counts.values()) > 200


def test_an_excerpt_is_short_and_shows_control_characters_as_escapes() -> None:
    assert excerpt("a\tb\x1b[31m\ud800é") == "a\\tb\\x1b[31m\\ud800é"
    assert len(excerpt("\0" * 500, 250)) == 80
    assert "here" in excerpt("x" * 300 + "here" + "x" * 300, 300)


def test_an_error_comes_whole_out_of_another_process() -> None:
    error = BadRowsError([BadRow("broken", "mend it", row=number) for number in range(12)], more=3, advice="or not")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.problems, again.more) == (str(error), error.problems, 3)
    assert str(error).splitlines()[-2:] == ["and 5 more", "or not"]
