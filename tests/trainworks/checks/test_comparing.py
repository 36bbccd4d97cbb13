"""Where two runs part is found and said, and what is the same is called so to the last bit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trainworks.checks.comparing import compare_curves, compare_tensors, largest_difference, relative, tensor_files
from trainworks.record import CurvePoint


def curve(**changes: float) -> list[CurvePoint]:
    """Return three steps; `changes` are made to the second."""
    points = [
        CurvePoint(step=step, samples=8 * step, tokens=99 * step, loss=3.0 / step, lr=0.1, grad_norm=1.0, seconds=step)
        for step in (1, 2, 3)
    ]
    return [points[0], points[1].model_copy(update=changes), points[2]]


def test_equal_curves_do_not_part_though_they_took_other_times() -> None:
    assert compare_curves(curve(), curve(seconds=77.0)) is None
    assert largest_difference(curve(), curve(seconds=77.0)) == 0.0


@pytest.mark.parametrize("name", ["loss", "grad_norm", "lr"])
def test_the_last_bit_of_a_step_is_found(name: str) -> None:
    value = getattr(curve()[1], name)
    other = math.nextafter(value, 9.0)
    assert compare_curves(curve(), curve(**{name: other})) == f"step 2: {name} {value!r} and {other!r}"


def test_a_tolerance_is_for_what_is_measured_and_not_for_what_is_taken() -> None:
    assert compare_curves(curve(), curve(loss=1.5 + 1e-7), tolerance=1e-6) is None
    assert largest_difference(curve(), curve(loss=1.5 + 1e-7)) == pytest.approx(1e-7 / 1.5)
    assert str(compare_curves(curve(), curve(loss=1.5 + 1e-5), tolerance=1e-6)).startswith("step 2: loss")
    assert compare_curves(curve(), curve(samples=17), tolerance=1.0) == "step 2: samples 16 and 17"


def test_what_chance_decides_may_be_left_out_of_the_comparison() -> None:
    assert compare_curves(curve(), curve(loss=9.0, grad_norm=9.0), measured=()) is None
    assert compare_curves(curve(), curve(tokens=1), measured=()) == "step 2: tokens 198 and 1"


def test_a_loss_that_is_not_a_number_is_never_equal() -> None:
    assert compare_curves(curve(), curve(loss=math.nan), tolerance=1e-6) == "step 2: loss 1.5 and nan"
    assert relative(0.0, 1.0) == math.inf


def test_curves_of_unlike_length_part() -> None:
    assert compare_curves(curve(), curve()[:2]) == "3 steps were logged and 2"


def tensors() -> dict[str, torch.Tensor]:
    return {
        "weight": torch.arange(6.0).reshape(2, 3),
        "step": torch.tensor(3.0),
        "nan": torch.tensor([float("nan")]),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "bytes": torch.arange(5, dtype=torch.uint8),
    }


def compared(tmp_path: Path, changed: dict[str, torch.Tensor]) -> tuple[int, str | None]:
    for name, values in (("one", tensors()), ("two", changed)):
        (tmp_path / name / "deep").mkdir(parents=True)
        save_file(values, tmp_path / name / "deep" / "file.safetensors")
    files = tensor_files(tmp_path / "one", tmp_path / "absent")
    return compare_tensors(tmp_path / "one", tmp_path / "two", [file.relative_to(tmp_path / "one") for file in files])


def test_equal_tensors_are_counted(tmp_path: Path) -> None:
    assert compared(tmp_path, tensors()) == (5, None)


def test_a_tensor_that_differs_is_named_with_its_largest_difference(tmp_path: Path) -> None:
    changed = tensors()
    changed["weight"][1, 2] += 0.5
    changed["weight"][0, 0] += 0.25
    assert compared(tmp_path, changed) == (5, "deep/file.safetensors: weight: largest difference 0.5")


def test_minus_nothing_is_not_nothing(tmp_path: Path) -> None:
    changed = tensors()
    changed["weight"][0, 0] = -0.0
    assert compared(tmp_path, changed)[1] == "deep/file.safetensors: weight: largest difference 0"


def test_several_differences_are_counted_beside_the_first(tmp_path: Path) -> None:
    changed = tensors() | {"step": torch.tensor(4.0), "half": torch.ones(4, dtype=torch.bfloat16)}
    count, parting = compared(tmp_path, changed)
    assert count == 5
    assert parting == "deep/file.safetensors: half: bfloat16 [3] and bfloat16 [4] (and 1 of 5 tensors more)"


def test_a_tensor_or_a_file_that_is_missing_is_told(tmp_path: Path) -> None:
    fewer = {name: value for name, value in tensors().items() if name != "weight"}
    assert "weight: is missing" in str(compared(tmp_path / "fewer", fewer)[1])
    assert "more: is there in one" in str(compared(tmp_path / "more", tensors() | {"more": torch.ones(1)})[1])
    (tmp_path / "more" / "two" / "deep" / "file.safetensors").unlink()
    assert compare_tensors(tmp_path / "more" / "one", tmp_path / "more" / "two", [Path("deep/file.safetensors")]) == (
        0,
        "deep/file.safetensors: written by one of the runs only",
    )
