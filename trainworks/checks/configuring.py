"""The run file of a check: a user's own, made short, and kept from everything outside."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import finetune
import pretrain
from trainworks.config import dump
from trainworks.schema import Budget, Every, RunConfig

__all__ = ["eased", "recipe_of", "said_eased", "shortened", "write_run_file"]

_RECIPES: dict[type, str] = {pretrain.Config: "pretrain", finetune.Config: "finetune"}
_SMALLEST_EPS = {"adamw": 1e-5, "sgd": 0.0}


def recipe_of(config: RunConfig[Any]) -> str:
    """Return the package that runs a configuration."""
    return _RECIPES[type(config)]


def shortened(config: RunConfig[Any], output: Path, *, steps: int, save: int) -> RunConfig[Any]:
    """Return the same run for some steps, every one logged, into another folder, without trackers or Hub."""
    return config.model_copy(
        update={
            "output": str(output),
            "budget": Budget(steps=steps),
            "every": Every(log=1, save=save),
            "trackers": (),
            "hub": None,
        }
    )


def eased(config: RunConfig[Any]) -> RunConfig[Any]:
    """Return the same run with an AdamW whose `eps` is not smaller than 1e-5.

    It divides by the gradient's size: where a gradient is next to nothing, as that of a key's bias, a small `eps` makes
    whole steps of rounding, and two ways to compute the same come apart.
    """
    optim = config.optim
    larger = optim.model_copy(update={"eps": max(optim.eps, _SMALLEST_EPS[optim.name])})
    return config.model_copy(update={"optim": larger})


def said_eased(config: RunConfig[Any]) -> Iterator[str]:
    """Yield a line on what `eased` changes, if it does."""
    if (eps := eased(config).optim.eps) != config.optim.eps:
        yield f"optim.eps is {eps:g} here: with {config.optim.eps:g} AdamW makes whole steps of rounding"


def write_run_file(config: RunConfig[Any], path: Path) -> str:
    """Write a configuration whole, and return the file's name."""
    path.write_text(dump(config), encoding="utf-8")
    return str(path)
