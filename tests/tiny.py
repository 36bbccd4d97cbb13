"""Tiny models and rows that the tests train on: built from configurations and in memory, in a second."""

from __future__ import annotations

import json
import random
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml
from pictures import COLOURS, encode, instances, picture, scene
from pyarrow import parquet

import finetune
from trainworks import Batch, Budget, Data, Every, FromScratch, Full, LoRA, Mixture, NewTokenizer, Optim, Pretrained
from trainworks.image_models import new_image_processor
from trainworks.models import initialise
from trainworks.schema import NewImageProcessor
from trainworks.tasks import TASKS
from trainworks.tokenizer_training import new_tokenizer

WORDS = "the a red green small old cat dog bird sees likes not very fast slow runs sings under over tree".split()  # noqa: SIM905


def sentence(rng: random.Random, longest: int = 12) -> str:
    """Return a few words; sentences differ much in length."""
    return " ".join(rng.choices(WORDS, k=rng.randint(2, longest)))


def pair(rng: random.Random) -> dict[str, Any]:
    """Return a prompt with two answers."""
    return {"prompt": sentence(rng, 6), "chosen": sentence(rng, 16), "rejected": f"{sentence(rng, 16)} not"}


def tagged(rng: random.Random) -> dict[str, Any]:
    """Return words and their tags: a colour and the animal behind it are an entity."""
    words = sentence(rng, 24).split()
    tags = ["O"] * len(words)
    for place, word in enumerate(words):
        if word in ("red", "green"):
            tags[place] = "B-colour"
        elif word in ("cat", "dog"):
            tags[place] = "I-colour" if place and tags[place - 1] == "B-colour" else "B-animal"
    return {"tokens": words, "ner_tags": tags}


def question(rng: random.Random) -> dict[str, Any]:
    """Return a question for the word after another one; some have no answer, some texts take several parts."""
    words = ["the", *sentence(rng, 40).split()]
    place = rng.randrange(len(words) - 1)
    start = len(" ".join(words[: place + 1])) + 1
    is_answered = rng.random() < 0.8
    return {
        "context": " ".join(words),
        "question": f"what follows {words[place] if is_answered else 'nothing'}",
        "answers": {"text": [words[place + 1]] * is_answered, "answer_start": [start] * is_answered},
    }


def rows(task: str, number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return ragged rows for a task."""
    rng = random.Random(seed)
    make = {
        "causal-lm": lambda: {"text": sentence(rng, 40)},
        "masked-lm": lambda: {"text": sentence(rng, 40)},
        "seq2seq": lambda: {"source": sentence(rng, 16), "target": sentence(rng, 6)},
        "sft": lambda: {"prompt": sentence(rng, 6), "completion": sentence(rng, 16)},
        "token-classification": lambda: tagged(rng),
        "question-answering": lambda: question(rng),
        "sequence-classification": lambda: {"text": sentence(rng, 16), "label": rng.choice(["bad", "good", "so-so"])},
        "sequence-regression": lambda: {"text": sentence(rng, 16), "score": rng.uniform(-1, 1)},
        "preference": lambda: pair(rng),
        "reward": lambda: pair(rng),
        "image-classification": lambda: coloured(rng),
        "masked-image": lambda: {"image": coloured(rng)["image"]},
        "object-detection": lambda: boxed(rng),
        "semantic-segmentation": lambda: masked(rng),
    }[task]
    return [make() for _ in range(number)]


def coloured(rng: random.Random) -> dict[str, Any]:
    """Return an image and its class."""
    colour = rng.choice(list(COLOURS))
    return {"image": picture(colour, rng.getrandbits(32), (rng.randint(20, 30), 24)), "label": colour}


def boxed(rng: random.Random) -> dict[str, Any]:
    """Return an image with coloured boxes on it, and those."""
    image, boxes, colours = scene(rng.getrandbits(32))
    return {"image": encode(image), "objects": {"bbox": boxes, "category": colours}}


def masked(rng: random.Random) -> dict[str, Any]:
    """Return an image with coloured boxes on it, and their mask."""
    image, mask = instances(rng.getrandbits(32))
    return {"image": image, "mask": mask}


OPTIONS: dict[str, dict[str, Any]] = {
    "causal-lm": {"block": 23},
    "masked-lm": {"block": 23, "across": False, "whole_words": True},
    "seq2seq": {"purpose": "summarization", "prefix": "say: ", "max_source": 64, "max_target": 32},
    "sft": {"max_length": 128},
    "sequence-classification": {"max_length": 64},
    "sequence-regression": {"max_length": 64},
    "token-classification": {"max_length": 128},
    "question-answering": {"max_length": 32, "stride": 6},
    "preference": {"max_length": 128},
    "reward": {"max_length": 128},
    "image-classification": {"augment": {"crop": 0.5, "flip": True, "colour": 0.2, "mixup": 0.4, "cutmix": 0.4}},
    "masked-image": {"augment": {"crop": 0.5, "flip": True}},
    "object-detection": {"augment": {"crop": 0.5, "flip": True}},
    "semantic-segmentation": {"augment": {"crop": 0.5, "flip": True}},
}
"""Each task's options on these rows; a new task is tested once it has a line here."""


@cache
def tokenizer() -> Any:
    """Return a small byte-level tokenizer with a chat template."""
    return new_tokenizer(NewTokenizer(vocab_size=320), [" ".join(WORDS)] * 8)


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def segformer(dropout: float) -> dict[str, Any]:
    """Return the sizes of a tiny model that tells the class of each pixel."""
    lists = {"depths": [1, 1], "hidden_sizes": [8, 16], "num_attention_heads": [1, 2], "sr_ratios": [2, 1]}
    shapes = {"patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 16}
    drops = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout_prob")
    return {"num_encoder_blocks": 2, "drop_path_rate": 0.0, **lists, **shapes, **dict.fromkeys(drops, dropout)}


DECODER = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}


def save_model(folder: Path, task: str, *, dropout: float = 0.0, tied: bool = False) -> Path:
    """Write a tiny model for the task, with its tokenizer, and return the folder."""
    bert = {"max_position_embeddings": 128, "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    llama = {"max_position_embeddings": 256, "attention_dropout": dropout, "tie_word_embeddings": tied}
    vit = {"patch_size": 8, "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    t5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": dropout}
    sizes: dict[str, tuple[str, dict[str, Any]]] = dict.fromkeys(ENCODERS, ("bert", SIZES | bert))
    sizes |= {
        "seq2seq": ("t5", t5),
        "image-classification": ("vit", SIZES | vit),
        "masked-image": ("vit_mae", SIZES | vit | DECODER),
        "object-detection": ("yolos", SIZES | vit | {"num_detection_tokens": 6}),
        "semantic-segmentation": ("segformer", segformer(dropout)),
    }
    architecture, own_sizes = sizes.get(task, ("llama", SIZES | llama))
    made = FromScratch(architecture=architecture, sizes=own_sizes, **{TASKS[task].reads: "unused"})
    own = processor(task)
    auto_class = "AutoModel" if task == "reward" else ENCODERS.get(task, TASKS[task].auto_class)
    model = initialise(made, auto_class, own, seed=1)  # the run's own class head is drawn anew
    if task == "seq2seq":
        model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = own.pad_token_id
    model.save_pretrained(folder)
    own.save_pretrained(folder)
    return folder


ENCODERS = {
    "sequence-classification": "AutoModel",
    "sequence-regression": "AutoModel",
    "token-classification": "AutoModel",
    "question-answering": "AutoModel",
    "masked-lm": "AutoModelForMaskedLM",
}
"""Tasks that are tried on an encoder, and what the tiny one is saved as."""


def processor(task: str) -> Any:
    """Return what turns a task's rows to tensors: the small tokenizer, or an image processor."""
    reads = TASKS[task].reads
    return tokenizer_for(task) if reads == "tokenizer" else new_image_processor(NewImageProcessor(size=24))


def tokenizer_for(task: str) -> Any:
    """Return the small tokenizer with what the task's needs besides."""
    return TASKS[task](**OPTIONS[task]).equip(deepcopy(tokenizer())) if task == "masked-lm" else tokenizer()


def rows_file(folder: Path, task: str) -> Path:
    """Return where a task's rows stand in a folder: images are no JSON."""
    return folder / ("rows.jsonl" if TASKS[task].reads == "tokenizer" else "rows.parquet")


def save_rows(path: Path, task: str, number: int) -> Path:
    """Write a task's rows, as JSON lines or Parquet by the file's ending, and return the file."""
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows(task, number)), path)
        return path
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(task, number)), encoding="utf-8")
    return path


def config(
    task: str,
    model: Path,
    data: Path | Data | Mixture,
    output: Path,
    *,
    tuning: str = "full",
    micro: int = 8,
    epochs: float = 1.3,
    options: dict[str, Any] | None = None,
    **changes: Any,
) -> finetune.Config:
    """Return a fine-tuning run of a tiny model: 8 samples a step, the last step short; `options` are the task's."""
    settings: dict[str, Any] = {
        "output": str(output),
        "task": TASKS[task](**(OPTIONS[task] | (options or {}))),
        "model": Pretrained(str(model)),
        "tuning": {"full": Full(), "lora": LoRA(rank=4, dropout=0.0)}[tuning],
        "data": data if isinstance(data, Data | Mixture) else Data(source=str(data), holdout=0.2),
        "batch": Batch(per_step=8, micro=micro),
        "budget": Budget(epochs=epochs),
        # Adam magnifies rounding where a gradient is nearly nothing (a key's bias); a larger eps keeps it out.
        "optim": Optim(lr=3e-3, schedule="linear", warmup=2, eps=1e-5),
        "every": Every(log=1),
    }
    return finetune.Config(**(settings | changes))


def save_run(folder: Path, **changes: Any) -> Path:
    """Write a model with dropout, rows, and a run file over them into a folder, and return the file."""
    save_model(folder / "model", "sft", dropout=0.1)
    save_rows(folder / "rows.jsonl", "sft", 60)
    run = {
        "output": "run",
        "task": {"type": "sft", "max_length": 128},
        "model": {"name": str(folder / "model")},
        "data": {"source": str(folder / "rows.jsonl"), "holdout": 0.2},
        "batch": {"per_step": 4, "micro": 2},
        "optim": {"lr": 1e-3},
        "every": {"log": 1},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run | changes), encoding="utf-8")
    return folder / "run.yaml"
