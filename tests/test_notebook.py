"""The notebook: what is stored is clean, and every cell runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "quickstart.ipynb"
PICTURE = re.compile(r"data:image/png;base64,[\w+/=]+")
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/<])/(?:[\w.-]+/)+|\b[A-Z]:\\")
REPORT = re.compile(r"^(\w+) on validation .*?: loss ([\d.]+)", re.MULTILINE)


def read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def said(output: Any) -> str:
    """Return an output's text, pictures left out."""
    shown = output.get("data", {})
    texts = [output.get("text", ""), *(value for kind, value in shown.items() if not kind.startswith("image/"))]
    return PICTURE.sub("", "\n".join(texts))


def check_learned(notebook: Any) -> None:
    streams = "\n".join(said(output) for output in outputs(notebook) if output.output_type == "stream")
    losses = {name: float(loss) for name, loss in REPORT.findall(streams)}
    assert losses["final"] < losses["untuned"] - 0.1


def test_the_stored_outputs_are_whole_and_show_that_it_learned() -> None:
    notebook = read()
    nbformat.validate(notebook)
    ran = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert ran == list(range(1, len(ran) + 1))
    kinds = {kind for output in outputs(notebook) for kind in output.get("data", {})}
    assert {"text/html", "text/markdown", "image/png"} <= kinds
    check_learned(notebook)


def test_the_stored_outputs_hold_no_paths_warnings_or_bars() -> None:
    stored = outputs(read())
    assert len(stored) >= 8
    for output in stored:
        assert output.output_type != "error"
        assert output.get("name") != "stderr"
        assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {})
        assert not ABSOLUTE_PATH.search(said(output)), said(output)
        assert "|#" not in said(output)
        assert "█" not in said(output)


@pytest.mark.slow
def test_every_cell_runs_in_a_fresh_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbclient import NotebookClient

    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where the notebook puts its folders
    notebook = read()
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()  # raises CellExecutionError with the cell and its traceback
    check_learned(notebook)
