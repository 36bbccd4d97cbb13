"""The learning rate is a function of the step, and decay leaves norms and biases alone."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any, Literal

import pytest
import tiny
import torch
import transformers

from trainworks import Optim
from trainworks.optim import build_optimizer, layer_ratios, learning_rate, take_step
from trainworks.parallel.norm import gradient_norm
from trainworks.tasks import TASKS


def rates(optim: Optim, number: int = 10) -> list[float]:
    return [learning_rate(optim, step, number) for step in range(number)]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [4, 0.4])
def test_warm_up_rises_to_the_peak_and_the_rest_never_rises(schedule: str, warmup: float) -> None:
    curve = rates(Optim(lr=2.0, schedule=schedule, warmup=warmup))
    assert curve[:4] == [0.5, 1.0, 1.5, 2.0]
    assert curve[4] == 2.0
    assert all(after <= before for before, after in itertools.pairwise(curve[4:]))


def test_shapes_have_their_known_values() -> None:
    assert rates(Optim(lr=1.0, schedule="linear"), 4) == [1.0, 0.75, 0.5, 0.25]
    assert rates(Optim(lr=1.0, schedule="cosine"), 4) == pytest.approx(
        [1.0, 0.5 + math.sqrt(2) / 4, 0.5, 0.5 - math.sqrt(2) / 4]
    )
    assert rates(Optim(lr=1.0, schedule="constant"), 3) == [1.0] * 3
    assert rates(Optim(lr=1.0, schedule="linear", min_lr_ratio=0.5), 4) == [1.0, 0.875, 0.75, 0.625]


def test_wsd_stays_until_it_falls_by_the_square_root_of_the_time() -> None:
    curve = rates(Optim(lr=1.0, schedule="wsd", warmup=2, decay=4), 10)
    assert curve == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75)])
    assert rates(Optim(lr=1.0, schedule="wsd", warmup=2, decay=0.4), 10) == curve
    assert rates(Optim(lr=1.0, schedule="wsd", warmup=2, decay=4), 20)[:16] == [*curve[:6], *[1.0] * 10]
    assert rates(Optim(lr=1.0, schedule="wsd", min_lr_ratio=0.5, decay=1.0 - 1e-9), 4)[0] == 1.0


@pytest.mark.parametrize(
    ("task", "names"),
    [
        (
            "sequence-classification",
            ["bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.output.dense.bias"],
        ),
        ("sft", ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"]),
    ],
)
def test_layers_learn_the_slower_the_farther_they_are_from_the_head(
    task: str, names: list[str], tmp_path: Path
) -> None:
    auto: Any = getattr(transformers, TASKS[task].auto_class)
    model = auto.from_pretrained(tiny.save_model(tmp_path, task), num_labels=2)
    ratios = layer_ratios(Optim(lr=1.0, layer_decay=0.5), model)
    assert ratios.keys() == {name for name, _ in model.named_parameters()}
    below, layer = names
    above = {name for name, ratio in ratios.items() if ratio == 1.0}
    assert (ratios[below], ratios[layer], ratios[layer.replace(".0.", ".1.")]) == (0.125, 0.25, 0.5)
    assert {"classifier.weight" if "bert" in below else "lm_head.weight"} <= above
    assert set(ratios.values()) == {0.125, 0.25, 0.5, 1.0}
    weights = {weight: ratios[name] for name, weight in model.named_parameters()}
    optimizer = build_optimizer(Optim(lr=1.0), model, lr_ratios=weights)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    take_step(optimizer, Optim(lr=1.0), lr=0.1, norm=torch.tensor(1.0), spoiled=torch.tensor(0.0))
    for group in optimizer.param_groups:
        assert {0.1 * weights[weight] for weight in group["params"]} == {group["lr"]}


def test_decay_is_for_matrices_only() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    module[0].weight.requires_grad_(True)
    optimizer = build_optimizer(Optim(lr=0.1, weight_decay=0.3), module)
    decay = {id(parameter): group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    assert [decay[id(parameter)] for parameter in module.parameters()] == [0.3, 0.0, 0.0, 0.0]


def test_frozen_weights_are_not_optimized() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2)).requires_grad_(False)
    module[1].requires_grad_(True)
    optimizer = build_optimizer(Optim(name="sgd", lr=0.1), module)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2


def stepped(name: str, *, limit: float | Literal["off"]) -> tuple[float, torch.Tensor]:
    weight = torch.nn.Parameter(torch.zeros(2, 1))
    weight.grad = torch.tensor([[3.0], [4.0]])
    norm = gradient_norm([weight])
    adamw = {"weight_decay": 0.0, "eps": 1.0} if name == "adamw" else {}
    optim = Optim(name=name, lr=1.0, betas=(0.0, 0.0), max_grad_norm=limit, **adamw)
    optimizer = build_optimizer(optim, torch.nn.ParameterList([weight]))
    take_step(optimizer, optim, lr=1.0, norm=norm, spoiled=torch.tensor(0.0))
    assert weight.grad is None
    return norm.item(), weight.detach()


def test_the_step_is_that_of_gradients_scaled_to_the_limit() -> None:
    norm, weight = stepped("sgd", limit=1.0)
    assert norm == 5.0
    assert weight.norm().item() == pytest.approx(1.0, rel=1e-4)
    assert weight[1].item() == pytest.approx(-0.8, rel=1e-4)
    norm, weight = stepped("adamw", limit=1.0)
    assert weight[1].item() == pytest.approx(-0.8 / 1.8, rel=1e-4)
    limits: tuple[float | Literal["off"], ...] = (6.0, "off")
    for limit in limits:
        assert stepped("sgd", limit=limit)[1].norm().item() == pytest.approx(5.0, rel=1e-6)


def test_the_norm_over_gradients_of_several_types_is_exact() -> None:
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.zeros(300)) for _ in range(4)]
    for weight, dtype in zip(weights, (torch.float32, torch.bfloat16, torch.bfloat16, torch.float32), strict=True):
        weight.grad_dtype = dtype
        weight.grad = torch.randn(300).to(dtype)
    whole = torch.cat([weight.grad.double() for weight in weights if weight.grad is not None])
    assert gradient_norm(weights).item() == pytest.approx(whole.norm().item(), rel=1e-6)
