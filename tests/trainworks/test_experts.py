"""The balancing loss of a mixture of experts: its formula, and its shares, which are those of all ranks together."""

from __future__ import annotations

from pathlib import Path

import layouts
import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from trainworks.experts import imbalance


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_layers_loss_is_what_transformers_makes_of_it(top_k: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(60, 8)
    learned = torch.rand(60) < 0.7
    expected = load_balancing_loss_func((logits[learned],), 8, top_k)
    parts = imbalance([logits], learned, top_k)
    assert parts[~learned].abs().max() == 0
    assert parts.sum() / learned.sum() == pytest.approx(float(expected), rel=1e-6)
    assert imbalance([logits] * 3, learned, top_k).sum() == pytest.approx(float(parts.sum()), rel=1e-6)


def test_it_is_least_where_all_experts_are_used_alike() -> None:
    alike = 4 * torch.eye(4).repeat(5, 1)
    one = torch.zeros(20, 4)
    one[:, 0] = 4
    everything = torch.ones(20, dtype=torch.bool)
    assert imbalance([alike], everything, 1).mean() == pytest.approx(1.0)
    assert imbalance([one], everything, 1).mean() > 3


@pytest.mark.slow
def test_two_ranks_see_the_shares_that_one_sees_of_the_same_rows(tmp_path: Path) -> None:
    layouts.prepare(tmp_path)
    changes = {"balance": 0.1, "steps": 5}
    batch = {"per_step": 8, "pack": 64}
    alone = layouts.train_over(
        tmp_path, "one", layouts.ONE, [("experts", "full")], batch=batch | {"micro": 4}, **changes
    )
    found = layouts.train_over(
        tmp_path, "two", layouts.SPREADS["FSDP2 2"], [("experts", "full")], batch=batch | {"micro": 2}, **changes
    )
    assert layouts.apart(tmp_path, found, alone, ("two", "one"), "experts-full").is_close
    without = layouts.train_over(
        tmp_path, "without", layouts.ONE, [("experts", "full")], batch=batch | {"micro": 4}, steps=5
    )
    assert not layouts.apart(tmp_path, without, alone, ("without", "one"), "experts-full").is_close
