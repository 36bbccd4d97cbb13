"""The README says what is so: its examples are valid, its commands name what exists, its links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any
from unittest.mock import Mock, create_autospec

import pytest
import typer

import finetune
import model_cards
import trainworks
from trainworks.cli import app
from trainworks.config import load, parse, resolved

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def fenced(language: str) -> list[str]:
    """Return the text of the fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """Return the shell commands, each as its words."""
    lines = "".join(fenced("sh")).splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run_file() -> str:
    (text,) = fenced("yaml")
    return text


def test_the_run_file_is_ten_lines_of_the_shipped_one() -> None:
    assert len(run_file().splitlines()) == 10
    shown = parse(run_file(), name="README.md", model=finetune.Config)
    shipped = load(ROOT / "configs" / "finetune" / "sst2-lora.yaml", model=finetune.Config)
    assert resolved(shown) | {"every": None} == resolved(shipped) | {"every": None}


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Let nothing load or upload, and check how each function is called."""
    places = {"prepare": finetune, "fit": finetune, "export": trainworks, "publish": model_cards, "build": model_cards}
    made = {name: create_autospec(getattr(module, name)) for name, module in places.items()}
    for name, module in places.items():
        monkeypatch.setattr(module, name, made[name])
    return made


def test_the_library_example_runs_and_says_the_same_as_the_file(stubs: dict[str, Mock]) -> None:
    (example,) = fenced("python")
    names: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), names)
    assert all(stub.call_count == 1 for stub in stubs.values())
    assert stubs["publish"].call_args.kwargs["dry_run"] is True
    file = parse(run_file(), name="README.md", model=finetune.Config)
    extra = {"goal": None, "hub": None}
    assert resolved(names["config"]) == resolved(file) | extra
    assert stubs["publish"].call_args.kwargs["repo"] == (file.hub and file.hub.repo)


def test_every_command_names_what_exists() -> None:
    checks = {"accelerate": check_launch, "trainworks": check_command}
    found = commands()
    assert len(found) >= 5
    for words in found:
        checks.get(words[0], check_script)(words)


def check_script(words: list[str]) -> None:
    script = ROOT / words[0]
    assert words[0].startswith("./scripts/"), words
    assert os.access(script, os.X_OK), f"{script} cannot be run"


def check_launch(words: list[str]) -> None:
    """Read the command as the launcher and then the package would, overrides included."""
    launch, option, hardware, module, package, run, *overrides = words[1:]
    assert (launch, option, module) == ("launch", "--config_file", "-m"), words
    assert (ROOT / hardware).is_file()
    assert (ROOT / package / "__main__.py").is_file()
    load(ROOT / run, overrides, model=finetune.Config)


def check_command(words: list[str]) -> None:
    """Let the subcommand itself read the words; it is not called."""
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    assert words[1] in group.commands, words
    group.commands[words[1]].make_context(words[1], words[2:])


def test_every_link_leads_to_a_file() -> None:
    links = [link for link in re.findall(r"(?<!!)\[[^\]]*\]\(([^)]+)\)", README) if "://" not in link]
    assert len(links) >= 10
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_tree_names_every_folder() -> None:
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    folders = {name.partition("/")[0] for name in files if "/" in name and not name.startswith(".")}
    named = set(re.findall(r"^(\w+)/ {2,}\S", README, flags=re.MULTILINE))
    assert len(folders) >= 6
    assert folders <= named
