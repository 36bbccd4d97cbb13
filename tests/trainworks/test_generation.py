"""Generation for evaluations: many prompts at once give what each gives alone, on any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import transformers
from datasets import Dataset, DatasetDict
from distributed import run_ranks

import finetune
from trainworks import Data, Every
from trainworks.generation import continued

RANKS = str(Path(__file__).parents[1] / "ranks.py")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny decoder whose weights are large enough that what it says depends on what it is given."""
    folder = tiny.save_model(tmp_path_factory.mktemp("decoder"), "sft")
    made = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for parameter in made.parameters():
        parameter.data *= 8
    return made.eval()


@pytest.mark.parametrize("beams", [1, 3])
def test_prompts_of_unlike_length_are_answered_as_each_is_alone(model: Any, beams: int) -> None:
    prompts = [np.arange(start, start + size) for start, size in ((5, 3), (40, 17), (100, 1), (7, 9))]
    options: dict[str, Any] = {"ends": (0,), "pad": 0, "most": 12, "beams": beams}
    together = [ids.tolist() for ids in continued(model, prompts, **options)]
    assert together == [continued(model, [prompt], **options)[0].tolist() for prompt in prompts]
    assert len(set(map(tuple, together))) > 1


def test_an_answer_stops_before_its_end_token(model: Any) -> None:
    prompt = np.arange(5, 25)
    (free,) = continued(model, [prompt], ends=(0,), pad=0, most=12)
    end = int(free[5])
    (stopped,) = continued(model, [prompt], ends=(end,), pad=0, most=12)
    assert stopped.tolist() == free[: free.tolist().index(end)].tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "options"), [("seq2seq", {"beams": 2}), ("sft", {"exact_match": True})], ids=["seq2seq", "sft"]
)
def test_an_evaluation_by_generation_is_the_same_on_two_sharded_ranks(
    task: str, options: dict[str, Any], tmp_path: Path
) -> None:
    tiny.save_model(tmp_path / "model", task)
    tiny.save_rows(tmp_path / "rows.jsonl", task, 25)
    arguments = {"folder": str(tmp_path), "task": task, "options": options}
    (alone,) = run_ranks(f"{RANKS}:evaluated", arguments | {"output": str(tmp_path / "one")}, ranks=1)
    both = run_ranks(f"{RANKS}:evaluated", arguments | {"output": str(tmp_path / "two")}, ranks=2, mode="fsdp2")
    assert both[0] == both[1]
    assert both[0]["samples"] == alone["samples"]
    assert both[0]["metrics"].keys() == alone["metrics"].keys()
    for name, values in alone["metrics"].items():
        assert both[0]["metrics"][name] == pytest.approx(values, rel=1e-5), name


def test_a_model_that_has_learned_its_answers_by_heart_matches_them_and_an_untuned_one_does_not(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "model", "sft")
    pairs = [{"prompt": "the cat", "completion": "runs fast"}, {"prompt": "a bird?", "completion": "it sings"}] * 4
    rows = Dataset.from_list(pairs)
    data = Data(source=DatasetDict(train=rows, validation=rows.select(range(3))), validation="validation")
    config = tiny.config("sft", tmp_path / "model", data, tmp_path / "run", epochs=40, every=Every(log=40))
    config = config.model_copy(update={"task": config.task.model_copy(update={"exact_match": True})})
    record = finetune.fit(finetune.prepare(config))
    values = {report.name: report.metrics["exact_match"].value for report in record.reports}
    assert values == {"untuned": 0.0, "final": 1.0}
