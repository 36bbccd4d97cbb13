"""What some steps of a run come to, without dropout: losses, gradient norms, and the way the weights went."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainworks.checks.comparing import relative
from trainworks.data.order import Integers, Plan
from trainworks.data.packing import Packs, alone
from trainworks.loop import train_steps
from trainworks.run import Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Difference", "Measured", "compare", "drops_out", "measure", "switch_off_dropout", "unpack"]


@dataclass(frozen=True)
class Measured:
    """Some steps of a run."""

    losses: tuple[float, ...]
    norms: tuple[float, ...]
    """The gradient's, before clipping."""
    changes: dict[str, Tensor]
    """By trained weight, what the steps added to it, in float32."""
    precision: str
    """`float32` or `bfloat16`: the least precise of weights and arithmetic."""

    def write(self, path: Path) -> None:
        """Write it to a safetensors file."""
        from safetensors.torch import save_file

        facts = {"losses": self.losses, "norms": self.norms, "precision": self.precision}
        save_file(self.changes, path, metadata={"facts": json.dumps(facts)})

    @classmethod
    def read(cls, path: Path) -> Measured:
        """Read what `write` wrote."""
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["facts"])
            changes = {name: file.get_tensor(name) for name in list(file.keys())}
        return cls(tuple(facts["losses"]), tuple(facts["norms"]), changes, facts["precision"])


@dataclass(frozen=True)
class Difference:
    """How far two measurements of the same steps are apart, each as a share of what was expected."""

    loss: float
    """The largest of any step."""
    norm: float
    """The largest of any step."""
    weights: float
    """How far apart the weights ended, as a share of the way they went."""

    def within(self, bounds: Difference) -> bool:
        """Tell whether none is larger than its bound; what is not a number is."""
        return self.loss <= bounds.loss and self.norm <= bounds.norm and self.weights <= bounds.weights


def compare(expected: Measured, found: Measured) -> Difference:
    """Return how far two measurements of the same steps are apart."""
    return Difference(
        loss=_farthest(expected.losses, found.losses),
        norm=_farthest(expected.norms, found.norms),
        weights=_apart(expected.changes, found.changes),
    )


def _farthest(expected: tuple[float, ...], found: tuple[float, ...]) -> float:
    return float(np.max([relative(*pair) for pair in zip(expected, found, strict=True)]))  # nan stays nan


def _apart(expected: dict[str, Tensor], found: dict[str, Tensor]) -> float:
    if expected.keys() != found.keys():
        return float("inf")
    apart = [torch.dist(change.double(), found[name].double()) for name, change in expected.items()]
    way = [change.double().norm() for change in expected.values()]
    whole, difference = (float(torch.stack(parts).norm()) for parts in (way, apart))
    return difference / whole if whole else relative(0.0, difference)


def measure(run: Run) -> Measured:
    """Take a run's steps, with dropout off. All ranks."""
    switch_off_dropout(run.model)
    before = _weights(run.model)
    steps = [(step.loss.item(), step.grad_norm.item()) for step in train_steps(run)]
    after = _weights(run.model)
    reduced = run.model.dtype == torch.bfloat16 or run.world.accelerator.mixed_precision == "bf16"
    return Measured(
        losses=tuple(loss for loss, _ in steps),
        norms=tuple(norm for _, norm in steps),
        changes={name: after[name] - weight for name, weight in before.items()},
        precision="bfloat16" if reduced else "float32",
    )


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the trained weights, whole and in float32, on the CPU."""
    trained = {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
    whole = {name: weight.full_tensor() if isinstance(weight, DTensor) else weight for name, weight in trained.items()}
    return {name: weight.to("cpu", torch.float32, copy=True) for name, weight in whole.items()}


# Dropout


def drops_out(model: PreTrainedModel) -> bool:
    """Tell whether anything of a model is dropped at random in training."""
    return any(vars(holder)[name] for holder, name in _rates(model))


def switch_off_dropout(model: PreTrainedModel) -> None:
    """Set every dropout rate of a model, its attention's and its dropped layers' too, to 0, in place."""
    for holder, name in _rates(model):
        setattr(holder, name, 0.0)


def _rates(model: PreTrainedModel) -> Iterator[tuple[Any, str]]:
    """Yield what holds a rate, and the rate's name: models keep them in modules, in plain attributes of modules, and in
    their configuration, and read them from any of these."""
    for holder in (*model.modules(), *_configurations(model.config)):
        named = "drop" in type(holder).__name__.lower()
        for name, value in vars(holder).items():
            if isinstance(value, float) and ("drop" in name or (named and name == "p")):
                yield holder, name


def _configurations(config: Any) -> Iterator[Any]:
    """Yield a model's configuration and those inside it, such as the text part's."""
    yield config
    for name in config.sub_configs:
        if (inner := getattr(config, name, None)) is not None:
            yield from _configurations(inner)


# Packing


@dataclass(frozen=True, kw_only=True)
class _RowByRow(Plan):
    """A plan over packed samples whose steps take the rows these hold."""

    packed: Plan
    packs: Packs

    def size(self, number: int) -> int:
        return len(self.step(number)[0])

    def step(self, number: int) -> tuple[Integers, Integers]:
        samples, epochs = self.packed.step(number)
        rows, owners = self.packs.take(samples)
        return rows, epochs[owners]


def unpack(run: Run) -> None:
    """Let a packed run take the very rows of each of its steps, each on a line of its own."""
    own = {field.name: getattr(run.plan, field.name) for field in fields(Plan)}  # a mixture's plan has more
    run.plan = _RowByRow(**own, packed=run.plan, packs=run.packs)
    run.packs = alone(len(run.train))
