"""The parts of a model: what reads its input, its layers, what ends in hidden states, and the head that makes logits of
them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainworks.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

__all__ = ["Head", "backbone", "embeddings", "repeated_layers", "states_at", "unknown_head"]

_AT_ONCE = 1024
"""Tokens whose logits are held together where only the likeliest is wanted."""


def backbone(model: PreTrainedModel) -> nn.Module:
    """Return the part of a language model that ends in hidden states."""
    inner: nn.Module = model.base_model
    return inner


def embeddings(model: PreTrainedModel) -> nn.Module | None:
    """Return what makes the first states of what a model reads, or None where transformers knows no such layer, as of
    many models of images."""
    try:
        inner: nn.Module = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return inner


def repeated_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the layers that a model is a stack of, in order: those that transformers keeps on one device, or where it
    names none, the lists of modules that are alike and hold weights."""
    from torch.nn import ModuleList

    if kinds := set(model._no_split_modules or ()):
        return [module for module in model.modules() if type(module).__name__ in kinds]
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        alike = isinstance(module, ModuleList) and len({type(each) for each in module}) == 1
        if alike and module not in inside and any(True for _ in module.parameters()):
            found += module.children()
            inside |= set(module.modules())
    return found


def states_at(model: PreTrainedModel, places: Tensor, **inputs: Tensor | bool) -> Tensor:
    """Return what the output layer is given at `places`, numbers in [rows x length], as [places, width].

    The model itself is called, so that whatever stands between its backbone and the layer (BERT's transform, T5's
    scale) is its own; but the layer is given nothing to work on, and no logits are made. ConfigError for a model that
    makes them without such a layer.
    """
    kept: list[Tensor] = []

    def keep(layer: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        kept.append(given[0].flatten(0, 1)[places])
        return (given[0][:, :0],)

    layer: nn.Module | None = model.get_output_embeddings()
    if layer is None:
        raise unknown_head(model)
    with layer.register_forward_pre_hook(keep):
        model(**inputs)
    if len(kept) != 1:
        raise unknown_head(model)
    return kept[0]


def unknown_head(model: PreTrainedModel) -> ConfigError:
    """Return the error for a model whose logits are not those that `Head` makes."""
    return ConfigError(
        f"model: {type(model).__name__} makes its logits in a way this version does not know, and would be trained on "
        "another loss than its own; please report the architecture"
    )


_SCALES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "logit_scale": lambda logits, scale: logits * scale,
    "logits_scaling": lambda logits, scale: logits / scale,
    "final_logit_softcapping": lambda logits, cap: (logits / cap).tanh() * cap,
}
"""What some architectures do to their logits, by the name of the setting that says how much (Cohere; Granite; Gemma
2)."""


@dataclass(frozen=True)
class Head:
    """The output head of a language model: hidden states to logits, scaled or capped as the architecture says."""

    model: PreTrainedModel

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return logits [..., vocabulary] of states [..., width]."""
        logits: Tensor = self.model.get_output_embeddings()(hidden)
        added = self._added()
        return self._shaped(logits if added is None else logits + added)

    def likeliest(self, hidden: Tensor) -> Tensor:
        """Return the likeliest token after each of some states [tokens, width], some of them at a time."""
        import torch

        return torch.cat([self(part).argmax(-1) for part in hidden.split(_AT_ONCE)])

    def losses(self, hidden: Tensor, labels: Tensor, *, ignored: int, alike: bool = True) -> Tensor:
        """Return -log p(label) in nats, [tokens], of states [tokens, width]; 0 where the label is `ignored`.

        A plain product with weights, a bias added or not, is done a chunk at a time, and its tokens' losses must be
        weighed alike afterwards (see `head_losses`), unless `alike` says that they are not, which takes longer;
        anything else, such as an adapter on the head, makes all its logits first.
        """
        from torch import nn

        from trainworks.speed.cross_entropy import token_losses
        from trainworks.speed.loss_head import head_losses, weighed_losses

        layer = self.model.get_output_embeddings()
        weights = dict(layer.named_parameters())
        if type(layer) is nn.Linear and weights.keys() <= {"weight", "bias"}:
            shape = self._shaped if self._amounts() else None
            losses = head_losses if alike else weighed_losses
            return losses(hidden, layer.weight, labels, ignored=ignored, bias=self._bias(weights), shape=shape)
        return token_losses(self(hidden), labels, ignored=ignored)

    def _bias(self, weights: Mapping[str, Tensor]) -> Tensor | None:
        terms = [term for term in (weights.get("bias"), self._added()) if term is not None]
        return functools.reduce(operator.add, terms) if terms else None

    def _added(self) -> Tensor | None:
        """Return what some architectures (BART, Marian) add to their logits, [vocabulary]."""
        buffers = dict(self.model.named_buffers(recurse=False))
        added = buffers.get("final_logits_bias")
        return None if added is None else added.flatten()

    def _amounts(self) -> dict[str, float]:
        amounts = {name: getattr(self.model.config, name, None) for name in _SCALES}
        return {name: amount for name, amount in amounts.items() if amount is not None}

    def _shaped(self, logits: Tensor) -> Tensor:
        for name, amount in self._amounts().items():
            logits = _SCALES[name](logits, amount)
        return logits
