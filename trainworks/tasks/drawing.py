"""Draw images as a model sees them, side by side, with the boxes, masks and classes that it is taught."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

__all__ = ["boxed", "grid", "jpeg", "masked", "seen", "sized", "titled"]

_COLOURS = (
    "#e6194b",
    "#3cb44b",
    "#4363d8",
    "#f58231",
    "#911eb4",
    "#42d4f4",
    "#f032e6",
    "#bfef45",
    "#469990",
    "#9a6324",
)
_TITLE = 14
_GAP = 4
_SIDE = 256


def seen(pixels: Tensor, processor: Any) -> Image:
    """Return an image from what a model is given of it, [channels, height, width]."""
    from PIL import Image

    values = pixels.float().numpy().transpose(1, 2, 0)
    told = processor.to_dict()
    if told.get("do_normalize"):
        values = values * np.array(told["image_std"]) + np.array(told["image_mean"])
    if told.get("do_rescale"):
        values = values / told["rescale_factor"]
    return Image.fromarray(np.clip(np.round(values), 0, 255).astype(np.uint8)).convert("RGB")


def _colour(kind: int) -> str:
    return _COLOURS[kind % len(_COLOURS)]


def boxed(image: Image, boxes: Sequence[Sequence[float]], kinds: Sequence[int], names: Sequence[str]) -> Image:
    """Draw boxes [n, 4], left, top, right, bottom in shares of the image, each in its class's colour and with its
    name."""
    from PIL import ImageDraw

    draw = ImageDraw.Draw(image)
    for box, kind in zip(boxes, kinds, strict=True):
        left, top, right, bottom = (share * side for share, side in zip(box, image.size * 2, strict=True))
        draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=_colour(kind), width=2)
        draw.text((left + 2, top), names[kind], fill=_colour(kind))
    return image


def masked(image: Image, classes: np.ndarray[Any, Any]) -> Image:
    """Lay the colours of classes [any height, any width] over an image; black where nothing is learned."""
    from PIL import Image, ImageColor

    table = np.array([ImageColor.getrgb(_colour(kind)) for kind in range(len(_COLOURS))], np.uint8)
    colours = np.where(classes[..., None] < 0, 0, table[classes % len(_COLOURS)]).astype(np.uint8)
    return Image.blend(image, Image.fromarray(colours).resize(image.size, resample=0), 0.4)


def titled(image: Image, title: str) -> Image:
    """Write a line above an image."""
    from PIL import Image, ImageDraw

    whole = Image.new("RGB", (image.width, image.height + _TITLE), "white")
    whole.paste(image, (0, _TITLE))
    ImageDraw.Draw(whole).text((1, 1), title, fill="black")
    return whole


def sized(image: Image) -> Image:
    """Return an image as large as a page shows it."""
    share = _SIDE / max(image.size)
    return image.resize((round(image.width * share), round(image.height * share)), resample=0 if share > 1 else 2)


def jpeg(image: Image) -> str:
    """Return an image as a JPEG, in base64."""
    file = BytesIO()
    image.save(file, "JPEG", quality=80)
    return b64encode(file.getvalue()).decode()


def grid(images: Sequence[Image]) -> Image:
    """Put images side by side, about as many across as down."""
    from PIL import Image

    across = int(np.ceil(len(images) ** 0.5))
    width, height = max(image.width for image in images) + _GAP, max(image.height for image in images) + _GAP
    whole = Image.new("RGB", (across * width, -(-len(images) // across) * height), "white")
    for place, image in enumerate(images):
        whole.paste(image, (place % across * width, place // across * height))
    return whole
