"""Several sources in one order: each gets its share of the tokens, by what it is behind and not by chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from trainworks.data.order import Integers, Plan, permuted
from trainworks.errors import ConfigError

__all__ = ["Ingredient", "MixedPlan", "mixed", "shares"]


@dataclass(frozen=True, eq=False)
class Ingredient:
    """One source of a mixture."""

    name: str
    sizes: Integers
    """What each of its samples weighs, [samples]: its tokens, or 1 where shares are of rows."""
    weight: float
    """Its share of the whole, in any unit; only the proportions matter."""
    epochs: float = float("inf")
    """How often it may be passed over; after that the others share what is left."""

    @property
    def limit(self) -> float:
        """The most samples it gives, a whole number or infinite."""
        return self.epochs if math.isinf(self.epochs) else float(max(1, round(self.epochs * len(self.sizes))))


def shares(sizes: Sequence[float], weights: Sequence[float | None], *, temperature: float = 1.0) -> list[float]:
    """Return each source's share, summing to 1: its weight, or where none is given its size to the power 1 /
    temperature (Arivazhagan et al. 2019): 1 keeps the proportions, more evens them out.

    Weights are all given or all left out.

    >>> shares([100.0, 1.0], [None, None], temperature=2.0)
    [0.9090909090909091, 0.09090909090909091]
    """
    given = [weight for weight in weights if weight is not None]
    if given and len(given) < len(weights):
        raise ConfigError("data.sources: give every source a weight, or none of them")
    parts = given or [size ** (1.0 / temperature) for size in sizes]
    return [part / sum(parts) for part in parts]


@dataclass(frozen=True, eq=False, kw_only=True)
class MixedPlan(Plan):
    """Which samples of which source every optimizer step takes; samples are numbered through all sources."""

    ingredients: tuple[Ingredient, ...]
    firsts: Integers
    """The number of each source's first sample, [sources]."""
    counts: Integers
    """How many samples each source has, [sources]."""
    sources: NDArray[np.int16]
    """The source that each position from the origin on takes from, [total - origin]."""
    places: Integers
    """How many samples that source gave since the origin, [total - origin]."""

    @property
    def identity(self) -> str:
        """What decides the order besides the rows; the shares too."""
        return f"{super().identity}, shares {[(part.weight, part.epochs) for part in self.ingredients]}"

    def step(self, number: int) -> tuple[Integers, Integers]:
        """Return (samples, epochs), each [samples of step `number`]; an epoch is a pass over the sample's own
        source."""
        begin = self.position(number) - self.origin
        taken = slice(begin, begin + self.size(number))
        sources, places = self.sources[taken].astype(np.int64), self.places[taken]
        epochs = places // self.counts[sources] + self.origin
        samples = np.empty_like(places)
        for source, epoch in {*zip(sources.tolist(), epochs.tolist(), strict=True)}:
            inside = (sources == source) & (epochs == epoch)
            count = int(self.counts[source])
            samples[inside] = self.firsts[source] + _order(places[inside] % count, count, self.seed, epoch, source)
        return samples, epochs

    def going_on(self, *, step: int, position: int, origin: int = 0, steps: int | None = None) -> Self:
        """Do what `Plan.going_on` does; the first of what is left are the same whatever the total."""
        plan = super().going_on(step=step, position=position, origin=origin, steps=steps)
        if (plan.origin, plan.total - plan.origin) == (self.origin, len(self.sources)):
            return plan
        sources, places = _arranged(self.ingredients, self.seed, total=plan.total - origin, origin=origin)
        return replace(plan, sources=sources, places=places)


def mixed(ingredients: Sequence[Ingredient], *, seed: int, per_step: int, total: int) -> MixedPlan:
    """Plan `total` samples, at every moment from the source that is furthest behind its share.

    A sample stands where its source's tokens so far, divided by the source's share, put it; sorting by that is weighted
    fair queueing (Demers et al. 1989). So in any stretch a share is missed by a few samples at most. The first steps
    are the same whatever the total. ConfigError when the sources may not be passed over often enough.
    """
    counts = np.array([len(ingredient.sizes) for ingredient in ingredients])
    sources, places = _arranged(ingredients, seed, total=total, origin=0)
    return MixedPlan(
        seed=seed,
        num_samples=int(counts.sum()),
        per_step=per_step,
        total=total,
        ingredients=tuple(ingredients),
        firsts=np.cumsum(counts) - counts,
        counts=counts,
        sources=sources,
        places=places,
    )


def _arranged(
    ingredients: Sequence[Ingredient], seed: int, *, total: int, origin: int
) -> tuple[NDArray[np.int16], Integers]:
    """Return the source of each of `total` positions, and how many samples it gave before."""
    possible = sum(ingredient.limit for ingredient in ingredients)
    if possible < total:
        raise ConfigError(
            f"data.sources: their epochs allow {int(possible):,} samples, the budget asks for {total:,}; shorten the "
            "budget, or raise epochs"
        )
    streams = [_Stream(ingredient, seed, number, origin) for number, ingredient in enumerate(ingredients)]
    horizon = max(float(ingredient.sizes[0] / ingredient.weight) for ingredient in ingredients)
    while sum(stream.until(horizon) for stream in streams) < total:
        horizon *= 2.0
    merged = [np.concatenate(stream.times) for stream in streams]
    sources = np.repeat(np.arange(len(merged), dtype=np.int16), [len(part) for part in merged])
    places = np.concatenate([np.arange(len(part)) for part in merged])
    order = np.argsort(np.concatenate(merged), kind="stable")[:total]
    return sources[order], places[order]


class _Stream:
    """Where a source's samples stand in the whole, pass after pass: the tokens it gave until the middle of each, over
    its share."""

    def __init__(self, ingredient: Ingredient, seed: int, source: int, origin: int) -> None:
        self.ingredient, self.seed, self.source, self.origin = ingredient, seed, source, origin
        self.times: list[NDArray[np.float64]] = []
        self._given = self._count = 0

    def until(self, horizon: float) -> int:
        """Look as far as `horizon`, and return how many samples stand before it."""
        count = len(self.ingredient.sizes)
        while self._count < self.ingredient.limit and self._given / self.ingredient.weight <= horizon:
            order = _order(np.arange(count), count, self.seed, self.origin + len(self.times), self.source)
            sizes = self.ingredient.sizes[order[: int(min(count, self.ingredient.limit - self._count))]]
            after = self._given + np.cumsum(sizes)
            self.times.append((after - sizes / 2) / self.ingredient.weight)
            self._given, self._count = int(after[-1]), self._count + len(sizes)
        # Those of the last pass alone may stand beyond it.
        return self._count - int((np.concatenate(self.times[-2:]) > horizon).sum())


def _order(places: Integers, count: int, seed: int, epoch: int, source: int) -> Integers:
    return permuted(places, count, seed, epoch, source)
