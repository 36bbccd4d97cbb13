"""YOLO: a text file for each image, `images/1.jpg` and `labels/1.txt`, each line a class and a box in shares of the
image; the class names in `data.yaml` or `classes.txt`. An image without such a file has no boxes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from trainworks.data.bad_rows import BadRow, BadRows, excerpt
from trainworks.data.images import ImageError, size_of
from trainworks.data.layouts.base import BOXES, IMAGE, Entry, Layout, folders, image_cell, image_files
from trainworks.errors import DataError

__all__ = ["YOLO"]

_LINE = "a line is: class centre-x centre-y width height, the last four as shares of the image from 0 to 1"


def _splits(folder: Path) -> Mapping[str, Path]:
    """Return the folders of images that `data.yaml` names, or `images/train`, or `train/images`."""
    said = _settings(folder)
    named = {name: folder / str(said[name]) for name in ("train", "val", "test") if isinstance(said.get(name), str)}
    inner = {path.name: path for path in folders(folder / "images")}
    outer = {path.name: path / "images" for path in folders(folder) if (path / "images").is_dir()}
    return {**outer, **inner, **{name: path for name, path in named.items() if path.is_dir()}}


def _whole(folder: Path) -> Path:
    return folder / "images" if (folder / "images").is_dir() else folder


def _settings(folder: Path) -> dict[str, Any]:
    for file in (folder / "data.yaml", folder / "data.yml"):
        if file.exists():
            try:
                said = yaml.safe_load(file.read_text("utf-8"))
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                raise DataError(f"{file}: cannot be read: {excerpt(str(error))}") from error
            return said if isinstance(said, dict) else {}
    return {}


def _names(folder: Path) -> dict[int, str]:
    names = _settings(folder).get("names")
    if isinstance(names, dict):
        return {int(number): str(name) for number, name in names.items()}
    if names is None and (folder / "classes.txt").exists():
        names = (folder / "classes.txt").read_text("utf-8").split("\n")
    if not names:
        raise DataError(f"{folder}: no class names; write data.yaml with names: [...], or classes.txt")
    return dict(enumerate(str(name).strip() for name in names if str(name).strip()))


def _entries(root: Path, split: Path, bad: BadRows) -> Iterator[Entry]:
    names = _names(root)
    for path in image_files(split):
        cell, file = image_cell(path, root), _labels(path)
        before = bad.counts.total()
        try:
            boxes = _boxes(file, size_of(cell["bytes"]), names, bad)
        except ImageError as error:
            bad.add(BadRow(error.reason, error.mend, excerpt=error.found, file=str(path)))
        if bad.counts.total() == before:
            yield Entry({"image": cell, "objects": boxes}, str(file if file.exists() else path))


def _labels(image: Path) -> Path:
    """Return the file of an image's boxes: in `labels` in place of the last `images`, or beside the image."""
    parts = list(image.with_suffix(".txt").parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts)


def _boxes(file: Path, size: tuple[int, int], names: Mapping[int, str], bad: BadRows) -> dict[str, list[Any]]:
    boxes: dict[str, list[Any]] = {"bbox": [], "category": [], "crowd": []}
    lines = file.read_text("utf-8", errors="replace").splitlines() if file.exists() else []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            kind, *shares = line.split()
            across, down, width, height = (float(share) for share in shares)
            boxes["category"].append(names[int(kind)])
        except (KeyError, ValueError) as error:
            mend = f"{_LINE}; the classes are 0 to {len(names) - 1}"
            bad.add(BadRow("broken box", mend, excerpt(str(error)), excerpt(line), str(file), number, row=0))
            continue
        left, top = (across - width / 2) * size[0], (down - height / 2) * size[1]
        boxes["bbox"].append([left, top, width * size[0], height * size[1]])
        boxes["crowd"].append(False)
    return boxes


YOLO = Layout(pa.schema([("image", IMAGE), ("objects", BOXES)]), splits=_splits, whole=_whole, entries=_entries)
