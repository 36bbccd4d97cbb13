"""What `data.clean` of a run file says: how training rows are cleaned before anything is learned from them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, Strict, model_validator

from trainworks.settings import Count, Name, Settings, SomeNames

__all__ = ["Clean", "Decontaminate", "EvaluationSet", "Languages", "Length", "Local", "NearDuplicate", "Ray", "Slurm"]

Positive = Annotated[float, Strict(), Field(gt=0, le=1)]


class Length(Settings):
    """Keep texts of these lengths, in words; a character counts as one where a script has no spaces."""

    min_words: Annotated[int, Strict(), Field(ge=0)] = 1
    """The shortest that stays."""
    max_words: Count | None = None
    """The longest that stays; any when absent."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.max_words is not None and self.max_words < self.min_words:
            raise ValueError(f"max_words ({self.max_words}) is below min_words ({self.min_words}): nothing would stay")
        return self


class Languages(Settings):
    """Keep texts in these languages, as told by a model that comes with the package py3langid."""

    keep: SomeNames
    """ISO 639 codes, such as `en`; `zxx` is text in no language, such as numbers."""
    min_score: Positive = 0.5
    """How likely the language has to be; short texts are told less surely."""


class NearDuplicate(Settings):
    """Keep the first of texts that are nearly the same: found by MinHash, verified exactly."""

    threshold: Positive = 0.85
    """Jaccard index of the two texts' shingles from which they count as near-duplicates."""
    ngram: Count = 5
    """Words of a shingle."""


class EvaluationSet(Settings):
    """An evaluation set that must not be trained on."""

    source: Name
    """As `data.source`: a Hub name, a file or folder, or `python-docs`."""
    subset: Name | None = None
    """As `data.subset`."""
    revision: Name = "main"
    """As `data.revision`."""
    split: SomeNames = ("test",)
    """The splits to look for; in a local folder, file names or patterns. A single file has `train`."""
    columns: SomeNames
    """Columns whose text is looked for, each by itself."""


class Decontaminate(Settings):
    """Leave out texts in which items of evaluation sets are found: whole, cut, or changed in a few words."""

    against: Annotated[tuple[Literal["validation"] | EvaluationSet, ...], Field(min_length=1)]
    """The evaluation sets; `validation` is the run's own rows for evaluation."""
    ngram: Annotated[int, Strict(), Field(ge=5)] = 6
    """Words of an item that have to be found, in order, at least; of a shorter item, all. Items of fewer than five
    words are not looked for."""
    share: Positive = 0.4
    """Share of an item's words that has to be found."""


class Local(Settings):
    """Clean on this machine, in `data.clean.workers` processes."""

    type: Literal["local"] = "local"


class Slurm(Settings):
    """Clean in Slurm jobs, by datatrove's executor; the cache (TRAINWORKS_CACHE) must be on a disk they all see."""

    type: Literal["slurm"]
    partition: Name
    """Where the jobs run."""
    time: Name
    """Their time limit, such as `"04:00:00"`."""
    options: dict[str, Any] = {}
    """Other options of `datatrove.executor.SlurmPipelineExecutor`, by their own names, such as `mem_per_cpu_gb: 4`."""


class Ray(Settings):
    """Clean on a Ray cluster, by datatrove's executor; the cache (TRAINWORKS_CACHE) must be on a disk all nodes see."""

    type: Literal["ray"]
    options: dict[str, Any] = {}
    """Options of `datatrove.executor.RayPipelineExecutor`, by their own names, such as `cpus_per_task: 2`."""


class Clean(Settings):
    """What training rows go through, in this order; a stage that is not named is left out. Evaluation rows stay."""

    text: SomeNames = ("text",)
    """Columns that make a row's text, one after the other; of a conversation, what is said in it."""
    length: Length | None = None
    """Leave out what is too short or too long."""
    language: Languages | None = None
    """Leave out other languages."""
    exact: bool = False
    """Keep the first of rows with the same text."""
    near: NearDuplicate | None = None
    """Keep the first of rows with nearly the same text; `{}` for the defaults."""
    decontaminate: Decontaminate | None = None
    """Leave out rows that hold items of evaluation sets."""
    pii: Literal["count"] | None = None
    """Count e-mail addresses, telephone numbers, payment cards, bank accounts and IP addresses; no row is left out."""
    workers: Count = 1
    """Processes, or jobs at a time. What stays does not depend on it."""
    shard_rows: Count | Literal["auto"] = "auto"
    """Rows of a shard, which one process cleans at a time; auto is some 32 MB of them."""
    executor: Annotated[Local | Slurm | Ray, Field(discriminator="type")] = Local()
    """Where the stages run."""
