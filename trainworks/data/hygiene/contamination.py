"""Contamination: training texts in which items of an evaluation set are found, whole, cut or slightly changed.

Runs of five words are looked up. Those that a text and an item share at like distances from one another (so that the
text says them in the item's order, but for a word here and there) are taken together, and the item's words that they
cover are counted. An item counts as found when that is a share of its words and at least a certain number, or all of a
shorter one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainworks.data.hygiene.exact import first_of_each
from trainworks.data.hygiene.words import Hashes, Ragged, batches, ngrams, read_words

__all__ = ["SHORTEST", "Index", "contaminated", "index_items"]

Numbers = NDArray[np.int64]

SHORTEST = 5
"""Words of the shortest item that is looked for, and of the runs that are looked up."""
_SAME_RUN = 16
"""Items in which one run of words is looked up; with more it says little, and would take long."""
_DRIFT = 8
"""Words by which a text may be longer or shorter than the item between two runs."""
_BITS = 24


@dataclass(frozen=True)
class Index:
    """Evaluation items, ready to be looked for: their runs of words in the order of their hashes."""

    hashes: Hashes
    items: Numbers
    """The item of each run."""
    places: Numbers
    """Its first word's place in that item."""
    needed: Numbers
    """For each item, the words to be found; 0 for one that is too short or the same as one before."""
    num_short: int
    """Items of fewer than five words, which are not looked for."""


def index_items(texts: Sequence[str], ngram: int = 6, share: float = 0.4) -> Index:
    """Index evaluation items; one is found by `share` of its words, at least `ngram` or all of a shorter one."""
    parts = [read_words(part) for _, part in batches(texts)]
    lengths = np.concatenate([np.empty(0, np.int64), *(words.counts for words in parts)])
    runs = [ngrams(words, SHORTEST, whole=False) for words in parts]
    hashes = np.concatenate([np.empty(0, np.uint64), *(run.hashes for run in runs)])
    counts = np.maximum(lengths - SHORTEST + 1, 0)
    ends = np.cumsum(counts)
    items = np.repeat(np.arange(len(lengths)), counts)
    places = np.arange(len(hashes)) - np.repeat(ends - counts, counts)
    kept = _distinct(parts, lengths)[items]
    hashes, items, places = hashes[kept], items[kept], places[kept]
    order = np.argsort(hashes, kind="stable")
    hashes, items, places = hashes[order], items[order], places[order]
    few = np.ones(len(hashes), np.bool_)
    few[_SAME_RUN:] = hashes[_SAME_RUN:] != hashes[:-_SAME_RUN]
    hashes, items, places = hashes[few], items[few], places[few]
    covered = _covered(items, places, len(lengths))
    needed = np.minimum(covered, np.maximum(np.minimum(ngram, lengths), np.ceil(share * covered).astype(np.int64)))
    return Index(hashes, items, places, needed, int((lengths < SHORTEST).sum()))


def _distinct(parts: Sequence[Ragged], lengths: Numbers) -> NDArray[np.bool_]:
    """Return which items do not say the same words as one before."""
    longest = int(lengths.max(initial=1))
    keys = [np.empty(0, np.uint64), *(ngrams(words, longest).hashes for words in parts)]
    distinct = np.ones(len(lengths), np.bool_)
    whole = np.concatenate(keys)
    distinct[lengths > 0] = first_of_each(np.stack([whole, whole], axis=1))
    return distinct


def _covered(groups: Numbers, places: Numbers, number: int) -> Numbers:
    """Return for each group how many words its runs cover, each word once."""
    order = np.lexsort((places, groups))
    groups, places = groups[order], places[order]
    new = np.full(len(places), SHORTEST)
    same = groups[1:] == groups[:-1]
    new[1:][same] = np.minimum(SHORTEST, (places[1:] - places[:-1])[same])
    return np.bincount(groups, weights=new, minlength=number).astype(np.int64)


def contaminated(texts: Sequence[str], index: Index) -> Numbers:
    """Return for each text the first item found in it, or -1.

    >>> index = index_items(["How many legs does a healthy adult spider have?"])
    >>> contaminated(["Q: how many legs does a healthy adult spider have", "Spiders have legs."], index).tolist()
    [0, -1]
    """
    found = np.full(len(texts), -1)
    seen = np.zeros(1 << _BITS, np.bool_)
    seen[index.hashes >> np.uint64(64 - _BITS)] = True
    for first, part in batches(texts):
        runs = ngrams(read_words(part), SHORTEST, whole=False)
        maybe = np.flatnonzero(seen[runs.hashes >> np.uint64(64 - _BITS)])
        rows, items = _found(runs, maybe, index)
        found[first + rows[::-1]] = items[::-1]
    return found


def _found(runs: Ragged, maybe: Numbers, index: Index) -> tuple[Numbers, Numbers]:
    """Return texts and the items found in them, in the order of both."""
    hashes, owners = runs.hashes[maybe], runs.owners[maybe]
    low = np.searchsorted(index.hashes, hashes, side="left")
    counts = np.searchsorted(index.hashes, hashes, side="right") - low
    ends = np.cumsum(counts)
    entries = np.arange(ends[-1] if len(ends) else 0) + np.repeat(low - (ends - counts), counts)
    rows, items, places = np.repeat(owners, counts), index.items[entries], index.places[entries]
    starts = np.repeat(maybe, counts) - places
    order = np.lexsort((starts, items, rows))
    rows, items, places, starts = rows[order], items[order], places[order], starts[order]
    new = np.ones(len(rows), np.bool_)
    new[1:] = (rows[1:] != rows[:-1]) | (items[1:] != items[:-1]) | (starts[1:] - starts[:-1] > _DRIFT)
    passages = np.cumsum(new) - 1
    enough = _covered(passages, places, int(new.sum())) >= index.needed[items[new]]
    return rows[new][enough], items[new][enough]
