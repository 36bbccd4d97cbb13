"""A run on several sources: shares by tokens, each source's loss told apart, and the same samples after any stop."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from datasets import Dataset

import finetune
from trainworks import SFT, Batch, Budget, Every, Mixture, Part, Run, output, read_record, train_steps
from trainworks.data.loading import windows
from trainworks.errors import ConfigError, EvaluationError
from trainworks.evaluation import harness

SHARES = {"questions": 1.0, "talks": 3.0}


def sources(**changes: Any) -> Mixture:
    """Return two sources of different sizes and shapes: prompt and completion, and messages."""
    questions = tiny.rows("sft", 40, seed=1)
    talks = [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
        for row in tiny.rows("sft", 90, seed=2)
    ]
    rows = {"questions": questions, "talks": talks}
    parts = {
        name: Part(source=Dataset.from_list(rows[name]), holdout=0.2, weight=weight) for name, weight in SHARES.items()
    }
    return Mixture(**({"sources": parts} | changes))


def prepared(folder: Path, name: str = "run", **changes: Any) -> Run:
    if not (folder / "model").exists():
        tiny.save_model(folder / "model", "sft", dropout=0.1)
    data = changes.pop("data", sources())
    settings = {"budget": Budget(steps=24), "every": Every(log=1)} | changes
    return finetune.prepare(tiny.config("sft", folder / "model", data, folder / name, **settings))


def test_each_source_gets_its_share_of_the_tokens(tmp_path: Path) -> None:
    run = prepared(tmp_path)
    rows = run.train.with_format("numpy")
    lengths, source = rows["length"][:], rows["source"][:]
    taken = np.concatenate([run.plan.step(number)[0] for number in range(run.plan.num_steps)])
    tokens = np.bincount(source[taken], weights=lengths[taken])
    assert tokens[1] / tokens.sum() == pytest.approx(0.75, abs=0.01)
    assert len(run.train) < len(taken), "the sources are passed over more than once"


def test_the_loss_of_every_source_is_told_apart(tmp_path: Path) -> None:
    run = prepared(tmp_path)
    step = next(iter(train_steps(run)))
    fresh = prepared(tmp_path, "again")
    window = next(fresh.windows())
    fresh.step.train()
    sums, counts = np.zeros(2), np.zeros(2)
    for batch in window.batches:
        for source, total, count in zip(
            batch["source"].tolist(),
            fresh.step(batch)["loss"].tolist(),
            fresh.task.count(batch)["loss"].tolist(),
            strict=True,
        ):
            sums[source] += total
            counts[source] += count
    assert step.source_losses.tolist() == pytest.approx((sums / counts).tolist(), rel=1e-5)
    assert step.loss.item() == pytest.approx(sums.sum() / counts.sum(), rel=1e-5)


def test_the_record_holds_every_source(tmp_path: Path) -> None:
    finetune.fit(prepared(tmp_path, budget=Budget(steps=4)))
    record = read_record(tmp_path / "run")
    assert [set(point.source_losses) for point in record.curve] == [set(SHARES)] * 4
    assert record.final is not None
    held_out = {name: metrics["loss"].n for name, metrics in record.final.slices.items()}
    assert held_out == {"questions": 8, "talks": 18}
    train = record.data.splits[0]
    assert (train.name, train.rows) == ("train", 104)
    assert [part.splits[0].rows for part in record.data.parts.values()] == [32, 72]
    assert train.tokens == sum(part.splits[0].tokens for part in record.data.parts.values())


def test_a_stopped_run_goes_on_with_the_same_samples(tmp_path: Path) -> None:
    whole = finetune.fit(prepared(tmp_path, "whole", every=Every(log=1, save=5)))
    first = prepared(tmp_path, "stopped", every=Every(log=1, save=5))
    from trainworks.checkpoint import save

    for step in islice(train_steps(first), 7):
        if step.number == 7:
            save(first)
            first.save_record()
    second = prepared(tmp_path, "stopped", every=Every(log=1, save=5))
    assert second.progress.step == 7
    record = finetune.fit(second)
    losses = {point.step: (point.loss, point.source_losses) for point in whole.curve}
    assert {point.step: (point.loss, point.source_losses) for point in record.curve} == {
        number: losses[number] for number in range(8, 25)
    }


@pytest.mark.parametrize("pack", ["off", 256])
def test_any_number_of_ranks_shares_the_same_samples(tmp_path: Path, pack: Any) -> None:
    run = prepared(tmp_path, batch=Batch(per_step=8, micro=2, pack=pack), budget=Budget(steps=6))

    def collate(rows: Any) -> Any:
        import torch

        return {"row": torch.tensor([row["index"] for row in rows])}

    def seen(ranks: int) -> list[list[tuple[int, int]]]:
        steps: list[list[tuple[int, int]]] = [[] for _ in range(6)]
        for rank in range(ranks):
            shared = windows(
                run.samples, run.plan, collate, start=0, ranks=ranks, rank=rank, micro=2, workers=0, pin=False
            )
            for number, window in enumerate(shared):
                for batch in window.batches:
                    kept = batch["weight"] > 0
                    pairs = zip(batch["index"][kept].tolist(), batch["source"][kept].tolist(), strict=True)
                    steps[number] += list(pairs)
        return [sorted(step) for step in steps]

    alone = seen(1)
    assert {source for step in alone for _, source in step} == {0, 1}
    assert seen(2) == seen(4) == alone


def test_shares_may_follow_the_sizes(tmp_path: Path) -> None:
    parts = {name: part.model_copy(update={"weight": None}) for name, part in sources().sources.items()}
    run = prepared(tmp_path, data=Mixture(sources=parts, temperature=1e9))
    rows = run.train.with_format("numpy")
    taken = np.concatenate([run.plan.step(number)[0] for number in range(run.plan.num_steps)])
    tokens = np.bincount(rows["source"][:][taken], weights=rows["length"][:][taken])
    assert tokens[0] / tokens.sum() == pytest.approx(0.5, abs=0.01)


def test_a_source_that_is_used_up_before_the_budget_is_refused(tmp_path: Path) -> None:
    parts = {name: part.model_copy(update={"epochs": 1.0}) for name, part in sources().sources.items()}
    with pytest.raises(ConfigError, match=r"their epochs allow 104 samples, the budget asks for 192"):
        prepared(tmp_path, data=Mixture(sources=parts))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"temperature": 2.0}, "temperature does nothing beside weights"),
        ({"sources": {}}, "at least 1"),
        ({"sources": {"a": Part(source="a", weight=1.0), "b": Part(source="b")}}, "b has none"),
    ],
)
def test_a_mixture_that_contradicts_itself_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sources(**changes)


def test_a_model_stops_where_the_answers_of_any_source_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SFT, "ends", lambda task, processor: (len(task.format),))
    assert prepared(tmp_path).ends == (len("messages"), len("prompt-completion"))


def test_a_metric_that_wants_more_rows_than_a_source_has_is_left_out_of_its_slice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    estimate = harness.estimate

    def demanding(metric: Any, statistics: Any, **options: Any) -> Any:
        if len(statistics) < 10:
            raise EvaluationError(f"{metric.name} wants ten rows")
        return estimate(metric, statistics, **options)

    monkeypatch.setattr(harness, "estimate", demanding)
    report = harness.evaluate(prepared(tmp_path))
    assert (report.slices["questions"], set(report.slices["talks"])) == ({}, {"loss", "perplexity"})


@pytest.mark.parametrize(
    ("key", "may"),
    [
        ("data.sources.talks.clean.workers", True),
        ("data.sources.talks.clean.executor.type", True),
        ("data.sources.talks.clean.exact", False),
        ("data.clean.workers", True),
        ("every.save", True),
        ("data.sources.talks.weight", False),
        ("aboutness", False),
    ],
)
def test_a_run_may_go_on_with_other_keys_that_touch_nothing_learned(key: str, may: bool) -> None:
    assert output._may_change(key) == may
