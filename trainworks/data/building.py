"""Rows to samples, a shard at a time and on every core, kept by content: what was interrupted goes on where it was.

prepared/KEY/                the finished samples: Arrow streams, and done.json, which names them in order
prepared/.KEY.partial/       while it is made: a shard of rows is done once its shard-00000.json is there
prepared/.KEY.lock           held by the process that makes it; others wait for the file, not in a collective
"""

from __future__ import annotations

import base64
import json
import os
import pickle
import select
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from trainworks.data.bad_rows import BadRow, BadRowsError
from trainworks.data.cache import Prepared, folder, once, opened
from trainworks.data.workers import Worker, requests
from trainworks.errors import DataError
from trainworks.record import write_json

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

__all__ = ["Prepare", "build", "work"]

_DONE = "done.json"
_SHARD_BYTES = 2**20, 2**26
_SHARDS = 4_096
_SHARD_ROWS = 5_000
_ALONE_SECONDS = 4.0
"""Work that this process does itself before it starts others, which take some seconds to begin."""


class Prepare(Protocol):
    """Turn a part of a split into samples; `first` is the number of its first row in the split, for messages."""

    def __call__(self, rows: Dataset, *, first: int) -> Prepared: ...


Arrange = Callable[["Dataset"], "Iterator[pyarrow.Table] | None"]


def build(
    key: str,
    rows: Dataset,
    prepare: Prepare,
    arrange: Arrange,
    *,
    workers: int,
    lenient: bool = False,
    name: str = "rows",
) -> Prepared:
    """Return the samples that `prepare` makes of `rows`, and `arrange` of those, from disk where they are there.

    They are mapped into memory, not read. `key` stands for everything that decides them. Any process may call it, any
    number at once: one works and the others wait for it. A process that is killed leaves the shards it finished. The
    samples do not depend on `workers`. DataError of the first rows, by number, that `prepare` refuses; when `lenient`,
    those that it refuses by a BadRowsError are left out instead, and told.
    """
    place = folder() / "prepared" / key

    def make() -> None:
        partial = place.with_name(f".{key}.partial")
        if not (partial / _DONE).exists():
            _build(partial, rows, _Preparer(prepare, lenient), arrange, workers=workers, name=name)
        kept = {_DONE, *_read(partial / _DONE)["samples"]}
        for path in partial.iterdir():
            if path.name not in kept:
                path.unlink()
        partial.rename(place)

    once(place, make)
    done = _read(place / _DONE)
    refused = tuple(BadRow(**problem) for problem in done["refused"])
    return Prepared(opened([place / name for name in done["samples"]], key), done["dropped"], refused)


def _build(partial: Path, rows: Dataset, prepare: _Preparer, arrange: Arrange, *, workers: int, name: str) -> None:
    partial.mkdir(exist_ok=True)
    size = _shard_size(rows)
    starts = range(0, len(rows), size)
    shards = [_Shard(partial, number, start) for number, start in enumerate(starts)]
    _fill(shards, rows, size, prepare, workers=workers, name=name)
    dropped: Counter[str] = Counter()
    refused: list[Any] = []
    for note in (_read(shard.note) for shard in shards):
        dropped.update(note["dropped"])
        refused += note["refused"]
    samples = [shard.samples for shard in shards]
    if (tables := arrange(opened(samples, partial.name))) is not None:
        samples = [_written(partial / "arranged.arrow", tables)]
    left_out = {reason: count for reason, count in dropped.items() if count}
    done = {"samples": [path.name for path in samples], "dropped": left_out, "refused": refused}
    write_json(partial / _DONE, done)


def _read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def _shard_size(rows: Dataset) -> int:
    """Return how many rows make a shard; it does not depend on the number of workers."""
    row_bytes: int = max(1, rows.data.nbytes // max(1, len(rows.data)))
    least, most = _SHARD_BYTES
    shard_bytes = min(most, max(least, row_bytes * len(rows) // _SHARDS))
    return max(1, min(max(_SHARD_ROWS, len(rows) // _SHARDS), shard_bytes // row_bytes))


class _Shard:
    """A part of the rows on its way: `.rows.arrow` for a worker to read, then `.arrow`, then `.json` once it is
    whole."""

    def __init__(self, partial: Path, number: int, first: int) -> None:
        self.first = first
        self.rows = partial / f"shard-{number:05d}.rows.arrow"
        self.samples = partial / f"shard-{number:05d}.arrow"
        self.note = partial / f"shard-{number:05d}.json"

    def fill(self, rows: Dataset, prepare: _Preparer) -> None:
        """Prepare the rows and write the samples; DataError when they are refused."""
        prepared = prepare(rows, self.first)
        _written(self.samples, [_arrow(prepared.samples)])
        note = {"dropped": prepared.dropped, "refused": [asdict(problem) for problem in prepared.refused]}
        write_json(self.note, note)


@dataclass(frozen=True)
class _Preparer:
    """What makes samples of a shard's rows, without those that cannot be used where they may be left out."""

    prepare: Prepare
    lenient: bool

    def __call__(self, rows: Dataset, first: int) -> Prepared:
        numbers = np.arange(first, first + len(rows))
        refused: list[BadRow] = []
        while True:
            try:
                prepared = self.prepare(rows.select(numbers - first), first=first)
            except BadRowsError as error:
                found = [replace(problem, row=int(numbers[problem.row - first])) for problem in _numbered(error)]
                if not self.lenient:
                    raise BadRowsError(found) from error
                refused += found
                numbers = np.setdiff1d(numbers, [problem.row for problem in found])
            else:
                return replace(prepared, refused=(*prepared.refused, *refused))


def _numbered(error: BadRowsError) -> Iterator[Any]:
    """Yield the problems of an error, each of which names a row."""
    for problem in error.problems:
        if problem.row is None:
            raise error
        yield problem


def _fill(shards: Iterable[_Shard], rows: Dataset, size: int, prepare: _Preparer, *, workers: int, name: str) -> None:
    """Do the shards that are not done: this process alone for some seconds and until the workers have begun, then
    they."""
    from tqdm.auto import tqdm

    shards = list(shards)
    todo = [shard for shard in shards if not shard.note.exists()]
    done = sum(min(size, len(rows) - shard.first) for shard in shards if shard.note.exists())
    quiet = not sys.stderr.isatty() and "ipykernel.zmqshell" not in sys.modules

    def part(shard: _Shard) -> Dataset:
        return rows.select(range(shard.first, min(shard.first + size, len(rows))))

    bar = tqdm(total=len(rows), initial=done, unit="row", desc=name, delay=2, leave=False, disable=quiet)
    with bar, _Workers(prepare, workers) as helpers:
        while todo and not helpers.ready():
            shard = todo.pop(0)
            shard.fill(part(shard), prepare)
            bar.update(len(part(shard)))
        for count in helpers.do(todo, part):
            bar.update(count)


class _Workers:
    """Processes that do shards; begun once there is work for them."""

    def __init__(self, prepare: _Preparer, number: int) -> None:
        self._prepare, self._number, self._begun = prepare, number, time.monotonic()
        self._workers: list[Worker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.close()

    def ready(self) -> bool:
        """Tell whether all can take work; the first call after some seconds begins them."""
        if self._number == 1 or time.monotonic() - self._begun < _ALONE_SECONDS:
            return False
        if not self._workers:
            self._workers = [Worker("trainworks.data.preparing_worker") for _ in range(self._number)]
            for worker in self._workers:
                worker.send(_packed(self._prepare))
        answered, _, _ = select.select(self._workers, [], [], 0)
        return len(answered) == self._number

    def do(self, todo: list[_Shard], part: Callable[[_Shard], Dataset]) -> Iterator[int]:
        """Yield the number of rows of each shard, in turn, once it is done."""
        if not todo:
            return
        idle: SimpleQueue[Worker] = SimpleQueue()
        for worker in self._workers:
            worker.receive()
            idle.put(worker)

        def one(shard: _Shard) -> int:
            rows, worker = part(shard), idle.get()
            try:
                _written(shard.rows, [_arrow(rows)])
                _ask(worker, shard)
                shard.rows.unlink()
            finally:
                idle.put(worker)
            return len(rows)

        with ThreadPoolExecutor(self._number) as threads:
            results = [threads.submit(one, shard) for shard in todo]
            try:
                for result in results:
                    yield result.result()
            finally:
                for result in results:
                    result.cancel()


def _packed(value: Any) -> str:
    return base64.b64encode(pickle.dumps(value)).decode()


def _unpacked(text: str) -> Any:
    return pickle.loads(base64.b64decode(text))


def _ask(worker: Worker, shard: _Shard) -> None:
    answer = worker.ask(
        {"first": shard.first, "rows": str(shard.rows), "samples": str(shard.samples), "note": str(shard.note)}
    )
    if answer is None:
        raise DataError(
            f"the process that prepared the rows from {shard.first:,} on ended with code {worker.code()} (-9: killed, "
            "as when memory runs out); the same command goes on, with a lower data.prepare_workers if need be"
        )
    if answer["refused"]:
        refused: DataError = _unpacked(answer["refused"])
        raise refused


def work() -> None:
    """Do what the process that builds asks, in a worker; the first request is how rows are prepared."""
    asked = requests()
    job, answer = next(asked)
    prepare: _Preparer = _unpacked(job)
    answer("ready")
    for request, answer in asked:
        shard = _Shard(Path(), 0, request["first"])
        shard.rows, shard.samples, shard.note = (Path(request[name]) for name in ("rows", "samples", "note"))
        refused = None
        try:
            shard.fill(opened([shard.rows], "rows"), prepare)
        except DataError as error:
            refused = _packed(error)
        answer({"refused": refused})


def _arrow(rows: Dataset) -> pyarrow.Table:
    """Return the rows as an Arrow table whose schema holds the features, class names among them."""
    table = rows.with_format("arrow")[:]
    return table.cast(rows.features.arrow_schema)


def _written(path: Path, parts: Iterable[pyarrow.Table]) -> Path:
    """Write tables of one schema as an Arrow stream, which appears under its name once it is whole."""
    import pyarrow

    staged = path.with_name(f"{path.name}.{os.getpid()}.staged")  # a killed process's worker may still be writing
    writer = None
    with pyarrow.OSFile(str(staged), "wb") as file:
        for part in parts:
            writer = writer or pyarrow.ipc.new_stream(file, part.schema)
            writer.write_table(part)
        assert writer is not None, "a data set without rows is refused before it is prepared"
        writer.close()
    staged.rename(path)
    return path
