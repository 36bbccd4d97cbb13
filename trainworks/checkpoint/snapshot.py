"""A run as it stands between two steps, as what one rank has to write of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from trainworks.checkpoint.pieces import Piece, named_tensors, owned, trained
from trainworks.checkpoint.randomness import random_states
from trainworks.fail_points import reached
from trainworks.optim import num_moments
from trainworks.record import file_sha256, sync, write_json
from trainworks.run import Run

__all__ = ["HostCopies", "Snapshot", "expected_bytes", "snapshot"]

PART_BYTES = 2**31
"""Most bytes of tensors in one file, and so held on the host at once while a checkpoint is written."""


_HEADER = 512
"""Bytes that a tensor's name and place take, about."""


@dataclass(frozen=True)
class Snapshot:
    """What one rank writes. Its tensors are the run's own until `HostCopies.of` has copied them."""

    rank: int
    step: int
    state: dict[str, Any]
    """`state.json`."""
    random: dict[str, Any]
    tensors: dict[str, Tensor]
    pieces: dict[str, Piece]

    @property
    def num_bytes(self) -> int:
        """How much room it takes on disk, within a few kB."""
        return sum(tensor.nbytes + _HEADER for tensor in self.tensors.values()) + 2**16

    def write(self, folder: Path) -> dict[str, str]:
        """Write this rank's files, see them on the disk, and return the SHA-256 of each by name."""
        digests: dict[str, str] = {}
        index: dict[str, Any] = {}
        for number, part in enumerate(self._parts()):
            path = folder / f"rank-{self.rank:05d}-{number:05d}.safetensors"
            save_file({name: self.tensors[name].cpu().contiguous() for name in part}, path)
            sync(path)
            digests[path.name] = file_sha256(path)
            index |= {name: asdict(replace(self.pieces[name], file=path.name)) for name in part}
            reached("save.part")
        path = folder / f"rank-{self.rank:05d}.json"
        write_json(path, {"pieces": index, "random": self.random})
        reached("save.rank")
        return digests | {path.name: file_sha256(path)}

    def _parts(self) -> list[list[str]]:
        parts: list[list[str]] = []
        room = 0
        for name, tensor in self.tensors.items():
            if room < tensor.nbytes or not parts:
                parts.append([])
                room = PART_BYTES
            parts[-1].append(name)
            room -= tensor.nbytes
        return parts


def snapshot(run: Run) -> Snapshot:
    """Return this rank's part of a run, without copying a tensor. All ranks."""
    own = list(owned(named_tensors(run), run.world))
    return Snapshot(
        rank=run.world.process,
        step=run.progress.step,
        state={
            "progress": asdict(run.progress),
            "watch": run.watch.state(),
            "config": run.record.config,
            "data": run.record.data.fingerprint,
            "ranks": run.world.processes,
            "micro": run.micro,
        },
        random=random_states(),
        tensors={name: tensor for name, tensor, _ in own},
        pieces={name: piece for name, _, piece in own},
    )


def expected_bytes(run: Run) -> int:
    """Return what this rank's part of a checkpoint will take on disk, moments that are not there yet included."""
    taken = snapshot(run)
    if any(name.startswith("optimizer.") for name in taken.tensors):
        return taken.num_bytes
    weights = [taken.tensors[f"model.{name}"] for name in trained(run) if f"model.{name}" in taken.tensors]
    moments = num_moments(run.config.optim) + (run.config.optim.average is not None)
    # Besides its moments each weight has a number of steps.
    return taken.num_bytes + sum(moments * weight.nbytes + (moments + 1) * _HEADER for weight in weights)


@dataclass
class HostCopies:
    """Memory of the host that snapshots are copied into, the same one every time.

    From a GPU the copy goes on beside the next step's forward and backward pass; the optimizer waits for it before it
    changes the weights.
    """

    optimizer: torch.optim.Optimizer
    _memory: dict[str, Tensor] = field(default_factory=dict)
    _stream: Any = None
    _done: Any = None

    def of(self, taken: Snapshot) -> Snapshot:
        """Return the snapshot with tensors of its own; they are complete once `wait` returns."""
        if not any(tensor.is_cuda for tensor in taken.tensors.values()):
            return replace(taken, tensors={name: self._copied(name, part) for name, part in taken.tensors.items()})
        if self._stream is None:
            self._stream, self._done = torch.cuda.Stream(), torch.cuda.Event()
            self.optimizer.register_step_pre_hook(self._before_step)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            copies = {name: self._copied(name, part) for name, part in taken.tensors.items()}
            self._done.record(self._stream)
        return replace(taken, tensors=copies)

    def wait(self) -> None:
        """Wait until the tensors of the last snapshot are all there."""
        if self._done is not None:
            self._done.synchronize()

    def _before_step(self, *_: Any) -> None:
        torch.cuda.current_stream().wait_event(self._done)

    def _copied(self, name: str, tensor: Tensor) -> Tensor:
        if name not in self._memory:
            self._memory[name] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return self._memory[name].copy_(tensor, non_blocking=tensor.is_cuda)
