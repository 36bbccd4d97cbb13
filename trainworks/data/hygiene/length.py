"""The length of a text in words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trainworks.data.hygiene.words import batches, read_words

__all__ = ["count_words"]


def count_words(texts: Sequence[str]) -> NDArray[np.int64]:
    """Return how many words each text has; a character counts as one where a script has no spaces.

    >>> count_words(["It's a test.", ""]).tolist()
    [4, 0]
    """
    counts = [np.empty(0, np.int64), *(read_words(part).counts for _, part in batches(texts))]
    return np.concatenate(counts)
