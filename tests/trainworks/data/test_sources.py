import csv
import json
import re
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict, Features, List, Value, load_dataset_builder
from pyarrow import parquet

from trainworks.data.sources import read
from trainworks.errors import AccessError, DataError
from trainworks.reading import Data, Limit

COLUMNS = {"text": ["one", 'two "2", é', "three\nlines"], "label": [0, 1, 0], "score": [0.5, 2.0, -1e-3]}
ROWS = [dict(zip(COLUMNS, values, strict=True)) for values in zip(*COLUMNS.values(), strict=True)]


def everything(source, **options):
    return read(
        Data(source=source if isinstance(source, Dataset | DatasetDict) else str(source), holdout=0, **options), seed=0
    )


def write_lines(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def write_jsonl(path, rows=ROWS):
    return write_lines(path, *(json.dumps(row) for row in rows))


def write_separated(path, delimiter):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def write_arrow(path, new):
    table = pa.table(COLUMNS)
    with new(str(path), table.schema) as writer:
        writer.write_table(table)


WRITERS = {
    "rows.jsonl": write_jsonl,
    "list.json": lambda path: path.write_text(json.dumps(ROWS, indent=2)),
    "lines.json": write_jsonl,
    "rows.csv": lambda path: write_separated(path, ","),
    "rows.tsv": lambda path: write_separated(path, "\t"),
    "rows.parquet": lambda path: parquet.write_table(pa.table(COLUMNS), path, row_group_size=1),
    "stream.arrow": lambda path: write_arrow(path, pa.ipc.new_stream),
    "file.arrow": lambda path: write_arrow(path, pa.ipc.new_file),
    "saved": lambda path: Dataset.from_dict(COLUMNS).save_to_disk(path),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:multiprocess")
@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_rows_and_fingerprint_of_a_dataset_in_memory(name, tmp_path):
    WRITERS[name](tmp_path / name)
    rows = everything(tmp_path / name)
    assert rows.train.to_list() == ROWS
    assert rows.validation is None
    assert (rows.source, rows.revision, rows.license) == (str(tmp_path / name), None, None)
    assert rows.fingerprint == everything(Dataset.from_dict(COLUMNS)).fingerprint


def test_a_text_file_is_one_document_and_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "book.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo")
    assert everything(tmp_path / "book.txt").train.to_list() == [{"text": "one\n\ntwo"}]


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext,label\nx,1\n")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x", "label": 1}\n')
    assert everything(tmp_path / "a.csv").train.to_list() == everything(tmp_path / "a.jsonl").train.to_list()


def test_cells_get_the_type_that_loses_nothing(tmp_path):
    path = write_lines(tmp_path / "a.csv", "code,id,n,x,gap", "007,12345678901234567890,-3,1,", "010,2,4,2.5e3,7")
    assert everything(path).train.to_list() == [
        {"code": "007", "id": "12345678901234567890", "n": -3, "x": 1.0, "gap": None},
        {"code": "010", "id": "2", "n": 4, "x": 2500.0, "gap": 7},
    ]


def test_whole_numbers_and_fractions_nulls_and_absent_keys_go_together_in_jsonl(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"x": 1}, {"x": 0.5, "m": [{"role": "user"}]}, {"x": None}])
    assert [row["x"] for row in everything(path).train] == [1.0, 0.5, None]


def test_a_type_that_changes_after_thousands_of_rows_is_found(tmp_path):
    lines = ['{"x": null, "y": 1}'] * 12_000 + ['{"x": "a", "y": 1}'] * 12_000 + ['{"x": 3, "y": 1}'] * 5
    with pytest.raises(
        DataError, match=r"a\.jsonl:24001: row 24000 .*, column 'x': type changes, string before; found 3"
    ):
        everything(write_lines(tmp_path / "a.jsonl", *lines))


BAD = {
    "broken.jsonl": (
        '{"a": 1}\n\n{"a": 2\n',
        r"broken\.jsonl:3: row 1 \(from 0\): broken JSON, Expecting.*; found \{\"a\": 2; expected one JSON object",
    ),
    "long.jsonl": (
        '{"a": ' + "x" * 500 + "}",
        r"long\.jsonl:1: row 0 \(from 0\): broken JSON, Expecting value; found \{\"a\": x{74}; expected",
    ),
    "kind.jsonl": (
        '{"a": "x"}\n{"a": 1}\n',
        r"kind\.jsonl:2: row 1 .*, column 'a': type changes, string before; found 1; give column 'a' one type",
    ),
    "flag.jsonl": (
        '{"a": 1}\n{"a": true}\n',
        r"flag\.jsonl:2: row 1 .*, column 'a': type changes, int64 before; found true",
    ),
    "inner.jsonl": ('{"a": [{"b": "x"}]}\n{"a": [{"b": 2}]}\n', r"inner\.jsonl:2: .*column 'a': type changes, list"),
    "huge.jsonl": ('{"a": 1}\n{"a": 99999999999999999999}\n', r"huge\.jsonl:2: .*column 'a': .*too large"),
    "half.jsonl": ('{"a": "x"}\n{"a": "\\ud800"}\n', r"half\.jsonl:2: .*column 'a': lone surrogate; found"),
    "list.jsonl": (
        "[1]\n",
        r"list\.jsonl:1: row 0 .*not an object; found \[1\]; write each row as an object \{column: value\}",
    ),
    "deep.jsonl": ("[" * 100_000, r"deep\.jsonl:1: .*broken JSON, nested too deep"),
    "empty.jsonl": ("", r"empty\.jsonl: the file is empty"),
    "blank.jsonl": ("\n\n", r"blank\.jsonl: there are no rows"),
    "none.json": ("[]", r"none\.json: there are no rows"),
    "item.json": ('[{"a": 1},\n 7]', r"item\.json: row 1 \(from 0\): not an object; found 7"),
    "broken.json": ('[{"a": 1},\n {"a": }]', r"broken\.json:2: row 1 \(from 0\): broken JSON"),
    "object.json": ('{\n "a": 1\n}', r"object\.json:1: .*broken JSON.*or one list of objects"),
    "ragged.csv": (
        'a,b\n1,"x\ny"\n3\n',
        r"ragged\.csv:4: row 1 \(from 0\): ragged row, 1 cells, but the header names 2; found 3",
    ),
    "quote.csv": ('a,b\n1,"x"y\n', r"quote\.csv:2: .*each one inside doubled"),
    "open.csv": ('a,b\n1,"x\n', r"open\.csv:2: row 0 \(from 0\): broken quotes, unexpected end of data"),
    "header.csv": ("a,b\n", r"header\.csv:1: no rows, only a header: a, b"),
    "headless.csv": (
        "1,2.5\n3,4\n",
        r"headless\.csv:1: no header, found 1, 2\.5; the first line must name the columns",
    ),
    "twice.tsv": ("a\ta\n1\t2\n", r"twice\.tsv:1: column named twice, a, a"),
    "blank.txt": (" \n", r"blank\.txt: there are no rows"),
    "no.parquet": ("PAR1 but not", r"no\.parquet: cannot be read as parquet: "),
    "no.arrow": ("nothing of it", r"no\.arrow: cannot be read as arrow: "),
    "rows.xlsx": ("x", r"rows\.xlsx: cannot read '\.xlsx' files; there may be: \.jsonl"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_cannot_be_used_is_named_with_its_line(name, tmp_path):
    content, message = BAD[name]
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=re.compile(message, re.DOTALL)) as caught:
        everything(tmp_path / name)
    assert all(len(line) < 500 for line in str(caught.value).split("\n"))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_bytes_that_are_not_utf8_are_named_by_line_and_offset(name, tmp_path):
    (tmp_path / name).write_bytes(b'\xef\xbb\xbf{"a": "x"}\n{"a": "caf\xe9"}\n')
    with pytest.raises(DataError, match=rf"{name}:2: row . \(from 0\): not UTF-8, byte 24 of the file is 0xe9"):
        everything(tmp_path / name)


def books(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"text of {name}")
    return folder


def texts(rows):
    return [text.removeprefix("text of ") for text in rows["text"]]


def test_a_folder_is_split_by_names_and_patterns(tmp_path):
    books(tmp_path, "pg11.txt", "pg31.txt", "pg32.txt", "pg1342.txt", "readme.md")
    rows = everything(tmp_path, train=["pg11.txt", "pg3*.txt"], validation="pg1342.txt")
    assert texts(rows.train) == ["pg11.txt", "pg31.txt", "pg32.txt"]
    assert texts(rows.validation) == ["pg1342.txt"]


def test_by_default_a_folder_gives_what_validation_leaves(tmp_path):
    books(tmp_path, "b.txt", "a.txt", "deep/c.txt", ".hidden/d.txt", "held.txt")
    rows = everything(tmp_path, validation="held.txt")
    assert texts(rows.train) == ["a.txt", "b.txt", "deep/c.txt"]


def test_splits_of_a_folder_are_found_by_stem_and_shard(tmp_path):
    books(tmp_path, "data/train-00000-of-00002.txt", "data/train-00001-of-00002.txt", "validation.txt", "test.txt")
    rows = everything(tmp_path, validation="validation")
    assert len(rows.train) == 2
    assert texts(rows.validation) == ["validation.txt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"train": ["a.txt", "b.txt"], "validation": "b*"},
            r"b\.txt would be in both data\.train and data\.validation",
        ),
        ({"train": "aa.txt"}, r"data\.train: no file 'aa\.txt' \(did you mean 'a\.txt'\?\); there are: a\.txt, b\.txt"),
        ({"validation": "zz"}, r"data\.validation: no file 'zz'; there are"),
        ({"validation": "*"}, r"data\.validation takes every file"),
        ({"subset": "x", "revision": "y"}, r"data\.subset and data\.revision can be used with a Hub data set only"),
    ],
)
def test_a_folder_that_cannot_be_split_as_asked_is_refused(options, message, tmp_path):
    with pytest.raises(DataError, match=message):
        everything(books(tmp_path, "a.txt", "b.txt"), **options)


def test_evaluation_files_are_never_trained_on_by_default(tmp_path):
    with pytest.raises(DataError, match=r"no file named train, and test\.txt would be trained on; name the files"):
        everything(books(tmp_path, "a.txt", "test.txt"))


def test_files_of_a_folder_must_belong_together(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    write_jsonl(tmp_path / "b.jsonl", [{"body": "x"}])
    with pytest.raises(DataError, match=r"b\.jsonl: the columns are body, but text in .*a\.jsonl"):
        everything(tmp_path)
    write_jsonl(tmp_path / "b.jsonl", [{"text": 3}])
    with pytest.raises(DataError, match="do not hold the same types"):
        everything(tmp_path)


def test_an_empty_folder_and_a_broken_saved_one_are_refused(tmp_path):
    with pytest.raises(DataError, match="no files that can be read"):
        everything(tmp_path)
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(DataError, match="save_to_disk that cannot be read"):
        everything(tmp_path)


def test_a_path_that_is_not_there_brings_the_nearest_name(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"no file or folder .*trian\.jsonl \(did you mean '.*/train\.jsonl'\?\)"):
        everything(tmp_path / "trian.jsonl")
    for source in ("./nowhere", "../nowhere", "a/b/c", "rows.csv"):
        with pytest.raises(DataError, match="no file or folder"):
            everything(source)


def number(count):
    return Dataset.from_dict({"n": list(range(count))})


@pytest.mark.filterwarnings("ignore::DeprecationWarning:multiprocess")
def test_splits_of_a_dictionary_are_taken_by_name_in_memory_and_from_disk(tmp_path):
    splits = DatasetDict(train=number(5), extra=number(3), test=number(2))
    splits.save_to_disk(tmp_path / "saved")
    for source in (splits, tmp_path / "saved"):
        rows = everything(source, train=["train", "extra"], validation="test")
        assert (len(rows.train), len(rows.validation)) == (8, 2)
    assert everything(splits).source == "<DatasetDict in memory>"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"validation": "validate"},
            r"no split 'validate' \(did you mean 'validation'\?\); there are: train, validation",
        ),
        ({"train": "train", "validation": "train"}, "split train stands in both"),
        ({"train": ["train", "other"]}, "do not have the same columns"),
        ({"train": "empty"}, r"\(train\): there are no rows"),
    ],
)
def test_splits_that_cannot_be_taken_are_refused(options, message):
    other, empty = Dataset.from_dict({"n": ["text"]}), Dataset.from_dict({"n": []})
    with pytest.raises(DataError, match=message):
        everything(DatasetDict(train=number(2), validation=number(2), other=other, empty=empty), **options)


def test_held_out_rows_are_none_of_the_training_rows_and_none_is_lost():
    rows = read(Data(source=number(1000), holdout=0.1), seed=3)
    train, held = set(rows.train["n"]), set(rows.validation["n"])
    assert len(held) == 100
    assert train.isdisjoint(held)
    assert train | held == set(range(1000))


def test_rows_of_equal_value_are_held_out_together_until_the_share_is_reached():
    sizes = [1, 2, 3, 4, 5, 6, 7, 12]
    topics = [topic for topic, size in enumerate(sizes) for _ in range(size)]
    source = Dataset.from_dict({"topic": [f"about {topic}" for topic in topics], "n": range(40)})
    rows = read(Data(source=source, holdout=0.25, holdout_by="topic"), seed=3)
    held, kept = set(rows.validation["topic"]), set(rows.train["topic"])
    assert len(held) + len(kept) == len(sizes)
    assert sorted([*rows.train["n"], *rows.validation["n"]]) == list(range(40))
    assert 10 <= len(rows.validation) < 10 + max(sizes)
    shared = read(Data(source=source, holdout=0.25, holdout_by="topic"), seed=4)
    assert set(shared.validation["topic"]) != held
    alone = read(Data(source=source.select(range(3, 6)), holdout_by="topic"), seed=0)
    assert alone.validation is None
    with pytest.raises(DataError, match=r"data.holdout_by: no column 'topics' .did you mean 'topic'"):
        read(Data(source=source, holdout_by="topics"), seed=0)
    with pytest.raises(ValueError, match="holdout_by does nothing where no training rows are held out"):
        Data(source=source, holdout_by="topic", holdout=0.0)


def test_what_is_held_out_depends_on_the_seed_alone():
    first, again, other = (set(read(Data(source=number(1000)), seed=seed).validation["n"]) for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize(("count", "holdout", "held"), [(2, 0.01, 1), (2, 0.99, 1), (1, 0.5, 0), (10, 0.0, 0)])
def test_at_least_one_row_is_held_out_and_one_is_left(count, holdout, held):
    rows = read(Data(source=number(count), holdout=holdout), seed=0)
    assert len(rows.validation or ()) == held
    assert len(rows.train) == count - held


def test_a_limit_takes_shuffled_rows_and_a_smaller_one_is_part_of_it():
    def limited(count):
        return read(Data(source=number(1000), limit=Limit(train=count, validation=5)), seed=0)

    few, more = limited(50), limited(100)
    assert few.train["n"][:] == more.train["n"][:50]
    assert np.mean(few.train["n"]) > 200
    assert len(few.validation) == 5
    assert set(more.train["n"]).isdisjoint(more.validation["n"])
    assert few.fingerprint != more.fingerprint


def test_both_splits_are_renamed_and_formats_are_taken_off():
    rows = read(Data(source=number(10).with_format("numpy"), columns={"label": "n"}), seed=0)
    assert rows.train.column_names == rows.validation.column_names == ["label"]
    assert isinstance(rows.train[0]["label"], int)


def test_declared_features_of_a_dataset_survive():
    features = Features({"messages": List({"role": Value("string"), "content": Value("string")})})
    rows = Dataset.from_list([{"messages": [{"role": "user", "content": "x"}]}], features=features)
    assert everything(rows).train.features == features


@pytest.fixture
def hub(monkeypatch):
    """Serve one answer to every request, as the Hub would; set `answer` to (status, headers, body)."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append((self.path, self.headers.get("Authorization")))
            status, headers, body = server.answer
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen = seen
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


REFUSALS = {
    "unknown": (404, {"X-Error-Code": "RepoNotFound"}, AccessError, "not on the Hub"),
    "no token": (401, {}, AccessError, "missing, wrong or expired"),
    "bad token": (
        401,
        {"X-Error-Message": "Invalid credentials in Authorization header"},
        AccessError,
        "missing, wrong or expired",
    ),
    "gated": (
        403,
        {"X-Error-Code": "GatedRepo"},
        AccessError,
        "gated; accept its terms at https://huggingface.co/datasets",
    ),
    "revision": (404, {"X-Error-Code": "RevisionNotFound"}, AccessError, "no revision 'main'"),
    "down": (503, {}, AccessError, "the Hub answered 503"),
    "portal": (200, {}, AccessError, "cannot be reached"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_of_the_hub_is_quick_clear_and_never_shows_the_token(name, hub):
    status, headers, kind, message = REFUSALS[name]
    hub.answer = (status, headers, b"<html>")
    began = time.monotonic()
    with pytest.raises(kind, match=message) as caught:
        everything("someone/data")
    assert time.monotonic() - began < 5
    assert hub.seen == [("/api/datasets/someone/data/revision/main", "Bearer hf_secretsecret")]
    assert "secret" not in str(caught.value)


def test_a_data_set_made_by_a_script_is_refused_before_anything_is_fetched(hub):
    siblings = [{"rfilename": "README.md"}, {"rfilename": "data.py"}]
    hub.answer = (200, {}, json.dumps({"id": "someone/data", "sha": "0" * 40, "siblings": siblings}).encode())
    with pytest.raises(DataError, match=r"scripts are never run; .*data\.revision: refs/convert/parquet"):
        everything("someone/data")
    assert len(hub.seen) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning:multiprocess")
@pytest.mark.parametrize(("licence", "words"), [("mit", "mit"), (["mit", "cc0-1.0"], "mit, cc0-1.0"), (None, None)])
def test_a_data_set_of_the_hub_brings_its_commit_and_licence(licence, words, hub, monkeypatch, tmp_path):
    write_jsonl(tmp_path / "a.jsonl")
    files = {"train": str(tmp_path / "a.jsonl"), "dev": str(tmp_path / "a.jsonl")}
    builder = load_dataset_builder("json", data_files=files, cache_dir=str(tmp_path / "cache"))
    asked = []

    def stored(name, subset, revision):
        asked.append((name, subset, revision))
        return builder

    monkeypatch.setattr("datasets.load_dataset_builder", stored)
    card = {"license": licence} if licence else None
    hub.answer = (200, {}, json.dumps({"id": "someone/data", "sha": "a" * 40, "cardData": card}).encode())
    rows = everything("someone/data", subset="small", validation="dev")
    assert asked == [("someone/data", "small", "a" * 40)]
    assert (rows.revision, rows.license, rows.subset) == ("a" * 40, words, "small")
    assert rows.train.to_list() == rows.validation.to_list() == ROWS


def test_a_subset_the_hub_does_not_have_is_a_data_error_with_those_there_are(hub, monkeypatch):
    def unknown(name, subset, revision):
        raise ValueError(f"BuilderConfig '{subset}' not found. Available: ['big']")

    monkeypatch.setattr("datasets.load_dataset_builder", unknown)
    hub.answer = (200, {}, json.dumps({"id": "someone/data", "sha": "a" * 40}).encode())
    with pytest.raises(DataError, match=r"subset bog: .*Available: \['big'\]"):
        everything("someone/data", subset="bog")


def test_a_hub_that_is_not_there_and_a_token_with_a_newline_are_quick_errors(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(AccessError, match=r"cannot be reached \(ConnectError\)"):
        everything("someone/data")
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: "hf_secret\nsecret")
    with pytest.raises(AccessError) as caught:
        everything("someone/data")
    assert "secret" not in str(caught.value)


def test_a_name_that_is_neither_a_path_nor_a_hub_name_is_refused(hub):
    with pytest.raises(DataError, match="neither an existing file or folder nor a Hub name"):
        everything("not a name!")


@pytest.mark.filterwarnings("ignore")
def test_offline_and_not_in_the_cache_is_said_quickly(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    began = time.monotonic()
    with pytest.raises(AccessError, match="cannot be fetched and is not in the cache"):
        everything("someone/data")
    assert time.monotonic() - began < 5
