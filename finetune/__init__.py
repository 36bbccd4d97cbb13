"""Fine-tune a pretrained model, all weights or an adapter, with one loop on Accelerate.

accelerate launch -m finetune configs/finetune/demo.yaml
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.config import Config
from trainworks.lazy import exports

if TYPE_CHECKING:
    from finetune.recipe import prepare
    from trainworks.training import fit

__all__ = ["Config", "fit", "prepare"]

__getattr__ = exports(__name__, fit="trainworks.training", prepare="finetune.recipe")
