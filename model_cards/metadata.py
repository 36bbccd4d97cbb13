"""The YAML head of a card: what the Hub sorts, links and shows in its margins. No local path ever stands in it."""

from __future__ import annotations

import math
import re
from typing import Any

from model_cards.markdown import plain
from trainworks.record import DataFacts, EvalReport, RunRecord

__all__ = [
    "base_on_hub",
    "data_name",
    "dataset_on_hub",
    "head",
    "is_adapter",
    "last_part",
    "metric_name",
    "repo",
    "title",
]

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{7,64}")


def _on_hub(name: str | None, revision: str | None) -> str | None:
    """Return `name` where a commit proves that it is the Hub's; `runs/base` alone could be a folder just as well."""
    known = name and revision and _HUB_NAME.fullmatch(name) and _COMMIT.fullmatch(revision)
    return name if known else None


def base_on_hub(record: RunRecord) -> str | None:
    """Return the Hub name of the weights the run began from, if they have one."""
    return _on_hub(record.model.name, record.model.revision)


def dataset_on_hub(facts: DataFacts) -> str | None:
    """Return the Hub name of the data, if it has one."""
    return _on_hub(facts.source, facts.revision)


def data_name(record: RunRecord) -> str:
    """Return what to call the data: its Hub name, or the last part of its path."""
    return dataset_on_hub(record.data) or last_part(record.data.source)


def last_part(path: str) -> str:
    """Return a path's last part, in either system's spelling."""
    return plain(re.split(r"[/\\]", path.rstrip("/\\"))[-1]) or "files"


def is_adapter(record: RunRecord) -> bool:
    """Say whether what is published changes a base model rather than replaces it."""
    return record.model.tuning not in ("full", "freeze")


def repo(record: RunRecord) -> str | None:
    """Return the Hub name the run was configured to be published under."""
    name = (record.config.get("hub") or {}).get("repo")
    return name if isinstance(name, str) and _HUB_NAME.fullmatch(name) else None


def metric_name(name: str) -> str:
    """Return a metric's name; an `evaluate` module given by path loses its folders."""
    return plain(last_part(name))


def title(record: RunRecord) -> str:
    """Return the model's name: its repository's, or what it is made of."""
    published = repo(record)
    if published:
        return published.split("/")[-1]
    family = re.sub(r"(For[A-Z]\w*|Model)$", "", record.model.architecture) or record.model.architecture
    base = base_on_hub(record)
    what = base.split("/")[-1] if base else f"{plain(family)} ({_size(record.model.num_parameters)} parameters)"
    how = "pretrained" if record.kind == "pretrain" else "fine-tuned"
    return f"{what} {how} on {last_part(record.data.source)}"


def _size(parameters: int) -> str:
    for unit, scale in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if parameters >= scale:
            return f"{parameters / scale:.3g}{unit}"
    return str(parameters)


def head(record: RunRecord) -> dict[str, Any]:
    """Return the metadata of the run's card, in the Hub's vocabulary; what is not known is not there."""
    hub = record.config.get("hub") or {}
    base = base_on_hub(record)
    known = [dataset_on_hub(facts) for facts in (record.data, *record.data.parts.values())]
    fields = {
        "library_name": "peft" if is_adapter(record) else "transformers",
        "pipeline_tag": plain(record.pipeline_tag),
        "base_model": base,
        "base_model_relation": ("adapter" if is_adapter(record) else "finetune") if base else None,
        "datasets": list(dict.fromkeys(name for name in known if name)),
        "license": plain(hub["license"]) if hub.get("license") else None,
        "language": [plain(code) for code in hub.get("language") or ()],
        "tags": _tags(record),
        "model-index": _index(record),
    }
    return {name: value for name, value in fields.items() if value}


def _tags(record: RunRecord) -> list[str]:
    tags = ["trainworks", plain(record.task), plain(record.model.tuning) if is_adapter(record) else ""]
    return list(dict.fromkeys(tag for tag in tags if tag))


def _index(record: RunRecord) -> list[dict[str, Any]] | None:
    final = record.final
    metrics = _metrics(final) if final else []
    if final is None or not metrics:
        return None
    result = {
        "task": {"type": plain(record.pipeline_tag)},
        "dataset": _dataset(record, final.split),
        "metrics": metrics,
    }
    return [{"name": title(record), "results": [result]}]


def _dataset(record: RunRecord, split: str) -> dict[str, str]:
    on_hub = dataset_on_hub(record.data)
    named = {"type": on_hub or last_part(record.data.source), "name": data_name(record), "split": plain(split)}
    if record.data.subset:
        named["config"] = plain(record.data.subset)
    if on_hub and record.data.revision:
        named["revision"] = record.data.revision
    return named


def _metrics(report: EvalReport) -> list[dict[str, Any]]:
    return [
        {"type": metric_name(name), "name": metric_name(name), "value": estimate.value}
        for name, estimate in report.metrics.items()
        if math.isfinite(estimate.value)
    ]
