"""The output folder of a run: whose it is, before anything is loaded or written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainworks.config import differences, resolved
from trainworks.errors import ConfigError
from trainworks.record import read_record
from trainworks.schema import RunConfig

__all__ = ["check_folder", "is_complete"]

Config = RunConfig[Any]

_CHANGEABLE = ("about", "every", "trackers", "hub", "goal", "data.workers", "batch.micro")
"""Keys that may differ when a run is continued: they do not touch what is learned."""


def check_folder(config: Config) -> None:
    """Raise ConfigError when the output folder holds anything but this very run."""
    folder = Path(config.output)
    if not (folder / "run.json").exists():
        if folder.exists() and (not folder.is_dir() or _foreign(folder)):
            raise ConfigError(f"output: {folder} holds files that are not a run's; name another folder")
        return
    old = read_record(folder).config
    changed = [line for line in differences(old, resolved(config)) if not line.startswith(_CHANGEABLE)]
    if changed:
        raise ConfigError(
            f"output: {folder} holds another run; name another folder, or restore these keys to continue it:\n  "
            + "\n  ".join(changed)
        )


def _foreign(folder: Path) -> bool:
    return any(
        entry.name not in ("outcome.json", "trackers") and not entry.name.startswith(".") for entry in folder.iterdir()
    )


def is_complete(config: Config) -> bool:
    """Tell whether the folder holds this run, finished; ConfigError when it holds anything else."""
    check_folder(config)
    folder = Path(config.output)
    return (folder / "run.json").exists() and read_record(folder).status == "complete"
