"""Several adapters of one base are added to it, each times its weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from trainworks.cli import app
from trainworks.errors import ConfigError
from trainworks.exporting import merge_adapters


def adapter(folder: Path, name: str, rank: int, **options: Any) -> dict[str, torch.Tensor]:
    """Write an adapter of random numbers, and return by layer what it adds to the base."""
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    settings: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]} | options
    model = get_peft_model(base, LoraConfig(r=rank, init_lora_weights=False, **settings))
    added = {
        layer.removeprefix("base_model.model."): part.get_delta_weight("default").detach().clone()
        for layer, part in model.named_modules()
        if layer.endswith(("q_proj", "down_proj"))
    }
    model.save_pretrained(folder / name)
    (folder / name / "README.md").unlink()
    tiny.tokenizer().save_pretrained(folder / name)
    return added


def test_the_sum_is_exact_for_other_ranks_and_scales(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "model", "sft")
    first = adapter(tmp_path, "first", 4, use_rslora=True)
    second = adapter(tmp_path, "second", 8, lora_alpha=3)
    given = [str(tmp_path / "merged"), f"{tmp_path / 'first'}=0.7", f"{tmp_path / 'second'}=-0.2"]
    result = CliRunner().invoke(app, ["merge", *given])
    assert result.exit_code == 0, result.output
    base = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "model").named_parameters())
    for name, weight in AutoModelForCausalLM.from_pretrained(tmp_path / "merged").named_parameters():
        layer = name.removesuffix(".weight")
        expected = base[name] + 0.7 * first[layer] - 0.2 * second[layer] if layer in first else base[name]
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


def test_what_does_not_add_up_is_refused(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "model", "sft")
    adapter(tmp_path, "plain", 4)
    adapter(tmp_path, "whole", 4, modules_to_save=["lm_head"])
    (tmp_path / "empty").mkdir()
    refused = {"whole": "of its own cannot be added", "empty": "holds no adapter_config.json"}
    for name, said in refused.items():
        with pytest.raises(ConfigError, match=said):
            merge_adapters({tmp_path / "plain": 1.0, tmp_path / name: 1.0}, tmp_path / "merged")
    with pytest.raises(ConfigError, match="is there already"):
        merge_adapters({tmp_path / "plain": 1.0}, tmp_path / "empty")
    assert not (tmp_path / "merged").exists()
