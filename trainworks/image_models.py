"""What models of images need that others do not: a processor for new weights, the size they are built for, positions
of patches, and the encoder of a masked autoencoder by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from trainworks.schema import NewImageProcessor

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

__all__ = ["encoder_alone", "finish", "image_sizes", "new_image_processor"]


def new_image_processor(settings: NewImageProcessor) -> Any:
    """Return an image processor for new weights: to squares, from pixels of 0 to 255 to numbers around zero."""
    from transformers import ViTImageProcessor

    return ViTImageProcessor(
        size={"height": settings.size, "width": settings.size},
        image_mean=list(settings.mean),
        image_std=list(settings.std),
    )


def image_sizes(processor: Any, kind: Any) -> dict[str, Any]:
    """Return the size of the images for a configuration, where its architecture is built for one."""
    size, usual = processor.size.get("height"), kind().to_dict().get("image_size")
    if not size or usual is None:
        return {}
    return {"image_size": [size, size] if isinstance(usual, list | tuple) else size}


_ENCODERS = {"vit_mae": "vit"}
"""Models that were pretrained with a decoder, and what their encoder alone is called when it is fine-tuned."""


def encoder_alone(config: PretrainedConfig, head: Mapping[str, Any]) -> PretrainedConfig | None:
    """Return the configuration of the encoder of a model that was pretrained with a decoder, with a head's settings;
    None for other models."""
    from transformers import CONFIG_MAPPING

    if config.model_type not in _ENCODERS:
        return None
    kind = CONFIG_MAPPING[_ENCODERS[config.model_type]]
    known = kind().to_dict().keys() - {"model_type", "architectures", "id2label", "label2id", "transformers_version"}
    own: PretrainedConfig = kind(
        **({name: value for name, value in config.to_dict().items() if name in known} | dict(head))
    )
    return own


def finish(model: Any) -> None:
    """Draw what transformers leaves undrawn of a new model's weights, in place."""
    _FINISHED.get(model.config.model_type, lambda model: None)(model)


def _place_patches(model: Any) -> None:
    """Give a new masked autoencoder its positions, and a token for what is hidden.

    transformers 5.23 leaves zeros there, of which LayerNorm makes gradients of thousands; delete once it draws them.
    """
    import torch

    with torch.no_grad():
        for table in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
            table[0, 1:] = _waves(table.shape[1] - 1, table.shape[2])
        for token in (model.vit.embeddings.cls_token, model.decoder.mask_token):
            token.normal_(std=model.config.initializer_range)


def _waves(number: int, width: int) -> Tensor:
    """Return sines and cosines of the places in a square of patches, [number, width] (He et al. 2021,
    arXiv:2111.06377)."""
    import torch

    side, quarter = round(number**0.5), width // 4
    rates = 10_000.0 ** -(torch.arange(quarter) / quarter)
    places = torch.arange(side)[:, None] * rates
    along = torch.cat([places.sin(), places.cos()], dim=1)
    grid = torch.cat([along.repeat(side, 1), along.repeat_interleave(side, dim=0)], dim=1)
    return torch.nn.functional.pad(grid, (0, width - grid.shape[1]))


_FINISHED: dict[str, Callable[[Any], None]] = {"vit_mae": _place_patches}
