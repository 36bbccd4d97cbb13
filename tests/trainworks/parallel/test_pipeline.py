"""A model cut into the stages of a pipeline is the whole model: proved on one process, then trained on several."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
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

from trainworks.optim import build_optimizer, take_step
from trainworks.parallel.norm import gradient_norm
from trainworks.parallel.pipeline import Pipeline
from trainworks.parallel.stages import SCHEDULES, check_can_cut, cut, plan_stages
from trainworks.schema import LoRA, Optim
from trainworks.tasks import CausalLM
from trainworks.tuning import tune

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 8},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
}
TASK = CausalLM(block=32)
OPTIM = Optim(lr=1e-3, schedule="constant", eps=1e-5, max_grad_norm=0.5)
MICRO_BATCHES = (4, 3, 5, 1, 2, 4)
"""In each optimizer step, on a rank."""


@dataclass(frozen=True)
class Case:
    """What is trained, and how it goes through the pipeline."""

    kind: str
    schedule: str
    tuning: str = "full"
    packed: bool = False
    layers: int = 4
    shards: int = 1
    """Ranks, each with samples of its own, that a stage is sharded over."""


def build(case: Case) -> PreTrainedModel:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[case.kind](**SIZES, **KINDS[case.kind], num_hidden_layers=case.layers)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    if case.tuning == "lora":
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


def steps(case: Case) -> list[list[dict[str, Tensor]]]:
    """Return the micro-batches of each step, of all ranks that have samples of their own."""
    rng = random.Random(1)
    return [[batch(rng, packed=case.packed) for _ in range(number * case.shards)] for number in MICRO_BATCHES]


def whole_count(batches: list[dict[str, Tensor]]) -> Tensor:
    return torch.stack([(TASK.count(each)["loss"] * each["weight"]).sum() for each in batches]).sum()


def alone(case: Case) -> tuple[list[tuple[float, float]], list[float], dict[str, Tensor]]:
    """Train on one process; return each step's loss and gradient norm, some evaluated losses, and the weights."""
    model = build(case)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = build_optimizer(OPTIM, model)
    curve = []
    for batches in steps(case):
        count = whole_count(batches)
        loss = torch.stack([(TASK.loss(model, each)["loss"] * each["weight"]).sum() for each in batches]).sum() / count
        loss.backward()
        norm = gradient_norm(trained)
        curve.append((loss.item(), norm.item()))
        take_step(optimizer, OPTIM, lr=OPTIM.lr, norm=norm, spoiled=torch.zeros(()))
    with torch.no_grad():
        evaluated = [TASK.loss(model, each)["loss"].sum().item() for each in steps(case)[0]]
    return curve, evaluated, {name: weight.detach().clone() for name, weight in model.named_parameters()}


def train(cases: list[dict[str, Any]], folder: str) -> list[dict[str, Any]]:
    """Train each case in a pipeline, and write this rank's weights to `folder`."""
    from accelerate import Accelerator

    assert Accelerator().num_processes == torch.distributed.get_world_size() > 1
    return [_train(Case(**case), Path(folder) / str(number)) for number, case in enumerate(cases)]


def _train(case: Case, folder: Path) -> dict[str, Any]:
    from torch.distributed import init_device_mesh

    sizes = (torch.distributed.get_world_size() // case.shards, case.shards)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("pipeline", "shard"))
    group, shard = mesh.get_group("pipeline"), mesh["shard"]
    model = build(case)
    plan = plan_stages(model, SCHEDULES[case.schedule], sizes[0])
    check_can_cut(model, plan, is_sharded=case.shards > 1)
    cut(model, plan, mesh.get_local_rank("pipeline"))
    pipeline = Pipeline(model, TASK, plan, group, device=torch.device("cpu"), averaged=case.shards)
    if case.shards > 1:
        for stage in pipeline.stages:
            stage.shard(mesh=shard)
    named = model.named_parameters()
    counted = [weight for name, weight in named if weight.requires_grad and name not in pipeline.repeated]
    optimizer = build_optimizer(OPTIM, model)
    curve = []
    for batches in steps(case):
        own = batches[shard.get_local_rank() :: case.shards]
        count = whole_count(batches)
        done = pipeline.backward(own, {"loss": count})
        assert [len(sums["loss"]) for sums in done] == [len(each["weight"]) for each in own]
        loss = torch.stack([sums["loss"].sum() for sums in done]).sum()
        torch.distributed.all_reduce(loss, group=shard.get_group())
        square = gradient_norm(counted).square()  # of what this rank alone holds
        torch.distributed.all_reduce(square)
        norm = square.sqrt()
        curve.append(((loss / count).item(), norm.item()))
        take_step(optimizer, OPTIM, lr=OPTIM.lr, norm=norm, spoiled=torch.zeros(()))
    evaluated = [sums["loss"].sum().item() for sums in pipeline.losses(steps(case)[0])]
    weights = {name: weight for name, weight in model.named_parameters() if name not in pipeline.repeated}
    whole = {name: weight.full_tensor() if case.shards > 1 else weight for name, weight in weights.items()}
    if shard.get_local_rank() == 0:
        folder.mkdir(exist_ok=True)
        file = folder / f"{mesh.get_local_rank('pipeline')}.safetensors"
        save_file({name: weight.detach().contiguous() for name, weight in whole.items()}, file)
    return {"stages": len(plan.layers), "curve": curve, "evaluated": evaluated}


def compare(cases: list[Case], folder: Path, *, ranks: int) -> None:
    """Train the cases on several processes and on one, and compare everything."""
    arguments = {"cases": [asdict(case) for case in cases], "folder": str(folder)}
    reports = run_ranks(f"{__file__}:train", arguments, ranks=ranks, timeout=400)
    for number, case in enumerate(cases):
        curve, evaluated, weights = alone(case)
        files = sorted((folder / str(number)).iterdir())
        parts = [load_file(file) for file in files]
        assert len(parts) == ranks // case.shards
        assert sorted(name for part in parts for name in part) == sorted(weights), "each weight is one rank's"
        for report in (each[number] for each in reports):
            assert report["stages"] == len(parts) * SCHEDULES[case.schedule].stages_per_rank
            assert len(report["curve"]) == len(MICRO_BATCHES)
            np.testing.assert_allclose(report["curve"], curve, rtol=1e-5, err_msg=str(case))
            np.testing.assert_allclose(report["evaluated"], evaluated, rtol=1e-4, err_msg=str(case))
        for name, weight in (item for part in parts for item in part.items()):
            assert (weight - weights[name]).abs().max() < 1e-4, f"{case}: {name}"


@pytest.mark.slow
def test_two_ranks_train_as_one_process_does(tmp_path: Path) -> None:
    cases = [
        Case("llama", "gpipe"),
        Case("llama", "1f1b", packed=True),
        Case("llama", "interleaved", tuning="lora", packed=True),
        Case("llama", "zero-bubble", tuning="lora"),
        Case("qwen3", "1f1b", tuning="lora"),
        Case("qwen3", "interleaved"),
        Case("qwen3", "zero-bubble", packed=True),
        Case("qwen3", "zero-bubble-v"),
        Case("qwen3_moe", "1f1b"),
    ]
    assert {each.schedule for each in cases} == set(SCHEDULES)
    compare(cases, tmp_path, ranks=2)


@pytest.mark.slow
def test_four_ranks_with_and_without_sharded_stages_train_as_one_process_does(tmp_path: Path) -> None:
    cases = [
        Case("llama", "gpipe", packed=True, shards=2),
        Case("qwen3", "1f1b", shards=2),
        Case("qwen3", "interleaved", tuning="lora", shards=2),
        Case("llama", "zero-bubble", shards=2),
        Case("qwen3", "1f1b"),
        Case("qwen3", "interleaved", layers=8),
        Case("llama", "zero-bubble-v", layers=8),
    ]
    compare(cases, tmp_path, ranks=4)
