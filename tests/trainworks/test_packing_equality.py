"""Packed rows give the loss and the gradients that they give alone; models that cannot are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from distributed import Mode, run_ranks

import finetune
from trainworks import Batch, Budget, Optim, train_steps
from trainworks.data.packing import pack
from trainworks.errors import ConfigError
from trainworks.models import initialise
from trainworks.schema import FromScratch
from trainworks.tasks import SFT

TOLERANCE = 1e-6
TASK = SFT(max_length=128)

GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
MAMBA = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
HYBRID = tiny.SIZES | {"num_key_value_heads": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": tiny.SIZES | {"num_key_value_heads": 2},
    "qwen2": tiny.SIZES | {"num_key_value_heads": 2},
    "qwen3": tiny.SIZES | {"num_key_value_heads": 2, "head_dim": 8},
    "gpt2": GPT2,
    "mistral": tiny.SIZES | {"num_key_value_heads": 2, "sliding_window": 5},
    "gemma2": tiny.SIZES | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5},
    "gemma3_text": tiny.SIZES | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5},
    "gpt_neox": tiny.SIZES,
    "olmo2": tiny.SIZES,
}
NO_SDPA = ("gemma2",)
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("MambaForCausalLM", MAMBA),
    "rwkv": ("RwkvForCausalLM", {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2}),
    "lfm2": ("Lfm2ForCausalLM", HYBRID | {"layer_types": ["conv", "full_attention"]}),
    "falcon": ("FalconForCausalLM", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
}
"""Recurrent; recurrent; convolutions beside attention; attention that does not heed position_ids."""


def model(architecture: str, sizes: dict[str, Any], attention: str = "sdpa", scale: float = 0.02) -> Any:
    """Return a tiny model; the larger the `scale` of its weights, the more its attention matters."""
    settings = FromScratch(architecture=architecture, sizes=sizes | {"initializer_range": scale}, tokenizer="unused")
    made = initialise(settings, "AutoModelForCausalLM", tiny.tokenizer(), seed=3)
    if architecture not in NO_SDPA:
        made.set_attn_implementation(attention)
    return made.eval()


def ragged_rows(number: int) -> list[dict[str, Any]]:
    """Return prepared rows of 2 to 30 tokens, each with some tokens that are not learned."""
    rng = np.random.default_rng(5)
    rows = []
    for size in rng.integers(2, 31, number):
        trained = rng.random(size) < 0.6
        trained[-1] = True
        rows.append({"input_ids": rng.integers(0, 320, size).astype(np.int32), "trained": trained})
    return rows


def loss_and_gradients(model: Any, rows: list[dict[str, Any]]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    batch = TASK.collate(rows, tiny.tokenizer(), train=True)
    model.zero_grad()
    losses = TASK.loss(model, batch)["loss"]
    (losses.sum() / TASK.count(batch)["loss"].sum()).backward()
    return losses.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters()}


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def packed_lines(rows: list[dict[str, Any]]) -> tuple[np.ndarray[Any, Any], list[dict[str, Any]]]:
    """Return the rows in the order of their lines, and their numbers."""
    packs = pack(np.array([len(row["input_ids"]) - 1 for row in rows]), 64)
    numbers, lines = packs.take(np.arange(len(packs)))
    together = [rows[number] | {"pack": line} for number, line in zip(numbers, lines.tolist(), strict=True)]
    batch = TASK.collate(together, tiny.tokenizer(), train=True)
    assert len(batch["input_ids"]) == len(packs) < 10
    assert (batch["labels"][:, -1] == -100).any(), "some line should end in padding"
    return numbers, together


def far_apart(made: Any, limit: float) -> dict[str, float]:
    """Return what differs by more between packed and unpacked rows: rows' losses, the loss, gradients."""
    rows = ragged_rows(24)
    numbers, together = packed_lines(rows)
    losses, gradients = loss_and_gradients(made, together)
    expected_losses, expected = loss_and_gradients(made, rows)
    assert len(expected) > 10
    differences = {name: distance(gradients[name], gradient) for name, gradient in expected.items()}
    differences["loss"] = distance(losses.double().sum(), expected_losses.double().sum())
    differences["rows"] = distance(losses, expected_losses[torch.from_numpy(numbers)])
    return {name: difference for name, difference in differences.items() if not difference <= limit}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", SHAPES)
def test_packed_rows_have_the_loss_and_the_gradients_they_have_alone(architecture: str, attention: str) -> None:
    assert not far_apart(model(architecture, SHAPES[architecture], attention), TOLERANCE)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gpt2", "mistral", "gpt_neox"])
def test_what_is_left_between_packed_and_unpacked_is_rounding(architecture: str) -> None:
    # The other shapes compute parts in float32, whatever the type of their weights.
    made = model(architecture, SHAPES[architecture], scale=0.2)
    assert not far_apart(made.double(), 1e-12)


@pytest.mark.parametrize("architecture", SHAPES)
def test_attention_models_prove_that_they_keep_rows_apart(architecture: str) -> None:
    made = model(architecture, SHAPES[architecture]).train()
    TASK.verify_packing(made, tiny.tokenizer())
    TASK.verify_packing(made.bfloat16(), tiny.tokenizer())
    assert made.training


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", REFUSED)
def test_models_that_let_rows_see_one_another_are_refused_by_name(architecture: str) -> None:
    name, sizes = REFUSED[architecture]
    settings = FromScratch(architecture=architecture, sizes=sizes, tokenizer="unused")
    made = initialise(settings, "AutoModelForCausalLM", tiny.tokenizer(), seed=3)
    TASK.verify(made)
    with pytest.raises(ConfigError, match=f"batch.pack: {name} does not keep packed rows apart"):
        TASK.verify_packing(made, tiny.tokenizer())


def packed_config(folder: Path, output: Path, **changes: Any) -> finetune.Config:
    """Return a run whose every step takes all rows, so that packed and unpacked steps hold the same."""
    settings: dict[str, Any] = {
        "batch": Batch(per_step=48),
        "budget": Budget(steps=3),
        "optim": Optim(lr=1e-2, schedule="constant", eps=1e-5, max_grad_norm="off"),
    }
    return tiny.config("sft", folder / "model", folder / "rows.jsonl", output, **(settings | changes))


def measure(folder: str, output: str, pack: int | None, per_step: int, micro: int, seed: int = 0) -> dict[str, Any]:
    """Train three steps over all rows; return each one's loss and every parameter's gradient."""
    batch = Batch(per_step=per_step, micro=micro, pack=pack or "off")
    run = finetune.prepare(packed_config(Path(folder), Path(output), batch=batch, seed=seed))
    gradients: list[dict[str, list[float]]] = []

    def keep(*_: Any) -> None:
        named = {name.removeprefix("module."): weight.grad for name, weight in run.step.named_parameters()}
        whole = {name: getattr(gradient, "full_tensor", lambda g=gradient: g)() for name, gradient in named.items()}
        gradients.append({name: gradient.flatten().tolist() for name, gradient in whole.items()})

    run.optimizer.register_step_pre_hook(keep)
    losses = [step.loss.item() for step in train_steps(run)]
    packing = run.record.packing
    return {
        "losses": losses,
        "gradients": gradients,
        "ranks": run.world.ranks,
        "rows": len(run.train),
        "samples": len(run.packs),
        "packing": None if packing is None else packing.model_dump(),
    }


@pytest.fixture(scope="module", params=["llama", "qwen3", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp(request.param)
    model(request.param, SHAPES[request.param]).save_pretrained(place / "model")
    tiny.tokenizer().save_pretrained(place / "model")
    tiny.save_rows(place / "rows.jsonl", "sft", 60)
    return place


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["losses"] == pytest.approx(expected["losses"], rel=TOLERANCE)
    assert len(found["gradients"]) == len(expected["gradients"]) == 3
    # The steps after the first begin from weights that have come apart by rounding.
    for name, gradient in expected["gradients"][0].items():
        assert distance(torch.tensor(found["gradients"][0][name]), torch.tensor(gradient)) <= TOLERANCE, name


def test_a_packed_run_takes_the_steps_of_an_unpacked_one(folder: Path, tmp_path: Path) -> None:
    whole = measure(str(folder), str(tmp_path / "rows"), None, 48, 48)
    packed = measure(str(folder), str(tmp_path / "packed"), 128, 1, 1)
    assert whole["rows"] == packed["rows"] == 48
    packed = measure(str(folder), str(tmp_path / "again"), 128, packed["samples"], 3)
    assert 10 < packed["samples"] < 30
    same(packed, whole)
    assert packed["packing"]["rows"] == 48
    assert packed["packing"]["samples"] == packed["samples"]
    assert 0.85 < packed["packing"]["utilisation"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_a_packed_run_on_two_processes_takes_the_steps_of_an_unpacked_one(
    folder: Path, tmp_path: Path, mode: Mode
) -> None:
    whole = measure(str(folder), str(tmp_path / "rows"), None, 48, 48)
    samples = measure(str(folder), str(tmp_path / "packed"), 128, 1, 1)["samples"]
    arguments = {"folder": str(folder), "pack": 128, "per_step": samples, "micro": 3}
    results = run_ranks(f"{__file__}:measure", arguments | {"output": str(tmp_path / "two")}, ranks=2, mode=mode)
    assert [result["ranks"] for result in results] == [2, 2]
    for result in results:
        same(result, whole)
