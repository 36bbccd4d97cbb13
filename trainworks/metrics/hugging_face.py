"""Metrics from Hugging Face's `evaluate`, by name or by local path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from trainworks.errors import EvaluationError, nearest
from trainworks.metrics.base import Prediction, Statistics

__all__ = ["HuggingFaceMetric"]


@dataclass(frozen=True)
class HuggingFaceMetric:
    """Compute one number of an `evaluate` module.

    An `evaluate` module is code: it is downloaded (or read from the path) and run with your rights. Name only what you
    trust.
    """

    spec: str
    """`module` or `module:key`: a name on the Hub (`accuracy`, `owner/module`), or a script's or its folder's path."""
    higher_is_better: bool = True
    max_resamples: ClassVar[int] = 200

    @property
    def name(self) -> str:
        """The module's bare name, with `:key` where one was given."""
        path, key = self._parts
        return f"{Path(path).stem}:{key}" if key else Path(path).stem

    @property
    def _parts(self) -> tuple[str, str]:
        """The module and the key; a colon before a slash belongs to a path, as in `C:/metrics/accuracy`."""
        path, colon, key = self.spec.rpartition(":")
        return (path, key) if colon and not {"/", "\\"} & set(key) else (self.spec, "")

    @cached_property
    def module(self) -> Any:
        """The loaded module; ask for it before a run begins, so that a missing one is known then (EvaluationError)."""
        import evaluate

        path, _ = self._parts
        try:
            return evaluate.load(path, keep_in_memory=True)
        except ImportError as error:
            raise EvaluationError(f"metric {self.spec!r}: the module needs a package: {error}") from error
        except (OSError, ValueError, TypeError, AttributeError, SyntaxError) as error:
            stem = Path(path).stem
            raise EvaluationError(
                f"metric {self.spec!r}: no `evaluate` module could be loaded as {path!r}: {error}\n"
                "  allowed: the name of a module on the Hub (which must be reachable), or a script or its folder; "
                f"without network, save the module's script as {stem}/{stem}.py and give that folder: './{stem}'"
            ) from error

    def statistics(self, predictions: Sequence[Prediction]) -> Statistics:
        """Return an object array [examples, 2] of prediction and reference, as the module takes them."""
        rows = np.empty((len(predictions), 2), dtype=object)
        for row, each in zip(rows, predictions, strict=True):
            row[0], row[1] = each.prediction, each.reference
        return rows

    def value(self, statistics: Statistics) -> float:
        """Return the number under the key; EvaluationError where the module refuses the rows or has no such number."""
        if not len(statistics):
            return float("nan")
        predictions, references = statistics[:, 0].tolist(), statistics[:, 1].tolist()
        try:
            result = self.module.compute(predictions=predictions, references=references)
        except (ValueError, TypeError, KeyError) as error:
            raise EvaluationError(
                f"metric {self.spec!r}: the module refused the task's predictions, such as "
                f"{predictions[:1]} with references {references[:1]}: {error}"
            ) from error
        return self._number(result or {})

    def _number(self, result: dict[str, Any]) -> float:
        path, key = self._parts
        only = next(iter(result)) if len(result) == 1 else Path(path).stem
        wanted = key or only
        if wanted not in result:
            raise EvaluationError(
                f"metric {self.spec!r}: the module's result has no {wanted!r}{nearest(wanted, result)}; it has "
                f"{', '.join(sorted(result)) or 'nothing'}; write {path}:KEY with one of these"
            )
        try:
            return float(result[wanted])
        except (TypeError, ValueError):
            raise EvaluationError(
                f"metric {self.spec!r}: {wanted!r} is {result[wanted]!r}, and a metric is one number; "
                f"the module's result has {', '.join(sorted(result))}"
            ) from None
