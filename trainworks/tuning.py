"""Which weights are trained: all of them, or an adapter beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from trainworks.errors import ConfigError, Problem, nearest
from trainworks.schema import Full, LoRA

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = ["Tuned", "check", "rehearse", "tune"]


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


def rehearse(tuning: Full | LoRA, outline: PreTrainedModel, *, auto_class: str) -> Tuned:
    """Tune a model that has no weights; ConfigError for what would fail, or pass unheeded, on the real one."""
    if isinstance(tuning, LoRA):
        # How the adapter's weights begin may be computed from the model's, which are not there.
        tuning = tuning.model_copy(update={"options": tuning.options | {"init_lora_weights": False}})
    return tune(tuning, outline, auto_class=auto_class)


def _full(tuning: Full, model: PreTrainedModel, auto_class: str) -> Tuned:
    return Tuned(model.requires_grad_(True))


_TASK_TYPES = {
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "AutoModelForSequenceClassification": "SEQ_CLS",
}


def _lora(tuning: LoRA, model: PreTrainedModel, auto_class: str) -> Tuned:
    from peft import LoraConfig, get_peft_model

    options: dict[str, Any] = {"task_type": _TASK_TYPES.get(auto_class)} | tuning.options
    targets = (tuning.targets,) if isinstance(tuning.targets, str) else tuning.targets
    _require(model, "tuning.targets", [name for name in targets if name != "all-linear"])
    _require(model, "tuning.options.modules_to_save", options.get("modules_to_save") or ())
    try:
        config = LoraConfig(
            r=tuning.rank,
            lora_alpha=tuning.alpha,  # type: ignore[arg-type]
            lora_dropout=tuning.dropout,
            target_modules="all-linear" if "all-linear" in targets else list(targets),
            **options,
        )
        adapter = get_peft_model(model, config)
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        raise ConfigError(f"tuning: {str(error).splitlines()[0]}") from error
    return Tuned(model, adapter)


def _require(model: PreTrainedModel, key: str, names: Iterable[str]) -> None:
    """Refuse names that no layer of the model has: PEFT passes over one in silence when another fits."""
    layers = [f".{name}" for name, _ in model.named_modules()]
    missing = [name for name in names if not any(layer.endswith(f".{name}") for layer in layers)]
    if missing:
        from torch.nn import Linear

        linear = sorted({name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, Linear)})
        raise ConfigError(
            [
                Problem(
                    "",
                    key,
                    f"the model has no layer {name!r}{nearest(name, linear)}; its linear layers are "
                    f"{', '.join(linear)}",
                )
                for name in missing
            ]
        )


_TUNE: dict[type, Callable[[Any, PreTrainedModel, str], Tuned]] = {Full: _full, LoRA: _lora}
