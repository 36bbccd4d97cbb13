"""Where the ranks meet when torchrun has started them all again.

torchrun keeps one store for all attempts, in which the addresses of the last one still stand: a rank that looks before
its peer has written the new one is refused, and the restart fails (torch 2.13, pytorch#135712 and #167288). So each
attempt of one machine gets a part of the store to itself. Over several machines the attempts are not counted alike;
there the launcher takes TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1. Delete this once torchrun makes a new store itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

__all__ = ["init_method"]

_SCHEME = "restarted"


def init_method() -> str | None:
    """Return the `init_method` of this attempt's process group, None for torch's own; to be asked once in a process
    that joins none yet."""
    from torch.distributed import is_initialized
    from torch.distributed.rendezvous import register_rendezvous_handler

    if _attempt() == 0 or os.environ["GROUP_WORLD_SIZE"] != "1" or is_initialized():
        return None
    register_rendezvous_handler(_SCHEME, _meet)
    return f"{_SCHEME}://"


def _attempt() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _meet(url: str, **options: Any) -> Iterator[tuple[Any, int, int]]:
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, ranks = next(rendezvous("env://", **options))
    yield PrefixStore(f"attempt-{_attempt()}", store), rank, ranks
