"""Personal data in texts, counted by kind: what a pattern finds, so neither all of it nor nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["KINDS", "count_personal_data"]


def _is_card(digits: str) -> bool:
    """Tell whether the last digit is the check digit of the others (Luhn 1960)."""
    numbers = [int(digit) for digit in digits if digit.isdecimal()]
    doubled = [sum(divmod(2 * number, 10)) for number in numbers[-2::-2]]
    return 13 <= len(numbers) <= 19 and (sum(doubled) + sum(numbers[::-2])) % 10 == 0


def _is_iban(text: str) -> bool:
    """Tell whether the two check digits fit the rest (ISO 13616)."""
    letters = text.replace(" ", "")
    moved = letters[4:] + letters[:4]
    return int("".join(str(int(letter, 36)) for letter in moved)) % 97 == 1


def _is_phone(text: str) -> bool:
    return 9 <= sum(map(str.isdecimal, text)) <= 15


def _is_address(text: str) -> bool:
    return all(int(part) < 256 for part in text.split("."))


def _always(text: str) -> bool:
    return True


_PATTERNS: dict[str, tuple[str, re.Pattern[str], Callable[[str], bool]]] = {
    "email address": ("@", re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{2,63})+"), _always),
    "telephone number": (
        "0123456789",
        re.compile(r"(?<![\w+.-])(?:\+\d{1,3}[ .-]?)?(?:\(\d{2,4}\)|\d{2,4})(?:[ .-]\d{2,4}){2,4}(?![\w-])", re.ASCII),
        _is_phone,
    ),
    "payment card": (
        "0123456789",
        re.compile(r"(?<![\w.-])[3-6]\d{3}(?:[ -]?\d{4}){2}[ -]?\d{1,7}(?![\w-])", re.ASCII),
        _is_card,
    ),
    "bank account (IBAN)": (
        "0123456789",
        re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)", re.ASCII),
        _is_iban,
    ),
    "IP address": (".", re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.])", re.ASCII), _is_address),
}
"""Each kind's needed characters (one of them, so that most texts are passed over quickly), pattern and check."""

KINDS = tuple(_PATTERNS)


def count_personal_data(texts: Sequence[str]) -> NDArray[np.int64]:
    """Return how often each of `KINDS` is found in each text, as [texts, kinds]; a place may count as two kinds."""
    counts = np.zeros((len(texts), len(KINDS)), np.int64)
    for place, (needed, pattern, check) in enumerate(_PATTERNS.values()):
        for row, text in enumerate(texts):
            if any(character in text for character in needed):
                counts[row, place] = sum(map(check, pattern.findall(text)))
    return counts
