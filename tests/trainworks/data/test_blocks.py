"""Blocks lose no token, however the documents come."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
from datasets import Dataset

from trainworks import CausalLM
from trainworks.data.blocks import closed, cut, joined
from trainworks.data.building import build
from trainworks.data.text import encode

DOCUMENTS = [closed(document, 0) for document in ([1, 2, 3], [4], [], [5, 6, 7, 8, 9, 0])]
STREAM = [1, 2, 3, 0, 4, 0, 0, 5, 6, 7, 8, 9, 0]


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("size", [2, 3, 5, 12, 100])
def test_blocks_predict_every_token_but_the_first_once(size: int, parts: int) -> None:
    pieces = np.array_split(np.concatenate(DOCUMENTS), parts)
    blocks = [block.tolist() for some in joined(pieces, size) for block in some]
    assert [token for block in blocks for token in block[1:]] == STREAM[1:]
    assert all(len(block) == size + 1 for block in blocks[:-1])
    assert [block[0] for block in blocks[1:]] == [block[-1] for block in blocks[:-1]]


def test_a_document_by_itself_is_cut_without_its_neighbours() -> None:
    assert [block.tolist() for document in DOCUMENTS for block in cut(document, 4)] == [
        [1, 2, 3, 0],
        [4, 0],
        [5, 6, 7, 8, 9],
        [9, 0],
    ]


def test_ids_are_those_the_tokenizer_gives() -> None:
    texts = ["the cat", "", "a very small dog sings " * 50]
    assert list(encode(texts, tiny.tokenizer())) == tiny.tokenizer()(texts)["input_ids"]


@pytest.mark.parametrize("across", [True, False])
def test_a_task_makes_the_blocks_of_all_documents(
    across: bool, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINWORKS_CACHE", str(tmp_path))
    monkeypatch.setattr("trainworks.data.building._SHARD_ROWS", 7)
    texts = [row["text"] for row in tiny.rows("causal-lm", 30)]
    task, tokenizer = CausalLM(block=16, across=across), tiny.tokenizer()
    rows = Dataset.from_dict({"text": texts})

    def prepare(rows: Dataset, *, first: int) -> object:
        return task.prepare(rows, tokenizer, first=first)

    samples = build("key", rows, prepare, task.arrange, workers=1).samples  # type: ignore[arg-type]
    documents = [closed(ids, tokenizer.eos_token_id) for ids in encode(texts, tokenizer)]
    whole = [np.concatenate(documents)] if across else documents
    expected = [block.tolist() for part in whole for block in cut(part, 16)]
    assert samples["input_ids"][:] == expected
    assert samples["length"][:] == [len(block) - 1 for block in expected]
