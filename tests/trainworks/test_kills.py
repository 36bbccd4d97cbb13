"""A run that is killed again and again, half of the time in the midst of a save, ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from attempts import INTERVAL, Place
from forking import Forked, Nursery

pytestmark = [pytest.mark.faults, pytest.mark.slow]

KILLS = 200 if os.environ.get("TRAINWORKS_FAULTS") == "all" else 20
PER_RUN = 12
"""Kills that one run has to bear; the next ones hit a new run."""
SECONDS = 120.0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with Nursery() as nursery:
        yield Place.made(tmp_path_factory.mktemp("kills"), nursery)


def saving(folder: Path) -> bool:
    """Tell whether a save is under way, or was when the run was killed."""
    return any((folder / "checkpoints").glob(".step-*"))


def kill_in_a_save(child: Forked, folder: Path, rng: random.Random) -> None:
    """Kill a run somewhere in one of its next saves."""
    saves_to_pass, deadline = rng.choice([0, 0, 1, 2]), time.monotonic() + SECONDS
    while not child.ended() and time.monotonic() < deadline:
        if not saving(folder):
            continue
        time.sleep(rng.uniform(0, 0.03))
        child.send(signal.SIGSTOP)
        time.sleep(0.002)
        if saving(folder) and not saves_to_pass:
            break
        saves_to_pass = max(0, saves_to_pass - 1)
        child.send(signal.SIGCONT)
        while saving(folder) and not child.ended():
            time.sleep(0.001)
    child.send(signal.SIGKILL)


@pytest.mark.parametrize(
    ("background", "kills", "lost"),
    [(False, KILLS, INTERVAL), (True, KILLS // 4, 2 * INTERVAL)],
    ids=["saving in the foreground", "saving in the background"],
)
def test_runs_that_are_killed_at_random_lose_one_interval_at_most_and_end_alike(
    background: bool, kills: int, lost: int, place: Place, record_property: pytest.RecordProperty
) -> None:
    rng, prefix = random.Random(kills), f"{'background' if background else 'foreground'}-"
    begun = time.monotonic()
    place.finish(f"{prefix}whole", background=background)
    seconds = time.monotonic() - begun
    in_saves = total = runs = most_lost = 0
    while total < kills:
        name, runs = f"{prefix}{runs}", runs + 1
        for _ in range(min(PER_RUN, kills - total)):
            child = place.start(name, background=background)
            if in_saves * 3 <= total * 2:
                kill_in_a_save(child, place.folder / name, rng)
            else:
                child.ended(rng.uniform(0, 1.2 * seconds))
                child.send(signal.SIGKILL)
            if (codes := child.wait()) == [0]:
                break
            assert codes == [-signal.SIGKILL], child.tail()
            total, in_saves = total + 1, in_saves + saving(place.folder / name)
        place.finish(name, background=background)
        place.assert_same(name, f"{prefix}whole")
        most_lost = max(most_lost, place.lost(name))
    record_property("kills", {"kills": total, "in saves": in_saves, "runs": runs, "steps lost": most_lost})
    assert in_saves * 2 >= total
    assert most_lost <= lost
