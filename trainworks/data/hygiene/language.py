"""The language of a text, by py3langid: a naive Bayes model of 140 languages that its package carries."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from typing import Any

__all__ = ["known_languages", "languages"]

_CHARACTERS = 2_000
"""The beginning of a text that is looked at; more changes little and takes long."""


@cache
def _model() -> Any:
    # py3langid 0.4 has a function of this name beside the module, which hides it.
    module = importlib.import_module("py3langid.langid")
    return module.LanguageIdentifier.from_model_file(module.MODEL_FILE, norm_probs=True)


def known_languages() -> tuple[str, ...]:
    """Return the codes of the languages that can be told, in alphabetical order; `zxx` is text in none."""
    return tuple(sorted(_model().labels))


def languages(texts: Sequence[str]) -> list[tuple[str, float]]:
    """Return for each text its most likely language (ISO 639) and how likely, from 0 to 1."""
    model = _model()
    return [model.classify(text[:_CHARACTERS]) for text in texts]
