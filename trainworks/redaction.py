"""No secret is shown or written: how a key and a value stand in a message, and what all files and lines go through."""

from __future__ import annotations

import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import quote

from trainworks.errors import Problem

__all__ = [
    "REDACTED",
    "Keys",
    "dotted",
    "is_secret",
    "is_token",
    "redacted",
    "redacted_tracebacks",
    "safe_problem",
    "safe_words",
    "shown",
    "without_tokens",
]

FOUND_WIDTH = 80
MESSAGE_WIDTH = 600
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
# What goes to files and logs also holds people's own words, so that less is taken for a secret there.
_IN_TEXT = (
    (
        re.compile(r"(?<![A-Za-z])(?:hf_|sk-|gh[a-z]_|github_pat_)[\w\-]*[A-Za-z0-9]{16}[\w\-]*|AKIA[A-Z0-9]{16}"),
        REDACTED,
    ),
    (re.compile(r"://[^/\s\"'<>]+@"), f"://{REDACTED}@"),
    (re.compile(r"([?&][\w.-]*(?:token|secret|passw\w*|key|signature)=)[^&\s\"'<>]+", re.IGNORECASE), rf"\1{REDACTED}"),
    (re.compile(r"\b(bearer|basic) +(?=\S*\d)[\w.~+/=-]{16,}", re.IGNORECASE), rf"\1 {REDACTED}"),
)
_SECRET_VARIABLE = re.compile(
    r"TOKEN(?!S|IZ)|SECRET|PASSW|CREDENTIAL|(?:^|_)(?:KEY|PAT)$|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY", re.IGNORECASE
)
_OF_A_PLACE = re.compile(r"_(?:PATH|FILE|DIR|DIRECTORY)$", re.IGNORECASE)
_SHORTEST, _FEWEST = 8, 4
"""Characters, and different ones, from which on an environment variable's value is looked for: less is part of many
texts."""

Value = TypeVar("Value")


def redacted(value: Value) -> Value:
    """Return a text, or plain JSON values, without secrets; everything that is written or shown goes through this.

    A secret is what the environment holds under a name that tells of one (HF_TOKEN, WANDB_API_KEY, ...), wherever it
    stands and with URL escapes too, and what looks like a token, an address's password or an HTTP authorisation.
    """
    secrets = _secrets()

    def safe(part: Any) -> Any:
        if isinstance(part, str):
            return _without(part, secrets)
        if isinstance(part, dict):
            return {safe(key): safe(inner) for key, inner in part.items()}
        return [safe(inner) for inner in part] if isinstance(part, list | tuple) else part

    safe_value: Value = safe(value)
    return safe_value


def _secrets() -> list[str]:
    """Return the environment's secrets, the longest first, since one may hold another."""
    named = [
        value.strip()
        for name, value in os.environ.items()
        if _SECRET_VARIABLE.search(name) and not _OF_A_PLACE.search(name)
    ]
    kept = {value for value in named if len(value) >= _SHORTEST and len(set(value)) >= _FEWEST}
    return sorted(kept | {quote(value, safe="") for value in kept}, key=len, reverse=True)


def _without(text: str, secrets: Sequence[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, REDACTED)
    for pattern, instead in _IN_TEXT:
        text = pattern.sub(instead, text)
    return text


@contextmanager
def redacted_tracebacks() -> Iterator[None]:
    """Have Python show errors that nobody catches, in any thread, without secrets; still so once one has left the
    block, and as before when none did."""
    before = sys.excepthook, threading.excepthook
    sys.excepthook = _show
    threading.excepthook = _show_thread
    yield
    sys.excepthook, threading.excepthook = before


def _show(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    sys.stderr.write(redacted("".join(traceback.format_exception(kind, error, trace))))


def _show_thread(ended: threading.ExceptHookArgs) -> None:
    if ended.exc_type is not SystemExit:
        sys.stderr.write(f"Exception in thread {ended.thread.name if ended.thread else '?'}:\n")
        _show(ended.exc_type, ended.exc_value, ended.exc_traceback)


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
    text = text[: 10 * FOUND_WIDTH]  # all that can come to be shown; the patterns are slow on what is meant to be slow
    text = REDACTED if text and (is_secret(keys) or _SECRET_PAIR.search(text)) else without_tokens(text)
    return _short(text, FOUND_WIDTH)


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _printable(text: str) -> str:
    """Return a text in one line, with signs that would write elsewhere on a terminal, or nowhere, as escapes."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def dotted(keys: Keys) -> str:
    """Write keys as people do.

    >>> dotted(("data", "train", 0))
    'data.train[0]'
    """
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).removeprefix(".")


def safe_problem(where: str, keys: Keys, message: str) -> Problem:
    """Make a Problem in which no part quotes a secret, or is long, or takes more than a line."""
    parts = (where, shown((), dotted(keys)), _short(message, MESSAGE_WIDTH))
    return Problem(*(_printable(without_tokens(text)) for text in parts))
