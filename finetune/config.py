"""What a fine-tuning run can say: every key of a file in `configs/finetune`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from trainworks.schema import Pretrained, RunConfig
from trainworks.tasks import (
    SFT,
    CausalLM,
    ImageClassification,
    MaskedImage,
    MaskedLM,
    ObjectDetection,
    Preference,
    QuestionAnswering,
    Reward,
    SemanticSegmentation,
    Seq2Seq,
    SequenceClassification,
    SequenceRegression,
    Task,
    TokenClassification,
)

__all__ = ["Config"]


class Config(RunConfig[Task]):
    """A fine-tuning run: a pretrained model, taught a task."""

    task: Annotated[
        SFT
        | SequenceClassification
        | SequenceRegression
        | TokenClassification
        | QuestionAnswering
        | Seq2Seq
        | Preference
        | Reward
        | CausalLM
        | MaskedLM
        | ImageClassification
        | SemanticSegmentation
        | ObjectDetection
        | MaskedImage,
        Field(discriminator="type"),
    ]
    """What is learned: `{type: sft, ...}`, `{type: image-classification, ...}`, or another task by its type."""
    model: Pretrained
    """The model it begins from."""
