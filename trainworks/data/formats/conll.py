"""CoNLL files: a word a line, its tag in the last column, a sentence up to the next blank line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from trainworks.data.bad_rows import BadRow, BadRows, excerpt
from trainworks.data.formats.base import Chunk
from trainworks.data.formats.lines import Line, blocks, lines

__all__ = ["conll_rows"]

_BATCH_WORDS = 100_000
_BORDER = "-DOCSTART-"
_TYPES = pa.list_(pa.string())


@dataclass
class _Sentence:
    """A sentence as it is read, and the first thing that is wrong with it."""

    line: int = 0
    words: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    problem: BadRow | None = None

    def add(self, line: Line, cells: list[str], problem: BadRow | None) -> None:
        self.line = self.line or line.number
        self.problem = self.problem or problem
        self.words.append(cells[0])
        self.tags.append(cells[-1])


def conll_rows(path: Path, bad: BadRows) -> Iterator[Chunk]:
    """Yield the sentences of a file as `tokens` and `ner_tags`, the first and the last of its columns.

    Columns are parted by tabs where the file's first word has one, else by white space. A line of white space alone
    ends a sentence; lines that begin with -DOCSTART- part documents, and belong to no sentence.
    """
    held: list[tuple[int, _Sentence]] = []
    size = 0
    for row, sentence in enumerate(_sentences(path)):
        if sentence.problem is not None:
            bad.add(replace(sentence.problem, row=row))
            continue
        held.append((row, sentence))
        size += len(sentence.words)
        if size > _BATCH_WORDS:
            yield _chunk(held)
            held, size = [], 0
    if held:
        yield _chunk(held)


def _sentences(path: Path) -> Iterator[_Sentence]:
    sentence = _Sentence()
    separator, width = None, 0
    for line in (line for block in blocks(path) for line in lines(block, path)):
        text = line.text.rstrip("\r\n")
        if line.problem is None and (not text.strip() or text.startswith(_BORDER)):
            if sentence.words:
                yield sentence
                sentence = _Sentence()
            continue
        if not width and line.problem is None:
            separator = "\t" if "\t" in text else None
            width = len(text.split(separator))
        cells = text.split(separator) or [text]
        sentence.add(line, cells, line.problem or _flaw(cells, width, line, path))
    if sentence.words:
        yield sentence


def _flaw(cells: list[str], width: int, line: Line, path: Path) -> BadRow | None:
    if len(cells) == width > 1 and cells[0] and cells[-1]:
        return None
    detail = f"{len(cells)} cells, but the file's first word has {width}" if len(cells) != width else ""
    mend = "each line holds a word and, last, its tag; a blank line ends the sentence"
    return BadRow("no word and tag", mend, detail, excerpt(line.text), str(path), line.number)


def _chunk(held: list[tuple[int, _Sentence]]) -> Chunk:
    columns = {
        "tokens": pa.array([sentence.words for _, sentence in held], _TYPES),
        "ner_tags": pa.array([sentence.tags for _, sentence in held], _TYPES),
    }
    rows = np.array([row for row, _ in held], np.int64)
    return Chunk(pa.table(columns), rows, np.array([sentence.line for _, sentence in held], np.int64))
