"""Checkpoints: staged, checksummed, renamed into place in one step, and read back on any number of ranks.

A checkpoint is a folder `checkpoints/step-00000200`:

    manifest.json                  every file with its size and SHA-256; written last: a folder without it never counts
    state.json                     progress, and what the run was
    rank-00000-00000.safetensors   this rank's pieces of the weights and the optimizer's state, in files of bounded size
    rank-00000.json                where each piece belongs in its whole tensor; this rank's random states
    best                           empty; the checkpoint is the best so far
    pin                            empty; put there by a person: the checkpoint is never removed

Every rank writes its own files. A tensor that is the same on several ranks is written once. Reading looks up, for each
tensor it wants (or each rank's part of it), the pieces that overlap it, so a run saved on four ranks goes on with one.
There is no pickle in any of it.
"""

from trainworks.checkpoint.folder import Checkpoint, checkpoints, verify
from trainworks.checkpoint.restoring import restore
from trainworks.checkpoint.saving import Saver, save

__all__ = ["Checkpoint", "Saver", "checkpoints", "restore", "save", "verify"]
