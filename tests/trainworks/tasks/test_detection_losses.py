"""The losses of detectors are transformers' own, once they are divided by what transformers divides by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    ResNetConfig,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrResNetConfig,
    YolosConfig,
    YolosForObjectDetection,
)

from trainworks.tasks import ObjectDetection


def yolos() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return YolosForObjectDetection(
        YolosConfig(**sizes, **dropout, image_size=[32, 32], patch_size=8, num_detection_tokens=7, num_labels=3)
    )


def detr() -> Any:
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_queries": 7, "d_model": 32}
    return DetrForObjectDetection(
        DetrConfig(backbone_config=backbone, use_timm_backbone=False, dropout=0.0, num_labels=3, **layers, **heads)
    )


def rt_detr() -> Any:
    backbone = RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1] * 4,
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    return RTDetrForObjectDetection(
        RTDetrConfig(
            backbone_config=backbone,
            encoder_hidden_dim=32,
            encoder_in_channels=[8, 16, 16],
            encoder_ffn_dim=32,
            d_model=32,
            decoder_in_channels=[32] * 3,
            decoder_ffn_dim=32,
            decoder_layers=2,
            num_queries=7,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            dropout=0.0,
            num_labels=3,
            num_denoising=0,
            encode_proj_layers=[2],
            feat_strides=[8, 16, 32],
        )
    )


def targets() -> list[dict[str, torch.Tensor]]:
    box = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.3, 0.6, 0.3, 0.2], [0.7, 0.2, 0.1, 0.1]])
    kinds = torch.tensor([0, 2, 1])
    return [{"class_labels": kinds[:number], "boxes": box[:number]} for number in (2, 3, 1)]


def batch(images: torch.Tensor) -> dict[str, torch.Tensor]:
    made = {"pixel_values": images, "boxes": torch.zeros(3, 3, 4), "kinds": torch.full((3, 3), -1)}
    for row, target in enumerate(targets()):
        number = len(target["boxes"])
        made["boxes"][row, :number], made["kinds"][row, :number] = target["boxes"], target["class_labels"]
    return made


@pytest.mark.parametrize("make", [yolos, detr, rt_detr], ids=["yolos", "detr", "rt-detr"])
def test_a_loss_and_its_gradients_are_those_of_transformers(make: Any) -> None:
    torch.manual_seed(0)
    model = make().train()
    task = ObjectDetection(labels=("a", "b", "c")).fitted(model)
    task.settle(model)
    images = torch.randn(3, 3, 64, 64) if make is not yolos else torch.randn(3, 3, 32, 32)
    theirs = model(pixel_values=images, labels=targets()).loss
    theirs.backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    sums, counts = task.loss(model, batch(images)), task.count(batch(images))
    ours = sum(sums[name].sum() / counts[name].sum() for name in counts)
    ours.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5, msg=name)


def test_an_image_without_things_is_learned_as_one() -> None:
    torch.manual_seed(0)
    model = yolos().eval()
    task = ObjectDetection(labels=("a", "b", "c")).fitted(model)
    given = {**batch(torch.randn(3, 3, 32, 32)), "kinds": torch.full((3, 3), -1)}
    sums, counts = task.loss(model, given), task.count(given)
    assert counts["boxes"].tolist() == sums["boxes"].tolist() == [0, 0, 0]
    assert counts["classes"].tolist() == pytest.approx([0.7] * 3)
    assert all(value > 0 for value in sums["classes"].tolist())
