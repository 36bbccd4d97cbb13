"""The same runs over every layout of processes: what test_layouts.py compares, and docs/parallelism.md is made of.

python tests/layouts.py > table.md        # every layout, every model
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny
from distributed import Mode

import finetune
from trainworks import Batch, Budget, Every, Optim, export, schema, train_steps
from trainworks.models import initialise
from trainworks.schema import FromScratch

STEPS = 20
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_key_value_heads": 2}),
    "tied": ("qwen3", {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True}),
    "experts": (
        "qwen3_moe",
        {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
}


@dataclass(frozen=True)
class Spread:
    """A layout, as a hardware file and a run file ask for it."""

    ranks: int
    mode: Mode = "ddp"
    sizes: dict[str, int] = field(default_factory=dict)
    layout: dict[str, Any] = field(default_factory=dict)


ONE = Spread(1)
SPREADS: dict[str, Spread] = {
    "DDP 2": Spread(2),
    "FSDP2 2": Spread(2, "fsdp2"),
    "FSDP2 4": Spread(4, "fsdp2"),
    "hybrid 2x2": Spread(4, "fsdp2", {"dp_replicate": 2, "dp_shard": 2}),
    "TP 2": Spread(2, "ddp", {"tp": 2}),
    "TP x FSDP2 2x2": Spread(4, "fsdp2", {"dp_shard": 2, "tp": 2}),
}


def prepare(place: Path) -> None:
    """Write every model and the rows."""
    tiny.save_rows(place / "rows.jsonl", "sft", 120)
    for name, (architecture, extra) in MODELS.items():
        made = FromScratch(
            architecture=architecture, sizes=SIZES | {"max_position_embeddings": 256} | extra, tokenizer="-"
        )
        initialise(made, "AutoModelForCausalLM", tiny.tokenizer(), seed=1).save_pretrained(place / name)
        tiny.tokenizer().save_pretrained(place / name)


def config(place: Path, model: str, tuning: str, output: str, **changes: Any) -> finetune.Config:
    settings: dict[str, Any] = {
        "batch": Batch(per_step=8, micro=2, pack=64),
        "budget": Budget(steps=STEPS),
        "optim": Optim(lr=3e-3, schedule="linear", warmup=2, eps=1e-5),
        "every": Every(log=1, save="end"),
    }
    return tiny.config(
        "sft", place / model, place / "rows.jsonl", place / "runs" / output, tuning=tuning, **(settings | changes)
    )


def train(folder: str, cases: list[list[str]], name: str, layout: dict[str, Any], steps: int = STEPS) -> dict[str, Any]:
    """Train each (model, tuning) and return its curve; the weights are exported to the run's folder."""
    place, curves = Path(folder), {}
    for model, tuning in cases:
        changes = {"layout": schema.Layout(**layout), "budget": Budget(steps=steps)}
        run = finetune.prepare(config(place, model, tuning, f"{name}-{model}-{tuning}", **changes))
        curve = [(step.loss.item(), step.grad_norm.item()) for step in train_steps(run)]
        export(run)
        curves[f"{model}-{tuning}"] = {
            "processes": run.world.processes,
            "layout": str(run.world.layout),
            "curve": curve,
        }
    return curves
