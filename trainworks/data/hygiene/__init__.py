"""Cleaning of training rows: length, language, duplicates, contamination, personal data; each usable by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainworks.lazy import exports

if TYPE_CHECKING:
    from trainworks.data.hygiene.contamination import contaminated, index_items
    from trainworks.data.hygiene.exact import exact_duplicates
    from trainworks.data.hygiene.language import languages
    from trainworks.data.hygiene.near import near_duplicates
    from trainworks.data.hygiene.pii import count_personal_data

__all__ = [
    "contaminated",
    "count_personal_data",
    "exact_duplicates",
    "index_items",
    "languages",
    "near_duplicates",
]

__getattr__ = exports(
    __name__,
    contaminated="trainworks.data.hygiene.contamination",
    count_personal_data="trainworks.data.hygiene.pii",
    exact_duplicates="trainworks.data.hygiene.exact",
    index_items="trainworks.data.hygiene.contamination",
    languages="trainworks.data.hygiene.language",
    near_duplicates="trainworks.data.hygiene.near",
)
