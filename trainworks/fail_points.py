"""Places where a test can make a process fail: between any two acts of writing what a run keeps.

`TRAINWORKS_FAIL_AT=save.renamed` kills the process there as a power cut would, `save.renamed:2` the second time it gets
there, `save.renamed@1` rank 1 alone; `save.part=full` has the disk be full there instead. Nothing else reads it.
"""

from __future__ import annotations

import errno
import os
import re
import signal
from collections import Counter

__all__ = ["FAIL_POINTS", "reached"]

FAIL_POINTS = (
    "file.staged",
    "metrics.written",
    "save.sweeping",
    "save.begun",
    "save.staged",
    "save.part",
    "save.rank",
    "save.state",
    "save.manifest",
    "save.marked",
    "save.renamed",
    "save.unmarking",
    "save.pruning",
    "save.pruned",
)
"""`file.staged` is reached for every small file of JSON, before it takes its place; `metrics.written` for every line of
the log; the rest in the order a save gets there: `save.sweeping` for each thing that a crash had left, `save.part` for
each file of tensors, `save.marked` and `save.unmarking` where the checkpoint is the best so far, `save.pruning` for
each old one."""

_ASKED = re.compile(r"(?P<name>[\w.]+)(:(?P<time>\d+))?(@(?P<rank>\d+))?(=(?P<how>kill|full))?")
_times: Counter[str] = Counter()


def reached(name: str) -> None:
    """Say that the process has got to a fail-point; OSError or the end, if that is asked for."""
    assert name in FAIL_POINTS, f"{name} is not listed"
    asked = os.environ.get("TRAINWORKS_FAIL_AT")
    if asked is None:
        return
    match = _ASKED.fullmatch(asked)
    assert match, f"TRAINWORKS_FAIL_AT={asked}: expected NAME[:TIME][@RANK][=kill|full]"
    if match["name"] != name or (match["rank"] or os.environ.get("RANK", "0")) != os.environ.get("RANK", "0"):
        return
    _times[name] += 1
    if _times[name] != int(match["time"] or 1):
        return
    if match["how"] == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
    os.kill(os.getpid(), signal.SIGKILL)
