"""The losses of detectors that predict a set of boxes, as sums over each image, with counts known beforehand.

A model's boxes are matched one to one with those of the image at the least cost (Carion et al. 2020, arXiv:2005.12872),
image by image. transformers divides by the boxes of the micro-batch; here that is left to the optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["FAMILIES", "Family", "Targets", "corners", "family_of"]

_EPS = 1e-8


class Targets(NamedTuple):
    """The boxes of some images: `boxes` [images, most, 4] as centre, width and height in shares of the image, and
    `kinds` [images, most], -1 where an image has no more."""

    boxes: Tensor
    kinds: Tensor


class _Matched(NamedTuple):
    """Pairs of a predicted box and one that is there, [pairs] each."""

    image: Tensor
    query: Tensor
    target: Tensor


@dataclass(frozen=True)
class Family:
    """How detectors of one kind are taught and read."""

    sums: Callable[[Any, Any, Targets], dict[str, Tensor]]
    """Of the model's configuration, its outputs and the targets: the terms' sums, [images]."""
    scores: Callable[[Tensor], Tensor]
    """Of logits [images, queries, outputs] the probabilities of the classes, [images, queries, classes]."""
    empty_weight: Callable[[Any], float]
    """Of the configuration, what a box without a thing counts in the term of the classes, where one with a thing counts
    as one; 0 where only things count."""


def corners(boxes: Tensor) -> Tensor:
    """Return boxes [..., 4] of centre, width and height as left, top, right, bottom."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def _overlap(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return intersection over union, and the generalised one (Rezatofighi et al. 2019, arXiv:1902.09630), of boxes
    [..., 4] by their corners that stand in one place."""
    sides = (torch.minimum(first[..., 2:], second[..., 2:]) - torch.maximum(first[..., :2], second[..., :2])).clamp(
        min=0
    )
    hull = torch.maximum(first[..., 2:], second[..., 2:]) - torch.minimum(first[..., :2], second[..., :2])
    both, around = sides.prod(-1), hull.clamp(min=0).prod(-1)
    union = (first[..., 2:] - first[..., :2]).prod(-1) + (second[..., 2:] - second[..., :2]).prod(-1) - both
    iou = both / union.clamp(min=_EPS)
    return iou, iou - (around - union) / around.clamp(min=_EPS)


@torch.no_grad()
def _match(class_cost: Tensor, boxes: Tensor, targets: Targets, costs: tuple[float, float, float]) -> _Matched:
    """Match each image's boxes at the least cost; `class_cost` is [images, queries, most]."""
    from scipy.optimize import linear_sum_assignment

    apart = torch.cdist(boxes, targets.boxes, p=1)
    _, giou = _overlap(corners(boxes)[:, :, None], corners(targets.boxes)[:, None])
    whole = costs[0] * class_cost + costs[1] * apart - costs[2] * giou
    cost = torch.nan_to_num(whole, nan=1e9, posinf=1e9, neginf=1e9).cpu().numpy()
    triples: list[Tensor] = []
    for image, number in enumerate((targets.kinds >= 0).sum(1).tolist()):
        query, target = (torch.as_tensor(places) for places in linear_sum_assignment(cost[image, :, :number]))
        triples.append(torch.stack([torch.full_like(query, image), query, target]))
    return _Matched(*torch.cat(triples, dim=1).to(boxes.device))


def _per_image(values: Tensor, matched: _Matched, images: int) -> Tensor:
    """Add up what pairs have, [pairs], by image."""
    return values.new_zeros(images).index_add(0, matched.image, values)


def _box_sums(boxes: Tensor, targets: Targets, matched: _Matched, weights: tuple[float, float]) -> Tensor:
    """Return the sums of distance and generalised overlap, weighted, [images]."""
    said, there = boxes[matched.image, matched.query], targets.boxes[matched.image, matched.target]
    _, giou = _overlap(corners(said), corners(there))
    pairs = weights[0] * (said - there).abs().sum(-1) + weights[1] * (1 - giou)
    return _per_image(pairs, matched, len(boxes))


# DETR, YOLOS


def _detr(config: Any, outputs: Any, targets: Targets) -> dict[str, Tensor]:
    """Cross-entropy over the classes and none, a box without a thing weighing less, and the boxes' distance."""
    logits, boxes = outputs.logits.float(), outputs.pred_boxes.float()
    kinds = targets.kinds.clamp(min=0)
    chosen = logits.softmax(-1).gather(2, kinds[:, None].expand(-1, logits.shape[1], -1))
    matched = _match(-chosen, boxes, targets, (config.class_cost, config.bbox_cost, config.giou_cost))
    none = logits.shape[-1] - 1
    wanted = torch.full(logits.shape[:2], none, device=logits.device)
    wanted[matched.image, matched.query] = targets.kinds[matched.image, matched.target]
    weight = torch.where(wanted == none, config.eos_coefficient, 1.0)
    classes = (weight * cross_entropy(logits.transpose(1, 2), wanted, reduction="none")).sum(1)
    weights = (config.bbox_loss_coefficient, config.giou_loss_coefficient)
    return {"classes": classes, "boxes": _box_sums(boxes, targets, matched, weights)}


# RT-DETR and what followed it


def _rt_detr(config: Any, outputs: Any, targets: Targets) -> dict[str, Tensor]:
    """The same losses for each layer's boxes and for those the encoder proposes; the classes' is the varifocal one
    (Zhang et al. 2020, arXiv:2008.13367)."""
    layers = [*zip(outputs.intermediate_logits.unbind(1), outputs.intermediate_reference_points.unbind(1), strict=True)]
    proposed = (outputs.enc_topk_logits, outputs.enc_topk_bboxes)
    parts = [*layers, proposed] if config.auxiliary_loss else layers[-1:]
    sums: dict[str, Tensor] = {}
    for logits, boxes in parts:
        for name, value in _rt_detr_layer(config, logits.float(), boxes.float(), targets).items():
            sums[name] = sums[name] + value if name in sums else value
    return sums


def _rt_detr_layer(config: Any, logits: Tensor, boxes: Tensor, targets: Targets) -> Mapping[str, Tensor]:
    costs = (config.matcher_class_cost, config.matcher_bbox_cost, config.matcher_giou_cost)
    matched = _match(_focal_cost(config, logits, targets), boxes, targets, costs)
    said, there = boxes[matched.image, matched.query], targets.boxes[matched.image, matched.target]
    iou, _ = _overlap(corners(said.detach()), corners(there))
    kinds = torch.full(logits.shape[:2], logits.shape[-1], device=logits.device)
    kinds[matched.image, matched.query] = targets.kinds[matched.image, matched.target]
    right = one_hot(kinds, logits.shape[-1] + 1)[..., :-1]
    quality = torch.zeros_like(logits[..., 0])
    quality[matched.image, matched.query] = iou.to(quality)
    wanted = quality[..., None] * right
    weight = config.focal_loss_alpha * logits.detach().sigmoid().pow(config.focal_loss_gamma) * (1 - right) + wanted
    classes = binary_cross_entropy_with_logits(logits, wanted, weight=weight, reduction="none").sum((1, 2))
    weights = (config.weight_loss_bbox, config.weight_loss_giou)
    return {
        "classes": config.weight_loss_vfl * classes,
        "boxes": _box_sums(boxes, targets, matched, weights),
    }


def _focal_cost(config: Any, logits: Tensor, targets: Targets) -> Tensor:
    kinds = targets.kinds.clamp(min=0)[:, None].expand(-1, logits.shape[1], -1)
    if not config.use_focal_loss:
        return -logits.softmax(-1).gather(2, kinds)
    chance = logits.sigmoid().gather(2, kinds)
    alpha, gamma = config.matcher_alpha, config.matcher_gamma
    wrong: Tensor = (1 - alpha) * chance**gamma * -(1 - chance + _EPS).log()
    right: Tensor = alpha * (1 - chance) ** gamma * -(chance + _EPS).log()
    return right - wrong


_DETR = Family(_detr, lambda logits: logits.softmax(-1)[..., :-1], lambda config: float(config.eos_coefficient))
_RT_DETR = Family(_rt_detr, torch.sigmoid, lambda config: 0.0)
FAMILIES: dict[str, Family] = {
    "ForObjectDetection": _DETR,
    "RTDetrForObjectDetection": _RT_DETR,
    "RTDetrV2ForObjectDetection": _RT_DETR,
}
"""The families, by what transformers calls a model's loss."""


def family_of(model: PreTrainedModel) -> Family | None:
    """Return a model's family, or None for a model whose loss is not known here."""
    return FAMILIES.get(str(model.loss_type))
