"""Object detection: the things on an image, each with a class and a box."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import PrivateAttr

from trainworks.data.augmentation import generator
from trainworks.data.bad_rows import BadRow, excerpt
from trainworks.data.cache import Prepared, table
from trainworks.data.columns import Kind
from trainworks.errors import ConfigError, DataError
from trainworks.metrics import MOST_DETECTIONS, Boxes, MeanAveragePrecision, Metric, Prediction, SumOfRatios
from trainworks.settings import Count
from trainworks.tasks.base import Processor
from trainworks.tasks.drawing import boxed
from trainworks.tasks.labels import class_head
from trainworks.tasks.vision import Checked, VisionTask, image_of, pixels

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image
    from torch import Tensor
    from transformers import PreTrainedModel

    from trainworks.data.loading import Batch, Row

__all__ = ["ObjectDetection"]

_CERTAIN = 0.3
"""Least probability of a box that is drawn; metrics see them all."""


class ObjectDetection(VisionTask):
    """Find things on an image, each with its class and a box around it."""

    auto_class: ClassVar[str] = "AutoModelForObjectDetection"
    pipeline_tag: ClassVar[str] = "object-detection"

    type: Literal["object-detection"] = "object-detection"
    objects: str = "objects"
    """Column of the things: an object of lists, or a list of objects."""
    box: str = "bbox"
    """What a thing's box is called there: four numbers in pixels."""
    category: str = "category"
    """What its class is called there: a name or a number."""
    boxes: Literal["xywh", "xyxy"] = "xywh"
    """What a box's numbers are: left, top, width, height, or left, top, right, bottom."""
    labels: tuple[str, ...] = ()
    """Class names in the order of their numbers; found in the training rows when empty."""
    size: Count | None = None
    """Height and width that every image is brought to, in pixels; the image processor's own where it has one, else its
    shortest edge. Images are not padded, so that none depends on what stands beside it."""

    _queries: int = PrivateAttr(0)
    _empty_weight: float = PrivateAttr(0.0)

    def columns(self) -> dict[str, Kind]:
        """Return the image and the things."""
        return {self.image: "image", self.objects: "any"}

    def resolve(self, rows: Dataset) -> Self:
        """Return the task with its class names."""
        names = self.labels or tuple(self._declared(rows)) or tuple(self._found(rows))
        if not names:
            raise DataError(f"column '{self.objects}' holds no things, so there is nothing to find")
        return self.model_copy(update={"labels": names})

    def _declared(self, rows: Dataset) -> Sequence[str]:
        """Return the class names that the data set itself declares, in the order of their numbers."""
        from datasets import ClassLabel, List

        feature: Any = rows.features.get(self.objects)
        inner = feature.feature if isinstance(feature, List) else feature
        held = inner.get(self.category) if isinstance(inner, Mapping) else None
        kind = held.feature if isinstance(held, List) else held
        return kind.names if isinstance(kind, ClassLabel) else ()

    def _found(self, rows: Dataset) -> Iterator[str]:
        kinds = {kind for _, things in self._things(rows) for _, kind, _ in things}
        yield from map(str, sorted(kinds, key=lambda kind: (isinstance(kind, str), kind)))

    def _things(self, rows: Dataset) -> Iterator[tuple[int, list[tuple[list[float], Any, bool]]]]:
        """Yield by row its things as box, class and whether they are a crowd; DataError for a column of others."""
        for row, cell in enumerate(rows.select_columns([self.objects]).with_format("arrow")[:].column(self.objects)):
            held = cell.as_py() or []
            try:
                columns = (
                    held if isinstance(held, dict) else {key: [one[key] for one in held] for key in (held or [{}])[0]}
                )
                boxes, kinds = columns.get(self.box, []), columns.get(self.category, [])
                crowd = columns.get("crowd") or columns.get("iscrowd") or [False] * len(boxes)
                yield row, [*zip(boxes, kinds, map(bool, crowd), strict=True)]
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise DataError(
                    f"row {row}: column '{self.objects}' should hold lists `{self.box}` and `{self.category}` of one "
                    f"length: {excerpt(str(error))}; say what they are called: task.box, task.category"
                ) from error

    def equip(self, processor: Processor) -> Processor:
        """Let the processor bring all images to one size."""
        size = dict(processor.size)
        side = self.size or size.get("shortest_edge")
        if side is not None:
            processor.size = {"height": side, "width": side}
        if processor.to_dict().get("do_pad"):
            processor.do_pad = False
        return super().equip(processor)

    def suits(self, outline: PreTrainedModel, processor: Processor) -> None:
        """See that the model's loss is known."""
        from trainworks.tasks.detection_losses import FAMILIES, family_of

        if family_of(outline) is None:
            raise ConfigError(
                f"model: {type(outline).__name__} has a loss ({outline.loss_type}) that is not known here; known "
                f"are {', '.join(FAMILIES)}"
            )

    def fitted(self, model: PreTrainedModel) -> Self:
        """Return the task with how many boxes the model predicts, and what an empty one counts."""
        from trainworks.tasks.detection_losses import family_of

        family = family_of(model)
        assert family is not None, "suits refuses it"
        task = self.model_copy()
        task._empty_weight = family.empty_weight(model.config)
        if task._empty_weight:
            task._queries = int(getattr(model.config, "num_queries", 0) or model.config.num_detection_tokens)
        return task

    def settle(self, model: PreTrainedModel) -> None:
        """Leave out the parts that only denoising uses, too, which is off: it draws at random for whole batches."""
        super().settle(model)
        for name, weight in model.named_parameters():
            if "denoising_class_embed" in name:
                weight.requires_grad_(False)

    def head(self) -> dict[str, Any]:
        """Return the classes for the model's configuration."""
        return class_head(self.labels)

    def prepare(self, rows: Dataset, processor: Processor, *, first: int = 0) -> Prepared:
        """Return each row whose image can be decoded, as it was encoded, with its things.

        A box that reaches over the image's edge is cut there. One of no size, outside the image, of numbers that are
        none or of an unknown class is told with its row and left out; the row stays.
        """
        checked = Checked(rows, self.image, first)
        sizes = dict(zip(checked.kept, checked.sizes, strict=True))
        places = {name: number for number, name in enumerate(self.labels)}
        names = dict(enumerate(self._declared(rows)))
        boxes, kinds, crowds = [], [], []
        for row, things in self._things(rows):
            if row not in sizes:
                continue
            kept = []
            for number, (box, kind, crowd) in enumerate(things):
                place = places.get(names.get(kind, str(kind)), -1)
                corners, problem = self._corners(box, sizes[row]) if place >= 0 else ([], "box of unknown class")
                if problem:
                    told = f"thing {number} (from 0)"
                    found = excerpt(f"{kind} at {box} of an image {sizes[row][0]} x {sizes[row][1]}")
                    mend = f"mend the box, or take it out; the {len(places)} classes are task.labels"
                    checked.refused.append(BadRow(problem, mend, told, found, row=first + row, column=self.objects))
                else:
                    kept.append((corners, place, crowd))
            boxes.append([corners for corners, _, _ in kept])
            kinds.append([place for _, place, _ in kept])
            crowds.append([crowd for _, _, crowd in kept])
        columns = {
            "image": checked.images,
            "boxes": pa.array(boxes, pa.list_(pa.list_(pa.float32()))),
            "kinds": pa.array(kinds, pa.list_(pa.int64())),
            "crowd": pa.array(crowds, pa.list_(pa.bool_())),
        }
        return Prepared(table(columns), {}, tuple(checked.refused))

    def _corners(self, box: Sequence[float], size: tuple[int, int]) -> tuple[list[float], str]:
        """Return a box as left, top, right, bottom within the image, and what is wrong with it, if anything."""
        numbers = np.array(box, np.float64)
        if numbers.shape != (4,) or not np.isfinite(numbers).all():
            return [], "box of no four numbers"
        if self.boxes == "xywh":
            numbers[2:] += numbers[:2]
        if (numbers[2:] <= numbers[:2]).any():
            return [], "box of no size"
        inside = np.clip(numbers, 0, np.tile(size, 2))
        if (inside[2:] <= inside[:2]).any():
            return [], "box outside the image"
        return inside.tolist(), ""

    def facts(self, samples: Dataset) -> dict[str, Any]:
        """Return the things, of each class and in all."""
        counts = np.zeros(len(self.labels), np.int64)
        for kinds in samples["kinds"]:
            np.add.at(counts, np.asarray(kinds, np.int64), 1)
        return {
            "tokens": 0,
            "counted": int(counts.sum()),
            "labels": dict(zip(self.labels, counts.tolist(), strict=True)),
        }

    def collate(self, rows: Sequence[Row], processor: Processor, *, train: bool) -> Batch:
        """Return `pixel_values`, [rows, channels, height, width], `boxes`, [rows, most, 4], as centre, width and height
        in shares of the image, and `kinds`, [rows, most], -1 where a row has no more; crowds are not learned. For
        evaluation also `sizes`, [rows, 2], width and height in pixels, and `crowd`, [rows, most]."""
        import torch

        images, things = zip(*(self._viewed(row, train=train) for row in rows), strict=True)
        most = max(1, *(len(kinds) for _, kinds, _ in things)) if things else 1
        boxes, kinds = torch.zeros(len(rows), most, 4), torch.full((len(rows), most), -1)
        crowd = torch.zeros(len(rows), most, dtype=torch.bool)
        for place, (image, (corners, own, crowds)) in enumerate(zip(images, things, strict=True)):
            shares = torch.from_numpy(corners / np.tile(np.array(image.size, np.float32), 2))
            centre, size = (shares[:, :2] + shares[:, 2:]) / 2, shares[:, 2:] - shares[:, :2]
            boxes[place, : len(own)] = torch.cat([centre, size], dim=1)
            kinds[place, : len(own)] = torch.from_numpy(own)
            crowd[place, : len(own)] = torch.from_numpy(crowds)
        batch = {"pixel_values": pixels(processor, images), "boxes": boxes, "kinds": kinds}
        return batch if train else batch | {"sizes": torch.tensor([image.size for image in images]), "crowd": crowd}

    def _viewed(self, row: Row, *, train: bool) -> tuple[Any, tuple[NDArray[np.float32], NDArray[np.int64], Any]]:
        """Return an image and its things, in training the same part of both, without crowds."""
        image = image_of(row)
        number = len(row["kinds"])
        boxes = np.array([*row["boxes"]], np.float32).reshape(number, 4)
        kinds, crowd = np.array([*row["kinds"]], np.int64), np.array([*row["crowd"]], np.bool_)
        if not train:
            return image, (boxes, kinds, crowd)
        chance = generator(row["seed"])
        view = self.augment.view(image.size, chance)
        boxes, there = view.boxes(boxes)
        kept = there & ~crowd
        return self.augment.coloured(view.of(image), chance), (boxes[kept], kinds[kept], crowd[kept])

    def drawn(self, image: Image, batch: Batch, place: int) -> Image:
        """Draw the boxes onto an image."""
        from trainworks.tasks.detection_losses import corners

        there = batch["kinds"][place] >= 0
        return boxed(
            image, corners(batch["boxes"][place][there]).tolist(), batch["kinds"][place][there].tolist(), self.labels
        )

    def said(self, model: PreTrainedModel, batch: Batch) -> Batch:
        """Return the boxes that the model gives a class at least `_CERTAIN`."""
        from trainworks.tasks.detection_losses import family_of

        family = family_of(model)
        assert family is not None, "suits refuses it"
        outputs = model(**self.inputs(batch))
        chances, kinds = family.scores(outputs.logits.float()).max(-1)
        return {"boxes": outputs.pred_boxes.float(), "kinds": kinds.where(chances >= _CERTAIN, -1)}

    def worded(self, batch: Batch, place: int) -> str:
        """Return how many things of each class there are."""
        counts = Counter(kind for kind in batch["kinds"][place].tolist() if kind >= 0)
        return ", ".join(f"{counts[kind]} {self.labels[kind]}" for kind in sorted(counts)) or "nothing"

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """Return what the classes' term counts, things and where the model has it so empty boxes by their weight; and
        the things, for the boxes' term."""
        learned = batch["kinds"] >= 0
        if "crowd" in batch:
            learned = learned & ~batch["crowd"]
        things = learned.sum(1).float()
        if not self._empty_weight:
            return {"classes": things, "boxes": things}
        found = things.clamp(max=self._queries)
        return {"classes": found + self._empty_weight * (self._queries - found), "boxes": things}

    def loss(self, model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
        """Return each row's sums, by the model's own losses and weights."""
        from trainworks.tasks.detection_losses import Targets, family_of

        kinds = batch["kinds"].masked_fill(batch["crowd"], -1) if "crowd" in batch else batch["kinds"]
        first = (kinds < 0).long().argsort(dim=1, stable=True)
        boxes = batch["boxes"].gather(1, first[..., None].expand(-1, -1, 4))
        family = family_of(model)
        assert family is not None, "suits refuses it"
        return family.sums(model.config, model(**self.inputs(batch)), Targets(boxes, kinds.gather(1, first)))

    def predict(self, model: PreTrainedModel, batch: Batch, processor: Processor) -> dict[int, Prediction]:
        """Return the likeliest hundred boxes of each row, and those that are there, in pixels of the image."""
        from trainworks.tasks.detection_losses import corners, family_of

        family = family_of(model)
        assert family is not None, "suits refuses it"
        outputs = model(**self.inputs(batch))
        chances = family.scores(outputs.logits.float())
        scores, places = chances.flatten(1).topk(min(MOST_DETECTIONS, chances[0].numel()), dim=1)
        scale = batch["sizes"].repeat(1, 2)[:, None].float()
        found = corners(outputs.pred_boxes.float()) * scale
        there = (corners(batch["boxes"]) * scale).cpu().numpy()
        queries, kinds = places // chances.shape[-1], places % chances.shape[-1]
        said = {}
        for row, index in enumerate(batch["index"].tolist()):
            own = batch["kinds"][row].cpu().numpy()
            said[index] = Prediction(
                Boxes(
                    found[row, queries[row]].cpu().numpy(), kinds[row].cpu().numpy(), scores=scores[row].cpu().numpy()
                ),
                Boxes(there[row][own >= 0], own[own >= 0], crowd=batch["crowd"][row].cpu().numpy()[own >= 0]),
            )
        return said

    def metrics(self) -> dict[str, Metric]:
        """Return COCO's mean average precision: over all overlaps, and at those of 0.5 and 0.75."""
        number = len(self.labels)
        own = [MeanAveragePrecision(number), MeanAveragePrecision(number, at=50), MeanAveragePrecision(number, at=75)]
        return {metric.name: metric for metric in own}

    def loss_metrics(self) -> dict[str, Metric]:
        """Return the loss: the sum of its terms."""
        return {"loss": SumOfRatios("loss", higher_is_better=False)}
