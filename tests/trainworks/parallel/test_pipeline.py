"""A model cut into the stages of a pipeline is the whole model: proved on one process, then trained on several."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from distributed import run_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from trainworks.optim import build_optimizer, gradient_norm, take_step
from trainworks.parallel.pipeline import Pipeline, total_norm
from trainworks.parallel.stages import SCHEDULES, check_can_cut, cut, plan_stages
from trainworks.schema import LoRA, Optim
from trainworks.tasks import CausalLM
from trainworks.tuning import tune

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 8},
    "mistral": {"sliding_window": 4},
    "gemma2": {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "granite": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
}
TASK = CausalLM(block=32)
OPTIM = Optim(lr=1e-3, schedule="constant", eps=1e-5, max_grad_norm=0.5)
MICRO_BATCHES = (4, 3, 5, 1, 2, 4)
"""In each optimizer step, on a rank."""


def build(kind: str, tuning: str = "full", **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**(SIZES | KINDS.get(kind, {}) | changes))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    if tuning == "lora":
        tune(LoRA(rank=4, dropout=0.0), model, auto_class="AutoModelForCausalLM")
        for name, weight in model.named_parameters():  # an adapter's second matrix begins as zeros
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.02)
    return model


def batch(rng: random.Random, *, packed: bool) -> dict[str, Tensor]:
    """Return rows of any length, of which any tokens are learned; three to a line, or each on its own."""
    rows = []
    for place in range(6 if packed else 2):
        size = rng.randint(4, 12 if packed else 24)
        ids = np.array([rng.randrange(96) for _ in range(size)])
        trained = np.array([rng.random() < 0.6 for _ in range(size - 1)] + [True])
        rows.append({"input_ids": ids, "trained": trained, "pack": place // 3 if packed else place})
    own = TASK.collate(rows, SimpleNamespace(pad_token_id=0), train=True)
    return own | {"weight": torch.ones(len(rows)), "source": torch.zeros(len(rows), dtype=torch.int64)}


def steps(*, packed: bool, ranks: int = 1) -> list[list[dict[str, Tensor]]]:
    """Return the micro-batches of each step, of all ranks that have samples of their own."""
    rng = random.Random(1)
    return [[batch(rng, packed=packed) for _ in range(number * ranks)] for number in MICRO_BATCHES]


def whole_count(batches: list[dict[str, Tensor]]) -> Tensor:
    return torch.stack([(TASK.count(each)["loss"] * each["weight"]).sum() for each in batches]).sum()


def alone(
    kind: str, tuning: str, *, packed: bool, ranks: int
) -> tuple[list[tuple[float, float]], list[float], dict[str, Tensor]]:
    """Train on one process; return each step's loss and gradient norm, some evaluated losses, and the weights."""
    model = build(kind, tuning)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = build_optimizer(OPTIM, model)
    curve = []
    for batches in steps(packed=packed, ranks=ranks):
        count = whole_count(batches)
        loss = torch.stack([(TASK.loss(model, each)["loss"] * each["weight"]).sum() for each in batches]).sum() / count
        loss.backward()
        norm = gradient_norm(trained)
        curve.append((loss.item(), norm.item()))
        take_step(optimizer, OPTIM, lr=OPTIM.lr, norm=norm, spoiled=torch.zeros(()))
    with torch.no_grad():
        evaluated = [TASK.loss(model, each)["loss"].sum().item() for each in steps(packed=packed, ranks=ranks)[0]]
    return curve, evaluated, {name: weight.detach().clone() for name, weight in model.named_parameters()}


def train(cases: list[dict[str, Any]], folder: str, shards: int = 1) -> list[dict[str, Any]]:
    """Train each case in a pipeline, over ranks that share samples; write this rank's weights to `folder`."""
    from accelerate import Accelerator
    from torch.distributed import init_device_mesh

    accelerator = Accelerator()
    pipelines = accelerator.num_processes // shards
    assert accelerator.num_processes == pipelines * shards == torch.distributed.get_world_size() > 1
    mesh = init_device_mesh("cpu", (pipelines, shards), mesh_dim_names=("pipeline", "shard"))
    return [_train(case, number, Path(folder), mesh) for number, case in enumerate(cases)]


def _train(case: dict[str, Any], number: int, folder: Path, mesh: Any) -> dict[str, Any]:
    group, shard = mesh.get_group("pipeline"), mesh["shard"]
    rank, ranks = mesh.get_local_rank("pipeline"), mesh.size(0)
    model = build(case["kind"], case["tuning"])
    plan = plan_stages(model, SCHEDULES[case["schedule"]], ranks)
    check_can_cut(model, plan)
    cut(model, plan, rank)
    pipeline = Pipeline(model, TASK, plan, group, device=torch.device("cpu"), averaged=shard.size())
    if shard.size() > 1:
        for stage in pipeline.stages:
            stage.shard(shard)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    counted = [weight for weight in trained if weight is not pipeline.repeated]
    optimizer = build_optimizer(OPTIM, model)
    curve = []
    work = [
        batches[shard.get_local_rank() :: shard.size()] for batches in steps(packed=case["packed"], ranks=shard.size())
    ]
    for batches in work:
        count = whole_count(batches)
        torch.distributed.all_reduce(count, group=shard.get_group())
        done = pipeline.backward(batches, {"loss": count})
        assert len(done) == len(batches)
        loss = torch.stack([sums["loss"].sum() for sums in done]).sum()
        torch.distributed.all_reduce(loss, group=shard.get_group())
        norm = total_norm(gradient_norm(counted), group)
        curve.append(((loss / count).item(), norm.item()))
        take_step(optimizer, OPTIM, lr=OPTIM.lr, norm=norm, spoiled=torch.zeros(()))
    evaluated = [
        sums["loss"].sum().item() for sums in pipeline.losses(steps(packed=case["packed"], ranks=shard.size())[0])
    ]
    own = {name: weight for name, weight in model.named_parameters() if weight is not pipeline.repeated}
    held = {name: weight.full_tensor() if shard.size() > 1 else weight for name, weight in own.items()}
    if shard.get_local_rank() == 0:
        save_file({name: weight.detach().contiguous() for name, weight in held.items()}, folder / f"{number}-{rank}")
    return {"ranks": ranks, "curve": curve, "evaluated": evaluated}


def compare(cases: list[dict[str, Any]], folder: Path, *, ranks: int, shards: int = 1) -> None:
    """Train the cases on several processes and on one, and compare everything."""
    arguments = {"cases": cases, "folder": str(folder), "shards": shards}
    reports = run_ranks(f"{__file__}:train", arguments, ranks=ranks, timeout=240)
    for number, case in enumerate(cases):
        curve, evaluated, weights = alone(case["kind"], case["tuning"], packed=case["packed"], ranks=shards)
        parts = [load_file(folder / f"{number}-{rank}") for rank in range(ranks // shards)]
        assert sorted(name for part in parts for name in part) == sorted(weights), "each weight is one rank's"
        for report in (each[number] for each in reports):
            assert report["ranks"] == ranks // shards
            assert len(report["curve"]) == len(MICRO_BATCHES)
            np.testing.assert_allclose(report["curve"], curve, rtol=1e-5, err_msg=str(case))
            np.testing.assert_allclose(report["evaluated"], evaluated, rtol=1e-4, err_msg=str(case))
        for name, weight in (item for part in parts for item in part.items()):
            assert (weight - weights[name]).abs().max() < 1e-4, f"{case}: {name}"


def case(kind: str, schedule: str, *, tuning: str = "full", packed: bool = False) -> dict[str, Any]:
    return {"kind": kind, "schedule": schedule, "tuning": tuning, "packed": packed}


@pytest.mark.slow
def test_two_stages_and_more_train_as_one_process_does(tmp_path: Path) -> None:
    cases = [
        case("llama", "gpipe"),
        case("llama", "1f1b", packed=True),
        case("llama", "1f1b", tuning="lora"),
        case("llama", "interleaved", tuning="lora", packed=True),
        case("llama", "zero-bubble"),
        case("llama", "zero-bubble-v", tuning="lora"),
        case("qwen3", "gpipe", packed=True),
        case("qwen3", "1f1b"),
        case("qwen3", "1f1b", tuning="lora"),
        case("qwen3", "interleaved"),
        case("qwen3", "zero-bubble", packed=True),
        case("qwen3", "zero-bubble-v"),
        case("qwen3_moe", "1f1b"),
    ]
    assert {each["schedule"] for each in cases} == set(SCHEDULES)
    compare(cases, tmp_path, ranks=2)


@pytest.mark.slow
def test_a_pipeline_of_sharded_stages_trains_as_one_process_does(tmp_path: Path) -> None:
    cases = [
        case("llama", "gpipe", packed=True),
        case("llama", "1f1b"),
        case("qwen3", "1f1b", tuning="lora"),
        case("qwen3", "1f1b"),
        case("qwen3", "interleaved"),
        case("llama", "zero-bubble"),
    ]
    compare(cases, tmp_path, ranks=4, shards=2)
