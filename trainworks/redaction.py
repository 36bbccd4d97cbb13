"""How a key and a value are shown in a message: dotted, short, and without secrets."""

from __future__ import annotations

import re
from collections.abc import Sequence

from trainworks.errors import Problem

__all__ = [
    "REDACTED",
    "Keys",
    "dotted",
    "is_secret",
    "is_token",
    "safe_problem",
    "safe_words",
    "shown",
    "without_tokens",
]

FOUND_WIDTH = 80
REDACTED = "<redacted>"

Keys = tuple[str | int, ...]

_TOKEN = re.compile(r"(?<![A-Za-z])(?:hf_|sk-|gh[a-z]_|github_pat_|AKIA)[A-Za-z0-9_\-]{4,}")
_SECRET_KEY = re.compile(r"token$|secret|passw|credential|(?:api|access)_?key", re.IGNORECASE)
_ADDRESS = re.compile(r"://[^/@\s]+@")
_SECRET_PAIR = re.compile(r"(?:token|secret|passw\w*|credentials?|api_?key)[\"']?\s*:", re.IGNORECASE)
# Stricter than what is redacted: a name such as hf_models or sk-learn must not be refused.
_WHOLE_TOKEN = re.compile(
    r"(?<![A-Za-z])(?:(?:hf_|sk-|gh[a-z]_|github_pat_)[A-Za-z0-9_\-]{0,99}[A-Za-z0-9]{16}|AKIA[A-Z0-9]{16})"
)


def is_token(text: str) -> bool:
    """Say whether a text holds what looks like an access token of the Hub or another service."""
    return _WHOLE_TOKEN.search(text) is not None


def without_tokens(text: str) -> str:
    """Return a text with what looks like an access token taken out."""
    return _TOKEN.sub(REDACTED, text)


def safe_words(words: Sequence[str]) -> list[str]:
    """Return a command line's words without secrets: tokens, passwords of addresses, and the values of options and
    variables whose names tell of one.

    >>> safe_words(["--aws_secret_key", "x", "A_TOKEN=x", "etcd://me:x@host", "budget.tokens=9"])
    ['--aws_secret_key', '<redacted>', 'A_TOKEN=<redacted>', 'etcd://<redacted>@host', 'budget.tokens=9']
    """
    safe, hidden = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        secret = _SECRET_KEY.search(name) is not None
        told = f"{name}={REDACTED}" if secret and equals else _ADDRESS.sub(f"://{REDACTED}@", without_tokens(word))
        safe.append(REDACTED if hidden else told)
        hidden = secret and not equals and word.startswith("-")
    return safe


def is_secret(keys: Keys) -> bool:
    """Say whether a key on the way to a value names a secret, such as `api_token` or `password`."""
    return any(_SECRET_KEY.search(str(key)) for key in keys)


def shown(keys: Keys, text: str) -> str:
    """Return the `text` of the value at `keys` for a message: secrets redacted, then shortened."""
    text = REDACTED if text and (is_secret(keys) or _SECRET_PAIR.search(text)) else without_tokens(text)
    return text if len(text) <= FOUND_WIDTH else text[: FOUND_WIDTH - 1] + "…"


def dotted(keys: Keys) -> str:
    """Write keys as people do.

    >>> dotted(("data", "train", 0))
    'data.train[0]'
    """
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).removeprefix(".")


def safe_problem(where: str, keys: Keys, message: str) -> Problem:
    """Make a Problem in which no part quotes a secret."""
    return Problem(*(without_tokens(text) for text in (where, shown((), dotted(keys)), message)))
