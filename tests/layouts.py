"""The same runs over every layout of processes: what test_layouts.py compares, and docs/parallelism.md is made of.

python tests/layouts.py > table.md        # every layout, every model
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny
from distributed import Mode, run_ranks
from safetensors.torch import load_file

import finetune
from trainworks import Every, Optim, export, train_steps
from trainworks.checkpoint import save
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
    "CP 2": Spread(2, "ddp", {"cp": 2}),
    "CP x FSDP2 2x2": Spread(4, "fsdp2", {"dp_shard": 2, "cp": 2}),
    "TP x CP 2x2": Spread(4, "ddp", {"tp": 2, "cp": 2}),
    "TP 2": Spread(2, "ddp", {"tp": 2}),
    "TP 2, EP 2": Spread(2, "ddp", {"tp": 2}, {"expert": 2}),
    "EP x FSDP2 2x2": Spread(4, "fsdp2", {"dp_shard": 2, "tp": 2}, {"expert": 2}),
    "TP x FSDP2 2x2": Spread(4, "fsdp2", {"dp_shard": 2, "tp": 2}),
    "PP 2, GPipe": Spread(2, layout={"pipeline": 2, "schedule": "gpipe"}),
    "PP 2, 1F1B": Spread(2, layout={"pipeline": 2}),
    "PP 2, interleaved": Spread(2, layout={"pipeline": 2, "schedule": "interleaved"}),
    "PP 2, zero-bubble": Spread(2, layout={"pipeline": 2, "schedule": "zero-bubble"}),
    "PP x FSDP2 2x2": Spread(4, "fsdp2", layout={"pipeline": 2}),
    "PP x TP 2x2": Spread(4, sizes={"tp": 2}, layout={"pipeline": 2}),
}
QUICK = ("FSDP2 2", "CP 2", "TP 2, EP 2", "CP x FSDP2 2x2", "TP x FSDP2 2x2", "PP 2, 1F1B", "PP x FSDP2 2x2")
"""What CI takes."""
REFUSED: dict[tuple[str, str], str] = {
    (name, model): "has no experts" for name in ("TP 2, EP 2", "EP x FSDP2 2x2") for model in ("llama", "tied")
}
"""Why a layout does not take a model."""


def prepare(place: Path) -> None:
    """Write every model and the rows."""
    tiny.save_rows(place / "rows.jsonl", "sft", 120)
    for name, (architecture, extra) in MODELS.items():
        made = FromScratch(
            architecture=architecture, sizes=SIZES | {"max_position_embeddings": 256} | extra, tokenizer="-"
        )
        initialise(made, "AutoModelForCausalLM", tiny.tokenizer(), seed=1).save_pretrained(place / name)
        tiny.tokenizer().save_pretrained(place / name)


def config(
    place: Path, model: str, tuning: str, output: str, *, balance: float = 0.0, **changes: Any
) -> finetune.Config:
    settings: dict[str, Any] = {
        "batch": {"per_step": 8, "micro": 2, "pack": 64},
        "optim": Optim(lr=3e-3, schedule="linear", warmup=2, eps=1e-5),
        "every": Every(log=1, save="end"),
    }
    made = tiny.config(
        "sft", place / model, place / "rows.jsonl", place / "runs" / output, tuning=tuning, **(settings | changes)
    )
    return made.model_copy(update={"task": made.task.model_copy(update={"expert_balance": balance})})


def train(
    folder: str,
    cases: list[list[str]],
    name: str,
    layout: dict[str, Any],
    steps: int = STEPS,
    save_at: int = 0,
    **changes: Any,
) -> dict[str, Any]:
    """Train each (model, tuning) from where its folder `runs/NAME-MODEL-TUNING` stands, and export it; return the
    curves. What the run's folder holds at step `save_at` stays in `saved`."""
    place, done = Path(folder), {}
    for model, tuning in cases:
        key = f"{model}-{tuning}"
        made = config(place, model, tuning, f"{name}-{key}", layout=layout, budget={"steps": steps}, **changes)
        run = finetune.prepare(made)
        run.save_record()
        curve = []
        for step in train_steps(run):
            curve.append([step.loss.item(), step.grad_norm.item()])
            if step.number == save_at:
                save(run)
                if run.world.is_main:
                    shutil.copytree(run.folder, place / "saved" / f"{name}-{key}")
                run.world.wait()
        export(run)
        done[key] = {"processes": run.world.processes, "layout": str(run.world.layout), "curve": curve}
    return done


def train_over(place: Path, name: str, spread: Spread, cases: list[tuple[str, str]], **options: Any) -> dict[str, Any]:
    """Train the cases in a layout, and return what the ranks agree on."""
    arguments = {"folder": str(place), "cases": cases, "name": name, "layout": spread.layout} | options
    target = f"{__file__}:train"
    results = run_ranks(target, arguments, ranks=spread.ranks, mode=spread.mode, sizes=spread.sizes, timeout=600)
    assert all(result == results[0] for result in results)
    assert {each["processes"] for each in results[0].values()} == {spread.ranks}
    found: dict[str, Any] = results[0]
    return found


def train_all(folder: str, names: list[str], case: list[str], layout: dict[str, Any], steps: int) -> dict[str, Any]:
    """Go on with runs of these names one after the other; return their curves by name."""
    return {name: train(folder, [case], name, layout, steps, accept=("output",)) for name in names}


def resume_over(place: Path, names: list[str], spread: Spread, case: tuple[str, str], *, steps: int) -> dict[str, Any]:
    """Go on in a layout with runs that others saved, and return what the ranks agree on, by name."""
    arguments = {"folder": str(place), "names": names, "case": case, "layout": spread.layout, "steps": steps}
    target = f"{__file__}:train_all"
    results = run_ranks(target, arguments, ranks=spread.ranks, mode=spread.mode, sizes=spread.sizes, timeout=600)
    assert all(result == results[0] for result in results)
    found: dict[str, Any] = results[0]
    return found


@dataclass(frozen=True)
class Apart:
    """How far a run is from the one on one process: losses and norms relative, weights absolute."""

    loss: float
    norm: float
    weights: float

    @property
    def is_close(self) -> bool:
        """Whether it is the same training, to rounding."""
        return self.loss <= 1e-5 and self.norm <= 1e-5 and self.weights <= 1e-4


def apart(place: Path, found: dict[str, Any], expected: dict[str, Any], names: tuple[str, str], key: str) -> Apart:
    """Compare a run with the one on one process: the steps that both took, and what they exported."""
    steps = len(found[key]["curve"])
    pairs = list(zip(found[key]["curve"], expected[key]["curve"][-steps:], strict=True))
    loss, norm = (max(abs(one[i] - other[i]) / abs(other[i]) for one, other in pairs) for i in (0, 1))
    here, there = (weights(place / "runs" / f"{name}-{key}" / "model") for name in names)
    assert here.keys() == there.keys()
    return Apart(loss, norm, max((here[name] - there[name]).abs().max().item() for name in there))


def weights(folder: Path) -> dict[str, Any]:
    """Return exported weights by name."""
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def table(place: Path) -> Iterator[str]:
    """Yield docs/parallelism.md's table, line by line, as layouts are done."""
    cases = [(model, tuning) for model in MODELS for tuning in ("full", "lora")]
    prepare(place)
    expected = train_over(place, "one", ONE, cases)
    yield "| layout | " + " | ".join(f"{model}, {tuning}" for model, tuning in cases) + " |"
    yield "|---" * (len(cases) + 1) + "|"
    for name, spread in SPREADS.items():
        found = train_over(place, name, spread, [case for case in cases if (name, case[0]) not in REFUSED])
        cells = [_cell(place, name, case, found, expected) for case in cases]
        yield f"| {name} | " + " | ".join(cells) + " |"


def _cell(place: Path, name: str, case: tuple[str, str], found: dict[str, Any], expected: dict[str, Any]) -> str:
    if why := REFUSED.get((name, case[0])):
        return why
    far = apart(place, found, expected, (name, "one"), "-".join(case))
    return f"{'' if far.is_close else 'NOT: '}{far.loss:.0e}, {far.norm:.0e}, {far.weights:.0e}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for line in table(Path(folder)):
            print(line, flush=True)
