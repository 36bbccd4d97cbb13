"""YAML and key=value overrides to frozen models, or one ConfigError that lists every problem."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from trainworks.config_problems import validate
from trainworks.redaction import Keys, dotted, shown
from trainworks.settings import Settings
from trainworks.yaml_document import Document, read_text, to_yaml

__all__ = ["Settings", "differences", "dump", "json_schema", "load", "parse", "resolved"]

M = TypeVar("M", bound=Settings)


def load(path: str | Path, overrides: Sequence[str] = (), *, model: type[M]) -> M:
    """Read a YAML file and `dotted.key=value` overrides as a `model`; ConfigError lists every problem at once."""
    return parse(read_text(Path(path)), name=str(path), overrides=overrides, model=model)


def parse(text: str, *, name: str, overrides: Sequence[str] = (), model: type[M]) -> M:
    """Do what `load` does with text already in memory; problems say `name:line`.

    Booleans are YAML 1.2's (`no` is text), `3e-4` is a number, keys are text, and `${...}` stays as it is.
    An access token is refused, since a configuration is written to the run's record.
    """
    document = Document()
    document.read(text, name)
    for number, override in enumerate(overrides):
        document.override(override, number)
    return validate(document, model)


def resolved(config: Settings) -> dict[str, Any]:
    """Return every key of `config`, defaults included, as plain JSON values."""
    return config.model_dump(mode="json")


def dump(config: Settings) -> str:
    """Write every key of `config` as YAML, in the order declared; parsing it gives an equal config."""
    return to_yaml(resolved(config))


def json_schema(model: type[Settings]) -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) with which an editor completes a run file's keys and shows their docs."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **model.model_json_schema()}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """List the keys whose resolved values differ, as `optim.lr: 0.1 -> 0.2`; a list counts as one value.

    >>> differences({"optim": {"lr": 0.1}}, {"optim": {"lr": 0.2}, "seed": 0})
    ['optim.lr: 0.1 -> 0.2', 'seed: absent -> 0']
    """
    before, after = dict(_leaves(old)), dict(_leaves(new))
    absent = object()

    def show(values: Mapping[Keys, Any], keys: Keys) -> str:
        return "absent" if keys not in values else shown(keys, repr(values[keys]))

    return [
        f"{dotted(keys)}: {show(before, keys)} -> {show(after, keys)}"
        for keys in {**before, **after}
        if before.get(keys, absent) != after.get(keys, absent)
    ]


def _leaves(values: Mapping[str, Any], above: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*above, key))
        else:
            yield (*above, key), value
