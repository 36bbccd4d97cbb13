"""What may be other when a run goes on: what is accepted, what never is, and which samples it then sees."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from datasets import Dataset
from safetensors.torch import load_file, save_file

import finetune
from trainworks import SFT, Batch, Budget, Data, Every, Mixture, Optim, Part, Pretrained, Run, train_steps
from trainworks.checkpoint import checkpoints, save
from trainworks.config import parse
from trainworks.errors import EXIT_OK, ConfigError
from trainworks.optim import learning_rate
from trainworks.output import is_complete
from trainworks.record import Outcome, write_json

ROWS = 50
"""Of one source, nothing held out: steps of 8 end a pass in the middle of one."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("accept") / "model", "sft", dropout=0.1)


def rows(number: int = ROWS, seed: int = 0) -> Dataset:
    return Dataset.from_list(tiny.rows("sft", number, seed))


def one(data: Dataset | None = None, holdout: float = 0.0) -> Data:
    return Data(source=rows() if data is None else data, holdout=holdout)


def two(**weights: float) -> Mixture:
    parts = {name: Part(source=rows(30, seed), holdout=0.0) for seed, name in enumerate(("questions", "talks"))}
    shares = {"questions": 1.0, "talks": 2.0} | weights
    return Mixture(sources={name: part.model_copy(update={"weight": shares[name]}) for name, part in parts.items()})


def prepared(model: Path, folder: Path, *, data: Any = None, **changes: Any) -> Run:
    optim = Optim(lr=1e-3, schedule="linear", warmup=2)
    task = {"task": changes.pop("task")} if "task" in changes else {}
    settings = {"optim": optim, "epochs": 1.3} | changes
    made = tiny.config("sft", model, one() if data is None else data, folder, **settings)
    return finetune.prepare(made.model_copy(update=task))


def take(run: Run, until: int = 0, rates: list[float] | None = None) -> list[list[int]]:
    """Train to the end or through step `until`, save, and return the rows of every step; put its learning rates to
    `rates`."""
    seen, windows, rates = [], run.windows, [] if rates is None else rates

    def recorded() -> Any:
        for window in windows():
            seen.append([row for batch in window.batches for row in batch["index"].tolist()])
            yield window

    run.windows = recorded  # type: ignore[method-assign]
    run.save_record()
    for step in train_steps(run):
        rates.append(step.lr)
        if step.number == until:
            break
    save(run)
    return [sorted(step) for step in seen]


def in_order(run: Run, begin: int, end: int) -> list[int]:
    """Return the samples that an undisturbed run takes from some positions."""
    whole = run.plan.going_on(step=0, position=0)
    return np.concatenate([whole.step(number)[0] for number in range(whole.num_steps)])[begin:end].tolist()


def test_what_is_accepted_is_in_the_record_with_its_step_and_both_values(model: Path, tmp_path: Path) -> None:
    take(prepared(model, tmp_path), until=3)
    lower = Optim(lr=5e-4, schedule="linear", warmup=2)
    with pytest.raises(ConfigError, match=r"say in `accept` which may differ:\n  optim.lr: 0.001 -> 0.0005$"):
        prepared(model, tmp_path, optim=lower)
    with pytest.raises(ConfigError, match=r"optim.lr: 0.001 -> 0.0005$"):
        prepared(model, tmp_path, optim=lower, accept="optim.betas")
    run = prepared(model, tmp_path, optim=lower, accept="optim.lr")
    assert run.record.notes == ("Changed at step 3: optim.lr: 0.001 -> 0.0005.",)
    take(run, until=4)
    again = prepared(model, tmp_path, optim=lower)
    assert (again.progress.step, again.record.notes) == (4, run.record.notes)


def test_a_section_accepts_all_its_keys(model: Path, tmp_path: Path) -> None:
    take(prepared(model, tmp_path), until=3)
    other = Optim(lr=5e-4, schedule="constant", warmup=2, weight_decay=0.1)
    run = prepared(model, tmp_path, optim=other, accept="optim")
    assert [note.split(": ")[1] for note in run.record.notes] == ["optim.lr", "optim.schedule", "optim.weight_decay"]


RUN_FILE = """
output: run
task: {type: sft, max_length: 128}
model: {name: model}
data: {source: rows.jsonl}
batch: {per_step: 8}
budget: {epochs: 1.0}
optim: {lr: 1e-3}
"""


@pytest.mark.parametrize(
    ("accept", "problem"),
    [
        ("optim.lrs", r"run.yaml:9: accept: 'optim.lrs' is no key of this file \(did you mean 'optim.lr'\?\)"),
        ("[data, budgets]", r"accept: 'budgets' is no key of this file \(did you mean 'budget'\?\)"),
        ("''", "accept"),
    ],
)
def test_a_name_that_is_no_key_is_refused_with_the_nearest_spelling(accept: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse(RUN_FILE + f"accept: {accept}\n", name="run.yaml", model=finetune.Config)


def test_every_key_and_section_of_a_file_can_be_named(model: Path) -> None:
    text = RUN_FILE + "accept: [optim, optim.lr, budget.steps, data.clean, model.name, batch.per_step]\n"
    assert len(parse(text, name="run.yaml", model=finetune.Config).accept) == 6


def test_a_mistake_elsewhere_is_not_told_twice() -> None:
    text = RUN_FILE.replace("lr: 1e-3", "lr: fast") + "accept: optim.lr\n"
    with pytest.raises(ConfigError) as caught:
        parse(text, name="run.yaml", model=finetune.Config)
    assert [problem.key for problem in caught.value.problems] == ["optim.lr"]


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("seed", {"seed": 7}),
        ("task.max_length", {"task": SFT(max_length=100)}),
        ("batch.pack", {"batch": Batch(per_step=8, micro=8, pack=128)}),
        ("optim.name", {"optim": Optim(name="sgd", lr=1e-3, schedule="linear", warmup=2)}),
        ("tuning.type", {"tuning": "lora"}),
    ],
)
def test_what_would_leave_nothing_to_go_on_from_is_never_accepted(
    key: str, changes: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    take(prepared(model, tmp_path), until=3)
    with pytest.raises(ConfigError, match=rf"\n  {key}: .* \(cannot be accepted: (it decides|the checkpoint holds)"):
        prepared(model, tmp_path, accept=("seed", "task", "batch", "optim", "tuning"), **changes)


@pytest.mark.parametrize("data", [one(), two()], ids=["one source", "two sources"])
@pytest.mark.parametrize("per_step", [5, 16])
def test_another_number_of_samples_a_step_repeats_and_misses_nothing(
    data: Any, per_step: int, model: Path, tmp_path: Path
) -> None:
    begun = take(prepared(model, tmp_path, data=data), until=3)
    assert [len(step) for step in begun] == [8, 8, 8]
    batch = Batch(per_step=per_step, micro=2)
    run = prepared(model, tmp_path, data=data, batch=batch, accept="batch.per_step")
    total = run.plan.total
    assert (total, run.plan.num_steps) == (round(1.3 * run.plan.num_samples), 3 + -(-(total - 24) // per_step))
    assert (run.record.steps_total, run.record.per_step) == (run.plan.num_steps, per_step)
    middle = take(run, until=5)
    again = prepared(model, tmp_path, data=data, batch=batch)
    rest = take(again)
    assert {len(step) for step in (middle + rest)[:-1]} == {per_step}
    whole = sorted(in_order(prepared(model, tmp_path / "whole", data=data), 0, total))
    assert sorted(row for step in begun + middle + rest for row in step) == whole
    assert (again.progress.samples, again.progress.step) == (total, again.plan.num_steps)


def test_a_damaged_checkpoint_leads_back_to_where_the_one_before_stands(model: Path, tmp_path: Path) -> None:
    begun = take(prepared(model, tmp_path), until=3)
    batch = Batch(per_step=5, micro=5)
    take(prepared(model, tmp_path, batch=batch, accept="batch"), until=5)
    (checkpoints(tmp_path)[0].path / "state.json").write_text("{}")
    run = prepared(model, tmp_path, batch=batch)
    assert (run.progress.step, run.progress.samples) == (3, 24)
    whole = sorted(in_order(run, 0, run.plan.total))
    assert sorted(row for step in begun + take(run) for row in step) == whole


def test_a_budget_of_steps_stays_one_of_steps(model: Path, tmp_path: Path) -> None:
    take(prepared(model, tmp_path, budget=Budget(steps=10)), until=4)
    run = prepared(model, tmp_path, budget=Budget(steps=10), batch=Batch(per_step=16), accept="batch")
    assert (run.plan.num_steps, run.plan.total) == (10, 4 * 8 + 6 * 16)
    assert [len(step) for step in take(run)] == [16] * 6


@pytest.mark.parametrize("data", [one(), two()], ids=["one source", "two sources"])
def test_a_longer_budget_goes_on_behind_a_short_last_step_by_a_longer_schedule(
    data: Any, model: Path, tmp_path: Path
) -> None:
    short = prepared(model, tmp_path, data=data)
    begun, total = take(short), short.plan.total
    assert 0 < len(begun[-1]) < 8
    run = prepared(model, tmp_path, data=data, epochs=2.4, accept="budget")
    assert run.progress.step == len(begun)
    assert run.record.notes == (f"Changed at step {len(begun)}: budget.epochs: 1.3 -> 2.4.",)
    longer = prepared(model, tmp_path / "whole", data=data, epochs=2.4)
    assert sorted(in_order(longer, 0, total)) == sorted(row for step in begun for row in step)
    found: list[float] = []
    rest = take(run, rates=found)
    assert sorted(row for step in rest for row in step) == sorted(in_order(longer, total, longer.plan.total))
    assert run.progress.samples == longer.plan.total
    rates = [learning_rate(run.config.optim, number, run.plan.num_steps) for number in range(run.plan.num_steps)]
    assert found == rates[len(begun) :]


def test_a_budget_that_is_used_up_is_refused(model: Path, tmp_path: Path) -> None:
    take(prepared(model, tmp_path), until=5)
    for budget in (Budget(epochs=0.5), Budget(steps=4)):
        with pytest.raises(ConfigError, match=r"budget: it is used up: the run stands at step 5, after 40 samples"):
            prepared(model, tmp_path, budget=budget, accept="budget")


def test_other_rows_are_passed_over_from_their_beginning_and_a_resume_keeps_their_order(
    model: Path, tmp_path: Path
) -> None:
    new = one(rows(40, seed=5))
    take(prepared(model, tmp_path, epochs=3.0), until=3)
    with pytest.raises(ConfigError, match=r"other rows than data.source .*\(accept: \[data\]\)"):
        prepared(model, tmp_path, epochs=3.0, data=new)
    run = prepared(model, tmp_path, epochs=3.0, data=new, accept="data")
    assert run.record.notes[0].startswith("Changed at step 3: rows of data: ")
    assert (run.plan.total, run.progress.origin) == (120, 24)
    samples = [run.plan.step(number)[0].tolist() for number in range(3, run.plan.num_steps)]
    assert [len(step) for step in samples] == [8] * 12
    for begin in (0, 5):  # a pass over 40 rows is five steps
        assert sorted(chain.from_iterable(samples[begin : begin + 5])) == list(range(40))
    assert samples[:5] != samples[5:10]
    middle = take(run, until=6)
    again = prepared(model, tmp_path, epochs=3.0, data=new)
    assert (again.progress.origin, again.record.notes) == (24, run.record.notes)
    assert middle + take(again) == [sorted(step) for step in samples]


def test_rows_that_changed_just_before_a_crash_begin_their_order_all_the_same(model: Path, tmp_path: Path) -> None:
    new = one(rows(40, seed=5))
    take(prepared(model, tmp_path, epochs=3.0), until=3)
    prepared(model, tmp_path, epochs=3.0, data=new, accept="data").save_record()  # and it ends before it could save
    run = prepared(model, tmp_path, epochs=3.0, data=new)
    assert (run.progress.origin, len(run.record.notes)) == (24, 1)


def test_other_shares_begin_a_new_order_in_which_they_hold(model: Path, tmp_path: Path) -> None:
    budget = Budget(steps=30)
    take(prepared(model, tmp_path, data=two(), budget=budget), until=4)
    changed = two(talks=0.25)
    with pytest.raises(ConfigError, match=r"data\.sources\.talks\.weight: 2\.0 -> 0\.25$"):
        prepared(model, tmp_path, data=changed, budget=budget)
    run = prepared(model, tmp_path, data=changed, budget=budget, accept="data.sources.talks.weight")
    lengths, source = (run.train.with_format("numpy")[name][:] for name in ("length", "source"))
    taken = np.concatenate([run.plan.step(number)[0] for number in range(4, 30)])
    tokens = np.bincount(source[taken], weights=lengths[taken])
    assert tokens[1] / tokens.sum() == pytest.approx(0.2, abs=0.03)
    middle = take(run, until=9)
    again = prepared(model, tmp_path, data=changed, budget=budget)
    assert middle + take(again) == [sorted(run.plan.step(number)[0].tolist()) for number in range(4, 30)]


def test_a_source_by_another_name_with_the_same_rows_keeps_the_order(model: Path, tmp_path: Path) -> None:
    first, second = (tiny.save_rows(tmp_path / name, "sft", ROWS) for name in ("a.jsonl", "b.jsonl"))
    here = tmp_path / "run"
    take(prepared(model, here, data=Data(source=str(first), holdout=0.0)), until=3)
    run = prepared(model, here, data=Data(source=str(second), holdout=0.0), accept="data.source")
    assert (run.progress.origin, run.progress.step) == (0, 3)
    assert take(run) == [sorted(run.plan.step(number)[0].tolist()) for number in range(3, run.plan.num_steps)]


def test_evaluations_of_other_rows_are_not_compared(model: Path, tmp_path: Path) -> None:
    every, data = Every(log=1, evaluate=2, save=2), one(rows(60), holdout=0.2)
    run = prepared(model, tmp_path, data=data, every=every)
    finetune.fit(run)
    assert run.record.comparisons
    other = one(rows(70, seed=3), holdout=0.2)
    again = prepared(model, tmp_path, data=other, every=every, epochs=3.0, accept=("data", "budget"))
    assert (again.record.reports, again.statistics) == ((), {})
    assert any("may have been trained on before" in note for note in again.record.notes)
    record = finetune.fit(again)
    assert (record.status, record.comparisons) == ("complete", ())
    assert {report.num_examples for report in record.reports} == {14}


def test_other_weights_under_the_same_name_are_accepted_with_model(model: Path, tmp_path: Path) -> None:
    place = tmp_path / "model"
    tiny.save_model(place, "sft", dropout=0.1)
    take(prepared(place, tmp_path / "run", tuning="lora"), until=3)
    tensors = load_file(place / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"other weights than model .*\(accept: \[model\]\)"):
        prepared(place, tmp_path / "run", tuning="lora")
    run = prepared(place, tmp_path / "run", tuning="lora", accept="model")
    assert run.record.notes[0].startswith("Changed at step 3: weights of model: ")
    assert (run.progress.step, run.progress.origin) == (3, 0)


def test_a_complete_run_goes_on_when_its_budget_grows(model: Path, tmp_path: Path) -> None:
    run = prepared(model, tmp_path, data=one(rows(60), holdout=0.2))
    finetune.fit(run)
    write_json(tmp_path / "outcome.json", Outcome(code=EXIT_OK, reason="complete").model_dump())
    config = run.config.model_copy(update={"accept": ("budget",)})
    assert is_complete(config)
    longer = config.model_copy(update={"budget": Budget(epochs=2.5)})
    assert not is_complete(longer)
    with pytest.raises(ConfigError, match=r"budget\.epochs: 1\.3 -> 2\.5"):
        is_complete(longer.model_copy(update={"accept": ()}))
    again = finetune.prepare(longer)
    record = finetune.fit(again)
    assert (record.status, record.step) == ("complete", again.plan.num_steps)
    assert [report.name for report in record.reports] == ["untuned", "final"]
    assert record.final is not None
    assert record.final.step == record.step == record.curve[-1].step
    assert checkpoints(tmp_path)[0].step == record.step
    assert is_complete(longer)


def test_accepting_what_did_not_change_changes_nothing(model: Path, tmp_path: Path) -> None:
    take(prepared(model, tmp_path), until=3)
    run = prepared(model, tmp_path, accept=("data", "model", "budget", "optim"))
    assert (run.record.notes, run.progress.origin) == ((), 0)
    assert isinstance(run.config.model, Pretrained)
