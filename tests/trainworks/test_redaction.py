"""A secret that the environment, a run file, an address or an error holds is found in no file and no line of a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import tiny
import yaml
from accelerate.utils import is_tensorboard_available, is_trackio_available

from trainworks.record import read_outcome, read_record
from trainworks.redaction import REDACTED, redacted

SECRETS = {
    "HF_TOKEN": "hf_" + "cAnArY7" * 5,
    "WANDB_API_KEY": "0f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c",
    "AWS_SECRET_ACCESS_KEY": "Tr0ub4dor/and+3=blanks",
    "DATABASE_PASSWORD": 'horse "battery" ☃ staple',
    "SIGNING_KEY": "one line\nand another line",
}
ADDRESS = "https://user:s3cr3t-w0rd@mirror.example/rows?X-Amz-Signature=f00dfeed00c0ffee"
HIDDEN = (*SECRETS.values(), "s3cr3t-w0rd", "f00dfeed00c0ffee")


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


# Words


@pytest.mark.usefixtures("secrets")
@pytest.mark.parametrize("name", SECRETS)
def test_what_the_environment_calls_a_secret_is_taken_out_wherever_it_stands(name: str) -> None:
    secret = SECRETS[name]
    value = {f"key {secret}": [f"before {secret} after", 7, {"deep": (secret, None, 0.5)}]}
    assert redacted(value) == {
        f"key {REDACTED}": [f"before {REDACTED} after", 7, {"deep": [REDACTED, None, 0.5]}],
    }
    assert redacted(f"https://host/?q={quote(secret, safe='')}") == f"https://host/?q={REDACTED}"


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("token hf_" + "a1" * 17, f"token {REDACTED}"),
        ("AKIA" + "Z" * 16, REDACTED),
        ("https://me:pass@word@host/x", f"https://{REDACTED}@host/x"),
        ("GET /x?access_token=abc&n=1", f"GET /x?access_token={REDACTED}&n=1"),
        ("Authorization: Bearer abcdef0123456789.x", f"Authorization: Bearer {REDACTED}"),
    ],
)
def test_what_looks_like_a_secret_is_taken_out(text: str, safe: str) -> None:
    assert redacted(text) == safe


@pytest.mark.parametrize(
    "text",
    [
        "hf_transfer and sk-learn are libraries, a ghost_story and risk-averse words",
        "write to someone@example.org, see https://example.org/a@b",
        "a basic understanding, a bearer of news",
        "key=value, tokens=9, the password is missing",
        "<|endoftext|>",
        "00000000",
    ],
)
def test_other_words_stay(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "understanding")
    monkeypatch.setenv("API_KEY", "key")
    monkeypatch.setenv("PASSWORD", "00000000")
    monkeypatch.setenv("HF_TOKEN_PATH", "someone@example.org")
    assert redacted(text) == text


# Whole runs


@dataclass(frozen=True)
class Ended:
    code: int
    said: str


FAILURE = """
import os, runpy, sys, threading
import trainworks.loop

def fail(*_):
    raise RuntimeError(f"refused {os.environ['HF_TOKEN']} at {os.environ['MIRROR']}")

def step(*_):
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    try:
        raise ValueError(os.environ["DATABASE_PASSWORD"] + os.environ["SIGNING_KEY"])
    except ValueError:
        fail()

sys.argv = ["finetune", *sys.argv[1:]]
if sys.argv.pop() == "fail":
    trainworks.loop.learning_rate = step
runpy.run_module("finetune", run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A user's folder whose run file holds secrets where nobody looks for them."""
    trackers = [name for name, there in TRACKERS.items() if there]
    config: dict[str, Any] = {
        "output": "out",
        "about": f"Rows of {ADDRESS}, logged with {SECRETS['WANDB_API_KEY']}.",
        "task": {"type": "sft", "max_length": 128},
        "model": {"name": str(tiny.save_model(tmp_path / "model", "sft"))},
        "data": {"source": str(tiny.save_rows(tmp_path / "rows.jsonl", "sft", 30)), "holdout": 0.2},
        "batch": {"per_step": 8},
        "budget": {"steps": 2},
        "optim": {"lr": 1e-3},
        "every": {"log": 1, "save": 1},
        "trackers": trackers,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return tmp_path


TRACKERS = {"tensorboard": is_tensorboard_available(), "trackio": is_trackio_available()}


def finetune(place: Path, how: str, *overrides: str) -> Ended:
    """Run the command as a process of its own, all its caches in the place."""
    places = {name: str(place / "home" / name) for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME", "TRAINWORKS_CACHE")}
    words = [sys.executable, "-c", FAILURE, "run.yaml", *overrides, how]
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    environment = os.environ | SECRETS | {"MIRROR": ADDRESS} | places | {"PYTHONPATH": path}
    done = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True, timeout=300, check=False)
    return Ended(done.returncode, done.stdout + done.stderr)


def found(place: Path, ended: Ended) -> Iterator[str]:
    """Yield where a secret stands: in which file that the run wrote, or in its output; escaped as JSON and YAML do,
    too."""
    written = [path for folder in ("out", "home") for path in (place / folder).rglob("*") if path.is_file()]
    assert len(written) > 15
    for secret in HIDDEN:
        forms = {secret, quote(secret, safe=""), repr(secret)[1:-1], json.dumps(secret)[1:-1]}
        forms |= {json.dumps(secret, ensure_ascii=False)[1:-1], *(line for line in secret.splitlines() if " " in line)}
        yield from (f"{secret!r} in the output" for form in forms if form in ended.said)
        yield from (f"{secret!r} in {path}" for path in written for form in forms if form.encode() in path.read_bytes())


@pytest.mark.slow
@pytest.mark.faults
def test_a_run_writes_and_shows_no_secret(place: Path) -> None:
    ended = finetune(place, "train")
    assert ended.code == 0, ended.said
    assert list(found(place, ended)) == []
    assert REDACTED in read_record(place / "out").config["about"]
    assert "&lt;redacted&gt;" in (place / "out" / "model" / "README.md").read_text(encoding="utf-8")
    again = finetune(place, "train", "budget.steps=3")
    assert "holds another run" in again.said
    assert "about:" not in again.said, "what is redacted is no difference"


@pytest.mark.slow
@pytest.mark.faults
def test_an_error_nobody_foresaw_shows_no_secret(place: Path) -> None:
    ended = finetune(place, "fail")
    assert ended.code == 1
    assert list(found(place, ended)) == []
    assert ended.said.count(f"RuntimeError: refused {REDACTED} at ") == 2, "from the thread and from the run"
    assert f"ValueError: {REDACTED}{REDACTED}" in ended.said
    assert ended.said.count("Traceback") == 3
    outcome = read_outcome(place / "out")
    assert (outcome.code, outcome.reason.split(" at ")[0]) == (1, f"RuntimeError: refused {REDACTED}")
