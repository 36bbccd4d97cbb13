"""`trainworks chat`: answers in parts, by template and stop tokens, of models and adapters; nothing of them runs."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from datasets import Dataset
from typer.testing import CliRunner

import finetune
from trainworks import Data, Every, export
from trainworks.chat import Chat, open_chat, talk
from trainworks.cli import app
from trainworks.errors import ConfigError

PAIRS = [{"prompt": "the cat", "completion": "runs fast"}, {"prompt": "a bird?", "completion": "it sings"}]


@pytest.fixture(scope="module", params=["full", "lora"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run whose model knows two answers by heart."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny.save_model(folder / "model", "sft")
    data = Data(source=Dataset.from_list(PAIRS * 4), holdout=0)
    settings: dict[str, Any] = {"every": Every(log=99), "epochs": 90, "tuning": request.param}
    settings["optim"] = {"lr": 1e-2 if request.param == "lora" else 3e-3}
    done = finetune.prepare(tiny.config("sft", folder / "model", data, folder / "run", **settings))
    record = finetune.fit(done)
    record.write(folder / "run")
    export(done)
    return folder / "run"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model"), "sft")


def test_a_run_or_its_models_folder_answers_as_it_has_learned_and_stops(run: Path) -> None:
    for place in (run, run / "model"):
        done = CliRunner().invoke(app, ["chat", str(place), "--once", "the cat", "--temperature", "0"])
        assert (done.exit_code, done.stdout) == (0, "runs fast\n"), done.stderr


def test_the_lines_of_a_pipe_are_answered_one_by_one(run: Path) -> None:
    lines = "the cat\n\n/reset\na bird?\n/exit\nthe cat\n"
    done = CliRunner().invoke(app, ["chat", str(run), "--temperature", "0"], input=lines)
    apart = [chat(run).ask(pair["prompt"], lambda part: None) for pair in PAIRS]
    assert len(set(apart)) == 2
    assert (done.exit_code, done.stdout.splitlines()) == (0, apart), done.stderr


def chat(model: Path, **options: Any) -> Chat:
    return open_chat(str(model), **{"max_tokens": 40, "temperature": 0.0} | options)


def test_a_conversation_is_remembered_until_it_is_reset(model: Path) -> None:
    talking = chat(model, system="be brief")
    parts: list[str] = []
    answer = talking.ask("a cat", parts.append)
    assert "".join(parts).strip() == answer
    roles = [message["role"] for message in talking.messages]
    assert roles == ["system", "user", "assistant"]
    talking.reset()
    assert [message["role"] for message in talking.messages] == ["system"]


def test_interrupting_ends_the_answer_and_not_the_conversation(model: Path) -> None:
    talking = chat(model)
    heard: list[str] = []

    def interrupted(part: str) -> None:
        heard.append(part)
        if len(heard) == 3:
            raise KeyboardInterrupt

    talking.ask("a cat", interrupted)
    assert len(heard) == 4
    assert heard[-1] == " ..."
    assert talking.messages[-1]["content"] == "".join(heard[:3]).strip()
    assert talking.ask("a dog", lambda part: None) is not None


def test_an_answer_stops_at_the_tokens_that_generation_config_names(model: Path, tmp_path: Path) -> None:
    talking = chat(model)
    said = talking.model.generate(
        **talking._inputs([{"role": "user", "content": "a cat"}]), do_sample=False, max_new_tokens=9, pad_token_id=0
    )
    folder = shutil.copytree(model, tmp_path / "model")
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [0, int(said[0, -9])]}))
    assert chat(folder).ask("a cat", lambda part: None) in ("", talking.tokenizer.decode(said[0, -9]).strip())


def test_a_conversation_that_is_too_long_is_told_and_left_as_it_was(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talking = chat(model)
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat " * 200))
    talk(talking)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "error: the conversation has" in printed.err
    assert talking.messages == []


def test_a_model_without_a_template_continues_what_it_is_given(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    talking = chat(folder)
    assert talking.tokenizer.chat_template is None
    assert talking.ask("the old cat", lambda part: None)
    assert talking.messages == []
    with pytest.raises(ConfigError, match="nothing to continue"):
        talking.ask("", lambda part: None)


def adapter(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": "base", "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings | changes), encoding="utf-8")
    (folder / "adapter_model.safetensors").touch()
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"auto_mapping": {"parent_library": "antigravity"}}, "auto_mapping names modules to import"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "megatron_config names modules to import"),
        ({"peft_type": "OFT"}, "only LORA is read"),
        ({"base_model_name_or_path": None}, "names no model"),
    ],
    ids=["auto_mapping", "megatron", "another kind", "no base"],
)
def test_an_adapter_that_would_import_what_it_names_is_refused(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        chat(adapter(tmp_path / "adapter", **changes))
    assert "antigravity" not in sys.modules


def test_an_adapters_pickle_is_not_read(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ConfigError, match=r"no adapter_model\.safetensors, and no other weights are read"):
        chat(folder)


def test_what_is_no_model_that_talks_is_told(run: Path, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes((run / "run.json").read_bytes())
    with pytest.raises(ConfigError, match="has written no model yet"):
        chat(tmp_path)
    (tmp_path / "run.json").write_text((run / "run.json").read_text().replace("text-generation", "fill-mask"))
    with pytest.raises(ConfigError, match="its model is for fill-mask, which is no conversation"):
        chat(tmp_path)
    with pytest.raises(ConfigError, match="no folder"):
        chat(tmp_path / "elsewhere")
