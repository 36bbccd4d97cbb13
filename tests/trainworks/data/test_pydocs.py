import pytest
from datasets import Dataset

from trainworks.data import pydocs
from trainworks.data.sources import read
from trainworks.errors import DataError
from trainworks.reading import Data


@pytest.fixture(scope="module")
def text() -> dict[str, pydocs.Columns]:
    return pydocs.read()


@pytest.fixture(scope="module")
def questions() -> dict[str, pydocs.Columns]:
    return pydocs.read("questions")


def test_there_is_enough_to_train_and_to_hold_out(text, questions):
    assert sum(map(len, text["train"]["text"])) > 1_000_000
    assert len(questions["train"]["question"]) > 2_000
    for splits, column in ((text, "text"), (questions, "question")):
        held = len(splits["validation"][column])
        assert 0.03 < held / (held + len(splits["train"][column])) < 0.1


def test_reading_again_gives_the_same_rows_in_the_same_order(questions):
    assert pydocs.read("questions") == questions


def test_no_text_or_answer_stands_in_both_splits_or_twice(text, questions):
    for splits, column in ((text, "text"), (questions, "answer")):
        everything = splits["train"][column] + splits["validation"][column]
        assert len(set(everything)) == len(everything)


def test_what_is_held_out_from_one_subset_is_held_out_from_the_other(text, questions):
    names = {split: set(text[split]["name"]) | set(questions[split]["name"]) for split in ("train", "validation")}
    assert names["train"].isdisjoint(names["validation"])


def test_an_object_is_held_out_with_its_members_and_namesakes(monkeypatch, tmp_path):
    body = """class Thing{n}:
    'Be number {n} of {module}.'
    def act(self):
        'Act as number {n} of {module}.'
"""
    for module in ("json", "pickle"):
        (tmp_path / f"{module}.py").write_text("".join(body.format(n=n, module=module) for n in range(200)))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    splits = pydocs.read("questions")
    things = {split: {name.split(".")[1] for name in columns["name"]} for split, columns in splits.items()}
    assert things["validation"]
    assert things["train"].isdisjoint(things["validation"])
    assert sum(len(columns["name"]) for columns in splits.values()) == 2 * 2 * 200


def test_questions_are_public_short_and_name_what_they_ask(questions):
    for columns in questions.values():
        for question, answer, name in zip(columns["question"], columns["answer"], columns["name"], strict=True):
            assert name in question
            assert 20 <= len(answer) <= 200
            assert answer.endswith(".")
            assert not any(part.startswith("_") for part in name.split("."))
    assert len({question.split()[0] for question in questions["train"]["question"]}) > 3


def test_no_test_suites_and_no_installed_packages_are_read(text):
    tops = {name.split(".")[0] for name in text["train"]["name"] if "." in name}
    assert "json" in tops
    assert not tops & {"test", "pip", "numpy", "pydoc_data"}


def test_an_unknown_subset_is_refused_with_the_nearest():
    with pytest.raises(DataError, match=r"no subset 'question' \(did you mean 'questions'\?\)"):
        pydocs.read("question")


def test_a_python_without_sources_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match="no library sources in"):
        pydocs.read()


def test_python_docs_is_a_source_with_named_splits_and_a_licence():
    rows = read(Data(source="python-docs", subset="questions", validation="validation"), seed=0)
    assert isinstance(rows.validation, Dataset)
    assert rows.train.column_names == ["question", "answer", "name"]
    assert (rows.source, rows.subset, rows.revision, rows.license) == ("python-docs", "questions", None, "PSF-2.0")
