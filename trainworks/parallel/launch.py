"""The start of every process: the devices and processes asked for, the proof that these are what we got, and how ranks
agree."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from trainworks import schema
from trainworks.errors import LaunchError, ToolkitError
from trainworks.full_disk import is_full
from trainworks.parallel.context import split
from trainworks.parallel.layout import Layout, asked
from trainworks.parallel.restarts import init_method
from trainworks.parallel.sharding import shard
from trainworks.parallel.tensor import parallelise
from trainworks.parallel.watchdog import Watchdog, join

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from trainworks.data.loading import Batch
    from trainworks.run import Step

__all__ = ["Problem", "World", "start"]

T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""How long a rank waits for work that one of them does for all, such as tokenizing: such a wait holds no device."""
MARGIN = 3
"""Seconds by which a collective outlasts the watchdog, which can say who is missing."""


@dataclass(frozen=True)
class Problem:
    """What kept some rank from doing its part."""

    text: str
    disk_is_full: bool


@dataclass(frozen=True)
class World:
    """The processes of a run, and what they do together."""

    accelerator: Accelerator
    layout: Layout = field(default_factory=Layout)
    """How the processes share samples, tokens, layers and weights."""
    mesh: DeviceMesh | None = None
    """Its dimensions `pipeline`, `replicate`, `shard` (which takes in the context ranks) and `tensor`; None where every
    process holds the whole model."""
    context: ProcessGroup | None = None
    """The ranks that share this one's lines; None where there are no others."""
    patient: ProcessGroup | None = None
    """The ranks again, joined through the processor, with time to wait for one another; None for one process."""
    beside: ProcessGroup | None = None
    """The same once more, for what is saved while the ranks train."""
    watchdog: Watchdog | None = None
    """What sees to it that no rank waits for one that will never come; None for one process."""

    @property
    def processes(self) -> int:
        """How many processes there are."""
        return int(self.accelerator.num_processes)

    @property
    def process(self) -> int:
        """This process's number among them."""
        return int(self.accelerator.process_index)

    @property
    def ranks(self) -> int:
        """How many ranks share each step's samples."""
        return self.layout.data

    @property
    def rank(self) -> int:
        """This process's number among them; the same for those that have a sample in common."""
        return self.share // self.layout.context

    @property
    def averaged(self) -> int:
        """How many ranks' gradients are averaged: those that share samples or tokens."""
        return self.layout.data * self.layout.context

    @property
    def share(self) -> int:
        """This process's number among those."""
        return self.process // self.layout.tensor % self.averaged

    @property
    def stage(self) -> int:
        """Which of the pipeline's stages this process belongs to."""
        return self.process // (self.averaged * self.layout.tensor)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return bool(self.accelerator.is_main_process)

    @property
    def device(self) -> torch.device:
        """This rank's device."""
        device: torch.device = self.accelerator.device
        return device

    @property
    def on_gpu(self) -> bool:
        """Whether batches travel to another device."""
        return self.device.type != "cpu"

    @property
    def rounding(self) -> torch.dtype | None:
        """The type that a module should round its weights to; None where they are taken as they are, or where FSDP
        rounds what it gathers."""
        rounds = self.accelerator.mixed_precision == "bf16" and not self.layout.spreads_weights
        return torch.bfloat16 if rounds else None

    def wait(self) -> None:
        """Let every rank catch up. All ranks."""
        with self.waiting():
            self.accelerator.wait_for_everyone()

    def wait_patiently(self) -> None:
        """Let every rank catch up, however long one of them works for all; a rank that dies ends the wait. All
        ranks."""
        if self.patient is not None:
            with self.waiting(patient=True):
                torch.distributed.barrier(self.patient)

    def waiting(self, *, patient: bool = False) -> AbstractContextManager[None]:
        """Exchange something inside, all ranks; one that is not `patient` may not take longer than the time limit."""
        return nullcontext() if self.watchdog is None else self.watchdog.waiting(patient=patient)

    def follow(self, step: Callable[[], int]) -> None:
        """Let the others know how many optimizer steps this rank has done, by a function that any thread may call."""
        if self.watchdog is not None:
            self.watchdog.step = step

    def move(self, batch: Batch) -> Batch:
        """Return a batch on this rank's device."""
        return (
            {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
            if self.on_gpu
            else batch
        )

    def local(self, batch: Batch) -> Batch:
        """Return this rank's slice of a batch whose lines it shares with others; the batch where there are none."""
        return batch if self.context is None else split(batch, self.context)

    def joined(self, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what named vectors of the slices of one batch add up to. All ranks, with the same names and sizes."""
        if self.context is not None:
            with self.waiting():
                for term in terms.values():
                    torch.distributed.all_reduce(term, group=self.context)
        return dict(terms)

    def total(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the sums of named vectors over the ranks that share samples or tokens. All ranks, with the same names
        and sizes."""
        if self.averaged == 1:
            return dict(values)
        joined = torch.cat([value.float() for value in values.values()])
        with self.waiting():
            torch.distributed.all_reduce(joined, group=self._sharing)
        return dict(zip(values, joined.split([len(value) for value in values.values()]), strict=True))

    @property
    def _sharing(self) -> ProcessGroup | None:
        """The ranks that share samples or tokens, and hold the same part of the model; None for all there are."""
        if self.mesh is None or self.averaged == self.processes:
            return None
        return self.mesh["replicate", "shard"]._flatten("share").get_group()

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of every process's scalar, on the device, without waiting for it. All ranks."""
        with self.waiting():
            torch.distributed.all_reduce(value)
        return value

    def gather(self, value: T, group: ProcessGroup | None = None) -> list[T]:
        """Return every rank's value, in rank order, through a group of one's own if one is given. All ranks."""
        if self.processes == 1:
            return [value]
        values: list[Any] = [None] * self.processes
        # What is saved beside training is not what the main thread waits for.
        in_main_thread = threading.current_thread() is threading.main_thread()
        with self.waiting() if in_main_thread else nullcontext():
            torch.distributed.all_gather_object(values, value, group=group)
        return values

    def most(self, value: int) -> int:
        """Return the largest of every rank's whole number, without a wait for the device. All ranks."""
        if self.processes == 1:
            return value
        shared = torch.tensor(value)
        with self.waiting():
            torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX, group=self.patient)
        return int(shared.item())

    def largest(self, value: Tensor) -> Tensor:
        """Return the largest of every rank's scalar, on the device, without waiting for it. All ranks."""
        if self.processes > 1:
            with self.waiting():
                torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX)
        return value

    def agree(
        self, action: Callable[[], object], *, main_only: bool = False, group: ProcessGroup | None = None
    ) -> Problem | None:
        """Do something on every rank, or on the main one for all, and return the first problem any of them had, or
        None. All ranks; `group` as in `gather`."""
        problem = None
        try:
            if self.is_main or not main_only:
                action()
        except (ToolkitError, OSError, SafetensorError) as error:
            problem = Problem(str(error), is_full(error))
        return next((found for found in self.gather(problem, group) if found is not None), None)

    @contextmanager
    def accumulating(self, module: nn.Module, *, sync: bool) -> Iterator[None]:
        """Exchange gradients after the block's backward pass only when `sync`, that is, for a step's last
        micro-batch."""
        from torch.distributed.fsdp import FSDPModule

        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(sync)
            yield
        else:
            with nullcontext() if sync else self.accelerator.no_sync(module):
                yield

    def reshard(self, module: nn.Module) -> None:
        """Give back what a forward pass without a backward pass left gathered.

        FSDP2 (torch 2.13) shards its root again in the backward pass alone; until then the root's weights are whole
        tensors, which may even have lost their memory.
        """
        from torch.distributed.fsdp import FSDPModule

        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()

    def leave(self) -> None:
        """Leave the other processes, without alarm; a process group still open at exit may abort the process (gloo,
        torch 2.13)."""
        if self.watchdog is not None:
            self.watchdog.stop()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def wrap(self, step: Step) -> nn.Module:
        """Return a step spread over the ranks as the layout says. All ranks."""
        if not self.layout.spreads_weights:
            wrapped: nn.Module = self.accelerator.prepare(step)
            return wrapped
        if self.layout.tensor > 1:
            step.to(self.device)
            parallelise(step.model, self)
        if self.layout.pipeline > 1:
            from trainworks.parallel.pipeline import pipelined

            return pipelined(step, self)
        return shard(step.to(self.device), self)


def start(
    *, wish: schema.Layout, seed: int, deterministic: bool, trackers: tuple[str, ...], output: Path, timeout: float
) -> World:
    """Join the other processes and return the world; LaunchError when it is not the one asked for. All ranks.

    A rank that does not come to a collective, or gives no sign of life, for `timeout` seconds is taken to hang; what
    the ranks end by is then written to `output`.
    """
    _check_environment()
    layout = asked(wish)
    os.environ.pop("ACCELERATE_USE_PARALLELISM_CONFIG", None)  # read; accelerate would refuse it on a CPU
    # With it, transformers gives every process but the first a model without weights, which accelerate then sends.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, set_seed

    patience = timedelta(seconds=timeout + MARGIN)
    handlers = [
        InitProcessGroupKwargs(init_method=init_method(), timeout=patience),
        DistributedDataParallelKwargs(broadcast_buffers=False),
    ]
    accelerator = Accelerator(
        log_with=list(trackers) or None, project_dir=str(output / "trackers"), kwargs_handlers=handlers
    )
    _check_world(accelerator)
    set_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if accelerator.num_processes == 1:
        return World(accelerator, layout)
    patient, beside = (torch.distributed.new_group(backend="gloo", timeout=PATIENCE) for _ in range(2))
    mesh, context = _meshes(layout, accelerator.device.type)
    return World(accelerator, layout, mesh, context, patient, beside, _watchdog(patient, timeout, output))


def _meshes(layout: Layout, device: str) -> tuple[DeviceMesh | None, ProcessGroup | None]:
    """Return the mesh over which weights are spread, and the group of ranks that share lines, where there are such. All
    ranks."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = context = None
    if layout.spreads_weights:
        sizes = (layout.pipeline, layout.replicate, layout.shard * layout.context, layout.tensor)
        mesh = init_device_mesh(device, sizes, mesh_dim_names=("pipeline", "replicate", "shard", "tensor"))
    if layout.context > 1:
        lines = (layout.pipeline * layout.data, layout.context, layout.tensor)
        context = init_device_mesh(device, lines, mesh_dim_names=("others", "context", "tensor"))["context"].get_group()
    return mesh, context


def _watchdog(group: ProcessGroup, timeout: float, output: Path) -> Watchdog:
    """Return this process's watchdog, told the newest run's wishes where it watches already. All ranks."""

    def share(value: Any) -> list[Any]:
        values: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(values, value, group=group)
        return values

    if Watchdog.current is None:
        watchdog = join(share, torch.distributed.get_rank(), timeout=timeout, output=output)
        watchdog.start()
        return watchdog
    Watchdog.current.timeout, Watchdog.current.output = timeout, output
    return Watchdog.current


def _check_environment() -> None:
    """Compare what the hardware file asked for, which accelerate leaves in the environment, with what there is."""
    asked = os.environ.get
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise LaunchError(
            "several processes were asked for and only one was started: `accelerate launch --cpu` starts no others; "
            "use torchrun --nproc_per_node N with ACCELERATE_USE_CPU=1"
        )
    explicit = asked("ACCELERATE_USE_CPU", "").lower()
    on_gpu = explicit in ("false", "0", "no") or ("RANK" in os.environ and not explicit)
    if on_gpu and asked("ACCELERATE_TORCH_DEVICE") != "cpu" and not torch.accelerator.is_available():
        raise LaunchError(
            "the hardware file asks for a GPU and torch sees none here; take configs/accelerate/cpu.yaml, or mend the "
            "driver or torch (`python -c 'import torch; print(torch.version.cuda)'` prints None for a CPU build)"
        )
    if asked("ACCELERATE_MIXED_PRECISION", "no") not in ("no", "bf16"):
        raise LaunchError(
            f"mixed_precision: {asked('ACCELERATE_MIXED_PRECISION')} is not supported; say bf16 or no in the file"
        )


def _check_world(accelerator: Accelerator) -> None:
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != asked:
        raise LaunchError(
            f"{asked} processes were started, but this one sees a world of {accelerator.num_processes}; say "
            "distributed_type: MULTI_GPU or FSDP in the hardware file"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and not accelerator.is_fsdp2:
        raise LaunchError(
            "the hardware file asks for FSDP, but this process does not shard: that takes fsdp_version: 2 and more "
            "than one process, each with a GPU"
        )
