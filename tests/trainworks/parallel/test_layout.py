"""What a hardware file and a run file ask for is a layout of all processes, or a line to change."""

from __future__ import annotations

import pytest

from trainworks.errors import LaunchError
from trainworks.parallel.layout import asked
from trainworks.schema import Layout


def world(processes: int, *, sharded: bool = False, **sizes: int) -> dict[str, str]:
    named = {f"PARALLELISM_CONFIG_{name.upper()}_SIZE": str(size) for name, size in sizes.items()}
    return {"WORLD_SIZE": str(processes), "ACCELERATE_USE_FSDP": str(sharded).lower()} | named


@pytest.mark.parametrize(
    ("environment", "wish", "told", "data"),
    [
        ({}, {}, "one process", 1),
        (world(4), {}, "replicate 4", 4),
        (world(4, sharded=True), {}, "shard 4", 4),
        (world(8, sharded=True, dp_replicate=2, dp_shard=4), {}, "replicate 2 x shard 4", 8),
        (world(8, sharded=True, tp=2), {}, "shard 4 x tensor 2", 4),
        (world(8, sharded=True, cp=4), {}, "shard 2 x context 4", 2),
        (world(8, sharded=True, tp=2), {"pipeline": 2, "expert": 2}, "pipeline 2 x shard 2 x tensor 2 x expert 2", 2),
        (world(2), {"pipeline": 2}, "pipeline 2", 1),
    ],
)
def test_what_no_file_says_is_data(environment: dict[str, str], wish: dict[str, int], told: str, data: int) -> None:
    layout = asked(Layout(**wish), environment)
    assert (str(layout), layout.data) == (told, data)
    assert layout.processes == int(environment.get("WORLD_SIZE", "1"))


@pytest.mark.parametrize(
    ("environment", "wish", "mend"),
    [
        (world(6, sharded=True, tp=4), {}, "change num_processes"),
        (world(4), {"pipeline": 8}, "layout.pipeline"),
        (world(4, dp_shard=4), {}, "distributed_type: FSDP"),
        (world(4, sharded=True, sp=2), {}, "parallelism_config_cp_size"),
        (world(4, sharded=True, tp=2), {"expert": 4}, "make them alike"),
        (world(2, sharded=True) | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "say false"),
        (world(2, sharded=True) | {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, {}, "say transformer_based_wrap"),
        (world(2, sharded=True) | {"FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaMLP"}, {}, "leave it out"),
    ],
)
def test_what_cannot_go_together_names_the_line(environment: dict[str, str], wish: dict[str, int], mend: str) -> None:
    with pytest.raises(LaunchError, match=mend):
        asked(Layout(**wish), environment)
