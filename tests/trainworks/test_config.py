"""The run file's reader: right input gives the config, wrong input every problem at its line."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from trainworks.config import Settings, differences, dump, json_schema, load, parse, resolved
from trainworks.errors import ConfigError
from trainworks.schema import LoRA, Pretrained, RunConfig


class Classify(Settings):
    type: Literal["classify"] = "classify"
    text: str
    """The column to read."""
    label: str = "label"
    names: dict[int, str] = {}
    api_token: int | None = None


class Chat(Settings):
    type: Literal["chat"] = "chat"
    template: str | None = None


class Config(RunConfig[Annotated[Classify | Chat, Field(discriminator="type")]]):
    """A run of one of two tasks."""


VALID = """\
# A comment on top.
output: runs/here
task: {type: classify, text: sentence, names: {0: bad, 1: good}}
model:
  name: some/model
tuning:
  type: lora
  rank: 8
  targets: [q, v]
  options: {use_rslora: true}
data:
  source: some/data
  train: [a, b]
  columns: {sentence: phrase}
batch: {per_step: 32}
budget:
  epochs: 1.5
optim:
  lr: 3e-4
  warmup: 0.06
  betas: [0.9, 0.99]
hub: {repo: me/mine, license: apache-2.0}
"""


def read(text: str, *overrides: str) -> Config:
    return parse(text, name="run.yaml", overrides=overrides, model=Config)


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(text, *overrides)
    return [str(problem) for problem in caught.value.problems]


def edited(old: str, new: str) -> str:
    assert old in VALID
    return VALID.replace(old, new)


def test_a_valid_file_gives_the_config(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(VALID)
    config = load(file, ["optim.lr=1e5", "seed=7"], model=Config)
    assert config.optim.lr == 1e5
    assert config.seed == 7
    assert config.model == Pretrained("some/model")
    assert config.tuning == LoRA(rank=8, targets=("q", "v"), options={"use_rslora": True})
    assert config.task == Classify(text="sentence", names={0: "bad", 1: "good"})


def test_five_mistakes_give_five_lines_each_with_its_place_and_mend() -> None:
    text = """\
output: runs/here
seeed: 3
task: {type: clasify, text: sentence}
model: {name: some/model}
lr: 3e-4
data:
  source: some/data
  limit:
    train: many
batch: {per_step: 32}
budget: {epochs: 1, steps: 10}
optim: {schedule: linear}
"""
    assert problems(text) == [
        "run.yaml:2: seeed: unknown key (did you mean 'seed'?); known: " + ", ".join(Config.model_fields),
        "run.yaml:3: task.type: unknown type 'clasify' (did you mean 'classify'?); known: classify, chat",
        "run.yaml:5: lr: unknown key; belongs under optim",
        "run.yaml:9: data.limit.train: expected a whole number; found 'many'",
        "run.yaml:11: budget: give exactly one of epochs, steps, tokens; found epochs and steps",
    ]


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("  lr: 3e-4\n", "", "run.yaml:18: optim.lr: required key is missing: Peak learning rate."),
        (
            "model:\n  name: some/model\n",
            "",
            "run.yaml:2: model: required key is missing: Where the weights come from.",
        ),
        ("  name: some", "  revision: x\n  nmae: some", "run.yaml:6: model.nmae: unknown key (did you mean 'name'?); "),
        ("  name: some/model", "  {}", "run.yaml:4: model.name: required key is missing: Hub name "),
        ("lr: 3e-4", "lr: fast", "run.yaml:19: optim.lr: expected a number; found 'fast'"),
        ("lr: 3e-4", "lr: '3e-4'", "run.yaml:19: optim.lr: expected a number; found '3e-4'"),
        ("lr: 3e-4", "lr: -1", "run.yaml:19: optim.lr: expected a number greater than 0; found -1"),
        ("lr: 3e-4", "lr: .inf", "run.yaml:19: optim.lr: not a finite number; "),
        ("lr: 3e-4", "lr: ", "run.yaml:19: optim.lr: expected a number; found nothing"),
        ("lr: 3e-4", "lr: ${LR}", "run.yaml:19: optim.lr: expected a number; found '${LR}'"),
        ("lr: 3e-4", "lr: !!float fast", "run.yaml:19: optim.lr: could not convert string to float: 'fast'"),
        ("lr: 3e-4", "lr: 1\n  lr: 2", "run.yaml:20: optim.lr: set twice; first at run.yaml:19"),
        ("lr: 3e-4", "<<: {lr: 1}\n  lr: 1", "run.yaml:19: optim.<<: merge keys are not read; write the keys out"),
        ("lr: 3e-4", "? [a]\n  : 1\n  lr: 1", "run.yaml:19: optim.?: a key must be plain text"),
        ("[0.9, 0.99]", "[0.9]", "run.yaml:21: optim.betas: the list is too short: item 2 is missing"),
        ("[0.9, 0.99]", "[0.9, 0.9, 0.9]", "run.yaml:21: optim.betas: expected a list of 2 at most; found a list"),
        ("{0: bad", "{zero: bad", "run.yaml:3: task.names.zero.[key]: expected a whole number; found 'zero'"),
        ("some/model", "x\n  sizes: {}", "run.yaml:6: model.sizes: unknown key; known: name, revision, dtype"),
        ("some/model", "x\n  tokeniser: y", "run.yaml:6: model.tokeniser: unknown key (did you mean 'tokenizer'?); "),
        ("rank: 8", "rank: 8.5", "run.yaml:8: tuning.rank: expected a whole number; found 8.5"),
        (
            "targets: [q, v]",
            "targets: [q, 3]",
            "run.yaml:9: tuning.targets[1]: expected text; found 3; put it in quotes",
        ),
        ("type: lora\n", "type: full\n", "run.yaml:8: tuning.rank: unknown key; belongs under tuning (type: lora)"),
        ("  type: lora\n", "", "run.yaml:6: tuning.type: required key is missing; known: full, freeze, lora, peft"),
        (
            "type: lora\n",
            "type: pruned\n",
            "run.yaml:7: tuning.type: unknown type 'pruned'; known: full, freeze, lora, peft",
        ),
        ("{per_step: 32}", "32", "run.yaml:15: batch: expected a section of `key: value` lines; found 32"),
        ("32}", "32, micro: atuo}", "expected a whole number or 'auto'; found 'atuo' (did you mean 'auto'?)"),
        ("epochs: 1.5", "{}", "run.yaml:16: budget: give exactly one of epochs, steps, tokens; found none"),
        ("me/mine", "mine", "run.yaml:22: hub.repo: expected owner/name, found 'mine'"),
        ("2.0}", "2.0, private: !!python/name:os.system x}", "hub.private: the tag !!python/name:os.system is not all"),
        ("some/data", "!secret x", "run.yaml:12: data.source: the tag !secret is not allowed; remove it"),
        ("some/data", '"a\\0b"', "run.yaml:12: data.source: text holds a character that no file can hold"),
        ("some/data", '"\\ud800"', "run.yaml:12: data.source: text holds a character that no file can hold"),
        ("some/data", "1" * 5000, "run.yaml:12: data.source: more digits than any setting takes"),
        ("some/data", "x\n  columns: [a", "run.yaml:14: not valid YAML: "),
        (
            "  epochs",
            "\tepochs",
            "run.yaml:17: not valid YAML: while scanning for the next token, found character '\\t'",
        ),
        ("some/data", "a\0b", "run.yaml:12: holds the unprintable character #x00"),
        ("some/data", '"\\U00110000"', "run.yaml:1: not valid YAML: an escape such as "),
        ("some/data", "*missing", "run.yaml:12: not valid YAML: found undefined alias 'missing'"),
        ("use_rslora", '"\\ud800"', "run.yaml:10: tuning.options.\\ud800: text holds a character that no file"),
        ("[a, b]", "[]", "run.yaml:13: data.train: expected a list of 1 or more; found a list"),
        ("hub:", "---\nhub:", "run.yaml:22: not valid YAML: expected a single document in the stream"),
    ],
)
def test_a_mistake_is_one_line_with_its_place_and_mend(old: str, new: str, problem: str) -> None:
    lines = problems(edited(old, new))
    assert problem in lines[0]
    if "tuning: lora" not in problem and "type: full" not in new:
        assert len(lines) == 1


def test_a_section_of_another_kind_is_understood_in_spite_of_a_misspelt_key() -> None:
    text = edited("  name: some/model", "  architecure: llama\n  sizes: {}\n  tokenizer: {vocab_size: 0}")
    assert problems(text) == [
        "run.yaml:5: model.architecure: unknown key (did you mean 'architecture'?); known: name, revision, dtype, "
        "quantise, new_tokens",
        "run.yaml:7: model.tokenizer.vocab_size: expected a number greater than 0; found 0",
    ]


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("off", "off"),
        ("true", True),
        ("False", False),
        ("3e-4", 3e-4),
        ("1e5", 1e5),
        (".5", 0.5),
        ("-1.", -1.0),
        ("1_000", 1000),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("~", None),
        ("2024-01-01", "2024-01-01"),
        ("12:30:00", "12:30:00"),
        ("${HOME}", "${HOME}"),
        ("'3e-4'", "3e-4"),
        ("!!str 5", "5"),
        ("e5", "e5"),
        ("a=b", "a=b"),
        ("[1, {a: no}]", [1, {"a": "no"}]),
    ],
)
def test_scalars_are_read_by_yaml_1_2_in_files_and_overrides(written: str, value: Any) -> None:
    for config in (
        read(edited("{use_rslora: true}", f"\n    option: {written}")),
        read(VALID, f"tuning.options.option={written}"),
    ):
        assert isinstance(config.tuning, LoRA)
        found = config.tuning.options["option"]
        assert found == value
        assert type(found) is type(value)


def test_overrides_make_sections_that_are_not_there_and_replace_ones_that_are() -> None:
    config = read(
        VALID, "goal.metric=accuracy", "goal.at_least=0.5", "budget={steps: 3}", "tuning={type: full}", "hub="
    )
    assert config.goal is not None
    assert config.goal.at_least == 0.5
    assert (config.budget.steps, config.tuning.type, config.hub) == (3, "full", None)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("optim.lr=abc", "override 'optim.lr=abc': optim.lr: expected a number; found 'abc'"),
        ("optim.lrr=1", "override 'optim.lrr=1': optim.lrr: unknown key (did you mean 'lr'?); known: name, lr, "),
        ("optin.lr=1", "override 'optin.lr=1': optin: unknown key (did you mean 'optim'?); known: output, "),
        ("lr=1", "override 'lr=1': lr: unknown key; belongs under optim"),
        ("goal.at_least=1", "override 'goal.at_least=1': goal.metric: required key is missing: A metric of the task"),
        ("optim.lr", "override 'optim.lr': expected key=value, such as optim.lr=1e-4"),
        ("=3", "override '=3': expected key=value"),
        ("optim..lr=3", "override 'optim..lr=3': expected key=value"),
        ("output.folder=x", "override 'output.folder=x': output: not a section; found 'runs/here'"),
        ("seed=[1", "override 'seed=[1': not valid YAML: "),
        ("seed=!!python/object:os.x {}", "seed: the tag !!python/object:os.x is not allowed; remove it"),
        ("budget.steps=5", "run.yaml:16: budget: give exactly one of epochs, steps, tokens; found epochs and steps"),
    ],
)
def test_an_override_that_is_wrong_is_named(override: str, problem: str) -> None:
    (line,) = problems(VALID, override)
    assert problem in line


def test_problems_of_file_and_overrides_come_together_in_order() -> None:
    lines = problems(edited("lr: 3e-4", "lr: fast"), "seed=-1", "nothing", "batch.per_step=x")
    assert [line.split(": ")[0] for line in lines] == [
        "run.yaml:19",
        "override 'seed=-1'",
        "override 'nothing'",
        "override 'batch.per_step=x'",
    ]


def test_values_that_expand_without_bound_are_refused() -> None:
    laughs = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9))
    for text in (f"a0: &a0 [ha]\n{laughs}\n{VALID}", f"loop: &loop [*loop]\n{VALID}"):
        (line,) = problems(text)
        assert "more than 5000 values, aliases written out" in line
    assert "nested deeper than 40 levels" in problems(f"{VALID}metrics: {'[' * 5000}{']' * 5000}\n")[0]
    assert read(edited("train: [a, b]", "train: &splits [a]\n  validation: *splits")).data.validation == ("a",)


def test_a_file_of_nothing_but_mistakes_is_answered_soon() -> None:
    text = VALID + "".join(f"key{number}: {number}\n" for number in range(4000))
    assert len(problems(text)) == 100


def test_a_list_of_more_values_than_any_run_has_is_answered_soon() -> None:
    (line,) = problems(f"{VALID}metrics: [{'a,' * 100_000}]\n")
    assert "more than 5000 values, aliases written out" in line


def test_more_than_a_hundred_mistakes_are_counted() -> None:
    lines = problems(VALID + "seed: 1\n" * 120)
    assert len(lines) == 101
    assert lines[-1] == "run.yaml:124: and 19 more from here on"


@pytest.mark.parametrize("value", ["passw" * 40_000, "'token" + " " * 200_000 + "'", "hf_" * 60_000, "://" * 60_000])
def test_text_made_to_be_slow_to_search_for_secrets_is_answered_soon(value: str) -> None:
    begun = time.monotonic()
    (line,) = problems(edited("lr: 3e-4", f"lr: {value}"))
    assert "optim.lr: expected a number" in line
    assert time.monotonic() - begun < 8


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("lr: 3e-4", f"lr: !!float {'x' * 50_000}"),
        ("lr: 3e-4", f"lr: !{'t' * 50_000} x"),
        ("lr: 3e-4", f"lr: *{'m' * 50_000}"),
        ("me/mine", f"me/{'w' * 50_000}/mine"),
        ("lr: 3e-4", f"lr: 1\n  {'k' * 900}: 2"),
    ],
)
def test_a_message_is_short_however_long_what_it_is_about(old: str, new: str) -> None:
    (line,) = problems(edited(old, new))
    assert len(line) < 1_000


@pytest.mark.parametrize("tag", ["int", "float", "bool", "str", "null"])
@pytest.mark.parametrize("value", ["[]", "{a: b}"])
def test_a_scalars_tag_on_a_list_or_section_is_refused(tag: str, value: str) -> None:
    (line,) = problems(edited("lr: 3e-4", f"lr: !!{tag} {value}"))
    assert line == f"run.yaml:19: optim.lr: the tag !!{tag} is not allowed; remove it"


def test_a_message_is_one_line_and_writes_nothing_else_to_a_terminal() -> None:
    (line,) = problems(VALID + '"a\\nb\\e[31mc\\u202e": 1\n')
    assert line.startswith("run.yaml:23: a\\nb\\x1b[31mc\\u202e: unknown key")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "run.yaml: the file is empty"),
        (b"# only a comment\n", "run.yaml: the file is empty"),
        (b"- a\n- b\n", "run.yaml:1: expected `key: value` lines; found a list"),
        (b"\nhello\n", "run.yaml:2: expected `key: value` lines; found 'hello'"),
        (b"output: a\nabout: caf\xe9\n", "run.yaml:2: this is not UTF-8 text"),
        (b"\x1f\x8b\x00\xff", "run.yaml:1: this is not UTF-8 text"),
        (b"#" * 300_000, "run.yaml: larger than 256 KiB"),
    ],
)
def test_a_file_that_is_no_run_file_is_named(tmp_path: Path, content: bytes, problem: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(file, model=Config)
    assert problem in str(caught.value)


def test_a_missing_file_or_a_folder_is_answered_with_the_files_there(tmp_path: Path) -> None:
    (tmp_path / "demo.yaml").write_text(VALID)
    for path, answer in (
        (tmp_path / "dmeo.yaml", "there is no such file (did you mean 'demo.yaml'?)"),
        (tmp_path / "other.yaml", f"there is no such file; run files in {tmp_path}: demo.yaml"),
        (tmp_path / "nowhere" / "x.yaml", "there is no such file"),
        (tmp_path, f"this is a folder, give a run file; run files in {tmp_path}: demo.yaml"),
        ("a\0b", "cannot be read: "),
    ):
        with pytest.raises(ConfigError) as caught:
            load(path, model=Config)
        assert str(caught.value).startswith(f"{path}: {answer}".replace("\0", "\\x00"))


def test_secrets_are_never_echoed() -> None:
    token, password = "hf_" + "aBcD" * 8, "open-sesame"
    lines = [
        *problems(edited("lr: 3e-4", f"lr: {token}")),
        *problems(edited("me/mine", token)),
        *problems(edited("text: sentence", f"text: x, api_token: {password}")),
        *problems(VALID, f"optim.lr={token}"),
        *problems(VALID, f"task.api_token={password}"),
        *problems(VALID, f"hub.password={password}"),
        *problems(VALID, token),
        *problems(VALID, f"seed={{'token': {password}}}"),
        *problems(f"{token}: 1\n{VALID}"),
        *differences({"api_token": password, "lr": 1}, {"api_token": "x", "lr": token}),
    ]
    assert len(lines) == 11
    assert not [line for line in lines if token in line or password in line]
    assert all("<redacted>" in line or "looks like a secret" in line for line in lines)
    assert "found 3.5" in problems(edited("epochs: 1.5", "tokens: 3.5"))[0]
    assert problems(VALID, "task.type=token-clasify")[0].startswith("override 'task.type=token-clasify'")


SECRET = "looks like a secret; set HF_TOKEN in the environment instead"


@pytest.mark.parametrize(
    "token", ["hf_" + "aBcD" * 8, "sk-ant-" + "a1B2" * 8, "ghp_" + "a1B2" * 9, "AKIA" + "A1B2" * 4]
)
def test_a_token_is_refused_wherever_it_stands_so_that_no_record_holds_it(token: str) -> None:
    assert problems(edited("some/model", token)) == [f"run.yaml:5: model.name: {SECRET}"]
    assert problems(edited("some/data", f"https://me:{token}@host")) == [f"run.yaml:12: data.source: {SECRET}"]
    assert problems(edited("[q, v]", f"[q, {token}]")) == [f"run.yaml:9: tuning.targets[1]: {SECRET}"]
    assert problems(edited("use_rslora", token)) == [f"run.yaml:10: tuning.options.<redacted>: {SECRET}"]
    assert problems(VALID, f"about={token}") == [f"override 'about=<redacted>': about: {SECRET}"]
    (line,) = problems(VALID, f"tuning.options.{token}=1")
    assert line == f"override 'tuning.options.<redacted>=1': tuning.options.<redacted>: {SECRET}"


@pytest.mark.parametrize(
    "name", ["data/hf_models/llama", "me/sk-learn-classifier", "hf_datasets", "a/ghp_notes", "shf_x"]
)
def test_a_name_that_only_begins_like_a_token_is_read(name: str) -> None:
    assert read(edited("some/model", name)).model == Pretrained(name)


def test_a_long_value_is_shortened() -> None:
    (line,) = problems(edited("lr: 3e-4", f"lr: {'x' * 5000}"))
    assert len(line) < 200


@pytest.mark.parametrize(
    "text",
    [
        "3e-4",
        "1e5",
        "no",
        "null",
        "1_000",
        "",
        " a ",
        "a: b",
        "é",
        "x\ny\n",
        "<<",
        "0o7",
        "a\x85b\n",
        "\u2028",
        "\ufeff",
        "\t",
        " \n b",
        "\r\n",
    ],
)
def test_a_dumped_config_reads_back_equal(text: str) -> None:
    config = read(VALID).model_copy(update={"about": text, "tuning": LoRA(options={text: [text, {"a": text}]})})
    again = read(dump(config).replace("about: ''", "about: null"))
    assert again.tuning == config.tuning
    assert again.about == (text or None)
    assert read(dump(again)) == again


def test_a_dumped_config_with_plain_descent_reads_back_equal_and_eps_is_refused() -> None:
    config = read(VALID, "optim.name=sgd")
    assert read(dump(config)) == config
    with pytest.raises(ConfigError, match="eps does nothing for sgd"):
        read(VALID, "optim.name=sgd", "optim.eps=1e-5")


def test_a_dumped_config_has_every_key_in_the_order_declared() -> None:
    config = read(VALID)
    keys = [line.split(":")[0] for line in dump(config).splitlines() if line[0] not in " -"]
    assert keys == list(Config.model_fields) == list(resolved(config))
    assert json.loads(json.dumps(resolved(config))) == resolved(config)


def test_differences_name_each_key_with_both_values() -> None:
    old, new = (
        resolved(read(VALID)),
        resolved(read(VALID, "optim.lr=1", "data.train=[a]", "goal.metric=f1", "goal.at_least=1")),
    )
    assert differences(old, old) == []
    assert differences(old, new) == [
        "data.train: ['a', 'b'] -> ['a']",
        "optim.lr: 0.0003 -> 1.0",
        "goal: None -> absent",
        "goal.metric: absent -> 'f1'",
        "goal.at_least: absent -> 1.0",
        "goal.at_most: absent -> None",
    ]


def test_the_json_schema_documents_every_key() -> None:
    schema = json_schema(Config)
    assert schema["$schema"].endswith("2020-12/schema")
    assert set(schema["properties"]) == set(Config.model_fields)
    assert all("description" in schema["properties"][key] for key in Config.model_fields)
    assert schema["$defs"]["Optim"]["properties"]["lr"]["description"] == "Peak learning rate."
    assert schema["additionalProperties"] is False
    json.dumps(schema, allow_nan=False)


def test_a_mutated_file_gives_a_config_or_a_config_error() -> None:
    chance = random.Random(0)
    pieces = [
        *"\t\n :{}[]&*!|>'\"%@`,?-#~<\\",
        "\0",
        "é",
        "\U0001f600",
        "\ud800",
        "---",
        "<<: *a",
        "&a ",
        "*a",
        "!!int ",
        "1e999",
    ]
    lines = VALID.splitlines(keepends=True)
    refused: list[ConfigError] = []
    for _ in range(400):
        mutated = list(lines)
        for _ in range(chance.randint(1, 4)):
            row = chance.randrange(len(mutated))
            at = chance.randrange(len(mutated[row]) + 1)
            mutated[row] = chance.choice(
                [
                    mutated[row][:at] + chance.choice(pieces) + mutated[row][at:],
                    mutated[row][:at] + mutated[row][at + chance.randint(1, 5) :],
                    mutated[row] + chance.choice(lines),
                    "  " + mutated[row],
                    "",
                    chance.choice(lines),
                ]
            )
        override = [chance.choice(lines).strip().replace(": ", "=") for _ in range(chance.randint(0, 1))]
        try:
            read("".join(mutated), *override)
        except ConfigError as error:
            refused.append(error)
    assert 100 < len(refused) < 400
    assert all(problem.message and problem.where for error in refused for problem in error.problems)
    assert all(error.problems for error in refused)


def test_mutated_bytes_of_a_file_give_a_config_or_a_config_error(tmp_path: Path) -> None:
    chance = random.Random(1)
    file = tmp_path / "run.yaml"
    refused = 0
    for _ in range(200):
        raw = bytearray(VALID.encode())
        for _ in range(chance.randint(1, 3)):
            raw[chance.randrange(len(raw))] = chance.randrange(256)
        file.write_bytes(raw)
        try:
            load(file, model=Config)
        except ConfigError:
            refused += 1
    assert 100 < refused < 200


def test_reading_a_config_imports_no_heavy_library() -> None:
    heavy = {"torch", "transformers", "datasets", "numpy"}
    program = f"import sys, trainworks.config; print({heavy} & set(sys.modules) or 'none')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "none"
