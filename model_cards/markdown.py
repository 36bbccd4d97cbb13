"""Values of a record as markdown that shows them and does nothing else: no HTML, no cells, no headings of their own."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["block", "count", "hide_folders", "link", "number", "plain", "table", "text"]

_SPECIAL = re.compile(r"([\\`*\[\]|~$#]|(?<!\w)_|_(?!\w))")
_LINE_START = re.compile(r"^(?:(?=[-+=])|(\d+)(?=[.)](?:\s|$)))")
# A path from the root or the home folder, in either system's spelling; `//` of an address is not one.
_ABSOLUTE = re.compile(r"(?<![\w.:/\\~-])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\'\"`=,;<>|]+[/\\])+(?=[^\s/\\'\"`=,;<>|])")
_BIDIRECTIONAL = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def hide_folders(value: str) -> str:
    """Shorten every absolute path in `value` to its last part.

    >>> hide_folders("python -m finetune /home/me/runs/a.yaml data.source=~/rows.jsonl")
    'python -m finetune a.yaml data.source=rows.jsonl'
    """
    return re.sub(r"(?<![\w/])~/(?=[^/\s]+(?:\s|$))", "", _ABSOLUTE.sub("", value.replace("file://", "")))


def _printable(value: str) -> str:
    def keep(letter: str) -> bool:
        return letter in "\n\t" or not (unicodedata.category(letter) in {"Cc", "Cs"} or letter in _BIDIRECTIONAL)

    return "".join(letter for letter in value if keep(letter))


def plain(value: object) -> str:
    """Return `value` on one line, without control characters and without anybody's folders."""
    return hide_folders(" ".join(_printable(str(value)).split()))


def text(value: object) -> str:
    """Return `value` as one line of markdown that reads as itself, in a paragraph and in a table cell.

    >>> text("<b>|`x`")
    '&lt;b&gt;\\\\|\\\\`x\\\\`'
    """
    return _LINE_START.sub(r"\1\\", _SPECIAL.sub(r"\\\1", escape(plain(value), quote=False)))


def block(value: str, limit: int = 1200) -> str:
    """Return text of several lines, cut after `limit` characters, as preformatted HTML in which all of it is inert."""
    shown = _printable(value).strip("\n")
    cut = f"{shown[:limit]}\n[... {len(shown) - limit:,} more characters]" if len(shown) > limit else shown
    return f"<pre>{escape(cut, quote=False)}</pre>"


def link(label: object, address: str) -> str:
    """Return a link; `address` must come from us or have been matched against a pattern of safe letters."""
    return f"[{text(label)}]({address})"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a markdown table of cells that are escaped already; a column that is empty in every row is left out."""
    body = [list(row) for row in rows]
    kept = [column for column in range(len(head)) if any(row[column] for row in body)]
    lines = [[head[column] for column in kept], ["---"] * len(kept)]
    lines += [[row[column] for column in kept] for row in body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float) -> str:
    """Return four significant digits, without an exponent where a person would not use one."""
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e15 else f"{value:.4g}"


def count(value: int, noun: str) -> str:
    """Return `1 row`, `1,200 rows`."""
    return f"{value:,} {noun}{'' if value == 1 else 's'}"
