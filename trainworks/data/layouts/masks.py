"""Images and their masks in two folders, a mask named as its image: `images/1.jpg` and `masks/1.png`; splits stand
above (`train/images`) or within (`images/train`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from trainworks.data.bad_rows import BadRow, BadRows
from trainworks.data.layouts.base import IMAGE, Entry, Layout, folders, image_cell, image_files
from trainworks.errors import DataError

__all__ = ["MASKS"]


class _Pair(NamedTuple):
    images: Path
    masks: Path


def _splits(folder: Path) -> Mapping[str, _Pair]:
    if (folder / "images").is_dir():
        whole = _whole(folder)
        return {path.name: _Pair(path, whole.masks / path.name) for path in folders(whole.images)}
    return {path.name: _whole(path) for path in folders(folder) if (path / "images").is_dir()}


def _whole(folder: Path) -> _Pair:
    others = [path for path in folders(folder) if path.name != "images"]
    if not (folder / "images").is_dir() or len(others) != 1:
        found = ", ".join(path.name for path in folders(folder)) or "none"
        raise DataError(f"{folder}: there must be a folder `images` and one other, of the masks; there are: {found}")
    return _Pair(folder / "images", others[0])


def _entries(root: Path, split: _Pair, bad: BadRows) -> Iterator[Entry]:
    masks = {path.relative_to(split.masks).with_suffix(""): path for path in image_files(split.masks)}
    for path in image_files(split.images, bad):
        mask = masks.get(path.relative_to(split.images).with_suffix(""))
        if mask is None:
            bad.add(BadRow("image without a mask", f"put it into {split.masks}, under the same name", file=str(path)))
        else:
            yield Entry({"image": image_cell(path, root), "mask": image_cell(mask, root)}, str(path))


MASKS = Layout(pa.schema([("image", IMAGE), ("mask", IMAGE)]), splits=_splits, whole=_whole, entries=_entries)
