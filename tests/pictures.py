"""Small images made in memory, and folders of them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["COLOURS", "encode", "instances", "picture", "scene"]

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 220)}


def encode(image: Image.Image | NDArray[Any], kind: str = "png", **options: Any) -> bytes:
    """Return an image's bytes."""
    held = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(held, kind, **options)
    return held.getvalue()


def picture(colour: str, seed: int, size: tuple[int, int] = (24, 24)) -> bytes:
    """Return a noisy image of one colour, of this width and height."""
    noise = np.random.default_rng(seed).integers(-35, 35, (size[1], size[0], 3))
    return encode(np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8))


def scene(seed: int, size: tuple[int, int] = (48, 32)) -> tuple[NDArray[np.uint8], list[list[float]], list[str]]:
    """Return a grey image with one to three coloured boxes on it, the boxes as left, top, width, height, and their
    colours."""
    chance = np.random.default_rng(seed)
    image = np.clip(chance.normal(120, 10, (size[1], size[0], 3)), 0, 255).astype(np.uint8)
    boxes, colours = [], []
    for _ in range(chance.integers(1, 4)):
        width, height = (int(side) for side in chance.integers(6, 16, 2))
        left, top = int(chance.integers(size[0] - width)), int(chance.integers(size[1] - height))
        colour = str(chance.choice(list(COLOURS)))
        image[top : top + height, left : left + width] = COLOURS[colour]
        boxes.append([float(left), float(top), float(width), float(height)])
        colours.append(colour)
    return image, boxes, colours


def instances(seed: int) -> tuple[bytes, bytes]:
    """Return a scene and the mask of its boxes: the number of the colour, 0 where there is none."""
    image, boxes, colours = scene(seed)
    mask = np.zeros(image.shape[:2], np.uint8)
    for (left, top, width, height), colour in zip(boxes, colours, strict=True):
        box = (slice(int(top), int(top + height)), slice(int(left), int(left + width)))
        mask[box] = 1 + list(COLOURS).index(colour)
    return encode(image), encode(mask)
