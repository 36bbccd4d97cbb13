"""What the tasks whose model ends in a vocabulary head have in common: next-token loss, its metrics, and generation."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from trainworks.data.text import IGNORED, pad
from trainworks.errors import ConfigError
from trainworks.metrics import Metric, Ratio
from trainworks.record import Sample
from trainworks.tasks.base import Processor, Task

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedModel

    from trainworks.data.loading import Batch, Row
    from trainworks.models import Head

__all__ = ["LanguageTask"]

_SHOWN = 3


class LanguageTask(Task, ABC):
    """Next-token prediction over prepared rows of `input_ids` and, where only part is learned, `trained`."""

    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    pipeline_tag: ClassVar[str] = "text-generation"

    def equip(self, processor: Processor) -> Processor:
        """Pad with the end token where there is no padding token: padding is never attended to nor learned."""
        if processor.eos_token_id is None:
            raise ConfigError(f"the tokenizer of {processor.name_or_path} has no end-of-text token to learn to stop by")
        if processor.pad_token_id is None:
            processor.pad_token = processor.eos_token
        return processor

    def verify(self, model: PreTrainedModel) -> None:
        """Prove that no token sees the ones after it, and that backbone and head make the model's own logits."""
        import torch

        from trainworks.models import Head, backbone

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
            raise ConfigError(
                f"model: {kind} makes its logits in a way this version does not know, and would be trained on another "
                "loss than its own; please report the architecture"
            )

    def collate(self, rows: Sequence[Row], processor: Processor, *, train: bool) -> Batch:
        """Return `input_ids` and `labels`, [rows, longest], each label being the token that follows; not learned is
        -100."""
        import torch

        ids = [row["input_ids"] for row in rows]
        targets = [
            np.where(row["trained"], row["input_ids"], IGNORED) if "trained" in row else row["input_ids"]
            for row in rows
        ]
        batch = {
            "input_ids": torch.from_numpy(pad([row[:-1] for row in ids], processor.pad_token_id)),
            "labels": torch.from_numpy(pad([row[1:] for row in targets], IGNORED)),
        }
        if len({len(row) for row in ids}) > 1:
            batch["attention_mask"] = torch.from_numpy(pad([np.ones(len(row) - 1) for row in ids], 0))
        return batch

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """Return how many tokens each row learns."""
        return {"loss": (batch["labels"] != IGNORED).sum(-1)}

    def loss(self, model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
        """Return each row's summed cross-entropy in nats."""
        from trainworks.models import Head, backbone

        hidden = backbone(model)(**self.inputs(batch), use_cache=False).last_hidden_state
        return self.loss_from(hidden, Head(model), batch)

    def loss_from(self, hidden: Tensor, head: Head, batch: Batch) -> dict[str, Tensor]:  # type: ignore[override]
        """Return each row's summed cross-entropy from the last states, [rows, length, width]."""
        from torch.nn.functional import cross_entropy

        labels = batch["labels"]
        logits = head(hidden).float()
        losses = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
        return {"loss": losses.view_as(labels).sum(-1)}

    def loss_metrics(self) -> dict[str, Metric]:
        """Return the loss in nats per token, and its exponential."""
        return super().loss_metrics() | {"perplexity": Ratio("perplexity", higher_is_better=False, transform="exp")}

    def prompt(self, row: dict[str, Any]) -> int:
        """Return how many of a prepared row's tokens are given when an answer is asked for."""
        raise NotImplementedError

    def show(self, model: PreTrainedModel, rows: Dataset, processor: Processor) -> tuple[Sample, ...]:
        """Return what the model says, greedily, to the first rows."""
        return tuple(
            self._answer(model, row, processor)
            for row in rows.select(range(min(_SHOWN, len(rows)))).with_format("numpy")
        )

    def _answer(self, model: PreTrainedModel, row: dict[str, Any], processor: Processor) -> Sample:
        import torch

        ids, given = row["input_ids"], self.prompt(row)
        # A template may close a turn with a special token of its own, and a line break after it.
        ends = [int(token) for token in ids[given:] if token in processor.all_special_ids][-1:]
        prompt = torch.from_numpy(ids[:given].astype(np.int64))[None].to(model.device)
        said = model.generate(  # type: ignore[operator]
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max(8, min(64, len(ids) - given + 16)),
            do_sample=False,
            eos_token_id=sorted({processor.eos_token_id, *ends}),
            pad_token_id=processor.pad_token_id,
        )
        text = (
            processor.decode(part, skip_special_tokens=True).strip()
            for part in (ids[:given], ids[given:], said[0, given:])
        )
        prompt_text, reference, output = text
        return Sample(prompt=prompt_text, reference=reference, output=output)
