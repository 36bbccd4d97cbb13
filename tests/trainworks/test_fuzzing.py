"""Mutated run files and mutated data: each gives a result or one of our errors, soon, and says so in bounded words.

    TRAINWORKS_FAULTS=all python -m pytest -s tests/trainworks/test_fuzzing.py      10,000 of each; some hundred without
    TRAINWORKS_CASE=1234 python -m pytest tests/trainworks/test_fuzzing.py -k run_files     one case, by its number

A failure names the number of its case, which is the seed that all of it is made from: it is the same in any order, on
any machine. Should the process itself die, the name of the test says which fifty cases it was at.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import chat_templates
import mutations
import pytest
import tiny

import finetune
import pretrain
from trainworks import Data, Pretrained
from trainworks.config import dump, load, parse
from trainworks.errors import ConfigError, ToolkitError
from trainworks.parallel.launch import World
from trainworks.samples import equipped, prepare_data, read_rows
from trainworks.tasks import TASKS

pytestmark = pytest.mark.faults

WHOLE = os.environ.get("TRAINWORKS_FAULTS") == "all"
CASE = os.environ.get("TRAINWORKS_CASE")
BLOCK = 50
SECONDS = {"run file": 4, "rows": 60}
"""Of the processor, for one case: two readings of a run file, three of a file of rows."""
HANGS_AFTER = 120
"""Seconds on the clock, which other processes may use."""
MOST_WORDS = {"ConfigError": 100_000, "DataError": 20_000, "BadRowsError": 20_000}
MEGABYTES = 3_000
"""By which fifty cases may raise the most memory ever held: one word of 10 MB takes 1.8 GB in tokenizers 0.23."""


def blocks(few: int) -> list[range]:
    """Return the numbers of the cases, fifty to a test: those of CI, all, or the one that is asked for."""
    if CASE is not None:
        return [range(int(CASE), int(CASE) + 1)]
    return [range(start, start + BLOCK) for start in range(0, 10_000 if WHOLE else few, BLOCK)]


class HungError(BaseException):
    """Not an Exception, so that nothing on the way takes it for an error of its own."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise a HungError where what is inside takes longer on the clock."""

    def stop(number: int, frame: Any) -> None:
        raise HungError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def peak_megabytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def sound(error: ToolkitError) -> str:
    """Return the kind of an error, once it is seen to be said in bounded, printable words."""
    said, kind = str(error), type(error).__name__
    assert said
    assert len(said) < MOST_WORDS[kind], f"{len(said):,} characters: {said[:500]}"
    assert all(line.isprintable() for line in said.split("\n")), repr(said[:2_000])
    return kind


def tried(kind: str, numbers: range, one: Callable[[int], str]) -> Counter[str]:
    """Return how often each kind of outcome came; the first case that goes wrong is named."""
    outcomes: Counter[str] = Counter()
    spent: list[float] = []
    megabytes, begun = peak_megabytes(), time.monotonic()
    for number in numbers:
        started = time.process_time()
        try:
            with at_most(HANGS_AFTER):
                outcomes[one(number)] += 1
            spent.append(time.process_time() - started)
            assert spent[-1] < SECONDS[kind], f"{spent[-1]:.1f} s of the processor"
        except BaseException as error:
            error.add_note(f"{kind} {number}: set TRAINWORKS_CASE={number} to run it again, and keep its files")
            raise
    more = peak_megabytes() - megabytes
    print(
        f"\n{kind} {numbers[0]} to {numbers[-1]}: {time.monotonic() - begun:.1f} s, "
        f"{max(spent):.2f} s of the processor at most, {more} MB more, {dict(outcomes)}"
    )
    assert more < MEGABYTES
    return outcomes


# Run files

SMALL = [
    "output: a\n",
    "a: b\n",
    "output: o\ntask: {type: sft, max_length: 9}\nmodel: {name: m}\ndata: {source: d}\nbatch: {per_step: 1}\n"
    "budget: {steps: 1}\noptim: {lr: 1}\n",
]


@cache
def run_files() -> list[str]:
    configs = Path(__file__).parents[2] / "configs"
    shipped = [path.read_text(encoding="utf-8") for path in sorted(configs.glob("*/*.yaml"))]
    assert len(shipped) >= 19
    return [*shipped, *SMALL]


@pytest.mark.parametrize("numbers", blocks(few=300), ids=str)
def test_mutated_run_files_give_a_config_or_a_config_error(numbers: range, tmp_path: Path) -> None:
    def one(number: int) -> str:
        mutated = mutations.run_file(random.Random(f"run file {number}"), run_files())
        path = tmp_path / "run.yaml"
        path.write_bytes(mutated.raw)
        return " ".join(read(path, mutated.overrides, model) for model in (finetune.Config, pretrain.Config))

    outcomes = tried("run file", numbers, one)
    if CASE is None:
        assert outcomes["ConfigError ConfigError"] > 20
        assert len(numbers) - outcomes["ConfigError ConfigError"] > 0


def read(path: Path, overrides: list[str], model: Any) -> str:
    try:
        config = load(path, overrides, model=model)
    except ConfigError as error:
        return sound(error)
    assert parse(dump(config), name="again", model=model) == config
    return "config"


# Rows

TALK = [{"role": "user", "content": "a cat?"}, {"role": "assistant", "content": "a dog"}]
CALL = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
CALLED = [
    TALK[0],
    {"role": "assistant", "content": "b", "tool_calls": [CALL]},
    {"role": "tool", "content": "5"},
    TALK[1],
]
SAID = [
    {"from": "human", "value": "a"},
    {"from": "function_call", "value": '{"name": "f"}'},
    {"from": "gpt", "value": "b"},
]
WITH_CALLS = chat_templates.CHATML.replace(
    "message['content'] +",
    "(message['content'] or '') + (message['tool_calls'] | tojson if message['tool_calls'] else '') +",
)
TEMPLATES = [chat_templates.CHATML, chat_templates.GENERATION, chat_templates.THINKING, WITH_CALLS]


def rows_of(task: str, rng: random.Random) -> list[dict[str, Any]]:
    count = rng.choice([1, 4, 12, 12])
    shapes: list[dict[str, Any]] = [
        {"messages": TALK},
        {"messages": CALLED, "tools": "[]"},
        {"conversations": SAID},
        {"instruction": "a", "input": "b", "output": "c"},
        {"prompt": TALK[:1], "completion": TALK[1:]},
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        {"text": "a cat"},
    ]
    if task == "sft" and rng.random() < 0.8:
        return [rng.choice(shapes)] * count
    return tiny.rows(task, count, seed=rng.randrange(9))


def options_of(task: str, rng: random.Random) -> dict[str, Any]:
    choices: dict[str, dict[str, list[Any]]] = {
        "causal-lm": {"across": [True, False]},
        "masked-lm": {"across": [True, False], "whole_words": [True, False]},
        "seq2seq": {"too_long": ["error", "truncate", "drop"], "max_source": [8, 64]},
        "sft": {
            "learn": ["all", "last", "weighted"],
            "turns": ["together", "apart"],
            "too_long": ["error", "truncate", "split", "drop"],
            "nothing_to_learn": ["error", "drop"],
        },
        "sequence-regression": {"too_long": ["truncate", "error"]},
        "sequence-classification": {"labels": [(), ("bad", "good", "so-so")], "too_long": ["truncate", "error"]},
    }
    return tiny.OPTIONS[task] | {name: rng.choice(values) for name, values in choices[task].items()}


def run_of(task: Any, path: Path, policy: str, holdout: float) -> finetune.Config:
    return finetune.Config(
        output="unused",
        task=task,
        model=Pretrained("unused"),
        data=Data(source=str(path), holdout=holdout, bad_rows=policy, prepare_workers=1),
        batch={"per_step": 8},
        budget={"epochs": 1},
        optim={"lr": 1e-3},
    )


def prepared(config: finetune.Config, template: str) -> str:
    """Return the digest of what a run would train on, or the kind of error that it ends with."""
    try:
        sources = read_rows(config)
        processor = equipped(sources, chat_templates.with_template(tiny.tokenizer_for(config.task.type), template))
        data = prepare_data(config, sources, processor, World(accelerator=None))  # type: ignore[arg-type]
    except ToolkitError as error:
        return sound(error)
    assert len(data.train) == sum(data.counts) > 0
    for listing in data.facts.listings:
        assert all(json.loads(line) for line in Path(listing).read_text(encoding="utf-8").splitlines())
    return f"{data.facts.fingerprint} {len(data.train)}"


@pytest.mark.parametrize("numbers", blocks(few=150), ids=str)
def test_mutated_rows_give_samples_or_a_toolkit_error(
    numbers: range, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one(number: int) -> str:
        rng = random.Random(f"rows {number}")
        name = rng.choice(
            ["sft", "sft", "sft", "causal-lm", "masked-lm", "seq2seq", "sequence-classification", "sequence-regression"]
        )
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.setenv("TRAINWORKS_CACHE", str(folder / "cache"))
        file = mutations.row_file(rng, rows_of(name, rng))
        path = folder / file.name
        path.write_bytes(file.raw)
        task, holdout, template = TASKS[name](**options_of(name, rng)), rng.choice([0, 0.3]), rng.choice(TEMPLATES)
        error, skip, quarantine = (
            prepared(run_of(task, path, policy, holdout), template) for policy in ("error", "skip", "quarantine")
        )
        assert skip == quarantine
        assert error == skip or error.endswith("Error")
        if CASE is None:
            shutil.rmtree(folder)
        return " ".join(outcome if outcome.endswith("Error") else "samples" for outcome in (error, skip))

    outcomes = tried("rows", numbers, one)
    if CASE is None:
        assert 0 < outcomes["samples samples"] < 30
