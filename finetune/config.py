"""What a fine-tuning run can say: every key of a file in `configs/finetune`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from trainworks.schema import Pretrained, RunConfig
from trainworks.tasks import (
    SFT,
    CausalLM,
    MaskedLM,
    Preference,
    QuestionAnswering,
    Reward,
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
        | MaskedLM,
        Field(discriminator="type"),
    ]
    """What is learned: `{type: sft, ...}`, `{type: sequence-classification, ...}`, and so on."""
    model: Pretrained
    """The model it begins from."""
