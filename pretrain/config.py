"""What a pretraining run can say: every key of a file in `configs/pretrain`."""

from __future__ import annotations

from trainworks.schema import Full, Model, RunConfig
from trainworks.tasks import CausalLM

__all__ = ["Config"]


class Config(RunConfig[CausalLM]):
    """A pretraining run: new weights, or more training of a model on running text."""

    task: CausalLM
    """What is learned: `{type: causal-lm, block: 1024}`."""
    model: Model
    """New weights by `architecture` and `sizes`, or a pretrained model by `name`."""
    tuning: Full = Full()
    """Pretraining trains every weight."""
