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
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from trainworks.data.cache import Prepared, folder
from trainworks.errors import DataError
from trainworks.record import write_json

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

__all__ = ["Prepare", "build"]

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


def build(key: str, rows: Dataset, prepare: Prepare, arrange: Arrange, *, workers: int, name: str = "rows") -> Prepared:
    """Return the samples that `prepare` makes of `rows`, and `arrange` of those, from disk where they are there.

    They are mapped into memory, not read. `key` stands for everything that decides them. Any process may call it, any
    number at once: one works and the others wait for it. A process that is killed leaves the shards it finished. The
    samples do not depend on `workers`. DataError of the first row, by number, that `prepare` refuses.
    """
    from filelock import FileLock

    place = folder() / "prepared" / key
    place.parent.mkdir(parents=True, exist_ok=True)
    if not place.exists():
        with FileLock(place.with_name(f".{key}.lock")):
            if not place.exists():
                partial = place.with_name(f".{key}.partial")
                if not (partial / _DONE).exists():
                    _build(partial, rows, prepare, arrange, workers=workers, name=name)
                kept = {_DONE, *_read(partial / _DONE)["samples"]}
                for path in partial.iterdir():
                    if path.name not in kept:
                        path.unlink()
                partial.rename(place)
    done = _read(place / _DONE)
    return Prepared(_opened([place / name for name in done["samples"]], key), done["dropped"])


def _build(partial: Path, rows: Dataset, prepare: Prepare, arrange: Arrange, *, workers: int, name: str) -> None:
    partial.mkdir(exist_ok=True)
    size = _shard_size(rows)
    starts = range(0, len(rows), size)
    shards = [_Shard(partial, number, start) for number, start in enumerate(starts)]
    _fill(shards, rows, size, prepare, workers=workers, name=name)
    dropped: Counter[str] = Counter()
    for shard in shards:
        dropped.update(_read(shard.note))
    samples = [shard.samples for shard in shards]
    if (tables := arrange(_opened(samples, partial.name))) is not None:
        samples = [_written(partial / "arranged.arrow", tables)]
    left_out = {reason: count for reason, count in dropped.items() if count}
    write_json(partial / _DONE, {"samples": [path.name for path in samples], "dropped": left_out})


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

    def fill(self, rows: Dataset, prepare: Prepare) -> None:
        """Prepare the rows and write the samples; DataError when they are refused."""
        prepared = prepare(rows, first=self.first)
        _written(self.samples, [_arrow(prepared.samples)])
        write_json(self.note, prepared.dropped)


def _fill(shards: Iterable[_Shard], rows: Dataset, size: int, prepare: Prepare, *, workers: int, name: str) -> None:
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
    """Processes that do shards; begun once there is work for them.

    They are plain subprocesses: multiprocessing's would import the caller's script again, and a fork of a process with
    threads or a GPU can hang.
    """

    def __init__(self, prepare: Prepare, number: int) -> None:
        self._prepare, self._number, self._begun = prepare, number, time.monotonic()
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()  # closes the pipes, too

    def ready(self) -> bool:
        """Tell whether all can take work; the first calls after some seconds begin them."""
        if self._number == 1 or time.monotonic() - self._begun < _ALONE_SECONDS:
            return False
        if not self._processes:
            job = pickle.dumps(self._prepare)
            self._processes = [_start(job) for _ in range(self._number)]
        answered, _, _ = select.select([process.stdout for process in self._processes if process.stdout], [], [], 0)
        return len(answered) == self._number  # each says so once it has begun

    def do(self, todo: list[_Shard], part: Callable[[_Shard], Dataset]) -> Iterator[int]:
        """Yield the number of rows of each shard, in turn, once it is done."""
        if not todo:
            return
        idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        for process in self._processes:
            _line(process)
            idle.put(process)

        def one(shard: _Shard) -> int:
            rows, process = part(shard), idle.get()
            try:
                _written(shard.rows, [_arrow(rows)])
                _ask(process, shard)
                shard.rows.unlink()
            finally:
                idle.put(process)
            return len(rows)

        with ThreadPoolExecutor(self._number) as threads:
            results = [threads.submit(one, shard) for shard in todo]
            try:
                for result in results:
                    yield result.result()
            finally:
                for result in results:
                    result.cancel()


def _start(job: bytes) -> subprocess.Popen[bytes]:
    # Where modules come from may be this process's own doing (a notebook's folder, `python -m`), so it is passed on.
    environment = os.environ | {
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    assert process.stdin
    process.stdin.write(len(job).to_bytes(8, "little") + job)
    process.stdin.flush()
    return process


def _ask(process: subprocess.Popen[bytes], shard: _Shard) -> None:
    assert process.stdin
    request = {"first": shard.first, "rows": str(shard.rows), "samples": str(shard.samples), "note": str(shard.note)}
    try:
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        answer = _line(process)
    except BrokenPipeError:
        answer = None
    if answer is None:
        raise DataError(
            f"the process that prepared the rows from {shard.first:,} on ended with code {process.wait()} (-9: killed, "
            "as when memory runs out); the same command goes on, with a lower data.prepare_workers if need be"
        )
    if answer["refused"]:
        refused: DataError = pickle.loads(base64.b64decode(answer["refused"]))
        raise refused


def _line(process: subprocess.Popen[bytes]) -> Any:
    """Return what a worker says, or None when it is gone."""
    assert process.stdout
    return json.loads(process.stdout.readline() or b"null")


def _work() -> None:
    """Do what `_ask` asks, line by line, until the other side closes."""
    stream = sys.stdin.buffer
    prepare: Prepare = pickle.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever else is printed must not pass for an answer
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in stream:
        request: Mapping[str, Any] = json.loads(line)
        shard = _Shard(Path(), 0, request["first"])
        shard.rows, shard.samples, shard.note = (Path(request[name]) for name in ("rows", "samples", "note"))
        refused = None
        try:
            shard.fill(_opened([shard.rows], "rows"), prepare)
        except DataError as error:
            refused = base64.b64encode(pickle.dumps(error)).decode()
        print(json.dumps({"refused": refused}), file=answers, flush=True)


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


def _opened(paths: Iterable[Path], key: str) -> Dataset:
    """Map Arrow streams into memory as one data set; empty ones are left out, unless all are."""
    from datasets import Dataset, concatenate_datasets

    parts = [Dataset.from_file(str(path)) for path in paths]
    filled = [part for part in parts if len(part)] or parts[:1]
    whole = concatenate_datasets(filled) if len(filled) > 1 else filled[0]
    whole._fingerprint = key[:32]
    return whole


if __name__ == "__main__":
    _work()
