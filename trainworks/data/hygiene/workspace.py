"""The files of one cleaning: rows in shards, what each job found, and the rows that stay.

    cleaned/KEY/rows/00000.arrow      the rows that stay, an Arrow stream for each shard
    cleaned/KEY/manifests/1-NAME.json what a stage did
    cleaned/KEY/manifest.json         all of it; written last
    cleaned/KEY/making/               the rows before, and what was found in them; removed at the end

Every file appears under its name once it is whole, and says the same whoever writes it. So a job may be killed at any
moment, done again, or done by two processes at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from trainworks.cleaning import Clean
from trainworks.data.hygiene.documents import documents

__all__ = ["GONE", "STAYS", "Workspace", "logs_folder", "making", "write_arrays", "write_table"]

STAYS, GONE = 0, 255
"""Verdicts on a row: it stays; a stage before took it out. Other numbers are a stage's reasons, counted from 1."""

Verdicts = NDArray[np.uint8]


def making(folder: Path) -> Path:
    """Return where a cleaning keeps what it needs while it goes on."""
    return folder / "making"


def logs_folder(folder: Path) -> Path:
    """Return where its processes write their logs."""
    return making(folder) / "logs"


class Workspace:
    """A cleaning's folder with its settings; what jobs read and write."""

    def __init__(self, folder: Path, settings: Clean, sizes: tuple[int, ...]) -> None:
        self.folder = folder
        self.settings = settings
        self.sizes = sizes
        """Rows of each shard."""
        self.making = making(folder)

    @cached_property
    def starts(self) -> list[int]:
        """The number of each shard's first row, and of the row past the last."""
        return [0, *np.cumsum(self.sizes).tolist()]

    def path(self, job: str, rank: int) -> Path:
        """Return the file that a job leaves."""
        return self.making / job / f"{rank:05d}.npz"

    def source(self, shard: int) -> Path:
        """Return the file of a shard's rows before cleaning."""
        return self.making / "source" / f"{shard:05d}.arrow"

    def kept(self, shard: int) -> Path:
        """Return the file of the rows that stay."""
        return self.folder / "rows" / f"{shard:05d}.arrow"

    def rows(self, shard: int) -> pa.Table:
        """Map a shard's rows into memory."""
        return pa.ipc.open_stream(pa.memory_map(str(self.source(shard)))).read_all()

    def texts(self, shard: int, places: NDArray[np.int64]) -> list[str]:
        """Return the texts of a shard's rows at some places in it."""
        columns = list(self.settings.text)
        return documents(self.rows(shard).select(columns).take(places), columns)

    def arrays(self, job: str, rank: int) -> Mapping[str, NDArray[Any]]:
        """Read what a job found."""
        with np.load(self.path(job, rank)) as held:
            return dict(held)


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays so that the file appears once it is whole; the bytes depend on the arrays alone."""
    _write(path, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table as an Arrow stream in the same way; how the table was cut into chunks does not matter."""

    def write(file: IO[bytes]) -> None:
        with pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table.combine_chunks())

    _write(path, write)


def _write(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{uuid4().hex}")
    with staged.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    staged.replace(path)
