"""What is taken for granted of a model is proved before it is trained."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import transformers

from trainworks.errors import ConfigError
from trainworks.models import load
from trainworks.schema import Pretrained
from trainworks.tasks import CausalLM, ImageClassification

SIZES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 8, "num_key_value_heads": 2},
    "gemma2": {"head_dim": 8, "num_key_value_heads": 2, "final_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "gpt_neox": {},
    "mistral": {"num_key_value_heads": 2},
    "phi3": {"num_key_value_heads": 2, "pad_token_id": 0},
    "olmo2": {},
    "qwen3_moe": {
        "head_dim": 8,
        "num_key_value_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
}


def model(architecture: str) -> transformers.PreTrainedModel:
    """Return a tiny model whose weights are large enough that a wrong scale would show."""
    kind = transformers.CONFIG_MAPPING[architecture]
    own = {} if architecture == "gpt2" else tiny.SIZES
    config = kind(**({"vocab_size": 97} | own | SIZES[architecture]))
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3)
    return made


@pytest.mark.parametrize("architecture", sorted(SIZES))
def test_backbone_and_head_make_the_models_own_loss(architecture: str) -> None:
    made = model(architecture).eval()
    task = CausalLM(block=16)
    task.verify(made)
    ids = torch.randint(97, (3, 17), generator=torch.Generator().manual_seed(1))
    batch = task.collate([{"input_ids": row.numpy()} for row in ids], tiny.tokenizer(), train=True)
    with torch.no_grad():
        ours = task.loss(made, batch)["loss"].sum() / (3 * 16)
        theirs = torch.nn.functional.cross_entropy(made(ids[:, :-1]).logits.flatten(0, 1).float(), ids[:, 1:].flatten())
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


def test_a_model_that_sees_what_comes_is_refused() -> None:
    config = transformers.BertConfig(**tiny.SIZES, vocab_size=97, max_position_embeddings=64)
    with pytest.raises(ConfigError, match="lets a token see the ones after it"):
        CausalLM(block=16).verify(transformers.BertLMHeadModel(config))


def test_a_head_of_an_unknown_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = model("gemma2")
    monkeypatch.setattr("trainworks.heads._SCALES", {})
    with pytest.raises(ConfigError, match="makes its logits in a way"):
        CausalLM(block=16).verify(made)


def test_a_tokenizer_written_in_python_is_refused_with_what_is_needed() -> None:
    slow = SimpleNamespace(is_fast=False, name_or_path="someone/slow")
    with pytest.raises(ConfigError, match=r"someone/slow is written in Python; one with a tokenizer\.json is needed"):
        CausalLM(block=16).equip(slow)


def test_a_masked_autoencoder_lends_its_encoder_to_a_classifier(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "model", "masked-image")
    autoencoder = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "model")
    assert autoencoder.decoder.decoder_pos_embed.abs().max() > 0.5, "positions are drawn, not left at zero"
    task = ImageClassification(labels=("a", "b", "c"))
    model = load(
        Pretrained(str(tmp_path / "model")), task.auto_class, task.head(), tiny.processor("masked-image"), seed=0
    )
    assert type(model).__name__ == "ViTForImageClassification"
    theirs, ours = autoencoder.vit.state_dict(), model.state_dict()
    shared = {name for name in theirs if f"vit.{name}" in ours}
    assert len(shared) == len(theirs) == len([name for name in ours if name.startswith("vit.")])
    assert all(torch.equal(theirs[name], ours[f"vit.{name}"]) for name in shared)
