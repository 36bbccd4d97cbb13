"""A trained model as files that others load: plain safetensors, adapters, merged weights."""

from __future__ import annotations

from trainworks.exporting.merging import merge_adapters
from trainworks.exporting.weights import export

__all__ = ["export", "merge_adapters"]
