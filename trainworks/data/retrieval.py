"""Questions with documents as prompts: the one that answers among others, or others alone (RAFT, Zhang et al. 2024,
arXiv:2403.10131)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field, Strict

from trainworks.data.bad_rows import BadRow, excerpt
from trainworks.data.columns import Kind
from trainworks.settings import Settings, Share

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["COLUMNS", "Retrieval", "asked", "document_flaws"]

COLUMNS: dict[str, Kind] = {"question": "text", "documents": "any", "answer": "text"}
"""What a row holds."""


class Retrieval(Settings):
    """Rows of `question`, `documents` and `answer`. The documents are texts, of which the first answers the question,
    or objects of `text` and `oracle`, which is true for those that do."""

    distractors: Annotated[int, Strict(), Field(ge=0)] = 4
    """Documents that do not answer, drawn from the row's; all of them, where there are fewer."""
    without_oracle: Share = 0.2
    """Share of the rows that are asked without the document that answers, so that the model also learns to know."""


def asked(rows: Dataset, settings: Retrieval) -> Dataset:
    """Return the rows as `prompt` and `completion`. What is drawn of a row is a function of its question alone."""
    from trainworks.data.cache import table

    questions, answers = rows["question"][:], rows["answer"][:]
    pairs = zip(questions, rows["documents"][:], strict=True)
    prompts = [_prompt(question, _documents(held), settings) for question, held in pairs]
    columns = {"prompt": prompts, "completion": answers}
    return table(columns | ({"system": rows["system"][:]} if "system" in rows.column_names else {}))


def document_flaws(rows: Dataset) -> Iterator[BadRow]:
    """Yield rows whose documents cannot be read, or of which none answers, by number from 0."""
    for row, held in enumerate(rows["documents"][:]):
        found, mend = excerpt(repr(held)), "give a list of texts, or of objects with text and oracle"
        if not isinstance(held, list) or not held or not all(_is_document(each) for each in held):
            yield BadRow("no documents", mend, excerpt=found, row=row, column="documents")
        elif not any(oracle for _, oracle in _documents(held)):
            yield BadRow("no oracle", "set oracle: true for one", excerpt=found, row=row, column="documents")


def _is_document(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, Mapping) and isinstance(value.get("text"), str))


def _documents(held: list[Any]) -> list[tuple[str, bool]]:
    """Return each document's text, and whether it answers."""
    return [
        (each, place == 0) if isinstance(each, str) else (each["text"], bool(each.get("oracle")))
        for place, each in enumerate(held)
    ]


def _prompt(question: str, documents: list[tuple[str, bool]], settings: Retrieval) -> str:
    seed = blake2b(question.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    draw = np.random.default_rng(int.from_bytes(seed, "little"))
    others = [text for text, oracle in documents if not oracle]
    kept = [others[place] for place in draw.permutation(len(others))[: settings.distractors]]
    if draw.random() >= settings.without_oracle or not kept:
        kept += [text for text, oracle in documents if oracle]
    shown = [kept[place] for place in draw.permutation(len(kept))]
    numbered = (f"Document {number}:\n{text}" for number, text in enumerate(shown, 1))
    return "\n\n".join([*numbered, f"Question: {question}"])
