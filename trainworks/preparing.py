"""What can be done ahead of a run: its rows cleaned, its tokenizer trained, its samples prepared; all of it kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainworks.samples import SourceSamples
    from trainworks.schema import RunConfig

__all__ = ["Preparation", "prepare_ahead"]


@dataclass(frozen=True)
class Preparation:
    """What was prepared; printed, it is a table."""

    parts: tuple[SourceSamples, ...]

    def __str__(self) -> str:
        return "\n".join(line for part in self.parts for line in _lines(part))


def _lines(part: SourceSamples) -> Iterator[str]:
    yield part.source.name
    for stage in part.source.rows.cleaning:
        yield f"  {stage.name:<14} {stage.rows_in:>12,} -> {stage.rows_out:<12,} {_counts(stage.removed)}".rstrip()
        if stage.found:
            yield f"  {'':<14} {_counts(stage.found)}"
    for split, prepared in part.splits.items():
        samples = f"sample{'' if len(prepared.samples) == 1 else 's'}"
        yield f"  {split:<14} {len(prepared.samples):>12,} {samples:<15} {_counts(part.left_out(split))}".rstrip()
    for listing in part.source.rows.listings:
        yield f"  bad rows are listed in {listing}"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name}: {number:,}" for name, number in counts.items())


def prepare_ahead(config: RunConfig[Any]) -> Preparation:
    """Clean, tokenize and keep all that a run of this configuration will look for; it then finds everything.

    Nothing is done twice: a run that was killed is gone on with, and what is done is only counted. Raises the
    ToolkitErrors that the run would.
    """
    from pretrain.recipe import processor_of
    from trainworks.samples import equipped, prepare_sources, read_rows

    sources = read_rows(config)
    return Preparation(tuple(prepare_sources(config, sources, equipped(sources, processor_of(config, sources)))))
