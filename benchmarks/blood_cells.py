"""A detector of blood cells, trained from random weights for some minutes: mAP on the 30 held-out images.

    TRAINWORKS_DATA=FOLDER python benchmarks/blood_cells.py [--minutes 8] [--size 320] [--json FILE]
    TRAINWORKS_DATA=FOLDER python benchmarks/blood_cells.py --images 8 --minutes 8         # does it overfit eight?

The folder holds `det_bccd` (Pascal VOC, 60 images to train on, 3 MB). The model is RT-DETR with a ResNet of the shape
asked for. A few steps are timed first, and the run is then given as many as fit into the minutes; with `--steps` it is
given these. With `--images` it trains on so many of the images, as they are, and is measured on the same ones.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

TIMED, WARMUP = 60, 30
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"backbone": [16, 32, 64, 128], "depths": [1, 1, 1, 1], "width": 64, "queries": 60},
    "small": {"backbone": [32, 64, 128, 256], "depths": [1, 1, 1, 1], "width": 128, "queries": 100},
    "r18": {"backbone": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "width": 256, "queries": 100},
}
"""By name, the channels and depths of the ResNet's stages, and the transformer's width and boxes."""


def sizes(shape: str) -> dict[str, Any]:
    """Return the model's configuration."""
    told = SHAPES[shape]
    backbone, width = told["backbone"], told["width"]
    return {
        "backbone_config": {
            "model_type": "rt_detr_resnet",
            "embedding_size": backbone[0],
            "hidden_sizes": backbone,
            "depths": told["depths"],
            "layer_type": "basic",
            "out_features": ["stage2", "stage3", "stage4"],
        },
        "encoder_in_channels": backbone[1:],
        "decoder_in_channels": [width] * 3,
        "encoder_hidden_dim": width,
        "encoder_ffn_dim": 4 * width,
        "d_model": width,
        "decoder_ffn_dim": 4 * width,
        "decoder_layers": 3,
        "num_queries": told["queries"],
        "num_denoising": 0,
        "dropout": 0.0,
    }


def config(args: argparse.Namespace, source: Path, output: Path, steps: int) -> Any:
    """Return the run."""
    import pretrain
    from trainworks import Batch, Budget, Data, Every, FromScratch, NewImageProcessor, ObjectDetection, Optim, Speed

    augment = {} if args.images else {"crop": 0.4, "flip": True, "colour": 0.3}
    return pretrain.Config(
        output=str(output),
        task=ObjectDetection(augment=augment, batch_norm="live"),
        model=FromScratch(
            architecture="rt_detr", sizes=sizes(args.shape), image_processor=NewImageProcessor(size=args.size)
        ),
        data=Data(
            source=str(source),
            layout="voc",
            train=("train",),
            validation=("same",) if args.images else ("val",),
            bad_rows="skip",
            workers=args.workers,
        ),
        batch=Batch(per_step=args.batch, micro=args.batch),
        budget=Budget(steps=steps),
        optim=Optim(lr=args.lr, schedule="cosine", warmup=0.05, weight_decay=1e-4, max_grad_norm=1.0),
        speed=Speed(compile="on" if args.compile else "off"),
        every=Every(log=max(1, steps // 20)),
    )


def affordable(args: argparse.Namespace, source: Path, folder: Path) -> int:
    """Time a few steps of a run of its own, and return how many fit into the minutes."""
    import torch

    import pretrain
    from trainworks import train_steps

    ends = []
    for step in train_steps(pretrain.prepare(config(args, source, folder / "timed", TIMED))):
        step.loss.item()
        ends.append(time.perf_counter())
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    seconds = [after - before for before, after in zip(ends[WARMUP:-1], ends[WARMUP + 1 :], strict=True)]
    return int(60 * args.minutes / statistics.mean(seconds))


def few(folder: Path, source: Path, number: int) -> Path:
    """Copy the data set with so many of its training images alone, which are also listed as `same`."""
    shutil.copytree(source, folder / "few")
    lists = folder / "few" / "ImageSets" / "Main"
    names = "\n".join((lists / "train.txt").read_text().split()[:number]) + "\n"
    for part in (folder / "few", *(folder / "few").rglob("*")):
        part.chmod(0o755 if part.is_dir() else 0o644)  # the data may be read-only
    for listed in ("train.txt", "same.txt"):
        (lists / listed).write_text(names)
    return folder / "few"


def main() -> None:
    """Train, and print and write what was reached."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="r18")
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--images", type=int)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    import pretrain

    source = Path(os.environ["TRAINWORKS_DATA"]) / "det_bccd"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = few(folder, source, args.images) if args.images else source
        steps = args.steps or affordable(args, source, folder)
        run = pretrain.prepare(config(args, source, folder / "run", steps))
        begun = time.perf_counter()
        record = pretrain.fit(run)
        minutes = (time.perf_counter() - begun) / 60
    assert record.final is not None
    found = {name: [value.value, value.low, value.high] for name, value in record.final.metrics.items()}
    if args.json:
        settings = {name: getattr(args, name) for name in ("shape", "size", "batch", "lr", "images")}
        said = {"steps": steps, "minutes": minutes, "device": record.environment.device, "metrics": found}
        args.json.write_text(json.dumps(said | {"settings": settings}, indent=1) + "\n")
    value, low, high = found["map50"]
    print(f"mAP50 {value:.3f} [{low:.3f}, {high:.3f}] after {steps:,} steps in {minutes:.1f} minutes")


if __name__ == "__main__":
    main()
