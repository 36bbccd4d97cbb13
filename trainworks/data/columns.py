"""Columns checked before a model loads: whether they are there, what they hold, which classes their labels name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from trainworks.data.bad_rows import BadRow, BadRowsError, excerpt
from trainworks.errors import DataError, nearest

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "Kind",
    "class_ids",
    "class_lists",
    "class_names",
    "class_sets",
    "fingerprint",
    "holds_bytes",
    "holds_lists",
    "listed",
    "numbers_of",
    "rename",
    "require_columns",
]

Kind = Literal["text", "label", "labels", "number", "messages", "words", "answers", "image", "any"]

MAX_CLASSES = 10_000
_WINDOW = 10_000
_WIDE_WINDOW = 100
"""Rows that are looked at together; fewer where they hold bytes."""
_SHOWN = 20


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_label(kind: pa.DataType) -> bool:
    return _is_text(kind) or bool(pa.types.is_integer(kind) or pa.types.is_boolean(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _is_labels(kind: pa.DataType) -> bool:
    return _is_list(kind) and (_is_label(kind.value_type) or bool(pa.types.is_null(kind.value_type)))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))


def _is_messages(kind: pa.DataType) -> bool:
    if not _is_list(kind) or not pa.types.is_struct(kind.value_type):
        return False
    return {"role", "content"} <= {field.name for field in kind.value_type}


def _is_words(kind: pa.DataType) -> bool:
    return _is_list(kind) and _is_text(kind.value_type)


def _is_answers(kind: pa.DataType) -> bool:
    if not pa.types.is_struct(kind):
        return False
    held = {field.name: field.type for field in kind}
    texts, starts = held.get("text", pa.null()), held.get("answer_start", pa.null())
    return _is_words(texts) and _is_list(starts) and bool(pa.types.is_integer(starts.value_type))


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return {"bytes", "path"} <= {field.name for field in kind}
    return _is_bytes(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


_KINDS: dict[str, tuple[Callable[[pa.DataType], bool], str]] = {
    "text": (_is_text, "text"),
    "label": (_is_label, "labels (text, whole numbers or classes)"),
    "labels": (_is_labels, "lists of labels (text, whole numbers or classes)"),
    "number": (_is_number, "numbers"),
    "messages": (_is_messages, "messages (a list of objects with role and content)"),
    "words": (_is_words, "words (a list of texts)"),
    "answers": (_is_answers, "answers (an object of two lists, text and answer_start)"),
    "image": (_is_image, "images (encoded bytes, or objects with bytes and path)"),
    "any": (lambda kind: True, "anything"),
}


def listed(names: Sequence[str]) -> str:
    """Return the first of some names, as a message shows them."""
    return ", ".join(map(excerpt, names[:_SHOWN])) + (", ..." if len(names) > _SHOWN else "")


def rename(rows: Dataset, columns: Mapping[str, str], *, source: str) -> Dataset:
    """Rename columns as {new: old}; DataError lists every old name that is missing and every new name that is taken."""
    problems = [
        f"{source}: data.columns.{new}: no column '{old}'{nearest(old, rows.column_names)}; "
        f"there are: {listed(rows.column_names)}"
        for new, old in columns.items()
        if old not in rows.column_names
    ]
    problems += [
        f"{source}: data.columns.{new}: column '{new}' is there already; move it away with {{other_{new}: {new}}}"
        for new, old in columns.items()
        if new != old and new in rows.column_names and new not in columns.values()
    ]
    if len(set(columns.values())) < len(columns):
        problems.append(f"{source}: data.columns names one column twice: {listed(list(columns.values()))}")
    if problems:
        raise DataError("\n".join(problems))
    return rows.rename_columns({old: new for new, old in columns.items() if new != old})


def require_columns(rows: Dataset, wanted: Mapping[str, Kind], *, source: str) -> None:
    """Check that every wanted column is there and holds its kind; one DataError names all that do not, and the mend.

    BadRowsError, over rows of this split, where what is read as it stands (text, messages, words, answers) is null.
    """
    kinds = {field.name: field.type for field in rows.features.arrow_schema}
    problems = [problem for name, kind in wanted.items() if (problem := _problem(name, kind, kinds, wanted))]
    if problems:
        there = listed([f"{name} ({kind})" for name, kind in kinds.items()]) or "none"
        raise DataError("\n".join([*(f"{source}: {problem}" for problem in problems), f"The columns are: {there}"]))
    nulls = [
        BadRow(f"null {kind}", "give every row a value there", file=source, row=row, column=name)
        for name, kind in wanted.items()
        if kind in ("text", "messages", "words", "answers")
        for row in _nulls(rows, name)
    ]
    if nulls:
        raise BadRowsError(sorted(nulls, key=lambda problem: problem.row or 0))


def _nulls(rows: Dataset, column: str) -> list[int]:
    values = rows.with_format("arrow")[column][:]
    return np.flatnonzero(values.is_null().to_numpy()).tolist() if values.null_count else []


def _problem(name: str, kind: Kind, kinds: Mapping[str, pa.DataType], wanted: Mapping[str, Kind]) -> str:
    fits, words = _KINDS[kind]
    if name not in kinds:
        free = [other for other, held in kinds.items() if fits(held) and other not in wanted]
        guess = nearest(name, free)
        old = guess.split("'")[1] if guess else excerpt((free or ["..."])[0])
        return f"no column '{name}'{guess}; the task reads {words} there. Map it: data.columns: {{{name}: {old}}}"
    if pa.types.is_null(kinds[name]):
        return f"column '{name}' holds only nulls; the task reads {words} there"
    if not fits(kinds[name]):
        return f"column '{name}' holds {excerpt(str(kinds[name]))}; the task reads {words} there"
    return ""


def holds_lists(rows: Dataset, column: str) -> bool:
    """Tell whether a column that is there holds lists."""
    kinds = {field.name: field.type for field in rows.features.arrow_schema}
    return column in kinds and _is_list(kinds[column])


def class_names(rows: Dataset, column: str) -> tuple[str, ...]:
    """Return the names of the classes: those the data set declares, else the distinct values, numbers in their order;
    of a column of lists, what is in them.

    DataError when a label is null, when there are no labels, or more than 10,000 of them.
    """
    values = _labels(rows, column)
    if declared := _declared(rows, column):
        return tuple(declared)
    flat = pc.list_flatten(values) if _is_list(values.type) else values
    distinct = sorted(pc.unique(flat.drop_null()).to_pylist())
    if not 0 < len(distinct) <= MAX_CLASSES:
        raise DataError(
            f"column '{column}' holds {len(distinct):,} different labels in {len(rows):,} rows; "
            f"expected 1 to {MAX_CLASSES:,}. Is it the label column? Map another: data.columns: {{{column}: ...}}"
        )
    return tuple(str(value) for value in distinct)


def class_ids(rows: Dataset, column: str, names: Sequence[str], *, first: int = 0) -> list[int]:
    """Return every label as its index in `names`; BadRowsError with the rows that hold a null or another label.

    `first` is the number of the first of these rows, for the message.
    """
    values = _labels(rows, column, first)
    spelt = _spelt(rows, column, values, names)
    ids = [spelt[value] for value in values.to_pylist()]
    _refuse_unknown({row: values[row].as_py() for row, index in enumerate(ids) if index < 0}, names, column, first)
    return ids


def class_lists(rows: Dataset, column: str, names: Sequence[str], *, first: int = 0) -> list[list[int]]:
    """Return every row's list of labels as indices in `names`; BadRowsError as `class_ids`."""
    values = _labels(rows, column, first)
    spelt = _spelt(rows, column, pc.list_flatten(values), names)
    held = values.to_pylist()
    lists = [[spelt[value] for value in row] for row in held]
    wrong = {row: held[row][ids.index(-1)] for row, ids in enumerate(lists) if -1 in ids}
    _refuse_unknown(wrong, names, column, first)
    return lists


def class_sets(rows: Dataset, column: str, names: Sequence[str], *, first: int = 0) -> list[list[int]]:
    """Return every row's list of labels as indices in `names`, each once and in order; BadRowsError as `class_ids`."""
    return [sorted({*ids}) for ids in class_lists(rows, column, names, first=first)]


def _spelt(rows: Dataset, column: str, values: pa.ChunkedArray, names: Sequence[str]) -> dict[object, int]:
    """Return the index of each value there is, -1 for one that is no class."""
    declared = dict(enumerate(_declared(rows, column)))
    places = {name: index for index, name in enumerate(names)}
    return {
        value: -1 if value is None else places.get(declared.get(value, "") if declared else str(value), -1)
        for value in pc.unique(values).to_pylist()
    }


def _refuse_unknown(wrong: Mapping[int, object], names: Sequence[str], column: str, first: int) -> None:
    mend = f"the {len(names)} classes are: {listed(names)}"
    problems = [
        BadRow("unknown label", mend, excerpt=excerpt(repr(value)), row=first + row, column=column)
        for row, value in wrong.items()
    ]
    if problems:
        raise BadRowsError(problems)


def _declared(rows: Dataset, column: str) -> list[str]:
    """Return the class names the data set itself declares, in the order of their numbers."""
    from datasets import ClassLabel

    feature = rows.features[column]
    feature = getattr(feature, "feature", feature)  # of a list, what it holds
    return list(feature.names) if isinstance(feature, ClassLabel) else []


def _labels(rows: Dataset, column: str, first: int = 0) -> pa.ChunkedArray:
    """Return the column's values, none of them null."""
    kinds = {field.name: field.type for field in rows.features.arrow_schema}
    kind: Kind = "labels" if holds_lists(rows, column) else "label"
    if problem := _problem(column, kind, kinds, {column: kind}):
        raise DataError(problem)
    values = rows.select_columns([column]).with_format("arrow")[:].column(column)
    if values.null_count:
        rows_without = np.flatnonzero(values.is_null().to_numpy()).tolist()
        raise BadRowsError(
            [BadRow("null label", "give every row a label", row=first + row, column=column) for row in rows_without]
        )
    return values


def numbers_of(values: Iterable[object]) -> NDArray[np.int64]:
    """Return a number for each value that is the same for equal ones, in whatever process and part of the rows."""
    digests = (hashlib.blake2b(repr(value).encode("utf-8", "surrogatepass"), digest_size=8) for value in values)
    return np.array([int.from_bytes(each.digest(), "little", signed=True) for each in digests], dtype=np.int64)


def fingerprint(*splits: Dataset | pa.Table) -> str:
    """Return the SHA-256 of the splits' content, whatever the order of their columns and however Arrow has cut them."""
    digest = hashlib.sha256()
    for rows in splits:
        digest.update(f"split {len(rows)}".encode())
        schema = rows.schema if isinstance(rows, pa.Table) else rows.features.arrow_schema
        size = _WIDE_WINDOW if holds_bytes(schema) else _WINDOW
        for start in range(0, len(rows), size):
            window = _window(rows, start, size)
            for name in sorted(window.column_names):
                digest.update(f"column {name!a}".encode())
                _feed(digest, window.column(name).combine_chunks())
    return digest.hexdigest()


def holds_bytes(schema: pa.Schema) -> bool:
    """Tell whether a column holds bytes, which may be whole images, so that few rows are many MB."""
    return any(_is_image(field.type) for field in schema)


def _window(rows: Dataset | pa.Table, start: int, size: int) -> pa.Table:
    if isinstance(rows, pa.Table):
        return rows.slice(start, size)
    return rows.with_format("arrow")[start : start + size]


def _feed(digest: hashlib._Hash, values: pa.Array | pa.ChunkedArray) -> None:
    """Hash which values are null, then the others; never what Arrow leaves open (offsets, bytes under nulls)."""
    if isinstance(values, pa.ChunkedArray):  # what combine_chunks leaves of an empty or an oversized column
        values = pa.concat_arrays(values.chunks) if values.num_chunks else pa.array([], values.type)
    digest.update(f"{len(values)} {values.null_count} ".encode())
    if values.null_count:
        digest.update(values.is_null().to_numpy(zero_copy_only=False).tobytes())
    values, kind = values.drop_null(), values.type
    if isinstance(values, pa.ExtensionArray):
        _feed(digest, values.storage)
    elif pa.types.is_dictionary(kind):
        _feed(digest, values.dictionary_decode())
    elif pa.types.is_struct(kind):
        fields = zip((field.name for field in kind), values.flatten(), strict=True)
        for name, inner in sorted(fields, key=lambda field: field[0]):
            digest.update(f"field {name!a}".encode())
            _feed(digest, inner)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        _feed(digest, pc.cast(pc.list_value_length(values), pa.int64()))
        _feed(digest, values.flatten())
    elif _is_text(kind) or _is_bytes(kind):
        digest.update(b"text" if _is_text(kind) else b"bytes")
        _feed_bytes(digest, pc.cast(values, pa.large_binary()))
    elif pa.types.is_primitive(kind) and not pa.types.is_time(kind):  # numpy makes objects of times, with addresses
        digest.update(str(kind).encode())
        digest.update(values.to_numpy(zero_copy_only=False).tobytes())
    else:  # times of day, decimals, fixed-size lists, maps: rare, so slow and plain
        digest.update(ascii(values.to_pylist()).encode())


def _feed_bytes(digest: hashlib._Hash, values: pa.LargeBinaryArray) -> None:
    digest.update(pc.binary_length(values).to_numpy().tobytes())
    _, offsets, content = values.buffers()
    if content is not None:
        ends = np.frombuffer(offsets, np.int64)[[values.offset, values.offset + len(values)]]
        digest.update(memoryview(content)[ends[0] : ends[1]])
