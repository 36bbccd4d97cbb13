"""How training images are varied, with their boxes and masks: drawn from one row's seed, done in Pillow and numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, Strict

from trainworks.settings import Settings, Share

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Augment", "View", "generator"]

_ATTEMPTS = 10
_WIDEST = 4 / 3


def generator(seed: int, draw: int = 0) -> np.random.Generator:
    """Return the generator of a row's chance; `draw` tells apart what is drawn for one row."""
    return np.random.default_rng([int(seed), draw])


@dataclass(frozen=True)
class View:
    """A part of an image, in its pixels, which may be mirrored: the same for the image, its mask and its boxes."""

    left: int
    top: int
    width: int
    height: int
    mirrored: bool

    def of(self, image: Image) -> Image:
        """Return this part of an image, or of a mask."""
        from PIL.Image import Transpose

        if (self.width, self.height) != image.size:
            image = image.crop((self.left, self.top, self.left + self.width, self.top + self.height))
        return image.transpose(Transpose.FLIP_LEFT_RIGHT) if self.mirrored else image

    def boxes(self, boxes: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return boxes [n, 4] (left, top, right, bottom) cut to this part and in its pixels, and which are still there:
        those whose centre lies in it."""
        moved = boxes - np.array([self.left, self.top] * 2, np.float32)
        centre = (moved[:, :2] + moved[:, 2:]) / 2
        size = np.array([self.width, self.height], np.float32)
        there: NDArray[np.bool_] = np.all((centre >= 0) & (centre < size), axis=1)
        moved = np.clip(moved, 0, np.tile(size, 2))
        if self.mirrored:
            moved = np.stack([self.width - moved[:, 2], moved[:, 1], self.width - moved[:, 0], moved[:, 3]], axis=1)
        return moved.astype(np.float32), there


class Augment(Settings):
    """How each training image is varied, anew in every epoch; evaluation sees images as they are."""

    crop: Annotated[float, Strict(), Field(gt=0, le=1)] = 1.0
    """Smallest share of the image that a random part of it may have, at shapes from 3:4 to 4:3 of its own (Szegedy et
    al. 2014, arXiv:1409.4842); 1 takes the whole."""
    flip: bool = False
    """Mirror every second image, left to right."""
    colour: Share = 0.0
    """Most that brightness, contrast and saturation are changed by, as a share."""

    def view(self, size: tuple[int, int], chance: np.random.Generator) -> View:
        """Draw a part of an image of this width and height."""
        width, height = size
        box = self._box(width, height, chance) if self.crop < 1 else (0, 0, width, height)
        return View(*box, mirrored=self.flip and bool(chance.random() < 0.5))

    def _box(self, width: int, height: int, chance: np.random.Generator) -> tuple[int, int, int, int]:
        for _ in range(_ATTEMPTS):
            share = chance.uniform(self.crop, 1)
            shape = np.exp(chance.uniform(-np.log(_WIDEST), np.log(_WIDEST)))
            across, down = round(width * np.sqrt(share * shape)), round(height * np.sqrt(share / shape))
            if 0 < across <= width and 0 < down <= height:
                left, top = (
                    chance.integers(width - across, endpoint=True),
                    chance.integers(height - down, endpoint=True),
                )
                return int(left), int(top), int(across), int(down)
        return 0, 0, width, height

    def coloured(self, image: Image, chance: np.random.Generator) -> Image:
        """Draw another brightness, contrast and saturation for an image."""
        if not self.colour:
            return image
        from PIL import ImageEnhance

        kinds: tuple[Any, ...] = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for kind in kinds:
            image = kind(image).enhance(chance.uniform(1 - self.colour, 1 + self.colour))
        return image
