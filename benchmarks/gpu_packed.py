"""Conversations of real lengths, packed, against rows of one length: training steps of this package on one GPU.

    TRAINWORKS_DATA=FOLDER python benchmarks/gpu_packed.py [--shape 1b] [--batch 4] [--length 4096] [--json FILE]

Dolly's instructions (`sft_dolly3k` in the folder) with SmolLM2's tokenizer and chat template, packed to lines of
`--length` tokens, against as many lines of random ids, all of that length; and the packed ones again with the dense
mask that transformers makes for them. Rates count the tokens of rows, not padding. The last line is the packed rate
over that of rows of one length. One process each, as in `gpu_train.py`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gpu_train import LR, SHAPES, WARMUP, Clock, make, rows

CONTENDERS = ("one length", "packed", "packed, dense mask")


def data(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Return the rows, the task and the batch settings."""
    from trainworks import SFT, Batch

    if args.only == "one length":
        return rows(args), SFT(format="tokens", max_length=args.length), Batch(per_step=args.batch, micro=args.batch)
    from datasets import Dataset

    folder = Path(os.environ["TRAINWORKS_DATA"]) / "sft_dolly3k"
    dolly = json.loads(next(folder.glob("*.json")).read_text(encoding="utf-8"))
    kept = [row for row in dolly if row["output"].strip()]
    names = ("instruction", "input", "output")
    table = Dataset.from_dict({name: [row[name] for row in kept] for name in names})
    batch = Batch(per_step=args.batch, micro=args.batch, pack=args.length)
    return table, SFT(max_length=args.length, too_long="drop"), batch


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Train one contender and return its seconds and tokens by step."""

    import finetune
    from trainworks import Budget, Data, Optim, Pretrained, train_steps
    from trainworks.speed import packed_attention

    if args.only == "packed, dense mask":
        packed_attention._serves = lambda *_: False
    source, task, batch = data(args)
    clock, tokens = Clock(), []
    with tempfile.TemporaryDirectory() as folder:
        config = finetune.Config(
            output=f"{folder}/run",
            task=task,
            model=Pretrained(str(args.model)),
            data=Data(source=source, holdout=0.0),
            batch=batch,
            budget=Budget(steps=args.steps),
            optim=Optim(lr=LR, schedule="constant", betas=(0.9, 0.999)),
        )
        run = finetune.prepare(config)
        for _ in train_steps(run):
            clock.tick()
            tokens.append(run.progress.tokens)
    steps = [after - before for before, after in itertools.pairwise(tokens)]
    return clock.result() | {"tokens": steps[WARMUP:]}


def alone(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one contender in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, __file__, *sys.argv[1:], "--only", name, "--model", str(args.model)]
        environment = os.environ | {"ACCELERATE_MIXED_PRECISION": "bf16", "TRAINWORKS_CACHE": f"{folder}/cache"}
        done = subprocess.run(
            [*command, "--out", str(out)], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr[-2000:]}")
        value: dict[str, Any] = json.loads(out.read_text())
        return value


def main() -> None:
    """Run every contender in turn, and print and write what they did."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        args.out.write_text(json.dumps(train(args)))
        return
    results, rates = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        args.model = Path(folder)
        make(args.model, args.shape, args.length)
        smollm = Path(os.environ["TRAINWORKS_DATA"]) / "smollm2_tokenizer"
        for file in smollm.glob("*token*"):
            (args.model / file.name).write_bytes(file.read_bytes())
        for name in CONTENDERS:
            results[name] = result = alone(name, args)
            rates[name] = sum(result["tokens"]) / sum(result["seconds"])
            seconds = result["seconds"]
            print(
                f"{name:<20} {rates[name]:9,.0f} tok/s  {1000 * statistics.median(seconds):7.1f} ms a step "
                f"(most {1000 * max(seconds):.0f})  {statistics.mean(result['tokens']):9,.0f} tokens a step  "
                f"{result['peak_bytes'] / 2**30:5.1f} GiB",
                flush=True,
            )
    if args.json:
        import torch

        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        settings = {key: getattr(args, key) for key in ("shape", "batch", "length", "steps")}
        args.json.write_text(json.dumps({"device": device, "settings": settings, "results": results}, indent=1) + "\n")
    print(f"{rates['packed'] / rates['one length']:.2f}x")


if __name__ == "__main__":
    main()
