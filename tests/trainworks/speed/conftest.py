"""What the tests of speed share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def bf16(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let runs of this test compute in bf16, and no other's: accelerate keeps one state for a process."""
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
