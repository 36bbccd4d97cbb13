"""Adapters in models of images: heads are trained whole wherever they stand, and convolutions can be adapted too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    DetrConfig,
    DetrForObjectDetection,
    ResNetConfig,
    ResNetForImageClassification,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrResNetConfig,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from trainworks import LoRA
from trainworks.errors import ConfigError
from trainworks.tuning import tune

STAGES: dict[str, Any] = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
RESNET: dict[str, Any] = STAGES | {"embedding_size": 8, "layer_type": "basic"}
ATTENTION: dict[str, Any] = {"d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
DETR: dict[str, Any] = ATTENTION | {"encoder_layers": 1, "decoder_layers": 1, "num_queries": 5, "num_labels": 3}
RT_DETR: dict[str, Any] = ATTENTION | {
    "encoder_in_channels": [8, 16, 16],
    "decoder_in_channels": [16] * 3,
    "encoder_hidden_dim": 16,
    "decoder_layers": 2,
    "num_queries": 5,
    "num_labels": 3,
}


def detr() -> Any:
    backbone = ResNetConfig(**RESNET, out_features=["stage4"])
    return DetrForObjectDetection(DetrConfig(backbone_config=backbone, use_timm_backbone=False, **DETR))


def rt_detr() -> Any:
    backbone = RTDetrResNetConfig(**RESNET, out_features=["stage2", "stage3", "stage4"])
    return RTDetrForObjectDetection(RTDetrConfig(backbone_config=backbone, **RT_DETR))


def upernet() -> Any:
    backbone = ConvNextConfig(**STAGES, out_features=["stage1", "stage2", "stage3", "stage4"])
    return UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone, hidden_size=8, num_labels=3))


def segformer() -> Any:
    sizes = {"hidden_sizes": [8] * 4, "num_attention_heads": [1] * 4, "decoder_hidden_size": 8, "depths": [1] * 4}
    return SegformerForSemanticSegmentation(SegformerConfig(**sizes, num_labels=3))


MODELS: dict[str, tuple[Callable[[], Any], str, set[str]]] = {
    "convnext": (
        lambda: ConvNextForImageClassification(ConvNextConfig(**STAGES, num_labels=3)),
        "AutoModelForImageClassification",
        {"classifier"},
    ),
    "resnet": (
        lambda: ResNetForImageClassification(ResNetConfig(**RESNET, num_labels=3)),
        "AutoModelForImageClassification",
        {"classifier"},
    ),
    "segformer": (segformer, "AutoModelForSemanticSegmentation", {"decode_head"}),
    "upernet": (upernet, "AutoModelForSemanticSegmentation", {"decode_head", "auxiliary_head"}),
    "detr": (detr, "AutoModelForObjectDetection", {"class_labels_classifier", "bbox_predictor"}),
    "rt-detr": (
        rt_detr,
        "AutoModelForObjectDetection",
        {"model.decoder.class_embed.0", "model.decoder.class_embed.1", "model.enc_score_head"},
    ),
}
"""Each with its Auto class and the parts that are trained whole."""


@pytest.mark.parametrize("name", MODELS)
def test_heads_are_trained_whole_and_all_layers_merge_into_the_same_model(name: str) -> None:
    torch.manual_seed(0)
    make, auto_class, heads = MODELS[name]
    model = make().eval()
    tuned = tune(LoRA(rank=2, targets="all-layers"), model, auto_class=auto_class)
    assert tuned.adapter is not None
    trained = {key.removeprefix("base_model.model.") for key, _ in trainable(tuned.adapter)}
    whole = {key.partition(".modules_to_save")[0] for key in trained if "modules_to_save" in key}
    assert whole == heads
    adapted = {key.partition(".lora_")[0] for key in trained if ".lora_" in key}
    assert {type(model.get_submodule(key).base_layer).__name__ for key in adapted} >= {"Conv2d"}
    with torch.no_grad():
        for _, weight in trainable(tuned.adapter):
            weight.add_(0.1 * torch.randn_like(weight))
    images = torch.randn(2, 3, 64, 64)
    expected = tuned.adapter(pixel_values=images).logits
    merged = tuned.adapter.merge_and_unload()
    torch.testing.assert_close(merged(pixel_values=images).logits, expected, rtol=1e-3, atol=1e-4)


def trainable(module: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, weight) for name, weight in module.named_parameters() if weight.requires_grad]


def test_linear_layers_alone_are_adapted_unless_more_is_asked_for() -> None:
    make, auto_class, _ = MODELS["convnext"]
    tuned = tune(LoRA(rank=2), make(), auto_class=auto_class)
    assert tuned.adapter is not None
    assert {weight.ndim for name, weight in trainable(tuned.adapter) if ".lora_" in name} == {2}
    with pytest.raises(ConfigError, match="tuning"):
        tune(LoRA(rank=2), MODELS["resnet"][0](), auto_class=auto_class)  # it has convolutions only
