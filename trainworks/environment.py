"""What a run ran on: machine, software, git state, and the command that started it."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from trainworks.record import Environment
from trainworks.redaction import safe_words

if TYPE_CHECKING:
    from trainworks.parallel.launch import World

__all__ = ["command", "environment", "launched"]

_PACKAGES = ("trainworks", "torch", "transformers", "accelerate", "peft", "datasets", "tokenizers")
_MODULES = {"accelerate.commands.launch": ["accelerate", "launch"], "torch.distributed.run": ["torchrun"]}
_SCRIPTS = ("accelerate", "torchrun")


def environment(world: World) -> Environment:
    """Return the machine, the processes and the software of this process."""
    commit = _git("rev-parse", "HEAD")
    return Environment(
        python=platform.python_version(),
        platform=platform.platform(),
        versions={name: version(name) for name in _PACKAGES},
        device=torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else _processor_name(),
        world_size=world.accelerator.num_processes,
        layout=world.layout.sizes(),
        distributed=world.accelerator.distributed_type.value,
        mixed_precision=world.accelerator.mixed_precision,
        git_commit=commit,
        git_dirty=None if commit is None else bool(_git("status", "--porcelain")),
    )


def command(kind: str) -> str:
    """Return what was typed, hardware file and number of processes included, or the call a notebook makes."""
    if Path(sys.argv[0]).parts[-2:] != (kind, "__main__.py"):
        return f"{kind}.fit({kind}.prepare(config))"
    typed = launched(_parent_command(), kind) or ["python", "-m", kind, *sys.argv[1:]]
    return shlex.join(safe_words(typed))


def launched(words: Sequence[str], kind: str) -> list[str]:
    """Return a launcher's command line as it was typed, from its process's words; nothing when it is no launcher of
    `kind`.

    >>> launched(["/usr/bin/python3", "/usr/bin/torchrun", "-m", "finetune", "a.yaml"], "finetune")
    ['torchrun', '-m', 'finetune', 'a.yaml']
    """
    if kind not in words:
        return []
    for place, word in enumerate(words[:3]):
        if word in _MODULES:
            return [*_MODULES[word], *words[place + 1 :]]
        if Path(word).name in _SCRIPTS:
            return [Path(word).name, *words[place + 1 :]]
    return []


def _parent_command() -> list[str]:
    """Return the words that started this process's parent; only Linux tells."""
    try:
        raw = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:
        return []
    return [word.decode(errors="replace") for word in raw.rstrip(b"\0").split(b"\0")]


def _processor_name() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return f"{names[0]} ({len(names)} cores)" if names else platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
