"""Weights rounded once a step give the losses and gradients of weights that are rounded whenever they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from distributed import run_ranks
from torch import nn

import finetune
from trainworks import train_steps
from trainworks.parallel.launch import World
from trainworks.speed.working_weights import WorkingWeights


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> Any:
        logits: torch.Tensor = self.head(self.norm(self.embed(ids).float()).to(self.head.weight.dtype)).float()
        return torch.nn.functional.cross_entropy(logits, ids.roll(1))


def gradients(module: nn.Module, rounded: WorkingWeights, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    module.zero_grad()
    with torch.autocast("cpu", torch.bfloat16), rounded.used():
        module(ids).backward()
    return {name: weight.grad.clone() for name, weight in module.named_parameters() if weight.grad is not None}


def test_in_float32_nothing_changes() -> None:
    torch.manual_seed(0)
    module, ids = Tied(), torch.randint(11, (16,))
    loss = module(ids)
    loss.backward()
    expected = {name: weight.grad.clone() for name, weight in module.named_parameters() if weight.grad is not None}
    module.zero_grad()
    with WorkingWeights(module, torch.float32).used():
        again = module(ids)
        again.backward()
    assert again.item() == pytest.approx(loss.item(), rel=1e-5)
    assert len(expected) == 4
    for name, gradient in expected.items():
        assert torch.allclose(module.get_parameter(name).grad, gradient, rtol=1e-4)  # type: ignore[arg-type]


def test_gradients_come_in_float32_to_the_weights_that_are_kept() -> None:
    module, ids = Tied(), torch.randint(11, (16,))
    weights = dict(module.named_parameters())
    found = gradients(module, WorkingWeights(module, torch.bfloat16), ids)
    assert dict(module.named_parameters()).keys() == weights.keys()
    assert all(module.get_parameter(name) is weight for name, weight in weights.items())
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert len(found) == len(weights) == 4


def test_inside_matrices_are_rounded_shared_ones_once_and_vectors_are_not() -> None:
    module = Tied()
    with WorkingWeights(module, torch.bfloat16).used():
        assert module.head.weight is module.embed.weight
        assert module.head.weight.dtype == torch.bfloat16
        assert (module.norm.weight.dtype, module.head.bias.dtype) == (torch.float32, torch.float32)
    assert module.head.weight.dtype == torch.float32


def test_a_changed_weight_is_rounded_anew() -> None:
    module, ids = Tied(), torch.randint(11, (16,))
    rounded = WorkingWeights(module, torch.bfloat16)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.5, fused=True)
    rounded.follow(optimizer)
    for _ in range(3):
        gradients(module, rounded, ids)
        with rounded.used():
            before = module.head.weight.clone()
        optimizer.step()
        with rounded.used():
            assert not torch.equal(module.head.weight, before)
            assert torch.equal(module.head.weight, module.head.weight.bfloat16())
            inside = module.head.weight.clone()
        assert torch.equal(inside, module.head.weight.bfloat16())
    with torch.no_grad():
        module.head.weight.mul_(2)
    with rounded.used():
        assert torch.equal(module.head.weight, inside * 2)


def test_an_error_inside_leaves_the_weights_where_they_were() -> None:
    module = Tied()
    weight = module.head.weight
    with pytest.raises(ZeroDivisionError), WorkingWeights(module, torch.bfloat16).used():
        raise ZeroDivisionError
    assert module.head.weight is weight


@pytest.mark.usefixtures("bf16")
@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("task", ["causal-lm", "sft", "sequence-classification"])
def test_a_run_has_the_losses_of_one_that_rounds_at_each_use(
    task: str, tuning: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.save_model(tmp_path / "model", task, tied=task != "sequence-classification")
    tiny.save_rows(tmp_path / "rows.jsonl", task, 60)
    losses = {}
    for name in ("each-use", "once"):
        config = tiny.config(task, tmp_path / "model", tmp_path / "rows.jsonl", tmp_path / name, tuning=tuning)
        with monkeypatch.context() as patch:
            if name == "each-use":
                patch.setattr(World, "rounding", None)
            run = finetune.prepare(config)
            assert (run.world.rounding is None) == (name == "each-use")
        losses[name] = [step.loss.item() for step in train_steps(run)]
        assert {weight.dtype for weight in run.model.parameters()} == {torch.float32}
    assert losses["once"] == pytest.approx(losses["each-use"], rel=2e-2)
    assert losses["once"] != losses["each-use"]


def losses_of_two_steps(folder: str, output: str) -> list[float]:
    config = tiny.config("sft", Path(folder) / "model", Path(folder) / "rows.jsonl", Path(output), micro=2)
    run = finetune.prepare(config)
    assert run.world.rounding == torch.bfloat16
    return [step.loss.item() for step, _ in zip(train_steps(run), range(2), strict=False)]


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "model", "sft", tied=True)
    tiny.save_rows(tmp_path / "rows.jsonl", "sft", 60)
    target, found = f"{__file__}:losses_of_two_steps", {}
    for ranks in (1, 2):
        arguments = {"folder": str(tmp_path), "output": str(tmp_path / str(ranks))}
        found[ranks] = run_ranks(target, arguments, ranks=ranks, precision="bf16")
    assert len(found[2]) == 2
    for losses in found[2]:
        assert losses == pytest.approx(found[1][0], rel=1e-3)
