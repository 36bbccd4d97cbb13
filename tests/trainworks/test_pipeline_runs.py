"""A run through a pipeline is the run of one process: its curve, evaluations, checkpoints and exported weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from distributed import run_ranks
from safetensors.torch import load_file

import finetune
from trainworks import Batch, Budget, Every, FromScratch, export, fit, train_steps
from trainworks.checkpoint import save
from trainworks.errors import ConfigError
from trainworks.models import initialise
from trainworks.schema import Layout

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
MODELS: dict[str, tuple[str, bool]] = {"plain": ("llama", False), "tied": ("qwen3", True)}
STEPS = 8
STOP = 3


def config(place: Path, model: str, tuning: str, **changes: Any) -> finetune.Config:
    settings: dict[str, Any] = {
        "batch": Batch(per_step=8, micro=2),
        "budget": Budget(steps=STEPS),
        "every": Every(log=1, evaluate=4, save="end"),
    }
    output = place / f"{model}-{tuning}"
    return tiny.config("sft", place / model, place / "rows.jsonl", output, tuning=tuning, **(settings | changes))


def save_models(place: Path) -> None:
    tiny.save_rows(place / "rows.jsonl", "sft", 60)
    for name, (architecture, tied) in MODELS.items():
        sizes = SIZES | {"tie_word_embeddings": tied}
        made = FromScratch(architecture=architecture, sizes=sizes, tokenizer="-")
        initialise(made, "AutoModelForCausalLM", tiny.tokenizer(), seed=1).save_pretrained(place / name)
        tiny.tokenizer().save_pretrained(place / name)


def part(folder: str, cases: list[list[str]], layout: dict[str, Any], stop: bool, to: str) -> list[dict[str, Any]]:
    """Go on with each run: to some step, or to its end and an export; return what it came to so far."""
    reports = []
    for model, tuning in cases:
        run = finetune.prepare(config(Path(folder), model, tuning, layout=Layout(**layout)))
        begun, curve = run.progress.step, []
        if stop:
            run.save_record()
            for step in train_steps(run):
                curve.append([step.loss.item(), step.grad_norm.item()])
                if step.number == STOP:
                    save(run)
                    break
        else:
            fit(run)
            export(run, Path(to) / f"{model}-{tuning}")
            curve = [[point.loss, point.grad_norm] for point in run.record.curve]
        measured = {report.name: report.metrics["loss"].value for report in run.record.reports}
        layout_told, notes = str(run.world.layout), list(run.record.notes)
        reports.append({"begun": begun, "curve": curve, "measured": measured, "layout": layout_told, "notes": notes})
    return reports


@pytest.mark.slow
def test_a_run_through_a_pipeline_is_stopped_and_goes_on_there_or_elsewhere_as_if_alone(tmp_path: Path) -> None:
    cases = [["tied", "full"], ["plain", "lora"]]
    layout = {"pipeline": 2, "schedule": "interleaved"}

    def go(to: str, *, ranks: int, layout: dict[str, Any], stop: bool = False) -> list[list[dict[str, Any]]]:
        arguments = {"folder": str(tmp_path), "cases": cases, "layout": layout, "stop": stop, "to": str(tmp_path / to)}
        return run_ranks(f"{__file__}:part", arguments, ranks=ranks, timeout=300)

    def put_away(to: str) -> None:
        (tmp_path / to).mkdir()
        for name in ("tied-full", "plain-lora"):
            shutil.move(tmp_path / name, tmp_path / to / name)

    save_models(tmp_path)
    (alone,) = go("alone", ranks=1, layout={})
    put_away("runs-alone")
    stopped = go("", ranks=2, layout=layout, stop=True)
    shutil.copytree(tmp_path / "tied-full", tmp_path / "kept" / "tied-full")
    shutil.copytree(tmp_path / "plain-lora", tmp_path / "kept" / "plain-lora")
    together = go("together", ranks=2, layout=layout)
    put_away("runs-together")
    shutil.copytree(tmp_path / "kept", tmp_path, dirs_exist_ok=True)
    (moved,) = go("moved", ranks=1, layout={})

    for number, (model, tuning) in enumerate(cases):
        expected = alone[number]
        assert len(expected["curve"]) == STEPS
        assert expected["measured"].keys() >= {"untuned", "step 4", "final"}
        for rank in stopped:
            assert rank[number]["layout"] == "pipeline 2"
            assert [note for note in rank[number]["notes"] if "does not generate" in note]
            np.testing.assert_allclose(rank[number]["curve"], expected["curve"][:STOP], rtol=1e-5)
        for report in (*(rank[number] for rank in together), moved[number]):
            assert report["begun"] == STOP
            np.testing.assert_allclose(report["curve"], expected["curve"][STOP:], rtol=1e-5)
            assert report["measured"]["final"] == pytest.approx(expected["measured"]["final"], rel=1e-5)
        weights = {name: exported(tmp_path / name / f"{model}-{tuning}") for name in ("alone", "together", "moved")}
        for other in (weights["together"], weights["moved"]):
            assert other.keys() == weights["alone"].keys()
            assert all((other[name] - weight).abs().max() < 1e-4 for name, weight in weights["alone"].items())


def exported(folder: Path) -> dict[str, Any]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def test_what_a_pipeline_cannot_do_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    layout = Layout(pipeline=2, schedule="zero-bubble")
    refused = {
        r"speed\.compile: layout\.schedule: zero-bubble": {"speed": {"compile": "on"}},
        "metrics: exact_match looks at predictions": {"metrics": ("exact_match",)},
    }
    for message, changes in refused.items():
        with pytest.raises(ConfigError, match=message):
            finetune.prepare(config(tmp_path, "nowhere", "full", layout=layout, **changes))
    settings = tiny.config(
        "sequence-classification", tmp_path, tmp_path / "rows.jsonl", tmp_path / "run", layout=layout
    )
    with pytest.raises(ConfigError, match="task sequence-classification: its models do not end in a vocabulary head"):
        finetune.prepare(settings)
