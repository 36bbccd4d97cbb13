"""A model card: the metadata the Hub reads and the page people read, both made from the record of a run alone."""

from __future__ import annotations

import json
from base64 import b64encode
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from model_cards.curve import draw
from model_cards.markdown import text
from model_cards.metadata import head, title
from model_cards.sections import CURVE_FILE, SECTIONS, picture_file
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
        page = self.body
        for name, content in self._pictures().items():
            page = page.replace(f"]({name})", f"]({_address(name, content)})")
        return page

    @property
    def shows_curve(self) -> bool:
        """Whether the page holds the picture of the loss, so that `curve.png` has to lie beside it."""
        return f"]({CURVE_FILE})" in self.body

    def save(self, folder: str | Path) -> Path:
        """Write README.md, and the pictures that the page shows, into `folder`; return the README's path."""
        path = Path(folder) / "README.md"
        replace_file(path, str(self).encode())
        for name, content in self._pictures().items():
            replace_file(path.with_name(name), content)
        return path

    def _pictures(self) -> dict[str, bytes]:
        """Return the pictures that the page shows, by the names of their files."""
        samples = self.record.final.samples if self.record.final else ()
        examples = {picture_file(index): sample.jpeg() for index, sample in enumerate(samples, start=1)}
        drawn = {name: picture for name, picture in examples.items() if picture}
        return drawn | ({CURVE_FILE: self._curve()} if self.shows_curve else {})

    def _curve(self) -> bytes:
        from io import BytesIO

        picture = BytesIO()
        draw(self.record, picture)
        return picture.getvalue()


def _address(name: str, content: bytes) -> str:
    """Return a picture itself as an address, for a notebook has no file beside it."""
    kind = {".png": "png", ".jpg": "jpeg"}[Path(name).suffix]
    return f"data:image/{kind};base64,{b64encode(content).decode()}"


def build(record: RunRecord) -> Card:
    """Make the card of a run, without secrets; a section that would have nothing to say is left out."""
    record = RunRecord.model_validate(redacted(json.loads(record.model_dump_json())))
    sections = [section(record) for section in SECTIONS]
    body = "\n\n".join(section for section in [f"# {text(title(record))}", *sections] if section)
    return Card(head(record), body + "\n", record)
