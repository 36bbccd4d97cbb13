"""The commands as a user meets them: what is wrong is said at once, and what is right ends in a model that loads."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
import yaml
from hub_server import TOKEN, HubServer, reached
from peft import PeftModel
from transformers import AutoTokenizer

import finetune.recipe
import pretrain.recipe
import trainworks.exporting
from trainworks import Run, read_record
from trainworks.errors import ConfigError
from trainworks.record import read_outcome, write_json
from trainworks.stopping import Stopped

ROOT = Path(__file__).parents[2]
OWN_SECONDS = 2.0
"""What a command may work, its imports not counted, until it says what is wrong."""

RUNS: dict[str, dict[str, Any]] = {
    "sft": {
        "task": {"type": "sft", "max_length": 128},
        "model": {"name": "./models/sft"},
        "data": {"source": "sft.jsonl", "holdout": 0.2},
    },
    "classification": {
        "task": {"type": "sequence-classification", "max_length": 64},
        "model": {"name": "./models/sequence-classification"},
        "data": {"source": "sequence-classification.jsonl", "holdout": 0.2},
    },
    "new": {
        "task": {"type": "causal-lm", "block": 16},
        "model": {
            "architecture": "llama",
            "sizes": tiny.SIZES | {"max_position_embeddings": 64},
            "tokenizer": {"vocab_size": 300},
        },
        "data": {"source": "causal-lm.jsonl", "holdout": 0.2},
    },
}
COMMON = {"output": "out", "batch": {"per_step": 8}, "budget": {"steps": 3}, "optim": {"lr": 1e-3}, "every": {"log": 1}}
PACKAGES = {"sft": "finetune", "classification": "finetune", "new": "pretrain"}


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, what it printed, and the seconds it took."""

    code: int
    out: str
    said: str
    seconds: float


Command = Callable[..., Ended]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: run files, rows and models, with some that are broken."""
    folder = tmp_path_factory.mktemp("user")
    for task in ("sft", "sequence-classification", "causal-lm"):
        tiny.save_rows(folder / f"{task}.jsonl", task, 30)
    for task in ("sft", "sequence-classification"):
        tiny.save_model(folder / "models" / task, task)
    for name, run in RUNS.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(COMMON | run), encoding="utf-8")
    lay_out_mistakes(folder)
    return folder


def lay_out_mistakes(folder: Path) -> None:
    (folder / "empty.jsonl").touch()
    save_rows(folder / "unnamed.jsonl", [{"question": "a", "answer": "b"}] * 4)
    save_rows(folder / "roles.jsonl", [{"messages": [{"role": "robot", "content": "a"}]}] * 4)
    save_rows(folder / "mute.jsonl", [{"messages": [{"role": "user", "content": "a"}]}] * 4)
    long = {"prompt": "a", "completion": "the cat sees " * 90}
    save_rows(folder / "long.jsonl", [*tiny.rows("sft", 9), long])
    sft = folder / "models" / "sft"
    for name, missing in {
        "no-config": ["config.json"],
        "no-weights": ["model.safetensors"],
        "no-tokenizer": ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"],
        "no-template": ["chat_template.jinja"],
    }.items():
        shutil.copytree(sft, folder / "models" / name, ignore=shutil.ignore_patterns(*missing))
    for name, file, content in [
        ("broken-config", "config.json", b"{"),
        ("broken-weights", "model.safetensors", b"not weights at all"),
        ("broken-tokenizer", "tokenizer.json", b"{}"),
        ("unknown-type", "config.json", b'{"model_type": "lama"}'),
        ("vision", "config.json", b'{"model_type": "vit"}'),
        ("code", "config.json", b'{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}'),
        ("pickled", "pytorch_model.bin", b"weights"),
    ]:
        shutil.copytree(sft, folder / "models" / name)
        (folder / "models" / name / file).write_bytes(content)
    (folder / "models" / "pickled" / "model.safetensors").unlink()
    (folder / "models" / "nothing").mkdir()
    (folder / "models" / "adapter").mkdir()
    (folder / "models" / "adapter" / "adapter_config.json").write_text("{}")
    (folder / "file").write_text("mine")
    (folder / "full").mkdir()
    (folder / "full" / "thesis.txt").write_text("mine")


def save_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def command(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """Run `python -m PACKAGE` on a run file in this process, as if typed in the user's folder."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("TRAINWORKS_CACHE", str(place / ".cache"))
    monkeypatch.setattr(os, "_exit", sys.exit)  # this process is for more than the command
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}

    def run(name: str, *overrides: str) -> Ended:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["-m", f"{name}.yaml", *overrides])
        begun = time.perf_counter()
        with pytest.raises(SystemExit) as end:
            runpy.run_module(PACKAGES[name], run_name="__main__", alter_sys=False)
        seconds = time.perf_counter() - begun
        printed = capsys.readouterr()
        return Ended(int(end.value.code or 0), printed.out, printed.err, seconds)

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail when weights are read or made."""

    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(finetune.recipe, "load", loaded)
    monkeypatch.setattr(pretrain.recipe, "load", loaded)
    monkeypatch.setattr(pretrain.recipe, "initialise", loaded)


def files(folder: Path) -> dict[str, bytes]:
    """Return every file of the user's, what only says how a run ended left out."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.relative_to(folder).parts[0] not in (".cache", "out")
    }


MISTAKES: dict[str, tuple[str, list[str], int, str]] = {
    # name: run file, overrides, exit code, what the message holds
    "unknown key": ("sft", ["color=red"], 2, r"color: unknown key; known: output"),
    "misspelt key": ("sft", ["optim.schedul=linear"], 2, r"optim\.schedul: unknown key.*'schedule'"),
    "two budgets": ("sft", ["budget.epochs=1"], 2, r"exactly one of epochs, steps, tokens; found epochs and steps"),
    "missing data file": ("sft", ["data.source=stf.jsonl"], 2, r"data\.source: no file .*stf\.jsonl.*sft\.jsonl"),
    "missing data folder": ("sft", ["data.source=./rows"], 2, r"data\.source: no file or folder \./rows"),
    "empty data file": ("sft", ["data.source=empty.jsonl"], 2, r"empty\.jsonl: the file is empty"),
    "no column": ("classification", ["task.text=sentence"], 2, r"no column 'sentence'.*data\.columns"),
    "no shape": ("sft", ["data.source=unnamed.jsonl"], 2, r"no known shape of conversation.*question, answer"),
    "label": ("classification", ["task.labels=[good,bad]"], 2, r"'so-so'.*the 2 classes are: good, bad"),
    "role": ("sft", ["data.source=roles.jsonl"], 2, r"jsonl:1: row 0 .*turn 0: role 'robot'.*allowed: system, dev"),
    "nothing said": ("sft", ["data.source=mute.jsonl"], 2, r"mute\.jsonl:4: row 3 .*nothing to learn"),
    "too long": (
        "sft",
        ["data.source=long.jsonl"],
        2,
        r"jsonl:10: row 9 .*\d+ tokens, task\.max_length is 128.*too_long",
    ),
    "no held-out rows": ("sft", ["data.holdout=0", "goal={metric: loss, at_most: 9}"], 2, r"goal.*no rows"),
    "another folder's files": ("sft", ["output=full"], 2, r"output: full holds files that are not a run's"),
    "a file for a folder": ("sft", ["output=file"], 2, r"output: file"),
    "a folder in a file": ("sft", ["output=file/run"], 2, r"output: file/run"),
    "no model folder": ("sft", ["model.name=./models/stf"], 2, r"model\.name: no folder \./models/stf.*'sft'"),
    "no deep model folder": ("sft", ["model.name=models/no/such"], 2, r"model\.name: no folder models/no/such"),
    "a run for its model": ("sft", ["model.name=./models"], 2, r"models holds no config\.json.*did you mean 'models/"),
    "an adapter for a model": ("sft", ["model.name=./models/adapter"], 2, r"models/adapter holds an adapter alone"),
    "code in a model folder": ("sft", ["model.name=./models/code"], 2, r"models/code.*custom code"),
    "empty model folder": ("sft", ["model.name=./models/nothing"], 2, r"models/nothing.*config\.json"),
    "no config": ("sft", ["model.name=./models/no-config"], 2, r"models/no-config.*config\.json"),
    "no weights": ("sft", ["model.name=./models/no-weights"], 2, r"models/no-weights.*safetensors"),
    "pickled weights": ("sft", ["model.name=./models/pickled"], 2, r"models/pickled.*safetensors"),
    "no tokenizer": ("sft", ["model.name=./models/no-tokenizer"], 2, r"models/no-tokenizer.*tokenizer"),
    "broken config": ("sft", ["model.name=./models/broken-config"], 2, r"models/broken-config"),
    "broken tokenizer": ("sft", ["model.name=./models/broken-tokenizer"], 2, r"models/broken-tokenizer"),
    "broken weights": ("sft", ["model.name=./models/broken-weights"], 2, r"models/broken-weights.*safetensors"),
    "unknown model type": ("sft", ["model.name=./models/unknown-type"], 2, r"models/unknown-type.*lama"),
    "no template": ("sft", ["model.name=./models/no-template"], 2, r"no chat template.*task\.template"),
    "no template file": ("sft", ["task.template=chat.jinja"], 2, r"task\.template: chat\.jinja: cannot be read"),
    "wrong kind of model": (
        "classification",
        ["model.name=./models/vision"],
        2,
        r"Unrecognized configuration class.*ViT",
    ),
    "architecture": ("new", ["model.architecture=lama"], 2, r"model\.architecture.*'lama'.*did you mean 'llama'"),
    "sizes": ("new", ["model.sizes.hiden_size=8"], 2, r"model\.sizes\.hiden_size.*did you mean 'hidden_size'"),
    "size's kind": ("new", ["model.sizes.hidden_size=wide"], 2, r"model\.sizes.*hidden_size"),
    "sizes that do not fit": ("new", ["model.sizes.num_attention_heads=5"], 2, r"model\.sizes"),
    "vocabulary": ("new", ["model.tokenizer.vocab_size=99"], 2, r"model\.tokenizer\.vocab_size: 99"),
    "LoRA option": ("sft", ["tuning={type: lora, options: {use_rslor: true}}"], 2, r"use_rslor.*'use_rslora'"),
    "LoRA option's name": ("sft", ["tuning={type: lora, options: {r: 4}}"], 2, r"tuning\.options\.r: say tuning\.rank"),
    "LoRA option's value": ("sft", ["tuning={type: lora, options: {bias: some}}"], 2, r"tuning.*bias"),
    "a LoRA target": (
        "sft",
        ["tuning={type: lora, targets: [q_proj, qproj]}"],
        2,
        r"tuning\.targets.*'qproj'.*'q_proj'",
    ),
    "LoRA's other layers": (
        "sft",
        ["tuning={type: lora, options: {modules_to_save: [lmhead]}}"],
        2,
        r"tuning\.options\.modules_to_save.*'lmhead'.*'lm_head'",
    ),
    "LoRA targets": ("sft", ["tuning={type: lora, targets: [qproj]}"], 2, r"tuning.*qproj.*q_proj"),
    "metric": ("classification", ["metrics=[./metrics/acuracy]"], 2, r"metric '\./metrics/acuracy': no `evaluate`"),
    "metric offline": ("classification", ["metrics=[f1]"], 2, r"metric 'f1': no `evaluate` module"),
    "metric of no prediction": ("sft", ["metrics=[f1]"], 2, r"metrics: .*sft.*no predictions"),
    "goal": ("classification", ["goal={metric: acuracy, at_least: 1}"], 2, r"goal\.metric.*'accuracy'"),
    "Hub model offline": ("sft", ["model.name=someone/llama"], 3, r"someone/llama: not a folder.*HF_HUB_OFFLINE"),
    "Hub data offline": ("sft", ["data.source=someone/rows"], 3, r"someone/rows.*offline"),
    "Hub tokenizer offline": (
        "new",
        ["model.tokenizer=someone/llama"],
        3,
        r"someone/llama: not a folder.*HF_HUB_OFFLINE",
    ),
}


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_message_before_a_model_loads(name: str, command: Command, place: Path) -> None:
    run, overrides, code, message = MISTAKES[name]
    before = files(place)
    ended = command(run, *overrides)
    assert_refused(ended, code, message)
    assert files(place) == before


def assert_refused(ended: Ended, code: int, message: str) -> None:
    assert ended.code == code, ended.said
    assert "Traceback" not in ended.said
    assert ended.said.startswith("error: "), ended.said
    assert re.search(message, ended.said.replace("\n", " ")), ended.said
    assert ended.seconds < OWN_SECONDS


def test_a_gpu_that_is_asked_for_and_not_there_is_told(
    command: Command, place: Path, no_model: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert_refused(command("sft"), 3, "the hardware file asks for a GPU and torch sees none here.*cpu.yaml")
    assert read_outcome(place / "out").code == 3


@pytest.mark.parametrize("precision", ["fp16", "fp8"])
def test_a_precision_that_is_not_supported_is_told(
    precision: str, command: Command, no_model: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    assert_refused(command("sft"), 3, f"mixed_precision: {precision} is not supported")


# The Hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with reached(monkeypatch) as server:
        yield server


BAD_TOKENS = ["hf_" + "b" * 34, "not a token", "garbage\nX-Header: y", "hf_\u2603"]
PUSH = "hub={repo: someone/model, license: mit, push: true}"


@pytest.mark.parametrize("token", BAD_TOKENS)
@pytest.mark.parametrize("override", [PUSH, "model.name=someone/llama", "data.source=someone/rows"])
def test_a_bad_token_is_told_and_not_shown(
    token: str, override: str, command: Command, no_model: None, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    ended = command("sft", override)
    assert_refused(ended, 3, "token|HF_TOKEN|UnicodeEncodeError")
    assert token not in ended.said


def test_a_token_of_somebody_else_is_told(
    command: Command, no_model: None, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert_refused(command("sft", PUSH.replace("someone", "stranger")), 3, "belongs to someone, .*not stranger")


def test_a_hub_that_does_not_answer_is_told_at_once(
    command: Command, no_model: None, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.fail("someone/llama", None, times=99)
    assert_refused(command("sft", "model.name=someone/llama"), 3, "someone/llama: the Hub cannot be reached")


def test_a_model_on_the_hub_without_safetensors_is_told(
    command: Command, no_model: None, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.add("someone/llama", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    assert_refused(command("sft", "model.name=someone/llama"), 2, "someone/llama holds no safetensors")
    assert not any("pytorch_model.bin" in request for request in hub.requests)


# Whole runs


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """The live runs that were exported."""
    exported: list[Run] = []
    export = trainworks.exporting.export

    def remembered(run: Run) -> Path:
        exported.append(run)
        return export(run)

    monkeypatch.setattr(trainworks.exporting, "export", remembered)
    return exported


def logits(model: Any, task: str) -> Any:
    batch = tiny.tokenizer()(["the cat sees", "a red bird"], return_tensors="pt")
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"]).logits


LORA = "tuning={type: lora, rank: 4, merge: true}"


@pytest.mark.parametrize("override", ["tuning={type: full}", LORA], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["sft", "classification"])
def test_an_exported_model_gives_the_logits_of_the_live_one(
    name: str, override: str, command: Command, runs: list[Run], tmp_path: Path
) -> None:
    ended = command(name, f"output={tmp_path / 'run'}", override, "optim.lr=1e-2", "optim.schedule=constant")
    assert ended.code == 0, ended.said
    (run,) = runs
    folder, record = tmp_path / "run" / "model", read_record(tmp_path / "run")
    assert {"README.md", "run.json", "curve.png", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    assert (record.status, record.step, read_outcome(tmp_path / "run").code) == ("complete", 3, 0)
    assert read_record(folder) == record
    assert AutoTokenizer.from_pretrained(folder)("a red bird")["input_ids"]

    expected = logits(run.model, name)
    auto = getattr(transformers, run.task.auto_class)
    base = auto.from_pretrained(run.config.model.name, **run.task.head())
    if override is LORA:
        assert not list(folder.glob("model*.safetensors")), "an adapter's folder holds no whole model"
        adapted = PeftModel.from_pretrained(base, str(folder))
        assert torch.allclose(logits(adapted, name), expected, atol=1e-5)
        folder = tmp_path / "run" / "merged"
    else:
        assert not torch.allclose(logits(base, name), expected, atol=1e-3), "training changed nothing"
    loaded = auto.from_pretrained(folder)
    assert torch.allclose(logits(loaded, name), expected, atol=1e-5)
    assert AutoTokenizer.from_pretrained(folder).chat_template == tiny.tokenizer().chat_template


def test_a_model_from_scratch_is_exported_with_its_new_tokenizer(
    command: Command, runs: list[Run], tmp_path: Path
) -> None:
    assert command("new", f"output={tmp_path / 'run'}").code == 0
    folder = tmp_path / "run" / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("a red bird")["input_ids"] == runs[0].processor("a red bird")["input_ids"]
    ids = torch.tensor([tokenizer("a red bird")["input_ids"]])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.allclose(model.eval()(ids).logits, runs[0].model.eval()(ids).logits, atol=1e-5)


def test_a_folder_with_another_run_is_left_as_it_is(command: Command, tmp_path: Path) -> None:
    output = f"output={tmp_path / 'run'}"
    assert command("sft", output).code == 0
    before = files(tmp_path)
    assert_refused(command("sft", output, "seed=7"), 2, r"holds another run.*seed: 0 -> 7")
    assert_refused(command("classification", output), 2, r"holds another run.*task")
    ended = command("sft", output)
    assert (ended.code, "this run is complete" in ended.said) == (0, True)
    assert files(tmp_path) == before


def test_the_record_of_a_run_that_failed_says_so(command: Command, tmp_path: Path) -> None:
    ended = command("sft", f"output={tmp_path / 'run'}", "optim={name: sgd, lr: 1e30, max_grad_norm: off}")
    assert (ended.code, "the loss is" in ended.said) == (2, True), ended.said
    assert (read_record(tmp_path / "run").status, read_outcome(tmp_path / "run").code) == ("failed", 2)


def test_a_run_that_was_trained_but_not_exported_goes_on(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(run: Run) -> None:
        raise Stopped

    output = f"output={tmp_path / 'run'}"
    with monkeypatch.context() as patch:
        patch.setattr(trainworks.exporting, "export", killed)
        assert command("sft", output).code == 75
    assert read_outcome(tmp_path / "run").code == 75
    curve = read_record(tmp_path / "run").curve
    assert command("sft", output).code == 0
    assert read_record(tmp_path / "run").curve == curve
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_the_outcome_of_an_earlier_process_does_not_pass_for_a_killed_ones(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run" / "outcome.json", {"code": 75, "reason": "asked to stop"})

    def looking(config: Any) -> None:
        assert not (tmp_path / "run" / "outcome.json").exists()
        raise ConfigError("seen")

    monkeypatch.setattr(finetune.recipe, "prepare", looking)
    assert_refused(command("sft", f"output={tmp_path / 'run'}"), 2, "seen")


METRIC = """
import datasets
import evaluate

class Share(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"share": sum(a == b for a, b in zip(predictions, references)) / len(references)}
"""


@pytest.mark.slow
def test_a_goal_may_be_a_metric_that_the_run_file_adds(command: Command, tmp_path: Path) -> None:
    (tmp_path / "share").mkdir()
    (tmp_path / "share" / "share.py").write_text(METRIC)
    added = [f"metrics=[{tmp_path / 'share'}]", "goal={metric: share, at_least: 0.0}"]
    ended = command("classification", f"output={tmp_path / 'run'}", *added)
    assert ended.code == 0, ended.said
    goal, final = read_record(tmp_path / "run").goal, read_record(tmp_path / "run").final
    assert goal is not None
    assert final is not None
    assert goal.met
    assert goal.value == final.metrics["accuracy"].value == final.metrics["share"].value


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_a_run_that_is_pushed_ends_on_the_hub_as_it_is_in_its_folder(
    command: Command, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    ended = command("sft", f"output={tmp_path / 'run'}", PUSH)
    assert ended.code == 0, ended.said
    repo = hub.repos["someone/model"]
    assert repo.private
    there, here = repo.commits[repo.branches["main"]], files(tmp_path / "run" / "model")
    assert {name: there[name] for name in here} == here
    assert TOKEN not in (tmp_path / "run" / "run.json").read_text() + ended.said


def test_the_whole_configuration_is_printed_and_nothing_is_run(command: Command, place: Path) -> None:
    before = files(place)
    ended = command("sft", "--print-config", "seed=7")
    assert (ended.code, ended.said) == (0, "")
    printed = yaml.safe_load(ended.out)
    assert (printed["seed"], printed["optim"]["lr"], printed["every"]["log"]) == (7, 1e-3, 1)
    assert files(place) == before


# True processes


def process(place: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {"OMP_NUM_THREADS": "1", "TRAINWORKS_CACHE": str(place / ".cache"), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=place,
        env=os.environ | own | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_mistake_in_the_run_file_ends_the_process_by_2_without_a_traceback(place: Path) -> None:
    ended = process(place, "-m", "finetune", "sft.yaml", "colour=red", "budget.epochs=1")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 2, "one line for each mistake"


def test_a_missing_gpu_ends_the_launcher_and_is_told_by_the_outcome(place: Path, tmp_path: Path) -> None:
    hardware, output = ROOT / "configs" / "accelerate" / "one_gpu.yaml", tmp_path / "run"
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(hardware), "-m", "finetune"]
    ended = process(place, *launch, "sft.yaml", f"output={output}", CUDA_VISIBLE_DEVICES="")
    assert ended.returncode != 0
    assert "error: the hardware file asks for a GPU" in ended.stderr
    outcome = process(place, "-m", "trainworks.cli", "outcome", str(output))
    assert (outcome.returncode, outcome.stderr) == (3, read_outcome(output).reason + "\n")
