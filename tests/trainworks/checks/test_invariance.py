"""`trainworks selfcheck`: equal losses are called equal, and a task whose loss depends on the batch is caught."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import finetune
from trainworks import Batch, Budget, LoRA
from trainworks.checks.invariance import BOUNDS, variants
from trainworks.checks.measuring import Difference, Measured, compare, drops_out, measure, switch_off_dropout, unpack
from trainworks.cli import app
from trainworks.config import dump
from trainworks.models import initialise
from trainworks.schema import FromScratch
from trainworks.tasks import SFT, TASKS, SequenceClassification
from trainworks.tasks.language import LanguageTask

FLOAT32 = BOUNDS["float32"]
THREE = Batch(per_step=8, micro=3)
DROPPING: dict[str, dict[str, Any]] = {
    "llama": tiny.SIZES | {"attention_dropout": 0.1},
    "bert": tiny.SIZES | {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "modernbert": tiny.SIZES | {"attention_dropout": 0.1, "mlp_dropout": 0.1, "embedding_dropout": 0.1},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
    },
}
"""Models that keep their rates in unlike places."""


def lay_out(folder: Path, task: str, **options: Any) -> Path:
    tiny.save_model(folder / "model", task, **options)
    tiny.save_rows(tiny.rows_file(folder, task), task, 60)
    return folder


def measured(folder: Path, task: str, output: str, *, apart: bool = False, **changes: Any) -> Measured:
    config = tiny.config(task, folder / "model", tiny.rows_file(folder, task), folder / output)
    run = finetune.prepare(config.model_copy(update={"budget": Budget(steps=3)} | changes))
    if apart:
        unpack(run)
    return measure(run)


# Comparing


def some(**changes: Any) -> Measured:
    facts: dict[str, Any] = {
        "losses": (2.0, 1.0),
        "norms": (1.0, 1.0),
        "changes": {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])},
        "precision": "float32",
    }
    return Measured(**(facts | changes))


def test_differences_are_shares_of_what_was_expected() -> None:
    assert compare(some(), some()) == Difference(0.0, 0.0, 0.0)
    other = some(
        losses=(2.0, 1.5), norms=(1.25, 1.0), changes={"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([4.0])}
    )
    assert compare(some(), other) == Difference(0.5, 0.25, 0.2)


def test_what_is_not_a_number_or_not_there_is_within_no_bound() -> None:
    for broken in (some(losses=(2.0, float("nan"))), some(norms=(float("nan"), 1.0)), some(changes={})):
        assert not compare(some(), broken).within(Difference(1e9, 1e9, 1e9))


def test_a_measurement_is_read_as_it_was_written(tmp_path: Path) -> None:
    some(losses=(0.1 + 0.2, 1e-30)).write(tmp_path / "file.safetensors")
    found = Measured.read(tmp_path / "file.safetensors")
    assert (found.losses, found.norms, found.precision) == ((0.1 + 0.2, 1e-30), (1.0, 1.0), "float32")
    assert torch.equal(found.changes["a"], torch.tensor([3.0, 0.0]))


def test_every_way_to_compute_a_step_is_another_one() -> None:
    def names(ranks: int = 1, **batch: Any) -> list[str]:
        return [variant.name for variant in variants(Batch(**batch), ranks)]

    assert names(per_step=32) == ["1 at once", "15 at once", "32 at once"]
    assert names(per_step=32, micro=1, ranks=4) == ["15 at once", "32 at once", "4 processes"]
    assert names(per_step=1, micro=1) == []
    assert names(per_step=2, micro=1, pack=64) == ["2 at once", "not packed"]


# Dropout


@pytest.mark.parametrize("architecture", DROPPING)
def test_dropout_is_found_and_switched_off_wherever_a_model_keeps_it(architecture: str) -> None:
    made = FromScratch(architecture=architecture, sizes=DROPPING[architecture], tokenizer="unused")
    auto_class = "AutoModelForMaskedLM" if "bert" in architecture else "AutoModelForCausalLM"
    model = initialise(made, auto_class, tiny.tokenizer(), seed=1).train()
    ids = torch.arange(8)[None]
    assert drops_out(model)
    assert not torch.equal(model(ids).logits, model(ids).logits)
    switch_off_dropout(model)
    assert not drops_out(model)
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_a_model_without_dropout_is_known() -> None:
    made = FromScratch(architecture="llama", sizes=tiny.SIZES, tokenizer="unused")
    assert not drops_out(initialise(made, "AutoModelForCausalLM", tiny.tokenizer(), seed=1))


# Measuring


@pytest.mark.parametrize("task", sorted(TASKS))
def test_a_task_is_the_same_in_every_cut_though_its_model_has_dropout(task: str, tmp_path: Path) -> None:
    lay_out(tmp_path, task, dropout=0.1)
    tuning = LoRA(rank=4, dropout=0.2)
    whole = measured(tmp_path, task, "whole", tuning=tuning)
    assert len(whole.losses) == len(whole.norms) == 3
    assert sum(float(change.norm()) for change in whole.changes.values()) > 0
    assert compare(whole, measured(tmp_path, task, "three", tuning=tuning, batch=THREE)).within(FLOAT32)


def test_packed_rows_are_measured_one_by_one_over_the_same_rows(tmp_path: Path) -> None:
    lay_out(tmp_path, "sft")
    batch = Batch(per_step=5, micro=2, pack=128)
    packed = measured(tmp_path, "sft", "packed", batch=batch)
    rows = measured(tmp_path, "sft", "rows", batch=batch, apart=True)
    assert compare(packed, rows).within(FLOAT32)
    others = measured(tmp_path, "sft", "others", batch=Batch(per_step=5, micro=2))
    assert not compare(packed, others).within(FLOAT32)


# Planted mistakes


def mean_over_rows(self: LanguageTask, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give each row the mean over the micro-batch, as a loss does that divides by its own tokens."""
    sums = right_loss(self, model, batch)["loss"]  # type: ignore[arg-type]
    learned = batch["learned"]
    return {"loss": sums / learned.sum() * len(learned)}


def pads_are_learned(self: SequenceClassification, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return right_classes(self, model, {name: value for name, value in batch.items() if name != "attention_mask"})  # type: ignore[arg-type]


right_loss, right_classes = LanguageTask.loss, SequenceClassification.loss


def test_a_loss_that_is_a_mean_of_its_micro_batch_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_out(tmp_path, "sft")
    monkeypatch.setattr(LanguageTask, "loss", mean_over_rows)
    whole = measured(tmp_path, "sft", "whole")
    apart = compare(whole, measured(tmp_path, "sft", "three", batch=THREE))
    assert not apart.within(FLOAT32)
    assert apart.loss > 1e-3


def test_padding_that_is_seen_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_out(tmp_path, "sequence-classification")
    monkeypatch.setattr(SequenceClassification, "loss", pads_are_learned)
    whole = measured(tmp_path, "sequence-classification", "whole")
    assert not compare(
        whole, measured(tmp_path, "sequence-classification", "one", batch=Batch(per_step=8, micro=1))
    ).within(FLOAT32)


def test_packed_rows_that_see_one_another_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_out(tmp_path, "sft")
    right = SFT.inputs

    def without_positions(self: SFT, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value for name, value in right(self, batch).items() if name != "position_ids"}

    monkeypatch.setattr(SFT, "verify_packing", lambda *_: None)
    monkeypatch.setattr(SFT, "inputs", without_positions)
    monkeypatch.setattr("trainworks.speed.packed_attention.rows_apart", lambda *_: nullcontext({}))
    batch = Batch(per_step=5, micro=2, pack=128)
    packed = measured(tmp_path, "sft", "packed", batch=batch)
    assert not compare(packed, measured(tmp_path, "sft", "rows", batch=batch, apart=True)).within(FLOAT32)


# The command


def write_run_file(folder: Path, task: str, **changes: Any) -> str:
    config = tiny.config(task, folder / "model", tiny.rows_file(folder, task), folder / "run", **changes)
    (folder / "run.yaml").write_text(dump(config), encoding="utf-8")
    return str(folder / "run.yaml")


@pytest.mark.slow
def test_the_command_shows_every_way_and_that_they_are_equal(tmp_path: Path) -> None:
    lay_out(tmp_path, "sft", dropout=0.1)
    file = write_run_file(tmp_path, "sft", batch=Batch(per_step=5, micro=2, pack=128))
    result = CliRunner().invoke(app, ["selfcheck", file, "--ranks", "2", "--steps", "2"])
    assert result.exit_code == 0, result.stderr
    lines = [re.split(r"  +", line) for line in result.stdout.splitlines()]
    assert [line[0] for line in lines[1:-2]] == ["1 at once", "5 at once", "not packed", "2 processes"]
    assert all(line[-1] == "equal" for line in lines[1:-2])
    assert result.stdout.splitlines()[-1] == "equal: 2 steps in 5 ways, but for rounding"
    assert result.stderr.count(" s\n") == 5
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_command_fails_where_a_way_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_out(tmp_path, "sft")
    monkeypatch.setattr("trainworks.checks.invariance.BOUNDS", {"float32": Difference(0.0, 0.0, 0.0)})
    result = CliRunner().invoke(app, ["selfcheck", write_run_file(tmp_path, "sft"), "--steps", "2"])
    assert result.exit_code == 3
    assert "1 at once" in result.stdout
    assert "NOT EQUAL" in result.stdout
    assert "error: the loss depends on how it is computed: 1 at once" in result.stderr


@pytest.mark.slow
def test_a_run_that_cannot_begin_is_told_in_its_own_words(tmp_path: Path) -> None:
    lay_out(tmp_path, "sft")
    file = write_run_file(tmp_path, "sft")
    (tmp_path / "rows.jsonl").unlink()
    result = CliRunner().invoke(app, ["selfcheck", file])
    assert result.exit_code == 2
    assert "rows.jsonl" in result.stderr
