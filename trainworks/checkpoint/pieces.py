"""The tensors that a checkpoint holds, cut to the pieces that each rank owns, and put together again from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainworks.checkpoint.folder import Checkpoint
from trainworks.errors import CheckpointError
from trainworks.parallel.launch import World
from trainworks.parallel.placement import Box, is_keeper, local_part
from trainworks.run import Run

__all__ = ["Piece", "Pieces", "buffers", "named_tensors", "owned", "trained"]


def named_tensors(run: Run) -> dict[str, Tensor]:
    """Return everything of this rank's that training changes: trained weights and their averages, buffers that are
    kept, and the optimizer's state."""
    named: dict[str, Tensor] = {}
    for name, parameter in run.trained().items():
        named[f"model.{name}"] = parameter
        for key, value in run.optimizer.state.get(parameter, {}).items():
            named[f"optimizer.{name}.{key}"] = value
        if run.averages is not None and parameter in run.averages.values:
            named[f"average.{name}"] = run.averages.values[parameter]
    return named | buffers(run)


def trained(run: Run) -> dict[str, Tensor]:
    """Return the weights that are trained, by name."""
    return {name: parameter for name, parameter in run.model.named_parameters() if parameter.requires_grad}


def buffers(run: Run) -> dict[str, Tensor]:
    """Return what the model keeps besides its weights, such as running means, by name."""
    names = {name for name, _ in run.model.named_buffers(remove_duplicate=False)}
    return {f"model.{name}": value for name, value in run.model.state_dict().items() if name in names}


@dataclass(frozen=True)
class Piece:
    """A block of a tensor: where it belongs in the whole, and the file that holds it.

    What is read from a file is checked: a checkpoint may come from anybody.
    """

    shape: tuple[int, ...]
    """Of the whole tensor."""
    box: Box
    dtype: Annotated[str, Field(pattern="^(float|bfloat|uint|int|bool|complex)[0-9]*$")]
    file: Annotated[str, Field(pattern=r"^(rank-[0-9]+-[0-9]+\.safetensors)?$")] = ""


_INDEX = TypeAdapter(dict[str, Piece])


def owned(tensors: dict[str, Tensor], world: World) -> Iterator[tuple[str, Tensor, Piece]]:
    """Yield (name, this rank's part, its place) of the tensors that this rank is the one to write a part of."""
    for name, tensor in tensors.items():
        local, box = local_part(tensor)
        if is_keeper(tensor, world) and local.numel():
            yield name, local.detach(), Piece(tuple(tensor.shape), box, str(tensor.dtype).removeprefix("torch."))


class Pieces:
    """All pieces of a checkpoint's tensors, over the files of all ranks that wrote it. The checkpoint was verified."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._folder = checkpoint.path
        self._pieces: dict[str, list[Piece]] = {}
        for index in sorted(path.name for path in checkpoint.path.glob("rank-*.json")):
            try:
                pieces = _INDEX.validate_python(checkpoint.read(index).get("pieces"))
            except ValidationError as error:
                raise CheckpointError(f"{checkpoint.path / index}: {error.errors()[0]['msg']}") from error
            for name, piece in pieces.items():
                self._pieces.setdefault(name, []).append(piece)

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
        return _read(self._folder / piece.file, name, ()).to(parameter.device)

    def fill(self, name: str, target: Tensor) -> Tensor:
        """Copy a saved tensor into `target`, or into this rank's part of it; return `target`."""
        pieces = self._pieces.get(name, [])
        if not pieces or pieces[0].shape != tuple(target.shape):
            found = pieces[0].shape if pieces else "nothing"
            raise CheckpointError(
                f"the checkpoint has {found} for {name}, the model {tuple(target.shape)}: it is of another model"
            )
        local, box = local_part(target)
        for piece in pieces:
            overlap = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, piece.box, strict=True)]
            if all(start < stop for start, stop in overlap):
                part = _read(self._folder / piece.file, name, _slices(overlap, piece.box))
                local[_slices(overlap, box)].copy_(part)
        return target


def _slices(overlap: Sequence[tuple[int, int]], box: Box) -> tuple[slice, ...]:
    return tuple(slice(start - origin, stop - origin) for (start, stop), (origin, _) in zip(overlap, box, strict=True))


def _read(file: Path, name: str, where: tuple[slice, ...]) -> Tensor:
    try:
        with safe_open(file, framework="pt") as opened:
            value: Tensor = opened.get_slice(name)[where] if where else opened.get_tensor(name)
    except SafetensorError as error:
        raise CheckpointError(f"{file}: {name} cannot be read: {error}") from error
    return value
