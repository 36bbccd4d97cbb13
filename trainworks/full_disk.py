"""A full disk: how an error tells of one, and what is said about it."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

__all__ = ["amount", "is_full", "room"]

_FULL = (errno.ENOSPC, errno.EDQUOT)


def is_full(error: Exception) -> bool:
    """Tell whether an error came of a full disk, or of a quota that is used up."""
    # safetensors 0.8 wraps the system's error and keeps its number in the text alone.
    number = error.errno if isinstance(error, OSError) else None
    return number in _FULL or any(f"os error {code}" in str(error) for code in _FULL)


def room(folder: Path) -> str:
    """Return how much room there is where a folder lies, for people to read."""
    return amount(shutil.disk_usage(folder).free)


def amount(num_bytes: float) -> str:
    """Return a number of bytes for people to read.

    >>> amount(1_500), amount(3 * 2**40)
    ('1.46 KiB', '3072 GiB')
    """
    for unit in ("bytes", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.4g} GiB"
