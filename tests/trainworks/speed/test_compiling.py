"""Compiled layers train as plain ones do."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny
import torch

import finetune
from trainworks import Speed
from trainworks.speed.compiling import can_compile, compile_layers


def test_layers_are_compiled_where_they_stand(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny.save_model(tmp_path, "sft"))
    names = list(model.state_dict())
    assert compile_layers(model) == tiny.SIZES["num_hidden_layers"]
    assert all(layer._compiled_call_impl is not None for layer in model.model.layers)
    assert list(model.state_dict()) == names


def test_a_processor_is_not_compiled_for_unless_it_is_asked_for() -> None:
    assert not can_compile(torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch compiles for a processor with g++, which is not here")
@pytest.mark.parametrize("task", ["causal-lm", "sft"])
def test_a_compiled_run_has_the_losses_of_a_plain_one(task: str, tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "model", task)
    tiny.save_rows(tmp_path / "rows.jsonl", task, 60)
    losses = {}
    for name in ("off", "on"):
        config = tiny.config(
            task, tmp_path / "model", tmp_path / "rows.jsonl", tmp_path / name, speed=Speed(compile=name)
        )
        run = finetune.prepare(config)
        layers = run.model.model.layers
        assert all((layer._compiled_call_impl is not None) == (name == "on") for layer in layers)
        losses[name] = [(point.loss, point.grad_norm) for point in finetune.fit(run).curve]
    for plain, compiled in zip(losses["off"], losses["on"], strict=True):
        assert compiled == pytest.approx(plain, rel=1e-5)
