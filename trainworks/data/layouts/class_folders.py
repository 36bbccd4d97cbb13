"""A folder for each class: `cat/1.jpg`, or `train/cat/1.jpg` where there are splits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa

from trainworks.data.bad_rows import BadRow, BadRows
from trainworks.data.images import IMAGE_ENDINGS
from trainworks.data.layouts.base import IMAGE, Entry, Layout, folders, image_cell, image_files, visible

__all__ = ["CLASS_FOLDERS"]


def _splits(folder: Path) -> Mapping[str, Path]:
    return {path.name: path for path in folders(folder)}


def _entries(root: Path, split: Path, bad: BadRows) -> Iterator[Entry]:
    for path in visible(split.iterdir()):
        if path.suffix.lower() in IMAGE_ENDINGS and path.is_file():
            bad.add(BadRow("image of no class", "put it into the folder of its class", file=str(path)))
    for folder in folders(split):
        images = image_files(folder, bad)
        if not images:
            bad.add(BadRow("empty class folder", "remove it, or put the class's images there", file=str(folder)))
        for path in images:
            yield Entry({"image": image_cell(path, root), "label": folder.name}, str(path))


CLASS_FOLDERS = Layout(
    pa.schema([("image", IMAGE), ("label", pa.string())]), splits=_splits, whole=lambda folder: folder, entries=_entries
)
