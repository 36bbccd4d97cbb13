"""Questions with documents: what is drawn is the row's own, whichever shard it is in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from datasets import Dataset

import finetune
from trainworks import SFT, Data
from trainworks.data.retrieval import Retrieval, asked, document_flaws
from trainworks.errors import DataError


def rows(number: int = 60) -> list[dict[str, Any]]:
    return [
        {
            "question": f"what is {n}?",
            "documents": [f"oracle {n}", *(f"other {n}.{k}" for k in range(6))],
            "answer": "it",
        }
        for n in range(number)
    ]


def prompts(data: list[dict[str, Any]], **options: Any) -> list[str]:
    return list(asked(Dataset.from_list(data), Retrieval(**options))["prompt"])


def test_the_oracle_stands_anywhere_among_distractors_or_is_left_out_of_a_share_of_the_rows() -> None:
    made = prompts(rows(), distractors=3, without_oracle=0.4)
    held = [f"oracle {n}" in prompt for n, prompt in enumerate(made)]
    assert 0.4 < sum(held) / len(held) < 0.8
    assert all(prompt.count("other") == 3 for prompt in made)
    assert len({prompt[: prompt.find("oracle")].count("Document") for prompt in made}) == 4
    assert made[7].endswith("\n\nQuestion: what is 7?")
    assert all("oracle" in prompt for prompt in prompts(rows(), without_oracle=0.0))
    assert "oracle 0" in prompts([rows(1)[0]], distractors=0, without_oracle=0.9)[0], "some document is always there"


def test_what_is_drawn_does_not_depend_on_the_rows_around() -> None:
    data = rows()
    assert prompts(data)[20:30] == prompts(data[20:30])


def test_flagged_documents_are_the_oracles() -> None:
    flagged = [{"text": "no", "oracle": False}, {"text": "yes", "oracle": True}]
    (prompt,) = prompts([{"question": "q", "documents": flagged, "answer": "a"}], distractors=0)
    assert prompt == "Document 1:\nyes\n\nQuestion: q"


@pytest.mark.parametrize(
    ("documents", "reason"),
    [([], "no documents"), (None, "no documents"), ([{"text": "a", "oracle": False}], "no oracle")],
    ids=["none", "null", "no oracle"],
)
def test_a_row_without_a_document_that_answers_is_told(documents: Any, reason: str) -> None:
    good = {"question": "q", "documents": [{"text": "a", "oracle": True}], "answer": "a"}
    (flaw,) = document_flaws(Dataset.from_list([good, good | {"documents": documents}]))
    assert (flaw.row, flaw.column, flaw.reason) == (1, "documents", reason)


def test_a_run_learns_the_answers_through_the_template(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "model", "sft")
    config = tiny.config(
        "sft", tmp_path / "model", Data(source=Dataset.from_list(rows(12)), holdout=0), tmp_path / "run"
    )
    run = finetune.prepare(config.model_copy(update={"task": SFT(max_length=400, retrieval=Retrieval(distractors=2))}))
    assert run.task.stated().startswith("format retrieval (columns question, documents, answer)")
    row = run.train.with_format("numpy")[0]
    assert run.processor.decode(row["input_ids"][row["trained"]]) == "it<|endoftext|>"
    bad = Data(source=Dataset.from_list([*rows(3), rows(1)[0] | {"documents": []}]), holdout=0)
    with pytest.raises(DataError, match=r"row 3.*column 'documents': no documents"):
        finetune.prepare(run.config.model_copy(update={"data": bad, "output": str(tmp_path / "other")}))
