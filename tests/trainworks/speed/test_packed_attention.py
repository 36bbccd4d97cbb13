"""Rows that share a line attend as under the mask that transformers makes for them, and as they do alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch

from trainworks.models import initialise
from trainworks.schema import FromScratch
from trainworks.speed import packed_attention
from trainworks.speed.packed_attention import rows_apart
from trainworks.tasks import SFT

TASK = SFT(max_length=128)
SIZES = tiny.SIZES | {"num_key_value_heads": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "qwen3": SIZES | {"head_dim": 8},
    "mistral": SIZES | {"sliding_window": 5},
    "gemma3_text": SIZES | {"head_dim": 8, "sliding_window": 5},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
}


def model(architecture: str) -> Any:
    settings = FromScratch(
        architecture=architecture, sizes=SHAPES[architecture] | {"initializer_range": 0.2}, tokenizer="unused"
    )
    return initialise(settings, "AutoModelForCausalLM", tiny.tokenizer(), seed=3).eval()


def batch() -> dict[str, torch.Tensor]:
    """Return three lines of rows of 1 to 30 tokens."""
    rng = np.random.default_rng(0)
    sizes = [[30, 2, 9], [12, 28], [1, 7, 17, 4]]
    rows = [
        {"input_ids": rng.integers(0, 320, size + 1).astype(np.int32), "pack": line}
        for line, inside in enumerate(sizes)
        for size in inside
    ]
    return TASK.collate(rows, tiny.tokenizer(), train=True)


def losses(made: Any, given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    made.zero_grad()
    found = TASK.loss(made, given)["loss"]
    found.sum().backward()
    return found.detach(), {name: weight.grad.clone() for name, weight in made.named_parameters()}


def test_a_batch_says_where_its_rows_begin() -> None:
    given = batch()
    assert given["input_ids"].shape == (3, 42)
    assert given["bounds"].tolist() == [0, 30, 32, 41, 42, 54, 82, 84, 85, 92, 109, 113, 126]
    assert given["bounds"].dtype == torch.int32
    assert given["longest"].shape == (32, 0)
    starts = (given["position_ids"].flatten() == 0).nonzero().flatten().tolist()
    assert set(given["bounds"].tolist()[:-1]) <= set(starts)


@pytest.mark.parametrize("size", [1, 2, 31, 100, 511, 512, 513, 2000, 4090])
def test_lines_have_few_lengths_and_little_padding_for_it(size: int) -> None:
    from trainworks.tasks.language import _SIXTEENTHS, _rounded_up

    width = _rounded_up(size, _SIXTEENTHS)
    assert size <= width <= size * (1 + 1 / _SIXTEENTHS)
    assert len({_rounded_up(each, _SIXTEENTHS) for each in range(1025, 2049)}) == _SIXTEENTHS


@pytest.mark.parametrize("architecture", SHAPES)
def test_losses_and_gradients_are_those_under_a_mask(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, given, calls = model(architecture), batch(), []

    def counted(*arguments: Any) -> torch.Tensor:
        calls.append(arguments)
        return packed_attention._by_rows(*arguments)

    monkeypatch.setitem(packed_attention._KERNELS, "cpu", counted)
    found, gradients = losses(made, given)
    assert len(calls) == 2, "one call for each layer"
    monkeypatch.setattr(packed_attention, "_serves", lambda *_: False)
    expected, wanted = losses(made, given)
    assert len(calls) == 2
    assert torch.allclose(found, expected, rtol=1e-5)
    for name, gradient in wanted.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_the_models_own_attention_is_back_afterwards() -> None:
    made, given = model("llama"), batch()
    with rows_apart(made, given) as told:
        assert made.config._attn_implementation == "rows_apart"
        assert told["max_length_q"] == 32
    assert made.config._attn_implementation == "sdpa"
    with pytest.raises(ZeroDivisionError), rows_apart(made, given):
        raise ZeroDivisionError
    assert made.config._attn_implementation == "sdpa"


def test_other_attention_and_other_batches_are_left_to_transformers() -> None:
    made, given = model("llama"), batch()
    with rows_apart(made, {"input_ids": given["input_ids"]}) as told:
        assert told == {}
    made.set_attn_implementation("eager")
    with rows_apart(made, given) as told:
        assert told == {}
        assert made.config._attn_implementation == "eager"
