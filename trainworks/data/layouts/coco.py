"""COCO: a JSON file for each split, with `images`, `annotations` and `categories`, and the images beside it."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from trainworks.data.bad_rows import BadRow, BadRows, excerpt
from trainworks.data.layouts.base import BOXES, IMAGE, Entry, Layout, image_cell, image_files, visible
from trainworks.errors import DataError

__all__ = ["COCO"]


def _splits(folder: Path) -> Mapping[str, Path]:
    """Return each file by its path, its name, and that without `instances_` and a year, or by its folder's name."""
    named: dict[str, Path] = {}
    for file in visible(folder.rglob("*.json")):
        short = file.parent.name if file.stem.startswith("_") else re.sub(r"^instances_|\d{4}$", "", file.stem)
        named |= {file.relative_to(folder).as_posix(): file, file.stem: file, short: file}
    return named


def _whole(folder: Path) -> Path:
    files = visible(folder.rglob("*.json"))
    if len(files) != 1:
        found = ", ".join(file.relative_to(folder).as_posix() for file in files[:20]) or "none"
        raise DataError(f"{folder}: name the JSON file to train on in data.train; there are: {found}")
    return files[0]


def _entries(root: Path, split: Path, bad: BadRows) -> Iterator[Entry]:
    images, boxes = _read(split)
    places: dict[str, list[Path]] = defaultdict(list)
    for path in image_files(root):
        places[path.name].append(path)
    for row, image in enumerate(images):
        name = str(image["file_name"])
        try:
            cell = image_cell(_place(name, places[Path(name).name], split), root)
        except DataError as error:
            bad.add(BadRow("image missing", "put the file there", str(error), file=str(split), row=row))
        else:
            yield Entry({"image": cell, "objects": boxes[image["id"]]}, str(split), row)


def _place(name: str, found: list[Path], split: Path) -> Path:
    """Return the only file that ends in the name, or of several the one beside the JSON file."""
    fitting = [path for path in found if path.as_posix().endswith(f"/{name}")]
    near = [path for path in fitting if path.is_relative_to(split.parent)]
    if len(fitting) != 1 and len(near) != 1:
        raise DataError(f"{len(fitting)} files are named {excerpt(name)}")
    return (fitting if len(fitting) == 1 else near)[0]


def _read(file: Path) -> tuple[list[Any], Mapping[Any, dict[str, list[Any]]]]:
    """Return the images, and the boxes by image; DataError for a file that does not hold both."""
    boxes: defaultdict[Any, dict[str, list[Any]]] = defaultdict(lambda: {"bbox": [], "category": [], "crowd": []})
    try:
        said = json.loads(file.read_bytes())
        names = {each["id"]: str(each["name"]) for each in said["categories"]}
        known = {each["id"]: str(each["file_name"]) for each in said["images"]}
        for each in said["annotations"]:
            if each["image_id"] not in known:
                raise DataError(
                    f"{file}: annotation {each.get('id')} is of image {each['image_id']}, which is not there"
                )
            own = boxes[each["image_id"]]
            own["bbox"].append([float(number) for number in each["bbox"]])
            own["category"].append(names[each["category_id"]])
            own["crowd"].append(bool(each.get("iscrowd", 0)))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise DataError(
            f"{file}: not COCO's JSON, an object with images, annotations and categories: {type(error).__name__} "
            f"{excerpt(str(error))}"
        ) from error
    return said["images"], boxes


COCO = Layout(pa.schema([("image", IMAGE), ("objects", BOXES)]), splits=_splits, whole=_whole, entries=_entries)
