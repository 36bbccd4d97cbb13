"""Weights trained or frozen by the patterns that their names match."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import TYPE_CHECKING

from trainworks.errors import ConfigError, Problem, nearest
from trainworks.schema import Freeze
from trainworks.tuning.tuned import Tuned

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["freeze"]


def freeze(tuning: Freeze, model: PreTrainedModel, auto_class: str, new_tokens: Sequence[int]) -> Tuned:
    """Train what `tuning` names, and freeze the rest in place; ConfigError for a pattern that no name matches."""
    names = [name for name, _ in model.named_parameters()]
    problems = [
        Problem("", f"tuning.{key}", f"no weight of the model is named {pattern!r}{_nearest(pattern, names)}")
        for key, patterns in (("train", tuning.train), ("freeze", tuning.freeze))
        for pattern in patterns
        if not any(fnmatchcase(name, pattern) for name in names)
    ]
    if problems:
        raise ConfigError(problems)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_matches(name, tuning.train) and not _matches(name, tuning.freeze))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("tuning.freeze: nothing is left to train; name fewer weights")
    _check_new(model, new_tokens)
    return Tuned(model)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _nearest(pattern: str, names: Sequence[str]) -> str:
    """Suggest a pattern by the longest stretch of names that is spelt alike, wherever it stands in them."""
    stretches = {part for name in names for part in _stretches(name)}
    return nearest(pattern.strip("*."), stretches) or f"; such names are {', '.join([*names[:2], names[-1]])}"


def _stretches(name: str) -> Iterable[str]:
    parts = name.split(".")
    for begin in range(len(parts)):
        yield from accumulate(parts[begin:], "{}.{}".format)


def _check_new(model: PreTrainedModel, new_tokens: Sequence[int]) -> None:
    if not new_tokens:
        return
    layers = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    frozen = {id(layer.weight) for layer in layers if not layer.weight.requires_grad}
    names = [name for name, parameter in model.named_parameters() if id(parameter) in frozen]
    if names:
        raise ConfigError(f"tuning: {names[0]} is frozen, and with it the embeddings of model.new_tokens; train it")
