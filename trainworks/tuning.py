"""Which weights are trained: all of them, or an adapter beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from trainworks.errors import ConfigError, Problem, nearest
from trainworks.schema import Full, LoRA

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = ["Tuned", "check", "tune"]


@dataclass(frozen=True)
class Tuned:
    """A model made ready for training: the transformers model itself and, for adapters, PEFT's wrapper around that same
    object."""

    model: PreTrainedModel
    adapter: PeftModel | None = None


def tune(tuning: Full | LoRA, model: PreTrainedModel, *, auto_class: str) -> Tuned:
    """Mark what is trained and, for an adapter, put it into the model in place."""
    return _TUNE[type(tuning)](tuning, model, auto_class)


def check(tuning: Full | LoRA) -> None:
    """Raise ConfigError for options PEFT does not have; before a model is loaded."""
    options = getattr(tuning, "options", {})
    if not options:
        return
    from peft import LoraConfig

    known = {field.name for field in fields(LoraConfig)}
    ours = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "targets"}
    problems = [
        Problem(
            "",
            f"tuning.options.{name}",
            f"say tuning.{ours[name]}" if name in ours else f"PEFT has no such LoRA option{nearest(name, known)}",
        )
        for name in options
        if name not in known or name in ours
    ]
    if problems:
        raise ConfigError(problems)


def _full(tuning: Full, model: PreTrainedModel, auto_class: str) -> Tuned:
    return Tuned(model.requires_grad_(True))


_TASK_TYPES = {"AutoModelForCausalLM": "CAUSAL_LM", "AutoModelForSequenceClassification": "SEQ_CLS"}


def _lora(tuning: LoRA, model: PreTrainedModel, auto_class: str) -> Tuned:
    from peft import LoraConfig, get_peft_model

    options: dict[str, Any] = {"task_type": _TASK_TYPES.get(auto_class)} | tuning.options
    try:
        adapter = get_peft_model(
            model,
            LoraConfig(
                r=tuning.rank,
                lora_alpha=tuning.alpha,  # type: ignore[arg-type]
                lora_dropout=tuning.dropout,
                target_modules=tuning.targets if isinstance(tuning.targets, str) else list(tuning.targets),
                **options,
            ),
        )
    except ValueError as error:
        raise ConfigError(f"tuning: {str(error).splitlines()[0]}") from error
    return Tuned(model, adapter)


_TUNE: dict[type, Callable[[Any, PreTrainedModel, str], Tuned]] = {Full: _full, LoRA: _lora}
