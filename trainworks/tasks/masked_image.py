"""Masked-image pretraining: draw the hidden part of an image from the rest, as a masked autoencoder does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

import numpy as np
from pydantic import PrivateAttr

from trainworks.data.augmentation import generator
from trainworks.data.cache import Prepared, table
from trainworks.data.columns import Kind
from trainworks.errors import ConfigError
from trainworks.tasks.base import Processor
from trainworks.tasks.vision import Checked, VisionTask, image_of, pixels

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedModel

    from trainworks.data.loading import Batch, Row

__all__ = ["MaskedImage"]

_EPS = 1e-6


class MaskedImage(VisionTask):
    """Draw the hidden patches of an image (He et al. 2021, arXiv:2111.06377); for models of transformers' `vit_mae`.

    The share that is hidden, and whether patches are brought to mean 0 and variance 1 before they are drawn, are the
    model's own `mask_ratio` and `norm_pix_loss`.
    """

    auto_class: ClassVar[str] = "AutoModelForPreTraining"
    pipeline_tag: ClassVar[str] = "image-feature-extraction"

    type: Literal["masked-image"] = "masked-image"

    _patches: int = PrivateAttr(0)
    _hidden: int = PrivateAttr(0)

    def columns(self) -> dict[str, Kind]:
        """Return the image."""
        return {self.image: "image"}

    def prepare(self, rows: Dataset, processor: Processor, *, first: int = 0) -> Prepared:
        """Return each row whose image can be decoded, as it was encoded."""
        checked = Checked(rows, self.image, first)
        return Prepared(table({"image": checked.images}), {}, tuple(checked.refused))

    def suits(self, outline: PreTrainedModel, processor: Processor) -> None:
        """See that the model is one that draws what is hidden of an image."""
        super().suits(outline, processor)
        if outline.config.model_type != "vit_mae":
            raise ConfigError(
                f"model: masked-image trains models of transformers' vit_mae, not {type(outline).__name__}"
            )

    def fitted(self, model: PreTrainedModel) -> Self:
        """Return the task with how many patches the model sees, and how many of them it hides."""
        task, config = self.model_copy(), model.config
        task._patches = (config.image_size // config.patch_size) ** 2
        task._hidden = task._patches - int(task._patches * (1 - config.mask_ratio))
        return task

    def collate(self, rows: Sequence[Row], processor: Processor, *, train: bool) -> Batch:
        """Return `pixel_values`, [rows, channels, height, width], and `noise`, [rows, patches], by whose order patches
        are hidden."""
        import torch

        images = []
        for row in rows:
            image, chance = image_of(row), generator(row["seed"])
            images.append(
                self.augment.coloured(self.augment.view(image.size, chance).of(image), chance) if train else image
            )
        noise = [generator(row["seed"], 1).random(self._patches, dtype=np.float32) for row in rows]
        return {"pixel_values": pixels(processor, images), "noise": torch.from_numpy(np.stack(noise))}

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Return the pixels and the noise."""
        return {"pixel_values": batch["pixel_values"], "noise": batch["noise"]}

    def said(self, model: PreTrainedModel, batch: Batch) -> Batch:
        """Return the images with what was hidden as the model draws it."""
        outputs = model(**self.inputs(batch))
        patches: Tensor = cast(Any, model).patchify(batch["pixel_values"].float())
        drawn: Tensor = outputs.logits.float()
        if model.config.norm_pix_loss:
            drawn = drawn * (patches.var(-1, keepdim=True) + _EPS) ** 0.5 + patches.mean(-1, keepdim=True)
        whole = drawn.where(outputs.mask[..., None] > 0, patches)
        return {"pixel_values": cast(Any, model).unpatchify(whole)}

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """Return the hidden patches of each row."""
        return {"loss": batch["noise"].new_full((len(batch["noise"]),), self._hidden)}

    def loss(self, model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
        """Return each row's squared error, the mean over a patch's pixels, summed over the hidden patches."""
        outputs = model(**self.inputs(batch))
        wanted: Tensor = cast(Any, model).patchify(batch["pixel_values"].float())
        if model.config.norm_pix_loss:
            wanted = (wanted - wanted.mean(-1, keepdim=True)) / (wanted.var(-1, keepdim=True) + _EPS) ** 0.5
        apart = (outputs.logits.float() - wanted).square().mean(-1)
        return {"loss": (apart * outputs.mask).sum(1)}
