"""Steps that would harm the model: told on the device before they reach the weights, and remembered."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainworks.record import BadStep

if TYPE_CHECKING:
    from trainworks.schema import Faults

__all__ = ["Watch"]

_KINDS = ("good", "not a number", "spike", "left out")
_UNREAD = 64
"""Steps after which what the device knows is read, though nobody asked."""
_LEAST_RISE = 0.01
"""A spike lies at least this share above the mean: a loss that hardly moves has a deviation of nearly nothing."""


@dataclass
class Watch:
    """Judges each step of a run by its loss and gradient, and remembers which were bad.

    Nothing here waits for the device until `read` is called.
    """

    faults: Faults
    device: torch.device
    left_out: set[int] = field(default_factory=set)
    """Steps that do not count though they are taken: those that were bad before a rollback."""
    in_a_row: int = 0
    """Bad steps since the last good one that was read."""

    def __post_init__(self) -> None:
        self._good = torch.full((self.faults.window,), float("nan"), device=self.device)
        self._unread: list[tuple[int, Tensor]] = []
        self._found: list[BadStep] = []

    def judge(self, number: int, loss: Tensor, norm: Tensor) -> Tensor:
        """Return 1.0 if step `number` must not reach the weights, else 0.0: a scalar on the device."""
        finite = loss.isfinite() & norm.isfinite()
        kind = torch.where(finite, self._spike(loss), 1.0)
        if number in self.left_out:
            kind = torch.full_like(kind, 3.0)
        good = kind == 0.0
        if self.faults.spike != "ignore":
            self._good = torch.where(good, torch.cat([self._good[1:], loss.detach()[None]]), self._good)
        self._unread.append((number, torch.stack([kind, loss.detach(), norm.detach()])))
        if len(self._unread) == _UNREAD:
            self._look()
        return (~good).float()

    def _spike(self, loss: Tensor) -> Tensor:
        if self.faults.spike == "ignore":
            return torch.zeros_like(loss)
        # Not a number until the window is full, and nothing is greater than that.
        deviation, mean = torch.std_mean(self._good)
        limit = mean + torch.maximum(self.faults.sigma * deviation, _LEAST_RISE * mean.abs())
        return (loss > limit) * 2.0

    def read(self) -> list[BadStep]:
        """Return the bad steps since this was last called; waits for the device."""
        self._look()
        found, self._found = self._found, []
        return found

    def _look(self) -> None:
        facts = torch.stack([each for _, each in self._unread]).tolist() if self._unread else []
        for (number, _), (kind, loss, norm) in zip(self._unread, facts, strict=True):
            bad = kind in (1.0, 2.0)
            self.in_a_row = self.in_a_row + 1 if bad else 0 if kind == 0.0 else self.in_a_row
            if bad:
                self._found.append(BadStep(step=number, kind=_KINDS[int(kind)], loss=loss, grad_norm=norm))
        self._unread = []

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as JSON has it."""
        return {"losses": [repr(value) for value in self._good.tolist()], "left_out": sorted(self.left_out)}

    def load(self, state: dict[str, Any]) -> None:
        """Go back to what `state` returned, with a window of another size as far as it goes; steps that are left out
        since then stay out."""
        kept = [float(text) for text in state["losses"]][-self.faults.window :]
        self._good[len(self._good) - len(kept) :] = torch.tensor(kept, device=self.device)
        self.left_out |= set(state["left_out"])
        self._unread, self._found = [], []
