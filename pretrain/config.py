"""What a pretraining run can say: every key of a file in `configs/pretrain`."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from trainworks.schema import FromScratch, Full, Model, RunConfig
from trainworks.tasks import (
    CausalLM,
    ImageClassification,
    MaskedImage,
    MaskedLM,
    ObjectDetection,
    SemanticSegmentation,
    Task,
)

__all__ = ["Config"]


class Config(RunConfig[Task]):
    """A pretraining run: new weights, or more training of a model on running text or images."""

    task: Annotated[
        CausalLM | MaskedLM | MaskedImage | ImageClassification | SemanticSegmentation | ObjectDetection,
        Field(discriminator="type"),
    ]
    """What is learned: `{type: causal-lm, block: 1024}`, `{type: masked-image}`, and so on."""
    model: Model
    """New weights by `architecture` and `sizes`, or a pretrained model by `name`."""
    tuning: Full = Full()
    """Pretraining trains every weight."""

    @model_validator(mode="after")
    def _reads(self) -> Self:
        if isinstance(self.model, FromScratch) and getattr(self.model, self.task.reads) is None:
            raise ValueError(f"model: task {self.task.type} needs model.{self.task.reads}")
        return self
