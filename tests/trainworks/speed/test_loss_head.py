"""The chunked head gives the loss and gradients of the plain one, whatever the chunk, and holds no logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from trainworks.speed import loss_head
from trainworks.speed.cross_entropy import token_losses
from trainworks.speed.loss_head import head_losses, weighed_losses

TOKENS, WIDTH, VOCABULARY = 37, 12, 29
IGNORED = -100


def capped(logits: Tensor) -> Tensor:
    return (logits / 3.0).tanh() * 3.0


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=draw).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=draw).to(dtype).requires_grad_()
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=draw)
    labels[::5] = IGNORED
    return hidden, weight, labels


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, shape: Any) -> Tensor:
    logits = (hidden @ weight.t()).float()
    return cross_entropy(logits if shape is None else shape(logits), labels, ignore_index=IGNORED, reduction="none")


@pytest.mark.parametrize("shape", [None, capped], ids=["plain", "capped"])
@pytest.mark.parametrize("tokens", [1, 8, 100])
def test_loss_and_gradients_are_those_of_the_plain_head(
    tokens: int, shape: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loss_head._CHUNK_BYTES, "cpu", 4 * VOCABULARY * tokens)
    hidden, weight, labels = inputs()
    expected = plain(hidden, weight, labels, shape)
    (expected.sum() * 0.25).backward()
    wanted = (hidden.grad, weight.grad)
    hidden.grad = weight.grad = None
    losses = head_losses(hidden, weight, labels, ignored=IGNORED, shape=shape)
    (losses.sum() * 0.25).backward()
    assert torch.allclose(losses, expected, atol=1e-5)
    assert losses[::5].count_nonzero() == 0
    for got, want in zip((hidden.grad, weight.grad), wanted, strict=True):
        assert got is not None
        assert want is not None
        assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 8, 100])
def test_a_bias_is_learned_with_the_weights(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss_head._CHUNK_BYTES, "cpu", 4 * VOCABULARY * tokens)
    hidden, weight, labels = inputs()
    bias = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(2)).requires_grad_()
    logits = hidden @ weight.t() + bias
    expected = cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
    wanted = torch.autograd.grad(expected.sum() * 0.25, (hidden, weight, bias))
    losses = head_losses(hidden, weight, labels, ignored=IGNORED, bias=bias)
    got = torch.autograd.grad(losses.sum() * 0.25, (hidden, weight, bias))
    assert torch.allclose(losses, expected, atol=1e-5)
    for ours, theirs in zip(got, wanted, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("shape", [None, capped], ids=["plain", "capped"])
def test_what_a_gpu_compiles_is_the_same(shape: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = inputs()
    head_losses(hidden, weight, labels, ignored=IGNORED, shape=shape).sum().backward()
    wanted = (hidden.grad, weight.grad)
    hidden.grad = weight.grad = None
    monkeypatch.setitem(loss_head._GRADIENTS, "cpu", loss_head._GRADIENTS["cuda"])
    head_losses(hidden, weight, labels, ignored=IGNORED, shape=shape).sum().backward()
    for got, want in zip((hidden.grad, weight.grad), wanted, strict=True):
        assert got is not None
        assert want is not None
        assert torch.allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_not_trained_gets_no_gradient(frozen: str) -> None:
    hidden, weight, labels = inputs()
    {"hidden": hidden, "weight": weight}[frozen].requires_grad_(False)
    head_losses(hidden, weight, labels, ignored=IGNORED).sum().backward()
    assert (hidden.grad is None, weight.grad is None) == (frozen == "hidden", frozen == "weight")


def test_tokens_that_are_weighed_apart_are_refused() -> None:
    hidden, weight, labels = inputs()
    losses = head_losses(hidden, weight, labels, ignored=IGNORED)
    with pytest.raises(RuntimeError, match="not weighed alike"):
        (losses * torch.arange(TOKENS)).sum().backward()


@pytest.mark.parametrize("shape", [None, capped], ids=["plain", "capped"])
@pytest.mark.parametrize("tokens", [1, 8, 100])
@pytest.mark.parametrize("frozen", [None, "hidden", "weight"])
def test_tokens_that_are_weighed_apart_have_the_gradients_of_the_plain_head(
    frozen: str | None, tokens: int, shape: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loss_head._CHUNK_BYTES, "cpu", 4 * VOCABULARY * tokens)
    hidden, weight, labels = (part.double() if part.is_floating_point() else part for part in inputs())
    hidden, weight = (
        part.detach().requires_grad_(name != frozen) for name, part in (("hidden", hidden), ("weight", weight))
    )
    trained = [part for part in (hidden, weight) if part.requires_grad]
    weights = torch.randn(TOKENS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits = hidden @ weight.t()
    expected = cross_entropy(logits if shape is None else shape(logits), labels, ignore_index=IGNORED, reduction="none")
    wanted = torch.autograd.grad((expected * weights).sum(), trained)
    losses = weighed_losses(hidden, weight, labels, ignored=IGNORED, shape=shape)
    got = torch.autograd.grad((losses * weights).sum(), trained)
    assert torch.allclose(losses, expected, rtol=1e-12, atol=1e-12)
    for part, other in zip(got, wanted, strict=True):
        assert torch.allclose(part, other, rtol=1e-12, atol=1e-12)


def test_no_token_at_all_gives_gradients_of_nothing() -> None:
    hidden, weight, labels = inputs()
    weighed_losses(hidden[:0], weight, labels[:0], ignored=IGNORED).sum().backward()
    assert weight.grad is not None
    assert weight.grad.count_nonzero() == 0


def test_weighed_tokens_of_half_precision_keep_their_type() -> None:
    hidden, weight, labels = inputs(torch.bfloat16)
    weights = torch.linspace(-1, 1, TOKENS)
    (weighed_losses(hidden, weight, labels, ignored=IGNORED) * weights).sum().backward()
    whole, matrix = (part.detach().float().requires_grad_() for part in (hidden, weight))
    (plain(whole, matrix, labels, None) * weights).sum().backward()
    for got, want in ((hidden.grad, whole.grad), (weight.grad, matrix.grad)):
        assert got is not None
        assert want is not None
        assert got.dtype == torch.bfloat16
        assert torch.allclose(got.float(), want, rtol=2e-2, atol=2e-2)


def test_rows_without_weight_are_left_out_by_their_labels() -> None:
    hidden, weight, labels = inputs()
    labels[:] = IGNORED
    losses = head_losses(hidden, weight, labels, ignored=IGNORED)
    losses.sum().backward()
    assert hidden.grad is not None
    assert (losses.sum(), hidden.grad.abs().sum()) == (0.0, 0.0)


def test_half_precision_states_are_taken_as_they_are() -> None:
    hidden, weight, labels = inputs(torch.bfloat16)
    losses = head_losses(hidden, weight, labels, ignored=IGNORED)
    losses.sum().backward()
    assert losses.dtype == torch.float32
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16
    expected = plain(hidden.detach().float(), weight.detach().float(), labels, None)
    assert torch.allclose(losses, expected, rtol=2e-2, atol=5e-2)


def test_the_gradient_takes_the_place_of_the_logarithms() -> None:
    draw = torch.Generator().manual_seed(1)
    logits = torch.randn(TOKENS, VOCABULARY, generator=draw, requires_grad=True)
    labels = inputs()[2]
    weights = torch.rand(TOKENS, generator=draw)
    wanted = torch.autograd.grad((plain(logits, torch.eye(VOCABULARY), labels, None) * weights).sum(), logits)[0]
    losses = token_losses(logits, labels, ignored=IGNORED)
    got = torch.autograd.grad((losses * weights).sum(), logits, retain_graph=True)[0]
    assert torch.allclose(got, wanted, atol=1e-6)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()
