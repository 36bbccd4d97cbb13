"""Pretrain a language model from scratch, or go on pretraining one, with one loop on Accelerate.

accelerate launch -m pretrain configs/pretrain/demo.yaml
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain.config import Config
from trainworks.lazy import exports

if TYPE_CHECKING:
    from pretrain.recipe import prepare
    from trainworks.training import fit

__all__ = ["Config", "fit", "prepare"]

__getattr__ = exports(__name__, fit="trainworks.training", prepare="pretrain.recipe")
