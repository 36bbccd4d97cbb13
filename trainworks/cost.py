"""What a run takes: seconds, throughput, model FLOPs, memory and energy."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from trainworks.energy import Meter as EnergyMeter
from trainworks.energy import device_counters, package_counters
from trainworks.record import Cost
from trainworks.run import Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["CostMeter", "flops_per_token", "peak_flops"]

_PEAK_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "B200": 2250e12}
"""Dense bf16 FLOP/s without sparsity by a part of the device's name, from NVIDIA's data sheets (SXM versions)."""


class CostMeter:
    """Measures a run from the moment it is made, on top of what its earlier parts took. Every rank has one."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._before = run.record.cost
        self._trained = run.progress.seconds
        self._begun = self._resumed = time.perf_counter()
        on_gpu, reads = run.world.device.type == "cuda", run.world.accelerator.is_local_main_process
        source, counters = device_counters(run.world.device.index or 0) if on_gpu else package_counters()
        self._energy = EnergyMeter(source, counters if on_gpu or reads else [])

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the block's time out of training's."""
        self.lap()
        yield
        self._resumed = time.perf_counter()

    def lap(self) -> None:
        """Bring the run's training seconds up to date; waits for the device."""
        if self.run.world.on_gpu:
            torch.accelerator.synchronize()
        now = time.perf_counter()
        self.run.progress.seconds += now - self._resumed
        self._resumed = now

    def cost(self) -> Cost:
        """Return what the run took so far, over all its parts. All ranks."""
        joules = [value for value in self.run.world.gather(self._energy.joules) if value is not None]
        memory = max(*self.run.world.gather(_peak_memory()), self._before.peak_memory_bytes or 0)
        seconds, progress = self.run.progress.seconds, self.run.progress
        rate = progress.tokens / seconds if progress.tokens and seconds else None
        return Cost(
            seconds=self._before.seconds + time.perf_counter() - self._begun,
            train_seconds=seconds,
            tokens_per_second=rate,
            samples_per_second=progress.samples / seconds if seconds else None,
            mfu=self._mfu(rate),
            peak_memory_bytes=memory,
            energy_joules=sum(joules) + (self._before.energy_joules or 0.0) if joules else None,
            energy_source=self._energy.source,
        )

    def _mfu(self, rate: float | None) -> float | None:
        peak = peak_flops(self.run.record.environment.device)
        if rate is None or peak is None or self.run.world.layout.pipeline > 1:
            return None  # a rank of a pipeline does not know the other ranks' products
        length = self.run.progress.tokens / self.run.progress.samples
        return rate * flops_per_token(self.run.model, length) / (peak * self.run.world.processes)


def peak_flops(device: str) -> float | None:
    """Return the dense bf16 FLOPs a second of a GPU by the name that torch gives it; None where they are not known."""
    return next((peak for name, peak in _PEAK_BF16.items() if name in device), None)


def flops_per_token(model: PreTrainedModel, length: float) -> float:
    """Return the training FLOPs of one token in a causal sequence of `length` tokens.

    6 per weight of a matrix product that is trained (2 forward, 4 backward), 4 where it is frozen, none for looking up
    an embedding; and attention's 6 x layers x heads x head size x length, halved since it is causal (Chowdhery et al.
    2022, appendix B).
    """
    matrices = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    products = sum((6 if module.weight.requires_grad else 4) * module.weight.numel() for module in matrices)
    settings: Any = model.config.get_text_config()
    width: int = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
    attention: float = 6.0 * settings.num_hidden_layers * settings.num_attention_heads * width * length
    return products + attention


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
