"""Text to text: the model's own loss, its own shift, texts that are measured by what is generated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from torch.nn.functional import cross_entropy

import finetune
from trainworks import Seq2Seq, export
from trainworks.data.cache import table
from trainworks.errors import DataError
from trainworks.metrics import CorpusScore

BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 128,
    "forced_eos_token_id": None,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
MODELS: dict[str, dict[str, Any]] = {
    "bart": BART,
    "marian": BART,
    "mbart": BART,
    "m2m_100": BART,
    "mt5": T5,
    "t5": T5,
}
TASK = Seq2Seq(purpose="translation", max_source=32, max_target=32)


def model(architecture: str) -> transformers.PreTrainedModel:
    """Return a tiny model whose weights, and what is added to its logits, are large enough to show."""
    ids = {"pad_token_id": 0, "eos_token_id": 0, "bos_token_id": 0}
    config = transformers.CONFIG_MAPPING[architecture](vocab_size=320, **ids, **MODELS[architecture])
    config.decoder_start_token_id = 0
    torch.manual_seed(0)
    made = transformers.AutoModelForSeq2SeqLM.from_config(config)
    with torch.no_grad():
        for value in (*made.parameters(), *(own for own in made.buffers(recurse=False))):
            value.normal_(std=0.3)
    return made.eval()


def rows(task: Seq2Seq, number: int = 8) -> list[dict[str, Any]]:
    texts = tiny.rows("seq2seq", number)
    columns = {name: [row[name] for row in texts] for name in texts[0]}
    return list(task.prepare(table(columns), tiny.tokenizer()).samples.with_format("numpy"))


@pytest.mark.parametrize("architecture", sorted(MODELS))
def test_the_loss_is_the_models_own(architecture: str) -> None:
    made = model(architecture)
    TASK.verify(made)
    batch = TASK.collate(rows(TASK), tiny.tokenizer(), train=True)
    inputs = TASK.inputs(batch)
    with torch.no_grad():
        logits = made(**inputs, labels=batch["labels"]).logits.flatten(0, 1)
        theirs = cross_entropy(logits, batch["labels"].flatten(), ignore_index=-100)
        ours = TASK.loss(made, batch)["loss"].sum() / TASK.count(batch)["loss"].sum()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


def test_no_logits_are_made_besides_the_chunks_and_padding_is_left_out() -> None:
    made = model("t5")
    batch = TASK.collate(rows(TASK), tiny.tokenizer(), train=True)
    sizes: list[int] = []
    made.get_output_embeddings().register_forward_hook(lambda layer, given, logits: sizes.append(logits.numel()))
    TASK.loss(made, batch)["loss"].sum().backward()
    assert sizes == [0]
    assert len(batch["places"]) == batch["learned"].sum() < batch["labels"].numel()


def test_a_target_ends_with_the_end_token_and_a_source_begins_with_the_prefix() -> None:
    task, tokenizer = TASK.model_copy(update={"prefix": "say: "}), tiny.tokenizer()
    (row,) = task.prepare(table({"source": ["a cat"], "target": ["a dog"]}), tokenizer).samples
    assert tokenizer.decode(row["input_ids"]) == "say: a cat"
    assert row["labels"] == [*tokenizer("a dog")["input_ids"], tokenizer.eos_token_id]


def test_a_text_that_is_too_long_is_refused_cut_or_dropped_and_counted() -> None:
    texts = table({"source": ["a cat", "the dog " * 40], "target": ["a dog", "a bird " * 40]})
    with pytest.raises(DataError, match=r"row 8.*too long.*tokens, task\.max_\w+ is 32.*truncate or drop"):
        TASK.prepare(texts, tiny.tokenizer(), first=7)
    cut = TASK.model_copy(update={"too_long": "truncate"}).prepare(texts, tiny.tokenizer())
    assert [len(row["input_ids"]) for row in cut.samples][1] == 32
    assert [len(row["labels"]) for row in cut.samples][1] == 32
    assert cut.samples[1]["labels"][-1] == tiny.tokenizer().eos_token_id
    assert cut.dropped.keys() == {"source tokens cut", "target tokens cut"}
    dropped = TASK.model_copy(update={"too_long": "drop"}).prepare(texts, tiny.tokenizer())
    assert (len(dropped.samples), dropped.dropped) == (1, {"too long": 1})


def test_texts_are_measured_as_they_are_generated_and_the_export_writes_the_same(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "model", "seq2seq")
    rows_file = tiny.save_rows(tmp_path / "rows.jsonl", "seq2seq", 60)
    run = finetune.prepare(tiny.config("seq2seq", tmp_path / "model", rows_file, tmp_path / "run"))
    final = finetune.fit(run).final
    assert final is not None
    assert {"loss", "perplexity", "rouge1", "rouge2", "rougeL", "bleu", "chrf"} == set(final.metrics)
    assert run.record.pipeline_tag == "summarization"
    folder = export(run)
    loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    sample = final.samples[0]
    given = tokenizer(sample.prompt, return_tensors="pt")
    said = loaded.generate(**{name: given[name] for name in ("input_ids", "attention_mask")}, max_new_tokens=32)
    assert tokenizer.decode(said[0], skip_special_tokens=True).strip() == sample.output
    assert sample.prompt.startswith("say: ")


def test_without_scores_nothing_is_generated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = TASK.model_copy(update={"scores": ()})
    monkeypatch.setattr("trainworks.generation.generated", None)
    assert task.metrics() == {}
    assert task.predict(model("t5"), task.collate(rows(task), tiny.tokenizer(), train=False), tiny.tokenizer()) == {}
    assert TASK.metrics()["bleu"] == CorpusScore("bleu")
