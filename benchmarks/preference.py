"""DPO steps: TRL's DPOTrainer, and this package, in one process each; tokens a second and peak memory.

    python benchmarks/preference.py [--shape 1b] [--tuning full] [--batch 4] [--prompt 768] [--answer 256] [--json FILE]
    python benchmarks/preference.py --shape tiny --batch 4 --prompt 96 --answer 32      # on a processor

All train the same random weights (float32 masters, bf16 arithmetic on a GPU) on the same pairs, a batch being so many
of them, with AdamW and clipping to 1.0, without gradient checkpointing. Answers are from half to all of `--answer`
tokens long. Tokens are those of both lines of a pair, prompts included, padding not. A step's time is as in
`gpu_train.py`; TRL's includes the reference model's forward pass, but where it is computed ahead. `whole` is the
process from its first import to the last step: loading, tokenizing, and what is computed ahead too. Peak memory is
torch's, on a processor the process's. The table ends with this package's rate over the best of the others.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_train import LR, SHAPES, Clock, alone, arguments, callback, follow, held_in, loaded, make

BETA = 0.1


def pairs(args: argparse.Namespace) -> list[dict[str, str]]:
    """Return as many pairs as the steps take; a digit is a token."""
    rng = random.Random(0)

    def digits(least: int, most: int) -> str:
        return "".join(rng.choices("0123456789", k=rng.randint(least, most)))

    sides = ("chosen", "rejected")
    return [
        {"prompt": digits(args.prompt, args.prompt)} | {side: digits(args.answer // 2, args.answer) for side in sides}
        for _ in range(args.batch * args.steps)
    ]


def finished(clock: Clock, begun: float) -> dict[str, Any]:
    """Return what was measured; `begun` is when the process began."""
    import torch

    result = clock.result() | {"whole_seconds": time.time() - begun}
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return result if torch.cuda.is_available() else result | {"peak_bytes": resident}


def trl(args: argparse.Namespace, begun: float, *, ahead: bool = False, liger: bool = False) -> dict[str, Any]:
    """Train with TRL's DPOTrainer."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    model, adapter = loaded(args)
    rows = [
        {"prompt": [{"role": "user", "content": row["prompt"]}]}
        | {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
        for row in pairs(args)
    ]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        told = DPOConfig(
            **arguments(args, folder),
            beta=BETA,
            max_length=None,
            precompute_ref_log_probs=ahead,
            use_liger_kernel=liger,
        )
        DPOTrainer(
            model,
            args=told,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(args.model),
            peft_config=adapter,
            callbacks=[callback(clock)],
        ).train()
    return finished(clock, begun)


def ours(args: argparse.Namespace, begun: float, *, compiled: bool = True) -> dict[str, Any]:
    """Train with this package, as a run of its own would."""
    from datasets import Dataset

    import finetune
    from trainworks import DPO, Batch, Budget, Data, Full, LoRA, Optim, Preference, Pretrained, Speed

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = finetune.Config(
            output=f"{folder}/run",
            task=Preference(objective=DPO(beta=BETA), max_length=2 * (args.prompt + args.answer)),
            model=Pretrained(str(args.model), dtype=held_in(args)),
            tuning=LoRA(rank=16, alpha=32.0) if args.tuning == "lora" else Full(),
            data=Data(source=Dataset.from_list(pairs(args)), holdout=0.0),
            batch=Batch(per_step=args.batch, micro=args.batch),
            budget=Budget(steps=args.steps),
            optim=Optim(lr=LR, schedule="constant", betas=(0.9, 0.999)),
            speed=Speed(compile="auto" if compiled else "off"),
        )
        follow(config, clock)
    return finished(clock, begun)


CONTENDERS: dict[str, tuple[Callable[..., dict[str, Any]], dict[str, bool], tuple[str, ...]]] = {
    "TRL": (trl, {}, ("trl",)),
    "TRL, reference ahead": (trl, {"ahead": True}, ("trl",)),
    "TRL + Liger": (trl, {"liger": True}, ("trl", "liger_kernel")),
    "Trainworks": (ours, {}, ()),
    "Trainworks, eager": (ours, {"compiled": False}, ()),
}
"""Who trains, with what options, and which packages that takes."""


def show(results: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    """Print the table, and the ratio to the best other as the last line."""
    rows = pairs(args)
    tokens = sum(2 * len(row["prompt"]) + len(row["chosen"]) + len(row["rejected"]) for row in rows) / args.steps
    rates = {}
    for name, result in results.items():
        if "failed" in result:
            print(f"{name:<21} failed: {result['failed'][0][:150]}")
            continue
        seconds = statistics.median(result["seconds"])
        rates[name] = tokens / seconds
        whole, peak = result["whole_seconds"], result["peak_bytes"] / 2**30
        losses = f"{result['losses'][0]:.4f} -> {result['losses'][-1]:.4f}"
        print(
            f"{name:<21} {rates[name]:9,.0f} tok/s  {1000 * seconds:8.1f} ms a step  whole {whole:6.1f} s  "
            f"{peak:6.2f} GiB  loss {losses}"
        )
    others = [rate for name, rate in rates.items() if not name.startswith("Trainworks")]
    if others and "Trainworks" in rates:
        print(f"{rates['Trainworks'] / max(others):.2f}x")


def main() -> None:
    """Run every contender in turn, and print and write what they did."""
    begun = time.time()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--tuning", choices=("full", "lora"), default="full")
    parser.add_argument("--batch", type=int, default=4, help="pairs a step")
    parser.add_argument("--prompt", type=int, default=768)
    parser.add_argument("--answer", type=int, default=256)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--json", type=Path)
    parser.set_defaults(weights=None, moments="float32")
    parser.add_argument("--contenders", nargs="*", default=list(CONTENDERS))
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        train, options, _ = CONTENDERS[args.only]
        args.out.write_text(json.dumps(train(args, begun, **options)))
        return
    import torch

    on_gpu = torch.cuda.is_available()
    args.precision = "bf16" if on_gpu else "no"
    with tempfile.TemporaryDirectory() as folder:
        args.model = Path(folder)
        make(args.model, args.shape, 4 * (args.prompt + args.answer), held_in(args))
        results = {}
        for name in args.contenders:
            missing = [package for package in CONTENDERS[name][2] if find_spec(package) is None]
            if missing:
                results[name] = {"failed": [f"{', '.join(missing)} is not installed"]}
            else:
                results[name] = alone(name, args, __file__, ACCELERATE_MIXED_PRECISION=args.precision)
    if args.json:
        from importlib.metadata import version

        said = {"device": torch.cuda.get_device_name() if on_gpu else "cpu", "results": results}
        versions = {name: version(name) for name in ("torch", "transformers", "accelerate", "peft", "trl")}
        settings = {key: getattr(args, key) for key in ("shape", "tuning", "batch", "prompt", "answer", "steps")}
        args.json.write_text(json.dumps(said | {"versions": versions, "settings": settings}, indent=1) + "\n")
    show(results, args)


if __name__ == "__main__":
    main()
