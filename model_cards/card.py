"""A model card: the metadata the Hub reads and the page people read, both made from the record of a run alone."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from model_cards.curve import draw
from model_cards.markdown import text
from model_cards.metadata import head, title
from model_cards.sections import CURVE_FILE, SECTIONS
from trainworks.record import RunRecord, replace_file
from trainworks.redaction import redacted

__all__ = ["Card", "build"]


@dataclass(frozen=True)
class Card:
    """A README.md as a value: `metadata` is its YAML head, `body` its markdown; `str` gives the whole file."""

    metadata: dict[str, Any]
    body: str
    record: RunRecord = field(repr=False)

    def __str__(self) -> str:
        front = yaml.safe_dump(self.metadata, sort_keys=False, allow_unicode=True, width=10_000)
        return f"---\n{front}---\n\n{self.body}"

    def _repr_markdown_(self) -> str:
        return self.body if not self.shows_curve else self.body.replace(f"({CURVE_FILE})", f"({self._curve_address()})")

    @property
    def shows_curve(self) -> bool:
        """Whether the page holds the picture of the loss, so that `curve.png` has to lie beside it."""
        return f"]({CURVE_FILE})" in self.body

    def save(self, folder: str | Path) -> Path:
        """Write README.md, and curve.png when the page shows it, into `folder`; return the README's path."""
        path = Path(folder) / "README.md"
        replace_file(path, str(self).encode())
        if self.shows_curve:
            replace_file(path.with_name(CURVE_FILE), self._curve())
        return path

    def _curve_address(self) -> str:
        """Return the picture itself as an address, for a notebook has no file beside it."""
        from base64 import b64encode

        return "data:image/png;base64," + b64encode(self._curve()).decode()

    def _curve(self) -> bytes:
        from io import BytesIO

        picture = BytesIO()
        draw(self.record, picture)
        return picture.getvalue()


def build(record: RunRecord) -> Card:
    """Make the card of a run, without secrets; a section that would have nothing to say is left out."""
    record = RunRecord.model_validate(redacted(json.loads(record.model_dump_json())))
    sections = [section(record) for section in SECTIONS]
    body = "\n\n".join(section for section in [f"# {text(title(record))}", *sections] if section)
    return Card(head(record), body + "\n", record)
