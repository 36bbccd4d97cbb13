"""The process that prepares rows for another: python -m trainworks.data.preparing_worker."""

from __future__ import annotations

from trainworks.data.building import work

__all__: list[str] = []

if __name__ == "__main__":
    work()
