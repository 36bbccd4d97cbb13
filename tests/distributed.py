"""Run a function of a test file in several processes on one CPU machine, under DDP or FSDP2 over gloo."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

__all__ = [
    "ENVIRONMENT",
    "LAUNCHER_VARIABLES",
    "RANK_VARIABLES",
    "Mode",
    "free_port",
    "let_fsdp_run_on_cpu",
    "load",
    "run_ranks",
]

Mode = Literal["ddp", "fsdp2"]

# What `accelerate launch` sets for a CPU file, and for an FSDP2 file except for the device.
ENVIRONMENT: dict[Mode, dict[str, str]] = {
    "ddp": {"ACCELERATE_USE_CPU": "true"},
    "fsdp2": {
        "ACCELERATE_TORCH_DEVICE": "cpu",
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_OFFLOAD_PARAMS": "false",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        "FSDP_ACTIVATION_CHECKPOINTING": "false",
    },
}
LAUNCHER_VARIABLES = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "TORCHELASTIC_")
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def run_ranks(
    target: str,
    arguments: dict[str, Any],
    *,
    ranks: int,
    mode: Mode = "ddp",
    precision: Literal["no", "bf16"] = "no",
    sizes: dict[str, int] | None = None,
    timeout: float = 120.0,
) -> list[Any]:
    """Call `target(**arguments)` in each rank and return the ranks' results, in rank order.

    `target` is `path/to/file.py:function`; arguments and results travel as JSON. With `ranks=1` it is one plain CPU
    process outside any process group, whatever the mode. `sizes` are a hardware file's `parallelism_config`, such as
    `tp: 2`. AssertionError, with the tails of the failing ranks' output,
    when a rank fails, when `timeout` seconds pass, or when the processes did not form one world of `ranks`.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        (folder / "arguments.json").write_text(json.dumps(arguments), encoding="utf-8")
        port, sizes = free_port(), sizes or {}
        processes = []
        try:
            for rank in range(ranks):
                environment = _environment(rank, ranks=ranks, mode=mode, precision=precision, port=port)
                environment |= {f"PARALLELISM_CONFIG_{key.upper()}_SIZE": str(size) for key, size in sizes.items()}
                processes.append(_start(rank, target, folder, environment))
            _wait(processes, folder, time.monotonic() + timeout)
        finally:
            _stop(processes)
        return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]


def _environment(rank: int, *, ranks: int, mode: Mode, precision: str, port: int) -> dict[str, str]:
    inherited = {
        key: value
        for key, value in os.environ.items()
        if key not in RANK_VARIABLES and not key.startswith(LAUNCHER_VARIABLES)
    }
    common = {"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": precision, "TOKENIZERS_PARALLELISM": "false"}
    if ranks == 1:
        return inherited | common | ENVIRONMENT["ddp"]
    values = (rank, rank, ranks, ranks, "127.0.0.1", port)
    return inherited | common | ENVIRONMENT[mode] | dict(zip(RANK_VARIABLES, map(str, values), strict=True))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _start(rank: int, target: str, folder: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, target, str(folder / "arguments.json"), str(folder / f"{rank}.json")]
    with (folder / f"{rank}.log").open("wb") as log:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


def _wait(processes: list[subprocess.Popen[bytes]], folder: Path, deadline: float) -> None:
    while any(process.poll() is None for process in processes):
        if time.monotonic() > deadline or any(process.returncode for process in processes):
            break
        time.sleep(0.05)
    codes = [process.poll() for process in processes]
    if any(code != 0 for code in codes):
        # All that failed: a peer of the one that made the mistake dies of a lost connection in the same moment.
        shown = [rank for rank, code in enumerate(codes) if code] or range(len(codes))
        tails = "\n".join(f"--- rank {rank} of {len(codes)}\n{_tail(folder / f'{rank}.log')}" for rank in shown)
        raise AssertionError(f"exit codes {codes} (None: still running)\n{tails}")


def _tail(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-3000:]


def _stop(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def load(target: str) -> Any:
    path, _, function = target.rpartition(":")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec, f"no Python file: {path}"
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return getattr(module, function)


def let_fsdp_run_on_cpu() -> None:
    # accelerate 1.15 knows FSDP on accelerators only; delete this when it takes the CPU as a device of FSDP2.
    from accelerate.state import DistributedType, PartialState

    def gloo(self: PartialState, *args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_GPU

    PartialState._prepare_backend = gloo


def _record_worlds() -> list[int]:
    """Return a list that will hold the size of every default process group this process joins."""
    import torch.distributed

    join, worlds = torch.distributed.init_process_group, []

    def recorded(*args: Any, **kwargs: Any) -> None:
        join(*args, **kwargs)
        worlds.append(torch.distributed.get_world_size())

    torch.distributed.init_process_group = recorded
    return worlds


def _main(target: str, arguments: str, result: str) -> None:
    from accelerate.state import AcceleratorState

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    wants_fsdp = "ACCELERATE_USE_FSDP" in os.environ
    if wants_fsdp:
        let_fsdp_run_on_cpu()
    worlds = _record_worlds()
    value = load(target)(**json.loads(Path(arguments).read_text(encoding="utf-8")))
    assert worlds == ([] if ranks == 1 else [ranks]), f"wanted one world of {ranks}, joined worlds of {worlds}"
    assert AcceleratorState().is_fsdp2 == wants_fsdp, f"ran as {AcceleratorState().distributed_type}"
    Path(result).write_text(json.dumps(value), encoding="utf-8")
    if worlds:
        import torch.distributed

        torch.distributed.destroy_process_group()
        # Even so, gloo's threads may abort a process while its interpreter winds up (torch 2.13).
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    _main(*sys.argv[1:])
