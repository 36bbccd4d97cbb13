"""Rows that cannot be used: where each stands, what is wrong with it and the mend; and whether they end the run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn
from uuid import uuid4

from trainworks.errors import DataError
from trainworks.redaction import redacted

__all__ = ["BadRow", "BadRows", "BadRowsError", "Policy", "excerpt"]

Policy = Literal["error", "skip", "quarantine"]

EXCERPT = 80
_SHOWN = 10
_MOST = 1_000
_ADVICE = "to leave such rows out: data.bad_rows: skip, or quarantine, which lists them too"


@dataclass(frozen=True, slots=True)
class BadRow:
    """One row that cannot be used. `str` gives `file:line: row N (from 0), column 'name': reason: detail; mend`."""

    reason: str
    """The kind of mistake, in two or three words: what bad rows are counted by."""
    mend: str
    """What to do about it."""
    detail: str = ""
    """What is wrong here, where the reason alone does not say it."""
    excerpt: str = ""
    """What was found, by `excerpt`: at most 80 characters, none of them a control character."""
    file: str = ""
    """The file, or the source where rows are in no file."""
    line: int | None = None
    """The line of the mistake, or the one in which its row begins, from 1; None in files that have no lines."""
    row: int | None = None
    """The row, from 0, bad ones counted; None where the file as a whole is meant."""
    column: str | None = None

    def __str__(self) -> str:
        file = f"{self.file}:{self.line}" if self.line is not None else self.file
        row = f"row {self.row} (from 0)" if self.row is not None else ""
        column = f"column '{excerpt(self.column)}'" if self.column is not None else ""
        place = ", ".join(part for part in (row, column) if part)
        what = f"{self.reason}, {self.detail}" if self.detail else self.reason
        found = f"found {self.excerpt}; " if self.excerpt else ""
        return ": ".join(part for part in (file, place, f"{what}; {found}{self.mend}") if part)


class BadRowsError(DataError):
    """Rows that cannot be used: `problems`, the first of them, each on its line of the message, and `more` like them.

    It comes whole out of a worker process.
    """

    def __init__(self, problems: Sequence[BadRow], *, more: int = 0, advice: str = "") -> None:
        self.problems, self.more, self.advice = tuple(problems), more, advice
        left = len(self.problems) - _SHOWN
        count = max(left, 0) + more
        lines = [*map(str, self.problems[:_SHOWN]), *([f"and {count:,} more"] if count else []), advice]
        super().__init__("\n".join(line for line in lines if line))

    def __reduce__(self) -> Any:
        """Return how it is made again: from the rows, not from the message."""
        return partial(BadRowsError, more=self.more, advice=self.advice), (self.problems,)


class BadRows:
    """Take bad rows as they are found, and do with them what the policy says.

    `error` raises a BadRowsError in `finish`, or as soon as there are a thousand; `skip` counts them by reason;
    `quarantine` also writes them to `listing`, one JSON object per line, a file that is there after `finish`.
    """

    def __init__(self, policy: Policy, listing: Path) -> None:
        self.policy = policy
        self.listing = listing
        self.counts: Counter[str] = Counter()
        self._first: list[BadRow] = []
        self._staged = listing.with_name(f".{listing.name}.{uuid4().hex}")

    def add(self, problem: BadRow) -> None:
        """Take one bad row."""
        self.extend([problem])

    def extend(self, problems: Sequence[BadRow]) -> None:
        """Take some bad rows."""
        self.counts.update(problem.reason for problem in problems)
        self._first += problems[: max(0, _SHOWN - len(self._first))]
        if self.policy == "error" and self.counts.total() >= _MOST:
            self.raise_first(f"reading stopped there; {_ADVICE}")
        if self.policy == "quarantine" and problems:
            self._staged.parent.mkdir(parents=True, exist_ok=True)
            with self._staged.open("a", encoding="utf-8") as file:
                file.writelines(
                    f"{json.dumps(redacted(asdict(problem)), ensure_ascii=False)}\n" for problem in problems
                )

    def finish(self) -> None:
        """Raise a BadRowsError with the first ten, where the policy is `error`; put the list where it belongs."""
        if self.policy == "error" and self._first:
            self.raise_first(_ADVICE)
        if self._staged.exists():
            self._staged.replace(self.listing)

    def raise_first(self, advice: str) -> NoReturn:
        """Raise a BadRowsError with the first ten and a last line of advice, whatever the policy."""
        raise BadRowsError(self._first, more=self.counts.total() - len(self._first), advice=advice)

    def discard(self) -> None:
        """Remove a list that will not be finished."""
        self._staged.unlink(missing_ok=True)


def excerpt(text: str, at: int = 0) -> str:
    """Return the text around place `at`, at most 80 characters, control characters and lone surrogates escaped."""
    start = max(0, at - EXCERPT // 2)
    shown = "".join(
        sign if sign.isprintable() else sign.encode("unicode_escape").decode()
        for sign in text[start : start + EXCERPT].strip()
    )
    return shown if len(shown) <= EXCERPT else f"{shown[: EXCERPT - 3]}..."
