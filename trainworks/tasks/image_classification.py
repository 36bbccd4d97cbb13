"""Image classification: one class for an image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, Strict

from trainworks.data.augmentation import Augment, generator
from trainworks.data.bad_rows import BadRow
from trainworks.data.cache import Prepared, table
from trainworks.data.columns import Kind, class_ids
from trainworks.metrics import Accuracy, MacroF1, Metric, Prediction, RankedPrediction, TopAccuracy
from trainworks.settings import Rate, Share
from trainworks.tasks.base import Baseline, Processor
from trainworks.tasks.drawing import titled
from trainworks.tasks.labels import class_facts, class_head, majority_class, several_classes, without_class
from trainworks.tasks.vision import Checked, VisionTask, image_of, pixels

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image
    from torch import Tensor
    from transformers import PreTrainedModel

    from trainworks.data.loading import Batch, Row

__all__ = ["ImageClassification", "Mixing"]


class Mixing(Augment):
    """How each training image is varied, and mixed with another one."""

    mixup: Rate = 0.0
    """Mix in another image, and its class, by a share drawn from Beta(mixup, mixup); 0 for never (Zhang et al. 2017,
    arXiv:1710.09412)."""
    cutmix: Rate = 0.0
    """Put a part of another image over it, of a share drawn from Beta(cutmix, cutmix); 0 for never (Yun et al. 2019,
    arXiv:1905.04899). Where both are given, one is drawn for each image."""


class ImageClassification(VisionTask):
    """Tell the class of an image."""

    auto_class: ClassVar[str] = "AutoModelForImageClassification"
    pipeline_tag: ClassVar[str] = "image-classification"

    type: Literal["image-classification"] = "image-classification"
    label: str = "label"
    """Column of the class: a name or a number."""
    labels: tuple[str, ...] = ()
    """Class names in the order of their numbers; found in the training rows when empty."""
    augment: Mixing = Mixing()
    """How training images are varied."""
    label_smoothing: Share = 0.0
    """Share of each label that is spread over all classes in training."""
    top: Annotated[int, Strict(), Field(gt=1)] = 5
    """The accuracy within so many guesses is measured too, where there are more classes."""

    def columns(self) -> dict[str, Kind]:
        """Return the image and the label."""
        return {self.image: "image", self.label: "label"}

    def flaws(self, rows: Dataset) -> Iterator[BadRow]:
        """Yield rows without a label, or with one that is no class."""
        return without_class(rows, self.label, self.labels)

    def resolve(self, rows: Dataset) -> Self:
        """Return the task with its class names."""
        return self.model_copy(update={"labels": several_classes(rows, self.label, self.labels)})

    def head(self) -> dict[str, Any]:
        """Return the classes for the model's configuration."""
        return class_head(self.labels)

    def prepare(self, rows: Dataset, processor: Processor, *, first: int = 0) -> Prepared:
        """Return each row whose image can be decoded, as it was encoded, with the number of its class."""
        checked = Checked(rows, self.image, first)
        labels = class_ids(rows, self.label, self.labels, first=first)
        kept = [labels[place] for place in checked.kept]
        return Prepared(table({"image": checked.images, "labels": kept}), {}, tuple(checked.refused))

    def facts(self, samples: Dataset) -> dict[str, Any]:
        """Return one counted label a row, and the rows of each class."""
        return {"tokens": 0} | class_facts(samples, self.labels)

    def paired(self) -> bool:
        """Tell whether images are mixed."""
        return self.augment.mixup > 0 or self.augment.cutmix > 0

    def collate(self, rows: Sequence[Row], processor: Processor, *, train: bool) -> Batch:
        """Return `pixel_values`, [rows, channels, height, width], and `labels`, [rows]; where images are mixed,
        `other_labels` and the `share` of the first label, [rows], too."""
        import torch

        labels = torch.tensor([int(row["labels"]) for row in rows])
        if not train:
            return {"pixel_values": pixels(processor, [image_of(row) for row in rows]), "labels": labels}
        batch = {"pixel_values": pixels(processor, [self._varied(row, row["seed"]) for row in rows]), "labels": labels}
        return batch | self._mixed(batch["pixel_values"], rows, processor) if self.paired() else batch

    def _varied(self, row: Row, seed: int, draw: int = 0) -> Image:
        image, chance = image_of(row), generator(seed, draw)
        return self.augment.coloured(self.augment.view(image.size, chance).of(image), chance)

    def _mixed(self, images: Tensor, rows: Sequence[Row], processor: Processor) -> Batch:
        """Return images [rows, channels, height, width] with a part of each row's partner in them, the partners' labels
        and the share of the first label."""
        import torch

        others = pixels(processor, [self._varied(row["partner"], row["seed"], 1) for row in rows])
        masks = torch.stack([self._mask(row["seed"], *images.shape[-2:]) for row in rows])
        return {
            "pixel_values": images * masks + others * (1 - masks),
            "other_labels": torch.tensor([int(row["partner"]["labels"]) for row in rows]),
            "share": masks.mean(dim=(1, 2, 3)),
        }

    def _mask(self, seed: int, height: int, width: int) -> Tensor:
        """Draw how much of each pixel is the first image's, [1, height, width]."""
        import torch

        chance = generator(seed, 2)
        kinds = [kind for kind in ("mixup", "cutmix") if getattr(self.augment, kind)]
        kind = kinds[int(chance.integers(len(kinds)))]
        share = float(chance.beta(*[getattr(self.augment, kind)] * 2))
        if kind == "mixup":
            return torch.full((1, height, width), share)
        mask = torch.ones(1, height, width)
        side = (1 - share) ** 0.5
        across, down = round(width * side), round(height * side)
        left, top = int(chance.integers(width - across + 1)), int(chance.integers(height - down + 1))
        mask[:, top : top + down, left : left + across] = 0
        return mask

    def drawn(self, image: Image, batch: Batch, place: int) -> Image:
        """Write the class above an image."""
        return titled(image, self.worded(batch, place))

    def worded(self, batch: Batch, place: int) -> str:
        """Return the class, or both of a mixed image with their shares."""
        own = self.labels[int(batch["labels"][place])]
        if "share" not in batch:
            return own
        share, other = float(batch["share"][place]), self.labels[int(batch["other_labels"][place])]
        return f"{own} {share:.2f}, {other} {1 - share:.2f}"

    def said(self, model: PreTrainedModel, batch: Batch) -> Batch:
        """Return the likeliest classes."""
        return {"labels": model(**self.inputs(batch)).logits.argmax(-1)}

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """Return one for each row."""
        import torch

        return {"loss": torch.ones_like(batch["labels"])}

    def loss(self, model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
        """Return each row's cross-entropy in nats; in training with smoothed and mixed labels, where those are asked
        for."""
        from torch.nn.functional import cross_entropy

        logits = model(**self.inputs(batch)).logits.float()
        smoothing = self.label_smoothing if model.training else 0.0
        own = cross_entropy(logits, batch["labels"], reduction="none", label_smoothing=smoothing)
        if "share" not in batch:
            return {"loss": own}
        other = cross_entropy(logits, batch["other_labels"], reduction="none", label_smoothing=smoothing)
        return {"loss": batch["share"] * own + (1 - batch["share"]) * other}

    def predict(self, model: PreTrainedModel, batch: Batch, processor: Processor) -> dict[int, Prediction]:
        """Return the likeliest class of each row, and how many classes are likelier than the right one."""
        logits = model(**self.inputs(batch)).logits.float()
        right = logits.gather(1, batch["labels"][:, None])
        told = (batch["index"], logits.argmax(-1), batch["labels"], (logits > right).sum(1))
        return {
            index: RankedPrediction(said, reference, rank)
            for index, said, reference, rank in zip(*(values.tolist() for values in told), strict=True)
        }

    def metrics(self) -> dict[str, Metric]:
        """Return accuracy, the mean F1 over the classes and, with many classes, the accuracy within some guesses."""
        own: dict[str, Metric] = {"accuracy": Accuracy(), "macro_f1": MacroF1(classes=tuple(range(len(self.labels))))}
        if len(self.labels) > self.top:
            within = TopAccuracy(self.top)
            own[within.name] = within
        return own

    def baselines(self, train: Dataset, evaluation: Dataset) -> dict[str, Baseline]:
        """Return `majority class`: always the commonest class of the training rows, each as likely as it is often
        there."""
        return majority_class(train, evaluation, len(self.labels))
