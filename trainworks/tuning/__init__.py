"""Which weights are trained: all of them, some, or an adapter beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from trainworks.errors import ConfigError
from trainworks.schema import Freeze, FromScratch, Full, LoRA, Peft, Pretrained
from trainworks.tuning.adapters import add_lora, add_peft, check_lora, check_peft, quantised
from trainworks.tuning.patterns import freeze
from trainworks.tuning.tuned import Tuned

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Tuned", "Tuning", "check", "lr_ratio", "quantised", "rehearse", "tune"]

Tuning = Full | Freeze | LoRA | Peft


def tune(tuning: Tuning, model: PreTrainedModel, *, auto_class: str, new_tokens: Sequence[int] = ()) -> Tuned:
    """Mark what is trained and, for an adapter, put it into the model in place.

    The embeddings of `new_tokens`, by id, are trained in any case; ConfigError where they cannot be.
    """
    return _TUNE[type(tuning)](tuning, model, auto_class, new_tokens)


def check(tuning: Tuning, model: Pretrained | FromScratch) -> None:
    """Raise ConfigError for options PEFT does not have, and for what cannot train beside the model's settings; before
    a model is loaded."""
    _CHECK[type(tuning)](tuning, model)


def rehearse(tuning: Tuning, outline: PreTrainedModel, *, auto_class: str, new_tokens: Sequence[int] = ()) -> Tuned:
    """Tune a model that has no weights; ConfigError for what would fail, or pass unheeded, on the real one."""
    return _REHEARSE[type(tuning)](tuning, outline, auto_class, new_tokens)


def lr_ratio(tuning: Tuning, name: str) -> float:
    """Return a weight's learning rate over the run's, by its name."""
    return tuning.b_lr_ratio if isinstance(tuning, LoRA) and _is_second(name) else 1.0


def _is_second(name: str) -> bool:
    return ".lora_B." in name or ".lora_embedding_B." in name


def _full(tuning: Full, model: PreTrainedModel, auto_class: str, new_tokens: Sequence[int]) -> Tuned:
    return Tuned(model.requires_grad_(True))


def _check_whole(tuning: Full | Freeze, model: Pretrained | FromScratch) -> None:
    if quantised(model):
        raise ConfigError(
            f"model.quantise: weights that are rounded cannot be trained, as tuning: {tuning.type} asks; train an "
            "adapter beside them (tuning: {type: lora})"
        )


def _rehearse_lora(tuning: LoRA, outline: PreTrainedModel, auto_class: str, new_tokens: Sequence[int]) -> Tuned:
    # How the adapter's weights begin may be computed from the model's, which are not there.
    return add_lora(
        tuning.model_copy(update={"options": tuning.options | {"init_lora_weights": False}}),
        outline,
        auto_class,
        new_tokens,
    )


_TUNE: dict[type, Callable[[Any, PreTrainedModel, str, Sequence[int]], Tuned]] = {
    Full: _full,
    Freeze: freeze,
    LoRA: add_lora,
    Peft: add_peft,
}
_REHEARSE: dict[type, Callable[[Any, PreTrainedModel, str, Sequence[int]], Tuned]] = {
    Full: _full,
    Freeze: freeze,
    LoRA: _rehearse_lora,
    Peft: add_peft,
}
_CHECK: dict[type, Callable[[Any, Pretrained | FromScratch], None]] = {
    Full: _check_whole,
    Freeze: _check_whole,
    LoRA: check_lora,
    Peft: check_peft,
}
