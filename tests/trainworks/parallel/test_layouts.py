"""Every layout of processes trains the same model: losses, gradient norms, exported weights, checkpoints of one
another.

CI takes some of them, and checkpoints of some others; all of it with TRAINWORKS_LAYOUTS=all. `python tests/layouts.py`
makes the table of docs/parallelism.md.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import layouts
import pytest

ALL = os.environ.get("TRAINWORKS_LAYOUTS") == "all"
NAMES = list(layouts.SPREADS if ALL else layouts.QUICK)
STEPS, HALF = 10, 5
CASES = [("llama", "full"), ("tied", "lora"), ("experts", "full")]
RESUMED = ("experts", "full")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("layouts")
    layouts.prepare(made)
    return made


@pytest.fixture(scope="module")
def alone(place: Path) -> dict[str, Any]:
    return layouts.train_over(place, "one", layouts.ONE, CASES, steps=STEPS, save_at=HALF)


@pytest.fixture(scope="module")
def curves() -> dict[str, Any]:
    """The layouts that were trained, for those that go on from them."""
    return {}


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_the_same_model(name: str, place: Path, alone: dict[str, Any], curves: dict[str, Any]) -> None:
    cases = [case for case in CASES if (name, case[0]) not in layouts.REFUSED]
    found = layouts.train_over(place, name, layouts.SPREADS[name], cases, steps=STEPS, save_at=HALF)
    for key in found:
        far = layouts.apart(place, found, alone, (name, "one"), key)
        assert far.is_close, f"{key}: {far}"
    curves[name] = found


@pytest.mark.parametrize("name", ["one", *NAMES])
def test_it_goes_on_from_checkpoints_of_the_others(
    name: str, place: Path, alone: dict[str, Any], curves: dict[str, Any]
) -> None:
    spread = layouts.SPREADS.get(name, layouts.ONE)
    key = "-".join(RESUMED)
    others = ["one", *curves]
    place_of_name = others.index(name)
    others = [
        other
        for other in (others if ALL else [*others, *others][place_of_name + 1 : place_of_name + 3])
        if other != name
    ]
    for other in others:
        shutil.copytree(place / "saved" / f"{other}-{key}", place / "runs" / f"{other} to {name}-{key}")
    found = layouts.resume_over(place, [f"{other} to {name}" for other in others], spread, RESUMED, steps=STEPS)
    for other, run in found.items():
        assert len(run[key]["curve"]) == STEPS - HALF
        far = layouts.apart(place, run, alone, (other, "one"), key)
        assert far.is_close, f"{other}: {far}"


@pytest.mark.skipif(not shutil.which("g++"), reason="torch compiles for a processor with g++, which is not here")
def test_compiled_layers_of_tensor_ranks_take_lines_of_any_width(place: Path) -> None:
    changes: dict[str, Any] = {"steps": 2, "batch": {"per_step": 8, "micro": 4}}
    expected = layouts.train_over(place, "plain", layouts.ONE, [("llama", "full")], **changes)
    changes["speed"] = {"compile": "on"}
    found = layouts.train_over(place, "compiled", layouts.SPREADS["TP 2"], [("llama", "full")], **changes)
    far = layouts.apart(place, found, expected, ("compiled", "plain"), "llama-full")
    assert far.is_close, far
