"""The plan of a cleaning, written to its folder so that any process anywhere can take part."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

from trainworks.cleaning import Clean
from trainworks.data.hygiene.workspace import Workspace, making
from trainworks.record import write_json

__all__ = ["open_workspace", "write_plan"]


def write_plan(space: Workspace) -> None:
    """Write what `open_workspace` needs."""
    plan = {"settings": space.settings.model_dump(mode="json"), "sizes": space.sizes}
    write_json(space.making / "plan.json", plan)


@lru_cache(maxsize=1)
def open_workspace(folder: Path) -> Workspace:
    """Return the workspace that was planned in a folder."""
    plan = json.loads((making(folder) / "plan.json").read_text(encoding="utf-8"))
    return Workspace(folder, Clean.model_validate(plan["settings"]), tuple(plan["sizes"]))
