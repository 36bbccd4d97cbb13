"""Bring a run to where its newest whole checkpoint stands, on any number of ranks."""

from __future__ import annotations

from functools import partial

import torch

from trainworks.checkpoint.folder import Checkpoint, check_format, checkpoints, set_aside, verify
from trainworks.checkpoint.pieces import Pieces, buffers, named_tensors, trained
from trainworks.checkpoint.randomness import set_random_states
from trainworks.errors import CheckpointError
from trainworks.run import Progress, Run

__all__ = ["restore"]


def restore(run: Run) -> Checkpoint | None:
    """Bring `run` to the newest checkpoint that is whole, and return it, or None when there is none. All ranks.

    One that is not whole is set aside under a name that says so, and the next older one is tried. One that another
    version wrote is no such case: CheckpointError.
    """
    world = run.world
    for checkpoint in world.gather(checkpoints(run.folder))[0]:  # what the main process sees, should a disk lag behind
        check_format(checkpoint)
        problem = world.agree(partial(verify, checkpoint, share=(world.process, world.processes)))
        if problem is None:
            _load(run, checkpoint)
            return checkpoint
        if stuck := world.agree(partial(set_aside, checkpoint), main_only=True):
            raise CheckpointError(f"{checkpoint.path} is damaged ({problem.text}), and stays: {stuck.text}")
        note = f"Checkpoint {checkpoint.path.name} was damaged and set aside ({problem.text.split(': ', 1)[-1]})."
        run.note(notes=(*run.record.notes, note))
    return None


def _load(run: Run, checkpoint: Checkpoint) -> None:
    state = checkpoint.state()
    pieces = Pieces(checkpoint)
    known = {name for names in run.world.gather(list(named_tensors(run))) for name in names}
    if unknown := pieces.names("model.") - known:
        raise CheckpointError(f"{checkpoint.path}: the model has no {min(unknown)}: the checkpoint is of another model")
    run.stand_at(Progress(**state["progress"]))
    run.watch.load(state["watch"])
    with torch.no_grad():
        for name, parameter in trained(run).items():
            pieces.fill(f"model.{name}", parameter)
            run.optimizer.state[parameter] = {
                key: pieces.like(f"optimizer.{name}.{key}", parameter) for key in pieces.after(f"optimizer.{name}.")
            }
        if run.averages is not None:
            averages = pieces.names("average.")
            run.averages.values = {
                parameter: pieces.like(f"average.{name}", parameter)
                for name, parameter in trained(run).items()
                if f"average.{name}" in averages
            }
        for name, buffer in buffers(run).items():
            pieces.fill(name, buffer)
    _restore_random_states(run, checkpoint)


def _restore_random_states(run: Run, checkpoint: Checkpoint) -> None:
    """Give each rank its own random states back; ranks that were not there before are seeded afresh."""
    name = f"rank-{run.world.process:05d}.json"
    if (checkpoint.path / name).exists():
        set_random_states(checkpoint.read(name)["random"])
    else:
        torch.manual_seed(run.config.seed + 1000 * run.world.share + run.progress.step)
