"""What each rank of a piece of `multi_gpu.py` does, which starts it:
python benchmarks/multi_gpu_rank.py TOLD.json RESULT"""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_train import LOGGED, LORA, LR, Clock, follow, held_in, rows, run_config, trl


def trainworks(args: Namespace) -> dict[str, Any]:
    """Train with this package, laid out as told."""
    from trainworks import Batch

    batch = Batch(per_step=args.per_step, micro=args.micro)
    config = run_config(
        args, args.folder, compiled=args.compiled, ranks=args.gpus, batch=batch, layout=args.spread["layout"]
    )
    clock = Clock(args.warmup)
    follow(config, clock)
    return clock.result()


def transformers_trl(args: Namespace) -> dict[str, Any]:
    """Train with TRL, with Liger's kernels where they are installed."""
    from importlib.util import find_spec

    return trl(args, ranks=args.gpus, warmup=args.warmup, liger=find_spec("liger_kernel") is not None)


def accelerate(args: Namespace) -> dict[str, Any]:
    """Train with a plain loop on accelerate's own preparation, layers compiled by region."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import TorchDynamoPlugin
    from peft import LoraConfig, get_peft_model
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, default_data_collator

    regions = TorchDynamoPlugin(backend="inductor", use_regional_compilation=True) if args.compiled else None
    accelerator = Accelerator(dynamo_plugin=regions)
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=held_in(args))
    if args.tuning == "lora":
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    samples: Any = rows(args, args.gpus).with_format("torch")
    loader = DataLoader(samples, batch_size=args.batch, collate_fn=default_data_collator)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(trained, lr=LR, fused=True), loader)
    clock, losses = Clock(args.warmup), []
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.tick()
        losses.append(loss.detach())
        if len(losses) % LOGGED == 0:
            clock.losses.append(float(accelerator.reduce(torch.stack(losses[-LOGGED:]).mean(), "mean")))
    return clock.result()


def parity(args: Namespace) -> dict[str, Any]:
    """Train the small models of tests/layouts.py in one layout, in each precision; return the curves by precision.

    They are written after each model, so that those that were done are there when one fails."""
    import layouts
    from accelerate.state import AcceleratorState

    found: dict[str, Any] = {precision: {} for precision in args.precisions}
    for precision, curves in found.items():
        os.environ["ACCELERATE_MIXED_PRECISION"] = precision
        AcceleratorState._reset_state()
        changes = {
            "batch": {"per_step": 8, "micro": args.micro, "pack": 64},
            "speed": {"compile": "on" if args.compiled else "off"},
        }
        for case in args.cases:
            name, layout = f"{args.name}-{precision}", args.spread["layout"]
            curves |= layouts.train(args.folder, [case], name, layout, args.steps, **changes)
            _write(args, found)
    return found


def _write(args: Namespace, value: Any) -> None:
    path = Path(f"{args.result}.{os.environ.get('RANK', '0')}")
    path.with_name(f"new-{path.name}").write_text(json.dumps(value), encoding="utf-8")
    os.replace(path.with_name(f"new-{path.name}"), path)


PIECES: dict[str, Callable[[Namespace], dict[str, Any]]] = {
    "Trainworks": trainworks,
    "TRL": transformers_trl,
    "accelerate": accelerate,
    "parity": parity,
}


def main(told: str, result: str) -> None:
    """Do what is told, and write what came of it, for each rank."""
    args = Namespace(**json.loads(Path(told).read_text(encoding="utf-8")), result=result)
    if os.environ.get("ACCELERATE_TORCH_DEVICE") == "cpu":
        from distributed import let_fsdp_run_on_cpu

        let_fsdp_run_on_cpu()
    _write(args, PIECES[args.piece](args))
    if "RANK" in os.environ:
        import torch.distributed

        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # threads of gloo may abort a process while its interpreter winds up (torch 2.13)


if __name__ == "__main__":
    main(*sys.argv[1:])
