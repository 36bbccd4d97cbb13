"""The random states of a process as JSON, and back."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

__all__ = ["random_states", "set_random_states"]


def random_states() -> dict[str, Any]:
    """Return the states of torch (on the processor and this rank's device), Python and NumPy."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)  # noqa: NPY002, what libraries draw from
    inner = {
        name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in numpy_state["state"].items()
    }
    devices = {"cpu": torch.get_rng_state()}
    devices |= {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return {
        "torch": {name: bytes(state.tolist()).hex() for name, state in devices.items()},
        "python": [version, list(words), gauss],
        "numpy": {**numpy_state, "state": inner},
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Put back what `random_states` returned; the device's only where there is one."""
    torch.set_rng_state(_state(states["torch"]["cpu"]))
    if torch.cuda.is_available() and "cuda" in states["torch"]:
        torch.cuda.set_rng_state(_state(states["torch"]["cuda"]))
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    inner = {
        name: np.array(value, dtype=np.uint32) if isinstance(value, list) else value
        for name, value in states["numpy"]["state"].items()
    }
    np.random.set_state({**states["numpy"], "state": inner})  # noqa: NPY002


def _state(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
