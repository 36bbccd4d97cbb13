"""What the tasks whose model ends in a vocabulary head have in common: next-token loss, its metrics, and generation."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from trainworks.data.text import IGNORED, pad
from trainworks.errors import ConfigError
from trainworks.metrics import Metric, Ratio
from trainworks.record import Sample
from trainworks.tasks.base import Processor, Task
from trainworks.tasks.packing_proof import keeps_apart

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedModel

    from trainworks.data.loading import Batch, Row
    from trainworks.heads import Head

__all__ = ["LanguageTask"]

_SHOWN = 3
_SIXTEENTHS = 16
"""Lengths of packed lines between a power of two and the next: at most a sixteenth of a line is padding for it."""


def _lines(packs: Sequence[int]) -> list[NDArray[np.int64]]:
    """Return the places of the rows on each line, of the line that each row is on."""
    return np.split(np.arange(len(packs)), np.flatnonzero(np.diff(packs)) + 1)


def _rounded_up(size: int, steps: int) -> int:
    """Return the next of the sizes that lie evenly, so many of them, between each power of two and the next."""
    unit = max(1, (1 << (size - 1).bit_length()) // (2 * steps))
    return -(-size // unit) * unit


def _bounds(lines: Sequence[NDArray[np.int64]], width: int) -> NDArray[np.int64]:
    """Return where each row begins in the lines laid end to end, and where they end; what is left of a line is a
    row, too."""
    ends = [np.append(np.cumsum(sizes), width) + width * place for place, sizes in enumerate(lines)]
    return np.unique(np.concatenate([[0], *ends]))


class LanguageTask(Task, ABC):
    """Next-token prediction over prepared rows of `input_ids` and, where only part is learned, `trained`."""

    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    pipeline_tag: ClassVar[str] = "text-generation"
    can_pack: ClassVar[bool] = True

    def equip(self, processor: Processor) -> Processor:
        """Pad with the end token where there is no padding token: padding is never attended to nor learned."""
        if not processor.is_fast:
            raise ConfigError(
                f"the tokenizer of {processor.name_or_path} is written in Python; one with a tokenizer.json is needed"
            )
        if processor.eos_token_id is None:
            raise ConfigError(
                f"the tokenizer of {processor.name_or_path} has no end-of-text token to learn to stop by; set "
                "eos_token in its tokenizer_config.json"
            )
        if processor.pad_token_id is None:
            processor.pad_token = processor.eos_token
        return processor

    def verify(self, model: PreTrainedModel) -> None:
        """Prove that no token sees the ones after it, and that backbone and head make the model's own logits."""
        import torch

        from trainworks.heads import Head, backbone, unknown_head

        ids = torch.arange(8, device=model.device)[None] % model.config.vocab_size
        changed = ids.clone()
        changed[0, -1] += 1
        training = model.training
        model.eval()
        with torch.no_grad():
            logits, others = model(ids).logits.float(), model(changed).logits.float()
            ours = Head(model)(backbone(model)(ids).last_hidden_state).float()
        model.train(training)
        kind = type(model).__name__
        if not torch.allclose(logits[:, :-1], others[:, :-1], rtol=1e-3, atol=1e-4):
            raise ConfigError(
                f"model: {kind} lets a token see the ones after it, so that predicting the next teaches nothing; take "
                "a decoder, such as a Llama, Qwen or GPT model"
            )
        if not torch.allclose(logits, ours, rtol=1e-3, atol=1e-4):
            raise unknown_head(model)

    def verify_packing(self, model: PreTrainedModel, processor: Processor) -> None:
        """Prove that rows on one line have the states they have alone.

        Refused are models whose state runs on from row to row (Mamba, RWKV), and those that do not heed `position_ids`.
        """
        import torch

        from trainworks.models import vocabulary

        def states(rows: Sequence[NDArray[Any]], lines: Sequence[int]) -> Tensor:
            given = [{"input_ids": row, "pack": line} for row, line in zip(rows, lines, strict=True)]
            made = self.collate(given, processor, train=False)
            batch = {name: values.to(model.device) for name, values in made.items()}
            return self.hidden(model, batch)[batch["labels"] != IGNORED].double()

        training = model.training
        model.eval()
        with torch.no_grad():
            apart = keeps_apart(states, vocabulary(model), eps=torch.finfo(model.dtype).eps)
        model.train(training)
        if not apart:
            raise ConfigError(
                f"batch.pack: {type(model).__name__} does not keep packed rows apart, as a model cannot that carries a "
                "recurrent state along or does not heed position_ids; leave batch.pack out, or take another "
                "architecture, such as a Llama, Qwen or GPT-2 model"
            )

    def collate(self, rows: Sequence[Row], processor: Processor, *, train: bool) -> Batch:
        """Return `input_ids` and `labels`, [lines, longest], each label being the token that follows; not learned is
        -100.

        `row`, of the same shape, tells whose row a token is (padding, which learns nothing, is put down to the first),
        and `learned` [rows] how many tokens each row learns. Where rows share a line, `position_ids` begin anew with
        each: by that, and by the absence of an attention mask, transformers knows to keep them apart, in every kind
        of layer that has a mask. Each place of padding is then a row of its own. Lines then have few lengths, so that
        few shapes are compiled for, and `bounds` and `longest` say what `rows_apart` wants to know.
        """
        import torch

        def lay(parts: Sequence[NDArray[Any]], value: int) -> Tensor:
            whole = [np.concatenate([parts[row] for row in line]) for line in lines]
            return torch.from_numpy(pad(whole, value, width=width))

        lines = _lines([row.get("pack", place) for place, row in enumerate(rows)])
        ids = [row["input_ids"] for row in rows]
        sizes = np.array([len(row) - 1 for row in ids])
        packed = len(lines) < len(rows)
        width = max(int(sizes[line].sum()) for line in lines)
        width = _rounded_up(width, _SIXTEENTHS) if packed else width
        # A filler learns nothing: what it says is not even computed.
        targets = [
            np.where(row.get("trained", True) & (row.get("weight", 1.0) > 0), row["input_ids"], IGNORED) for row in rows
        ]
        batch = {
            "input_ids": lay([row[:-1] for row in ids], processor.pad_token_id),
            "labels": lay([row[1:] for row in targets], IGNORED),
            "row": lay([np.full(len(row) - 1, place) for place, row in enumerate(ids)], 0),
            "learned": torch.tensor([int((row[1:] != IGNORED).sum()) for row in targets]),
        }
        if packed:
            batch["position_ids"] = lay([np.arange(size) for size in sizes], 0)
            bounds = _bounds([sizes[line] for line in lines], width)
            batch["bounds"] = torch.from_numpy(bounds.astype(np.int32))
            batch["longest"] = torch.empty(_rounded_up(int(np.diff(bounds).max()), 1), 0)
        elif len({len(row) for row in ids}) > 1:
            batch["attention_mask"] = lay([np.ones(len(row) - 1) for row in ids], 0)
        return batch

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """Return how many tokens each row learns."""
        return {"loss": batch["learned"]}

    def loss(self, model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
        """Return each row's summed cross-entropy in nats."""
        from trainworks.heads import Head

        return self.loss_from(self.hidden(model, batch), Head(model), batch)

    def hidden(self, model: PreTrainedModel, batch: Batch, states: Tensor | None = None) -> Tensor:
        """Return the last states [lines, longest, width]; from the given ones on, where `model` is a later stage."""
        hidden: Tensor = self.made(model, batch, states).last_hidden_state
        return hidden

    def made(self, model: PreTrainedModel, batch: Batch, states: Tensor | None = None, **asked: bool) -> Any:
        """Return what the backbone makes of a batch, or of the states of an earlier stage."""
        from trainworks.heads import backbone
        from trainworks.speed.packed_attention import rows_apart

        inputs = self.given(model, batch) if states is None else self.inputs(batch) | {"inputs_embeds": states}
        if states is not None:
            del inputs["input_ids"]
        # With a cache, transformers does not look for rows in position_ids, and packed ones would see one another.
        with rows_apart(model, batch) as told:
            return backbone(model)(**inputs, **told, **asked, use_cache=False)

    def given(self, model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
        """Return what the backbone, or a pipeline's first stage, is called with."""
        return self.inputs(batch)

    def loss_from(self, hidden: Tensor, head: Head, batch: Batch) -> dict[str, Tensor]:
        """Return each row's summed cross-entropy from the last states, [lines, longest, width]."""
        rows = batch["row"].flatten()
        losses = head.losses(hidden.flatten(0, 1), batch["labels"].flatten(), ignored=IGNORED)
        return {"loss": losses.new_zeros(len(batch["learned"])).index_add(0, rows, losses)}

    def loss_metrics(self) -> dict[str, Metric]:
        """Return the loss in nats per token, and its exponential."""
        return super().loss_metrics() | {"perplexity": Ratio("perplexity", higher_is_better=False, transform="exp")}

    def prompt(self, row: dict[str, Any]) -> int:
        """Return how many of a prepared row's tokens are given when an answer is asked for."""
        raise NotImplementedError

    def ends(self, processor: Processor) -> tuple[int, ...]:
        """Return the end-of-text token."""
        return (processor.eos_token_id,)

    def learned(self, row: Mapping[str, Any]) -> NDArray[np.bool_]:
        """Return which of a row's tokens are predicted: the `trained` ones, or all, and never the first."""
        learned = np.array(row["trained"] if "trained" in row else np.ones(len(row["input_ids"])), dtype=np.bool_)
        learned[:1] = False
        return learned

    def show(self, model: PreTrainedModel, rows: Dataset, processor: Processor) -> tuple[Sample, ...]:
        """Return what the model says, greedily, to the first rows."""
        return tuple(
            self._answer(model, row, processor)
            for row in rows.select(range(min(_SHOWN, len(rows)))).with_format("numpy")
        )

    def _answer(self, model: PreTrainedModel, row: dict[str, Any], processor: Processor) -> Sample:
        from trainworks.generation import continued

        ids, given = row["input_ids"], self.prompt(row)
        others = np.flatnonzero(~self.learned(row)[given:])
        answer = ids[given : given + int(others[0])] if len(others) else ids[given:]
        (said,) = continued(
            model,
            [ids[:given]],
            ends=self.ends(processor),
            pad=processor.pad_token_id,
            most=max(8, min(64, len(answer) + 16)),
        )
        reference, output = (processor.decode(part, skip_special_tokens=True).strip() for part in (answer, said))
        # With the template's markers, or a reader could not tell one turn from the next.
        return Sample(prompt=processor.decode(ids[:given]).strip(), reference=reference, output=output)
