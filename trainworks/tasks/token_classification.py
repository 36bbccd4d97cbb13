"""Token classification: a tag for every word, such as the names of people and places in a text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, Strict

from trainworks.data.bad_rows import BadRow, BadRowsError, excerpt
from trainworks.data.cache import Prepared, ragged, table
from trainworks.data.columns import Kind, class_lists, class_names
from trainworks.data.text import IGNORED, pad, padded_by_end
from trainworks.errors import DataError
from trainworks.metrics import EntityScore, Metric, Prediction, TagAccuracy
from trainworks.metrics.entities import are_entity_tags, entity_type, is_broken
from trainworks.tasks.base import Baseline, Processor, Task
from trainworks.tasks.text import classes, padded

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedModel

    from trainworks.data.loading import Batch, Row

__all__ = ["TokenClassification"]

_OUTSIDE = "O"


class TokenClassification(Task):
    """Tag the words of a text, such as with the entities they name.

    The model reads the words joined by blanks, as it will at inference, and learns a word's tag at its first token.
    """

    auto_class: ClassVar[str] = "AutoModelForTokenClassification"
    pipeline_tag: ClassVar[str] = "token-classification"

    type: Literal["token-classification"] = "token-classification"
    tokens: str = "tokens"
    """Column of the words: a list of texts."""
    tags: str = "ner_tags"
    """Column of their tags: a list as long, of names or numbers."""
    labels: tuple[str, ...] = ()
    """Tag names in the order of their numbers; found in the training rows when empty."""
    learn: Literal["first", "all"] = "first"
    """Which of a word's tokens are learned: its first, or all of them, where those after the first of a `B-` word have
    the `I-` tag. The first one's is the word's prediction."""
    broken: Literal["keep", "error"] = "keep"
    """What becomes of a row in which an `I-` or `E-` tag continues no entity: it is learned as it is, and counted in
    the record, or it cannot be used. Where no tag begins with `B-`, such tags are no mistake."""
    max_length: Annotated[int, Strict(), Field(gt=2)] = 512
    """Longest text in tokens, special ones included."""
    too_long: Literal["truncate", "error"] = "truncate"
    """What becomes of a longer one. Words that are cut are counted in the record, and where the model is measured they
    count as tagged `O`."""

    def columns(self) -> dict[str, Kind]:
        """Return the words and the tags."""
        return {self.tokens: "words", self.tags: "labels"}

    def equip(self, processor: Processor) -> Processor:
        """Pad with the end token where there is no padding token; ConfigError for a tokenizer that cannot serve."""
        return padded_by_end(processor)

    def resolve(self, rows: Dataset) -> Self:
        """Return the task with its tag names."""
        names = self.labels or class_names(rows, self.tags)
        if len(names) < 2:
            found = excerpt(repr(names[0]))
            raise DataError(f"column {self.tags!r} has one tag only ({found}): there is nothing to tell apart")
        return self.model_copy(update={"labels": names})

    def flaws(self, rows: Dataset) -> Iterator[BadRow]:
        """Yield rows without words, with another number of tags, with a tag that is none of the task's, and, where they
        are not kept, with broken ones."""
        pairs = zip(rows[self.tokens][:], rows[self.tags][:], strict=True)
        found = {row: flaw for row, pair in enumerate(pairs) if (flaw := self._flaw(*pair, row))}
        try:
            ids = self._ids(rows)
        except BadRowsError as error:
            found = {problem.row or 0: problem for problem in error.problems} | found
        else:
            broken = [row for row, tags in enumerate(ids) if self.broken == "error" and self._is_broken(tags)]
            found = {row: self._break(row, self._named(ids[row])) for row in broken} | found
        yield from (found[row] for row in sorted(found))

    def _flaw(self, words: Sequence[str | None], tags: Sequence[Any], row: int) -> BadRow | None:
        if not words:
            return BadRow("no words", "give every row some words", row=row, column=self.tokens)
        if None in words:
            detail = f"word {words.index(None)}"
            return BadRow("null word", "give every word its text", detail, row=row, column=self.tokens)
        if len(words) == len(tags):
            return None
        shown = excerpt(" ".join(filter(None, words)))
        detail = f"{len(words)} words and {len(tags)} tags"
        return BadRow("words without tags", "give every word one tag", detail, shown, row=row, column=self.tags)

    def _break(self, row: int, tags: Sequence[str]) -> BadRow:
        mend = "begin an entity with B-, or keep such rows with task.broken: keep"
        return BadRow("broken tags", mend, "an entity begins with I- or E-", excerpt(" ".join(tags)), row=row)

    def _ids(self, rows: Dataset, first: int = 0) -> list[NDArray[np.int64]]:
        """Return the tag numbers of each row; BadRowsError where one is none of the task's."""
        return [np.array(ids, dtype=np.int64) for ids in class_lists(rows, self.tags, self.labels, first=first)]

    def _named(self, ids: NDArray[np.int64]) -> list[str]:
        return [self.labels[number] for number in ids.tolist()]

    def _is_broken(self, ids: NDArray[np.int64]) -> bool:
        begins = any(tag.startswith("B") for tag in self.labels)
        return begins and are_entity_tags(self.labels) and is_broken(self._named(ids))

    def stated(self) -> str:
        """Return what is measured, for the log."""
        if are_entity_tags(self.labels):
            return f"{len(self.labels)} tags of {len(self._types())} types of entity: {', '.join(self._types())}"
        return f"{len(self.labels)} tags, which mark no entities (O, or B-, I-, E-, S- and a type): words are measured"

    def _types(self) -> list[str]:
        return sorted({entity_type(tag) for tag in self.labels if tag != _OUTSIDE})

    def head(self) -> dict[str, Any]:
        """Return the tags for the model's configuration."""
        return classes(self.labels)

    def prepare(self, rows: Dataset, processor: Processor, *, first: int = 0) -> Prepared:
        """Return one sample a row: the tokens, the tag that each learns, and for every word its tag and where its first
        token stands, -1 for a word without one.

        BadRowsError for rows without a token, and for those that are too long where that is an error.
        """
        texts = [" ".join(words) for words in rows[self.tokens][:]]
        whole = processor(texts, return_offsets_mapping=True, verbose=False)
        sizes = np.array([len(ids) for ids in whole["input_ids"]])
        long = np.flatnonzero(sizes > self.max_length)
        if len(long) and self.too_long == "error":
            raise BadRowsError([self._long(first + int(row), int(sizes[row])) for row in long])
        cut = {"truncation": True, "max_length": self.max_length} if len(long) else {}
        encoded = dict(processor(texts, return_offsets_mapping=True, **cut)) if cut else dict(whole)
        offsets = [np.array(each, dtype=np.int64).reshape(-1, 2) for each in encoded.pop("offset_mapping")]
        tags = self._ids(rows, first)
        aligned = [_aligned(words, places) for words, places in zip(rows[self.tokens][:], offsets, strict=True)]
        if empty := [row for row, words in enumerate(aligned, start=first) if not (words.starts >= 0).any()]:
            mend = "give it a text"
            raise BadRowsError([BadRow("no tokens", mend, row=row, column=self.tokens) for row in empty])
        columns: dict[str, Any] = {name: ragged(ids, np.int32) for name, ids in encoded.items()}
        columns["labels"] = ragged([self._learned(*pair) for pair in zip(aligned, tags, strict=True)], np.int32)
        columns["tags"] = ragged(tags, np.int32)
        columns["starts"] = ragged([words.starts for words in aligned], np.int32)
        columns["length"] = [len(ids) for ids in encoded["input_ids"]]
        lost = sum(int((words.starts < 0).sum()) for words in aligned)
        broken = sum(map(self._is_broken, tags))
        dropped = {"words without a token": lost, "rows with broken tags, kept": broken}
        return Prepared(table(columns), {reason: count for reason, count in dropped.items() if count})

    def _long(self, row: int, size: int) -> BadRow:
        detail = f"{size:,} tokens, task.max_length is {self.max_length}"
        return BadRow("too long", "raise it, or say task.too_long: truncate", detail, row=row, column=self.tokens)

    def _learned(self, words: _Aligned, tags: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the tag that each token learns, [tokens], -100 where it learns none."""
        learned = np.full(len(words.owners), IGNORED, dtype=np.int64)
        if self.learn == "all":
            inside = words.owners >= 0
            learned[inside] = self._continuing()[tags[words.owners[inside]]]
        there = words.starts >= 0
        learned[words.starts[there]] = tags[there]
        return learned

    def _continuing(self) -> NDArray[np.int64]:
        """Return for each tag the one that a word's later tokens learn, [tags]."""
        places = {name: number for number, name in enumerate(self.labels)}
        return np.array([places.get(f"I{tag[1:]}", own) if tag[:1] == "B" else own for tag, own in places.items()])

    def facts(self, samples: Dataset) -> dict[str, Any]:
        """Return the tokens, those that learn a tag, and the words of each tag."""
        rows = samples.with_format("numpy")
        counted = sum(int((labels != IGNORED).sum()) for labels in rows["labels"][:])
        words = np.bincount(np.concatenate(rows["tags"][:]), minlength=len(self.labels))
        labels = dict(zip(self.labels, words.tolist(), strict=True))
        return super().facts(samples) | {"counted": counted, "labels": labels}

    def collate(self, rows: Sequence[Row], processor: Processor, *, train: bool) -> Batch:
        """Return the model's inputs and `labels`, [rows, longest], -100 where nothing is learned; `tags` and `starts`,
        [rows, most words], filled up with -100 and -1."""
        import torch

        fills = {"labels": IGNORED, "tags": IGNORED, "starts": -1}
        own = {name: torch.from_numpy(pad([row[name] for row in rows], fill)) for name, fill in fills.items()}
        return padded(rows, processor) | own

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """Return how many tokens of each row learn a tag."""
        return {"loss": (batch["labels"] != IGNORED).sum(1)}

    def loss(self, model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
        """Return each row's summed cross-entropy in nats."""
        from torch.nn.functional import cross_entropy

        logits = model(**self.inputs(batch)).logits.float()
        losses = cross_entropy(logits.transpose(1, 2), batch["labels"], ignore_index=IGNORED, reduction="none")
        return {"loss": losses.sum(1)}

    def predict(self, model: PreTrainedModel, batch: Batch, processor: Processor) -> dict[int, Prediction]:
        """Return the likeliest tag of each word, `O` for one that has no token."""
        said = model(**self.inputs(batch)).logits.argmax(-1)
        starts = batch["starts"]
        picked = said.gather(1, starts.clamp(min=0)).where(starts >= 0, -1).tolist()
        found = {}
        for index, own, tags in zip(batch["index"].tolist(), picked, batch["tags"].tolist(), strict=True):
            wanted = [self.labels[tag] for tag in tags if tag != IGNORED]
            found[index] = Prediction(
                [self.labels[tag] if tag >= 0 else _OUTSIDE for tag in own[: len(wanted)]], wanted
            )
        return found

    def metrics(self) -> dict[str, Metric]:
        """Return the share of words that is right and, where tags mark entities, their F1, precision and recall, and
        the F1 of each type."""
        words: dict[str, Metric] = {"accuracy": TagAccuracy()}
        if not are_entity_tags(self.labels):
            return words
        types = self._types() if len(self._types()) > 1 else []
        scores = [EntityScore(), EntityScore("precision"), EntityScore("recall")]
        return {score.name: score for score in [*scores, *(EntityScore(type=each) for each in types)]} | words

    def baselines(self, train: Dataset, evaluation: Dataset) -> dict[str, Baseline]:
        """Return `commonest tag`: always that of most of the training words, each as likely as it is often there."""
        counts = np.array(list(self.facts(train)["labels"].values()))
        surprise = -np.log((counts + 1) / (counts.sum() + len(counts)))
        rows = evaluation.with_format("numpy")
        learned = [labels[labels != IGNORED] for labels in rows["labels"][:]]
        losses = np.array([(surprise[labels].sum(), len(labels)) for labels in learned])
        common = self.labels[int(counts.argmax())]
        wanted = [self._named(tags) for tags in rows["tags"][:]]
        said = {row: Prediction([common] * len(tags), tags) for row, tags in enumerate(wanted)}
        return {"commonest tag": Baseline(losses, said)}


class _Aligned(NamedTuple):
    """Which tokens are which words'."""

    owners: NDArray[np.int64]
    """The word of each token, -1 where it is none's: [tokens]."""
    starts: NDArray[np.int64]
    """The first token of each word, -1 where it has none: [words]."""


def _aligned(words: Sequence[str], offsets: NDArray[np.int64]) -> _Aligned:
    """Tell the words of tokens by their places, [tokens, 2], in the words joined by blanks.

    A token is the word's in which its first sign stands that is no blank: many tokenizers put the blank before a word
    into its first token.
    """
    begins = np.cumsum([0, *(len(word) + 1 for word in words)])
    end = begins[-1] - 1
    signs = np.arange(end + 1)
    signs[begins[1:] - 1] = end
    following = np.minimum.accumulate(signs[::-1])[::-1]
    first = following[offsets[:, 0]]
    inside = first < offsets[:, 1]
    owners = np.where(inside, np.searchsorted(begins[:-1], first, side="right") - 1, -1)
    starts = np.full(len(words), -1)
    there, places = np.unique(owners, return_index=True)
    starts[there[there >= 0]] = places[there >= 0]
    return _Aligned(owners, starts)
