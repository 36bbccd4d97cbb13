"""Where two runs first part: in a step's loss, or in a tensor they wrote."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainworks.record import CurvePoint

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["compare_curves", "compare_tensors", "largest_difference", "relative", "tensor_files"]

EXACT = ("samples", "tokens", "lr")
MEASURED = ("loss", "grad_norm")


def relative(expected: float, found: float) -> float:
    """Return the difference as a share of what is expected; infinite where nothing was, and not a number stays so.

    >>> relative(2.0, 2.5), relative(0.0, 0.0)
    (0.25, 0.0)
    """
    difference = abs(expected - found)
    if difference == 0.0:
        return 0.0
    return difference / abs(expected) if expected else float("inf")


def compare_curves(
    expected: Sequence[CurvePoint],
    found: Sequence[CurvePoint],
    *,
    tolerance: float = 0.0,
    measured: Sequence[str] = MEASURED,
) -> str | None:
    """Return where two curves first part, as step, value and value; None when they do not.

    What a step took must be the same in any case; what was measured of it may differ by a relative `tolerance`, and at
    0 not in a bit.
    """
    steps = [point.step for point in expected], [point.step for point in found]
    if steps[0] != steps[1]:
        return f"{len(steps[0])} steps were logged and {len(steps[1])}"
    for one, other in zip(expected, found, strict=True):
        for name in (*EXACT, *measured):
            values = getattr(one, name), getattr(other, name)
            allowed = tolerance if name in measured else 0.0
            if not relative(*values) <= allowed:
                return f"step {one.step}: {name} {values[0]!r} and {values[1]!r}"
    return None


def largest_difference(expected: Sequence[CurvePoint], found: Sequence[CurvePoint]) -> float:
    """Return the largest relative difference of two curves' losses."""
    return max(relative(one.loss, other.loss) for one, other in zip(expected, found, strict=True))


def tensor_files(*folders: Path) -> list[Path]:
    """Return the safetensors files in folders that are there."""
    return sorted(file for folder in folders for file in folder.rglob("*.safetensors"))


def compare_tensors(expected: Path, found: Path, files: Sequence[Path]) -> tuple[int, str | None]:
    """Compare files of two folders, bit for bit; return how many tensors they hold, and what differs, or None.

    `files` are relative to both. What differs is said by the first such tensor with its largest difference.
    """
    count, differing = 0, []
    for file in files:
        if not (found / file).is_file():
            return count, f"{file}: written by one of the runs only"
        for name, difference in _differences(expected / file, found / file):
            count += 1
            differing += [f"{file}: {name}: {difference}"] if difference else []
    if not differing:
        return count, None
    others = f" (and {len(differing) - 1} of {count} tensors more)" if len(differing) > 1 else ""
    return count, differing[0] + others


def _differences(expected: Path, found: Path) -> Iterator[tuple[str, str]]:
    """Yield each tensor's name with how it differs, which is empty where it does not."""
    from safetensors import safe_open

    with safe_open(expected, framework="pt") as one, safe_open(found, framework="pt") as other:
        here, there = sorted(one.keys()), set(other.keys())
        for name in here:
            yield name, _difference(one.get_tensor(name), other.get_tensor(name)) if name in there else "is missing"
        for name in sorted(there - set(here)):
            yield name, "is there in one of the runs only"


def _difference(expected: Tensor, found: Tensor) -> str:
    import torch

    kinds = [f"{tensor.dtype} {list(tensor.shape)}".removeprefix("torch.") for tensor in (expected, found)]
    if kinds[0] != kinds[1]:
        return f"{kinds[0]} and {kinds[1]}"
    bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (expected, found)]
    if torch.equal(*bits):
        return ""
    return f"largest difference {(expected.double() - found.double()).abs().max().item():.3g}"
