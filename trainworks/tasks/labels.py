"""What tasks with one class a row have in common, whatever the row is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from trainworks.data.bad_rows import BadRow, BadRowsError, excerpt
from trainworks.data.columns import class_ids, class_names
from trainworks.errors import DataError
from trainworks.metrics import RankedPrediction
from trainworks.tasks.base import Baseline

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["class_facts", "class_head", "majority_class", "several_classes", "without_class"]


def without_class(rows: Dataset, column: str, names: Sequence[str]) -> Iterator[BadRow]:
    """Yield rows without a label, or with one that is no class."""
    try:
        class_ids(rows, column, names)
    except BadRowsError as error:
        yield from error.problems


def several_classes(rows: Dataset, column: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the class names, or where there are none those that the rows have; DataError for one alone."""
    names = names or class_names(rows, column)
    if len(names) < 2:
        found = excerpt(repr(names[0]))
        raise DataError(f"column {column!r} has one class only ({found}): there is nothing to tell apart")
    return names


def class_head(names: Sequence[str]) -> dict[str, Any]:
    """Return the classes for a model's configuration."""
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
    }


def class_facts(samples: Dataset, names: Sequence[str]) -> dict[str, Any]:
    """Return one counted label a row, and the rows of each class."""
    rows = Counter(samples["labels"][:])
    return {"counted": len(samples), "labels": {name: rows[number] for number, name in enumerate(names)}}


def majority_class(train: Dataset, evaluation: Dataset, num_classes: int) -> dict[str, Baseline]:
    """Return `majority class`: always the commonest class of the training rows, each as likely as it is often there."""
    counts = Counter(train["labels"][:])
    majority = max(counts, key=lambda label: (counts[label], -label))
    share = np.array([(counts[number] + 1) / (len(train) + num_classes) for number in range(num_classes)])
    truth = np.asarray(evaluation["labels"][:])
    losses = np.stack([-np.log(share[truth]), np.ones(len(truth))], axis=1)
    ranks = [int(np.sum(share > share[label])) for label in truth]
    said = {row: RankedPrediction(majority, int(label), ranks[row]) for row, label in enumerate(truth)}
    return {"majority class": Baseline(losses, said)}
