"""What checkpoints cost: step time with a checkpoint every 100 steps against none, written in line and beside training.

    python benchmarks/saving.py [--shape 1b] [--micro 4] [--per-step 64] [--steps 6] [--deterministic] [--json FILE]

One process trains random weights of the shape (sequences of 4,096 tokens). After a warm-up it takes plain steps, then
steps during which a checkpoint is written in the background, twice (the first also takes the host's memory), then saves
once in line. The cost of a save is what its call and the steps until it was written took more than as many plain steps;
every 100 steps it is that over 100 plain steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_train import SHAPES, make, rows

WARMUP = 3


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the seconds of plain steps, and what the saves took."""
    import torch

    import finetune
    from trainworks import SFT, Batch, Budget, Data, Optim, Pretrained, Speed, train_steps
    from trainworks.checkpoint import Saver, checkpoints, save

    config = finetune.Config(
        output=str(folder / "run"),
        task=SFT(format="tokens", max_length=args.length),
        model=Pretrained(str(folder / "model")),
        data=Data(source=rows(args), holdout=0.0),
        batch=Batch(per_step=args.per_step, micro=args.micro),
        budget=Budget(steps=10_000),
        optim=Optim(lr=1e-5, schedule="constant"),
        speed=Speed(background_saving=True),
        deterministic=args.deterministic,
    )
    run = finetune.prepare(config)
    steps = train_steps(run)

    def timed(act: Any) -> float:
        begun = time.perf_counter()
        act()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    for _ in range(WARMUP):
        next(steps)
    plain = [timed(lambda: next(steps)) for _ in range(args.steps)]
    usual = statistics.median(plain)
    result: dict[str, Any] = {"plain": plain, "background": []}
    with Saver(run) as saver:
        for _ in range(2):
            # Not waited for: the copy goes on beside the next step.
            begun = time.perf_counter()
            saver.save()
            call, taken = time.perf_counter() - begun, []
            while not saver.is_done or not taken:
                taken.append(timed(lambda: next(steps)))
            result["background"].append(
                {"call": call, "steps": taken, "extra": call + sum(taken) - usual * len(taken), "usual": usual}
            )
            saver.finish()
    next(steps)
    result["in_line"] = timed(lambda: save(run))
    result["bytes"] = checkpoints(run.folder)[0].size()
    return result


def main() -> None:
    """Measure, print, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--micro", type=int, default=4)
    parser.add_argument("--per-step", type=int, default=64)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.batch = args.per_step
    with tempfile.TemporaryDirectory() as name:
        make(Path(name) / "model", args.shape, args.length)
        result = measure(args, Path(name))
    usual = statistics.median(result["plain"])
    tokens = args.per_step * args.length
    print(f"plain      {1000 * usual:9.1f} ms a step, {tokens / usual:,.0f} tokens/s")
    print(f"checkpoint {result['bytes'] / 2**30:9.2f} GiB")
    for number, saved in enumerate(result["background"], 1):
        print(
            f"background {1000 * saved['extra']:9.1f} ms more over {len(saved['steps'])} steps (the call "
            f"{1000 * saved['call']:.0f} ms), {saved['extra'] / usual:.2f}% of 100 steps"
            + (", memory of the host taken for the first time" if number == 1 else "")
        )
    print(f"in line    {1000 * result['in_line']:9.1f} ms, {result['in_line'] / usual:.2f}% of 100 steps")
    if args.json:
        import torch

        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        args.json.write_text(json.dumps({"device": device, "settings": settings, "result": result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
