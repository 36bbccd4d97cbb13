"""What tasks on images have in common: rows checked and kept encoded, decoded and varied where they are collated."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import pyarrow as pa

from trainworks.data.augmentation import Augment
from trainworks.data.bad_rows import BadRow
from trainworks.data.images import ImageError, decoded, encoded, processor_digest, sealed, unsealed
from trainworks.errors import ConfigError
from trainworks.record import Sample
from trainworks.tasks.base import Processor, Task
from trainworks.tasks.drawing import grid, jpeg, seen, sized

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image
    from torch import Tensor
    from transformers import PreTrainedModel

    from trainworks.data.loading import Batch, Row, Samples

__all__ = ["Checked", "VisionTask", "image_of", "pixels", "refusal"]

_PATCH = 16
_SHOWN = 4


class Checked:
    """The images of some rows that can be used: `kept`, their places among the rows, and `images`, sealed; and
    `refused`, the others."""

    def __init__(self, rows: Dataset, column: str, first: int) -> None:
        self.kept: list[int] = []
        self.refused: list[BadRow] = []
        self.sizes: list[tuple[int, int]] = []
        images = []
        for place, content in enumerate(encoded(rows, column)):
            try:
                if isinstance(content, ImageError):
                    raise content
                self.sizes.append(decoded(content).size)
            except ImageError as error:
                self.refused.append(refusal(error, first + place, column))
            else:
                self.kept.append(place)
                images.append(sealed(content))
        self.images = pa.array(images, pa.binary())


def refusal(error: ImageError, row: int, column: str) -> BadRow:
    """Return what is wrong with an image as a bad row."""
    return BadRow(error.reason, error.mend, error.found, row=row, column=column)


def image_of(row: Row, column: str = "image") -> Image:
    """Decode the image of a prepared row."""
    return decoded(unsealed(row[column]))


def pixels(processor: Processor, images: Sequence[Image]) -> Tensor:
    """Return images as the model sees them, [images, channels, height, width]."""
    made: Tensor = processor(images=list(images), return_tensors="pt")["pixel_values"]
    return made


class VisionTask(Task, ABC):
    """The base of every task on images."""

    reads: ClassVar[str] = "image_processor"

    image: str = "image"
    """Column of the image: encoded bytes, or an object with bytes or a path."""
    augment: Augment = Augment()
    """How training images are varied."""
    batch_norm: Literal["frozen", "live"] = "frozen"
    """Whether batch normalisation keeps its statistics. Live ones, which new weights of such models need, make the loss
    depend on the micro-batch."""

    def equip(self, processor: Processor) -> Processor:
        """See that the processor gives the model numbers of images."""
        try:
            pixels(processor, [_blank(64, 48)])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"model: {type(processor).__name__} does not process images alone: {error}") from error
        return processor

    def suits(self, outline: PreTrainedModel, processor: Processor) -> None:
        """See that images of every shape come out in the size the model is built for, if it is built for one."""
        shapes = {tuple(pixels(processor, [_blank(*size)]).shape[-2:]) for size in ((64, 48), (90, 150))}
        wanted = getattr(outline.config, "image_size", None)
        sides = {wanted} if isinstance(wanted, int) else {*wanted} if isinstance(wanted, list | tuple) else set()
        if self.fixed_size(outline) and (len(shapes) > 1 or (sides and not sides.issuperset(*shapes))):
            found = " and ".join(f"{height} x {width}" for height, width in sorted(shapes))
            raise ConfigError(
                f"model: the image processor makes images of {found} pixels, and the model takes {wanted or 'one size'}"
            )

    def unlike(self, other: Self) -> str:
        """Return that the classes differ, where they do."""
        return "" if other.shared() == self.shared() else "have different classes; name them all in task.labels"

    def fixed_size(self, outline: PreTrainedModel) -> bool:
        """Tell whether all images must come out in one size."""
        return True

    def adapt(self, model: PreTrainedModel, processor: Processor) -> None:
        """Do nothing: a model of images has no padding token."""

    def settle(self, model: PreTrainedModel) -> None:
        """Keep the statistics of batch normalisation, where they are to be kept."""
        from torch.nn.modules.batchnorm import _BatchNorm

        if self.batch_norm == "frozen":
            for part in model.modules():
                if isinstance(part, _BatchNorm):
                    part.eval()

    def footprint(self, samples: Samples, processor: Processor, model: PreTrainedModel) -> tuple[int, int]:
        """Return the patches of 16 x 16 pixels of an image, for a guess at memory."""
        shape = self.example(samples.rows, processor, size=1)["pixel_values"].shape
        return math.ceil(shape[-1] * shape[-2] / _PATCH**2), 1

    def fingerprint(self, processor: Processor) -> str:
        """Return a digest of the image processor."""
        return processor_digest(processor)

    def learned(self, row: Any) -> Any:
        """Return nothing: a row's labels are no tokens."""
        return np.zeros(0, dtype=np.bool_)

    def pictures(self, samples: Dataset, processor: Processor, *, number: int, train: bool) -> list[Image]:
        """Return the first samples drawn as the model sees them, with what it is taught of each."""
        batch = self._some(samples, range(min(number, len(samples))), processor, train=train)
        images = [seen(own, processor) for own in batch["pixel_values"]]
        return [self.drawn(image, batch, place) for place, image in enumerate(images)]

    def _some(self, samples: Dataset, places: Sequence[int], processor: Processor, *, train: bool) -> Batch:
        """Collate some samples, each with the next one as its partner."""
        columns = samples.with_format("numpy")[list(places)]
        rows = [
            {name: values[row] for name, values in columns.items()} | {"seed": place}
            for row, place in enumerate(places)
        ]
        paired = [row | {"partner": other} for row, other in zip(rows, [*rows[1:], *rows[:1]], strict=True)]
        return self.collate(paired, processor, train=train)

    def show(self, model: PreTrainedModel, rows: Dataset, processor: Processor) -> tuple[Sample, ...]:
        """Return some images from all over the rows, as the model sees them: drawn with what is there, and beside it
        with what the model says. All ranks."""
        places = sorted({*np.linspace(0, len(rows) - 1, _SHOWN).astype(int).tolist()})
        wanted = self._some(rows, places, processor, train=False)
        given = {name: values.to(model.device) for name, values in wanted.items()}
        told = wanted | {name: values.cpu() for name, values in self.said(model, given).items()}
        return tuple(
            Sample(
                prompt="",
                reference=self.worded(wanted, place),
                output=self.worded(told, place),
                picture=jpeg(grid([self._portrait(batch, place, processor) for batch in (wanted, told)])),
            )
            for place in range(len(places))
        )

    def _portrait(self, batch: Batch, place: int, processor: Processor) -> Image:
        return self.drawn(sized(seen(batch["pixel_values"][place], processor)), batch, place)

    @abstractmethod
    def said(self, model: PreTrainedModel, batch: Batch) -> Batch:
        """Return what the model says in the place of what a batch holds of it, to be drawn and worded alike."""

    def drawn(self, image: Image, batch: Batch, place: int) -> Image:
        """Draw onto an image what the model is taught of that place in the batch."""
        return image

    def worded(self, batch: Batch, place: int) -> str:
        """Say in a few words what the model is taught of that place in the batch; empty where a picture says it all."""
        return ""

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Return the pixels."""
        return {"pixel_values": batch["pixel_values"]}


def _blank(width: int, height: int) -> Image:
    from PIL import Image

    return Image.new("RGB", (width, height))
