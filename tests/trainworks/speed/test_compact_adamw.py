"""Optimizers in fewer bits: right on average, as good as in float32, and heedless of a step that must not count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from distributed import run_ranks
from torch import Tensor, nn

import finetune
from trainworks import Optim, Run, train_steps
from trainworks.chance import chances, mixed
from trainworks.checkpoint import save
from trainworks.errors import ConfigError
from trainworks.optim import build_optimizer, take_step
from trainworks.speed.compact_adamw import _rounded

RANKS = str(Path(__file__).parents[2] / "ranks.py")
NORM = torch.tensor(1.0)


def module(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(64, 96), nn.LayerNorm(96), nn.Linear(96, 8)).to(dtype)


def stepped(optim: Optim, number: int = 5, dtype: torch.dtype = torch.float32, spoiled: int = -1) -> nn.Sequential:
    model = module(dtype)
    optimizer = build_optimizer(optim, model, seed=3)
    draw = torch.Generator().manual_seed(1)
    for step in range(number):
        for weight in model.parameters():
            weight.grad = torch.randn(weight.shape, generator=draw).to(dtype)
        if step == spoiled:
            next(iter(model.parameters())).grad.fill_(float("nan"))  # type: ignore[union-attr]
        before = state_of(model, optimizer)
        bad = torch.tensor(float(step == spoiled))
        take_step(optimizer, optim, number=step, lr=optim.lr, norm=NORM, spoiled=bad)
        if step == spoiled > 0:
            after = state_of(model, optimizer)
            assert before.keys() == after.keys()
            assert all(torch.equal(before[name], after[name]) for name in before)
    return model


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return copies of weights and moments."""
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    states = {
        f"{name}.{key}": value.clone()
        for name, weight in model.named_parameters()
        for key, value in optimizer.state.get(weight, {}).items()
    }
    return weights | states


def distance(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((a.float() - b.float()).abs().max().item() for a, b in pairs)


KINDS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "moments of two bytes": {"moments": "bfloat16"},
    "moments of one byte": {"moments": "8bit"},
    "muon": {"name": "muon"},
    "sgd": {"name": "sgd"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spoiled", [0, 2])
def test_a_spoiled_step_leaves_weights_and_moments_as_they_were(kind: str, spoiled: int) -> None:
    model = stepped(Optim(lr=0.01, weight_decay=0.1, **KINDS[kind]), 3, spoiled=spoiled)
    assert all(weight.isfinite().all() for weight in model.parameters())


@pytest.mark.parametrize("kind", ["moments of two bytes", "moments of one byte"])
def test_moments_in_fewer_bits_take_about_the_same_steps(kind: str) -> None:
    settings = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.95)}
    exact, compact = stepped(Optim(**settings), 20), stepped(Optim(**settings, **KINDS[kind]), 20)
    assert 0 < distance(exact, compact) < 0.05
    # Vectors keep float32, and so take the very steps of torch's AdamW.
    for one, other in zip(exact[1].parameters(), compact[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_moments_of_one_byte_take_the_room_of_one_byte() -> None:
    model = module()
    optimizer = build_optimizer(Optim(lr=0.1, moments="8bit"), model)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    take_step(optimizer, Optim(lr=0.1, moments="8bit"), lr=0.1, norm=NORM, spoiled=torch.tensor(0.0))
    kept = sum(value.nbytes for value in optimizer.state[model[0].weight].values())
    assert kept == 2 * 64 * 96 * (1 + 4 / 256) + 4


def test_rounding_at_random_is_right_on_average() -> None:
    exact = torch.cat([torch.linspace(-3, 3, 50), torch.tensor([1e-30, -1e30, 0.0, 1 + 2**-10, 1 / 3])])
    number = 20_000
    chance = chances(torch.arange(number * len(exact)), mixed(7))
    rounded = _rounded(exact.repeat(number), chance).view(number, -1).double()
    assert torch.equal(rounded, rounded.bfloat16().double())
    gap = (rounded.max(0).values - rounded.min(0).values).clamp(min=1e-45)
    # A share of ups that is drawn so often strays by 1 / (2 sqrt(number)) at most, once; five times that never.
    error = (rounded.mean(0) - exact.double()).abs() / gap
    assert error.max() < 5 / (2 * number**0.5)
    assert (rounded.std(0)[:50] > 0).sum() > 30


def test_bits_of_chance_are_even_and_do_not_follow_one_another() -> None:
    bits = chances(torch.arange(2**16), mixed(1))
    ones = torch.stack([(bits >> place & 1).double().mean() for place in range(64)])
    assert (ones - 0.5).abs().max() < 0.01
    low = (bits & 0xFFFF).double()
    for other in (
        low.roll(1),
        (bits >> 16 & 0xFFFF).double(),
        (chances(torch.arange(2**16), mixed(2)) & 0xFFFF).double(),
    ):
        assert abs(torch.corrcoef(torch.stack([low, other]))[0, 1]) < 0.02
    assert torch.equal(chances(torch.arange(100, 150), mixed(1)), bits[100:150])


def test_a_weight_goes_on_where_the_nearest_rounding_stands_still() -> None:
    def moved(rounding: str) -> float:
        weight = nn.Parameter(torch.ones(64, 128, dtype=torch.bfloat16))
        optim = Optim(lr=1e-4, betas=(0.0, 0.0), rounding=rounding)
        optimizer = build_optimizer(optim, nn.ParameterList([weight]))
        for step in range(100):
            weight.grad = torch.ones_like(weight)
            take_step(optimizer, optim, number=step, lr=1e-4, norm=NORM, spoiled=torch.tensor(0.0))
        return 1 - weight.detach().float().mean().item()

    assert moved("nearest") == 0.0
    assert moved("stochastic") == pytest.approx(100 * 1e-4, rel=0.05)


def test_muon_takes_the_steps_of_torch_for_matrices_and_those_of_adamw_for_the_rest() -> None:
    ours, plain = module(), module()
    optim = Optim(name="muon", lr=0.01, weight_decay=0.1, momentum=0.95)
    muon = build_optimizer(optim, ours, hidden=[ours[2].weight])
    for_matrices = torch.optim.Muon([plain[2].weight], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    embeddings = {"params": [plain[0].weight], "weight_decay": 0.1}
    others = {"params": [*plain[1].parameters(), plain[2].bias], "weight_decay": 0.0}
    for_the_rest = torch.optim.AdamW([embeddings, others], lr=0.01, betas=optim.betas, eps=optim.eps)
    draw = torch.Generator().manual_seed(1)
    for step in range(5):
        for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
            one.grad = torch.randn(one.shape, generator=draw)
            other.grad = one.grad / 4  # as clipping makes of it
        take_step(muon, optim, number=step, lr=0.01, norm=torch.tensor(4.0), spoiled=torch.tensor(0.0))
        for_matrices.step()
        for_the_rest.step()
    # Products in bfloat16, in another order: within a few of a hundred of the way.
    way = (plain[2].weight - module()[2].weight).norm()
    assert (ours[2].weight - plain[2].weight).norm() < 0.05 * way
    assert distance(ours[:2], plain[:2]) < 1e-5


def prepared(folder: Path, optim: Optim, output: str = "run", dtype: Any = "float32") -> Run:
    if not (folder / "model").exists():
        tiny.save_model(folder / "model", "sft", dropout=0.1)
        tiny.save_rows(folder / "rows.jsonl", "sft", 40)
    config = tiny.config("sft", folder / "model", folder / "rows.jsonl", folder / output, optim=optim, micro=4)
    model = config.model.model_copy(update={"dtype": dtype})
    config = config.model_copy(update={"model": model})
    return finetune.prepare(config)


RUNS: dict[str, tuple[dict[str, Any], str]] = {
    "wsd": ({"schedule": "wsd", "decay": 3}, "float32"),
    "stochastic": ({"rounding": "stochastic"}, "bfloat16"),
    "stochastic, moments of two bytes": ({"rounding": "stochastic", "moments": "bfloat16"}, "bfloat16"),
    "moments of one byte": ({"moments": "8bit"}, "float32"),
    "muon": ({"name": "muon"}, "float32"),
}


OFTEN = ("stochastic, moments of two bytes", "muon")


@pytest.mark.parametrize(
    "kind", [kind if kind in OFTEN else pytest.param(kind, marks=pytest.mark.slow) for kind in RUNS]
)
def test_a_run_learns_and_resumes_bit_for_bit(kind: str, tmp_path: Path) -> None:
    settings, dtype = RUNS[kind]
    optim = Optim(lr=3e-3, **settings)
    whole = prepared(tmp_path, optim, "whole", dtype)
    expected = [step.loss.item() for step in train_steps(whole)]
    assert expected[-1] < expected[0]
    first = prepared(tmp_path, optim, dtype=dtype)
    first.save_record()
    begun = []
    for step in train_steps(first):
        begun.append(step.loss.item())
        if step.number == 2:
            save(first)
            break
    second = prepared(tmp_path, optim, dtype=dtype)
    assert second.progress.step == 2
    assert begun + [step.loss.item() for step in train_steps(second)] == expected
    for one, other in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_float32_weights_are_not_rounded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"optim.rounding: float32 weights are not rounded.*model.dtype: bfloat16"):
        prepared(tmp_path, Optim(lr=0.1, rounding="stochastic"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stochastic, moments of two bytes", "muon"])
def test_a_sharded_run_takes_the_same_steps_and_goes_on_with_one_process(kind: str, tmp_path: Path) -> None:
    settings, dtype = RUNS[kind]
    tiny.save_model(tmp_path / "model", "sft")
    tiny.save_rows(tmp_path / "rows.jsonl", "sft", 40)
    common = {"folder": str(tmp_path), "task": "sft", "optim": {"lr": 3e-3, **settings}, "model": {"dtype": dtype}}
    whole = run_ranks(f"{RANKS}:train", common | {"output": str(tmp_path / "whole")}, ranks=1)
    parts = common | {"output": str(tmp_path / "parts"), "micro": 4}
    first = run_ranks(f"{RANKS}:train", parts | {"stop_after": 2}, ranks=2, mode="fsdp2")
    second = run_ranks(f"{RANKS}:train", parts, ranks=1)
    steps = first[0]["steps"] + second[0]["steps"]
    # In bfloat16 gradients are added up in another order, and some weights are rounded the other way.
    for expected, found in zip(whole[0]["steps"], steps, strict=True):
        assert found == pytest.approx(expected, rel=1e-4 if kind == "muon" else 2e-2)
