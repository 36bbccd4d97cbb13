"""The evaluation harness: any task's model or baseline, measured on a split, with intervals and paired comparisons."""

from __future__ import annotations

from trainworks.evaluation.harness import (
    compare_with_baselines,
    evaluate,
    evaluate_baselines,
    goal_outcome,
    is_best,
    read_statistics,
)
from trainworks.evaluation.statistics import compare, estimate, merge

__all__ = [
    "compare",
    "compare_with_baselines",
    "estimate",
    "evaluate",
    "evaluate_baselines",
    "goal_outcome",
    "is_best",
    "merge",
    "read_statistics",
]
