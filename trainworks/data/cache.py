"""What prepared data is, and where it is kept."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
from numpy.typing import DTypeLike, NDArray

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import ListArray

    from trainworks.data.bad_rows import BadRow

__all__ = ["Prepared", "code_digest", "digest", "folder", "once", "opened", "ragged", "table"]


@dataclass(frozen=True)
class Prepared:
    """Training sequences, and what was left out on the way to them, by reason."""

    samples: Dataset
    dropped: dict[str, int]
    refused: tuple[BadRow, ...] = ()
    """What could not be used and was left out, rows or parts of them, by the rows' numbers in the split."""


def table(columns: Mapping[str, Any]) -> Dataset:
    """Return columns as a data set."""
    import pyarrow
    from datasets import Dataset

    # Without a fingerprint given, datasets 5.2 pickles the whole table to make one.
    return Dataset(pyarrow.table(columns), fingerprint=uuid4().hex)


def ragged(rows: Sequence[NDArray[Any]], kind: DTypeLike) -> ListArray:
    """Return rows of different lengths as one Arrow column of lists; far quicker than by Python numbers."""
    import pyarrow

    offsets = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    # Rows without a single value between them are fractions to numpy.
    values = np.concatenate(rows, dtype=kind, casting="unsafe") if len(rows) else np.empty(0, dtype=kind)
    return pyarrow.ListArray.from_arrays(offsets, values)


def folder() -> Path:
    """Return where prepared data is kept: TRAINWORKS_CACHE, or `trainworks` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "trainworks"
    return Path(os.environ.get("TRAINWORKS_CACHE", default))


def code_digest(*kinds: type) -> str:
    """Return the SHA-256 of the code that prepares data: this package's, and of the modules where `kinds` are
    written."""
    files = [getattr(sys.modules[kind.__module__], "__file__", None) for kind in kinds]  # none in a notebook
    paths = [*Path(__file__).parent.rglob("*.py"), *(Path(file) for file in files if file)]
    return digest(*(path.read_text(encoding="utf-8") for path in sorted(paths)))


def once(mark: Path, make: Callable[[], None], *, lock: Path | None = None) -> None:
    """Let one process do `make`, after which `mark` is there, while any others wait for it; nothing is done where it is
    there already. `lock` is a file beside the mark by default."""
    from filelock import FileLock

    if mark.exists():
        return
    mark.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock or mark.with_name(f".{mark.name}.lock")):
        if not mark.exists():
            make()


def opened(paths: Iterable[Path], key: str) -> Dataset:
    """Map Arrow streams into memory as one data set with `key` for its fingerprint; empty ones are left out, unless all
    are."""
    from datasets import Dataset, concatenate_datasets

    parts = [Dataset.from_file(str(path)) for path in paths]
    filled = [part for part in parts if len(part)] or parts[:1]
    whole = concatenate_datasets(filled) if len(filled) > 1 else filled[0]
    whole._fingerprint = key[:32]
    return whole


def digest(*parts: str) -> str:
    """Return the SHA-256 of some texts, each kept apart from the next."""
    total = hashlib.sha256()
    for part in parts:
        encoded = part.encode("utf-8", "surrogatepass")
        total.update(len(encoded).to_bytes(8, "little") + encoded)
    return total.hexdigest()
