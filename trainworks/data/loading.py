"""From prepared samples to the micro-batches of each optimizer step, on this rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from trainworks.data.order import Integers, Key, Plan, deal, mix
from trainworks.data.packing import Packs, alone

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

__all__ = ["Batch", "Collate", "Row", "Samples", "Window", "evaluation_batches", "lengths", "windows"]

Row = dict[str, Any]
"""A prepared row with its `index`, `epoch`, `source`, `seed` and `weight`, and `pack`: the line of the batch it stands
on. Rows of one line follow one another. Where rows are paired, `partner` is another one, drawn from the seed."""
Batch = dict[str, "Tensor"]
"""What a task collates, with `index`, `source` and `weight`, each [original rows]."""
Collate = Callable[[Sequence[Row]], Batch]


@dataclass(frozen=True)
class Samples:
    """Prepared rows, and which of them make one training sample."""

    rows: Dataset
    packs: Packs
    paired: bool = False
    """Whether each row brings a partner along."""

    def lengths(self) -> Integers | None:
        """Return the tokens of each sample, or None for data that is not counted in tokens."""
        sizes = lengths(self.rows)
        return None if sizes is None else self.packs.totals(sizes)

    def __len__(self) -> int:
        return len(self.packs)


@dataclass(frozen=True)
class _Fetched:
    """Samples that are fetched by keys, many at a time, as torch's loader asks: the rows of all of them, in a row."""

    samples: Samples
    seed: int

    def __getitems__(self, keys: Sequence[Key]) -> list[Row]:
        numbers, owners = self.samples.packs.take(np.array([key.sample for key in keys]))
        epochs = np.array([key.epoch for key in keys])[owners]
        columns: Mapping[str, Sequence[Any]] = self.samples.rows[numbers]
        own = zip(numbers.tolist(), owners.tolist(), mix(self.seed, epochs, numbers).tolist(), strict=True)
        partners = self._partners(numbers, epochs) if self.samples.paired else [{}] * len(numbers)
        return [
            {"source": 0}
            | {name: values[place] for name, values in columns.items()}
            | {"index": number, "epoch": keys[line].epoch, "weight": keys[line].weight}
            | {"seed": seed, "pack": line}
            | partners[place]
            for place, (number, line, seed) in enumerate(own)
        ]

    def _partners(self, numbers: Integers, epochs: Integers) -> list[Row]:
        """Return each row's partner: a prepared row like it, that depends on nothing but the row's seed."""
        drawn = mix(self.seed, epochs, numbers, 1) % len(self.samples.rows)
        columns: Mapping[str, Sequence[Any]] = self.samples.rows[drawn.astype(np.int64)]
        return [{"partner": {name: values[place] for name, values in columns.items()}} for place in range(len(numbers))]

    def __getitem__(self, key: Key) -> list[Row]:
        return self.__getitems__([key])

    def __len__(self) -> int:
        return len(self.samples)


@dataclass(frozen=True)
class _Collated:
    """A task's collate, with the columns every batch carries added to it."""

    collate: Collate

    def __call__(self, rows: Sequence[Row]) -> Batch:
        import torch

        batch = self.collate(rows)
        own = {
            "index": torch.tensor([row["index"] for row in rows]),
            "source": torch.tensor([row["source"] for row in rows]),
            "weight": torch.tensor([row["weight"] for row in rows], dtype=torch.float32),
        }
        return own | batch


def _batches(
    samples: Samples, keys: Iterator[list[Key]], collate: Collate, *, seed: int, workers: int, pin: bool
) -> Iterator[Batch]:
    import torch
    from torch.utils.data import DataLoader

    # Without a generator of its own the loader draws from the global one, and evaluation would change the dropout.
    return iter(
        DataLoader(
            _Fetched(replace(samples, rows=samples.rows.with_format("numpy")), seed),  # type: ignore[arg-type]
            batch_sampler=keys,
            collate_fn=_Collated(collate),
            num_workers=workers,
            pin_memory=pin,
            generator=torch.Generator(),
        )
    )


def _sorted(samples: Integers, epochs: Integers, sizes: Integers | None) -> list[Key]:
    """Sort a step's samples by length, so that its micro-batches hold little padding; the step's sums stay the same."""
    order = np.arange(len(samples)) if sizes is None else np.argsort(-sizes[samples], kind="stable")
    return [Key(int(samples[place]), int(epochs[place]), 1.0) for place in order]


def lengths(rows: Dataset) -> Integers | None:
    """Return the tokens of each prepared row, or None for data that is not counted in tokens."""
    return np.asarray(rows.with_format("numpy")["length"][:]) if "length" in rows.column_names else None


@dataclass(frozen=True)
class Window:
    """One optimizer step's work on this rank, and what the step is over all ranks."""

    batches: list[Batch]
    samples: int
    tokens: int
    """Padding not counted; 0 for data that is not counted in tokens."""


def windows(
    samples: Samples,
    plan: Plan,
    collate: Collate,
    *,
    start: int,
    ranks: int,
    rank: int,
    micro: int,
    workers: int,
    pin: bool,
) -> Iterator[Window]:
    """Yield each optimizer step from `start` on. All ranks yield the same number of micro-batches for it."""
    sizes = samples.lengths()

    def dealt(step: int) -> list[list[Key]]:
        return deal(_sorted(*plan.step(step), sizes), ranks=ranks, rank=rank, micro=micro)

    keys = (micro_batch for step in range(start, plan.num_steps) for micro_batch in dealt(step))
    batches = _batches(samples, keys, collate, seed=plan.seed, workers=workers, pin=pin)
    for step in range(start, plan.num_steps):
        tokens = 0 if sizes is None else int(sizes[plan.step(step)[0]].sum())
        yield Window([next(batches) for _ in range(-(-plan.size(step) // (ranks * micro)))], plan.size(step), tokens)


def evaluation_batches(
    rows: Dataset, collate: Collate, *, ranks: int, rank: int, micro: int, workers: int = 0, pin: bool = False
) -> Iterator[Batch]:
    """Yield this rank's share of every row once, in batches; all ranks yield as many, fillers with weight 0."""
    everything = np.arange(len(rows), dtype=np.int64)
    keys = _sorted(everything, np.zeros_like(everything), lengths(rows))
    dealt = deal(keys, ranks=ranks, rank=rank, micro=micro) if keys else []
    return _batches(Samples(rows, alone(len(rows))), iter(dealt), collate, seed=0, workers=workers, pin=pin)
