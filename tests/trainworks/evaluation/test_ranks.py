"""What is measured does not depend on which ranks the rows of an example come to."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks
import tiny
from distributed import run_ranks

RANKS = str(Path(__file__).parents[2] / "ranks.py")


@pytest.mark.slow
def test_examples_of_several_rows_are_measured_alike_on_one_process_and_on_two(tmp_path: Path) -> None:
    task = "question-answering"
    tiny.save_model(tmp_path / "model", task)
    tiny.save_rows(tmp_path / "rows.jsonl", task, 120)
    arguments = {"folder": str(tmp_path), "task": task, "options": {}}
    whole = ranks.evaluated(**arguments, output=str(tmp_path / "one"))
    assert whole["rows"] > whole["examples"] == 24
    results = run_ranks(f"{RANKS}:evaluated", arguments | {"output": str(tmp_path / "two")}, ranks=2)
    assert [result["ranks"] for result in results] == [2, 2]
    assert results[0] == results[1]
    assert results[0]["examples"] == 24
    for name, values in whole["metrics"].items():
        assert results[0]["metrics"][name] == pytest.approx(values, rel=1e-5), name
