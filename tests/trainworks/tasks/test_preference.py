"""Runs on preferences: the reference is asked once, every objective is the same in every cut, and one is learned."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from distributed import run_ranks
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import finetune
from trainworks import Budget, Data, Mixture, Optim, Part, Preference, Reward, Run, evaluate, export, train_steps
from trainworks.errors import ConfigError, DataError
from trainworks.run import Step

RANKS = str(Path(__file__).parents[2] / "ranks.py")
TOLERANCE = 1e-6
KTO = {"objective": {"type": "kto"}}
OTHERS = {
    "ipo": {"objective": {"type": "ipo"}},
    "simpo": {"objective": {"type": "simpo"}},
    "orpo": {"objective": {"type": "orpo"}},
    "kto": KTO,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRAINWORKS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.save_model(tmp_path / "model", "preference")
    tiny.save_rows(tmp_path / "rows.jsonl", "preference", 60)
    return tmp_path


def labelled(folder: Path) -> Path:
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    single = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for place, row in enumerate(rows)
        for side in [("chosen", "rejected", "rejected")[place % 3]]
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in single))
    return folder


def prepared(folder: Path, name: str = "run", **changes: Any) -> Run:
    task = changes.pop("kind", "preference")
    return finetune.prepare(tiny.config(task, folder / "model", folder / "rows.jsonl", folder / name, **changes))


def curve(run: Run) -> list[tuple[float, float]]:
    return [(step.loss.item(), step.grad_norm.item()) for step in train_steps(run)]


def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by the rows of each batch the untrained model is asked about."""
    rows: list[int] = []
    honest = Preference.annotate

    def annotate(task: Preference, model: Any, batch: Any, processor: Any) -> Any:
        rows.append(int(batch["weight"].sum()))
        return honest(task, model, batch, processor)

    monkeypatch.setattr(Preference, "annotate", annotate)
    return rows


# The reference


def test_the_untrained_model_is_asked_once_about_every_row(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = asked(monkeypatch)
    run = prepared(folder, "first")
    assert sum(counts) == len(run.train) + len(run.validation or ()) == 60
    again = prepared(folder, "second", options={"objective": {"type": "ipo", "beta": 0.5}})
    assert sum(counts) == 60
    assert again.train["reference"][:] == run.train["reference"][:]


def test_a_run_that_goes_on_has_the_reference_of_its_beginning(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepared(folder)
    finetune.fit(first)
    assert first.progress.step == first.plan.num_steps
    monkeypatch.setenv("TRAINWORKS_CACHE", str(folder / "lost"))
    counts = asked(monkeypatch)
    second = prepared(folder)
    assert second.progress.step == first.progress.step
    assert sum(counts) == 60
    assert second.train["reference"][:] == first.train["reference"][:]


def test_other_weights_have_another_reference(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = asked(monkeypatch)
    before = prepared(folder, "first")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    model.save_pretrained(folder / "model")
    after = prepared(folder, "second")
    assert sum(counts) == 120
    assert after.train["reference"][:] != before.train["reference"][:]


@pytest.mark.slow
def test_an_adapters_reference_is_the_model_without_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = prepared(folder, "full")
    monkeypatch.setenv("TRAINWORKS_CACHE", str(folder / "own"))
    adapter = prepared(folder, "lora", tuning="lora")
    for own, other in zip(adapter.train["reference"][:], whole.train["reference"][:], strict=True):
        assert own == pytest.approx(other, rel=1e-6)


def test_the_reference_is_the_log_probability_of_the_answers(folder: Path) -> None:
    run = prepared(folder)
    row = run.train.with_format("numpy")[3]
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    begin = 0
    for size, said in zip(row["sizes"], row["reference"], strict=True):
        ids = torch.from_numpy(row["input_ids"][begin : begin + size]).long()
        trained = torch.from_numpy(row["trained"][begin : begin + size])
        with torch.no_grad():
            logs = model(ids[None]).logits[0, :-1].log_softmax(-1)
        assert said == pytest.approx(logs.gather(1, ids[1:, None])[trained[1:], 0].sum().item(), rel=1e-5)
        begin += size


def test_an_objective_without_a_reference_asks_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = asked(monkeypatch)
    run = prepared(folder, options=OTHERS["simpo"])
    assert not counts
    assert "reference" not in run.train.column_names


def test_a_damaged_file_of_the_cache_is_named(folder: Path, cache: Path) -> None:
    prepared(folder, "first")
    for path in (cache / "annotated").iterdir():
        path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(DataError, match=r"cannot be read.*remove it, and it is made again"):
        prepared(folder, "second")


def test_the_model_begins_where_its_reference_is(folder: Path) -> None:
    run = prepared(folder)
    first = next(train_steps(run))
    assert first.loss.item() == pytest.approx(np.log(2), rel=1e-6)


# Objectives


@pytest.mark.parametrize(
    "name", ["kto", "orpo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ipo", "simpo"))]
)
def test_every_objective_is_the_same_for_every_micro_batch(name: str, folder: Path) -> None:
    whole = curve(prepared(folder, "8", options=OTHERS[name]))
    assert len(whole) >= 7
    for micro in (3, 1):
        found = curve(prepared(folder, str(micro), options=OTHERS[name], micro=micro))
        for expected, other in zip(whole, found, strict=True):
            assert other == pytest.approx(expected, rel=TOLERANCE)


def test_answers_with_labels_are_the_same_for_every_micro_batch_and_evaluation(folder: Path) -> None:
    runs = [
        prepared(labelled(folder) if micro == 8 else folder, str(micro), options=KTO, micro=micro) for micro in (8, 1)
    ]
    before = [evaluate(run, "before") for run in runs]
    whole, found = map(curve, runs)
    for expected, other in zip(whole, found, strict=True):
        assert other == pytest.approx(expected, rel=TOLERANCE)
    for reports in (before, [evaluate(run, "after") for run in runs]):
        expected, other = ({name: each.value for name, each in report.metrics.items()} for report in reports)
        assert other == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert expected.keys() == {"loss", "accuracy", "reward_margin"}


@pytest.mark.slow
def test_what_couples_rows_is_the_same_on_two_processes(folder: Path) -> None:
    whole = curve(prepared(folder, "one", options=KTO))
    told = {"folder": str(folder), "task": "preference", "micro": 2, "output": str(folder / "two"), "options": KTO}
    results = run_ranks(f"{RANKS}:train", told, ranks=2, mode="fsdp2")
    assert [result["ranks"] for result in results] == [2, 2]
    for expected, found in zip(whole, results[0]["steps"], strict=True):
        assert tuple(found) == pytest.approx(expected, rel=TOLERANCE)


def test_an_objective_that_compares_refuses_single_answers(folder: Path) -> None:
    with pytest.raises(DataError, match=r"dpo compares two answers.*objective: \{type: kto\}"):
        prepared(labelled(folder))
    with pytest.raises(DataError, match="task reward compares two answers"):
        prepared(folder, kind="reward")


def test_sources_of_pairs_and_of_single_answers_are_not_mixed(folder: Path) -> None:
    single = [{"prompt": "a", "completion": "b c", "label": True}] * 20
    sources = {
        "pairs": Part(source=Dataset.from_list(tiny.rows("preference", 20)), holdout=0.0),
        "singles": Part(source=Dataset.from_list(single), holdout=0.0),
    }
    config = tiny.config("preference", folder / "model", Mixture(sources=sources), folder / "run", options=KTO)
    with pytest.raises(ConfigError, match=r"data.sources: pairs and singles hold pairs and single answers"):
        finetune.prepare(config)


# Rows


def test_pairs_of_conversations_are_read_like_pairs_of_texts(folder: Path) -> None:
    texts = prepared(folder, "texts")
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    ask, say = ({"role": role} for role in ("user", "assistant"))
    shapes = {
        "pairs-messages": lambda row: {
            "prompt": [ask | {"content": row["prompt"]}],
            **{side: [say | {"content": row[side]}] for side in ("chosen", "rejected")},
        },
        "pairs-conversations": lambda row: {
            side: [ask | {"content": row["prompt"]}, say | {"content": row[side]}] for side in ("chosen", "rejected")
        },
    }
    for shape, made in shapes.items():
        (folder / "rows.jsonl").write_text("".join(json.dumps(made(row)) + "\n" for row in rows))
        run = prepared(folder, shape)
        assert run.task.format == shape
        for column in ("input_ids", "trained", "sizes"):
            assert run.train[column][:] == texts.train[column][:]


@pytest.mark.parametrize("too_long", ["truncate", "drop"])
def test_rows_that_are_too_long_are_cut_or_dropped_and_counted(too_long: str, folder: Path) -> None:
    rows = tiny.rows("preference", 9)
    rows[4] |= {"chosen": "the cat likes a dog " * 20, "rejected": "a bird sings " * 20}
    task = Preference(max_length=64, too_long=too_long)
    made = task.resolve(Dataset.from_list(rows)).prepare(Dataset.from_list(rows), tiny.tokenizer())
    sizes = [size for row in made.samples["sizes"][:] for size in row]
    assert max(sizes) <= 64
    assert len(made.samples) == (9 if too_long == "truncate" else 8)
    assert made.dropped.keys() == ({"rows cut", "tokens cut"} if too_long == "truncate" else {"too long"})


def test_a_margin_and_a_cluster_come_with_the_rows(folder: Path) -> None:
    rows = [row | {"better": place / 2, "asked": place // 3} for place, row in enumerate(tiny.rows("reward", 30))]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = prepared(folder, kind="reward", options={"margin": "better", "cluster": "asked"})
    assert set(run.train["margin"][:]) <= {place / 2 for place in range(30)}
    assert len(set(run.train["cluster"][:]) | set(run.validation["cluster"][:])) == 10
    report = evaluate(run)
    assert report.num_clusters == len(set(run.validation["cluster"][:]))
    assert report.num_examples == len(run.validation)
    rows[7]["better"] = None
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"rows.jsonl:8: row 7 .*column 'better': no margin"):
        prepared(folder, "other", kind="reward", options={"margin": "better"})


def test_a_tokenizer_without_a_template_is_refused_or_given_one(folder: Path) -> None:
    config = json.loads((folder / "model" / "tokenizer_config.json").read_text())
    template = (folder / "model" / "chat_template.jinja").read_text()
    (folder / "model" / "chat_template.jinja").unlink()
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"no chat template; name a \.jinja file in task.template"):
        prepared(folder)
    (folder / "own.jinja").write_text(template)
    assert prepared(folder, options={"template": str(folder / "own.jinja")}).train


# What is learned


LEARNERS: dict[str, tuple[type[Preference] | type[Reward], dict[str, Any]]] = {
    "dpo": (Preference, {}),
    "kto": (Preference, KTO),
    "simpo": (Preference, OTHERS["simpo"]),
    "reward": (Reward, {}),
}


def polite_wins(number: int, seed: int) -> list[dict[str, Any]]:
    """Return pairs of equal length whose chosen answer says please."""
    rng = random.Random(seed)
    rows = []
    for _ in range(number):
        said = [rng.choices(tiny.WORDS, k=5) for _ in range(2)]
        said[0][rng.randrange(5)] = "please"
        chosen, rejected = (" ".join(words) for words in said)
        rows.append({"prompt": tiny.sentence(rng, 6), "chosen": chosen, "rejected": rejected})
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNERS)
def test_a_planted_preference_is_learned(name: str, tmp_path: Path) -> None:
    kind, options = LEARNERS[name]
    task = kind.model_fields["type"].default
    tiny.save_model(tmp_path / "model", task)
    config = tiny.config(
        task,
        tmp_path / "model",
        Data(source=Dataset.from_list(polite_wins(640, 0)), holdout=0.2),
        tmp_path / "run",
        options=options,
        micro=16,
        budget=Budget(steps=100),
        optim=Optim(lr=3e-3, schedule="linear", warmup=5),
    )
    config = config.model_copy(update={"batch": config.batch.model_copy(update={"per_step": 16})})
    record = finetune.fit(finetune.prepare(config))
    assert record.final is not None
    accuracy, margin = (record.final.metrics[metric] for metric in ("accuracy", "reward_margin"))
    assert accuracy.value > 0.9
    assert accuracy.n == 128
    assert margin.low > 0


# What is kept


@pytest.mark.parametrize("tuning", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_an_exported_reward_model_scores_as_the_live_one(tuning: str, folder: Path) -> None:
    run = prepared(folder, kind="reward", tuning=tuning)
    next(train_steps(run))
    place = export(run)
    if tuning == "full":
        reloaded: Any = AutoModelForSequenceClassification.from_pretrained(place)
    else:
        from peft import PeftModel

        base = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1)
        reloaded = PeftModel.from_pretrained(base, place)
    reloaded.config.pad_token_id = run.processor.pad_token_id
    live = run.step.module if not isinstance(run.step, Step) else run.step
    rows = run.validation.with_format("numpy")
    batch = run.task.collate([rows[row] for row in range(len(rows))], run.processor, train=False)
    with torch.no_grad():
        expected = live.model.eval()(**run.task.inputs(batch)).logits
        found = reloaded.eval()(**run.task.inputs(batch)).logits
    assert found.shape[1] == 1
    assert torch.allclose(found, expected, atol=1e-5)


def test_an_exported_preference_model_is_the_live_one(folder: Path) -> None:
    run = prepared(folder)
    next(train_steps(run))
    reloaded = AutoModelForCausalLM.from_pretrained(export(run))
    weights = dict(reloaded.named_parameters())
    assert all(torch.equal(weight, weights[name]) for name, weight in run.model.named_parameters())
