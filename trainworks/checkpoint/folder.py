"""What lies on disk: the checkpoints of a run, whether each is whole, and which of them stay."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainworks.errors import CheckpointError
from trainworks.fail_points import reached
from trainworks.record import file_sha256, sync, write_json

__all__ = [
    "MARKS",
    "Checkpoint",
    "check_format",
    "checkpoints",
    "mark_best",
    "prune",
    "set_aside",
    "sweep",
    "verify",
    "write_manifest",
]

FORMAT = 2

MARKS = ("best", "pin")
"""Empty files that say what a checkpoint is to its run; they are no part of its contents."""

_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk."""

    path: Path

    @property
    def step(self) -> int:
        """Optimizer steps done when it was written."""
        return int(self.path.name.removeprefix("step-"))

    @property
    def is_best(self) -> bool:
        """Whether it is the best so far; after a crash older ones may say so too, until the next save."""
        return (self.path / "best").exists()

    @property
    def is_pinned(self) -> bool:
        """Whether a person put a file named `pin` there."""
        return (self.path / "pin").exists()

    def state(self) -> dict[str, Any]:
        """Return `state.json`."""
        return self.read("state.json")

    def read(self, name: str) -> dict[str, Any]:
        """Return one of its JSON files; CheckpointError when it is none."""
        path = self.path / name
        try:
            value = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
        if not isinstance(value, dict):
            raise CheckpointError(f"{path}: holds no JSON object")
        return value

    def size(self) -> int:
        """Return the bytes of its files."""
        return sum(path.stat().st_size for path in self.path.iterdir())


def checkpoints(folder: Path) -> list[Checkpoint]:
    """Return a run folder's checkpoints, newest first; `verify` tells which are whole."""
    found = [
        Checkpoint(path)
        for path in (folder / "checkpoints").glob("step-*")
        if _NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
    ]
    return sorted(found, key=lambda checkpoint: -checkpoint.step)


def write_manifest(folder: Path, digests: Mapping[str, str]) -> None:
    """Write `manifest.json` over the files of a checkpoint, whose SHA-256 `digests` holds by name."""
    files = {name: {"size": (folder / name).stat().st_size, "sha256": digests[name]} for name in sorted(digests)}
    body = {"format": FORMAT, "files": files}
    write_json(folder / "manifest.json", body | {"sha256": _body_digest(body)})


def verify(checkpoint: Checkpoint, *, share: tuple[int, int] = (0, 1)) -> None:
    """Compare every file with the manifest; CheckpointError says which one is missing or differs, and how.

    With `share` (number, of) only that part of the contents is read, so that ranks can divide the work.
    """
    check_format(checkpoint)
    files = _read_manifest(checkpoint)["files"]
    there = {path.name for path in checkpoint.path.iterdir()} - {"manifest.json", *MARKS}
    if foreign := there - files.keys():
        raise CheckpointError(f"{checkpoint.path / min(foreign)}: not in the manifest")
    for number, (name, known) in enumerate(sorted(files.items())):
        path = checkpoint.path / name
        if not path.is_file() or path.is_symlink():
            raise CheckpointError(f"{path}: missing")
        if path.stat().st_size != known["size"]:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes, the manifest says {known['size']}")
        if (name == "state.json" or number % share[1] == share[0]) and file_sha256(path) != known["sha256"]:
            raise CheckpointError(f"{path}: its contents do not match the manifest's checksum")
    if checkpoint.state().get("progress", {}).get("step") != checkpoint.step:
        raise CheckpointError(f"{checkpoint.path}: its state is of another step")


def check_format(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that another version wrote. Where the manifest is damaged, `verify` says so."""
    try:
        found = _read_manifest(checkpoint)["format"]
    except CheckpointError:
        return
    if found != FORMAT:
        raise CheckpointError(
            f"{checkpoint.path}: is of checkpoint format {found}, and this version reads {FORMAT}; go on with the "
            "version that wrote it, or name another output folder"
        )


def _read_manifest(checkpoint: Checkpoint) -> dict[str, Any]:
    path, value = checkpoint.path / "manifest.json", checkpoint.read("manifest.json")
    try:
        body = {name: value[name] for name in ("format", "files")}
        intact = value["sha256"] == _body_digest(body) and value.keys() == {"format", "files", "sha256"}
        plain = all(Path(name).name == name for name in value["files"]) and not path.is_symlink()
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not intact or not plain:
        raise CheckpointError(f"{path}: its contents do not match its own checksum")
    return value


def _body_digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def mark_best(path: Path) -> None:
    """Put the mark of the best on a checkpoint's folder; `prune` then takes it off older ones."""
    (path / "best").touch()
    sync(path)
    reached("save.marked")


def sweep(folder: Path) -> None:
    """Remove what a crash left half done in a run folder, while nobody writes there."""
    inside = folder / "checkpoints"
    for left in (*inside.glob(".step-*.removed"), *inside.glob(".step-*.staged")):
        reached("save.sweeping")
        shutil.rmtree(left)
    for staged in (*folder.glob(".*.json.*"), *(folder / "evaluations").glob(".*.json.*")):
        staged.unlink()


def prune(folder: Path, *, keep: int) -> None:
    """Remove all but the newest `keep`, the best, and the pinned."""
    there = checkpoints(folder)
    marked = [checkpoint for checkpoint in there if checkpoint.is_best]
    for checkpoint in marked[1:]:
        reached("save.unmarking")
        (checkpoint.path / "best").unlink()
    for checkpoint in there[keep:]:
        if checkpoint not in marked[:1] and not checkpoint.is_pinned:
            # Renamed first: a half-deleted checkpoint must not look like a whole one.
            gone = checkpoint.path.with_name(f".{checkpoint.path.name}.removed")
            os.replace(checkpoint.path, gone)
            reached("save.pruning")
            shutil.rmtree(gone)


def set_aside(checkpoint: Checkpoint) -> None:
    """Rename a checkpoint that is not whole, so that it is one no more and can be looked at."""
    aside = checkpoint.path.with_name(f"damaged-{checkpoint.path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(checkpoint.path, aside)
