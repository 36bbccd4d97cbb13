"""What a run would train on, before it does: rows as coloured tokens, and a table of what each source comes to."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from trainworks.data.bad_rows import BadRowsError

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

    from trainworks.data.templates import Agreement
    from trainworks.samples import Source, SourceSamples
    from trainworks.schema import RunConfig
    from trainworks.tasks import Processor, Task

__all__ = ["Piece", "Preview", "Shown", "SplitTable", "visible"]

_BATCH = 1000
_TOKENS = 400
"""Tokens of a row that are shown; of a longer one, as many from both its ends."""
_LEARNED, _GIVEN, _RESET = ("\x1b[1;32m", "\x1b[4;1;32m"), ("\x1b[2m", "\x1b[4;2m"), "\x1b[0m"
"""Every second token is underlined, so that the borders show."""


class Piece(NamedTuple):
    """A token's text; several tokens' where a character takes more than one."""

    text: str
    learned: bool
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Shown:
    """A sample of a row, or of a part of it."""

    title: str
    pieces: tuple[Piece, ...]


@dataclass
class SplitTable:
    """What a source's split comes to, as training sequences."""

    name: str
    rows: int
    samples: int
    dropped: Mapping[str, int]
    """What was cut, split or left out, by reason."""
    agreement: Agreement | None
    """How far the ids are those of `apply_chat_template` at inference; None where no template is used."""
    tokens: int = 0
    learned: int = 0
    longest: int = 0
    stopping: int = 0
    """Samples in which an end token is learned."""
    doubled: int = 0
    """Samples that begin with two beginning-of-text tokens."""

    def count(self, batch: Sequence[tuple[Any, Any]], ends: Sequence[int], bos: int | None) -> None:
        """Add some samples, each as its ids and which of them are learned, both [tokens]."""
        for ids, learned in batch:
            self.tokens += len(ids)
            self.learned += int(learned.sum())
            self.longest = max(self.longest, len(ids))
            self.stopping += bool(np.isin(ids[learned], ends).any())
            self.doubled += bool(len(ids) > 1 and ids[0] == ids[1] == bos)

    def described(self) -> dict[str, str]:
        """Return the table's row, by column."""
        same = self.agreement
        left_out = ", ".join(f"{reason} {n:,}" for reason, n in self.dropped.items()) or "nothing"
        if not self.tokens:
            return {
                "source": self.name,
                "rows": f"{self.rows:,}",
                "samples": f"{self.samples:,}",
                "cut, split or left out": left_out,
            }
        return {
            "source": self.name,
            "rows": f"{self.rows:,}",
            "samples": f"{self.samples:,}",
            "tokens": f"{self.tokens:,}",
            "learned": f"{100 * self.learned / max(self.tokens, 1):.1f}%",
            "longest": f"{self.longest:,}",
            "end learned": _share(self.stopping, self.samples),
            "BOS doubled": _share(self.doubled, self.samples),
            "ids as at inference": "no template" if same is None else _share(same.equal, same.compared, counted=True),
            "prompt as at inference": "no template"
            if same is None
            else _share(same.continued, same.compared, counted=True),
            "cut, split or left out": left_out,
        }


def _share(part: int, whole: int, *, counted: bool = False) -> str:
    """Say how many of a whole; of a sample that was looked at, also of how many."""
    if not counted and part in (0, whole):
        return "yes" if part else "no"
    return f"{part:,} of {whole:,}"


@dataclass(frozen=True)
class Preview:
    """Rows as they are trained on, and a table by source; printed as text, shown by a notebook as HTML."""

    stated: tuple[str, ...]
    """By source, how its rows are read."""
    tables: tuple[SplitTable, ...]
    shown: tuple[Shown, ...]
    grids: Mapping[str, Image] = field(default_factory=dict)
    """By source and split, images as the model sees them, side by side."""

    @classmethod
    def of(cls, config: RunConfig[Any], *, rows: int = 3) -> Preview:
        """Prepare a run's rows as the run would, which keeps them for it, and show the first `rows` of each source.

        No model is loaded. Raises the ToolkitErrors that the run would, such as a DataError for a template that does
        not nest or a row with nothing to learn.
        """
        from pretrain.recipe import processor_of
        from trainworks.samples import equipped, prepare_sources, read_rows

        sources = read_rows(config)
        processor = equipped(sources, processor_of(config, sources))
        parts = prepare_sources(config, sources, processor)
        return cls(
            tuple(f"{source.name}: {stated}" for source in sources if (stated := source.task.stated())),
            tuple(table for part in parts for table in _tables(part, processor)),
            tuple(shown for source in sources for shown in _shown(source, processor, rows)),
            dict(drawn for part in parts for drawn in _drawn(part, processor, rows)),
        )

    def save(self, folder: Path) -> list[Path]:
        """Write the grids of images to a folder, as PNG, and return the files."""
        folder.mkdir(parents=True, exist_ok=True)
        files = []
        for name, image in self.grids.items():
            files.append(folder / f"{re.sub(r'[^0-9A-Za-z]+', '-', name).strip('-')}.png")
            image.save(files[-1])
        return files

    def text(self, *, colour: bool = False) -> str:
        """Return it for a terminal: what is learned in bold green or, without colour, between the marks [[ and ]]."""
        draw = _painted if colour else _marked
        parts = [f"{shown.title}\n{draw(shown)}".rstrip() for shown in self.shown]
        return "\n\n".join([*self.stated, *parts, _columns([table.described() for table in self.tables])])

    def __str__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        rows = [table.described() for table in self.tables]
        left = 'style="text-align: left; vertical-align: top"'
        table = "".join(
            f"<tr><th {left}>{escape(name)}</th>"
            + "".join(f"<td {left}>{escape(row[name])}</td>" for row in rows)
            + "</tr>"
            for name in (rows[0] if rows else ())
        )
        stated = "".join(f"<p>{escape(line)}</p>" for line in self.stated)
        shown = "".join(f"<p><b>{escape(part.title)}</b></p>{_html(part)}" for part in self.shown)
        return f"<div>{stated}{shown}<table>{table}</table></div>"


# What is shown


def _tables(part: SourceSamples, processor: Processor) -> Iterator[SplitTable]:
    task, rows = part.source.task, part.source.rows
    ends, bos = task.ends(processor), getattr(processor, "bos_token_id", None)
    for split, prepared in part.splits.items():
        same = task.agreement(rows.splits[split], processor)
        name = f"{part.source.name} ({split})"
        table = SplitTable(name, part.num_rows(split), len(prepared.samples), part.left_out(split), same)
        for batch in _sequences(prepared.samples, task):
            table.count(batch, ends, bos)
        yield table


def _sequences(samples: Dataset, task: Task) -> Iterator[list[tuple[Any, Any]]]:
    if "input_ids" not in samples.column_names:
        return  # images, which are drawn
    for batch in samples.with_format("numpy").iter(_BATCH):
        columns = [name for name in ("input_ids", "trained") if name in batch]
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*map(batch.get, columns), strict=True)]
        yield [(row["input_ids"], task.learned(row)) for row in rows]


def _drawn(part: SourceSamples, processor: Processor, number: int) -> Iterator[tuple[str, Image]]:
    """Draw some images of each split, those of training as they are varied."""
    from trainworks.tasks.drawing import grid

    for split, prepared in part.splits.items():
        task = part.source.task
        images = task.pictures(prepared.samples, processor, number=number, train=split == "train") if number else []
        if images:
            yield f"{part.source.name} {split}", grid(images)


def _shown(source: Source, processor: Processor, rows: int) -> Iterator[Shown]:
    """Prepare some rows by themselves, so that it is known which row a sample is from."""
    origin = source.rows.origins["train"]
    for number in range(min(rows, len(source.rows.train))):
        name = f"{source.name}, row {origin.at(number).row}"
        try:
            prepared = source.task.prepare(source.rows.train.select([number]), processor, first=number)
        except BadRowsError as error:  # where these end a run, it ended before
            yield Shown(f"{name}: left out ({error.problems[0].reason})", ())
            continue
        samples = [sample for batch in _sequences(prepared.samples, source.task) for sample in batch]
        left_out = ", ".join(f"{reason} {count:,}" for reason, count in prepared.dropped.items())
        if source.task.reads != "tokenizer":
            return
        if not samples:
            yield Shown(f"{name}: left out ({left_out})", ())
        for part, (ids, learned) in enumerate(samples, 1):
            which = f", part {part} of {len(samples)}" if len(samples) > 1 else ""
            facts = f"{len(ids):,} tokens, {int(learned.sum()):,} learned{f' ({left_out})' if left_out else ''}"
            yield Shown(f"{name}{which}: {facts}", tuple(_pieces(ids, learned, processor)))


def _pieces(ids: Any, learned: Any, processor: Processor) -> Iterator[Piece]:
    """Yield the tokens' texts; of a long row, those at both its ends."""
    half = _TOKENS // 2
    if len(ids) <= _TOKENS:
        yield from _decoded(ids, learned, processor)
        return
    yield from _decoded(ids[:half], learned[:half], processor)
    yield Piece(f"\n... {len(ids) - _TOKENS:,} tokens ...\n", False, ())
    yield from _decoded(ids[-half:], learned[-half:], processor)


def _decoded(ids: Any, learned: Any, processor: Processor) -> Iterator[Piece]:
    """Yield each token's text as it stands behind the token before it, which decides about blanks."""
    before: list[int] = []
    held: list[int] = []
    for place, token in enumerate(ids.tolist()):
        held.append(token)
        text = processor.decode(before + held)[len(processor.decode(before)) :]
        if text.endswith("\ufffd") and len(held) < 4 and place + 1 < len(ids):  # the rest of a character follows
            continue
        yield Piece(text, bool(learned[place]), tuple(held))
        before, held = held, []


# How it is shown


def visible(text: str) -> str:
    """Return a text whose control signs, which could steer a terminal, are written out."""
    return "".join(
        sign if sign.isprintable() or sign == "\n" else sign.encode("unicode_escape").decode() for sign in text
    )


def _painted(shown: Shown) -> str:
    lines = []
    for number, piece in enumerate(shown.pieces):
        style = (_LEARNED if piece.learned else _GIVEN)[number % 2]
        # A colour that runs over a line's end would paint the rest of it.
        parts = visible(piece.text).replace("\n", "↵\n").split("\n")
        lines.append("\n".join(f"{style}{part}{_RESET}" if part else "" for part in parts))
    return "".join(lines)


def _marked(shown: Shown) -> str:
    stretches = groupby(shown.pieces, key=lambda piece: piece.learned)
    texts = ((learned, visible("".join(piece.text for piece in pieces))) for learned, pieces in stretches)
    return "".join(f"[[{text}]]" if learned else text for learned, text in texts)


def _html(shown: Shown) -> str:
    """Return the tokens as spans, each with its number as a tooltip; the colours suit light and dark pages."""
    tint = {
        True: ("rgba(0,160,60,.45)", "rgba(0,160,60,.28)"),
        False: ("rgba(128,128,128,.22)", "rgba(128,128,128,.1)"),
    }
    spans = "".join(
        f'<span title="{" ".join(map(str, piece.ids))}" style="background:{tint[piece.learned][number % 2]}">'
        f"{escape(visible(piece.text)).replace(chr(10), '↵' + chr(10))}</span>"
        for number, piece in enumerate(shown.pieces)
    )
    return f'<pre style="white-space: pre-wrap; line-height: 1.5">{spans}</pre>'


def _columns(rows: Sequence[Mapping[str, str]]) -> str:
    """Return the table on its side, a column for each split, so that it fits a terminal."""
    names = list(rows[0]) if rows else []
    widths = [max(map(len, row.values())) for row in rows]
    edge = max(map(len, names), default=0)
    return "\n".join(
        f"{name:<{edge}}  "
        + "  ".join(f"{row[name]:<{width}}" for row, width in zip(rows, widths, strict=True)).rstrip()
        for name in names
    )
