"""Packed runs, from the configuration to the record: what is said and refused, resuming, the figure on real rows."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from datasets import Dataset

import finetune
import model_cards
import pretrain
from trainworks import Batch, Budget, CausalLM, Data, Every, FromScratch, Optim, Run, train_steps
from trainworks.checkpoint import save
from trainworks.command import _opening
from trainworks.data.loading import lengths
from trainworks.data.packing import pack
from trainworks.errors import ConfigError, DataError
from trainworks.record import read_record
from trainworks.tasks import SFT, TASKS


def prepared(folder: Path, output: str = "run", **changes: Any) -> Run:
    """Return a packed run on conversations; the model and the rows are made once."""
    if not (folder / "model").exists():
        tiny.save_model(folder / "model", "sft", dropout=0.1)
        tiny.save_rows(folder / "rows.jsonl", "sft", 80)
    settings = {"batch": Batch(per_step=4, micro=2, pack=200), "epochs": 2.4} | changes
    return finetune.prepare(tiny.config("sft", folder / "model", folder / "rows.jsonl", folder / output, **settings))


def weights(run: Run) -> str:
    state = {name: value.detach().numpy().tobytes() for name, value in run.model.state_dict().items()}
    return hashlib.sha256(b"".join(state[name] for name in sorted(state))).hexdigest()


def test_the_record_the_opening_and_the_card_say_how_rows_were_packed(tmp_path: Path) -> None:
    run = prepared(tmp_path, every=Every(log=1, evaluate=2))
    assert sum(step.loss.item() > 0 for step in train_steps(run)) == run.plan.num_steps
    assert run.progress.samples == run.plan.total == round(2.4 * len(run.packs))
    run.save_record()
    packing = read_record(run.folder).packing
    assert packing is not None
    assert (packing.size, packing.rows, packing.samples) == (200, 64, len(run.packs))
    sizes = lengths(run.train)
    assert sizes is not None
    assert packing.utilisation == pytest.approx(sizes.sum() / (200 * len(run.packs)))
    said = f"64 rows into {len(run.packs)} samples of 200 tokens, {100 * packing.utilisation:.1f}% full"
    assert f"\npacked   {said}\n" in _opening(run)
    assert said in model_cards.build(run.record).body


def test_an_unpacked_run_says_nothing_of_it(tmp_path: Path) -> None:
    run = prepared(tmp_path, batch=Batch(per_step=4))
    assert run.record.packing is None
    assert "\npacked " not in _opening(run)


def test_a_budget_of_tokens_counts_packed_samples(tmp_path: Path) -> None:
    run = prepared(tmp_path, budget=Budget(tokens=10_000))
    seen = sum(window.tokens for window in run.windows())
    assert 0.9 < seen / 10_000 < 1.1


def test_a_packed_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = prepared(tmp_path, "whole")
    expected = [(step.loss.item(), step.grad_norm.item()) for step in train_steps(whole)]
    assert len(expected) > 6
    first = prepared(tmp_path, "parts")
    first.save_record()
    begun = []
    for step in train_steps(first):
        begun.append((step.loss.item(), step.grad_norm.item()))
        if step.number == 3:
            break
    save(first)
    second = prepared(tmp_path, "parts")
    assert (second.progress.step, second.progress.samples) == (3, 12)
    assert begun + [(step.loss.item(), step.grad_norm.item()) for step in train_steps(second)] == expected
    assert weights(second) == weights(whole)


def test_packing_may_not_change_when_a_run_goes_on(tmp_path: Path) -> None:
    prepared(tmp_path).save_record()
    with pytest.raises(ConfigError, match=r"batch\.pack"):
        prepared(tmp_path, batch=Batch(per_step=4, micro=2, pack=201))


def test_a_row_longer_than_a_sample_is_refused_before_the_model_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared(tmp_path)
    monkeypatch.setattr("finetune.recipe.load", None)
    with pytest.raises(DataError, match=r"rows\.jsonl \(train\): prepared row \d+: \d+ tokens, more than the 20 of"):
        prepared(tmp_path, "other", batch=Batch(per_step=4, pack=20))


def test_a_task_that_does_not_pack_says_so_before_anything_loads(tmp_path: Path) -> None:
    refusing = [name for name, task in TASKS.items() if not task.can_pack]
    assert "sequence-classification" in refusing
    for name in refusing:
        config = tiny.config(
            name, tmp_path / "none", tmp_path / "none.jsonl", tmp_path / name, batch=Batch(per_step=4, pack=64)
        )
        with pytest.raises(ConfigError, match=rf"batch\.pack: task {name} "):
            finetune.prepare(config)


def text_run(folder: Path, architecture: str, sizes: dict[str, Any]) -> Run:
    tiny.tokenizer().save_pretrained(folder / "tokenizer")
    rows = [json.dumps({"text": row["text"]}) for row in tiny.rows("causal-lm", 40)]
    (folder / "text.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return pretrain.prepare(
        pretrain.Config(
            output=str(folder / "run"),
            task=CausalLM(block=23),
            model=FromScratch(architecture=architecture, sizes=sizes, tokenizer=str(folder / "tokenizer")),
            data=Data(source=str(folder / "text.jsonl")),
            batch=Batch(per_step=4, pack=64),
            budget=Budget(epochs=1.0),
            optim=Optim(lr=1e-3),
        )
    )


@pytest.mark.filterwarnings("ignore")
def test_a_recurrent_model_is_refused_by_name_before_training(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
    with pytest.raises(ConfigError, match=r"batch\.pack: MambaForCausalLM does not keep packed rows apart"):
        text_run(tmp_path, "mamba", sizes)


def test_blocks_of_text_can_be_packed_too(tmp_path: Path) -> None:
    run = text_run(tmp_path, "llama", tiny.SIZES)
    assert run.record.packing is not None
    assert run.record.packing.utilisation > 0.7  # two blocks of 23 in 64
    assert all(step.loss.item() > 0 for step in train_steps(run))


@pytest.mark.data
def test_dolly_fills_samples_of_2048_tokens_to_99_percent(shared_data: Path) -> None:
    from transformers import AutoTokenizer

    processor = AutoTokenizer.from_pretrained(shared_data / "smollm2_tokenizer")
    rows = Dataset.from_list(json.loads((shared_data / "sft_dolly3k" / "dolly_3k.json").read_text(encoding="utf-8")))
    task = SFT(max_length=2049, too_long="truncate", nothing_to_learn="drop").resolve(rows)
    sizes = lengths(task.prepare(rows, task.equip(processor)).samples)
    assert sizes is not None
    packs = pack(sizes, 2048)
    assert len(sizes) == 2994
    assert sizes.sum() / (2048 * len(packs)) >= 0.99
