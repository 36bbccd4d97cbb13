"""Text and questions from the documentation that comes with every Python: language topics and library docstrings.

The sources are parsed, never imported, so nothing of them runs.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from trainworks.errors import DataError, nearest

__all__ = ["LICENSE", "Columns", "read"]

LICENSE = "PSF-2.0"

Columns = dict[str, list[str]]

_SUBSETS = ("text", "questions")
_MIN_DOCUMENT = 80
_MIN_ANSWER, _MAX_ANSWER = 20, 200
_HELD_OUT = 0.05
# Test suites, other people's packages, and the topics' own source, which is one large dictionary.
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data"}
_WORDINGS = (
    "What does {name} do?",
    "What is {name} for?",
    "Explain {name}.",
    "Describe {name} in a sentence.",
    "In Python, what does {name} do?",
    "Tell me about {name}.",
)


class _Document(NamedTuple):
    name: str
    group: str  # the name without its module and members: what is held out is held out as a whole
    text: str


def read(subset: str | None = None) -> dict[str, Columns]:
    """Return the splits `train` and `validation` (about 5%) as columns, in an order the Python version alone decides.

    `text` (the default) has `text` and `name`: whole topics, and docstrings of at least 80 characters. `questions` has
    `question`, `answer` and `name`: the first paragraph of public docstrings, where that is a sentence of at most 200
    characters. Both hold out the same objects, so a model pretrained on one has not read the docstrings that the other
    is validated on. DataError for another subset, or where Python has no sources.
    """
    subset = subset or "text"
    if subset not in _SUBSETS:
        raise DataError(
            f"python-docs: no subset '{subset}'{nearest(subset, _SUBSETS)}; there are: {', '.join(_SUBSETS)}"
        )
    root = Path(sysconfig.get_path("stdlib"))
    docstrings = list(_docstrings(root))
    if not docstrings:
        raise DataError(
            f"python-docs: no library sources in {root}; install Python's standard library with its .py files"
        )
    return _splits(_questions(docstrings) if subset == "questions" else _texts([*_topics(), *docstrings]))


def _topics() -> Iterator[_Document]:
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield _Document(name, name, text.strip())


def _docstrings(root: Path) -> Iterator[_Document]:
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] in sys.stdlib_module_names and not _SKIPPED.intersection(parts):
            yield from _walk(_parse(path), [part for part in parts if part != "__init__"], ())


def _parse(path: Path) -> ast.Module:
    with warnings.catch_warnings():  # old escapes in the library's own strings are no concern of the reader's
        warnings.simplefilter("ignore")
        return ast.parse(path.read_bytes(), str(path))


def _walk(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, module: list[str], inside: tuple[str, ...]
) -> Iterator[_Document]:
    """Yield the docstrings of a module or definition and of the definitions in its body, none inside functions."""
    docstring = ast.get_docstring(node, clean=False)
    if docstring:
        group = inside[0] if inside else module[-1]
        yield _Document(".".join((*module, *inside)), group, inspect.cleandoc(docstring).strip())
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _walk(child, module, (*inside, child.name))


class _Row(NamedTuple):
    group: str
    key: str  # rows with the same key are the same row
    columns: dict[str, str]


def _texts(documents: Iterable[_Document]) -> Iterator[_Row]:
    for name, group, text in documents:
        if len(text) >= _MIN_DOCUMENT:
            yield _Row(group, text, {"text": text, "name": name})


def _questions(documents: Iterable[_Document]) -> Iterator[_Row]:
    names = set()
    for name, group, text in documents:
        answer = " ".join(text.split("\n\n")[0].split())
        public = not any(part.startswith("_") for part in name.split("."))
        if public and name not in names and _is_sentence(answer):
            names.add(name)
            wording = _WORDINGS[int(_unit(f"wording {name}") * len(_WORDINGS))]
            yield _Row(group, answer, {"question": wording.format(name=name), "answer": answer, "name": name})


def _is_sentence(answer: str) -> bool:
    return _MIN_ANSWER <= len(answer) <= _MAX_ANSWER and answer[0].isupper() and answer.endswith(".")


def _splits(rows: Iterable[_Row]) -> dict[str, Columns]:
    splits: dict[str, Columns] = {"train": {}, "validation": {}}
    seen: set[str] = set()
    for group, key, columns in rows:
        if key not in seen:
            seen.add(key)
            split = splits["validation" if _unit(f"split {group.lower()}") < _HELD_OUT else "train"]
            for name, value in columns.items():
                split.setdefault(name, []).append(value)
    return splits


def _unit(word: str) -> float:
    """Hash a word to [0, 1)."""
    return int.from_bytes(hashlib.sha256(word.encode()).digest()[:6], "big") / 2**48
