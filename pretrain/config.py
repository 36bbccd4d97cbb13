"""What a pretraining run can say: every key of a file in `configs/pretrain`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from trainworks.schema import Full, Model, RunConfig
from trainworks.tasks import CausalLM, MaskedLM

__all__ = ["Config"]


class Config(RunConfig[CausalLM | MaskedLM]):
    """A pretraining run: new weights, or more training of a model on running text."""

    task: Annotated[CausalLM | MaskedLM, Field(discriminator="type")]
    """What is learned: `{type: causal-lm, block: 1024}` or `{type: masked-lm, block: 512}`."""
    model: Model
    """New weights by `architecture` and `sizes`, or a pretrained model by `name`."""
    tuning: Full = Full()
    """Pretraining trains every weight."""
