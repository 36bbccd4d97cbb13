"""What of a model's folder is believed: weights and settings that stand in it; its code, pickles and kernels are not.

A local folder is trusted as little as a repository on the Hub: both may come from anybody.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from trainworks.errors import ConfigError

__all__ = ["adapter_base", "check_links", "check_model", "check_processor", "inside"]

Check = Callable[[str, Mapping[str, Any]], None]

_INDEX = "model.safetensors.index.json"
_ATTENTION = ("eager", "sdpa", "flex_attention")
_EXPERTS = ("eager", "batched_mm", "grouped_mm")
_NEVER_RUN = "and no code of a model's folder or repository is run"


def inside(path: Path, folder: Path) -> bool:
    """Tell whether a file stands in a folder, links followed; those of the Hub's cache may lead to its blobs."""
    root, place = folder.resolve(), path.resolve()
    blobs = [root.parents[1] / "blobs"] if root.parent.name == "snapshots" else []
    return any(place.is_relative_to(allowed) for allowed in (root, *blobs))


def check_links(folder: Path) -> None:
    """Refuse a model folder in which a link leads out of it: what it leads to would be read, and published."""
    for path in (*folder.iterdir(), *(folder / "additional_chat_templates").glob("*")):
        if path.is_symlink() and path.is_file() and not inside(path, folder):
            raise ConfigError(
                f"model: {folder}: {path.relative_to(folder)} is a link to a file outside; put a copy in its place"
            )


def check_model(name: str, revision: str) -> None:
    """Refuse a model, in a folder or on the Hub, whose settings have transformers run or fetch what they name.

    What of them is ignored anyway, such as a `custom_generate` folder, is left alone. ConfigError names file and key;
    OSError and the Hub client's errors where a file cannot be had.
    """
    _check(name, revision, _OF_A_MODEL)


def adapter_base(folder: Path) -> str:
    """Return the name of the model that an adapter's folder belongs to; ConfigError where PEFT would run or import what
    the folder names, or read a pickle."""
    check_links(folder)
    where = f"model: {folder / 'adapter_config.json'}"
    settings = _read(folder / "adapter_config.json", where)
    if settings.get("peft_type") != "LORA":
        raise ConfigError(f"{where}: peft_type: {settings.get('peft_type')!r}; only LORA is read")
    for key in ("auto_mapping", "megatron_config"):
        if settings.get(key):
            raise ConfigError(f"{where}: {key} names modules to import, {_NEVER_RUN}; leave the key out")
    if not (folder / "adapter_model.safetensors").is_file():
        raise ConfigError(f"model: {folder} holds no adapter_model.safetensors, and no other weights are read")
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ConfigError(f"{where}: base_model_name_or_path: names no model that the adapter belongs to")
    return base


def check_processor(kind: str, name: str, revision: str) -> None:
    """Do the same for a `tokenizer` or an `image_processor`."""
    _check(name, revision, _OF_A_PROCESSOR[kind])


def _check(name: str, revision: str, checks: Mapping[str, Check]) -> None:
    for file, check in checks.items():
        if (path := _found(name, file, revision)) is not None:
            where = f"model: {name}: {file}"
            check(where, _read(path, where))


def _found(name: str, file: str, revision: str) -> Path | None:
    from huggingface_hub import is_offline_mode
    from transformers.utils.hub import cached_file

    found = cached_file(
        name,
        file,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=not is_offline_mode(),
    )
    return None if found is None else Path(found)


def _read(path: Path, where: str) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: holds no JSON object")
    return value


def _entries(value: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every key of nested settings with its value."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*above, key), inner
            yield from _entries(inner, (*above, key))
    elif isinstance(value, list):
        for inner in value:
            yield from _entries(inner, above)


# What a key may say


def _one_of(allowed: tuple[str, ...]) -> Callable[[str, Any], None]:
    def check(where: str, value: Any) -> None:
        for chosen in value.values() if isinstance(value, dict) else [value]:
            if chosen is not None and chosen not in allowed:
                raise ConfigError(
                    f"{where}: {chosen!r} may be fetched from the Hub and run, {_NEVER_RUN}; leave the key out, or "
                    f"name one of {', '.join(allowed)}"
                )

    return check


def _quantization(where: str, value: Any) -> None:
    if value is None:
        return
    method = value.get("quant_method", "bitsandbytes") if isinstance(value, dict) else value
    if method != "bitsandbytes":
        raise ConfigError(
            f"{where}: weights quantised by {method!r} are not read, for their kernels are fetched from the Hub and "
            "run; take the model's unquantised weights"
        )


def _weights_file(where: str, value: Any) -> None:
    if value not in (None, "model.safetensors", _INDEX):
        raise ConfigError(f"{where}: {value!r}: only model.safetensors or {_INDEX} is read; leave the key out")


_OF_A_KEY: dict[str, Callable[[str, Any], None]] = {
    "attn_implementation": _one_of(_ATTENTION),
    "_attn_implementation": _one_of(_ATTENTION),
    "experts_implementation": _one_of(_EXPERTS),
    "_experts_implementation": _one_of(_EXPERTS),
    "quantization_config": _quantization,
    "transformers_weights": _weights_file,
}


# What a file may say


def _model_settings(where: str, settings: Mapping[str, Any]) -> None:
    """Refuse custom code where transformers has none of its own for the model, and what names kernels."""
    from transformers import CONFIG_MAPPING

    kind = settings.get("model_type")
    if "auto_map" in settings and kind not in CONFIG_MAPPING:
        raise ConfigError(
            f"{where}: auto_map: custom code, {_NEVER_RUN}; take a model that transformers has itself, for it has no "
            f"{kind!r}"
        )
    for keys, value in _entries(settings):
        if keys[-1] in _OF_A_KEY:
            _OF_A_KEY[keys[-1]](f"{where}: {'.'.join(keys)}", value)


def _weights_index(where: str, settings: Mapping[str, Any]) -> None:
    """Refuse weights that stand elsewhere, and pickles: transformers goes by a file's ending."""
    shards = settings.get("weight_map")
    if not isinstance(shards, dict):
        raise ConfigError(f"{where}: weight_map: says of no weight where it stands")
    for name in shards.values():
        path = PurePath(str(name))
        if path.suffix != ".safetensors" or path.is_absolute() or ".." in path.parts:
            raise ConfigError(
                f"{where}: weight_map: {name} is no safetensors file of this folder, and no other is read"
            )


def _no_adapter(where: str, _settings: Mapping[str, Any]) -> None:
    raise ConfigError(
        f"{where}: an adapter, which would be loaded into the model unasked; name a whole model, such as the folder "
        "`merged` that a run with tuning.merge: true writes"
    )


def _tokenizer_class(where: str, settings: Mapping[str, Any]) -> None:
    from transformers import PreTrainedTokenizerBase

    _check_class(where, settings, "tokenizer_class", PreTrainedTokenizerBase)


def _image_class(where: str, settings: Mapping[str, Any]) -> None:
    from transformers.image_processing_utils import BaseImageProcessor

    _check_class(where, settings, "image_processor_type", BaseImageProcessor)


def _check_class(where: str, settings: Mapping[str, Any], key: str, base: type) -> None:
    """Refuse a class that is no `base`, such as a model, which would read pickles; and one of the folder's own."""
    import transformers
    from transformers.utils.import_utils import DummyObject

    name = settings.get(key)
    if name is None:
        return
    kind = getattr(transformers, str(name), None) or getattr(transformers, str(name).removesuffix("Fast"), None)
    if kind is None and "auto_map" in settings:
        raise ConfigError(f"{where}: auto_map: {name} is custom code, {_NEVER_RUN}; take one that transformers has")
    # A DummyObject stands for a class whose library is missing, and says so once it is used.
    good = kind is None or isinstance(kind, DummyObject) or (isinstance(kind, type) and issubclass(kind, base))
    if not good:
        raise ConfigError(f"{where}: {key}: {name} is no {base.__name__}")


_OF_A_MODEL: dict[str, Check] = {
    "config.json": _model_settings,
    "adapter_config.json": _no_adapter,
    _INDEX: _weights_index,
}
_OF_A_PROCESSOR: dict[str, dict[str, Check]] = {
    "tokenizer": dict.fromkeys(("config.json", "tokenizer_config.json"), _tokenizer_class),
    "image_processor": dict.fromkeys(
        ("config.json", "preprocessor_config.json", "processor_config.json"), _image_class
    ),
}
