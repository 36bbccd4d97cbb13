"""Local files to one Dataset, however large: JSON, CSV, TSV, Parquet, Arrow, CoNLL, text; each mistake at its place."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from trainworks.data.bad_rows import BadRows, Policy, excerpt
from trainworks.data.cache import digest, folder
from trainworks.data.columns import fingerprint, listed
from trainworks.data.formats.base import ARROW_ERRORS, Chunk, Format, unified
from trainworks.data.formats.conll import conll_rows
from trainworks.data.formats.json_rows import json_lines, json_rows
from trainworks.data.formats.lines import COMPRESSIONS
from trainworks.data.formats.others import arrow_rows, parquet_rows, text_rows
from trainworks.data.formats.separated import narrowest, separated
from trainworks.data.places import Places, runs
from trainworks.data.table_store import TableStore
from trainworks.errors import DataError
from trainworks.record import write_json

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["READERS", "FileRows", "Part", "is_readable", "read_files", "read_parts", "state", "stem"]

Numbers = NDArray[np.int64]

_WAIT_BYTES = 2**25
"""From this size on, one process reads and the others wait: compressed, that may be a large file."""
_STARTS = "starts.npy"
_FILES = "files.json"
_DROPPED = "dropped.json"
IN_MEMORY = 256 * 2**20
"""Bytes of rows that are held; what takes more is written to the cache and mapped into memory from there."""

READERS: dict[str, Format] = {
    ".jsonl": Format(json_lines),
    ".json": Format(json_rows),
    ".csv": Format(separated(","), schema=narrowest),
    ".tsv": Format(separated("\t"), schema=narrowest),
    ".parquet": Format(parquet_rows, compressible=False),
    ".conll": Format(conll_rows),
    ".txt": Format(text_rows),
    ".arrow": Format(arrow_rows, compressible=False),
}
"""The file endings that can be read, and how; `.gz` and `.zst` may follow those of text."""


@dataclass(frozen=True)
class FileRows:
    """Rows that were read from files."""

    rows: Dataset
    places: Places
    """Where each of them stands."""
    dropped: dict[str, int]
    """How many bad rows were left out, by reason."""
    listing: Path | None
    """The file that lists those, where that was asked for and there are any."""


def is_readable(path: Path) -> bool:
    """Say whether files of such a name can be read."""
    return _ending(path) in READERS


def stem(path: Path) -> str:
    """Return a file's name without its endings, that of a compression included.

    >>> stem(Path("train.jsonl.gz"))
    'train'
    """
    return path.name[: -len("".join(path.suffixes[-_num_endings(path) :]))]


def _num_endings(path: Path) -> int:
    return 2 if path.suffix.lower() in COMPRESSIONS else 1


def _ending(path: Path) -> str:
    """Return the ending that says the format: `.jsonl` for rows.jsonl.gz."""
    ending = path.suffix.lower()
    if ending in COMPRESSIONS:
        inner = Path(path.stem).suffix.lower()
        return inner if inner in READERS and READERS[inner].compressible else ending
    return ending


class Part(NamedTuple):
    """Some of what is read together: a file, or a folder of images."""

    path: Path
    chunks: Callable[[BadRows], Iterator[Chunk]]
    schema: Callable[[Sequence[pa.Table]], pa.Schema]
    """Choose the types of the part from all its tables."""


def read_files(paths: Sequence[Path], bad_rows: Policy = "error") -> FileRows:
    """Read files that hold the same columns, in any of the formats of `READERS`, as one Dataset.

    BadRowsError names the rows that cannot be used, where `bad_rows` is `error` or reading cannot go on after one.
    DataError for a file that cannot be read, is empty, or has other columns or types than the first.
    """
    key = digest(*(_state(path) for path in paths))
    small = sum(path.stat().st_size for path in paths if path.is_file()) < _WAIT_BYTES
    are_mapped = all(_ending(path) == ".arrow" for path in paths)
    parts = [Part(path, partial(_chunks, path), READERS[_ending(path)].schema) for path in paths]
    return read_parts(parts, key, bad_rows, small=small, are_mapped=are_mapped)


def read_parts(
    parts: Sequence[Part], key: str, bad_rows: Policy, *, small: bool = False, are_mapped: bool = False
) -> FileRows:
    """Read parts that hold the same columns as one Dataset; `key` tells whether they are what they were.

    Few rows are held in memory, and those that are mapped already. The rest is written to the cache as Arrow, some MB
    at a time, mapped into memory from there, and found there again under its key. Any process may call it; of what is
    not `small` one writes, and the others wait for it. Errors as `read_files`.
    """
    key = digest(bad_rows, version("trainworks"), key)
    kept, listing = folder() / "files" / key, folder() / "quarantine" / f"{key[:16]}.jsonl"
    with nullcontext() if small else _alone(kept):
        if kept.exists():
            held = _opened(kept)
            if bad_rows != "quarantine" or not held.dropped or listing.exists():
                return _file_rows(held, listing)
        bad = BadRows(bad_rows, listing)
        staged = kept.with_name(f".{key}.{uuid4().hex}")
        try:
            return _file_rows(
                _read(parts, bad, TableStore(staged, math.inf if are_mapped else IN_MEMORY), kept), listing
            )
        finally:
            bad.discard()
            shutil.rmtree(staged, ignore_errors=True)


def _alone(kept: Path) -> AbstractContextManager[Any]:
    """Let one process at a time read what is likely to be kept."""
    from filelock import FileLock

    kept.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(kept.with_name(f".{kept.name}.lock"))


class _Held(NamedTuple):
    """The rows of some files, in memory or mapped, with what `datasets` is to know them by."""

    table: Any
    starts: Numbers
    files: tuple[str, ...]
    dropped: dict[str, int]
    name: str


def _file_rows(held: _Held, listing: Path) -> FileRows:
    from datasets import Dataset

    try:
        rows = Dataset(held.table, fingerprint=held.name[:32])
    # The metadata that datasets looks at may say anything at all.
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        found = excerpt(str(error))
        mend = "write the file again, with columns of other types, or without the schema's metadata `huggingface`"
        raise DataError(f"{held.files[0]}: datasets does not know a type of it: {found}; {mend}") from error
    return FileRows(
        rows=rows,
        places=Places(held.files, held.starts),
        dropped=held.dropped,
        listing=listing if listing.exists() and held.dropped else None,
    )


def _read(parts: Sequence[Part], bad: BadRows, store: TableStore, kept: Path) -> _Held:
    """Read the parts; where they take too much memory, by way of the store's folder, which becomes `kept`."""
    schemas, starts, count = [], [], 0
    files = [str(part.path) for part in parts]
    for number, part in enumerate(parts):
        before = bad.counts.total()
        for chunk in part.chunks(bad):
            store.add(chunk.table, number)
            starts.append(_starts(chunk, count, number, files))
            count += len(chunk.table)
        if tables := store.tables(number):
            schemas.append((part.path, part.schema(tables)))
        elif bad.counts.total() == before:
            raise DataError(f"{part.path}: there are no rows; leave the file out, or write it again")
    bad.finish()
    if not count:
        bad.raise_first("no row is left without these")
    table = store.finish(_joint_schema(schemas))
    # The name datasets would make itself pickles the whole table: 4 s for 400 MB (datasets 5.2).
    if table is not None:
        return _Held(table, np.concatenate(starts), tuple(files), dict(bad.counts), fingerprint(table))
    np.save(store.folder / _STARTS, np.concatenate(starts))
    write_json(store.folder / _FILES, files)
    write_json(store.folder / _DROPPED, bad.counts)
    try:
        store.folder.rename(kept)
    except OSError:
        if not kept.exists():  # if it does, another process was faster
            raise
    return _opened(kept)


def _starts(chunk: Chunk, count: int, number: int, files: list[str]) -> Numbers:
    """Return where the rows of a chunk begin, as `Places` has it; files of their own are added to the list."""
    if not chunk.files:
        return runs(count, number, chunk.rows, chunk.lines)
    own = np.arange(len(chunk.files))
    files += chunk.files
    return np.stack([count + own, len(files) - len(own) + own, chunk.rows, np.zeros_like(own)], axis=1)


def _chunks(path: Path, bad: BadRows) -> Iterator[Chunk]:
    try:
        yield from (chunk for chunk in READERS[_ending(path)].chunks(path, bad) if len(chunk.table))
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        kind = "".join(path.suffixes[-_num_endings(path) :]).lstrip(".")
        found = excerpt(str(error))
        raise DataError(f"{path}: cannot be read as {kind}: {found}; write or fetch the file again") from error


def _joint_schema(schemas: Sequence[tuple[Path, pa.Schema]]) -> pa.Schema:
    first, wanted = schemas[0]
    for path, schema in schemas:
        if set(schema.names) != set(wanted.names):
            raise DataError(
                f"{path}: the columns are {listed(schema.names)}, but {listed(wanted.names)} in {first}; "
                "name the files that belong together in data.train and data.validation"
            )
    try:
        return unified([schema for _, schema in schemas])
    except ARROW_ERRORS as error:
        raise DataError(f"{first.parent}: the files do not hold the same types: {excerpt(str(error))}") from error


def _opened(kept: Path) -> _Held:
    """Return the rows that a folder of the cache holds, mapped into memory."""
    from datasets.table import MemoryMappedTable, concat_tables

    try:
        tables = [MemoryMappedTable.from_file(str(file)) for file in sorted(kept.glob("*.arrow"))]
        dropped = json.loads((kept / _DROPPED).read_bytes())
        starts, files = np.load(kept / _STARTS, mmap_mode="r"), tuple(json.loads((kept / _FILES).read_bytes()))
        return _Held(concat_tables(tables), starts, files, dropped, kept.name)
    except (OSError, ValueError) as error:
        raise DataError(f"{kept}: what was kept of the files cannot be read: {error}; remove that folder") from error


def _state(path: Path) -> str:
    if not is_readable(path):
        endings = ", ".join(READERS)
        raise DataError(f"{path}: cannot read '{path.suffix}' files; there may be: {endings}, and text as .gz or .zst")
    found = state(path)
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty; leave it out, or write it again")
    return found


def state(path: Path) -> str:
    """Return what tells whether a file is still the one it was; DataError where it cannot be read."""
    try:
        state = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    return f"{path.resolve()} {state.st_size} {state.st_mtime_ns} {state.st_ctime_ns} {state.st_ino}"
