"""What would mislead a card's reader, or be refused by the Hub; publishing stops at any of it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from model_cards.card import Card
from model_cards.markdown import hide_folders
from model_cards.vocabulary import LICENSES, PIPELINE_TAGS
from trainworks.errors import nearest
from trainworks.record import Estimate

__all__ = ["TOKEN", "lint"]

TOKEN = re.compile(r"\b(?:hf_|api_org_)[A-Za-z0-9]{16,}")
_PLACEHOLDER = re.compile(
    r"\[?more information needed\]?|\bTODO\b|\bFIXME\b|\blorem ipsum\b|\bTBD\b|\{\{.*?\}\}", re.IGNORECASE
)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]{2,4})?|code|multilingual")
_KINDS = {True: "an adapter", False: "a whole model"}
_PREFORMATTED = re.compile(r"<pre>.*?</pre>|^```.*?^```", re.DOTALL | re.MULTILINE)
# Metrics that cannot be negative, whatever was measured; a score such as a correlation can.
_NOT_NEGATIVE = (
    "loss",
    "perplexity",
    "accuracy",
    "f1",
    "macro_f1",
    "precision",
    "recall",
    "bleu",
    "rouge",
    "wer",
    "cer",
    "token_accuracy",
)


def lint(card: Card, folder: str | Path | None = None) -> list[str]:
    """Return what is wrong with a card, a sentence each; with a `folder`, links to files are looked up in it too."""
    found = [finding for check in _CHECKS for finding in check(card)]
    return found + (list(_files(card, Path(folder))) if folder is not None else [])


def _identifiers(card: Card) -> Iterator[str]:
    tag, licence = card.metadata.get("pipeline_tag"), card.metadata.get("license")
    if tag not in PIPELINE_TAGS:
        yield f"pipeline_tag {tag!r} is not one of the Hub's tasks{nearest(str(tag), PIPELINE_TAGS)}"
    if licence is not None and licence not in LICENSES:
        yield (
            f"license {licence!r} is not one of the Hub's identifiers{nearest(str(licence).lower(), LICENSES)}; "
            "write hub.license as https://huggingface.co/docs/hub/repositories-licenses spells it, or `other`"
        )
    for language in card.metadata.get("language", ()):
        if not _LANGUAGE.fullmatch(language):
            yield f"language {language!r} is not an ISO 639 code such as `en`"


def _evaluation(card: Card) -> Iterator[str]:
    if card.record.final is None:
        yield "the trained model was never evaluated: name a validation split, or let data.holdout keep some rows back"
    if card.record.status == "running":
        yield "the run is still going: its record says `running`"


def _estimates(card: Card) -> Iterator[str]:
    for report in card.record.reports:
        for name, estimate in report.metrics.items():
            for fault in _faults(name, estimate):
                yield f"{name} of {report.name!r} on {report.split}: {fault}"
    for result in _results(card.metadata):
        if not isinstance(result.get("value"), int | float) or not math.isfinite(result["value"]):
            yield f"model-index: {result.get('name')} is {result.get('value')!r}, and the Hub takes finite numbers only"


def _faults(name: str, estimate: Estimate) -> Iterator[str]:
    if not math.isfinite(estimate.value):
        yield f"{estimate.value} is not a finite number"
    elif estimate.value < 0 and name.rpartition(":")[2] in _NOT_NEGATIVE:
        yield f"{estimate.value:.4g} is negative, which it cannot be"
    elif estimate.low > estimate.value or estimate.high < estimate.value:
        yield f"{estimate} lies outside its own interval"
    if estimate.n <= 0:
        yield f"it was computed over {estimate.n} examples"


def _results(metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
    index = metadata.get("model-index", [])
    return [metric for model in index for result in model["results"] for metric in result["metrics"]]


def _costs(card: Card) -> Iterator[str]:
    cost = card.record.cost
    measured = {
        "seconds": cost.seconds,
        "energy_joules": cost.energy_joules,
        "peak_memory_bytes": cost.peak_memory_bytes,
    }
    for name, value in measured.items():
        if value is not None and not 0 <= value < math.inf:
            yield f"cost.{name} is {value}, which it cannot be"
    if cost.mfu is not None and not 0 <= cost.mfu <= 1:
        yield f"cost.mfu is {cost.mfu}: it is a share of the device's peak, between 0 and 1"


def _words(card: Card) -> Iterator[str]:
    said = _PREFORMATTED.sub("", card.body)  # what a model or a row says is not the card's claim
    for match in dict.fromkeys(found.group() for found in _PLACEHOLDER.finditer(said)):
        yield f"placeholder text: {match!r}"


def _secrets(card: Card) -> Iterator[str]:
    if TOKEN.search(str(card)):
        yield "the card holds a Hub access token: revoke it at https://huggingface.co/settings/tokens and remove it"


def _paths(card: Card) -> Iterator[str]:
    for line in _PREFORMATTED.sub("", str(card)).splitlines():
        if hide_folders(line) != line and "](data:" not in line:
            yield f"a path of this machine stands in the card: {line.strip()[:100]!r}"


def _files(card: Card, folder: Path) -> Iterator[str]:
    for target in dict.fromkeys(_LINK.findall(_PREFORMATTED.sub("", card.body))):
        if "://" not in target and not target.startswith("#") and not (folder / target).is_file():
            yield f"the card links to {target}, which is not in {folder}"
    adapter = (folder / "adapter_config.json").is_file()
    if adapter != (card.metadata.get("library_name") == "peft"):
        yield f"the card describes {_KINDS[not adapter]}, and {folder} holds {_KINDS[adapter]}"
    record = folder / "run.json"
    if record.is_file() and TOKEN.search(record.read_text(encoding="utf-8", errors="replace")):
        yield f"{record} holds a Hub access token: revoke it, then remove it from the file"


_CHECKS: tuple[Callable[[Card], Iterator[str]], ...] = (
    _identifiers,
    _evaluation,
    _estimates,
    _costs,
    _words,
    _secrets,
    _paths,
)
