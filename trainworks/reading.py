"""What `data` of a run file says: where rows come from, and how several sources are mixed."""

from __future__ import annotations

import sys
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    PlainSerializer,
    Strict,
    Tag,
    WithJsonSchema,
    model_validator,
)

from trainworks.cleaning import Clean
from trainworks.settings import Count, Name, Names, Settings, Share, SomeNames

__all__ = ["AnyData", "Data", "Limit", "Mixture", "Part", "Reading", "Workers"]


def _source(value: Any) -> Any:
    """Let a name through as it is, and a Dataset that is already in memory (so `datasets` is already imported)."""
    datasets = sys.modules.get("datasets")
    allowed = (str,) if datasets is None else (str, datasets.Dataset, datasets.DatasetDict)
    if not isinstance(value, allowed):
        raise ValueError("expected a Hub name, a path, 'python-docs', or a datasets.Dataset / DatasetDict")
    return value


def _describe_source(value: Any) -> str:
    return value if isinstance(value, str) else f"<{type(value).__name__} in memory>"


Source = Annotated[
    Any,
    BeforeValidator(_source),
    PlainSerializer(_describe_source, return_type=str),
    WithJsonSchema({"type": "string"}),
]


class Limit(Settings):
    """Take only the first rows of a split, after shuffling it once by the run's seed."""

    train: Count | None = None
    """Rows to train on; all when absent."""
    validation: Count | None = None
    """Rows to evaluate on; all when absent."""


class Reading(Settings):
    """Rows of one source: which, and how they are read."""

    source: Source
    """A Hub name, a file or folder (jsonl, json, csv, tsv, parquet, txt, arrow), `python-docs`, or a Dataset in
    memory."""
    subset: Name | None = None
    """The Hub data set's configuration name; for `python-docs`, `text` or `questions`."""
    revision: Name = "main"
    """Branch, tag or commit on the Hub."""
    train: SomeNames = ("train",)
    """The split to train on. In a local folder: file names or patterns."""
    validation: Names | None = None
    """The split to evaluate on; when absent, `holdout` of the training rows."""
    holdout: Share = 0.05
    """Share of the training rows held out for evaluation when no validation split is named; 0 for none."""
    holdout_by: Name | None = None
    """Column whose equal values hold rows together, such as a text that several questions are about: all of them are
    held out, or none, until the share is reached."""
    layout: Literal["rows", "class-folders", "coco", "voc", "yolo", "masks"] = "rows"
    """How a local folder is laid out: files of rows, or images in a folder for each class, with boxes as COCO, Pascal
    VOC or YOLO write them, or with masks in a folder of their own."""
    columns: dict[Name, Name] = {}
    """Rename columns before the task sees them: {task's name: source's name}."""
    limit: Limit = Limit()
    """Use fewer rows."""
    bad_rows: Literal["error", "skip", "quarantine"] = "error"
    """What rows that cannot be used do: end the run, be left out and counted, or be listed in the cache besides."""
    clean: Clean | None = None
    """What the training rows go through before they are used; `trainworks prepare` does it ahead of the run."""

    @model_validator(mode="after")
    def _holds_out(self) -> Self:
        if self.holdout_by is not None and (self.validation is not None or self.holdout == 0):
            raise ValueError("holdout_by does nothing where no training rows are held out; leave it out")
        return self


class Workers(Settings):
    """The processes that data is given."""

    prepare_workers: Count | Literal["auto"] = "auto"
    """Processes that turn rows to samples before training; auto is one a core. What they make does not depend on it."""
    workers: Annotated[int, Strict(), Field(ge=0)] = 0
    """Processes that collate batches ahead of the model; 0 collates in the training process."""


class Data(Workers, Reading):
    """Where the rows come from, when that is one place. Nothing of a source is executed: scripts on the Hub are
    refused."""

    def readings(self) -> dict[str, Reading]:
        """Return the one source, by its name."""
        return {_describe_source(self.source): self}


class Part(Reading):
    """One source of a mixture, and its share."""

    weight: Annotated[float, Strict(), Field(gt=0)] | None = None
    """Its share of the whole beside the others' weights; every source has one, or none has."""
    epochs: Annotated[float, Strict(), Field(gt=0)] | Literal["any"] = "any"
    """How often it may be passed over; after that the others share what is left."""


class Mixture(Workers):
    """Rows from several sources, each with its share, kept at every moment of the run."""

    sources: Annotated[dict[Name, Part], Field(min_length=1)]
    """By a name of your choice, which the record and the card use."""
    shares: Literal["tokens", "rows"] = "tokens"
    """What weights are shares of."""
    temperature: Annotated[float, Strict(), Field(ge=1)] = 1.0
    """Without weights, a source's share is its size to the power 1 / temperature: 1 keeps the proportions, more evens
    them out (Arivazhagan et al. 2019)."""

    @model_validator(mode="after")
    def _all_or_none(self) -> Self:
        without = [name for name, part in self.sources.items() if part.weight is None]
        if 0 < len(without) < len(self.sources):
            raise ValueError(f"give every source a weight, or none: {', '.join(without)} has none")
        if self.temperature != 1 and not without:
            raise ValueError("temperature does nothing beside weights; leave one of them out")
        return self

    def readings(self) -> dict[str, Reading]:
        """Return every source, by its name."""
        return dict(self.sources)


def _data_kind(value: Any) -> str:
    return "mixture" if isinstance(value, Mixture) or (isinstance(value, dict) and "sources" in value) else "one"


AnyData = Annotated[Annotated[Data, Tag("one")] | Annotated[Mixture, Tag("mixture")], Discriminator(_data_kind)]
