"""Where the configuration files that come with Trainworks lie."""

from __future__ import annotations

from pathlib import Path

__all__ = ["configs_folder"]


def configs_folder() -> Path:
    """Return the folder of the shipped configurations: in the package from a wheel, beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"
