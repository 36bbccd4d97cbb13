"""Adapters of PEFT, put into a model in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from trainworks.errors import ConfigError, Problem, nearest
from trainworks.heads import backbone
from trainworks.schema import FromScratch, LoRA, Peft, Pretrained
from trainworks.tuning.tuned import Tuned

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

__all__ = ["add_lora", "add_peft", "check_lora", "check_peft", "quantised"]

_OURS = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "targets"}
_NEW_TOKENS = {"trainable_token_indices": "model.new_tokens"}
_FROM_DATA = ("corda", "eva", "lora_ga", "loftq")
"""Beginnings that PEFT computes from rows of data, or from weights before they were quantised."""
_FROM_BASE = ("pissa", "olora")
"""Beginnings that are taken out of the base model's weights."""


def quantised(model: Pretrained | FromScratch) -> bool:
    """Tell whether the model's weights are rounded to a few bits when they are read."""
    return isinstance(model, Pretrained) and model.quantise is not None


def check_lora(tuning: LoRA, model: Pretrained | FromScratch) -> None:
    """Raise ConfigError for options that LoRA does not have, or that this library cannot begin with."""
    from peft import LoraConfig

    _check_options(LoraConfig, tuning.options, {name: f"tuning.{ours}" for name, ours in _OURS.items()} | _NEW_TOKENS)
    begin = str(tuning.options.get("init_lora_weights", True)).lower()
    where = f"tuning.options.init_lora_weights: {begin}"
    if begin.startswith(_FROM_DATA):
        raise ConfigError(f"{where} is computed from data before training, which is not supported; take pissa, say")
    if begin.startswith(_FROM_BASE):
        if quantised(model):
            raise ConfigError(f"{where} changes the base model's weights, and model.quantise rounds them; take one")
        if both := [name for name in ("rank_pattern", "alpha_pattern") if tuning.options.get(name)]:
            raise ConfigError(f"{where} wants one rank and alpha for all layers; leave out tuning.options.{both[0]}")


def check_peft(tuning: Peft, model: Pretrained | FromScratch) -> None:
    """Raise ConfigError for a method that PEFT does not have or that cannot be trained here, or an unknown option."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    methods = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    method = tuning.method.upper()
    if method not in methods:
        raise ConfigError(f"tuning.method: PEFT has no {tuning.method!r}{nearest(method, methods)}")
    if reason := _unfit(method, methods[method]):
        raise ConfigError(f"tuning.method: {method} {reason}")
    if tuning.merge and method in _UNMERGED:
        raise ConfigError(f"tuning.merge: PEFT cannot work {method} into the base model; leave it out")
    _check_options(methods[method], tuning.options, _NEW_TOKENS)


_UNFIT = {
    "LORA": "has a type of its own; say tuning: {type: lora}",
    "ADALORA": "changes its ranks between steps, which is not supported",
    "ADAMSS": "begins with the model's weights, which are not there when it is tried; take tuning: {type: lora}",
    "FROD": "begins with the model's weights, which are not there when it is tried; take tuning: {type: lora}",
    "SHIRA": "chooses among the model's weights, which are not there when it is tried; take tuning: {type: lora}",
    "SHADOW": "runs a model of its own beside this one, which is not supported",
    "POLY": "is told apart by task ids, which rows do not have",
    "XLORA": "mixes adapters that are there already",
    "TRAINABLE_TOKENS": "trains rows of the embeddings alone; say model.new_tokens beside another tuning",
}


_UNMERGED = ("ADAPTION_PROMPT", "LILY")
"""Methods that PEFT cannot work into a base model."""


def _unfit(method: str, config: type[PeftConfig]) -> str:
    from peft import PromptLearningConfig

    if issubclass(config, PromptLearningConfig):
        return "puts tokens of its own before a row's, which is not supported; take one that changes layers"
    return _UNFIT.get(method, "")


def _check_options(config: type[PeftConfig], options: Mapping[str, Any], ours: Mapping[str, str]) -> None:
    known = {field.name for field in fields(config)}
    kind = config.__name__.removesuffix("Config")
    kind = "LoRA" if kind == "Lora" else kind
    problems = [
        Problem(
            "",
            f"tuning.options.{name}",
            f"say {ours[name]}" if name in ours else f"PEFT has no such {kind} option{nearest(name, known)}",
        )
        for name in options
        if name not in known or name in ours
    ]
    if problems:
        raise ConfigError(problems)


_TASK_TYPES = {
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForQuestionAnswering": "QUESTION_ANS",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForTokenClassification": "TOKEN_CLS",
}
_HEADS = {
    "AutoModelForQuestionAnswering": ["qa_outputs"],
    "AutoModelForTokenClassification": ["classifier", "score"],
}
"""Heads that PEFT trains whole by these tasks' types, and which `all-linear` takes all the same (peft 0.21), so that it
refuses its own choice; delete once it spares them, as it does those of SEQ_CLS."""


_NEW_HEADS = ("AutoModelForImageClassification", "AutoModelForObjectDetection", "AutoModelForSemanticSegmentation")
"""Of tasks that PEFT has no type for, those whose heads are drawn anew, and so are trained whole."""


def _usual_options(model: PreTrainedModel, auto_class: str) -> dict[str, Any]:
    """Return what PEFT is told of the head: by the type of a task that it knows, or by its parts' names."""
    if auto_class in _NEW_HEADS:
        return {"modules_to_save": _heads(model)}
    spared = {"exclude_modules": _HEADS[auto_class]} if auto_class in _HEADS else {}
    return {"task_type": _TASK_TYPES.get(auto_class)} | spared


_BODY = "backbone"
"""What transformers calls a model's body that is none of its own base models, as UperNet's."""
_HEADS_INSIDE = ("class_embed", "enc_score_head")
"""What it calls the layers that tell classes where these stand inside the body, as RT-DETR's."""


def _heads(model: PreTrainedModel) -> list[str]:
    """Return the names of what a model has beside its body, and of the layers inside of it that tell classes."""
    from torch.nn import Linear

    body = backbone(model)
    beside = [name for name, part in model.named_children() if part is not body and name != _BODY]
    return [
        name
        for name, part in model.named_modules()
        if (name in beside and [*part.parameters()])
        or (isinstance(part, Linear) and {*name.split(".")[1:]}.intersection(_HEADS_INSIDE))
    ]


def add_lora(tuning: LoRA, model: PreTrainedModel, auto_class: str, new_tokens: Sequence[int]) -> Tuned:
    """Put low-rank updates into the model; ConfigError for what does not fit it."""
    from peft import LoraConfig

    options: dict[str, Any] = _usual_options(model, auto_class) | tuning.options
    targets = (tuning.targets,) if isinstance(tuning.targets, str) else tuning.targets
    _require(model, "tuning.targets", [name for name in targets if name not in _ALL])
    _require(model, "tuning.options.modules_to_save", options.get("modules_to_save") or ())

    def config() -> PeftConfig:
        return LoraConfig(
            r=tuning.rank,
            lora_alpha=tuning.alpha,  # type: ignore[arg-type]
            lora_dropout=tuning.dropout,
            target_modules=_named(model, targets, options.get("modules_to_save") or ()),
            trainable_token_indices=_rows(model, new_tokens),
            **options,
        )

    tuned = _added(model, config)
    begin = str(options.get("init_lora_weights", True)).lower()
    return replace(tuned, initial=_low_rank(tuned)) if begin.startswith(_FROM_BASE) else tuned


_ALL = ("all-linear", "all-layers")


def _named(model: PreTrainedModel, targets: Sequence[str], apart: Sequence[str]) -> str | list[str]:
    """Return the layers to adapt as PEFT takes them: of all of them the linear ones and the convolutions, but for those
    in groups, into which a low rank does not divide, and what is trained whole, or makes a vocabulary's logits."""
    if "all-layers" not in targets:
        return "all-linear" if "all-linear" in targets else list(targets)
    from torch.nn import Conv2d, Linear

    output = model.get_output_embeddings()
    return [
        name
        for name, part in model.named_modules()
        if isinstance(part, Linear | Conv2d)
        and getattr(part, "groups", 1) == 1
        and part is not output
        and not any(f"{name}.".startswith(f"{head}.") for head in apart)
    ]


def _low_rank(tuned: Tuned) -> dict[str, Tensor]:
    assert tuned.adapter is not None
    return {
        name: weight.detach().cpu().clone()
        for name, weight in tuned.adapter.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }


def add_peft(tuning: Peft, model: PreTrainedModel, auto_class: str, new_tokens: Sequence[int]) -> Tuned:
    """Put an adapter of any of PEFT's methods into the model; ConfigError for what does not fit it."""
    from peft import get_peft_config

    for key in ("target_modules", "modules_to_save"):
        names = tuning.options.get(key) or ()
        _require(model, f"tuning.options.{key}", () if isinstance(names, str) else names)
    given = {"peft_type": tuning.method.upper()} | _usual_options(model, auto_class) | tuning.options
    if new_tokens:
        raise ConfigError(
            f"tuning.method: {tuning.method} cannot train the embeddings of model.new_tokens beside it; say tuning: "
            "{type: lora}"
        )
    return _added(model, lambda: get_peft_config(given))


def _added(model: PreTrainedModel, config: Callable[[], PeftConfig]) -> Tuned:
    from peft import get_peft_model

    there = {id(tensor) for tensor in chain(model.parameters(), model.buffers())}
    try:
        adapter: PeftModel = get_peft_model(model, config())
    except (
        AssertionError,
        AttributeError,
        KeyError,
        NotImplementedError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise ConfigError(f"tuning: {str(error).splitlines()[0]}") from error
    named = chain(adapter.named_parameters(remove_duplicate=False), adapter.named_buffers(remove_duplicate=False))
    return Tuned(model, adapter, frozenset(name for name, tensor in named if id(tensor) not in there))


def _rows(model: PreTrainedModel, new_tokens: Sequence[int]) -> dict[str, list[int]] | None:
    """Return which rows of which layers belong to the new tokens; of tied embeddings, PEFT ties the rows too."""
    if not new_tokens:
        return None
    layers = {
        id(layer.weight): layer for layer in (model.get_output_embeddings(), model.get_input_embeddings()) if layer
    }
    return {name: list(new_tokens) for name, part in model.named_modules() if part in layers.values()}


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
