"""Several adapters worked into their base model at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainworks.errors import ConfigError
from trainworks.models import load, load_processor, pad_with
from trainworks.schema import Pretrained

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["merge_adapters"]

_AUTO_CLASSES = {"CAUSAL_LM": "AutoModelForCausalLM"}


def merge_adapters(adapters: Mapping[str | Path, float], folder: str | Path) -> Path:
    """Add the updates of several LoRA adapters, each times its weight, to the base model that all of them have, and
    write that to a new `folder`, with the first one's tokenizer.

    The sum is exact: base + sum of weight x B A (task arithmetic, Ilharco et al. 2022, arXiv:2212.04089). ConfigError
    for adapters that do not add up: of other bases, DoRA, or with whole layers or tokens of their own.
    """
    if Path(folder).exists():
        raise ConfigError(f"{folder} is there already; name a new folder")
    configs = {str(path): _lora(Path(path)) for path in adapters}
    bases = {str(config.base_model_name_or_path): path for path, config in configs.items()}
    if len(bases) != 1:
        raise ConfigError(f"the adapters have other bases: {', '.join(sorted(bases))}")
    first = next(iter(configs))
    kinds = {str(config.task_type) for config in configs.values()}
    if not kinds <= _AUTO_CLASSES.keys():
        raise ConfigError(f"{first}: adapters of language models are merged, not of {', '.join(sorted(kinds))}")
    processor = load_processor("tokenizer", first)
    model: Any = load(Pretrained(next(iter(bases))), _AUTO_CLASSES[kinds.pop()], {}, processor, seed=0)
    pad_with(model, processor)
    for path, weight in adapters.items():
        model = _added(model, str(path), weight)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)


def _added(model: Any, path: str, weight: float) -> Any:
    """Return a model with an adapter's update added in."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    adapter: Any = PeftModel.from_pretrained(model, path)
    for layer in adapter.modules():
        if isinstance(layer, LoraLayer):
            layer.scale_layer(weight)
    return adapter.merge_and_unload()


def _lora(folder: Path) -> LoraConfig:
    from peft import LoraConfig, PeftConfig

    missing = [name for name in ("adapter_config.json", "adapter_model.safetensors") if not (folder / name).is_file()]
    if missing:
        raise ConfigError(f"{folder} holds no {missing[0]}, so it is no adapter")
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig) or config.use_dora:
        raise ConfigError(f"{folder}: only the updates of LoRA add up, not those of {config.peft_type} or DoRA")
    if config.modules_to_save or config.trainable_token_indices:
        raise ConfigError(f"{folder}: layers or tokens of its own cannot be added to those of another")
    return config
