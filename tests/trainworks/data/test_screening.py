"""Rows that a check refuses: where they stand, and what is left without them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from trainworks.data.bad_rows import BadRow, BadRowsError
from trainworks.data.columns import require_columns
from trainworks.data.screening import screened, told
from trainworks.data.sources import Rows, read
from trainworks.errors import DataError
from trainworks.reading import Data

NUMBERS = range(60)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRAINWORKS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return a file whose every tenth row is null, absent in turn, and whose first line is broken."""
    rows: list[dict[str, Any]] = [{"text": f"row {number}", "n": number} for number in NUMBERS]
    for number in NUMBERS[::10]:
        rows[number]["text"] = None
    for number in NUMBERS[5::10]:
        del rows[number]["text"]
    file = tmp_path / "rows.jsonl"
    file.write_text("{\n" + "".join(f"{json.dumps(row)}\n" for row in rows))
    return file


def rows_of(path: Path, policy: str) -> Rows:
    return read(Data(source=str(path), holdout=0.3, bad_rows=policy), seed=1)


def is_text(rows: Dataset) -> str:
    require_columns(rows, {"text": "text"}, source="here")
    return "all text"


def test_rows_are_named_as_they_stand_in_the_file_though_others_were_held_out(path: Path) -> None:
    path.write_text(path.read_text().removeprefix("{\n"))
    rows = rows_of(path, "error")
    wrong = [number for number in rows.train["n"] if number % 5 == 0]
    with pytest.raises(BadRowsError) as caught:
        screened(rows, "train", is_text)
    places = [(problem.file, problem.row, problem.line) for problem in caught.value.problems]
    assert places == [(str(path), number, number + 1) for number in wrong]


def test_rows_that_are_refused_are_left_out_of_their_split_and_counted(path: Path) -> None:
    rows = rows_of(path, "skip")
    wrong = [number for number in rows.train["n"] if number % 5 == 0]
    kept, said = screened(rows, "train", is_text)
    assert said == "all text"
    assert kept.train["n"][:] == [number for number in rows.train["n"] if number % 5]
    assert kept.validation is rows.validation
    assert kept.dropped == {"train": {"broken JSON": 1, "null text": len(wrong)}}
    assert kept.fingerprint != rows.fingerprint
    place = kept.origins["train"].at(3)
    assert place.row == kept.train["n"][3] + 1, "after the broken first line"
    both, _ = screened(kept, "validation", is_text)
    assert len(both.train) + len(both.validation or ()) == 48


def test_rows_that_are_refused_are_listed_beside_those_of_the_file(path: Path, cache: Path) -> None:
    rows = rows_of(path, "quarantine")
    for split in rows.splits:
        rows, _ = screened(rows, split, is_text)
    assert len(rows.listings) == 3
    listed = [json.loads(line) for file in rows.listings for line in file.read_text().splitlines()]
    assert {listing.parent for listing in rows.listings} == {cache / "quarantine"}
    assert sorted(row["row"] for row in listed) == [0, *range(1, 61, 5)]
    assert {row["file"] for row in listed} == {str(path)}
    skipped, _ = screened(rows_of(path, "skip"), "train", is_text)
    assert skipped.listings == (), "the list of an earlier run is not this one's"


def test_rows_of_a_source_without_files_are_known_by_their_number_in_it() -> None:
    source = Dataset.from_dict({"text": ["a", "b", None, "d"] * 5})
    rows = read(Data(source=source, holdout=0.5), seed=0)
    with pytest.raises(BadRowsError) as caught:
        screened(rows, "train", is_text)
    assert {problem.file for problem in caught.value.problems} == {"<Dataset in memory> (train)"}
    assert {(problem.row or 0) % 4 for problem in caught.value.problems} == {2}


@pytest.mark.parametrize("policy", ["error", "skip", "quarantine"])
def test_a_split_of_which_nothing_is_left_is_refused_under_every_policy(policy: str) -> None:
    rows = read(Data(source=Dataset.from_dict({"n": [1, 2]}), holdout=0, bad_rows=policy), seed=0)

    def refuse(part: Dataset) -> None:
        raise BadRowsError([BadRow("odd", "make it even", row=row) for row in range(len(part))])

    with pytest.raises(BadRowsError, match=r"row 1 .*odd; make it even"):
        screened(rows, "train", refuse)


@pytest.mark.parametrize("policy", ["error", "skip", "quarantine"])
def test_what_is_wrong_with_no_row_in_particular_is_never_skipped(policy: str) -> None:
    rows = read(Data(source=Dataset.from_dict({"n": [1, 2]}), holdout=0, bad_rows=policy), seed=0)
    with pytest.raises(DataError, match="no column 'text'"):
        screened(rows, "train", partial(require_columns, wanted={"text": "text"}, source="here"))

    def refuse(part: Dataset) -> None:
        raise BadRowsError([BadRow("odd as a whole", "take another")])

    with pytest.raises(BadRowsError, match="odd as a whole"):
        screened(rows, "train", refuse)


@pytest.mark.parametrize("policy", ["skip", "quarantine"])
def test_what_preparation_refuses_is_counted_and_listed_by_its_place_in_the_file(path: Path, policy: str) -> None:
    path.write_text(path.read_text().removeprefix("{\n"))
    rows = rows_of(path, policy)
    refused = [BadRow("too long", "shorten it", row=row, column="text") for row in (3, 5)]
    again, counts = told(rows, "train", refused)
    assert counts == {"too long": 2}
    assert again.dropped == rows.dropped, "they are still among the rows"
    listed = [json.loads(line) for file in again.listings for line in file.read_text().splitlines()]
    numbers = [rows.train["n"][row] for row in (3, 5)] if policy == "quarantine" else []
    assert [row["row"] for row in listed] == numbers
    assert told(rows, "train", ()) == (rows, {})


def test_what_preparation_refuses_ends_a_run_that_leaves_nothing_out(path: Path) -> None:
    path.write_text(path.read_text().removeprefix("{\n"))
    rows = rows_of(path, "error")
    number = rows.train["n"][4]
    with pytest.raises(BadRowsError, match=rf"rows\.jsonl:{number + 1}: row {number} .*too long"):
        told(rows, "train", [BadRow("too long", "shorten it", row=4)])
