"""Training steps on one GPU: Trainer, Trainer with Liger kernels, TRL, and this package, in one process each.

    python benchmarks/gpu_train.py [--shape 1b] [--tuning full] [--batch 4] [--length 4096] [--steps 20] [--json FILE]
    ... --weights bfloat16 [--moments 8bit]     # no float32 masters; ours rounds at random, the others to the nearest

All train the same random weights (float32 masters, bf16 arithmetic) on the same token ids, with AdamW and clipping to
1.0, without gradient checkpointing; with `--tuning lora` the frozen weights are bf16 for all, with `qlora` 4 bits (nf4,
double quantisation, by bitsandbytes). A step's time is what passes on the device between two optimizer steps, the first
ten left out; nobody is made to wait for the device, and all log every ten steps. The rate is the median's. MFU is as in
`trainworks.cost`. Peak memory is torch's. `first step` is from the process's start to the end of the first step.
Contenders whose package is not installed are left out, by name. The table ends with how much faster this package is
than the best of the others.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "vocab_size": 49280},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24}
    | {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "vocab_size": 128256},
    "experts": {"model_type": "qwen3_moe", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16}
    | {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256}
    | {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 1024, "tie_word_embeddings": True},
    "tiny experts": {"model_type": "qwen3_moe", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 4928}
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}
"""Llama 3.1 and 3.2 by size, a small mixture of experts, and two for trying scripts on a processor."""
WARMUP, LOGGED, LR = 10, 10, 1e-5
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


def make(folder: Path, shape: str, length: int, dtype: str = "float32") -> None:
    """Write a model of random weights with a tokenizer, which no contender needs but all load."""
    import torch
    from transformers import AutoModelForCausalLM

    from trainworks import NewTokenizer
    from trainworks.tokenizer_training import new_tokenizer

    config = configuration(shape, length)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    new_tokenizer(NewTokenizer(vocab_size=300), ["the quick brown fox"]).save_pretrained(folder)


def configuration(shape: str, length: int) -> Any:
    """Return the configuration of a model of some shape that takes so many tokens."""
    from transformers import AutoConfig

    settings = {"model_type": "llama"} | SHAPES[shape]
    return AutoConfig.for_model(**settings, max_position_embeddings=length, rope_theta=500_000.0, eos_token_id=0)


def rows(args: argparse.Namespace, ranks: int = 1) -> Any:
    """Return as many random rows as the steps of so many ranks take."""
    import numpy as np
    from datasets import Dataset

    ids = np.random.default_rng(0).integers(1, 250, (args.batch * ranks * args.steps, args.length), dtype=np.int64)
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


class Clock:
    """The end of every step, as the device comes to it; and the loss, the mean of every ten steps."""

    def __init__(self, warmup: int = WARMUP) -> None:
        self.warmup = warmup
        self.ends: list[Any] = []
        self.losses: list[float] = []
        self.first = 0.0

    def tick(self) -> None:
        import torch

        if not self.ends:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.first = time.time() - psutil.Process().create_time()
        if not torch.cuda.is_available():
            self.ends.append(time.perf_counter())
            return
        self.ends.append(torch.cuda.Event(enable_timing=True))
        self.ends[-1].record()

    def result(self) -> dict[str, Any]:
        import torch

        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.synchronize()
        pairs = zip(self.ends[self.warmup : -1], self.ends[self.warmup + 1 :], strict=True)
        steps = [before.elapsed_time(after) / 1000 if on_gpu else after - before for before, after in pairs]
        peak = torch.cuda.max_memory_allocated() if on_gpu else 0
        return {"seconds": steps, "peak_bytes": peak, "losses": self.losses, "first_seconds": self.first}


def arguments(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Return what Trainer and TRL are both told."""
    import torch

    on_gpu = torch.cuda.is_available()
    return {
        "output_dir": folder,
        "per_device_train_batch_size": args.batch,
        "max_steps": args.steps,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "bf16": on_gpu,
        "use_cpu": not on_gpu,
        "gradient_checkpointing": False,
        "logging_steps": LOGGED,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "optim": "adamw_8bit" if args.moments == "8bit" else "adamw_torch_fused",
    }


def held_in(args: argparse.Namespace) -> str:
    """Return the type that weights are held in; a frozen model's are not summed up to."""
    return args.weights or ("float32" if args.tuning == "full" else "bfloat16")


def loaded(args: argparse.Namespace) -> Any:
    """Return the model as Trainer and TRL are given it, and the adapter's configuration if there is one."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    how = {"quantization_config": four, "device_map": {"": 0}} if args.tuning == "qlora" else {}
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=held_in(args), **how)
    return model, None if args.tuning == "full" else LoraConfig(task_type="CAUSAL_LM", **LORA)


def callback(clock: Clock) -> Any:
    """Return a callback of Trainer's that notes time and loss."""
    from transformers import TrainerCallback

    class Ticking(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.tick()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if "loss" in logs:
                clock.losses.append(float(logs["loss"]))

    return Ticking()


def trainer(args: argparse.Namespace, *, liger: bool = False) -> dict[str, Any]:
    """Train with Transformers' Trainer."""
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments, default_data_collator

    model, adapter = loaded(args)
    if adapter is not None:
        model = get_peft_model(model, adapter)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        told = TrainingArguments(**arguments(args, folder), use_liger_kernel=liger)
        Trainer(
            model, told, train_dataset=rows(args), data_collator=default_data_collator, callbacks=[callback(clock)]
        ).train()
    return clock.result()


def trl(args: argparse.Namespace, *, liger: bool = False, ranks: int = 1, warmup: int = WARMUP) -> dict[str, Any]:
    """Train with TRL's SFTTrainer, on rows that are token ids already."""
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    model, adapter = loaded(args)
    clock = Clock(warmup)
    with tempfile.TemporaryDirectory() as folder:
        told = SFTConfig(**arguments(args, folder), max_length=args.length, use_liger_kernel=liger)
        SFTTrainer(
            model,
            told,
            train_dataset=rows(args, ranks).remove_columns(["labels"]),
            processing_class=AutoTokenizer.from_pretrained(args.model),
            peft_config=adapter,
            callbacks=[callback(clock)],
        ).train()
    return clock.result()


def ours(args: argparse.Namespace, *, compiled: bool = True, **changes: Any) -> dict[str, Any]:
    """Train with this package, as a run of its own would."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        follow(run_config(args, folder, compiled=compiled, **changes), clock)
    return clock.result()


def run_config(args: argparse.Namespace, folder: str, *, compiled: bool = True, ranks: int = 1, **changes: Any) -> Any:
    """Return the run that is timed; `changes` are fields of its configuration."""
    import finetune
    from trainworks import SFT, Batch, Budget, Data, Full, LoRA, Optim, Pretrained, Quantise, Speed

    dtype = held_in(args)
    rounding = "stochastic" if args.tuning == "full" and dtype == "bfloat16" else "nearest"
    four = Quantise(bits=4) if args.tuning == "qlora" else None
    settings = {
        "output": f"{folder}/run",
        "task": SFT(format="tokens", max_length=args.length),
        "model": Pretrained(str(args.model), dtype=dtype, quantise=four),
        "tuning": Full() if args.tuning == "full" else LoRA(rank=16, alpha=32.0),
        "data": Data(source=rows(args, ranks), holdout=0.0),
        "batch": Batch(per_step=args.batch, micro=args.batch),
        "budget": Budget(steps=args.steps),
        "optim": Optim(lr=LR, schedule="constant", betas=(0.9, 0.999), moments=args.moments, rounding=rounding),
        "speed": Speed(compile="auto" if compiled else "off"),
    }
    return finetune.Config(**settings | changes)


def follow(config: Any, clock: Clock) -> None:
    """Train a run of this package, with the clock's ticks and the losses that the others log."""
    import finetune
    from trainworks import train_steps

    losses = []
    for step in train_steps(finetune.prepare(config)):
        clock.tick()
        losses.append(step.loss)
        if step.number % LOGGED == 0:
            clock.losses.append(sum(loss.item() for loss in losses[-LOGGED:]) / LOGGED)


CONTENDERS: dict[str, tuple[Callable[..., dict[str, Any]], dict[str, Any], tuple[str, ...]]] = {
    "Trainer": (trainer, {}, ()),
    "Trainer + Liger": (trainer, {"liger": True}, ("liger_kernel",)),
    "TRL": (trl, {}, ("trl",)),
    "TRL + Liger": (trl, {"liger": True}, ("trl", "liger_kernel")),
    "Trainworks": (ours, {}, ()),
    "Trainworks, eager": (ours, {"compiled": False}, ()),
    "Trainworks, deterministic": (ours, {"deterministic": True, "speed": {"compile": "on"}}, ()),
}
"""Who trains, with what options, and which packages that takes."""


def alone(name: str, args: argparse.Namespace, script: str = __file__, **environment: str) -> dict[str, Any]:
    """Run one of a script's contenders in a process of its own, with caches of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        own = ["--only", name, "--model", str(args.model), "--out", str(out)]
        caches = {"TRAINWORKS_CACHE": f"{folder}/cache", "HF_DATASETS_CACHE": f"{folder}/datasets"}
        given = os.environ | caches | {"ACCELERATE_MIXED_PRECISION": "bf16"} | environment
        command = [sys.executable, script, *sys.argv[1:], *own]
        done = subprocess.run(command, env=given, capture_output=True, text=True, check=False)
        if done.returncode:
            return {"failed": done.stderr.strip().splitlines()[-1:] or [f"exit {done.returncode}"]}
        value: dict[str, Any] = json.loads(out.read_text())
        return value


def mfu(shape: str, tuning: str, length: int, rate: float) -> float | None:
    """Return the model FLOPs of so many tokens a second over this GPU's peak; None where that is not known."""
    import torch
    from transformers import AutoModelForCausalLM

    from trainworks.cost import flops_per_token, peak_flops

    peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    if peak is None:
        return None
    config = configuration(shape, length)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    model.requires_grad_(tuning == "full")
    experts = 0
    if "num_experts_per_tok" in SHAPES[shape]:
        of_one = 3 * config.hidden_size * config.moe_intermediate_size
        experts = 6 * config.num_hidden_layers * config.num_experts_per_tok * of_one
    return rate * (flops_per_token(model, length) + experts) / peak


def line(name: str, result: dict[str, Any], args: argparse.Namespace) -> str:
    """Return what a contender did, for the table."""
    if "failed" in result:
        return f"{name:<25} failed: {result['failed'][0][:150]}"
    seconds = statistics.median(result["seconds"])
    rate = args.batch * args.length / seconds
    spread = (max(result["seconds"]) - min(result["seconds"])) / seconds
    share = mfu(args.shape, args.tuning, args.length, rate)
    used = "" if share is None else f"MFU {100 * share:4.1f}%"
    return (
        f"{name:<25} {rate:9,.0f} tok/s  {1000 * seconds:7.1f} ms a step (spread {100 * spread:.0f}%)  "
        f"{used}  {result['peak_bytes'] / 2**30:5.1f} GiB  "
        f"first step {result['first_seconds']:5.1f} s  "
        f"loss {result['losses'][0]:.4f} -> {result['losses'][-1]:.4f}"
    )


def write(results: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    """Write what contenders did so far, with the machine, the versions and the settings."""
    from importlib.metadata import version

    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    versions = {name: version(name) for name in ("torch", "transformers", "accelerate", "peft")}
    names = ("shape", "tuning", "weights", "moments", "batch", "length", "steps")
    settings = {name: getattr(args, name) for name in names}
    said = {"device": device, "results": results, "versions": versions, "settings": settings}
    args.json.write_text(json.dumps(said, indent=1) + "\n")


def main() -> None:
    """Run every contender in turn, and print and write what they did."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--tuning", choices=("full", "lora", "qlora"), default="full")
    parser.add_argument(
        "--weights", choices=("float32", "bfloat16"), help="float32 where all are trained, else bfloat16"
    )
    parser.add_argument("--moments", choices=("float32", "bfloat16", "8bit"), default="float32")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--contenders", nargs="*", default=list(CONTENDERS))
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help="where the model lies or is to lie; a temporary folder by default")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        train, options, _ = CONTENDERS[args.only]
        args.out.write_text(json.dumps(train(args, **options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        args.model = args.model or Path(folder)
        if not (args.model / "config.json").exists():
            make(args.model, args.shape, args.length, held_in(args))
        results: dict[str, dict[str, Any]] = {}
        for name in args.contenders:
            missing = [package for package in CONTENDERS[name][2] if find_spec(package) is None]
            results[name] = {"failed": [f"{', '.join(missing)} is not installed"]} if missing else alone(name, args)
            print(line(name, results[name], args), flush=True)
            if args.json:
                write(results, args)
    done = {name: statistics.median(found["seconds"]) for name, found in results.items() if "seconds" in found}
    others = [seconds for name, seconds in done.items() if not name.startswith("Trainworks")]
    if others and "Trainworks" in done:
        print(f"{min(others) / done['Trainworks']:.2f}x")


if __name__ == "__main__":
    main()
