from datetime import time
from time import process_time

import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, Features

from trainworks.data.bad_rows import BadRowsError
from trainworks.data.columns import class_ids, class_names, fingerprint, rename, require_columns
from trainworks.errors import DataError

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def polarity(labels: list[int | None]) -> Dataset:
    features = Features({"label": ClassLabel(names=["neg", "pos"])})
    return Dataset(pa.table({"label": pa.array(labels, pa.int64())}, schema=features.arrow_schema))


def test_columns_of_every_kind_are_accepted():
    rows = Dataset.from_dict({"text": ["a"], "label": [1], "messages": [MESSAGES], "score": [0.5]})
    wanted = {"text": "text", "label": "label", "messages": "messages", "score": "any"}
    require_columns(rows, wanted, source="rows.jsonl")


def test_every_missing_or_wrong_column_is_named_at_once_with_the_mend():
    rows = Dataset.from_dict({"sentence": ["a"], "label": [0.5], "nothing": [None]})
    with pytest.raises(DataError) as caught:
        require_columns(rows, {"text": "text", "label": "label", "nothing": "any"}, source="rows.jsonl")
    message = str(caught.value)
    assert "rows.jsonl: no column 'text'" in message
    assert "data.columns: {text: sentence}" in message
    assert "column 'label' holds double" in message
    assert "'nothing' holds only nulls" in message
    assert "The columns are: sentence (string), label (double), nothing (null)" in message


def test_a_misspelt_column_brings_the_nearest_spelling():
    rows = Dataset.from_dict({"body": ["a"], "mesages": [MESSAGES]})
    with pytest.raises(DataError, match=r"did you mean 'mesages'\?.*data\.columns: \{messages: mesages\}"):
        require_columns(rows, {"messages": "messages"}, source="here")


def test_columns_are_renamed_and_may_change_places():
    rows = Dataset.from_dict({"a": ["x"], "b": ["y"]})
    assert rename(rows, {"a": "b", "b": "a"}, source="here")[0] == {"a": "y", "b": "x"}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": "sentense"}, r"no column 'sentense' \(did you mean 'sentence'\?\); there are: sentence, label"),
        ({"label": "sentence"}, "column 'label' is there already"),
        ({"text": "sentence", "prompt": "sentence"}, "one column twice"),
    ],
)
def test_a_renaming_that_cannot_be_is_refused(columns, message):
    rows = Dataset.from_dict({"sentence": ["a"], "label": [0]})
    with pytest.raises(DataError, match=message):
        rename(rows, columns, source="here")


@pytest.mark.parametrize(
    ("labels", "names"),
    [([10, 9, 10], ("9", "10")), (["b", "a"], ("a", "b")), ([True, False], ("False", "True"))],
)
def test_class_names_are_the_distinct_labels_in_order(labels, names):
    rows = Dataset.from_dict({"label": labels})
    assert class_names(rows, "label") == names
    assert class_ids(rows, "label", names) == [names.index(str(label)) for label in labels]


def test_declared_class_names_are_kept_and_labels_follow_names_not_numbers():
    rows = polarity([1, 0, 1])
    assert class_names(rows, "label") == ("neg", "pos")
    assert class_ids(rows, "label", ("pos", "neg")) == [0, 1, 0]


def test_labels_of_selected_rows_are_those_of_the_selection():
    rows = Dataset.from_dict({"label": ["a", "b", "c"]}).select([2, 1])
    assert class_names(rows, "label") == ("b", "c")
    assert class_ids(rows, "label", ("b", "c")) == [1, 0]


def test_a_label_outside_the_declared_classes_is_named_with_its_row():
    with pytest.raises(DataError, match=r"row 2 .*'label': unknown label; found 7; the 2 classes are: neg, pos"):
        class_ids(polarity([0, 1, 7]), "label", ("neg", "pos"))


def test_a_label_the_training_rows_never_had_is_named_with_its_row():
    with pytest.raises(DataError, match=r"row 1 .*'label': unknown label; found 'maybe'"):
        class_ids(Dataset.from_dict({"label": ["yes", "maybe"]}), "label", ("no", "yes"))


@pytest.mark.parametrize("call", [class_names, lambda rows, column: class_ids(rows, column, ("a",))])
def test_a_null_label_is_named_with_its_row(call):
    with pytest.raises(DataError, match=r"row 1 .*'label': null label"):
        call(Dataset.from_dict({"label": ["a", None, "a"]}), "label")


def test_a_missing_label_column_is_named_with_those_there_are():
    with pytest.raises(DataError, match=r"no column 'label'.* Map it: data.columns: \{label: text\}"):
        class_names(Dataset.from_dict({"text": ["a"]}), "label")


def test_a_message_shows_the_first_of_many_columns_and_of_a_long_type():
    wide = {f"k{number}": 1 for number in range(2_000)}
    rows = Dataset.from_dict({"text": [wide], **{f"column {number}": ["a"] for number in range(1_000)}})
    with pytest.raises(
        DataError, match=r"(?s)column 'text' holds struct<k0: int64.*column 18 \(string\), \.\.\."
    ) as caught:
        require_columns(rows, {"text": "text"}, source="here")
    assert len(str(caught.value)) < 2_000


def test_numbers_with_fractions_and_free_text_are_no_labels():
    with pytest.raises(DataError, match="holds double"):
        class_names(Dataset.from_dict({"label": [0.5]}), "label")
    with pytest.raises(DataError, match="10,001 different labels"):
        class_names(Dataset.from_dict({"label": list(range(10_001))}), "label")


CONTENT = {
    "text": ["a", None, "ccc", ""],
    "number": [1, 2, None, 4],
    "flag": [True, None, False, True],
    "nested": [[{"role": "user", "n": 1}], [], None, [{"role": None, "n": None}]],
    "blob": [b"x", b"", None, b"\x00y"],
    "clock": [time(1), None, time(2), time(3, 4, 5)],
}


def test_a_fingerprint_ignores_chunks_slices_column_order_and_text_width():
    table = pa.table(CONTENT)
    padded = pa.concat_tables([table.slice(3), table, table.slice(0, 1)])
    pieces = [padded.slice(1, 1), padded.slice(2, 2), padded.slice(4, 1)]
    wide = table.set_column(0, "text", table.column("text").cast(pa.large_string()))
    same = [
        pa.concat_tables(pieces),
        table.select(sorted(CONTENT)),
        wide,
        Dataset(table),
        Dataset(padded).select([1, 2, 3, 4]),
    ]
    assert {fingerprint(rows) for rows in same} == {fingerprint(table)}


def test_a_fingerprint_of_an_object_with_many_fields_is_made_soon():
    table = pa.table({"wide": [{f"k{number}": number for number in range(4_000)}]})
    begun = process_time()
    fingerprint(table)
    assert process_time() - begun < 4


@pytest.mark.parametrize("column", CONTENT)
def test_a_fingerprint_changes_with_any_value_its_order_and_its_split(column):
    table = pa.table(CONTENT)
    turned = table.set_column(table.column_names.index(column), column, table.column(column).take([1, 0, 2, 3]))
    emptied = table.set_column(table.column_names.index(column), column, pa.nulls(4, table.schema.field(column).type))
    assert len({fingerprint(rows) for rows in (table, turned, emptied, table.slice(1))}) == 4
    assert fingerprint(table, table) != fingerprint(pa.concat_tables([table, table]))


def test_text_cannot_move_between_rows_or_nulls_unnoticed():
    kinds = [["ab", ""], ["a", "b"], ["", "ab"], [None, "ab"], ["ab", None]]
    assert len({fingerprint(pa.table({"text": pa.array(values, pa.string())})) for values in kinds}) == len(kinds)


def test_every_null_text_is_named_by_its_row() -> None:
    rows = Dataset.from_dict({"text": ["a", None, "b", None], "other": [None, "x", None, None]})
    with pytest.raises(BadRowsError) as caught:
        require_columns(rows, {"text": "text", "other": "any"}, source="rows.jsonl")
    assert [(problem.row, problem.column) for problem in caught.value.problems] == [(1, "text"), (3, "text")]
    assert "rows.jsonl: row 1 (from 0), column 'text': null text; give every row a value there" in str(caught.value)
