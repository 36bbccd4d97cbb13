"""Bad steps never reach the weights, all ranks decide alike, and the run does what its file says."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from distributed import run_ranks

import finetune
from trainworks import Every, Faults, Run, read_record, train_steps
from trainworks.bad_steps import Watch
from trainworks.checkpoint import save
from trainworks.errors import TrainingError
from trainworks.tasks.sft import SFT

HERE = str(Path(__file__))
EVERY = Every(log=1, save=2)
Weights = dict[str, torch.Tensor]


def prepared(folder: Path, name: str, **changes: Any) -> Run:
    if not (folder / "model").exists():
        tiny.save_model(folder / "model", "sft")
        tiny.save_rows(folder / "rows.jsonl", "sft", 60)
    settings = {"every": EVERY, "epochs": 1.7} | changes
    return finetune.prepare(tiny.config("sft", folder / "model", folder / "rows.jsonl", folder / name, **settings))


def spoil(
    monkeypatch: pytest.MonkeyPatch, run: Run, change: Callable[[torch.Tensor], torch.Tensor], *steps: int
) -> None:
    """Change the loss sums of some steps of a run."""
    honest = SFT.loss

    def loss(self: SFT, model: Any, batch: Any) -> dict[str, torch.Tensor]:
        sums = honest(self, model, batch)
        training = model.training and run.progress.step + 1 in steps
        return {name: change(value) for name, value in sums.items()} if training else sums

    monkeypatch.setattr(SFT, "loss", loss)


def weights(run: Run) -> Weights:
    return {name: value.detach().clone() for name, value in run.model.state_dict().items()}


def same(left: Weights, right: Weights) -> bool:
    return all(torch.equal(value, right[name]) for name, value in left.items())


def without(folder: Path, *steps: int, **changes: Any) -> Weights:
    """Return the weights of a run that leaves the given steps out."""
    run = prepared(folder, "without", **changes)
    run.watch.left_out |= set(steps)
    for _ in train_steps(run):
        pass
    return weights(run)


def not_finite(value: torch.Tensor) -> torch.Tensor:
    return value * float("nan")


def gradient_only(value: torch.Tensor) -> torch.Tensor:
    """Leave the loss as it is, and make its gradient infinite."""
    return value + (value - value.detach()).abs().sqrt()


@pytest.mark.faults
@pytest.mark.parametrize("change", [not_finite, gradient_only])
def test_a_step_that_is_skipped_leaves_weights_and_moments_as_they_were(
    change: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepared(tmp_path, "run")
    spoil(monkeypatch, run, change, 3)
    for step in train_steps(run):
        if step.number == 2:
            before = weights(run)
            moments = {key: value.clone() for key, value in _moments(run).items()}
        if step.number == 3:
            assert step.spoiled.item() == 1.0
            assert same(weights(run), before)
            assert same(_moments(run), moments)
        if step.number == 4:
            assert not same(weights(run), before)
            break
    assert [(bad.step, bad.kind) for bad in run.watch.read()] == [(3, "not a number")]


def _moments(run: Run) -> Weights:
    return {
        f"{number}.{key}": value
        for number, state in enumerate(run.optimizer.state.values())
        for key, value in state.items()
    }


@pytest.mark.faults
@pytest.mark.parametrize("remedy", ["skip", "rollback"])
@pytest.mark.parametrize("change", [not_finite, gradient_only])
def test_a_run_ends_with_the_weights_of_one_without_the_bad_step(
    change: Callable[[torch.Tensor], torch.Tensor], remedy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = without(tmp_path, 4)
    run = prepared(tmp_path, "run", faults=Faults(not_finite=remedy))
    spoil(monkeypatch, run, change, 4)
    record = finetune.fit(run)
    assert record.status == "complete"
    assert same(weights(run), expected)
    (bad,) = record.bad_steps
    assert (bad.step, bad.kind, bad.remedy) == (4, "not a number", remedy)
    assert bad.samples == tuple(run.plan.step(3)[0].tolist())
    assert [point.step for point in record.curve] == list(range(1, record.steps_total + 1))
    assert read_record(tmp_path / "run").bad_steps[0].step == 4


@pytest.mark.faults
def test_a_run_that_stops_says_which_samples_it_saw_and_goes_on_once_told_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = without(tmp_path, 5)
    run = prepared(tmp_path, "run")
    samples = ", ".join(map(str, run.plan.step(4)[0].tolist()))
    spoil(monkeypatch, run, not_finite, 5)
    with pytest.raises(TrainingError, match=rf"step 5 is bad \(not a number\).*on training samples {samples}"):
        finetune.fit(run)
    assert read_record(tmp_path / "run").bad_steps[0].remedy == "stop"
    again = prepared(tmp_path, "run", faults=Faults(not_finite="skip"))
    assert again.progress.step == 4
    spoil(monkeypatch, again, not_finite, 5)
    record = finetune.fit(again)
    assert [(bad.step, bad.remedy) for bad in record.bad_steps] == [(5, "skip")]
    assert same(weights(again), expected)


@pytest.mark.faults
def test_a_weight_that_is_no_number_is_mended_by_going_back(tmp_path: Path) -> None:
    expected = without(tmp_path, 6, every=Every(log=3, save=3))
    run = prepared(tmp_path, "run", faults=Faults(not_finite="rollback"), every=Every(log=1, save=3))
    for step in train_steps(run):
        if step.number == 3:
            run.save_record()
            save(run)
        if step.number == 5:
            break
    broken = prepared(tmp_path, "run", faults=Faults(not_finite="rollback"), every=Every(log=1, save=3))
    broken_at = iter([5])
    honest = broken.task.count

    def count(batch: Any) -> Any:
        if broken.progress.step == 5 and next(broken_at, None):
            with torch.no_grad():
                next(broken.model.parameters())[0, 0] = float("nan")
        return honest(batch)

    object.__setattr__(broken, "task", _Counting(broken.task, count))
    record = finetune.fit(broken)
    assert [(bad.step, bad.remedy) for bad in record.bad_steps] == [(6, "rollback")]
    assert same(weights(broken), expected)


class _Counting:
    """A task that counts in another way."""

    def __init__(self, task: Any, count: Callable[[Any], Any]) -> None:
        self._task, self.count = task, count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)


@pytest.mark.faults
@pytest.mark.parametrize("length", [1, 5, 50])
@pytest.mark.parametrize("remedy", ["skip", "rollback"])
def test_spikes_are_told_and_left_out(
    length: int, remedy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = 20
    settings = {"epochs": 14.0, "every": Every(log=5, save=10)}
    spiked = range(first, first + length)
    expected = without(tmp_path, *spiked, **settings)
    faults = Faults(spike=remedy, window=12)
    run = prepared(tmp_path, "run", faults=faults, **settings)
    spoil(monkeypatch, run, lambda value: value * 10, *spiked)
    record = finetune.fit(run)
    assert record.steps_total > first + length + 5
    assert [bad.step for bad in record.bad_steps] == list(spiked)
    assert {(bad.kind, bad.remedy) for bad in record.bad_steps} == {("spike", remedy)}
    assert same(weights(run), expected)


@pytest.mark.faults
def test_a_spike_stops_where_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepared(tmp_path, "run", faults=Faults(spike="stop", window=8), epochs=3.0)
    spoil(monkeypatch, run, lambda value: value * 10, 12)
    with pytest.raises(TrainingError, match=r"step 12 is bad \(a spike\).*spike: skip"):
        finetune.fit(run)


@pytest.mark.faults
def test_too_many_bad_steps_in_a_row_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepared(tmp_path, "run", faults=Faults(not_finite="skip", at_most=3))
    spoil(monkeypatch, run, not_finite, *range(3, 100))
    with pytest.raises(TrainingError, match=r"4 bad steps in a row, more than faults\.at_most"):
        finetune.fit(run)


@pytest.mark.faults
@pytest.mark.slow
def test_clean_runs_raise_no_alarm(tmp_path: Path) -> None:
    for seed in range(20):
        faults = Faults(spike="stop", window=16)
        run = prepared(tmp_path, f"run-{seed}", faults=faults, seed=seed, epochs=10.0, every=Every(log=10))
        assert finetune.fit(run).bad_steps == ()


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
@pytest.mark.parametrize("remedy", ["skip", "rollback"])
def test_what_one_rank_sees_all_ranks_heed(mode: Any, remedy: str, tmp_path: Path) -> None:
    prepared(tmp_path, "laid-out")
    common = {"folder": str(tmp_path), "remedy": remedy}
    bad = run_ranks(f"{HERE}:train_with_one_bad_rank", common | {"name": "bad", "bad": True}, ranks=2, mode=mode)
    clean = run_ranks(f"{HERE}:train_with_one_bad_rank", common | {"name": "clean", "bad": False}, ranks=2, mode=mode)
    assert [rank["ranks"] for rank in bad + clean] == [2] * 4
    assert [rank["bad_steps"] for rank in bad] == [[3, 6]] * 2
    assert bad[0]["weights"] == bad[1]["weights"] == clean[0]["weights"]


def train_with_one_bad_rank(folder: str, name: str, remedy: Any, bad: bool) -> dict[str, Any]:
    """Train while rank 1 has a loss that is no number in step 3, and a gradient that is none in step 6; or leave these
    steps out."""
    run = prepared(Path(folder), name, faults=Faults(not_finite=remedy), micro=2)
    if bad and run.world.rank == 1:
        with pytest.MonkeyPatch.context() as monkeypatch:
            spoil(monkeypatch, run, not_finite, 3)
            honest = SFT.loss
            spoil(monkeypatch, run, gradient_only, 6)
            monkeypatch.undo = lambda: None  # type: ignore[method-assign]
        assert honest is not SFT.loss
    if not bad:
        run.watch.left_out |= {3, 6}
    record = finetune.fit(run)
    whole = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in run.model.state_dict().items()
    }
    return {
        "ranks": run.world.ranks,
        "bad_steps": [each.step for each in record.bad_steps],
        "weights": {name: value.double().sum().item().hex() for name, value in whole.items()},
    }


def test_the_window_is_kept_in_a_checkpoint() -> None:
    def fed(watch: Watch, losses: list[float]) -> list[float]:
        one = torch.tensor(1.0)
        return [watch.judge(number, torch.tensor(loss), one).item() for number, loss in enumerate(losses, 1)]

    faults = Faults(spike="skip", window=8)
    losses = [5.0, 4.1, 4.9, 4.2, 5.1, 4.4, 4.8, 4.3, 30.0, 4.6, math.inf, 4.5, 29.0]
    whole = Watch(faults, torch.device("cpu"))
    expected = fed(whole, losses)
    assert expected == [0.0] * 8 + [1.0, 0.0, 1.0, 0.0, 1.0]
    first, second = Watch(faults, torch.device("cpu")), Watch(faults, torch.device("cpu"))
    begun = fed(first, losses[:10])
    second.load(first.state())
    assert begun + fed(second, losses[10:]) == expected
    assert second.state() == whole.state()
    assert [bad.kind for bad in whole.read()] == ["spike", "not a number", "spike"]
    assert whole.read() == []
