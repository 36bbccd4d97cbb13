"""The run files that are shipped: each is valid, says how it is started, and is what an editor's schema allows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

import finetune
import pretrain
from model_cards.vocabulary import LICENSES
from trainworks.cli import run_schema
from trainworks.config import load
from trainworks.schema import FromScratch, RunConfig
from trainworks.tasks import TASKS
from trainworks.yaml_document import Document

ROOT = Path(__file__).parents[1]
PACKAGES: dict[str, type[RunConfig[Any]]] = {"pretrain": pretrain.Config, "finetune": finetune.Config}
FILES = sorted(file for package in PACKAGES for file in (ROOT / "configs" / package).glob("*.yaml"))
SCHEMA = ROOT / "configs" / "schema.json"
MODELINE = "# yaml-language-server: $schema=../schema.json"

each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")


def read(file: Path) -> RunConfig[Any]:
    return load(file, model=PACKAGES[file.parent.name])


def head(file: Path) -> list[str]:
    """Return the comment a file opens with."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))]


def plain(file: Path) -> dict[str, Any]:
    """Return a file as an editor sees it: values of YAML 1.2, nothing filled in."""
    document = Document()
    document.read(file.read_text(encoding="utf-8"), file.name)
    assert not document.problems
    return document.data


def test_there_are_run_files_for_every_task_and_way_to_begin() -> None:
    configs = [read(file) for file in FILES]
    assert len(configs) >= 10
    assert {config.task.type for config in configs} == set(TASKS)
    assert {config.tuning.type for config in configs} == {"full", "lora"}
    assert {isinstance(config.model, FromScratch) for config in configs} == {True, False}


@each_file
def test_a_run_file_is_valid_and_its_licence_known_to_the_hub(file: Path) -> None:
    config = read(file)
    assert config.hub is not None
    assert config.hub.license in LICENSES
    assert not config.hub.push, "a shipped file must not upload by itself"


@each_file
def test_a_run_file_opens_with_what_it_is_and_the_command_that_starts_it(file: Path) -> None:
    first, *_, last = head(file)
    assert len(first) <= 120, "`trainworks configs` shows this line"
    assert re.search(r"(CPU|GPUs?)\b.*(minutes?|hours?)\b", first), "the first line says the hardware and the time"
    name = file.relative_to(ROOT).as_posix()
    command = rf"#   accelerate launch --config_file (configs/accelerate/\w+\.yaml) -m {file.parent.name} {name}"
    found = re.fullmatch(command, last)
    assert found, last
    assert (ROOT / found[1]).is_file()


@each_file
def test_a_time_that_nobody_measured_is_called_estimated(file: Path) -> None:
    assert ("(estimated)" in head(file)[0]) == (file.stem != "demo")


@each_file
def test_an_editor_finds_the_schema(file: Path) -> None:
    lines = [line for line in head(file) if "yaml-language-server" in line]
    assert lines == ([] if file.stem == "demo" else [MODELINE])


@each_file
def test_a_run_file_is_what_the_schema_allows(file: Path) -> None:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    Draft202012Validator({**schema["$defs"][file.parent.name], "$defs": schema["$defs"]}).validate(plain(file))
    Draft202012Validator(schema).validate(plain(file))


def test_the_schema_refuses_what_no_run_file_may_say() -> None:
    validator = Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))
    right = plain(FILES[0])
    assert validator.is_valid(right)
    assert not validator.is_valid(right | {"epochs": 3})
    assert not validator.is_valid(right | {"optim": {"lr": "fast"}})


def test_the_schema_on_disk_is_the_one_the_code_gives() -> None:
    assert json.loads(SCHEMA.read_text(encoding="utf-8")) == run_schema(), (
        "run: trainworks schema --write configs/schema.json"
    )


def test_no_two_run_files_write_to_one_folder_or_repository() -> None:
    configs = [read(file) for file in FILES]
    for values in ([config.output for config in configs], [config.hub.repo for config in configs if config.hub]):
        assert len(values) == len(set(values)) == len(FILES)
    assert all(config.output.startswith("runs/") for config in configs), "git ignores runs/"


def test_every_run_file_that_a_hardware_file_names_is_there() -> None:
    files = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
    named = {
        name for file in files for name in re.findall(r"configs/(?:pretrain|finetune)/\S+\.yaml", file.read_text())
    }
    assert len(named) >= 3
    assert {name for name in named if not (ROOT / name).is_file()} == set()
