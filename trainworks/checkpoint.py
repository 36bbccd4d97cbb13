"""Checkpoints: staged, checksummed, renamed into place in one step, and read back on any number of ranks.

A checkpoint is a folder `checkpoints/step-00000200`:

    manifest.json            every file with its size and SHA-256; written last, so a folder without it never counts
    state.json               progress, and what the run was
    rank-00000.safetensors   this rank's pieces of the weights, the optimizer's state, and its RNG
    rank-00000.json          where each piece belongs in its whole tensor; the RNG of Python and NumPy

Every rank writes its own file. A tensor that is the same on several ranks is written once. Reading looks up, for each
tensor it wants (or each rank's part of it), the pieces that overlap it, so a run saved on four ranks goes on with one.
There is no pickle in any of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from trainworks.errors import CheckpointError
from trainworks.record import file_sha256, write_json
from trainworks.run import Progress, Run

__all__ = ["Checkpoint", "checkpoints", "restore", "save", "verify"]

FORMAT = 1

Box = tuple[tuple[int, int], ...]
"""A block of a tensor: (start, stop) in each dimension."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk."""

    path: Path

    @property
    def step(self) -> int:
        """Optimizer steps done when it was written."""
        return int(self.path.name.removeprefix("step-"))

    def state(self) -> dict[str, Any]:
        """Return `state.json`."""
        value: dict[str, Any] = json.loads((self.path / "state.json").read_text(encoding="utf-8"))
        return value


def checkpoints(folder: Path) -> list[Checkpoint]:
    """Return a run folder's complete checkpoints, newest first."""
    found = [Checkpoint(path) for path in (folder / "checkpoints").glob("step-*") if (path / "manifest.json").exists()]
    return sorted(found, key=lambda checkpoint: -checkpoint.step)


def verify(checkpoint: Checkpoint) -> None:
    """Compare every file with the manifest; CheckpointError says which one is missing or differs, and how."""
    manifest = _read_manifest(checkpoint)
    for name, known in manifest["files"].items():
        path = checkpoint.path / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing")
        if path.stat().st_size != known["size"]:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes, the manifest says {known['size']}")
        if file_sha256(path) != known["sha256"]:
            raise CheckpointError(f"{path}: its contents do not match the manifest's checksum")


def _read_manifest(checkpoint: Checkpoint) -> dict[str, Any]:
    path = checkpoint.path / "manifest.json"
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        body = {name: value[name] for name in ("format", "files")}
        intact = value["sha256"] == _body_digest(body)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not intact:
        raise CheckpointError(f"{path}: its contents do not match its own checksum")
    if value["format"] != FORMAT:
        raise CheckpointError(f"{path}: checkpoint format {value['format']}, this version reads {FORMAT}")
    return value


def _body_digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


# Saving


def save(run: Run, *, best: bool = False) -> Checkpoint:
    """Write a checkpoint of `run` as it stands between two steps, then point to it, then prune old ones. All ranks.

    A crash at any moment leaves every earlier checkpoint as it was.
    """
    final = run.folder / "checkpoints" / f"step-{run.progress.step:08d}"
    staged = final.with_name(f".{final.name}.staged")
    if run.world.is_main:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
    run.world.wait()
    problem = run.world.agree(lambda: _write_rank(run, staged))
    if problem is None:
        problem = run.world.agree(partial(_publish, run, staged, final, best=best) if run.world.is_main else bool)
    if problem is not None:
        shutil.rmtree(staged, ignore_errors=True)
        raise CheckpointError(
            f"step {run.progress.step} could not be saved: {problem}. Earlier checkpoints are as they were"
        )
    return Checkpoint(final)


def _write_rank(run: Run, staged: Path) -> None:
    tensors: dict[str, Tensor] = {}
    pieces: dict[str, Any] = {}
    for name, tensor in _named_tensors(run).items():
        local, box, owns = _local(tensor, run.world.rank)
        if owns and local.numel():
            tensors[name] = local.detach().cpu().contiguous()
            pieces[name] = {"shape": list(tensor.shape), "box": box, "dtype": str(tensor.dtype).removeprefix("torch.")}
    tensors |= {f"rng.{name}": state for name, state in _torch_rng().items()}
    stem = staged / f"rank-{run.world.rank:05d}"
    save_file(tensors, stem.with_suffix(".safetensors"))
    write_json(stem.with_suffix(".json"), {"pieces": pieces, "rng": _python_rng()})
    _fsync(stem.with_suffix(".safetensors"))


def _publish(run: Run, staged: Path, final: Path, *, best: bool) -> None:
    write_json(staged / "state.json", _state(run))
    files = {path.name: {"size": path.stat().st_size, "sha256": file_sha256(path)} for path in sorted(staged.iterdir())}
    body = {"format": FORMAT, "files": files}
    write_json(staged / "manifest.json", body | {"sha256": _body_digest(body)})
    _fsync(staged)
    if final.exists():
        shutil.rmtree(final)
    os.replace(staged, final)
    _fsync(final.parent)
    for pointer in ("latest", "best") if best else ("latest",):
        write_json(final.parent / f"{pointer}.json", {"checkpoint": final.name})
    _prune(run)


def _state(run: Run) -> dict[str, Any]:
    return {
        "progress": asdict(run.progress),
        "config": run.record.config,
        "data": run.record.data.fingerprint,
        "ranks": run.world.ranks,
        "micro": run.micro,
    }


def _prune(run: Run) -> None:
    """Remove all but the newest `every.keep`, the best, and what a person pinned by a file named `pin` inside it."""
    folder = run.folder / "checkpoints"
    for left_by_a_crash in (*folder.glob(".step-*.removed"), *folder.glob(".step-*.staged")):
        shutil.rmtree(left_by_a_crash)
    kept = {checkpoint.path.name for checkpoint in checkpoints(run.folder)[: run.config.every.keep]}
    for pointer in folder.glob("*.json"):
        kept.add(json.loads(pointer.read_text(encoding="utf-8"))["checkpoint"])
    for checkpoint in checkpoints(run.folder):
        if checkpoint.path.name not in kept and not (checkpoint.path / "pin").exists():
            # Renamed first: a half-deleted checkpoint must not look like a whole one.
            gone = checkpoint.path.with_name(f".{checkpoint.path.name}.removed")
            os.replace(checkpoint.path, gone)
            shutil.rmtree(gone)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# What is saved


def _named_tensors(run: Run) -> dict[str, Tensor]:
    """Return everything that training changes: trained weights, buffers that are kept, and the optimizer's state."""
    named: dict[str, Tensor] = {}
    for name, parameter in _trained(run).items():
        named[f"model.{name}"] = parameter
        for key, value in run.optimizer.state.get(parameter, {}).items():
            named[f"optimizer.{name}.{key}"] = value
    return named | _buffers(run)


def _trained(run: Run) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in run.model.named_parameters() if parameter.requires_grad}


def _buffers(run: Run) -> dict[str, Tensor]:
    parameters = {name for name, _ in run.model.named_parameters(remove_duplicate=False)}
    return {f"model.{name}": value for name, value in run.model.state_dict().items() if name not in parameters}


def _local(tensor: Tensor, rank: int) -> tuple[Tensor, Box, bool]:
    """Return this rank's part of a tensor, where it lies in the whole, and whether this rank is the one to write it."""
    if not isinstance(tensor, DTensor):
        return tensor, tuple((0, size) for size in tensor.shape), rank == 0
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    coordinate: Sequence[int] = tensor.device_mesh.get_coordinate() or ()
    owns = all(
        place == 0 for place, placement in zip(coordinate, tensor.placements, strict=True) if placement.is_replicate()
    )
    return tensor.to_local(), tuple((start, start + size) for start, size in zip(offset, shape, strict=True)), owns


def _torch_rng() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _python_rng() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)  # noqa: NPY002, what libraries draw from
    inner = {
        name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in numpy_state["state"].items()
    }
    return {"python": [version, list(words), gauss], "numpy": {**numpy_state, "state": inner}}


# Reading


def restore(run: Run) -> Checkpoint | None:
    """Bring `run` to the newest checkpoint that is whole, and return it, or None when there is none. All ranks.

    One that is not whole is set aside under a name that says so, and the next older one is tried.
    """
    for checkpoint in checkpoints(run.folder):
        problem = run.world.agree(partial(verify, checkpoint))
        if problem is None:
            _load(run, checkpoint)
            return checkpoint
        _set_aside(run, checkpoint, problem)
    return None


def _set_aside(run: Run, checkpoint: Checkpoint, problem: str) -> None:
    if run.world.is_main:
        aside = checkpoint.path.with_name(f"damaged-{checkpoint.path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(checkpoint.path, aside)
    run.note(
        notes=(
            *run.record.notes,
            f"Checkpoint {checkpoint.path.name} was damaged and set aside ({problem.split(': ', 1)[-1]}).",
        )
    )
    run.world.wait()


def _load(run: Run, checkpoint: Checkpoint) -> None:
    state = checkpoint.state()
    run.progress = Progress(**state["progress"])
    pieces = _Pieces(checkpoint)
    if unknown := pieces.names("model.") - _named_tensors(run).keys():
        raise CheckpointError(f"{checkpoint.path}: the model has no {min(unknown)}: the checkpoint is of another model")
    with torch.no_grad():
        for name, parameter in _trained(run).items():
            pieces.fill(f"model.{name}", parameter)
            run.optimizer.state[parameter] = {
                key: pieces.like(f"optimizer.{name}.{key}", parameter) for key in pieces.after(f"optimizer.{name}.")
            }
        for name, buffer in _buffers(run).items():
            pieces.fill(name, buffer)
    _restore_rng(run, checkpoint)


def _restore_rng(run: Run, checkpoint: Checkpoint) -> None:
    """Give each rank its own random state back; ranks that were not there before are seeded afresh."""
    stem = checkpoint.path / f"rank-{run.world.rank:05d}"
    if not stem.with_suffix(".json").exists():
        torch.manual_seed(run.config.seed + 1000 * run.world.rank + run.progress.step)
        return
    with safe_open(stem.with_suffix(".safetensors"), framework="pt") as file:
        torch.set_rng_state(file.get_tensor("rng.cpu"))
        if torch.cuda.is_available() and "rng.cuda" in list(file.keys()):
            torch.cuda.set_rng_state(file.get_tensor("rng.cuda"))
    rng = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))["rng"]
    version, words, gauss = rng["python"]
    random.setstate((version, tuple(words), gauss))
    inner = {
        name: np.array(value, dtype=np.uint32) if isinstance(value, list) else value
        for name, value in rng["numpy"]["state"].items()
    }
    np.random.set_state({**rng["numpy"], "state": inner})  # noqa: NPY002


@dataclass(frozen=True)
class _Piece:
    """A block of a tensor, and the file that holds it."""

    file: Path
    shape: tuple[int, ...]
    box: Box
    dtype: str


class _Pieces:
    """All pieces of a checkpoint's tensors, over the files of all ranks that wrote it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._pieces: dict[str, list[_Piece]] = {}
        for index in sorted(checkpoint.path.glob("rank-*.json")):
            for name, piece in json.loads(index.read_text(encoding="utf-8"))["pieces"].items():
                box = tuple((start, stop) for start, stop in piece["box"])
                found = _Piece(index.with_suffix(".safetensors"), tuple(piece["shape"]), box, piece["dtype"])
                self._pieces.setdefault(name, []).append(found)

    def names(self, prefix: str) -> set[str]:
        """Return the names of the tensors that begin with `prefix`."""
        return {name for name in self._pieces if name.startswith(prefix)}

    def after(self, prefix: str) -> list[str]:
        """Return what follows `prefix` in the names that begin with it, such as an optimizer's state of one weight."""
        return [name.removeprefix(prefix) for name in self._pieces if name.startswith(prefix)]

    def like(self, name: str, parameter: Tensor) -> Tensor:
        """Return a saved tensor, laid out over the ranks as `parameter` is when it has its shape."""
        piece = self._pieces[name][0]
        if piece.shape == tuple(parameter.shape):
            return self.fill(name, torch.empty_like(parameter, dtype=getattr(torch, piece.dtype), requires_grad=False))
        return _read(piece, name, ()).to(parameter.device)

    def fill(self, name: str, target: Tensor) -> Tensor:
        """Copy a saved tensor into `target`, or into this rank's part of it; return `target`."""
        pieces = self._pieces.get(name, [])
        if not pieces or pieces[0].shape != tuple(target.shape):
            found = pieces[0].shape if pieces else "nothing"
            raise CheckpointError(
                f"the checkpoint has {found} for {name}, the model {tuple(target.shape)}: it is of another model"
            )
        local, box, _ = _local(target, 0)
        for piece in pieces:
            overlap = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, piece.box, strict=True)]
            if all(start < stop for start, stop in overlap):
                local[_slices(overlap, box)].copy_(_read(piece, name, _slices(overlap, piece.box)))
        return target


def _slices(overlap: Sequence[tuple[int, int]], box: Box) -> tuple[slice, ...]:
    return tuple(slice(start - origin, stop - origin) for (start, stop), (origin, _) in zip(overlap, box, strict=True))


def _read(piece: _Piece, name: str, where: tuple[slice, ...]) -> Tensor:
    with safe_open(piece.file, framework="pt") as file:
        value: Tensor = file.get_slice(name)[where] if where else file.get_tensor(name)
    return value
