"""Masked language modelling: predict the tokens of running text that are masked (Devlin et al. 2018,
arXiv:1810.04805)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field, Strict

from trainworks.data.bad_rows import BadRow, BadRowsError
from trainworks.data.blocks import Ids, closed, cut, joined
from trainworks.data.cache import Prepared, ragged, table
from trainworks.data.columns import Kind
from trainworks.data.masking import NEVER, Kinds, chosen, content_seed, kinds, replaced, target
from trainworks.data.text import IGNORED, encode, encode_words, pad
from trainworks.errors import ConfigError
from trainworks.metrics import Metric, Prediction, Ratio
from trainworks.record import Sample
from trainworks.tasks.base import Baseline, Processor, Task

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedModel

    from trainworks.data.loading import Batch, Row
    from trainworks.heads import Head

__all__ = ["MaskedLM"]

_DOCUMENTS = 1000
"""Documents joined at a time."""
_MASK = "<|mask|>"
_SHOWN, _SHOWN_TOKENS = 3, 64


class _Masked(NamedTuple):
    ids: NDArray[Any]
    places: NDArray[np.int64]
    labels: NDArray[np.int64]


class MaskedLM(Task):
    """Predict masked tokens from what stands on both sides of them, as BERT and ModernBERT are pretrained."""

    auto_class: ClassVar[str] = "AutoModelForMaskedLM"
    pipeline_tag: ClassVar[str] = "fill-mask"

    type: Literal["masked-lm"] = "masked-lm"
    text: str = "text"
    """Column of the documents."""
    block: Annotated[int, Strict(), Field(gt=1)]
    """Tokens per sample, special ones included, at most."""
    across: bool = True
    """Whether a block goes on into the next document: documents are then joined end to end, each with what the
    tokenizer puts around it. When false, each document is cut by itself, and what is left of it is a short sample."""
    share: Annotated[float, Strict(), Field(gt=0, lt=1)] = 0.15
    """Share of the tokens that is masked and predicted, at every pass over the text in other places; BERT's is 0.15,
    ModernBERT's 0.3."""
    replace: Literal["mixed", "mask"] = "mixed"
    """What stands in their place: for `mixed` the mask token in 80%, a random token in 10%, the token itself in 10%;
    for `mask` always the mask token."""
    whole_words: bool = False
    """Mask the tokens of a word together, words being what the tokenizer takes for one."""

    def columns(self) -> dict[str, Kind]:
        """Return the one column it reads."""
        return {self.text: "text"}

    def equip(self, processor: Processor) -> Processor:
        """Give it a mask token where it has none, as one that is trained for the run; ConfigError when it cannot
        serve."""
        name = processor.name_or_path
        if not processor.is_fast:
            raise ConfigError(f"the tokenizer of {name} is written in Python; one with a tokenizer.json is needed")
        if self._end(processor) is None:
            raise ConfigError(f"the tokenizer of {name} has no token that ends a text: set sep_token or eos_token")
        if self.block > processor.model_max_length:
            raise ConfigError(
                f"task.block: {self.block}, but the tokenizer of {name} says that its model takes "
                f"{processor.model_max_length} tokens at most"
            )
        if self.whole_words and len({*processor("one two").word_ids()} - {None}) < 2:
            raise ConfigError(f"task.whole_words: the tokenizer of {name} takes a whole text for one word; say false")
        if processor.mask_token is None:
            processor.add_special_tokens({"mask_token": _MASK})
        if processor.pad_token is None:
            processor.pad_token = processor.eos_token or processor.sep_token
        return processor

    def _end(self, processor: Processor) -> int | None:
        end: int | None = processor.eos_token_id if processor.sep_token_id is None else processor.sep_token_id
        return end

    def verify(self, model: PreTrainedModel) -> None:
        """Prove that the states that reach the head, at masked places alone, make the model's own logits there."""
        import torch

        from trainworks.heads import Head, states_at, unknown_head

        longest = getattr(model.config, "max_position_embeddings", None)
        if longest is not None and self.block > longest:
            raise ConfigError(f"task.block: {self.block}, but the model has positions for {longest} tokens only")
        ids, places = torch.arange(8, device=model.device)[None] % model.config.vocab_size, torch.tensor([1, 4, 5])
        training = model.training
        model.eval()
        with torch.no_grad():
            logits = model(ids).logits[0, places].float()
            ours = Head(model)(states_at(model, places.to(model.device), input_ids=ids)).float()
        model.train(training)
        if not torch.allclose(logits, ours, rtol=1e-3, atol=1e-4):
            raise unknown_head(model)

    def prepare(self, rows: Dataset, processor: Processor, *, first: int = 0) -> Prepared:
        """Return each document's tokens, or its blocks, with what each token is to masking in `trained`: 0 for special
        ones. BadRowsError for documents by themselves without a token."""
        documents = list(self._documents(rows[self.text], processor))
        if self.across:
            return Prepared(_samples([ids for ids, _ in documents], [able for _, able in documents]), {})
        if empty := [row for row, (_, able) in enumerate(documents, start=first) if not able.any()]:
            raise BadRowsError([BadRow("no tokens", "give it a text", row=row, column=self.text) for row in empty])
        parts = [
            part
            for ids, able in documents
            for part in zip(cut(ids, self.block, shared=0), cut(able, self.block, shared=0), strict=True)
            if part[1].any()  # what follows the last word alone is not worth a sample
        ]
        return Prepared(_samples([ids for ids, _ in parts], [able for _, able in parts]), {})

    def _documents(self, texts: Sequence[str], processor: Processor) -> Iterator[tuple[Ids, Kinds]]:
        end, special = self._end(processor), processor.all_special_ids
        assert end is not None, "`equip` refuses a tokenizer without one"
        if self.whole_words:
            encodings = encode_words(texts, processor)
        else:
            encodings = ((ids, [None] * len(ids)) for ids in encode(texts, processor))
        for ids, words in encodings:
            document = closed(ids, end)
            yield document, kinds(document, [*words, None][: len(document)], special)

    def arrange(self, samples: Dataset) -> Iterator[pyarrow.Table] | None:
        """Yield the blocks of the documents joined end to end."""
        if not self.across:
            return None

        def blocks(column: str) -> Iterator[list[Any]]:
            stream = samples.select_columns([column]).with_format("arrow").iter(_DOCUMENTS)
            return joined((pc.list_flatten(rows[column]).to_numpy() for rows in stream), self.block, shared=0)

        return (_samples(*parts).data.table for parts in zip(blocks("input_ids"), blocks("trained"), strict=True))

    def facts(self, samples: Dataset) -> dict[str, Any]:
        """Return the tokens, and how many of them are predicted at each pass (at most, where words are taken whole)."""
        able = [int(np.count_nonzero(row)) for row in samples.with_format("numpy")["trained"][:]]
        counted = sum(target(number, self.share) for number in able if number)
        return super().facts(samples) | {"counted": counted}

    def learned(self, row: Mapping[str, Any]) -> NDArray[np.bool_]:
        """Return which of a row's tokens may be masked."""
        able: NDArray[np.bool_] = np.asarray(row["trained"]) != NEVER
        return able

    def collate(self, rows: Sequence[Row], processor: Processor, *, train: bool) -> Batch:
        """Return `input_ids` [rows, longest] with masks; and of all the tokens to predict `places`, their numbers in
        [rows x longest], `labels`, -100 in fillers, and `row`, each [masked].

        In training the masks are drawn from the row's seed; in evaluation they are a function of its tokens, so that
        every evaluation asks the same. A row without a token to predict has one place, which is not learned.
        """
        import torch

        masked = [self._masked(row, processor, train=train) for row in rows]
        width = max(len(row.ids) for row in masked)
        counts = [len(row.places) for row in masked]
        batch = {
            "input_ids": torch.from_numpy(pad([row.ids for row in masked], processor.pad_token_id)),
            "places": torch.from_numpy(np.concatenate([row.places + width * i for i, row in enumerate(masked)])),
            "labels": torch.from_numpy(np.concatenate([row.labels for row in masked])),
            "row": torch.from_numpy(np.repeat(np.arange(len(rows)), counts)),
            "learned": torch.tensor([int((row.labels != IGNORED).sum()) for row in masked]),
        }
        if len({len(row.ids) for row in masked}) > 1:
            batch["attention_mask"] = torch.from_numpy(pad([np.ones(len(row.ids)) for row in masked], 0))
        return batch

    def _masked(self, row: Mapping[str, Any], processor: Processor, *, train: bool) -> _Masked:
        ids, able = row["input_ids"], row["trained"]
        draw = np.random.default_rng(row["seed"] if train else content_seed(ids))
        places = chosen(able, self.share, draw)
        if not len(places):
            return _Masked(ids, np.zeros(1, dtype=np.int64), np.full(1, IGNORED))
        mixed, mask = self.replace == "mixed", processor.mask_token_id
        masked = replaced(ids, places, draw, mask=mask, vocabulary=len(processor), mixed=mixed)
        # A filler's labels are ignored, but it has places: all ranks go the same way through the head.
        learns = row.get("weight", 1.0) > 0
        return _Masked(masked, places, np.where(learns, ids[places], IGNORED).astype(np.int64))

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """Return how many tokens of each row are predicted."""
        return {"loss": batch["learned"]}

    def loss(self, model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
        """Return each row's summed cross-entropy in nats; logits of other tokens are never made."""
        from trainworks.heads import Head

        return self.loss_from(self._states(model, batch), Head(model), batch)

    def _states(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        from trainworks.heads import states_at

        return states_at(model, batch["places"], **self.inputs(batch))

    def loss_from(self, hidden: Tensor, head: Head, batch: Batch) -> dict[str, Tensor]:
        """Return each row's summed cross-entropy from the states that the head is given, [masked, width]."""
        losses = head.losses(hidden, batch["labels"], ignored=IGNORED)
        return {"loss": losses.new_zeros(len(batch["learned"])).index_add(0, batch["row"], losses)}

    def _said(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Return the likeliest token at each place, [masked]."""
        from trainworks.heads import Head

        return Head(model).likeliest(self._states(model, batch))

    def predict(self, model: PreTrainedModel, batch: Batch, processor: Processor) -> dict[int, Prediction]:
        """Return how many masked tokens of each row are the likeliest, of how many."""
        right = (self._said(model, batch) == batch["labels"]).long()
        hits = batch["learned"].new_zeros(len(batch["learned"])).index_add(0, batch["row"], right)
        rows = (batch[name].tolist() for name in ("index", "weight"))
        return {
            index: Prediction(number, of)
            for index, weight, number, of in zip(*rows, hits.tolist(), batch["learned"].tolist(), strict=True)
            if weight
        }

    def metrics(self) -> dict[str, Metric]:
        """Return how many of the masked tokens are told right."""
        return {"masked_accuracy": Ratio("masked_accuracy", higher_is_better=True)}

    def loss_metrics(self) -> dict[str, Metric]:
        """Return the loss in nats per masked token, and its exponential: no perplexity of the text, for every token is
        told from others that follow it."""
        pseudo = Ratio("pseudo_perplexity", higher_is_better=False, transform="exp")
        return super().loss_metrics() | {"pseudo_perplexity": pseudo}

    def show(self, model: PreTrainedModel, rows: Dataset, processor: Processor) -> tuple[Sample, ...]:
        """Return how the first rows begin: masked, as they are, and as the model fills them."""
        some = rows.select(range(min(_SHOWN, len(rows)))).with_format("numpy")
        return tuple(self._filled(model, row, processor) for row in some)

    def _filled(self, model: PreTrainedModel, row: dict[str, Any], processor: Processor) -> Sample:
        batch = {name: values.to(model.device) for name, values in self.collate([row], processor, train=False).items()}
        said = row["input_ids"].copy()
        said[batch["places"].cpu().numpy()] = self._said(model, batch).cpu().numpy()
        masked = processor.decode(batch["input_ids"][0, :_SHOWN_TOKENS]).strip()
        right, output = (
            processor.decode(ids[:_SHOWN_TOKENS], skip_special_tokens=True).strip() for ids in (row["input_ids"], said)
        )
        return Sample(prompt=masked, reference=right, output=output)

    def baselines(self, train: Dataset, evaluation: Dataset) -> dict[str, Baseline]:
        """Return `unigram`: every masked token as likely as it is often in the training text (add-one smoothing)."""
        wanted = []
        for row in evaluation.with_format("numpy"):
            ids = row["input_ids"]
            wanted.append(ids[chosen(row["trained"], self.share, np.random.default_rng(content_seed(ids)))])
        counts = np.ones(1 + max((row.max() for row in wanted if len(row)), default=0), dtype=np.int64)
        for part in train.with_format("arrow").iter(_DOCUMENTS):
            ids, able = (pc.list_flatten(part[name]).to_numpy() for name in ("input_ids", "trained"))
            seen = np.bincount(ids[able != NEVER], minlength=len(counts))
            counts = np.pad(counts, (0, len(seen) - len(counts)), constant_values=1) + seen
        nats = np.log(counts.sum()) - np.log(counts)
        return {"unigram": Baseline(losses=np.array([(nats[row].sum(), len(row)) for row in wanted]))}


def _samples(ids: Sequence[Ids], able: Sequence[NDArray[Any]]) -> Dataset:
    sizes = np.array([len(part) for part in ids], dtype=np.int64)
    return table({"input_ids": ragged(ids, np.int32), "trained": ragged(able, np.uint8), "length": sizes})
