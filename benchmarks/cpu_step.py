"""The same small Llama, the same batches, the same optimizer: Transformers' Trainer against this loop, on a CPU.

    python benchmarks/cpu_step.py [--steps 30] [--rounds 4] [--compile] [--json FILE]

Both train on one pre-tokenised data set, in turn and in one process, each round beginning from the same weights. A
step's time is the time between two optimizer steps; the first steps of a round are warm-up. The last line is the median
of Trainer's over the median of ours: above 1 we are faster. With --compile ours compiles its layers, which takes a C++
compiler; Trainer's own torch_compile is left off.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import pretrain
from trainworks import Batch, Budget, CausalLM, Data, FromScratch, NewTokenizer, Optim, Speed, train_steps

BLOCK, PER_STEP, LR, WARMUP = 256, 16, 1e-3, 5
SIZES = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6}


class Clock(TrainerCallback):
    """Notes when each of Trainer's steps ends, and its loss."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.losses: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])


class SequentialTrainer(Trainer):
    """Trainer, taking the rows as they lie."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> torch.utils.data.Sampler[int]:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def config(output: Path, steps: int, *, compiled: bool = False) -> pretrain.Config:
    """Return our run; the block is one token short of a row, since a row's first token is not predicted."""
    return pretrain.Config(
        output=str(output),
        task=CausalLM(block=BLOCK - 1),
        model=FromScratch(architecture="llama", sizes=SIZES, tokenizer=NewTokenizer(vocab_size=2048)),
        data=Data(source="python-docs", validation="validation"),
        batch=Batch(per_step=PER_STEP, micro=PER_STEP),
        budget=Budget(steps=steps),
        optim=Optim(lr=LR, schedule="constant", betas=(0.9, 0.999)),
        speed=Speed(compile="on" if compiled else "off"),
    )


def ours(run: Any, weights: dict[str, torch.Tensor]) -> tuple[list[float], list[float]]:
    """Train through `train_steps`; return the seconds of each step after warm-up, and the losses."""
    run.model.load_state_dict(weights)
    run.optimizer.state.clear()
    run.progress = type(run.progress)()
    ends, losses = [], []
    for step in train_steps(run):
        losses.append(step.loss.item())
        ends.append(time.perf_counter())
    return intervals(ends), losses


def trainers(
    model: LlamaForCausalLM, rows: Dataset, steps: int, weights: dict[str, torch.Tensor]
) -> tuple[list[float], list[float]]:
    """Train through Trainer; return the same."""
    model.load_state_dict(weights)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=PER_STEP,
            max_steps=steps,
            learning_rate=LR,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            weight_decay=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        SequentialTrainer(model, arguments, train_dataset=rows, data_collator=collate, callbacks=[clock]).train()
    return intervals(clock.ends), clock.losses


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack rows of one length."""
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids}


def intervals(ends: list[float]) -> list[float]:
    """Return the times between steps, warm-up left out."""
    return [after - before for before, after in zip(ends[WARMUP:-1], ends[WARMUP + 1 :], strict=True)]


def main() -> None:
    """Run both in turn and print the ratio of their medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = pretrain.prepare(config(Path(folder) / "run", chosen.steps, compiled=chosen.compile))
        order = [int(row) for step in range(chosen.steps) for row in run.plan.step(step)[0]]
        rows = run.train.select(order).select_columns(["input_ids"])
        weights = {name: value.clone() for name, value in run.model.state_dict().items()}
        model = LlamaForCausalLM(LlamaConfig(**run.model.config.to_dict()))
        times: dict[str, list[float]] = {"trainer": [], "trainworks": []}
        for number in range(chosen.rounds):
            theirs, their_losses = trainers(model, rows, chosen.steps, weights)
            mine, my_losses = ours(run, weights)
            apart = max(abs(a - b) / a for a, b in zip(their_losses, my_losses, strict=True))
            times["trainer"] += theirs
            times["trainworks"] += mine
            print(
                f"round {number + 1}: trainer {1000 * statistics.median(theirs):.1f} ms, trainworks "
                f"{1000 * statistics.median(mine):.1f} ms a step; losses differ by {apart:.1e} at most"
            )
    medians = {name: statistics.median(values) for name, values in times.items()}
    if chosen.json:
        chosen.json.write_text(json.dumps({"median_seconds": medians, "torch": torch.__version__}, indent=2) + "\n")
    print(f"{medians['trainer'] / medians['trainworks']:.2f}x")


if __name__ == "__main__":
    main()
