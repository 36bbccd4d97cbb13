"""What tasks that learn every token by itself may have besides: noise on embeddings, and experts used evenly."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from trainworks.chance import chances, mixed
from trainworks.data.text import IGNORED
from trainworks.errors import ConfigError
from trainworks.settings import Rate
from trainworks.tasks.base import Processor
from trainworks.tasks.language import LanguageTask

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from trainworks.data.loading import Batch, Row

__all__ = ["NextTokenTask"]


class NextTokenTask(LanguageTask, ABC):
    """Next-token prediction whose loss adds up token by token."""

    neftune: Rate = 0.0
    """Noise on the embeddings in training: uniform, up to this over the root of a row's tokens x their width (NEFTune,
    arXiv:2310.05914, which takes 5 to 15). It is drawn from each row's own seed."""
    expert_balance: Rate = 0.0
    """Weight of a loss that spreads tokens evenly over a layer's experts; it depends on which rows a micro-step sees
    together, on all ranks. 0 leaves it out."""

    def whole_because(self) -> str:
        """Return why its model has to be whole on a rank: to balance its experts, every layer's routing is wanted."""
        return "expert_balance wants every layer's routing in one place" if self.expert_balance else ""

    def verify(self, model: PreTrainedModel) -> None:
        """Prove the same, and see that there are experts to balance."""
        if self.expert_balance and not getattr(model.config, "num_experts_per_tok", None):
            raise ConfigError(f"task.expert_balance: {type(model).__name__} has no experts; leave it out")
        super().verify(model)

    def collate(self, rows: Sequence[Row], processor: Processor, *, train: bool) -> Batch:
        """Return the same, in training with the seed of each row's `noise` and its `noise_scale`, [rows]."""
        batch = super().collate(rows, processor, train=train)
        if train and self.neftune:
            import torch

            scales = [self.neftune / np.sqrt(len(row["input_ids"]) - 1) for row in rows]
            batch["noise"] = torch.tensor([mixed(row["seed"]) >> 1 for row in rows])
            batch["noise_scale"] = torch.tensor(scales, dtype=torch.float32)
        return batch

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """Return how many tokens each row learns."""
        return super().count(batch) | ({"balance": batch["learned"]} if self.expert_balance else {})

    def loss(self, model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
        """Return each row's summed cross-entropy in nats, and its part of the balancing loss, where there is one."""
        if not self.expert_balance:
            return super().loss(model, batch)
        from trainworks.experts import imbalance
        from trainworks.heads import Head

        made = self.made(model, batch, output_router_logits=True)
        learned = batch["labels"].flatten() != IGNORED
        parts = imbalance(made.router_logits, learned, model.config.num_experts_per_tok)
        rows = parts.new_zeros(len(batch["learned"])).index_add(0, batch["row"].flatten(), parts)
        return self.loss_from(made.last_hidden_state, Head(model), batch) | {"balance": self.expert_balance * rows}

    def given(self, model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
        """Return the same, with noisy embeddings in the place of tokens where the batch asks for them."""
        given = super().given(model, batch)
        return _noisy(model, batch, given) if "noise" in batch else given


def _noisy(model: PreTrainedModel, batch: Batch, given: dict[str, Tensor]) -> dict[str, Tensor]:
    import torch

    embedded = model.get_input_embeddings()(given["input_ids"])
    width, row = embedded.shape[-1], batch["row"]
    columns = torch.arange(row.shape[1], device=row.device).expand_as(row)
    first = batch.get("position_ids", columns) * width
    places = first[..., None] + torch.arange(width, device=row.device)
    bits = chances(places, batch["noise"][row][..., None])
    noise = (bits & 0xFFFFFF).float() / 2**23 - 1
    scale = batch["noise_scale"][row][..., None] / width**0.5
    noisy = embedded + (noise * scale).to(embedded.dtype)
    return {name: value for name, value in given.items() if name != "input_ids"} | {"inputs_embeds": noisy}
