"""A kill between any two acts of writing, on one rank or two: the same command goes on to the same weights."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from attempts import INTERVAL, Place
from forking import Nursery

from trainworks.fail_points import FAIL_POINTS

pytestmark = [pytest.mark.faults, pytest.mark.slow]

FULL = os.environ.get("TRAINWORKS_FAULTS") == "all"
TIMES = {name: range(1, 7) if FULL else (2,) for name in FAIL_POINTS} | {
    # The record's first version, then files of evaluations, the record, and a checkpoint's three.
    "file.staged": range(1, 25) if FULL else (1, 3, 4, 6, 7, 8),
    "save.sweeping": (1,),
    # Three evaluations of this run are the best so far.
    "save.marked": range(1, 4) if FULL else (2,),
    "save.unmarking": range(1, 3) if FULL else (2,),
}
"""Which times of getting to a point are tried: the second mostly, when there is something to lose."""
ONCE = [(name, time) for name in FAIL_POINTS for time in TIMES[name]]
ON_TWO_RANKS = [("ddp", name) for name in (*FAIL_POINTS, "save.rank@1")] + [
    ("fsdp2", name) for name in (*(FAIL_POINTS if FULL else ()), "save.part@1", "save.rank@1")
]
"""Under FSDP2 the second rank has tensors of its own to write."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with Nursery() as nursery:
        yield Place.made(tmp_path_factory.mktemp("points"), nursery)


@pytest.fixture(scope="module")
def whole(place: Place) -> str:
    place.finish("whole")
    return "whole"


@pytest.fixture(scope="module")
def wholes(place: Place) -> dict[str, str]:
    """The runs on two ranks that nothing happened to."""
    modes: tuple[Any, ...] = ("ddp", "fsdp2")
    for mode in modes:
        replace(place, ranks=2, mode=mode).finish(f"whole-{mode}")
    return {mode: f"whole-{mode}" for mode in modes}


def kill(place: Place, name: str, point: str) -> None:
    """Start a run, or go on with it, and see it be killed at a point."""
    children = place.start(name, {"TRAINWORKS_FAIL_AT": point})
    codes = children.wait()
    assert -signal.SIGKILL in codes, f"{point}: ended by {codes}\n{children.tail()}"


def kill_and_finish(place: Place, name: str, point: str) -> None:
    if point.startswith("save.sweeping"):
        kill(place, name, "save.manifest:3")  # which leaves something to be swept
    kill(place, name, point)
    place.finish(name)


@pytest.mark.parametrize(("point", "time"), ONCE)
def test_a_kill_there_changes_nothing(point: str, time: int, place: Place, whole: str) -> None:
    name = f"{point}-{time}".replace(".", "-")
    kill_and_finish(place, name, f"{point}:{time}")
    place.assert_same(name, whole)
    assert place.lost(name) <= INTERVAL


@pytest.mark.parametrize(("mode", "point"), ON_TWO_RANKS)
def test_a_kill_of_one_of_two_ranks_changes_nothing(
    mode: Any, point: str, place: Place, wholes: dict[str, str]
) -> None:
    two, name = replace(place, ranks=2, mode=mode), f"{mode}-{point}".replace(".", "-")
    kill_and_finish(two, name, point)
    two.assert_same(name, wholes[mode])
    assert two.lost(name) <= INTERVAL
