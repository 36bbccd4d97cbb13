"""A preview shows the rows a run would train on, what of them is learned, and what they come to; and stops where the
run would."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import tiny
from chat_templates import CHATML, COUNTING
from typer.testing import CliRunner

import finetune
from trainworks import SFT, CausalLM, FromScratch, NewTokenizer, Pretrained, Preview
from trainworks.cli import app
from trainworks.errors import DataError
from trainworks.exporting import export
from trainworks.schema import LoRA

EXCHANGE = [{"role": "user", "content": "a cat"}, {"role": "assistant", "content": "a dog"}]
CONFIG = """
output: {folder}/run
task: {{type: sft, max_length: 64}}
model: {{name: {folder}/model}}
data: {{source: {folder}/rows.jsonl, holdout: 0}}
batch: {{per_step: 8}}
budget: {{epochs: 1}}
optim: {{lr: 1e-3}}
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINWORKS_CACHE", str(tmp_path / "cache"))


def lay_out(folder: Path, rows: list[dict[str, Any]], **task: Any) -> finetune.Config:
    """Write rows and a model, and return a run on them."""
    tiny.save_model(folder / "model", "sft")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = tiny.config("sft", folder / "model", folder / "rows.jsonl", folder / "run")
    own = SFT(**({"max_length": 64} | task))
    return config.model_copy(update={"task": own, "data": config.data.model_copy(update={"holdout": 0.0})})


def test_text_marks_what_is_learned_and_the_table_adds_up(tmp_path: Path) -> None:
    preview = Preview.of(lay_out(tmp_path, [{"messages": EXCHANGE}] * 3), rows=1)
    marked = "<|im_start|>user\na cat<|endoftext|><|im_start|>assistant\n[[a dog<|endoftext|>]]"
    text = str(preview)
    assert f"tokens, {len(tiny.tokenizer()('a dog<|endoftext|>')['input_ids'])} learned\n{marked}\n" in text
    assert "format messages (columns messages), learning all of the assistant's turns" in text
    (table,) = preview.tables
    size = len(tiny.tokenizer().apply_chat_template(EXCHANGE)["input_ids"])
    assert (table.rows, table.samples, table.tokens, table.longest, table.stopping) == (3, 3, 3 * size, size, 3)
    cells = table.described()
    assert cells["learned"] == f"{100 * table.learned / table.tokens:.1f}%"
    assert (cells["end learned"], cells["BOS doubled"], cells["ids as at inference"]) == ("yes", "no", "3 of 3")
    assert cells["cut, split or left out"] == "nothing"
    assert all(value in text for value in cells.values())


def test_colours_hold_the_same_text_and_end_with_each_line(tmp_path: Path) -> None:
    preview = Preview.of(lay_out(tmp_path, [{"messages": EXCHANGE}]), rows=1)
    painted = preview.text(colour=True)
    plain = re.sub(r"\x1b\[[\d;]*m", "", painted)
    assert plain.replace("↵", "") == str(preview).replace("[[", "").replace("]]", "")
    for line in painted.splitlines():
        assert line.count("\x1b[0m") * 2 == line.count("\x1b[")
    green = "".join(re.findall(r"\x1b\[(?:4;)?1;32m(.*?)\x1b\[0m", painted))
    assert green == "a dog<|endoftext|>"


def test_a_row_cannot_steer_the_terminal_nor_the_page(tmp_path: Path) -> None:
    said = {"role": "assistant", "content": "\x1b[2J<script>alert(1)</script> 🐕"}
    preview = Preview.of(lay_out(tmp_path, [{"messages": [EXCHANGE[0], said]}], max_length=128), rows=1)
    assert r"[[\x1b[2J<script>alert(1)</script> 🐕<|endoftext|>]]" in str(preview)
    html = preview._repr_html_()
    assert "<script" not in html
    assert "\x1b" not in html


def test_html_is_whole_and_colours_what_is_learned(tmp_path: Path) -> None:
    class Reader(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []
            self.learned = ""
            self.style = ""

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.open.append(tag)
            self.style = dict(attrs).get("style") or ""

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag
            self.style = ""

        def handle_data(self, data: str) -> None:
            self.learned += data if "0,160,60" in self.style else ""

    reader = Reader()
    reader.feed(Preview.of(lay_out(tmp_path, [{"messages": EXCHANGE}]), rows=1)._repr_html_())
    assert reader.open == []
    assert reader.learned == "a dog<|endoftext|>"


def test_what_is_lost_is_told_by_source_and_by_row(tmp_path: Path) -> None:
    rows = [{"messages": EXCHANGE * 9}, {"messages": EXCHANGE[:1]}, {"messages": EXCHANGE}]
    preview = Preview.of(lay_out(tmp_path, rows, too_long="split", nothing_to_learn="drop"), rows=2)
    (table,) = preview.tables
    assert dict(table.dropped) == {"rows split": 1, "nothing to learn": 1}
    titles = [shown.title for shown in preview.shown]
    assert re.search(r"row 0, part 1 of \d: \d+ tokens, \d+ learned \(rows split 1\)", titles[0])
    assert titles[-1].endswith("row 1: left out (nothing to learn 1)")


def test_a_preview_stops_where_the_run_would(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:2: row 1 .*nothing to learn"):
        Preview.of(lay_out(tmp_path, [{"messages": EXCHANGE}, {"messages": EXCHANGE[:1]}]))


def test_a_text_without_template_is_shown_as_learned(tmp_path: Path) -> None:
    preview = Preview.of(lay_out(tmp_path, [{"text": "a red cat"}]), rows=1)
    assert "a[[ red cat<|endoftext|>]]" in str(preview)
    assert preview.tables[0].described()["ids as at inference"] == "no template"


def test_blocks_of_a_new_model_are_shown(tmp_path: Path) -> None:
    import pretrain

    rows = tiny.save_rows(tmp_path / "rows.jsonl", "causal-lm", 30)
    base = tiny.config("sft", tmp_path, rows, tmp_path / "run")
    model = FromScratch(architecture="llama", sizes=tiny.SIZES, tokenizer=NewTokenizer(vocab_size=300))
    shared = {name: getattr(base, name) for name in ("output", "data", "batch", "budget", "optim")}
    preview = Preview.of(pretrain.Config(task=CausalLM(block=16), model=model, **shared), rows=1)
    train = preview.tables[0]
    assert train.longest == 17
    assert train.learned == train.tokens - train.samples  # nothing predicts a block's first token


# The command


def test_the_command_prints_it_and_takes_changes(tmp_path: Path) -> None:
    lay_out(tmp_path, [{"messages": EXCHANGE * 2}])
    (tmp_path / "run.yaml").write_text(CONFIG.format(folder=tmp_path), encoding="utf-8")
    answer = CliRunner().invoke(app, ["preview", str(tmp_path / "run.yaml"), "task.learn=last", "--rows", "1"])
    assert answer.exit_code == 0, answer.output
    assert answer.stdout.count("[[") == 1
    assert "its last turn" in answer.stdout
    assert "\x1b" not in answer.stdout
    assert not (tmp_path / "run").exists()


def test_the_command_names_a_template_that_fails(tmp_path: Path) -> None:
    lay_out(tmp_path, [{"messages": EXCHANGE}])
    (tmp_path / "bad.jinja").write_text(COUNTING, encoding="utf-8")
    (tmp_path / "run.yaml").write_text(CONFIG.format(folder=tmp_path), encoding="utf-8")
    answer = CliRunner().invoke(app, ["preview", str(tmp_path / "run.yaml"), f"task.template={tmp_path}/bad.jinja"])
    assert answer.exit_code == 2
    assert re.search(
        r"error: the chat template, tried on one question .*: turn 1: the chat template does not nest", answer.output
    )


def test_help_of_the_command_imports_nothing_heavy() -> None:
    probe = (
        "import sys; from typer.testing import CliRunner; from trainworks.cli import app; "
        "answer = CliRunner().invoke(app, ['preview', '--help']); assert answer.exit_code == 0; "
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


# Where an answer ends


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_an_exported_model_stops_at_the_end_of_a_turn(tmp_path: Path, tuning: str) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    config = lay_out(tmp_path, [{"messages": EXCHANGE}] * 8)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "<|im_start|>")  # a token there is, other than the end token
    tokenizer.save_pretrained(tmp_path / "model")
    if tuning == "lora":
        config = config.model_copy(update={"tuning": LoRA(rank=2, merge=True)})
    folder = export(finetune.prepare(config))
    ends = sorted(tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>"]))
    for exported in {folder, folder.with_name("merged") if tuning == "lora" else folder}:
        assert GenerationConfig.from_pretrained(exported).eos_token_id == ends


def test_worked_examples_keep_turns_apart_and_hold_one_answer(tmp_path: Path) -> None:
    config = lay_out(tmp_path, [{"messages": EXCHANGE * 2}] * 8)
    assert isinstance(config.model, Pretrained)
    run = finetune.prepare(config.model_copy(update={"data": config.data.model_copy(update={"holdout": 0.5})}))
    assert run.validation is not None
    sample = run.step(run.validation, ask="show")[0]
    assert sample.prompt == "<|im_start|>user\na cat<|endoftext|><|im_start|>assistant"
    assert sample.reference == "a dog"


@pytest.mark.parametrize("task", [name for name in sorted(tiny.TASKS) if tiny.TASKS[name].reads == "image_processor"])
def test_images_are_drawn_as_the_model_sees_them(task: str, tmp_path: Path) -> None:
    from PIL import Image

    tiny.save_model(tmp_path / "model", task)
    tiny.save_rows(tmp_path / "rows.parquet", task, 20)
    preview = Preview.of(tiny.config(task, tmp_path / "model", tmp_path / "rows.parquet", tmp_path / "run"), rows=4)
    assert "samples" in preview.text()
    assert "tokens" not in preview.text()
    files = preview.save(tmp_path / "drawn")
    assert len(files) == 2
    with Image.open(files[0]) as drawn:
        assert drawn.width >= 2 * 24
        assert len(drawn.getcolors(100_000) or ()) > 50
