"""One pass over a large weight does what clipping, torch's AdamW and rounding do in several."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

import finetune
from trainworks import Batch, Optim, Speed, train_steps
from trainworks.optim import take_step
from trainworks.parallel.norm import gradient_norm
from trainworks.speed import adamw
from trainworks.speed.adamw import OnePassAdamW
from trainworks.speed.working_weights import WorkingWeights

LR, LIMIT = 0.05, 2.0


def module() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(64, 32), nn.LayerNorm(32), nn.Linear(32, 8), nn.Linear(8, 3))


def for_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let small weights count as large ones, on a processor, and their update run as it is written."""
    monkeypatch.setattr(adamw, "_LARGE", 512)
    monkeypatch.setattr(adamw, "_LINE", 64)
    monkeypatch.setattr(adamw, "can_compile", lambda _: True)
    monkeypatch.setattr(adamw, "_compiled", lambda: adamw._update)


def optimizers(
    monkeypatch: pytest.MonkeyPatch, first: float = 0.9
) -> tuple[nn.Sequential, OnePassAdamW, nn.Sequential, torch.optim.AdamW]:
    for_a_processor(monkeypatch)
    ours, plain = module(), module()
    rounded = WorkingWeights(ours, torch.bfloat16)
    groups = [{"params": list(ours.parameters()), "weight_decay": 0.1}]
    one_pass = OnePassAdamW(groups, rounded, lr=LR, betas=(first, 0.95), eps=1e-8)
    assert len(one_pass._large) == 1
    return (
        ours,
        one_pass,
        plain,
        torch.optim.AdamW(plain.parameters(), lr=LR, betas=(first, 0.95), eps=1e-8, weight_decay=0.1, fused=True),
    )


def set_gradients(*modules: nn.Module, seed: int) -> None:
    for each in modules:
        draw = torch.Generator().manual_seed(seed)
        for weight in each.parameters():
            weight.grad = torch.randn(weight.shape, generator=draw)


def test_where_nothing_is_compiled_torch_does_it_all() -> None:
    ours = nn.Linear(1024, 1024)
    one_pass = OnePassAdamW([{"params": list(ours.parameters())}], WorkingWeights(ours, torch.bfloat16), lr=LR)
    assert not one_pass._large


def step(optimizer: torch.optim.Optimizer, each: nn.Module, spoiled: float = 0.0) -> None:
    norm = gradient_norm(each.parameters())
    optim = Optim(lr=LR, max_grad_norm=LIMIT)
    take_step(optimizer, optim, lr=LR, norm=norm, spoiled=torch.tensor(spoiled))


@pytest.mark.parametrize("first", [0.9, 0.0])
def test_weights_and_state_are_those_of_torch(first: float, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, one_pass, plain, reference = optimizers(monkeypatch, first)
    for number in range(6):
        set_gradients(ours, plain, seed=number)
        step(one_pass, ours)
        step(reference, plain)
    for weight, expected in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(weight, expected, rtol=1e-5, atol=1e-6)
        state, wanted = one_pass.state[weight], reference.state[expected]
        assert state.keys() == wanted.keys()
        for name, value in wanted.items():
            assert state[name].dtype == value.dtype
            assert torch.allclose(state[name], value, rtol=1e-5, atol=1e-7), name
        assert weight.grad is None


def test_a_spoiled_step_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, one_pass, *_ = optimizers(monkeypatch)
    for number in range(2):
        set_gradients(ours, seed=number)
        step(one_pass, ours)
    before = [weight.detach().clone() for weight in ours.parameters()]
    states = [{name: value.clone() for name, value in one_pass.state[each].items()} for each in ours.parameters()]
    set_gradients(ours, seed=3)
    next(ours.parameters()).grad.fill_(float("nan"))  # type: ignore[union-attr]
    step(one_pass, ours, spoiled=1.0)
    for weight, old, state in zip(ours.parameters(), before, states, strict=True):
        assert torch.equal(weight, old)
        assert all(torch.equal(one_pass.state[weight][name], value) for name, value in state.items())


def test_the_rounded_weights_are_those_of_the_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, one_pass, *_ = optimizers(monkeypatch)
    for number in range(3):
        set_gradients(ours, seed=number)
        step(one_pass, ours)
        weights = [weight.detach().bfloat16() for weight in ours.parameters() if weight.ndim > 1]
        with one_pass._rounded.used():
            inside = [each.weight for each in (ours[0], ours[2], ours[3])]
            assert all(torch.equal(found, wanted) for found, wanted in zip(inside, weights, strict=True))


def test_rounded_gradients_are_taken_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, one_pass, plain, reference = optimizers(monkeypatch)
    one_pass.allow_rounded_gradients()
    large = ours[0].weight
    for number in range(4):
        ids = torch.randint(64, (40,), generator=torch.Generator().manual_seed(number))
        with one_pass._rounded.used(), torch.autocast("cpu", torch.bfloat16):
            ours(ids).float().square().sum().backward()
        assert (large.grad.dtype, ours[2].weight.grad.dtype) == (torch.bfloat16, torch.float32)
        for weight, other in zip(ours.parameters(), plain.parameters(), strict=True):
            other.grad = weight.grad.float().clone()
        step(one_pass, ours)
        step(reference, plain)
    for weight, expected in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(weight, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch compiles for a processor with g++, which is not here")
@pytest.mark.usefixtures("bf16")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("pack", ["off", 64])
def test_a_run_with_all_compiled_has_the_losses_of_a_plain_one(
    pack: int | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for_a_processor(monkeypatch)
    tiny.save_model(tmp_path / "model", "sft", tied=True)
    tiny.save_rows(tmp_path / "rows.jsonl", "sft", 60)
    compiled = torch.compile(adamw._update)
    losses = {}
    for name, update in (("off", adamw._update), ("on", compiled)):
        monkeypatch.setattr(adamw, "_compiled", lambda update=update: update)
        config = tiny.config(
            "sft",
            tmp_path / "model",
            tmp_path / "rows.jsonl",
            tmp_path / name,
            speed=Speed(compile=name),
            batch=Batch(per_step=8, micro=8, pack=pack),
        )
        run = finetune.prepare(config)
        assert len(run.optimizer._large) > 10  # type: ignore[attr-defined]
        losses[name] = [step.loss.item() for step in train_steps(run)]
    assert losses["on"] == pytest.approx(losses["off"], rel=1e-2)
