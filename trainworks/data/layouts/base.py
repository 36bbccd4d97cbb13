"""What a layout of images is: which splits a folder has, and the images of one with what is said of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from trainworks.data.bad_rows import BadRow, BadRows, excerpt
from trainworks.data.images import IMAGE_ENDINGS
from trainworks.errors import DataError

__all__ = ["BOXES", "IMAGE", "Entry", "Layout", "Split", "folders", "image_cell", "image_files", "visible"]

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""An encoded image, and the name of its file in the source."""
BOXES = pa.struct(
    [("bbox", pa.list_(pa.list_(pa.float64()))), ("category", pa.list_(pa.string())), ("crowd", pa.list_(pa.bool_()))]
)
"""An image's boxes as [left, top, width, height] in pixels, the class of each, and whether it stands for a crowd."""

Split = Any
"""What a layout knows a split by: a file, a folder, or several."""


@dataclass(frozen=True)
class Entry:
    """One image, and where what is said of it stands."""

    values: Mapping[str, Any]
    file: str
    row: int = 0


@dataclass(frozen=True)
class Layout:
    """A way to lay out images in a folder."""

    schema: pa.Schema
    splits: Callable[[Path], Mapping[str, Split]]
    """Return the splits that a folder names, by each name they go by."""
    whole: Callable[[Path], Split]
    """Return all of a folder as one split; DataError where that cannot be."""
    entries: Callable[[Path, Split, BadRows], Iterator[Entry]]
    """Yield a split's images; what cannot be used goes to the BadRows."""


def visible(paths: Iterable[Path]) -> list[Path]:
    """Return paths in their order, without hidden ones."""
    return sorted(path for path in paths if not path.name.startswith("."))


def folders(folder: Path) -> list[Path]:
    """Return the folders in a folder, in their order."""
    return [path for path in visible(folder.iterdir()) if path.is_dir()] if folder.is_dir() else []


def image_files(folder: Path, bad: BadRows | None = None) -> list[Path]:
    """Return the images in a folder and in those within, in their order; other files are bad rows where asked for."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _is_hidden(path, folder)]
    found = [path for path in files if path.suffix.lower() in IMAGE_ENDINGS]
    if bad is not None and len(found) < len(files):
        mend = f"move it elsewhere; images end in {', '.join(IMAGE_ENDINGS)}"
        bad.extend([BadRow("not an image", mend, file=str(path)) for path in sorted({*files} - {*found})])
    return found


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def image_cell(path: Path, root: Path) -> dict[str, Any]:
    """Read an image, encoded as it stands, into a cell; DataError where it cannot be read or lies outside `root`."""
    try:
        inside = path.resolve().is_relative_to(root.resolve())
        content = path.read_bytes() if inside else b""
    except OSError as error:
        raise DataError(f"{excerpt(path.name)}: {error.strerror}") from error
    if not inside:
        raise DataError(f"{excerpt(path.name)}: leads out of the folder")
    return {"bytes": content, "path": path.relative_to(root).as_posix()}
