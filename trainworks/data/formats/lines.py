"""Files of text, a few MB at a time: decompressed, cut at line ends, decoded; what cannot be read is found here."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa

from trainworks.data.bad_rows import BadRow, BadRowsError, excerpt

__all__ = ["COMPRESSIONS", "Block", "Line", "blocks", "lines", "open_bytes", "whole_text"]

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
"""The endings that may follow that of a text format."""
LONGEST = 64 * 2**20
"""The longest line, in bytes: some ten thousand pages. A longer one is seldom meant, and is not held in memory."""
BLOCK = 4 * 2**20
"""Bytes that are read at once."""
Text = TypeVar("Text", str, bytes)
_WIDE = 0.4
"""In UTF-16 every second byte of most texts is NUL; in UTF-8 none is."""
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


class Block(NamedTuple):
    """Whole lines of a file, or one that is longer than any may be."""

    content: bytes
    """The lines, each with its end; of one that is too long, its beginning."""
    line: int
    """The number of the first line, from 1."""
    offset: int
    """Where in the (decompressed) file the block begins, in bytes."""
    too_long: int = 0
    """Bytes of the one line that is too long; 0 where the lines are whole."""


class Line(NamedTuple):
    """One line with its end, and what makes it unusable, if anything does."""

    number: int
    text: str
    problem: BadRow | None = None


def open_bytes(path: Path) -> Any:
    """Open a file for reading its bytes, decompressed where its ending says that it is compressed."""
    compression = COMPRESSIONS.get(path.suffix.lower())
    return path.open("rb") if compression is None else pa.input_stream(str(path), compression=compression)


def blocks(path: Path) -> Iterator[Block]:
    """Yield a file some MB at a time, in whole lines and without its byte order mark.

    BadRowsError for a file in UTF-16 or UTF-32. What is held never exceeds the longest line allowed by much.
    """
    with open_bytes(path) as file:
        data = file.read(BLOCK)
        _check_encoding(path, data)
        offset = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
        data, number = data[offset:], 1
        held: list[bytes] = []
        size = 0
        while data:
            end = data.rfind(b"\n") + 1
            if end and size <= LONGEST:
                block = Block(b"".join([*held, data[:end]]), number, offset)
                yield block
                number, offset = number + block.content.count(b"\n"), offset + len(block.content)
                held, size = [data[end:]] if end < len(data) else [], len(data) - end
            elif end:
                # The line that is too long ends within these bytes, and the next ones begin there.
                end = data.find(b"\n") + 1
                yield Block(held[0], number, offset, too_long=size + end)
                number, offset = number + 1, offset + size + end
                held, size, data = [], 0, data[end:] or file.read(BLOCK)
                continue
            else:
                held, size = [*held, data] if size <= LONGEST else held[:1], size + len(data)
            data = file.read(BLOCK)
        if size > LONGEST:
            yield Block(held[0], number, offset, too_long=size)
        elif size:
            yield Block(b"".join(held), number, offset)


def _check_encoding(path: Path, data: bytes) -> None:
    """Refuse a file that begins as one in UTF-16 or UTF-32, with or without a byte order mark."""
    marked = next((name for mark, name in _MARKS if data.startswith(mark)), None)
    sample = data[:4096]
    few = _WIDE * len(sample) / 2
    for start, name in ((1, "UTF-16LE"), (0, "UTF-16BE")):
        if marked is None and sample[start::2].count(0) > few > sample[1 - start :: 2].count(0):
            marked = name
    if marked is not None:
        found = excerpt(sample.decode(marked, errors="replace").partition("\n")[0])
        mend = f"save the file as UTF-8, or convert it: {_iconv(marked, path)}"
        raise BadRowsError([BadRow("not UTF-8", mend, f"the file is {marked}", found, str(path), line=1, row=0)])


def lines(block: Block, path: Path) -> Iterator[Line]:
    """Yield the lines of a block, those that cannot be used with the problem (its row is left to the caller)."""
    if block.too_long:
        size = f"a line of {block.too_long / 2**20:,.0f} MB; the limit is {LONGEST // 2**20} MB"
        problem = BadRow(
            "line too long",
            "cut it into several rows; a file that is one list goes as .json",
            size,
            excerpt(block.content[:400].decode(errors="backslashreplace")),
            str(path),
            block.line,
        )
        yield Line(block.line, "", problem)
        return
    whole = _decoded(block.content)
    if whole is not None and "\0" not in whole:
        for number, text in enumerate(_ended(whole, "\n"), start=block.line):
            yield Line(number, text)
        return
    offset = block.offset
    for number, raw in enumerate(_ended(block.content, b"\n"), start=block.line):
        yield _checked(raw, number, offset, path)
        offset += len(raw)


def _checked(raw: bytes, number: int, offset: int, path: Path) -> Line:
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        return Line(number, raw.decode(errors="replace"), _not_utf8(path, error, number, offset))
    at = text.find("\0")
    return Line(number, text, _nul(path, text, number, at) if at >= 0 else None)


def _ended(content: Text, end: Text) -> Iterator[Text]:
    """Yield the lines with their ends; unlike `splitlines`, only `end` ends one."""
    start = 0
    while start < len(content):
        after = content.find(end, start) + 1 or len(content)
        yield content[start:after]
        start = after


def _decoded(raw: bytes) -> str | None:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None


def _not_utf8(path: Path, error: UnicodeDecodeError, line: int, offset: int) -> BadRow:
    """Describe a byte that is not UTF-8; what was decoded begins at `offset` of the file."""
    raw, at = error.object, error.start
    detail = f"byte {offset + at} of the file is 0x{raw[at]:02x}"
    mend = f"save the file as UTF-8, or convert it, if it is cp1252: {_iconv('cp1252', path)}"
    found = raw[max(0, at - 40) : at + 40].decode(errors="backslashreplace")
    return BadRow("not UTF-8", mend, detail, excerpt(found), str(path), line)


def _iconv(encoding: str, path: Path) -> str:
    return f"iconv -f {encoding} -t UTF-8 {path.name} > utf8-{path.name}"


def _nul(path: Path, text: str, line: int, at: int) -> BadRow:
    mend = f"remove such characters: tr -d '\\000' < {path.name} > clean-{path.name}"
    return BadRow("NUL character", mend, f"at character {at} of the line", excerpt(text, at), str(path), line)


def whole_text(path: Path, *, most: int, mend: str) -> str:
    """Return the text of a file that is read at once, without a byte order mark.

    BadRowsError with the one problem, its row left to the caller, for a file of over `most` bytes (`mend` says what to
    do then), bytes that are not UTF-8, or NUL characters.
    """
    with open_bytes(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise BadRowsError([BadRow("file too large", mend, f"over {most // 2**20} MB in one piece", file=str(path))])
    _check_encoding(path, content)
    start = len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0
    try:
        text: str = content[start:].decode()
    except UnicodeDecodeError as error:
        line = 1 + error.object.count(b"\n", 0, error.start)
        raise BadRowsError([_not_utf8(path, error, line, start)]) from None
    if (at := text.find("\0")) >= 0:
        begin = text.rfind("\n", 0, at) + 1
        raise BadRowsError([_nul(path, text[begin : at + 80], 1 + text.count("\n", 0, at), at - begin)])
    return text
