"""Semantic segmentation: the class of every pixel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, Strict

from trainworks.data.augmentation import generator
from trainworks.data.cache import Prepared, ragged, table
from trainworks.data.columns import Kind
from trainworks.data.images import ImageError, encoded, mask_values, sealed, unsealed
from trainworks.errors import ConfigError, DataError
from trainworks.metrics import MeanIoU, Metric, PixelAccuracy, Prediction
from trainworks.tasks.base import Baseline, Processor
from trainworks.tasks.drawing import masked
from trainworks.tasks.labels import class_head
from trainworks.tasks.vision import Checked, VisionTask, image_of, pixels, refusal

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image
    from torch import Tensor
    from transformers import PreTrainedModel

    from trainworks.data.loading import Batch, Row

__all__ = ["SemanticSegmentation"]

_IGNORED = -100
_MOST_CLASSES = 1000
_WORDED = 5


class SemanticSegmentation(VisionTask):
    """Tell the class of every pixel of an image."""

    auto_class: ClassVar[str] = "AutoModelForSemanticSegmentation"
    pipeline_tag: ClassVar[str] = "image-segmentation"

    type: Literal["semantic-segmentation"] = "semantic-segmentation"
    mask: str = "mask"
    """Column of the mask: an image of one channel, as large as the other, whose values are class numbers."""
    holds: Literal["classes", "instances"] = "classes"
    """What a mask's values number: classes, or things of one class on a background of 0."""
    labels: tuple[str, ...] = ()
    """Class names in the order of their numbers; numbers, as many as the training masks hold, when empty."""
    ignore: Annotated[int, Strict(), Field(ge=0)] = 255
    """The value of pixels that are neither learned nor measured."""
    reduce_labels: bool = False
    """Ignore the value 0 as well, and take 1 for the first class, as ADE20K's masks have it."""

    def columns(self) -> dict[str, Kind]:
        """Return the image and the mask."""
        return {self.image: "image", self.mask: "image"}

    def resolve(self, rows: Dataset) -> Self:
        """Return the task with its class names."""
        if self.labels:
            return self
        if self.holds == "instances":
            return self.model_copy(update={"labels": ("background", "foreground")})
        return self.model_copy(update={"labels": tuple(map(str, range(self._num_classes(rows))))})

    def _num_classes(self, rows: Dataset) -> int:
        largest = 0
        for content in encoded(rows, self.mask):
            try:
                if not isinstance(content, ImageError):
                    largest = max(largest, int(self._classes(mask_values(content)).max(initial=0)))
            except ImageError:
                continue  # told by `prepare`
        if not 0 < largest < _MOST_CLASSES:
            raise DataError(
                f"column '{self.mask}': the masks hold classes up to {largest}; expected 1 to {_MOST_CLASSES - 1}. "
                "Do they number things (task.holds: instances)?"
            )
        return largest + 1

    def _classes(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return a mask's classes, those to be ignored as -100."""
        if self.holds == "instances":
            return (values > 0).astype(np.int64)
        ignored = values == self.ignore
        if self.reduce_labels:
            ignored, values = ignored | (values == 0), values - 1
        return np.where(ignored, _IGNORED, values)

    def suits(self, outline: PreTrainedModel, processor: Processor) -> None:
        """See that images come out whole, as their masks do."""
        super().suits(outline, processor)
        if processor.to_dict().get("do_center_crop"):
            raise ConfigError("model: the image processor cuts images to their centre, where a mask would be another's")

    def settle(self, model: PreTrainedModel) -> None:
        """Leave out UperNet's second head, too, which does not touch what is said."""
        super().settle(model)
        for name, weight in model.named_parameters():
            if "auxiliary_head" in name:
                weight.requires_grad_(False)

    def head(self) -> dict[str, Any]:
        """Return the classes for the model's configuration."""
        return class_head(self.labels)

    def prepare(self, rows: Dataset, processor: Processor, *, first: int = 0) -> Prepared:
        """Return each row whose image and mask can be decoded and are alike in size, as they were encoded, with the
        pixels of each class."""
        checked = Checked(rows, self.image, first)
        sizes = dict(zip(checked.kept, checked.sizes, strict=True))
        kept, masks, counts = [], [], []
        for place, content in enumerate(encoded(rows, self.mask)):
            if place not in sizes:
                continue
            try:
                counts.append(self._counted(content, sizes[place]))
            except ImageError as error:
                checked.refused.append(refusal(error, first + place, self.mask))
            else:
                kept.append(checked.kept.index(place))
                masks.append(sealed(content))  # type: ignore[arg-type]
        columns = {
            "image": checked.images.take(pa.array(kept, pa.int64())),
            "mask": pa.array(masks, pa.binary()),
            "pixels": ragged(counts, np.int64),
        }
        return Prepared(table(columns), {}, tuple(checked.refused))

    def _counted(self, content: bytes | ImageError, size: tuple[int, int]) -> NDArray[np.int64]:
        """Return the pixels of each class; ImageError for a mask unlike its image, or with other classes."""
        if isinstance(content, ImageError):
            raise content
        classes = self._classes(mask_values(content))
        if classes.shape != size[::-1]:
            found = f"mask {classes.shape[1]} x {classes.shape[0]}, image {size[0]} x {size[1]}"
            raise ImageError("mask unlike its image", "give it the image's width and height", found)
        learned = classes[classes != _IGNORED]
        if learned.size and not 0 <= learned.max() < len(self.labels):
            mend = f"the classes are 0 to {len(self.labels) - 1}; pixels to leave out hold task.ignore ({self.ignore})"
            raise ImageError("unknown class in mask", mend, str(learned.max()))
        if not learned.size:
            raise ImageError("nothing to learn", "leave such images out", f"all pixels are {self.ignore}")
        return np.bincount(learned, minlength=len(self.labels))

    def facts(self, samples: Dataset) -> dict[str, Any]:
        """Return the pixels that count, and the images that show each class."""
        there = np.stack(samples.with_format("numpy")["pixels"][:])
        shown = dict(zip(self.labels, (there > 0).sum(axis=0).tolist(), strict=True))
        return {"tokens": 0, "counted": int(there.sum()), "labels": shown}

    def collate(self, rows: Sequence[Row], processor: Processor, *, train: bool) -> Batch:
        """Return `pixel_values`, [rows, channels, height, width], and `labels`, [rows, height, width], -100 where
        nothing is learned. For evaluation also `masks`, the same in the images' own sizes, [rows, highest, widest], and
        those, `sizes`, [rows, 2]."""
        import torch

        pairs = [self._pair(row, train=train) for row in rows]
        images = pixels(processor, [image for image, _ in pairs])
        height, width = images.shape[-2:]
        labels = [np.asarray(mask.resize((width, height), resample=0)) for _, mask in pairs]
        batch = {"pixel_values": images, "labels": torch.from_numpy(np.stack(labels)).long()}
        if train:
            return batch
        sizes = torch.tensor([[mask.height, mask.width] for _, mask in pairs])
        masks = torch.full((len(rows), *sizes.amax(0).tolist()), _IGNORED)
        for whole, (_, mask) in zip(masks, pairs, strict=True):
            whole[: mask.height, : mask.width] = torch.from_numpy(np.array(mask))
        return batch | {"masks": masks, "sizes": sizes}

    def _pair(self, row: Row, *, train: bool) -> tuple[Image, Image]:
        """Return an image and its mask of classes, in training the same part of both."""
        from PIL import Image

        image, values = image_of(row), self._classes(mask_values(unsealed(row["mask"])))
        mask = Image.fromarray(values.astype(np.int32))
        if not train:
            return image, mask
        chance = generator(row["seed"])
        view = self.augment.view(image.size, chance)
        return self.augment.coloured(view.of(image), chance), view.of(mask)

    def drawn(self, image: Image, batch: Batch, place: int) -> Image:
        """Lay the classes over an image."""
        return masked(image, batch["labels"][place].numpy())

    def said(self, model: PreTrainedModel, batch: Batch) -> Batch:
        """Return the likeliest class of each pixel."""
        logits = model(**self.inputs(batch)).logits.float()
        return {"labels": _enlarged(logits, batch["labels"].shape[1:]).argmax(1)}

    def worded(self, batch: Batch, place: int) -> str:
        """Return the classes' shares of the image, the largest first."""
        mask = batch["labels"][place]
        counts = mask[mask >= 0].bincount(minlength=len(self.labels))
        largest = [number for number in counts.argsort(descending=True)[:_WORDED].tolist() if counts[number]]
        return ", ".join(f"{self.labels[number]} {int(counts[number]) / mask.numel():.1%}" for number in largest)

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """Return the pixels of each row that are learned."""
        return {"loss": (batch["labels"] != _IGNORED).sum((1, 2))}

    def loss(self, model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
        """Return each row's cross-entropy in nats, summed over its pixels."""
        from torch.nn.functional import cross_entropy

        logits = _enlarged(model(**self.inputs(batch)).logits.float(), batch["labels"].shape[1:])
        return {"loss": cross_entropy(logits, batch["labels"], reduction="none", ignore_index=_IGNORED).sum((1, 2))}

    def predict(self, model: PreTrainedModel, batch: Batch, processor: Processor) -> dict[int, Prediction]:
        """Return, by class, the pixels of each row that are right, predicted and there, in the image's own size."""
        logits = model(**self.inputs(batch)).logits.float()
        told = zip(batch["index"].tolist(), logits, batch["masks"], batch["sizes"].tolist(), strict=True)
        return {index: self._compared(own, mask, height, width) for index, own, mask, (height, width) in told}

    def _compared(self, logits: Tensor, mask: Tensor, height: int, width: int) -> Prediction:
        said = _enlarged(logits[None], (height, width))[0].argmax(0)
        truth = mask[:height, :width]
        said, truth = said[truth != _IGNORED], truth[truth != _IGNORED]
        right, predicted, there = (
            values.bincount(minlength=len(self.labels)).cpu().numpy() for values in (truth[said == truth], said, truth)
        )
        return Prediction(np.stack([right, predicted]), there)

    def metrics(self) -> dict[str, Metric]:
        """Return the mean intersection over union and the share of pixels that are right."""
        return {"mean_iou": MeanIoU(), "pixel_accuracy": PixelAccuracy()}

    def baselines(self, train: Dataset, evaluation: Dataset) -> dict[str, Baseline]:
        """Return `commonest class`: every pixel of the class that has most of the training pixels, each class as likely
        as it is often there."""
        counts = np.stack(train.with_format("numpy")["pixels"][:]).sum(axis=0) + 1
        there = np.stack(evaluation.with_format("numpy")["pixels"][:])
        losses = np.stack([there @ -np.log(counts / counts.sum()), there.sum(axis=1)], axis=1)
        said = np.eye(len(counts), dtype=np.int64)[counts.argmax()]
        return {
            "commonest class": Baseline(
                losses,
                {row: Prediction(np.stack([own * said, own.sum() * said]), own) for row, own in enumerate(there)},
            )
        }


def _enlarged(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Return logits [rows, classes, h, w] at another height and width."""
    from torch.nn.functional import interpolate

    return interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)
