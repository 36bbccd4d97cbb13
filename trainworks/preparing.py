"""What can be done ahead of a run: its rows cleaned, its tokenizer trained, its samples prepared; all of it kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainworks.record import StageFacts
    from trainworks.schema import RunConfig

__all__ = ["Preparation", "PreparedSource", "prepare_ahead"]


@dataclass(frozen=True)
class PreparedSource:
    """What became of one source."""

    name: str
    cleaning: tuple[StageFacts, ...]
    samples: dict[str, int]
    """Samples of each split."""


@dataclass(frozen=True)
class Preparation:
    """What was prepared; printed, it is a table."""

    sources: tuple[PreparedSource, ...]

    def __str__(self) -> str:
        return "\n".join(line for source in self.sources for line in _lines(source))


def _lines(source: PreparedSource) -> Iterator[str]:
    yield source.name
    for stage in source.cleaning:
        yield f"  {stage.name:<14} {stage.rows_in:>12,} -> {stage.rows_out:<12,} {_counts(stage.removed)}".rstrip()
        if stage.found:
            yield f"  {'':<14} {_counts(stage.found)}"
    for split, number in source.samples.items():
        yield f"  {split:<14} {number:>12,} samples"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name}: {number:,}" for name, number in counts.items())


def prepare_ahead(config: RunConfig[Any]) -> Preparation:
    """Clean, tokenize and keep all that a run of this configuration will look for; it then finds everything.

    Nothing is done twice: a run that was killed is gone on with, and what is done is only counted. Raises the
    ToolkitErrors that the run would.
    """
    from pretrain.recipe import processor_of
    from trainworks.samples import equipped, prepared_splits, read_rows

    sources = read_rows(config)
    processor = equipped(sources, processor_of(config, sources))
    tools = sources[0].task.fingerprint(processor)  # before it is used: a tokenizer remembers how it was called
    return Preparation(
        tuple(
            PreparedSource(
                source.name,
                source.rows.cleaning,
                {
                    split: len(prepared.samples)
                    for split, prepared in prepared_splits(config, source, processor, tools).items()
                },
            )
            for source in sources
        )
    )
