"""Answers to tokens and back: parts of long texts, questions without an answer, and what is said of all parts."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

import finetune
from trainworks import Data, QuestionAnswering, export
from trainworks.data.sources import read
from trainworks.errors import DataError
from trainworks.evaluation import harness
from trainworks.metrics import Prediction
from trainworks.tasks.question_answering import _Said

LONG = " ".join(f"{number} cats" for number in range(40))


def row(context: str, question: str, *answers: tuple[str, int]) -> dict[str, Any]:
    texts, starts = zip(*answers, strict=True) if answers else ((), ())
    return {"context": context, "question": question, "answers": {"text": list(texts), "answer_start": list(starts)}}


def dataset(*rows: dict[str, Any]) -> Dataset:
    return Dataset.from_list([row("a cat", "what", ("cat", 2)), *rows]).select(range(1, len(rows) + 1))


def prepared(*rows: dict[str, Any], **options: Any) -> tuple[Dataset, dict[str, int]]:
    task = QuestionAnswering(**({"max_length": 64, "stride": 16} | options))
    made = task.prepare(dataset(*rows), tiny.tokenizer())
    return made.samples.with_format(None), made.dropped


def spanned(part: dict[str, Any]) -> str:
    return part["text"][part["begins"][part["start"]] : part["ends"][part["end"]]].strip()


def test_a_long_text_is_cut_to_parts_that_overlap_and_hold_all_of_it() -> None:
    parts, _ = prepared(row(LONG, "how many", ("39 cats", LONG.index("39"))))
    assert len(parts) > 2
    assert parts["part"] == list(range(len(parts)))
    assert max(parts["length"]) == 64
    assert parts[0]["text"] == LONG[: len(parts[0]["text"])]
    assert parts[len(parts) - 1]["text"] == LONG[-len(parts[len(parts) - 1]["text"]) :]
    assert sum(map(len, parts["text"])) > len(LONG), "they overlap"
    assert [spanned(part) for part in parts] == [""] * (len(parts) - 1) + ["39 cats"]
    assert all(part["start"] == part["end"] == part["null"] for part in parts.to_list()[:-1])


def test_an_answer_that_stands_whole_in_no_part_is_told() -> None:
    parts, dropped = prepared(row(LONG, "which", (LONG, 0)))
    assert dropped == {"answers in no part": 1}
    assert parts["start"] == parts["null"]


def test_every_answer_is_given_back_sign_by_sign() -> None:
    texts = [
        ("Ada “Lovelace” (née Byron), 1815–1852", ["Ada", "“Lovelace”", "née Byron", "1815", "1852", "–"]),
        ("日本の首都は東京です。 🤗🤗 é", ["東京", "🤗", "é", "日本の首都は東京です。"]),
        ("  two  blanks\tand\nlines ", ["two  blanks", "and\nlines", "blanks\tand"]),
    ]
    rows = [row(text, "what", (answer, text.index(answer))) for text, answers in texts for answer in answers]
    parts, dropped = prepared(*rows, max_length=256)
    assert not dropped
    assert [spanned(part) for part in parts] == [each["answers"]["text"][0] for each in rows]


INSIDE_A_WORD = {"Prussia": {"Prussian"}, "Russia": {"Russian"}, "Euro": {"European"}, "age": {"advantages"}}


@pytest.mark.slow
@pytest.mark.data
def test_every_answer_of_real_questions_is_given_back_sign_by_sign(shared_data: Path, minilm: Path) -> None:
    rows = read(Data(source=str(shared_data / "qa_adversarial_quoref" / "train.jsonl"), holdout=0), seed=0).train
    task = QuestionAnswering(max_length=192, stride=64)
    assert list(task.flaws(rows)) == []
    made = task.prepare(rows, AutoTokenizer.from_pretrained(minilm))
    borders = [*np.flatnonzero(np.array(made.samples["part"][:]) == 0), len(made.samples)]
    parts = made.samples.with_format(None)
    found = [{spanned(part) for part in parts.select(range(*pair))} - {""} for pair in pairwise(borders)]
    wanted = [answers["text"][0] for answers in rows["answers"][:]]
    assert len(found) == len(wanted) == 799
    assert len(made.samples) > 1200
    assert made.dropped == {}
    others = {answer: said for said, answer in zip(found, wanted, strict=True) if said != {answer}}
    # Where an answer ends inside a word that is one token, the span is the word.
    assert others == INSIDE_A_WORD


def test_whether_a_question_may_have_no_answer_is_told_by_the_rows() -> None:
    answered, silent = row("a cat", "what", ("cat", 2)), row("a cat", "who")
    assert QuestionAnswering().resolve(dataset(answered)).unanswerable == "no"
    assert QuestionAnswering().resolve(dataset(answered, silent)).unanswerable == "yes"
    assert QuestionAnswering(unanswerable="yes").resolve(dataset(answered)).unanswerable == "yes"
    with pytest.raises(DataError, match="no question has an answer"):
        QuestionAnswering().resolve(dataset(silent, silent))


def test_rows_without_an_answer_have_the_columns_of_those_with_one() -> None:
    silent, _ = prepared(row("a cat", "who"), unanswerable="yes")
    answered, _ = prepared(row("a cat", "who", ("cat", 2)))
    assert silent.features == answered.features
    assert (silent["start"][:], silent["end"][:]) == (silent["null"][:], silent["null"][:])


WRONG = {
    "empty question": row("a cat", " ", ("cat", 2)),
    "empty context": row("\n", "what", ("cat", 2)),
    "no answer": row("a cat", "what"),
    "answers without places": {**row("a cat", "what"), "answers": {"text": ["cat"], "answer_start": []}},
    "empty answer": row("a cat", "what", ("", 2)),
    "answer not in the context": row("a cat", "what", ("dog", 2)),
    "answer at another place": row("a cat, a cat and a cat", "what", ("cat", 8)),
}


@pytest.mark.parametrize("reason", WRONG)
def test_rows_that_ask_for_what_is_not_there_are_named(reason: str) -> None:
    (flaw,) = QuestionAnswering(unanswerable="no").flaws(dataset(row("a cat", "what", ("cat", 2)), WRONG[reason]))
    assert (flaw.row, flaw.reason) == (1, reason)
    if reason == "answer at another place":
        assert (flaw.detail, flaw.mend[:11]) == ("answer_start is 8, the answer stands at 9", "set it to 9")


def test_a_question_that_leaves_no_room_for_the_text_is_named() -> None:
    with pytest.raises(DataError, match=r"row 1 .*question too long, \d+ tokens; of task.max_length 64 too few"):
        prepared(row("a cat", "what", ("cat", 2)), row("a cat", "what zebra quizzes " * 9, ("cat", 2)))


class Scores:
    """A model whose scores are given."""

    def __init__(self, start: list[float], end: list[float]) -> None:
        self.start_logits, self.end_logits = torch.tensor([start]), torch.tensor([end])

    def __call__(self, **_: Any) -> Scores:
        return self


def test_the_best_span_is_no_longer_than_is_allowed_and_stands_in_the_text() -> None:
    #                 null  ?    a    b    c    d
    start, end = [1.0, 9.0, 5.0, 0.0, 0.0, 1.0], [2.0, 9.0, 0.0, 1.0, 4.0, 9.0]
    batch = {
        "input_ids": torch.ones(1, 6),
        "context": torch.tensor([[0, 0, 1, 1, 1, 1]]).bool(),
        "null": torch.tensor([0]),
        "index": torch.tensor([3]),
    }
    for longest, best in ((4, (14.0, 2, 5)), (3, (10.0, 5, 5)), (30, (14.0, 2, 5))):
        task = QuestionAnswering(max_answer=longest)
        said = task.predict(Scores(start, end), batch, None)[3].prediction  # type: ignore[arg-type]
        assert said == _Said(best[0], 3.0, *best[1:])


def parts_of(*said: _Said) -> list[Prediction]:
    return [Prediction(each, None) for each in said]


COLUMNS = {
    "text": ["one cat", "two dogs"],
    "begins": [[0, 0, 3], [0, 0, 3]],
    "ends": [[0, 3, 7], [0, 3, 8]],
    "answers": [["dogs"], ["dogs"]],
}


def test_the_parts_of_an_example_say_their_best_and_least_null() -> None:
    parts = parts_of(_Said(2.0, 9.0, 1, 1), _Said(3.0, 4.0, 2, 2))
    plain = QuestionAnswering(unanswerable="no").join(parts, COLUMNS)
    assert (plain.prediction, plain.reference) == ("dogs", ["dogs"])
    for threshold, answer in ((0.0, ""), (0.99, ""), (1.0, "dogs"), (-9.0, "")):
        task = QuestionAnswering(unanswerable="yes", null_threshold=threshold)
        assert task.join(parts, COLUMNS).prediction == answer


def test_parts_of_questions_on_one_text_are_one_cluster() -> None:
    rows = [row(LONG, "which", ("3 cats", 14)), row("a cat", "what", ("cat", 2)), row(LONG, "what", ("9 cats", 63))]
    parts, _ = prepared(*rows)
    clusters = [part["cluster"] for part in parts]
    assert len(set(clusters)) == 2
    assert [cluster == clusters[0] for cluster in clusters] == [part["text"] != "a cat" for part in parts]


def test_guesses_take_the_first_sentence_or_what_stands_where_answers_do() -> None:
    learned, _ = prepared(
        row("one cat sees. two dogs", "who", ("cat", 4)),
        row("an old cat", "which", ("old cat", 3)),
        row("the dog", "who", ("dog", 4)),
        row("a bird", "who"),
    )
    held, _ = prepared(row("two birds sing. They fly.", "who", ("birds", 4)), row("me", "what"), row(LONG, "how many"))
    guesses = QuestionAnswering(unanswerable="yes").baselines(learned, held)
    last = len(held) - int(np.argmax(np.array(held["part"][:])[::-1] == 0)) - 1
    said = {
        name: {number: each.prediction for number, each in guess.predictions.items()} for name, guess in guesses.items()
    }
    assert said["no answer"] == {0: "", 1: "", last: ""}
    assert said["first sentence"] == {0: "two birds sing.", 1: "me", last: held[last]["text"]}
    assert said["usual place"].keys() == {0, 1, last}
    assert guesses["usual place"].predictions[0].reference == ["birds"]
    assert list(QuestionAnswering(unanswerable="no").baselines(learned, held)) == ["first sentence", "usual place"]


def test_the_usual_place_is_counted_in_tokens_of_the_text_and_ends_with_it() -> None:
    words = ["cat", "dog", "tree", "bird", "not"]
    learned, _ = prepared(*(row(f"the {word} sees", "what is it" * len(word), (word, 4)) for word in words))
    held, _ = prepared(
        row("a red cat", "who", ("red", 2)), row("a", "what", ("a", 0)), row("the tree", "a", ("the", 0))
    )
    guess = QuestionAnswering(unanswerable="no").baselines(learned, held)["usual place"]
    assert [each.prediction for each in guess.predictions.values()] == ["red", "a", "tree"]


def prepare(folder: Path, **changes: Any) -> Any:
    task = "question-answering"
    tiny.save_model(folder / "model", task)
    rows = tiny.save_rows(folder / "rows.jsonl", task, 40)
    return finetune.prepare(tiny.config(task, folder / "model", rows, folder / "run", **changes))


def test_parts_that_fall_on_several_ranks_make_the_examples_they_make_on_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepare(tmp_path)
    rows = run.validation
    report = harness.evaluate(run)
    assert len(rows) > report.num_examples == report.metrics["f1"].n == 8
    assert report.metrics["loss"].n == len(rows)
    said = {number: Prediction(_Said(float(number % 5), 2.0, 0, 0), None) for number in range(len(rows))}
    whole = harness._joined(run, said)
    shares = [{number: part for number, part in said.items() if number % 3 == rank} for rank in range(3)]
    joined = {}
    for rank in range(3):
        world = SimpleNamespace(rank=rank, ranks=3, gather=lambda _: shares)
        monkeypatch.setattr(run, "world", world)
        joined |= (mine := harness._joined(run, shares[rank]))
        assert 0 < len(mine) < len(whole)
    assert joined == whole
    assert len(whole) == 8


def test_an_exported_model_gives_the_spans_of_the_live_one(tmp_path: Path) -> None:
    run = prepare(tmp_path)
    folder = export(run)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForQuestionAnswering.from_pretrained(folder)
    given = tokenizer("what follows red", "a red cat sees", return_tensors="pt")
    with torch.no_grad():
        live, loaded = run.model.eval()(**given), model.eval()(**given)
    assert torch.allclose(live.start_logits, loaded.start_logits, atol=1e-6)
    assert torch.allclose(live.end_logits, loaded.end_logits, atol=1e-6)


def test_the_first_questions_are_shown_with_their_answers(tmp_path: Path) -> None:
    run = prepare(tmp_path)
    samples = harness.evaluate(run).samples
    assert len(samples) == 3
    assert all(sample.prompt.startswith("what follows") for sample in samples)
    assert all(sample.reference and sample.output for sample in samples)
