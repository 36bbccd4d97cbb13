"""Averages of the weights: what they are by definition, used where they should be, and kept over a stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

import finetune
from trainworks import Optim, Run, evaluate, export, train_steps
from trainworks.checkpoint import save
from trainworks.schema import Average


def prepared(folder: Path, name: str = "run", average: Average | None = None, **changes: Any) -> Run:
    if not (folder / "model").exists():
        tiny.save_model(folder / "model", "sft", dropout=0.1)
        tiny.save_rows(folder / "rows.jsonl", "sft", 40)
    optim = Optim(lr=3e-3, average=average)
    return finetune.prepare(
        tiny.config("sft", folder / "model", folder / "rows.jsonl", folder / name, optim=optim, **changes)
    )


@pytest.mark.parametrize("tuning", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_averages_are_what_they_are_by_definition_and_leave_training_as_it_is(tuning: str, tmp_path: Path) -> None:
    plain = prepared(tmp_path, "plain", tuning=tuning)
    expected: dict[str, torch.Tensor] = {}
    for _ in train_steps(plain):
        for name, weight in plain.model.named_parameters():
            if weight.requires_grad:
                now = weight.detach().clone()
                expected[name] = 0.75 * expected[name] + 0.25 * now if name in expected else now
    run = prepared(tmp_path, average=Average(decay=0.75), tuning=tuning)
    for _ in train_steps(run):
        pass
    before = {name: weight.detach().clone() for name, weight in run.model.named_parameters()}
    assert all(torch.equal(weight, before[name]) for name, weight in plain.model.named_parameters())
    with run.averaged("evaluate"):
        weights = dict(run.model.named_parameters())
        for name, average in expected.items():
            torch.testing.assert_close(weights[name], average, rtol=1e-5, atol=1e-7)
    assert all(torch.equal(weight, before[name]) for name, weight in run.model.named_parameters())


def test_averages_are_evaluated_and_exported_as_asked(tmp_path: Path) -> None:
    losses, weights = {}, {}
    for use in (("evaluate", "export"), ("evaluate",), ("export",), ()):
        run = prepared(tmp_path, "-".join(("run", *use)), Average(decay=0.9, use=use))
        for _ in train_steps(run):
            pass
        losses[use] = evaluate(run).metrics["loss"].value
        weights[use] = load_file(export(run) / "model.safetensors")["model.norm.weight"]
        assert run.averages is not None
        own = run.model.get_parameter("model.norm.weight")
        torch.testing.assert_close(weights[use], run.averages.values[own] if "export" in use else own.detach())
    assert losses["evaluate", "export"] == losses[("evaluate",)] != losses[("export",)] == losses[()]
    assert not torch.equal(weights[("export",)], weights[()])


def test_averages_go_on_bit_for_bit_and_pass_over_a_spoiled_step(tmp_path: Path) -> None:
    average = Average(decay=0.9)
    whole = prepared(tmp_path, "whole", average)
    for _ in train_steps(whole):
        pass
    first = prepared(tmp_path, average=average)
    first.save_record()
    for step in train_steps(first):
        if step.number == 2:
            save(first)
            break
    second = prepared(tmp_path, average=average)
    assert second.progress.step == 2
    for _ in train_steps(second):
        pass
    assert whole.averages is not None
    assert second.averages is not None
    for name, weight in whole.model.named_parameters():
        own = second.averages.values[second.model.get_parameter(name)]
        assert torch.equal(whole.averages.values[weight], own)
    before = [value.clone() for value in second.averages.values.values()]
    second.optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    second.averages._stepped(second.optimizer)
    assert all(torch.equal(one, other) for one, other in zip(before, second.averages.values.values(), strict=True))
