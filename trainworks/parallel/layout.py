"""How a run's processes are laid out: which of them share samples, weights, tokens or layers. Read from what accelerate
leaves in the environment and from `layout` of the run file, and checked before a device is touched."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

from trainworks import schema
from trainworks.errors import LaunchError

__all__ = ["Layout", "asked"]

_PREFIX = "PARALLELISM_CONFIG_"
_UNHEEDED = {
    "FSDP_ACTIVATION_CHECKPOINTING": ("fsdp_activation_checkpointing", "false"),
    "FSDP_AUTO_WRAP_POLICY": ("fsdp_auto_wrap_policy", "transformer_based_wrap"),
    "FSDP_TRANSFORMER_CLS_TO_WRAP": ("fsdp_transformer_layer_cls_to_wrap", ""),
}
"""Settings of FSDP that this sharding does not follow, by the variable that holds them: the hardware file's key, and
what it may say all the same."""


@dataclass(frozen=True)
class Layout:
    """The sizes of a mesh of processes, from the slowest dimension, whose neighbours may be on other machines, to the
    fastest."""

    pipeline: int = 1
    """Ranks that share a model's layers."""
    replicate: int = 1
    """Groups of ranks that each hold all weights."""
    shard: int = 1
    """Ranks over which the weights of such a group are sharded."""
    context: int = 1
    """Ranks that share a line's tokens."""
    tensor: int = 1
    """Ranks that share every layer's weights and heads."""
    schedule: str = "1f1b"
    """In which order a pipeline works on micro-batches."""
    expert: int = 1
    """Ranks that share a layer's experts; those of `tensor`."""
    is_sharded: bool = False
    """Whether the hardware file asks for FSDP."""

    @property
    def processes(self) -> int:
        """How many processes there are in all."""
        return math.prod((self.pipeline, self.replicate, self.shard, self.context, self.tensor))

    @property
    def data(self) -> int:
        """How many ranks share a step's samples."""
        return self.replicate * self.shard

    @property
    def spreads_weights(self) -> bool:
        """Whether a process may hold less than the whole model."""
        return self.is_sharded or self.tensor > 1 or self.pipeline > 1

    def sizes(self) -> dict[str, int]:
        """Return the dimensions that have more than one rank, by name."""
        names = ("pipeline", "replicate", "shard", "context", "tensor", "expert")
        return {name: getattr(self, name) for name in names if getattr(self, name) > 1}

    def __str__(self) -> str:
        return " x ".join(f"{name} {size}" for name, size in self.sizes().items()) or "one process"


def asked(wish: schema.Layout, environment: Mapping[str, str] = os.environ) -> Layout:
    """Return the layout that the hardware file and the run file ask for; LaunchError, with the line to change, where
    they cannot go together or do not fit the number of processes.

    >>> str(asked(schema.Layout(pipeline=2), {"WORLD_SIZE": "4", "ACCELERATE_USE_FSDP": "true"}))
    'pipeline 2 x shard 2'
    """
    processes = int(environment.get("WORLD_SIZE", "1"))
    is_sharded = environment.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and processes > 1
    sizes = _sizes(environment)
    _check(environment, sizes, wish, is_sharded=is_sharded)
    if sizes["replicate"] * sizes["shard"] == 1:
        whole = wish.pipeline * sizes["context"] * sizes["tensor"]
        sizes["shard" if is_sharded else "replicate"] = max(1, processes // whole)
    layout = Layout(**sizes, pipeline=wish.pipeline, schedule=wish.schedule, expert=wish.expert, is_sharded=is_sharded)
    if layout.processes != processes:
        raise LaunchError(
            f"{layout} makes {layout.processes} processes, and the launch started {processes}; change num_processes, "
            "the sizes under parallelism_config of the hardware file, or layout.pipeline of the run file"
        )
    return layout


def _sizes(environment: Mapping[str, str]) -> dict[str, int]:
    names = {"replicate": "DP_REPLICATE", "shard": "DP_SHARD", "context": "CP", "tensor": "TP"}
    return {name: int(environment.get(f"{_PREFIX}{key}_SIZE", "1")) for name, key in names.items()}


def _check(environment: Mapping[str, str], sizes: dict[str, int], wish: schema.Layout, *, is_sharded: bool) -> None:
    if int(environment.get(f"{_PREFIX}SP_SIZE", "1")) > 1:
        raise LaunchError(
            "parallelism_config_sp_size is DeepSpeed's; say parallelism_config_cp_size: a line's tokens are shared, "
            "and its heads exchanged, in the same way"
        )
    if sizes["shard"] > 1 and not is_sharded:
        raise LaunchError(
            f"parallelism_config_dp_shard_size: {sizes['shard']} shards weights, which takes distributed_type: FSDP "
            "and fsdp_config.fsdp_version: 2 in the hardware file"
        )
    for variable, (key, served) in _UNHEEDED.items():
        said = environment.get(variable, "").lower()
        if is_sharded and said not in ("", served):
            raise LaunchError(
                f"{key}: {said} is not followed: layers are sharded one by one, as the model names them, and nothing "
                f"is computed twice; {f'say {served}' if served else 'leave it out'}"
            )
    if wish.expert > 1 and wish.expert != sizes["tensor"]:
        raise LaunchError(
            f"layout.expert: {wish.expert} shares experts over the ranks of parallelism_config_tp_size, which is "
            f"{sizes['tensor']}: make them alike"
        )
