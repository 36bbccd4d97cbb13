"""Every error a user can meet, and the exit code of the process that meets it.

ToolkitError                 (2)  anything the toolkit itself reports
├── ConfigError              (2)  the run file or a setting; carries every problem at once
├── DataError                (2)  rows, columns, files
├── TrainingError            (2)  the run itself went wrong: a loss that is not a number
├── EvaluationError          (2)  a metric or a report that cannot be computed
├── LaunchError              (3)  the machine is not the one asked for
├── AccessError              (3)  something outside could not be reached or refused us: the Hub, a token
├── CheckpointError          (3)  a run folder that cannot be continued or written
├── CheckError               (3)  what `verify-resume` or `selfcheck` was to prove does not hold
└── PublishError             (3)  the upload, or a card that would mislead
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import ClassVar

__all__ = [
    "EXIT_INTERRUPTED",
    "EXIT_OK",
    "EXIT_PREEMPTED",
    "AccessError",
    "CheckError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "EvaluationError",
    "LaunchError",
    "Problem",
    "PublishError",
    "ToolkitError",
    "TrainingError",
    "nearest",
]

EXIT_OK = 0
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 130


class ToolkitError(Exception):
    """Say where, what was found, what is allowed, and how to mend it; a command prints it without a traceback."""

    exit_code: ClassVar[int] = 2


@dataclass(frozen=True)
class Problem:
    """One mistake of a configuration: `where` (file:line), the dotted `key`, and a `message` that says how to mend
    it."""

    where: str
    key: str
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.key, self.message) if part)


class ConfigError(ToolkitError):
    """Every problem found in a configuration, one line each."""

    def __init__(self, problems: Sequence[Problem] | str) -> None:
        self.problems = (Problem("", "", problems),) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class DataError(ToolkitError):
    """A source, file, column or row that cannot be used as the run asks."""


class TrainingError(ToolkitError):
    """Training that cannot go on as it is configured."""


class EvaluationError(ToolkitError):
    """A metric that is unknown, or cannot be computed from what there is."""


class LaunchError(ToolkitError):
    """The processes, devices or precision asked for are not the ones there are."""

    exit_code = 3


class AccessError(ToolkitError):
    """The Hub, or a name on it, could not be reached or did not let us in."""

    exit_code = 3


class CheckpointError(ToolkitError):
    """A run folder or checkpoint that cannot be written, read or continued."""

    exit_code = 3


class CheckError(ToolkitError):
    """Two runs that should be equal are not, or one of them did not come to its end."""

    exit_code = 3


class PublishError(ToolkitError):
    """A card with claims its record does not hold, or an upload that failed."""

    exit_code = 3


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the closest of the `known` spellings, or an empty string.

    >>> nearest("epoch", ["epochs", "steps"])
    " (did you mean 'epochs'?)"
    """
    match = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{match[0]}'?)" if match else ""
