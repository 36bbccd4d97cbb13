"""Text to text by an encoder and a decoder: summaries, translations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, Strict

from trainworks.data.bad_rows import BadRow, BadRowsError
from trainworks.data.cache import Prepared, ragged, table
from trainworks.data.columns import Kind
from trainworks.data.text import IGNORED, pad
from trainworks.errors import ConfigError
from trainworks.metrics import Accuracy, CorpusScore, Metric, Prediction, Rouge
from trainworks.record import Sample
from trainworks.settings import Count
from trainworks.tasks.base import Processor, Task

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedModel

    from trainworks.data.loading import Batch, Row
    from trainworks.heads import Head

__all__ = ["Seq2Seq", "shifted"]

_SHOWN = 3
_SCORES: dict[str, type[Rouge | CorpusScore | Accuracy]] = {
    **dict.fromkeys(("rouge1", "rouge2", "rougeL"), Rouge),
    **dict.fromkeys(("bleu", "chrf"), CorpusScore),
    "exact_match": Accuracy,
}


class Seq2Seq(Task):
    """Write a text from another, with a model such as T5, BART or Marian."""

    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"

    type: Literal["seq2seq"] = "seq2seq"
    purpose: Literal["summarization", "translation"]
    """What the model is for, by the Hub's name for it."""
    source: str = "source"
    """Column of the text that is given."""
    target: str = "target"
    """Column of the text that is wanted."""
    prefix: str = ""
    """Put before every source, such as `summarize: ` for T5."""
    max_source: Annotated[int, Strict(), Field(gt=1)]
    """Longest source in tokens, prefix and special ones included."""
    max_target: Annotated[int, Strict(), Field(gt=1)]
    """Longest target in tokens, special ones included; as many are generated at most."""
    too_long: Literal["error", "truncate", "drop"] = "error"
    """What becomes of a longer source or target; what is cut or dropped is counted in the record. A target that is cut
    is so for the metrics too."""
    scores: tuple[Literal["rouge1", "rouge2", "rougeL", "bleu", "chrf", "exact_match"], ...] = (
        "rouge1",
        "rouge2",
        "rougeL",
        "bleu",
        "chrf",
    )
    """What is measured of generated texts; with none, evaluations generate nothing and are quick."""
    beams: Count = 1
    """Beams by which evaluations generate; 1 is greedy."""

    @property
    def pipeline_tag(self) -> str:
        """What the model is for."""
        return self.purpose

    def columns(self) -> dict[str, Kind]:
        """Return source and target."""
        return {self.source: "text", self.target: "text"}

    def flaws(self, rows: Dataset) -> Iterator[BadRow]:
        """Yield rows in which either text is blank."""
        for number, (source, target) in enumerate(zip(rows[self.source][:], rows[self.target][:], strict=True)):
            for column, text in ((self.source, source), (self.target, target)):
                if not text.strip():
                    yield BadRow("blank text", "give it a text, or leave out the row", row=number, column=column)
                    break

    def equip(self, processor: Processor) -> Processor:
        """Return it as it is; ConfigError when it cannot serve."""
        if not processor.is_fast or processor.pad_token_id is None or processor.eos_token_id is None:
            raise ConfigError(
                f"the tokenizer of {processor.name_or_path} cannot be used: one with a tokenizer.json, a padding and "
                "an end token is needed"
            )
        return processor

    def ends(self, processor: Processor) -> tuple[int, ...]:
        """Return the end token."""
        return (processor.eos_token_id,)

    def verify(self, model: PreTrainedModel) -> None:
        """Prove that the states that reach the head make the model's own logits, and that no target is too long."""
        import torch

        from trainworks.heads import Head, states_at, unknown_head

        longest, needed = getattr(model.config, "max_position_embeddings", None), max(self.max_source, self.max_target)
        if longest is not None and needed > longest:
            raise ConfigError(
                f"task.max_source, task.max_target: {needed}, but the model has positions for {longest} tokens only"
            )
        ids, places = torch.arange(1, 9, device=model.device)[None] % model.config.vocab_size, torch.tensor([0, 3, 7])
        inputs = {"input_ids": ids, "decoder_input_ids": shifted(model, ids)}
        training = model.training
        model.eval()
        with torch.no_grad():
            logits = model(**inputs).logits[0, places].float()
            ours = Head(model)(states_at(model, places.to(model.device), **inputs)).float()
        model.train(training)
        if not torch.allclose(logits, ours, rtol=1e-3, atol=1e-4):
            raise unknown_head(model)

    def prepare(self, rows: Dataset, processor: Processor, *, first: int = 0) -> Prepared:
        """Return one sample a row: `input_ids` of the source and `labels` of the target. BadRowsError for texts that
        are too long, unless the task says what becomes of them."""
        whole = self._encoded(rows, processor, cut=False)
        over = {name: [max(0, len(ids) - getattr(self, name)) for ids in side] for name, side in whole.items()}
        long = np.sum(list(over.values()), axis=0) > 0
        if not long.any():
            return Prepared(_samples(*whole.values()), {})
        if self.too_long == "error":
            problems = {
                row: self._too_long(first + row, name, len(side[row]))
                for name, side in whole.items()
                for row in np.flatnonzero(over[name]).tolist()
            }
            raise BadRowsError([problems[row] for row in sorted(problems)])
        if self.too_long == "truncate":
            lost = {f"{name[4:]} tokens cut": sum(cut) for name, cut in over.items()}
            return Prepared(_samples(*self._encoded(rows, processor, cut=True).values()), lost)
        kept = [[ids for ids, gone in zip(side, long, strict=True) if not gone] for side in whole.values()]
        return Prepared(_samples(*kept), {"too long": int(long.sum())})

    def _encoded(self, rows: Dataset, processor: Processor, *, cut: bool) -> dict[str, list[list[int]]]:
        """Return the ids of sources and targets by the name of their limit; targets end with the end token."""
        if not len(rows):  # where all were refused; transformers 5.23 cannot encode none
            return {"max_source": [], "max_target": []}
        sources = [self.prefix + text for text in rows[self.source][:]]
        limits = [
            {"truncation": True, "max_length": most} if cut else {} for most in (self.max_source, self.max_target)
        ]
        given = processor(text=sources, verbose=False, **limits[0])["input_ids"]
        wanted = processor(text_target=rows[self.target][:], verbose=False, **limits[1])["input_ids"]
        end, limit = processor.eos_token_id, self.max_target - 1 if cut else None
        return {
            "max_source": given,
            "max_target": [ids if end in ids else [*ids[:limit], end] for ids in wanted],
        }

    def _too_long(self, row: int, name: str, size: int) -> BadRow:
        column = {"max_source": self.source, "max_target": self.target}[name]
        mend = "raise it, or say what becomes of longer texts: task.too_long: truncate or drop"
        return BadRow(
            "too long", mend, f"{size:,} tokens, task.{name} is {getattr(self, name)}", row=row, column=column
        )

    def facts(self, samples: Dataset) -> dict[str, Any]:
        """Return the tokens, and how many of them are learned: the targets'."""
        return super().facts(samples) | {"counted": sum(map(len, samples.with_format("numpy")["labels"][:]))}

    def collate(self, rows: Sequence[Row], processor: Processor, *, train: bool) -> Batch:
        """Return `input_ids` and `attention_mask`, [rows, longest source], `labels`, [rows, longest target] with -100
        for padding; and of the target's tokens `places`, their numbers in [rows x longest target], and `row`."""
        import torch

        targets = [row["labels"] for row in rows]
        sizes = [len(ids) for ids in targets]
        labels = pad(targets, IGNORED)
        lines = np.repeat(np.arange(len(rows)), sizes)
        weights = np.array([row.get("weight", 1.0) for row in rows])
        return {
            "input_ids": torch.from_numpy(pad([row["input_ids"] for row in rows], processor.pad_token_id)),
            "attention_mask": torch.from_numpy(pad([np.ones(len(row["input_ids"])) for row in rows], 0)),
            "labels": torch.from_numpy(labels),
            "places": torch.from_numpy(np.flatnonzero(labels != IGNORED)),
            "row": torch.from_numpy(lines),
            # A filler's tokens are computed, so that all ranks go the same way, and not learned.
            "wanted": torch.from_numpy(np.where(weights[lines] > 0, np.concatenate(targets), IGNORED).astype(np.int64)),
            "learned": torch.tensor(sizes) * torch.from_numpy(weights > 0),
        }

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """Return how many tokens each row's target has."""
        return {"loss": batch["learned"]}

    def loss(self, model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
        """Return each row's summed cross-entropy in nats; logits of padding are never made."""
        from trainworks.heads import Head, states_at

        decoder = shifted(model, batch["labels"])
        states = states_at(model, batch["places"], **self.inputs(batch), decoder_input_ids=decoder, use_cache=False)
        return self.loss_from(states, Head(model), batch)

    def loss_from(self, hidden: Tensor, head: Head, batch: Batch) -> dict[str, Tensor]:
        """Return each row's summed cross-entropy from the states that the head is given, [targets' tokens, width]."""
        losses = head.losses(hidden, batch["wanted"], ignored=IGNORED)
        return {"loss": losses.new_zeros(len(batch["learned"])).index_add(0, batch["row"], losses)}

    def predict(self, model: PreTrainedModel, batch: Batch, processor: Processor) -> dict[int, Prediction]:
        """Return what the model writes and what was wanted, as texts; nothing where nothing is measured of them."""
        if not self.scores:
            return {}
        said, wanted = self._written(model, batch, processor)
        return {
            index: Prediction(prediction, reference)
            for index, prediction, reference in zip(batch["index"].tolist(), said, wanted, strict=True)
        }

    def _written(self, model: PreTrainedModel, batch: Batch, processor: Processor) -> tuple[list[str], list[str]]:
        from trainworks.generation import generated

        said = generated(
            model,
            self.inputs(batch),
            ends=self.ends(processor),
            pad=processor.pad_token_id,
            most=self.max_target,
            beams=self.beams,
        )
        wanted = batch["labels"].where(batch["labels"] != IGNORED, processor.pad_token_id)
        return _texts(said, processor), _texts(wanted, processor)

    def metrics(self) -> dict[str, Metric]:
        """Return the metrics asked for; EvaluationError where a package is missing."""
        return {name: _SCORES[name](name=name) for name in self.scores}  # type: ignore[arg-type]

    def loss_metrics(self) -> dict[str, Metric]:
        """Return the loss in nats per token of the targets, and its exponential."""
        from trainworks.metrics import Ratio

        return super().loss_metrics() | {"perplexity": Ratio("perplexity", higher_is_better=False, transform="exp")}

    def show(self, model: PreTrainedModel, rows: Dataset, processor: Processor) -> tuple[Sample, ...]:
        """Return what the model writes of the first rows."""
        some = list(rows.select(range(min(_SHOWN, len(rows)))).with_format("numpy"))
        batch = {name: values.to(model.device) for name, values in self.collate(some, processor, train=False).items()}
        given = _texts(batch["input_ids"], processor)
        said, wanted = self._written(model, batch, processor)
        return tuple(
            Sample(prompt=prompt, reference=reference, output=output)
            for prompt, reference, output in zip(given, wanted, said, strict=True)
        )


def shifted(model: PreTrainedModel, labels: Tensor) -> Tensor:
    """Return what the decoder is given for these labels, [rows, length]: they, one place on, by the model's own rule.

    M2M100 and NLLB (transformers 5.23) have none that can be called; theirs is the usual one.
    """
    rule = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if rule is not None:
        made: Tensor = rule(labels=labels)
        return made
    given = labels.roll(1, dims=1)
    given[:, 0] = model.config.decoder_start_token_id
    return given.where(given != IGNORED, model.config.pad_token_id)


def _texts(ids: Tensor, processor: Processor) -> list[str]:
    return [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]


def _samples(sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> Dataset:
    sizes = [len(source) + len(target) for source, target in zip(sources, targets, strict=True)]
    return table(
        {
            "input_ids": ragged([np.array(ids) for ids in sources], np.int32),
            "labels": ragged([np.array(ids) for ids in targets], np.int32),
            "length": np.array(sizes, dtype=np.int64),
        }
    )
