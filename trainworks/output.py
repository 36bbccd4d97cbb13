"""The output folder of a run: whose it is, before anything is loaded or written."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from trainworks.config import differences, resolved
from trainworks.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_PREEMPTED, CheckpointError, ConfigError
from trainworks.record import Outcome, read_outcome, read_record, write_json
from trainworks.redaction import redacted
from trainworks.schema import RunConfig

__all__ = ["accepted_changes", "accepts", "check_folder", "is_complete", "write_outcome"]

Config = RunConfig[Any]

_CHANGEABLE = (
    "about",
    "accept",
    "every",
    "faults",
    "layout",
    "trackers",
    "hub",
    "goal",
    "early_stop",
    "data.workers",
    "data.prepare_workers",
    "data.clean.workers",
    "data.clean.executor",
    "data.sources.*.clean.workers",
    "data.sources.*.clean.executor",
    "batch.micro",
    "speed.background_saving",
)
"""Keys that may differ when a run is continued: they do not touch what is learned."""

_FIXED = {
    "seed": "it decides which rows are held out, and the order of the others",
    "task": "it decides what a sample is",
    "batch.pack": "it decides what a sample is",
    "tuning.type": "the checkpoint holds other weights",
    "tuning.rank": "the checkpoint holds other weights",
    "tuning.targets": "the checkpoint holds other weights",
    "tuning.options": "the checkpoint holds other weights",
    "tuning.train": "the checkpoint holds other weights",
    "tuning.freeze": "the checkpoint holds other weights",
    "tuning.method": "the checkpoint holds other weights",
    "model.new_tokens": "the checkpoint holds other weights",
    "optim.name": "the checkpoint holds the moments of the other",
}
"""Keys that may not differ even where that is accepted, and why: what was done so far would mean nothing."""


def check_folder(config: Config) -> None:
    """Raise ConfigError when the output folder holds anything but this very run."""
    folder = Path(config.output)
    _check_place(folder)
    _check_links(folder)
    if not (folder / "run.json").exists():
        if folder.exists() and _foreign(folder):
            raise ConfigError(f"output: {folder} holds files that are not a run's; name another folder")
        return
    accepted_changes(config, read_record(folder).config)


def accepted_changes(config: Config, old: Mapping[str, Any]) -> list[str]:
    """Return what `config` accepts to be other than it was, as `optim.lr: 0.1 -> 0.2`; ConfigError lists what it does
    not."""
    changed = [line for line in differences(old, redacted(resolved(config))) if not _may_change(_key(line))]
    fixed = {line: why for line in changed for key, why in _FIXED.items() if _matches(_key(line), (key,))}
    refused = [line for line in changed if not accepts(config, _key(line)) or line in fixed]
    if refused:
        raise ConfigError(
            f"output: {config.output} holds another run; name another folder, restore these keys to continue it, or "
            "say in `accept` which may differ:\n  "
            + "\n  ".join(line + (f" (cannot be accepted: {fixed[line]})" if line in fixed else "") for line in refused)
        )
    return changed


def accepts(config: Config, key: str) -> bool:
    """Tell whether the configuration accepts that a key, or a section that holds it, is other than it was."""
    return _matches(key, config.accept)


def _may_change(key: str) -> bool:
    return _matches(key, _CHANGEABLE)


def _key(line: str) -> str:
    return line.partition(":")[0]


def _matches(key: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(key, pattern) or fnmatchcase(key, f"{pattern}.*") for pattern in patterns)


def _check_place(folder: Path) -> None:
    """See that the folder is there or can be made, without making it."""
    nearest_there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not nearest_there.is_dir():
        raise ConfigError(f"output: {folder} cannot be a folder: {nearest_there} is a file; name another")
    if not os.access(nearest_there, os.W_OK | os.X_OK):
        raise ConfigError(f"output: {folder}: {nearest_there} may not be written to; name another folder")


def _check_links(folder: Path) -> None:
    """See that no link leads out of the folder, which may have come from elsewhere: a run would write there."""
    for path in folder.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(
                f"output: {path} is a link that leads out of the folder; put what it leads to in its place, or name "
                "the folder there as output"
            )


def _foreign(folder: Path) -> bool:
    return any(
        entry.name not in ("outcome.json", "stacks", "trackers") and not entry.name.startswith(".")
        for entry in folder.iterdir()
    )


def is_complete(config: Config) -> bool:
    """Tell whether the folder holds this run, trained and exported, with no change that is accepted; ConfigError when
    it holds anything else."""
    check_folder(config)
    folder = Path(config.output)
    if not (folder / "run.json").exists():
        return False
    record = read_record(folder)
    return record.status == "complete" and not accepted_changes(config, record.config) and _ended_well(folder)


def _ended_well(folder: Path) -> bool:
    try:
        return read_outcome(folder).code == EXIT_OK
    except CheckpointError:
        return False


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Write `outcome.json`, and then in the record of a run that was on its way that it is not. One process."""
    write_json(folder / "outcome.json", outcome.model_dump())
    if outcome.code != EXIT_OK and (folder / "run.json").exists():
        record = read_record(folder)
        if record.status == "running":
            status = {EXIT_PREEMPTED: "preempted", EXIT_INTERRUPTED: "interrupted"}.get(outcome.code, "failed")
            record.model_copy(update={"status": status}).write(folder)
