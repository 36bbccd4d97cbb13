"""Energy of a run, from the hardware's own counters: NVML on NVIDIA GPUs, RAPL for processors where it can be read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

__all__ = ["Meter", "device_counters", "package_counters"]

Counter = Callable[[], float]
"""Returns joules since some fixed moment."""


class Meter:
    """Joules used since the meter was made, by the counters it was given.

    Where there is no counter, `joules` is None and `source` says why: an estimate would be a guess.
    """

    def __init__(self, source: str, counters: Sequence[Counter]) -> None:
        self.source = source
        self._counters = counters
        self._start = [counter() for counter in counters]

    @property
    def joules(self) -> float | None:
        """Joules since the start, or None where nothing can be read."""
        if not self._counters:
            return None
        return sum(counter() - before for counter, before in zip(self._counters, self._start, strict=True))


def device_counters(index: int) -> tuple[str, list[Counter]]:
    """Return the energy counter of the CUDA device this process uses (NVML, Volta and newer), and what it measures."""
    import pynvml
    import torch

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as error:
        return f"not measured: NVML has no energy counter here ({error})", []
    return "NVML, GPU boards only", [lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000]


def package_counters(root: Path = Path("/sys/class/powercap")) -> tuple[str, list[Counter]]:
    """Return the energy counters of this machine's processor packages (Linux RAPL), and what they measure."""
    counters: list[Counter] = []
    for package in sorted(root.glob("intel-rapl:?")):
        try:
            counters.append(
                _unwrapped(package / "energy_uj", float((package / "max_energy_range_uj").read_text()) / 1e6)
            )
        except OSError:
            return "not measured: RAPL is there but not readable (root only)", []
    if not counters:
        return "not measured: no RAPL counters on this machine", []
    return "RAPL, processor packages only, everything that ran on the machine", counters


def _unwrapped(file: Path, span: float) -> Counter:
    """Return a counter that goes on rising when the hardware's wraps at `span` joules."""
    last, turns = float(file.read_text()) / 1e6, 0

    def read() -> float:
        nonlocal last, turns
        value = float(file.read_text()) / 1e6
        turns += value < last
        last = value
        return value + turns * span

    return read
