"""Pascal VOC: `Annotations/*.xml` with boxes, `JPEGImages`, and `ImageSets/Main/*.txt` with the names of each split.

What VOC calls difficult is a box like any other here, for COCO's rules know no such thing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pyarrow as pa

from trainworks.data.bad_rows import BadRow, BadRows, excerpt
from trainworks.data.layouts.base import BOXES, IMAGE, Entry, Layout, image_cell
from trainworks.errors import DataError

__all__ = ["VOC"]


def _splits(folder: Path) -> Mapping[str, list[str]]:
    files = sorted((folder / "ImageSets" / "Main").glob("*.txt"))
    return {
        file.stem: [line.split()[0] for line in file.read_text("utf-8").splitlines() if line.strip()] for file in files
    }


def _whole(folder: Path) -> list[str]:
    return [file.stem for file in sorted((folder / "Annotations").glob("*.xml"))]


def _entries(root: Path, split: list[str], bad: BadRows) -> Iterator[Entry]:
    for name in split:
        file = root / "Annotations" / f"{name}.xml"
        try:
            image, boxes = _read(file)
            yield Entry({"image": image_cell(root / "JPEGImages" / image, root), "objects": boxes}, str(file))
        except DataError as error:
            bad.add(BadRow("image missing", "put it into JPEGImages", str(error), file=str(file)))
        except (ElementTree.ParseError, ValueError, OSError) as error:
            mend = "give every object a name and a bndbox with xmin, ymin, xmax and ymax"
            bad.add(BadRow("broken annotation", mend, excerpt(str(error)), file=str(file)))


def _read(file: Path) -> tuple[str, dict[str, list[Any]]]:
    """Return an image's file name and its boxes; ValueError for XML that says neither."""
    content = file.read_bytes()
    if b"<!DOCTYPE" in content:
        raise ValueError("a document type, which no annotation needs")
    root = ElementTree.fromstring(content)
    boxes, names = [], []
    for found in root.iter("object"):
        left, top, right, bottom = (float(_text(found, f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax"))
        boxes.append([left, top, right - left, bottom - top])
        names.append(_text(found, "name"))
    return _text(root, "filename"), {"bbox": boxes, "category": names, "crowd": [False] * len(names)}


def _text(element: ElementTree.Element, path: str) -> str:
    text = element.findtext(path)
    if not text:
        raise ValueError(f"no {path}")
    return text


VOC = Layout(pa.schema([("image", IMAGE), ("objects", BOXES)]), splits=_splits, whole=_whole, entries=_entries)
