"""The `trainworks` command: light to start, and each of its answers and errors."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner

import finetune
import pretrain
from trainworks.cli import app, run_schema
from trainworks.config import load
from trainworks.record import (
    DataFacts,
    Environment,
    Estimate,
    EvalReport,
    ModelFacts,
    RunRecord,
    SplitFacts,
    write_json,
)
from trainworks.shipped import configs_folder

ROOT = Path(__file__).parents[2]
HEAVY = ("accelerate", "datasets", "evaluate", "matplotlib", "numpy", "peft", "pyarrow", "torch", "transformers")
COMMANDS = (
    "card",
    "chat",
    "configs",
    "outcome",
    "prepare",
    "preview",
    "publish",
    "schema",
    "selfcheck",
    "tokenizer",
    "verify-resume",
)


def answer(*arguments: str) -> Any:
    """Run the command line in this process."""
    return CliRunner().invoke(app, list(arguments))


def refused(code: int, message: str, *arguments: str) -> None:
    result = answer(*arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith("error: ")
    assert message in result.stderr


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a finished run, as small as one can be."""
    split = SplitFacts(name="train", rows=4, samples=4, tokens=40, counted=40)
    facts = {"architecture": "LlamaForCausalLM", "num_parameters": 100, "num_trainable": 100}
    loss = Estimate(value=1.0, low=0.9, high=1.1, n=4, higher_is_better=False)
    report = EvalReport(
        name="final", split="validation", step=1, is_baseline=False, num_examples=4, metrics={"loss": loss}
    )
    versions = dict.fromkeys(("trainworks", "torch", "transformers", "accelerate", "peft", "datasets"), "1.0")
    record = RunRecord(
        kind="finetune",
        status="complete",
        started="2025-01-01T00:00:00+00:00",
        command="accelerate launch -m finetune run.yaml",
        config={
            "output": str(tmp_path),
            "task": {"type": "sft", "max_length": 64},
            "model": {"name": "someone/llama", "revision": "main", "dtype": "float32"},
            "tuning": {"type": "full"},
            "data": {"source": "rows.jsonl"},
            "optim": {"name": "adamw", "lr": 1e-3},
            "hub": {"repo": "someone/model", "private": True, "license": "apache-2.0", "language": [], "push": False},
        },
        task="sft",
        pipeline_tag="text-generation",
        data=DataFacts(source="rows.jsonl", fingerprint="0" * 64, processor="1" * 64, splits=(split,)),
        model=ModelFacts(
            name="someone/llama", revision="a" * 40, fingerprint="2" * 64, tuning="full", dtype="float32", **facts
        ),
        environment=Environment(
            python="3.11.0",
            platform="Linux",
            versions=versions,
            device="a processor",
            world_size=1,
            distributed="NO",
            mixed_precision="no",
        ),
        per_step=4,
        micro=4,
        steps_total=1,
        step=1,
        samples=4,
        tokens=40,
        epochs=1.0,
        reports=(report,),
    )
    record.write(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"\0" * 100)
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "model" / name).write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    "arguments", [["--help"], ["configs"], ["publish", "--help"], ["prepare", "--help"]], ids=" ".join
)
def test_the_command_answers_without_a_heavy_library(arguments: list[str]) -> None:
    probe = (
        "import atexit, sys; from trainworks.cli import main; sys.argv = ['trainworks', *sys.argv[1:]]\n"
        f"atexit.register(lambda: print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr))\n"
        "main()"
    )
    command = [sys.executable, "-c", probe, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr == "[]\n"
    assert len(done.stdout) > 100


def cpu_seconds(*arguments: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], capture_output=True, check=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_costs_little_work_of_its_own(record_property: pytest.RecordProperty) -> None:
    bare = min(cpu_seconds("-c", "pass") for _ in range(3))
    own = min(cpu_seconds("-m", "trainworks.cli", "--help") for _ in range(3)) - bare
    record_property("own_cpu_seconds", own)
    assert own < 1.0, "0.3 s is the aim; a busy machine may take some more, a heavy import takes seconds"


def test_help_names_every_command() -> None:
    result = answer("--help")
    assert result.exit_code == 0
    assert [name for name in COMMANDS if f" {name} " not in result.stdout] == []


def test_a_command_that_does_not_exist_is_refused_by_2() -> None:
    result = answer("confgs")
    assert result.exit_code == 2
    assert "confgs" in result.stderr


def test_importing_the_package_imports_no_torch_until_a_name_needs_it() -> None:
    there = "print('torch' in sys.modules)"
    probe = f"import sys, trainworks; trainworks.LoRA; {there}; trainworks.train_steps; {there}"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "False\nTrue\n"


# configs


def test_configs_lists_every_file_with_what_it_is() -> None:
    result = answer("configs")
    files = sorted(path.relative_to(configs_folder()) for path in configs_folder().rglob("*.yaml"))
    assert len(files) >= 6
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.splitlines()] == [str(path) for path in files]
    assert all(len(line) > 50 for line in result.stdout.splitlines())


def test_configs_are_copied_into_a_new_or_empty_folder(tmp_path: Path) -> None:
    for target in (tmp_path / "deep" / "configs", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert answer("configs", "--copy", str(target)).exit_code == 0
        copied = {path.relative_to(target): path.read_bytes() for path in target.rglob("*") if path.is_file()}
        shipped = {
            path.relative_to(configs_folder()): path.read_bytes()
            for path in configs_folder().rglob("*")
            if path.is_file()
        }
        assert copied == shipped


def test_configs_overwrite_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("mine")
    (tmp_path / "file").write_text("mine")
    refused(2, "is not empty", "configs", "--copy", str(tmp_path))
    refused(2, "is a file", "configs", "--copy", str(tmp_path / "file"))
    refused(2, "cannot be written", "configs", "--copy", str(tmp_path / "file" / "deep"))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"mine.yaml": "mine", "file": "mine"}


# schema


def test_the_schema_takes_every_shipped_run_file_and_refuses_a_misspelt_one(tmp_path: Path) -> None:
    assert answer("schema", "--write", str(tmp_path / "schema.json")).exit_code == 0
    schema = json.loads((tmp_path / "schema.json").read_text())
    assert schema == run_schema() == json.loads(answer("schema").stdout)
    checker = jsonschema.Draft202012Validator(schema)
    kinds = {"pretrain": pretrain.Config, "finetune": finetune.Config}
    files = [(path, model) for kind, model in kinds.items() for path in (configs_folder() / kind).glob("*.yaml")]
    assert len(files) >= 2
    for path, model in files:
        value = json.loads(load(path, [], model=model).model_dump_json())
        assert list(checker.iter_errors(value)) == [], path.name
        assert not checker.is_valid(value | {"optin": {}})


def test_a_schema_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    refused(2, "cannot be written", "schema", "--write", str(tmp_path / "no" / "schema.json"))


# card and publish


def test_the_card_is_built_from_the_record_alone(run: Path) -> None:
    result = answer("card", str(run))
    assert result.exit_code == 0, result.stderr
    assert Path(result.stdout.strip()) == run / "model" / "README.md"
    assert "license: apache-2.0" in (run / "model" / "README.md").read_text()


@pytest.mark.parametrize("command", ["card", "publish"])
def test_a_folder_that_is_no_run_is_told(command: str, tmp_path: Path) -> None:
    refused(3, "not the folder of a run", command, str(tmp_path))
    refused(3, "not the folder of a run", command, str(tmp_path / "missing"))
    (tmp_path / "run.json").write_text("{")
    refused(3, "cannot be read as a run record", command, str(tmp_path))
    write_json(tmp_path / "run.json", {"schema_version": 99})
    refused(3, "record schema 99", command, str(tmp_path))


def test_a_dry_run_lists_every_file_with_size_and_hash_and_needs_no_network(run: Path) -> None:
    result = answer("publish", str(run), "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "someone/model" in result.stdout
    assert "dry run, nothing was uploaded" in result.stdout
    lines = {line.split()[0]: line.split() for line in result.stdout.splitlines() if line.startswith("  ")}
    assert {"README.md", "config.json", "model.safetensors", "run.json", "tokenizer.json"} <= lines.keys()
    assert lines["model.safetensors"][1:3] == ["100", "B"]
    assert all(len(line[-1]) == 64 for line in lines.values())


def test_another_repository_may_be_named(run: Path) -> None:
    assert "other/name" in answer("publish", str(run), "--dry-run", "--repo", "other/name").stdout
    refused(3, "no name the Hub takes", "publish", str(run), "--dry-run", "--repo", "noname")


def test_a_run_without_a_repository_is_told(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    record["config"]["hub"] = None
    write_json(run / "run.json", record)
    refused(2, "give --repo owner/name", "publish", str(run), "--dry-run")


def test_a_run_without_weights_is_told(run: Path) -> None:
    (run / "model" / "model.safetensors").unlink()
    refused(3, "holds no weights", "publish", str(run), "--dry-run")


def test_a_run_that_was_not_exported_is_told(run: Path) -> None:
    for path in (run / "model").iterdir():
        path.unlink()
    (run / "model").rmdir()
    refused(3, "no such folder", "publish", str(run), "--dry-run")


# outcome


@pytest.mark.parametrize("code", [0, 1, 2, 3, 75, 130])
def test_outcome_exits_by_the_code_of_the_last_process(code: int, tmp_path: Path) -> None:
    write_json(tmp_path / "outcome.json", {"code": code, "reason": "so it went"})
    result = answer("outcome", str(tmp_path))
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", "so it went\n")


def test_an_outcome_that_is_missing_or_broken_is_told(tmp_path: Path) -> None:
    refused(3, "no outcome can be read", "outcome", str(tmp_path))
    (tmp_path / "outcome.json").write_text('{"code": "x"}')
    refused(3, "no outcome can be read", "outcome", str(tmp_path))
