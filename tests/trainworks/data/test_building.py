"""Samples do not depend on how many processes made them, nor on how often they were interrupted."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset

from trainworks.data import building
from trainworks.data.bad_rows import BadRow, BadRowsError
from trainworks.data.building import build
from trainworks.data.cache import Prepared, folder, ragged, table
from trainworks.errors import DataError

ROWS = [f"row {number} " * random.Random(number).randint(1, 9) for number in range(101)]


def rows() -> Dataset:
    return Dataset.from_dict({"text": ROWS})


def prepare(rows: Dataset, *, first: int, seconds: float = 0.0) -> Prepared:
    """Keep the even rows, say how many are left out, and refuse one by its number in the whole."""
    time.sleep(seconds)
    numbers = [first + place for place in range(len(rows))]
    for number, text in zip(numbers, rows["text"], strict=True):
        if text == "broken":
            raise DataError(f"row {number}: broken")
    kept = [(number, text) for number, text in zip(numbers, rows["text"], strict=True) if number % 2 == 0]
    lengths = pa.array([len(text) for _, text in kept], pa.int64())
    columns = {"number": pa.array([number for number, _ in kept], pa.int64()), "length": lengths}
    return Prepared(table(columns), {"odd": len(rows) - len(kept)})


def as_they_are(samples: Dataset) -> None:
    return None


def in_pairs(samples: Dataset) -> Iterator[pa.Table]:
    numbers = samples["number"][:]
    for start in range(0, len(numbers), 2):
        yield pa.table({"pair": [numbers[start : start + 2]]})


@pytest.fixture(autouse=True)
def small_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINWORKS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(building, "_SHARD_ROWS", 7)


def files() -> dict[str, bytes]:
    return {
        str(path.relative_to(folder())): path.read_bytes()
        for path in folder().rglob("*")
        if path.is_file() and not path.name.endswith(".lock")
    }


def test_every_row_is_prepared_once_and_what_is_left_out_is_counted() -> None:
    prepared = build("key", rows(), prepare, as_they_are, workers=1)
    assert prepared.samples["number"][:] == list(range(0, 101, 2))
    assert prepared.dropped == {"odd": 50}


@pytest.mark.parametrize("arrange", [as_they_are, in_pairs])
def test_any_number_of_processes_writes_the_same_bytes(arrange: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    build("key", rows(), prepare, arrange, workers=1)
    alone = files()
    assert len(alone) > 1

    monkeypatch.setenv("TRAINWORKS_CACHE", str(folder()) + "-spread")
    monkeypatch.setattr(building, "_ALONE_SECONDS", 0.0)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    module = __import__("test_building")
    build("key", rows(), module.prepare, arrange, workers=2)
    assert files() == alone


def test_what_is_there_is_not_prepared_again() -> None:
    calls = []

    def counted(rows: Dataset, *, first: int) -> Prepared:
        calls.append(first)
        return prepare(rows, first=first)

    first = build("key", rows(), counted, in_pairs, workers=1)
    again = build("key", rows(), counted, in_pairs, workers=1)
    assert calls == list(range(0, 101, 7))
    assert again.samples["pair"][:] == first.samples["pair"][:] == [[n, n + 2] for n in range(0, 100, 4)] + [[100]]


def test_finished_shards_are_not_done_again_after_an_interruption() -> None:
    seen = []

    def interrupted(rows: Dataset, *, first: int) -> Prepared:
        if len(seen) == 5:
            raise KeyboardInterrupt
        seen.append(first)
        return prepare(rows, first=first)

    with pytest.raises(KeyboardInterrupt):
        build("key", rows(), interrupted, as_they_are, workers=1)
    seen.append(-1)
    prepared = build("key", rows(), interrupted, as_they_are, workers=1)
    assert seen[:5] == [0, 7, 14, 21, 28]
    assert sorted(seen[6:]) == list(range(35, 101, 7))
    assert prepared.samples["number"][:] == list(range(0, 101, 2))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_row_is_refused_by_its_number_in_the_whole(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = list(ROWS)
    texts[66] = texts[90] = "broken"
    monkeypatch.setattr(building, "_ALONE_SECONDS", 0.0)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    module = __import__("test_building")
    with pytest.raises(DataError, match=r"^row 66: broken$"):
        build("key", Dataset.from_dict({"text": texts}), module.prepare, as_they_are, workers=workers)
    assert not (folder() / "prepared" / "key").exists()


def test_samples_are_mapped_into_memory_not_read() -> None:
    prepared = build("key", rows(), prepare, as_they_are, workers=1)
    assert prepared.samples.cache_files


KILLED = """
import sys
sys.path.insert(0, sys.argv[1])
import test_building as test
from functools import partial
from trainworks.data import building
building._SHARD_ROWS, building._ALONE_SECONDS = 7, 0.2
building.build("key", test.rows(), partial(test.prepare, seconds=0.2), test.in_pairs, workers=2)
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_preparation_killed_at_any_moment_ends_in_the_same_bytes(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    build("key", rows(), prepare, in_pairs, workers=1)
    undisturbed = files()
    monkeypatch.setenv("TRAINWORKS_CACHE", str(folder()) + "-killed")
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent)]
    draw, kills = random.Random(seed), 0
    while True:
        process = subprocess.Popen(command, start_new_session=True)
        # Beginning takes a second or more and the work two more; the moment is drawn over both.
        try:
            code = process.wait(timeout=draw.uniform(0.3, 2.0 + kills) if kills < 4 else 120.0)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            continue
        assert code == 0
        break
    assert kills, "it ended before the first kill"
    assert files() == undisturbed


def picky(rows: Dataset, *, first: int) -> Prepared:
    """Refuse the texts that are broken, one at a time."""
    for place, text in enumerate(rows["text"]):
        if text == "broken":
            raise BadRowsError([BadRow("broken", "mend it", row=first + place)])
    return prepare(rows, first=first)


@pytest.mark.parametrize("workers", [1, 2])
def test_rows_that_may_be_left_out_are_told_by_their_numbers(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = list(ROWS)
    for number in (20, 21, 66):
        texts[number] = "broken"
    monkeypatch.setattr(building, "_ALONE_SECONDS", 0.0)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    module = __import__("test_building")
    rows = Dataset.from_dict({"text": texts})
    with pytest.raises(BadRowsError) as caught:
        build("key", rows, module.picky, as_they_are, workers=workers)
    assert [problem.row for problem in caught.value.problems] == [20], "one comes whole out of a worker"
    for _ in range(2):  # made, and found
        prepared = build("key", rows, module.picky, as_they_are, workers=workers, lenient=True)
        assert [problem.row for problem in prepared.refused] == [20, 21, 66]
        assert sum(prepared.dropped.values()) + len(prepared.samples) == len(texts) - 3


def test_rows_without_any_value_make_a_column_of_the_kind_asked_for() -> None:
    column = ragged([[], []], np.int32)
    assert (column.to_pylist(), column.type.value_type) == ([[], []], pa.int32())
