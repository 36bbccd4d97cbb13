"""Stopping by signal: the run is saved, its outcome says how it ended, and the same command goes on to the same end."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
import tiny

from trainworks import Faults, read_record
from trainworks.checkpoint import checkpoints, verify
from trainworks.record import read_outcome
from trainworks.run import Progress
from trainworks.stopping import Stop, Stopped, follow_launcher

ROOT = Path(__file__).parents[2]
STEPS = 200
SECONDS = 60.0
HARDWARE = ROOT / "configs" / "accelerate" / "cpu.yaml"
ALONE = ["-m", "finetune"]
LAUNCHED = ["-m", "accelerate.commands.launch", "--config_file", str(HARDWARE), "-m", "finetune"]
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "finetune"]
SLOW = [str(ROOT / "tests" / "slow_run.py")]
TWO_SLOW = [*TWO[:-2], *SLOW]
LAUNCHER_VARIABLES = ("ACCELERATE_", "TORCHELASTIC_", "FSDP_")


class Started(subprocess.Popen[bytes]):
    """A command that a test started, and a mark in the environment by which its processes are known."""

    def __init__(self, command: list[str], *, env: dict[str, str], **options: Any) -> None:
        mark = f"STARTED_BY_TEST={uuid4().hex}"
        self.mark = mark.encode()
        super().__init__(command, env=env | dict([mark.split("=")]), **options)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of many tiny steps, with dropout, that nothing interrupts."""
    folder = tmp_path_factory.mktemp("stopping")
    tiny.save_run(folder, budget={"steps": STEPS})
    return folder


@pytest.fixture(scope="module")
def weights(place: Path) -> str:
    """The digest of the weights that the uninterrupted run ends with."""
    process = start(place, ALONE, place / "whole")
    assert finished(process) == 0
    return digest(place / "whole")


@pytest.fixture
def started(place: Path, tmp_path: Path) -> Iterator[Callable[..., Started]]:
    """Start the command in a process group of its own; what is left of it is killed at the end."""
    processes: list[Started] = []

    def begin(command: list[str], *, options: Sequence[str] = (), **environment: str) -> Started:
        processes.append(start(place, command, tmp_path / "run", options=options, **environment))
        return processes[-1]

    yield begin
    for process in processes:
        for pid in members(process):
            os.kill(pid, signal.SIGKILL)
        process.wait()


def start(place: Path, command: list[str], output: Path, *, options: Sequence[str] = (), **environment: str) -> Started:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHER_VARIABLES)}
    # Sums over threads would have to be cut the same way for the weights to be equal bit for bit.
    own = {"OMP_NUM_THREADS": "1", "TRAINWORKS_CACHE": str(place / ".cache"), "PYTHONPATH": str(ROOT)}
    output.mkdir(exist_ok=True)
    with (output.parent / f"{output.name}.log").open("ab") as log:
        return Started(
            [sys.executable, *command, "run.yaml", f"output={output}", *options],
            cwd=place,
            env=inherited | own | environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def finished(process: Started) -> int:
    return process.wait(timeout=SECONDS)


def digest(output: Path) -> str:
    return hashlib.sha256((output / "model" / "model.safetensors").read_bytes()).hexdigest()


def members(process: Started) -> list[int]:
    """Return the living processes that a command is made of: torchrun puts its children into sessions of their own."""
    return [pid for pid, environment in _each("environ") if process.mark in environment.split(b"\0")]


def trainers(process: Started) -> list[int]:
    """Return those of them that train."""
    own = members(process)
    lines = {pid: line for pid, line in _each("cmdline") if pid in own and b"finetune" in line}
    return [pid for pid, line in lines.items() if b"accelerate" not in line and b"torch.distributed" not in line]


def _each(file: str) -> Iterator[tuple[int, bytes]]:
    for path in Path("/proc").glob(f"[0-9]*/{file}"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is not ours
            yield int(path.parent.name), path.read_bytes()


def wait_for(what: Callable[[], Any], process: Started, log: Path) -> Any:
    """Return the first true answer, while the process lives."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if answer := what():
            return answer
        assert process.poll() is None, f"ended by {process.returncode}:\n{log.read_text()[-3000:]}"
        time.sleep(0.02)
    raise AssertionError(f"waited {SECONDS} s:\n{log.read_text()[-3000:]}")


def steps(output: Path) -> int:
    path = output / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return sum('"CurvePoint"' in line for line in lines)


def outcome(output: Path) -> int:
    """Return the exit code of `trainworks outcome`."""
    command = [sys.executable, "-m", "trainworks.cli", "outcome", str(output)]
    return subprocess.run(command, cwd=ROOT, check=False, capture_output=True).returncode


def train_until(some: int, process: Started, output: Path) -> None:
    wait_for(lambda: steps(output) >= some, process, output.with_suffix(".log"))


def assert_gone(process: Started) -> None:
    deadline = time.monotonic() + 20
    while members(process) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert members(process) == []


def assert_saved(output: Path, code: int) -> int:
    """The run is saved where it stopped, and says how it ended; return the step."""
    record, (newest, *_) = read_record(output), checkpoints(output)
    verify(newest)
    assert record.status == ("interrupted" if code == 130 else "preempted")
    assert 0 < record.step < STEPS
    assert newest.step == record.step == record.curve[-1].step
    assert read_outcome(output).code == code
    assert outcome(output) == code
    return record.step


SIGNALS = [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), SIGNALS, ids=lambda value: getattr(value, "name", value))
def test_a_signal_to_the_process_saves_the_run_and_the_same_command_ends_it(
    number: signal.Signals, code: int, started: Callable[..., Started], weights: str, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    first = started(ALONE)
    train_until(5, first, output)
    first.send_signal(number)
    assert finished(first) == code
    stopped = assert_saved(output, code)

    assert finished(started(ALONE)) == 0
    record = read_record(output)
    assert (record.status, record.step, record.resumed_at) == ("complete", STEPS, (stopped,))
    assert [point.step for point in record.curve] == list(range(1, STEPS + 1))
    assert outcome(output) == 0
    assert digest(output) == weights


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "to_all", "code"),
    [(signal.SIGTERM, False, 75), (signal.SIGUSR1, False, 75), (signal.SIGINT, True, 130), (signal.SIGTERM, True, 75)],
    ids=["SIGTERM to the launcher", "SIGUSR1 to the launcher", "SIGINT to the group", "SIGTERM to the group"],
)
def test_a_signal_to_the_launcher_saves_the_run_and_leaves_no_process(
    number: signal.Signals, to_all: bool, code: int, started: Callable[..., Started], weights: str, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    first = started(LAUNCHED)
    train_until(5, first, output)
    assert len(trainers(first)) == 1
    for pid in members(first) if to_all else [first.pid]:
        os.kill(pid, number)
    assert finished(first) != 0
    assert_gone(first)
    assert_saved(output, code)

    assert finished(started(LAUNCHED)) == 0
    assert (outcome(output), digest(output)) == (0, weights)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda value: value.name)
def test_a_signal_to_torchrun_alone_saves_both_ranks_at_one_step(
    number: signal.Signals, started: Callable[..., Started], tmp_path: Path
) -> None:
    output, log = tmp_path / "run", tmp_path / "run.log"
    first = started(TWO, ACCELERATE_USE_CPU="1")
    train_until(5, first, output)
    assert len(trainers(first)) == 2
    first.send_signal(number)
    finished(first)
    assert_gone(first)
    stopped = assert_saved(output, read_outcome(output).code)
    assert read_outcome(output).code in {signal.SIGINT: (75, 130)}.get(number, (75,))
    newest = checkpoints(output)[0]
    assert {path.name for path in newest.path.glob("rank-*.json")} == {"rank-00000.json", "rank-00001.json"}

    second = started(TWO, ACCELERATE_USE_CPU="1")
    assert finished(second) == 0, log.read_text()[-3000:]
    record = read_record(output)
    assert (record.step, record.resumed_at, outcome(output)) == (STEPS, (stopped,), 0)


@pytest.mark.slow
@pytest.mark.parametrize("command", [ALONE, LAUNCHED], ids=["alone", "launched"])
@pytest.mark.parametrize("seconds", [0.0, 0.7, 1.5])
def test_a_signal_before_training_leaves_a_folder_that_the_same_command_takes(
    seconds: float, command: list[str], started: Callable[..., Started], weights: str, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    first = started(command)
    if seconds:
        # Its own first sign of life would be later than the moment that is to be hit.
        wait_for(lambda: trainers(first), first, tmp_path / "run.log")
        time.sleep(seconds)
    first.send_signal(signal.SIGTERM)
    assert finished(first) in (75, -signal.SIGTERM, 1, 143)
    assert_gone(first)
    log = (tmp_path / "run.log").read_text()
    if (output / "outcome.json").exists():
        assert read_outcome(output).code == 75, log
    assert "Stopped" not in log
    assert not (output / "model").exists()

    if seconds == 1.5:
        assert finished(started(command)) == 0, (tmp_path / "run.log").read_text()
        assert digest(output) == weights


@pytest.mark.slow
@pytest.mark.faults
def test_a_signal_during_an_evaluation_is_heeded_at_once_and_the_evaluation_is_made_again(
    started: Callable[..., Started], place: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    every = ["every.evaluate=4", "every.save=50", f"budget.steps={STEPS // 10}", "every.log=1"]
    whole = start(place, ALONE, tmp_path / "whole", options=every)
    first = started(SLOW, options=every, EVALUATION_SECONDS="1")
    train_until(4, first, output)
    time.sleep(0.3)
    first.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    assert finished(first) == 75
    assert time.monotonic() - begun < 20
    stopped = assert_saved(output, 75)
    assert stopped == 4
    assert f"step {stopped}" not in [report.name for report in read_record(output).reports]

    assert finished(started(ALONE, options=every)) == 0
    assert finished(whole) == 0
    reports = [(report.name, report.metrics) for report in read_record(output).reports]
    assert reports == [(report.name, report.metrics) for report in read_record(tmp_path / "whole").reports]
    assert digest(output) == digest(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.faults
def test_a_run_that_cannot_save_in_time_ends_all_the_same(started: Callable[..., Started], tmp_path: Path) -> None:
    output = tmp_path / "run"
    options = ["faults.stop_within=2", "every.save=5"]
    first = started(TWO_SLOW, options=options, ACCELERATE_USE_CPU="1", STEP_SECONDS="1000")
    wait_for(lambda: checkpoints(output), first, tmp_path / "run.log")
    time.sleep(0.5)
    first.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    finished(first)
    assert time.monotonic() - begun < 20
    assert_gone(first)
    assert read_outcome(output).code == outcome(output) == 75
    assert "within 2 s" in read_outcome(output).reason
    assert read_record(output).status == "preempted"
    verify(checkpoints(output)[0])

    assert finished(started(TWO, ACCELERATE_USE_CPU="1")) == 0
    assert read_record(output).resumed_at == (5,)


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_second_signal_while_the_run_is_saved_leaves_a_whole_checkpoint(
    second: signal.Signals, started: Callable[..., Started], weights: str, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    first = started(ALONE, options=["every.save=5"])
    train_until(8, first, output)
    first.send_signal(signal.SIGINT if second == signal.SIGINT else signal.SIGTERM)
    deadline = time.monotonic() + SECONDS
    while not list((output / "checkpoints").glob(".step-*.staged")) and time.monotonic() < deadline:
        if first.poll() is not None:
            break
    first.send_signal(second)
    assert finished(first) in ((130,) if second == signal.SIGINT else (75,))
    verify(checkpoints(output)[0])
    assert outcome(output) == (130 if second == signal.SIGINT else 75)
    assert finished(started(ALONE)) == 0
    assert digest(output) == weights


# In this process


class World:
    """One rank."""

    is_main = True

    def most(self, value: int) -> int:
        return value


class Run:
    """What `Stop` asks of a run."""

    def __init__(self, folder: Path = Path(), seconds: int = 60) -> None:
        self.world, self.between_batches = World(), bool
        self.config = SimpleNamespace(faults=Faults(stop_within=seconds))
        self.folder, self.progress = folder, Progress(step=7)


@pytest.fixture
def handlers() -> Iterator[None]:
    """Put every handler back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(("number", "code"), SIGNALS, ids=lambda value: getattr(value, "name", value))
def test_a_signal_is_remembered_until_it_is_asked_for(number: signal.Signals, code: int) -> None:
    with Stop(Run()) as stop:  # type: ignore[arg-type]
        assert stop.agreed() == 0
        os.kill(os.getpid(), number)
        assert stop.agreed() == code


@pytest.mark.usefixtures("handlers")
def test_the_first_signal_decides_and_a_second_ctrl_c_interrupts() -> None:
    with Stop(Run()) as stop:  # type: ignore[arg-type]
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed() == 130
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.usefixtures("handlers")
def test_outside_training_a_signal_ends_the_process_at_once() -> None:
    follow_launcher()
    with pytest.raises(Stopped):
        os.kill(os.getpid(), signal.SIGTERM)
    with Stop(Run()) as stop:  # type: ignore[arg-type]
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.agreed() == 75
    with pytest.raises(Stopped):
        os.kill(os.getpid(), signal.SIGUSR1)
