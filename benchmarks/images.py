"""Images a second of a vision transformer that learns classes: Transformers' Trainer, and this package.

    python benchmarks/images.py [--shape tiny] [--size 96] [--batch 32] [--workers 1] [--steps 30] [--rounds 3]
    python benchmarks/images.py --shape base --size 224 --batch 128 --workers 12 --steps 60      # on a GPU

Both read the same JPEGs of 400 x 300 pixels, through the same image processor, in as many workers, and train the same
weights in bf16 on a GPU and in float32 on a processor, with AdamW and clipping to 1.0. Each is a process of its own, in
turn, `--rounds` times. A round's rate is the images of all its steps but the first ten over the time that they took, so
that waiting for workers counts. The last line is the median over the rounds of our rate over theirs; beside it, without
workers, stands the same of the processor time that the steps took, which others on the machine hardly change.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_train import LR, WARMUP, Clock, alone, arguments, callback, follow

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 12, "num_attention_heads": 3},
    "small": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6},
    "base": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
}
"""Vision transformers by size."""
CLASSES, DIFFERENT, WIDTH, HEIGHT = 10, 256, 400, 300
CONTENDERS = ("Trainer", "Trainworks")


class Clocks(Clock):
    """The end of every step by two clocks: the time, and the processor time of this process."""

    def __init__(self) -> None:
        super().__init__()
        self.processor: list[float] = []

    def tick(self) -> None:
        super().tick()
        self.processor.append(time.process_time())

    def result(self) -> dict[str, Any]:
        return super().result() | {"processor_seconds": self.processor[-1] - self.processor[WARMUP]}


def make(folder: Path, args: argparse.Namespace) -> None:
    """Write the weights, the image processor, and a Parquet file of images."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    from trainworks import NewImageProcessor
    from trainworks.image_models import new_image_processor

    torch.manual_seed(0)
    config = ViTConfig(image_size=args.size, num_labels=CLASSES, **SHAPES[args.shape])
    ViTForImageClassification(config).save_pretrained(folder)
    new_image_processor(NewImageProcessor(size=args.size)).save_pretrained(folder)
    photographs(args.batch * args.steps).to_parquet(folder / "rows.parquet")


def photographs(number: int) -> Any:
    """Return rows of images as smooth and as noisy as photographs are, so that they take as long to decode."""
    import numpy as np
    from datasets import Dataset
    from PIL import Image

    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(DIFFERENT):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), resample=3), np.int16)
        noisy = np.clip(smooth + rng.integers(-12, 13, smooth.shape), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(noisy).save(file, "JPEG", quality=90)
        encoded.append({"bytes": file.getvalue(), "path": None})
    return Dataset.from_dict(
        {
            "image": [encoded[place % DIFFERENT] for place in range(number)],
            "label": [place % CLASSES for place in range(number)],
        }
    )


def rows(args: argparse.Namespace) -> Any:
    """Return the images, encoded."""
    from datasets import Dataset

    return Dataset.from_parquet(str(args.model / "rows.parquet"))


def trainer(args: argparse.Namespace) -> dict[str, Any]:
    """Train with Transformers' Trainer."""
    import torch
    from datasets import Image
    from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments

    processor = AutoImageProcessor.from_pretrained(args.model)

    def seen(batch: dict[str, list[Any]]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in batch["image"]]
        return {**processor(images, return_tensors="pt"), "labels": batch["label"]}

    def stacked(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
            "labels": torch.tensor([row["labels"] for row in rows]),
        }

    clock = Clocks()
    with tempfile.TemporaryDirectory() as folder:
        told = TrainingArguments(
            **arguments(args, folder), dataloader_num_workers=args.workers, remove_unused_columns=False
        )
        Trainer(
            AutoModelForImageClassification.from_pretrained(args.model),
            told,
            train_dataset=rows(args).cast_column("image", Image()).with_transform(seen),
            data_collator=stacked,
            callbacks=[callback(clock)],
        ).train()
    return clock.result()


def ours(args: argparse.Namespace) -> dict[str, Any]:
    """Train with this package, as a run of its own would."""
    import finetune
    from trainworks import Batch, Budget, Data, ImageClassification, Optim, Pretrained

    clock = Clocks()
    with tempfile.TemporaryDirectory() as folder:
        config = finetune.Config(
            output=f"{folder}/run",
            task=ImageClassification(labels=tuple(map(str, range(CLASSES)))),
            model=Pretrained(str(args.model)),
            data=Data(source=rows(args), holdout=0.0, workers=args.workers),
            batch=Batch(per_step=args.batch, micro=args.batch),
            budget=Budget(steps=args.steps),
            optim=Optim(lr=LR, schedule="constant", betas=(0.9, 0.999)),
        )
        follow(config, clock)
    return clock.result()


def ratio(rounds: dict[str, list[float]]) -> float:
    """Return the median over the rounds of our rate over theirs."""
    return statistics.median(
        ours / theirs for ours, theirs in zip(rounds["Trainworks"], rounds["Trainer"], strict=True)
    )


def main() -> None:
    """Run both in turn, and print and write what they did."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        args.out.write_text(json.dumps({"Trainer": trainer, "Trainworks": ours}[args.only](args)))
        return
    import torch

    on_gpu = torch.cuda.is_available()
    rates: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    efforts: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as folder:
        args.model = Path(folder)
        make(args.model, args)
        for number in range(1, args.rounds + 1):
            for name in CONTENDERS:
                result = alone(name, args, __file__, ACCELERATE_MIXED_PRECISION="bf16" if on_gpu else "no")
                if "failed" in result:
                    raise SystemExit(f"{name}: {result['failed'][0]}")
                images = args.batch * len(result["seconds"])
                rates[name].append(images / sum(result["seconds"]))
                efforts[name].append(images / result["processor_seconds"])
            said = ", ".join(f"{name} {rates[name][-1]:,.1f} images/s" for name in CONTENDERS)
            print(f"round {number}: {said}", flush=True)
    if args.json:
        device = torch.cuda.get_device_name() if on_gpu else f"{os.cpu_count()} cores"
        settings = {key: getattr(args, key) for key in ("shape", "size", "batch", "workers", "steps", "rounds")}
        said = {"images_per_second": rates, "images_per_processor_second": efforts}
        args.json.write_text(json.dumps({"device": device, "settings": settings} | said, indent=1) + "\n")
    print(f"{ratio(rates):.2f}x" + ("" if args.workers else f" ({ratio(efforts):.2f}x by processor time)"))


if __name__ == "__main__":
    main()
