"""Who is to blame when ranks cannot go on together: told from each rank's last sign of life, by rules and no clock of
its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from trainworks.errors import EXIT_OK

__all__ = ["EXIT_ENVIRONMENT", "HOLD", "Report", "Seen", "Sign", "Verdict", "judge"]

EXIT_ENVIRONMENT = 3

HOLD = 1.0
"""Seconds in which a better reason may come: a rank that is killed breaks the others' exchanges in the same moment."""


@dataclass(frozen=True)
class Report:
    """Why the main thread of a rank ends before its time."""

    kind: Literal["error", "complaint", "stop"]
    """A `complaint` is an error that another rank caused: an exchange with it broke. A `stop` was asked for."""
    code: int
    text: str


@dataclass(frozen=True)
class Sign:
    """A rank's sign of life."""

    rank: int
    host: str
    pid: int
    step: int | None = None
    """Optimizer steps done, once there are any to do."""
    place: str = ""
    """The modules that its main thread is in, from the outermost."""
    exchanges: int = 0
    """How many exchanges with the others it has come to; all ranks come to the same ones, in the same order."""
    waited: float | None = None
    """Seconds for which it has waited in the newest; None when it is in none."""
    since: float = 0.0
    """Seconds since it came to the newest, which it may have left: a GPU's exchanges are waited for elsewhere."""
    patient: bool = False
    """Whether that one may take as long as it takes."""
    report: Report | None = None
    left: bool = False
    """Whether it needs the others no more."""

    @classmethod
    def read(cls, value: Mapping[str, Any]) -> Self:
        """Return a sign from its JSON."""
        sign = cls(**value)
        return replace(sign, report=Report(**value["report"])) if value["report"] else sign

    def __str__(self) -> str:
        where = f" in {self.place}" if self.place else ""
        step = "before the first step" if self.step is None else f"after step {self.step}"
        return f"rank {self.rank} (host {self.host}, process {self.pid}; last seen {step}{where})"


@dataclass
class Seen:
    """What is known of a rank."""

    sign: Sign
    heard: float
    """When its last sign came; this and all times here are one process's `time.monotonic`."""
    reported: float = 0.0
    """When its report came."""
    gone: float | None = None
    """When its process ended."""
    how: str = ""
    """How that ended, where it can be told: `was killed by SIGKILL`, `exited with 0`."""

    @property
    def lives(self) -> bool:
        """Whether it takes part, if only by what it said last."""
        return not self.sign.left and not self.died

    @property
    def died(self) -> bool:
        """Whether its process ended without a word."""
        return self.gone is not None and not self.sign.left and self.sign.report is None

    def waits_since(self) -> float | None:
        """Return since when it waits for others, by its last sign."""
        return None if self.sign.waited is None else self.heard - self.sign.waited


@dataclass(frozen=True)
class Verdict:
    """Why all ranks end."""

    ranks: tuple[int, ...]
    """The culprits."""
    code: int
    reason: str
    report: Report | None = None
    """What the culprit itself said, and is about to end by."""

    @classmethod
    def read(cls, value: Mapping[str, Any]) -> Self:
        """Return a verdict from its JSON."""
        report = value["report"] and Report(**value["report"])
        return cls(**{**value, "ranks": tuple(value["ranks"]), "report": report})

    @property
    def is_fault(self) -> bool:
        """Whether something went wrong, so that it helps to know where everyone stood."""
        return self.report is None or self.report.kind != "stop"

    @property
    def is_told_by_rank_0(self) -> bool:
        """Whether rank 0 ends by its own error, and says so as a single process does."""
        return self.report is not None and self.ranks == (0,)


def judge(ranks: Mapping[int, Seen], *, now: float, timeout: float) -> Verdict | None:
    """Return why the ranks cannot go on, or None while they can, as far as is known.

    Silence is nothing until `timeout` seconds are over: a thread that gives signs of life may be starved.
    """
    living = [seen for seen in ranks.values() if seen.lives]
    return (
        _died(ranks.values(), living)
        or _reported("error", living, now)
        or _complained(living, now)
        or _silent(living, now, timeout)
        or _late(living, timeout)
        or _reported("stop", living, now)
    )


def _died(ranks: Iterable[Seen], living: list[Seen]) -> Verdict | None:
    """A process that was killed or failed is missed at once; one that ended well, once another needs it."""
    dead = [seen for seen in ranks if seen.died and (seen.how not in ("", _WELL) or _missed(seen, living))]
    if not dead:
        return None
    # A launcher sends the others a SIGTERM as soon as one has died.
    first = min(dead, key=lambda seen: (seen.how == "was killed by SIGTERM", seen.gone, seen.sign.rank))
    return Verdict((first.sign.rank,), EXIT_ENVIRONMENT, f"{first.sign} {first.how or 'ended without a word'}")


_WELL = f"exited with {EXIT_OK}"


def _missed(dead: Seen, living: list[Seen]) -> bool:
    assert dead.gone is not None
    return any(
        _complains(seen) or (since is not None and seen.heard - max(since, dead.gone) >= HOLD)
        for seen in living
        for since in [seen.waits_since()]
    )


def _complains(seen: Seen) -> bool:
    return seen.sign.report is not None and seen.sign.report.kind == "complaint"


def _reported(kind: str, living: list[Seen], now: float) -> Verdict | None:
    """The first report of a kind counts; of several alike, the lowest rank's, which is the one that speaks."""
    told = [(seen, seen.sign.report) for seen in living if seen.sign.report and seen.sign.report.kind == kind]
    if not told:
        return None
    first, report = min(told, key=lambda pair: pair[0].reported)
    if now - first.reported < HOLD and any(seen.sign.report is None for seen in living):
        return None
    sign = min((seen.sign for seen, other in told if other == report), key=lambda sign: sign.rank)
    return Verdict((sign.rank,), report.code, f"{sign}: {report.text}", report=report)


def _complained(living: list[Seen], now: float) -> Verdict | None:
    """Who neither complains nor waits while the others complain did not come to the exchange."""
    told = [(seen, seen.sign.report) for seen in living if seen.sign.report and seen.sign.report.kind == "complaint"]
    if not told or now - min(seen.reported for seen, _ in told) < HOLD:
        return None
    missing = [seen.sign for seen in living if seen.sign.report is None and seen.sign.waited is None]
    first, report = min(told, key=lambda pair: pair[0].reported)
    if not missing:
        return Verdict((first.sign.rank,), EXIT_ENVIRONMENT, f"{first.sign}: {report.text}")
    return _hanging(missing, f"did not come to an exchange that {_short(first.sign)} waited for ({report.text})")


def _silent(living: list[Seen], now: float, timeout: float) -> Verdict | None:
    silent = [seen for seen in living if now - seen.heard > timeout]
    if not silent:
        return None
    longest = min(silent, key=lambda seen: seen.heard)
    return _hanging([longest.sign], f"gave no sign of life for {now - longest.heard:.0f} s")


def _late(living: list[Seen], timeout: float) -> Verdict | None:
    """Who has not come to an exchange that another came to so long ago; or all, where all wait in one."""
    came = [seen.sign for seen in living if not seen.sign.patient and seen.sign.since > timeout]
    if not came:
        return None
    newest = max(came, key=lambda sign: sign.exchanges)
    if late := [seen.sign for seen in living if seen.sign.exchanges < newest.exchanges]:
        return _hanging(late, f"let {_short(newest)} wait for {newest.since:.0f} s in {newest.place}")
    if waiting := [sign for sign in came if sign.waited is not None]:
        return _hanging(waiting, f"waited for {newest.since:.0f} s in one exchange; what joins them hangs")
    return None


def _hanging(signs: list[Sign], what: str) -> Verdict:
    names = " and ".join(map(str, signs[:3])) + (f" and {len(signs) - 3} more" if len(signs) > 3 else "")
    return Verdict(tuple(sign.rank for sign in signs), EXIT_ENVIRONMENT, f"{names} {what}")


def _short(sign: Sign) -> str:
    return f"rank {sign.rank}"
