"""Masked language modelling: the model's own loss at drawn places, the same places in every evaluation."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from torch.nn.functional import cross_entropy

import finetune
import pretrain
from trainworks import FromScratch, MaskedLM, NewTokenizer, export
from trainworks.data.cache import table
from trainworks.errors import ConfigError, DataError

ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
    "electra": {"embedding_size": 16},
    "modernbert": {},
    "roberta": {"pad_token_id": 0},
}


def model(architecture: str) -> transformers.PreTrainedModel:
    """Return a tiny encoder whose weights, biases too, are large enough that a wrong head would show."""
    sizes = {} if architecture == "distilbert" else tiny.SIZES
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "pad_token_id"), 0)
    settings = {"vocab_size": 330} | ids | sizes | ENCODERS[architecture]
    config = transformers.CONFIG_MAPPING[architecture](**settings)
    torch.manual_seed(0)
    made = transformers.AutoModelForMaskedLM.from_config(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3)
    return made.eval()


def rows(task: MaskedLM, number: int = 12) -> list[dict[str, Any]]:
    tokenizer = tiny.tokenizer_for("masked-lm")
    texts = table({"text": [row["text"] for row in tiny.rows("masked-lm", number)]})
    samples = task.prepare(texts, tokenizer).samples.with_format("numpy")
    return [row | {"seed": number, "index": number, "weight": 1.0} for number, row in enumerate(samples)]


@pytest.mark.parametrize("architecture", sorted(ENCODERS))
def test_the_loss_is_the_models_own_over_the_masked_tokens(architecture: str) -> None:
    task, made, tokenizer = MaskedLM(block=32, across=False), model(architecture), tiny.tokenizer_for("masked-lm")
    task.verify(made)
    batch = task.collate(rows(task), tokenizer, train=True)
    assert "attention_mask" in batch
    with torch.no_grad():
        logits = made(**task.inputs(batch)).logits.flatten(0, 1)[batch["places"]]
        theirs = cross_entropy(logits, batch["labels"])
        ours = task.loss(made, batch)["loss"].sum() / task.count(batch)["loss"].sum()
        own = {"index": torch.arange(len(batch["learned"])), "weight": torch.ones(len(batch["learned"]))}
        said = task.predict(made, batch | own, tokenizer)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    right = sum(prediction.prediction for prediction in said.values())
    assert right == (logits.argmax(-1) == batch["labels"]).sum()


def test_no_logits_of_other_tokens_are_made() -> None:
    task, made = MaskedLM(block=32), model("bert")
    batch = task.collate(rows(task), tiny.tokenizer_for("masked-lm"), train=True)
    sizes: list[int] = []
    made.get_output_embeddings().register_forward_hook(lambda layer, given, logits: sizes.append(logits.numel()))
    task.loss(made, batch)["loss"].sum().backward()
    assert sizes == [0]


def test_training_masks_follow_the_seed_and_evaluation_masks_the_text() -> None:
    task, tokenizer = MaskedLM(block=32, whole_words=True), tiny.tokenizer_for("masked-lm")
    made = rows(task)

    def masked(train: bool, shift: int) -> list[list[int]]:
        seeded = [row | {"seed": row["seed"] + shift, "index": row["index"] + shift} for row in made]
        return [task.collate([row], tokenizer, train=train)["input_ids"][0].tolist() for row in seeded]

    assert masked(True, 0) == masked(True, 0)
    assert masked(True, 0) != masked(True, 1)
    assert masked(False, 0) == masked(False, 1)


def test_a_filler_is_computed_and_not_learned() -> None:
    task, tokenizer = MaskedLM(block=32, across=False), tiny.tokenizer_for("masked-lm")
    row = rows(task)[0] | {"weight": 0.0}
    batch = task.collate([row], tokenizer, train=True)
    assert len(batch["places"]) > 0
    assert batch["learned"].tolist() == [0]
    made = model("bert")
    task.loss(made, batch)["loss"].sum().backward()
    assert all(parameter.grad is not None for parameter in made.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("across", [True, False])
def test_every_token_stands_in_one_block(across: bool) -> None:
    task, tokenizer = MaskedLM(block=16, across=across), tiny.tokenizer_for("masked-lm")
    texts = [row["text"] for row in tiny.rows("masked-lm", 30)]
    parts = task.prepare(table({"text": texts}), tokenizer).samples
    arranged = task.arrange(parts)
    samples = parts if arranged is None else [row for part in arranged for row in part.to_pylist()]
    found = [token for row in samples for token in row["input_ids"] if token != tokenizer.eos_token_id]
    assert found == [token for text in texts for token in tokenizer(text)["input_ids"]]
    assert max(len(row["input_ids"]) for row in samples) == 16
    assert all(len(row["input_ids"]) == len(row["trained"]) for row in samples)


def test_a_text_for_itself_without_a_token_is_refused_by_its_row() -> None:
    task = MaskedLM(block=16, across=False)
    with pytest.raises(DataError, match=r"row 5.*no tokens"):
        task.prepare(table({"text": ["a cat", ""]}), tiny.tokenizer_for("masked-lm"), first=4)


def test_what_cannot_be_masked_or_has_no_positions_is_refused() -> None:
    tokenizer = deepcopy(tiny.tokenizer_for("masked-lm"))
    with pytest.raises(ConfigError, match=r"task\.block: 600, but the model has positions for 512"):
        MaskedLM(block=600).verify(model("bert"))
    tokenizer.model_max_length = 128
    with pytest.raises(ConfigError, match=r"its model takes 128 tokens at most"):
        MaskedLM(block=600).equip(tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no token that ends a text"):
        MaskedLM(block=16).equip(tokenizer)
    tokenizer.backend_tokenizer.pre_tokenizer = None
    tokenizer.eos_token = "<|endoftext|>"
    with pytest.raises(ConfigError, match="takes a whole text for one word"):
        MaskedLM(block=16, whole_words=True).equip(tokenizer)


def test_a_model_from_scratch_fills_masks_once_it_is_exported(tmp_path: Path) -> None:
    likeness = tiny.config("masked-lm", tmp_path, tiny.save_rows(tmp_path / "rows.jsonl", "masked-lm", 60), tmp_path)
    new = FromScratch(architecture="modernbert", sizes=tiny.SIZES, tokenizer=NewTokenizer(vocab_size=300))
    settings = {name: getattr(likeness, name) for name in ("task", "data", "batch", "budget", "optim", "every")}
    record = pretrain.fit(run := pretrain.prepare(pretrain.Config(output=str(tmp_path / "run"), model=new, **settings)))
    final = record.final
    assert final is not None
    assert {"loss", "pseudo_perplexity", "masked_accuracy"} == set(final.metrics)
    assert final.metrics["pseudo_perplexity"].value == pytest.approx(np.exp(final.metrics["loss"].value))
    assert final.metrics["loss"].value < record.curve[0].loss - 0.3
    assert "<|mask|>" in final.samples[0].prompt
    fill = transformers.pipeline("fill-mask", model=str(export(run)))
    assert len(fill("the old cat <|mask|> the dog")) == 5


def test_a_pretrained_tokenizer_is_not_given_a_token_that_its_model_has_no_room_for(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "model", "masked-lm")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    grown = tiny.tokenizer_for("masked-lm")
    model_of = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "model")
    model_of.resize_token_embeddings(len(grown) - 1)
    model_of.save_pretrained(tmp_path / "model")
    rows_file = tiny.save_rows(tmp_path / "rows.jsonl", "masked-lm", 60)
    with pytest.raises(ConfigError, match=r"the tokenizer has \d+ tokens, the model \d+ embeddings"):
        finetune.prepare(tiny.config("masked-lm", tmp_path / "model", rows_file, tmp_path / "run"))
