"""Near-duplicates: candidates by MinHash bands (Broder 1997), every one of them verified by its exact Jaccard index.

What is compared are the sets of a text's shingles: its words five at a time. Two texts are near-duplicates when the
shingles they share are at least `threshold` of those that either has. The bands miss one pair in a thousand at the
threshold and fewer above; what they find beneath it, the verification takes out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainworks.data.hygiene.words import Hashes, Ragged, batches, constants, mix, ngrams, read_words

__all__ = [
    "Bands",
    "NearDuplicates",
    "are_near",
    "band_keys",
    "candidates",
    "clusters",
    "near_duplicates",
    "shingle_sets",
]

Numbers = NDArray[np.int64]
Pairs = NDArray[np.int64]

_MISSED = 1e-3
"""Share of the pairs at the threshold that may go unseen."""
_HASHES = 64
_WINDOW = 32
"""Texts with one key are paired with this many before them, and with the first: all pairs of a small group, and a
bounded number in a large one, where being alike to the first is what matters."""
_CHUNK = 4_000_000
_PARTS = 1_000_000


class Bands(NamedTuple):
    """How the hashes of a text are cut: two texts that agree on all hashes of a band are candidates."""

    number: int
    rows: int

    @classmethod
    def at(cls, threshold: float) -> Bands:
        """Return the bands of the most rows, so of the fewest false candidates, that see all but one in a thousand of
        the pairs at the threshold."""
        plans = [cls(_needed(threshold, rows), rows) for rows in range(1, 17)]
        affordable = [plan for plan in plans if plan.number * plan.rows <= _HASHES]
        return affordable[-1] if affordable else plans[0]

    def recall(self, jaccard: float) -> float:
        """Return the share of pairs of that index which become candidates."""
        return 1 - (1 - jaccard**self.rows) ** self.number


def _needed(threshold: float, rows: int) -> int:
    agree = threshold**rows
    return 1 if agree >= 1 - _MISSED else math.ceil(math.log(_MISSED) / math.log(1 - agree))


class NearDuplicates(NamedTuple):
    """The verified pairs [number, 2], first text first, and which texts to keep: the first of each cluster."""

    pairs: Pairs
    keep: NDArray[np.bool_]


def near_duplicates(texts: Sequence[str], threshold: float = 0.85, ngram: int = 5) -> NearDuplicates:
    """Find the near-duplicates among texts.

    >>> near_duplicates(["one two three four five six", "One, two, three, four, five, six!", "else"]).keep.tolist()
    [True, False, True]
    """
    bands = Bands.at(threshold)
    keys, filled = band_keys(texts, bands, ngram=ngram)
    rows = np.flatnonzero(filled)
    found = np.unique(np.concatenate([candidates(band[filled], rows) for band in keys]), axis=0)
    concerned = np.unique(found)
    sets = shingle_sets([texts[row] for row in concerned], ngram=ngram)
    verified = found[are_near(sets, np.searchsorted(concerned, found), threshold)]
    roots = clusters(verified, len(texts))
    return NearDuplicates(verified, roots == np.arange(len(texts)))


def band_keys(texts: Sequence[str], bands: Bands, *, ngram: int) -> tuple[Hashes, NDArray[np.bool_]]:
    """Return the keys as [bands, texts], and which texts have any words; the keys of the others mean nothing."""
    keys = np.zeros((bands.number, len(texts)), np.uint64)
    filled = np.zeros(len(texts), np.bool_)
    for first, part in batches(texts):
        shingles = ngrams(read_words(part), ngram)
        filled[first : first + len(part)] = shingles.counts > 0
        if len(shingles.hashes):
            rows = first + np.flatnonzero(shingles.counts)
            keys[:, rows] = _keys(shingles, bands)
    return keys, filled


def _keys(shingles: Ragged, bands: Bands) -> Hashes:
    starts = shingles.offsets[:-1][shingles.counts > 0]
    factors = constants(bands.number * bands.rows, seed=2) | np.uint64(1)
    terms = constants(bands.number * bands.rows, seed=3)
    keys = np.zeros((bands.number, len(starts)), np.uint64)
    values = np.empty_like(shingles.hashes)
    for number, (factor, term) in enumerate(zip(factors, terms, strict=True)):
        np.multiply(shingles.hashes, factor, out=values)
        values += term
        key = keys[number // bands.rows]
        key *= np.uint64(0xD6E8FEB86659FD93)
        key += np.minimum.reduceat((values >> np.uint64(32)).astype(np.uint32), starts)
    return mix(keys)


def candidates(keys: Hashes, rows: Numbers) -> Pairs:
    """Return the pairs of rows, the smaller first, whose key in one band is the same; `rows` ascend."""
    order = np.argsort(keys, kind="stable")
    keys, rows = keys[order], rows[order]
    same = np.concatenate([[False], keys[1:] == keys[:-1]])
    leaders = np.maximum.accumulate(np.where(same, 0, np.arange(len(keys))))
    places = np.arange(len(keys)) - leaders
    found = [(rows[leaders[places > 0]], rows[places > 0])]
    for distance in range(1, min(_WINDOW, int(places.max(initial=0)))):
        later = np.flatnonzero(places > distance)
        found.append((rows[later - distance], rows[later]))
    return np.concatenate([np.stack(pair, axis=1) for pair in found])


def shingle_sets(texts: Sequence[str], *, ngram: int) -> Ragged:
    """Return the shingles of each text, each once, in ascending order."""
    hashes, counts = [np.empty(0, np.uint64)], [np.zeros(1, np.int64)]
    for _, part in batches(texts):
        shingles = ngrams(read_words(part), ngram)
        order = np.lexsort((shingles.hashes, shingles.owners))
        values, owners = shingles.hashes[order], shingles.owners
        new = np.ones(len(values), np.bool_)
        new[1:] = (values[1:] != values[:-1]) | (owners[1:] != owners[:-1])
        hashes.append(values[new])
        counts.append(np.bincount(owners[new], minlength=len(part)))
    return Ragged(np.concatenate(hashes), np.cumsum(np.concatenate(counts)))


def are_near(sets: Ragged, pairs: Pairs, threshold: float) -> NDArray[np.bool_]:
    """Return for each pair of places in `sets` whether the exact Jaccard index reaches the threshold."""
    sizes = sets.counts[pairs].sum(axis=1)
    near = np.zeros(len(pairs), np.bool_)
    chunks = np.cumsum(sizes) // _CHUNK
    for chunk in np.unique(chunks):
        these = slice(*np.searchsorted(chunks, [chunk, chunk + 1]))
        shared = _shared(sets, pairs[these])
        near[these] = shared * _PARTS >= round(threshold * _PARTS) * (sizes[these] - shared)
    return near


def _shared(sets: Ragged, pairs: Pairs) -> Numbers:
    counts = sets.counts[pairs].ravel()
    ends = np.cumsum(counts)
    places = np.arange(ends[-1]) + np.repeat(sets.offsets[:-1][pairs].ravel() - (ends - counts), counts)
    values = sets.hashes[places]
    owners = np.repeat(np.arange(len(pairs)), sets.counts[pairs].sum(axis=1))
    order = np.lexsort((values, owners))
    values = values[order]
    twice = (values[1:] == values[:-1]) & (owners[1:] == owners[:-1])
    return np.bincount(owners[1:][twice], minlength=len(pairs))


def clusters(pairs: Pairs, number: int) -> Numbers:
    """Return for each of `number` texts the first of its cluster: those that pairs join, directly or by others."""
    roots = list(range(number))

    def root(row: int) -> int:
        while roots[row] != row:
            roots[row] = row = roots[roots[row]]
        return row

    for one, other in pairs.tolist():
        first, second = sorted((root(one), root(other)))
        roots[second] = first
    for row in range(number):  # a root is never after its member, so it is final when its turn comes
        roots[row] = roots[roots[row]]
    return np.array(roots, np.int64)
