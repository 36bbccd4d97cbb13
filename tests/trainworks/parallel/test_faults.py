"""A rank breaks: it is named, the others leave at once, and a launcher that starts all again goes on from there."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from uuid import uuid4

import layouts
import pytest
import tiny
from distributed import ENVIRONMENT

from trainworks import read_record
from trainworks.record import read_outcome

pytestmark = [pytest.mark.faults, pytest.mark.slow]

ROOT = Path(__file__).parents[3]
LAUNCHER_VARIABLES = ("ACCELERATE_", "TORCHELASTIC_", "FSDP_")
TIMEOUT, AT_ONCE, SECONDS = 10, 5.0, 180.0
HANGS = ("stopped", "stands")

PLACES = ["preparing", "5", "saving", "evaluating"]
SEEN_IN = {"preparing": "samples", "5": "after step 5", "saving": "checkpoint", "evaluating": "evaluation"}
ENDED = {
    "killed": (3, "was killed by SIGKILL"),
    "raises": (1, "ValueError: broken on purpose, <redacted>"),
    "exits": (3, "exited with 0"),
    "stopped": (3, "gave no sign of life for "),
    "stands": (3, "let rank "),
}
FEW = [
    (2, 1, "preparing", "killed"),
    (2, 1, "5", "killed"),
    (2, 0, "5", "exits"),
    (2, 1, "5", "stopped"),
    (2, 1, "saving", "stands"),
    (2, 1, "evaluating", "raises"),
    (3, 2, "saving", "killed"),
]
LONG_WORK = ("preparing", "stands")  # is waited for: it may have much to do
MANY = [(2, rank, place, how) for rank, place, how in product((0, 1), PLACES, ENDED) if (place, how) != LONG_WORK]
MANY += [(3, rank, place, how) for rank, place, how in product((0, 2), ("5", "saving"), ENDED)]
ALL = os.environ.get("TRAINWORKS_FAULTS") == "all"
CASES = MANY if ALL else FEW
MANY_SPREAD = list(product(layouts.SPREADS, ("killed", "stopped", "stands")))
SPREAD = MANY_SPREAD if ALL else [("TP 2", "killed"), ("PP 2, 1F1B", "stopped")]


@dataclass
class Launched:
    """What a launch with a broken rank came to."""

    output: Path
    said: str
    code: int
    broke: float
    """When the rank broke, 0 where none did."""
    last_seen: dict[int, float] = field(default_factory=dict)
    """By rank, when its process was there for the last time."""

    @property
    def weights(self) -> str:
        return hashlib.sha256((self.output / "model" / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of some tiny steps, with dropout."""
    folder = tmp_path_factory.mktemp("faults")
    tiny.save_run(
        folder,
        batch={"per_step": 6, "micro": 1},
        budget={"steps": 16},
        every={"log": 1, "save": 4, "evaluate": 8},
        faults={"rank_timeout": TIMEOUT},
    )
    return folder


def launched(
    place: Path,
    output: Path,
    fault: str = "none::",
    *options: str,
    ranks: int = 2,
    workers: int = 0,
    spread: layouts.Spread | None = None,
) -> Launched:
    """Start ranks, one of which breaks, and follow them until the last of them is gone."""
    mark = f"STARTED_BY_TEST={uuid4().hex}"
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHER_VARIABLES)}
    broken = output.with_suffix(".broken")
    asked = layouts.Spread(ranks) if spread is None else spread
    own = ENVIRONMENT[asked.mode] | {
        "FAULT": f"{fault}:{broken}",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
        "TRAINWORKS_CACHE": str(place / ".cache"),
    }
    own |= {f"PARALLELISM_CONFIG_{key.upper()}_SIZE": str(size) for key, size in asked.sizes.items()}
    layout = [f"layout.{key}={value}" for key, value in asked.layout.items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *options]
    changes = [f"output={output}", f"data.workers={workers}", *layout]
    log = output.with_suffix(".log")
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, str(ROOT / "tests" / "faulty.py"), "run.yaml", *changes],
            cwd=place,
            env=inherited | own | dict([mark.split("=")]),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    last_seen = _followed(process, mark)
    broke = broken.stat().st_mtime if broken.exists() else 0.0
    return Launched(output, log.read_text(encoding="utf-8"), process.wait(), broke, last_seen)


def _followed(process: subprocess.Popen[bytes], mark: str) -> dict[int, float]:
    last_seen: dict[int, float] = {}
    deadline = time.monotonic() + SECONDS
    try:
        while process.poll() is None or list(_members(mark)):
            assert time.monotonic() < deadline, f"still there: {list(_members(mark))}"
            last_seen |= {rank: time.time() for _, rank in _members(mark) if rank is not None}
            time.sleep(0.02)
    finally:
        for pid, _ in _members(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
    return last_seen


def _members(mark: str) -> Iterator[tuple[int, int | None]]:
    """Yield the living processes of a launch, and the rank of each that is one."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is not ours
            variables = path.read_bytes().split(b"\0")
            if mark.encode() in variables:
                ranks = [int(each.removeprefix(b"RANK=")) for each in variables if each.startswith(b"RANK=")]
                yield int(path.parent.name), ranks[0] if ranks else None


@pytest.mark.parametrize(("ranks", "culprit", "where", "how"), CASES)
def test_the_rank_that_breaks_is_named_and_the_others_leave_at_once(
    ranks: int, culprit: int, where: str, how: str, place: Path, tmp_path: Path
) -> None:
    ended = launched(place, tmp_path / "run", f"{culprit}:{where}:{how}", ranks=ranks)
    code, told = ENDED[how]
    outcome = read_outcome(ended.output)
    named = re.search(rf"rank {culprit} \(host \S+, process \d+; last seen (.*?)\)", outcome.reason)
    assert named, outcome.reason
    assert SEEN_IN[where] in named[1], outcome.reason
    assert (outcome.code, told in outcome.reason) == (code, True), outcome.reason
    assert named[0].split(";")[0] in ended.said
    assert ended.code != 0

    allowed = AT_ONCE + (TIMEOUT if how in HANGS else 0)
    stayed = {rank: seen - ended.broke for rank, seen in ended.last_seen.items() if rank != culprit}
    assert len(stayed) == ranks - 1
    assert max(stayed.values()) < allowed, f"{stayed}\n{ended.said[-3000:]}"
    if (ended.output / "run.json").exists():
        assert read_record(ended.output).status == "failed"
    stacks = {path.name for path in (ended.output / "stacks").iterdir()}
    assert {f"rank-{rank:05d}.txt" for rank in stayed} <= stacks
    assert "most recent call first" in (ended.output / "stacks" / f"rank-{min(stayed):05d}.txt").read_text()


@pytest.mark.parametrize(("name", "how"), SPREAD)
def test_a_rank_that_breaks_is_named_whatever_the_model_is_spread_over(
    name: str, how: str, place: Path, tmp_path: Path
) -> None:
    spread = layouts.SPREADS[name]
    culprit = spread.ranks - 1
    ended = launched(place, tmp_path / "run", f"{culprit}:5:{how}", ranks=spread.ranks, spread=spread)
    outcome = read_outcome(ended.output)
    assert f"rank {culprit} (" in outcome.reason
    assert ENDED[how][1] in outcome.reason
    allowed = AT_ONCE + (TIMEOUT if how in HANGS else 0)
    assert max(seen - ended.broke for rank, seen in ended.last_seen.items() if rank != culprit) < allowed


def test_a_death_is_noticed_though_the_ranks_workers_hold_on_to_its_connections(place: Path, tmp_path: Path) -> None:
    ended = launched(place, tmp_path / "run", "1:5:killed", workers=1)
    assert "rank 1 (" in read_outcome(ended.output).reason
    assert "was killed by SIGKILL" in ended.said
    # The dead rank's loader is asked every five seconds whether anyone is left.
    assert ended.last_seen[0] - ended.broke < 2 * AT_ONCE


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> str:
    """The digest of the weights that the run ends with when nothing breaks."""
    ended = launched(place, place / "undisturbed")
    assert ended.code == 0, ended.said[-3000:]
    return ended.weights


@pytest.mark.parametrize(("culprit", "how"), [(1, "killed"), (0, "raises")])
def test_a_launcher_that_starts_all_ranks_again_ends_with_the_same_weights(
    culprit: int, how: str, undisturbed: str, place: Path, tmp_path: Path
) -> None:
    ended = launched(place, tmp_path / "run", f"{culprit}:10:{how}", "--max-restarts=1")
    assert (ended.code, read_outcome(ended.output).code) == (0, 0), ended.said[-3000:]
    assert ended.broke
    assert read_record(ended.output).resumed_at == (8,)
    assert ended.weights == undisturbed
