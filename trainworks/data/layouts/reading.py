"""Read the splits of a folder of images into rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from trainworks.data.bad_rows import BadRows, Policy
from trainworks.data.cache import code_digest, digest
from trainworks.data.files import FileRows, Part, read_parts, state
from trainworks.data.formats.base import Chunk
from trainworks.data.layouts.base import Entry, Layout, Split
from trainworks.data.layouts.class_folders import CLASS_FOLDERS
from trainworks.data.layouts.coco import COCO
from trainworks.data.layouts.masks import MASKS
from trainworks.data.layouts.voc import VOC
from trainworks.data.layouts.yolo import YOLO
from trainworks.errors import DataError, nearest

__all__ = ["LAYOUTS", "read_layout"]

LAYOUTS: dict[str, Layout] = {"class-folders": CLASS_FOLDERS, "coco": COCO, "masks": MASKS, "voc": VOC, "yolo": YOLO}
"""Every layout, by what `data.layout` calls it."""

_EVALUATION = {"validation", "valid", "val", "dev", "eval", "test"}
_CHUNK_ROWS = 1000
_CHUNK_BYTES = 2**25


def read_layout(
    folder: Path, layout: str, train: Sequence[str], validation: Sequence[str] | None, bad_rows: Policy
) -> tuple[FileRows, FileRows | None]:
    """Return a folder's rows to train on and, where such a split is named, to evaluate on.

    All of the folder is trained on where neither is said and there is no split `train`. Errors as `read_files`.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: data.layout: {layout} is of a folder, and this is none")
    kind = LAYOUTS[layout]
    splits = kind.splits(folder)
    if tuple(train) == ("train",) and "train" not in splits and not validation:
        if held := sorted(_EVALUATION.intersection(splits)):
            raise DataError(f"{folder}: no split train, and {', '.join(held)} would be trained on; name both in data")
        parts = {"": kind.whole(folder)}
    else:
        parts = _named(splits, train, f"{folder}: data.train")
    held_parts = _named(splits, validation or (), f"{folder}: data.validation")
    if both := parts.keys() & held_parts.keys():
        raise DataError(f"{folder}: {', '.join(sorted(both))} stands in both data.train and data.validation")
    key = digest(layout, *_states(folder), code_digest())
    read = partial(_read, folder, kind, key, bad_rows)
    return read(parts), read(held_parts) if held_parts else None


def _named(splits: Mapping[str, Split], wanted: Sequence[str], where: str) -> dict[str, Split]:
    if missing := [f"no split '{name}'{nearest(name, splits)}" for name in wanted if name not in splits]:
        raise DataError(f"{where}: {'; '.join(missing)}; there are: {', '.join(splits) or 'none'}")
    return {name: splits[name] for name in wanted}


def _states(folder: Path) -> Iterator[str]:
    """Yield what tells whether the files are what they were, empty folders among them."""
    for path in sorted(folder.rglob("*")):
        yield state(path) if path.is_file() else str(path)


def _read(folder: Path, layout: Layout, key: str, bad_rows: Policy, splits: Mapping[str, Split]) -> FileRows:
    parts = [
        Part(folder / name, partial(_chunks, folder, layout, split), lambda tables: layout.schema)
        for name, split in splits.items()
    ]
    return read_parts(parts, digest(key, *splits), bad_rows)


def _chunks(folder: Path, layout: Layout, split: Split, bad: BadRows) -> Iterator[Chunk]:
    held: list[Entry] = []
    size = 0
    for entry in layout.entries(folder, split, bad):
        held.append(entry)
        size += len(entry.values["image"]["bytes"])
        if len(held) == _CHUNK_ROWS or size > _CHUNK_BYTES:
            yield _chunk(held, layout.schema)
            held, size = [], 0
    if held:
        yield _chunk(held, layout.schema)


def _chunk(entries: Sequence[Entry], schema: pa.Schema) -> Chunk:
    table = pa.Table.from_pylist([dict(entry.values) for entry in entries], schema=schema)
    return Chunk(table, np.array([entry.row for entry in entries]), files=[entry.file for entry in entries])
