"""Prepared data, kept by content: the same rows, task and processor are never prepared twice on a machine."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Prepared", "cached", "digest", "folder", "table"]


@dataclass(frozen=True)
class Prepared:
    """Training sequences, and what was left out on the way to them, by reason."""

    samples: Dataset
    dropped: dict[str, int]


def table(columns: Mapping[str, Any]) -> Dataset:
    """Return columns as a data set."""
    import pyarrow
    from datasets import Dataset

    # Without a fingerprint given, datasets 5.2 pickles the whole table to make one.
    return Dataset(pyarrow.table(columns), fingerprint=uuid4().hex)


def folder() -> Path:
    """Return where prepared data is kept: TRAINWORKS_CACHE, or `trainworks` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "trainworks"
    return Path(os.environ.get("TRAINWORKS_CACHE", default))


def digest(*parts: str) -> str:
    """Return the SHA-256 of some texts, each kept apart from the next."""
    total = hashlib.sha256()
    for part in parts:
        encoded = part.encode("utf-8", "surrogatepass")
        total.update(len(encoded).to_bytes(8, "little") + encoded)
    return total.hexdigest()


def cached(key: str, build: Callable[[], Prepared]) -> Prepared:
    """Return what `build` returned for this `key` once, from disk; build and keep it otherwise.

    A crash leaves at most a staging folder; two processes that build at once both succeed, and one copy stays.
    """
    from datasets import load_from_disk

    place = folder() / "prepared" / key
    if not place.exists():
        prepared = build()
        staged = place.with_name(f".{key}.{uuid4().hex}")
        prepared.samples.save_to_disk(str(staged / "samples"))
        (staged / "dropped.json").write_text(json.dumps(prepared.dropped), encoding="utf-8")
        try:
            staged.rename(place)
        except OSError:
            shutil.rmtree(staged)
    return Prepared(
        load_from_disk(str(place / "samples")),
        json.loads((place / "dropped.json").read_text(encoding="utf-8")),
    )
