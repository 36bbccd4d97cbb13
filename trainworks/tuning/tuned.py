"""A model that is ready for training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

__all__ = ["Tuned"]


@dataclass(frozen=True)
class Tuned:
    """A model made ready for training: the transformers model itself and, for adapters, PEFT's wrapper around that same
    object."""

    model: PreTrainedModel
    adapter: PeftModel | None = None
    added: frozenset[str] = frozenset()
    """The names, in the wrapper's state, of what the adapter brought along, frozen parts too."""
    initial: Mapping[str, Tensor] = field(default_factory=dict)
    """By name, what the adapter's weights were when they were taken out of the model's own; empty where the model's own
    are as they were."""
