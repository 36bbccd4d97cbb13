"""The two halves of a language model: the backbone that ends in hidden states, and the head that makes logits of
them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

__all__ = ["Head", "backbone", "repeated_layers"]


def backbone(model: PreTrainedModel) -> nn.Module:
    """Return the part of a language model that ends in hidden states."""
    inner: nn.Module = model.base_model
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
        return self._shaped(logits)

    def losses(self, hidden: Tensor, labels: Tensor, *, ignored: int) -> Tensor:
        """Return -log p(label) in nats, [tokens], of states [tokens, width]; 0 where the label is `ignored`.

        A plain product with weights is done a chunk at a time, and its tokens' losses must be weighed alike afterwards
        (see `head_losses`); anything else, such as an adapter on the head, makes all its logits first.
        """
        from torch import nn

        from trainworks.speed.cross_entropy import token_losses
        from trainworks.speed.loss_head import head_losses

        layer = self.model.get_output_embeddings()
        if type(layer) is nn.Linear and [name for name, _ in layer.named_parameters()] == ["weight"]:
            shape = self._shaped if self._amounts() else None
            return head_losses(hidden, layer.weight, labels, ignored=ignored, shape=shape)
        return token_losses(self(hidden), labels, ignored=ignored)

    def _amounts(self) -> dict[str, float]:
        amounts = {name: getattr(self.model.config, name, None) for name in _SCALES}
        return {name: amount for name, amount in amounts.items() if amount is not None}

    def _shaped(self, logits: Tensor) -> Tensor:
        for name, amount in self._amounts().items():
            logits = _SCALES[name](logits, amount)
        return logits
