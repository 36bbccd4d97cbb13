"""CoNLL files: sentences of words and tags, and where mistakes in them stand."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest

from trainworks.data.bad_rows import BadRowsError
from trainworks.data.formats import conll
from trainworks.data.sources import Rows, read
from trainworks.reading import Data

TABS = "Ada\tB-PER\nLovelace\tI-PER\nsings\tO\n\t\n\nin\tO\nRome\tB-LOC"
BLANKS = """\
-DOCSTART- -X- -X- O

Ada NNP I-NP B-PER
Lovelace NNP I-NP I-PER
sings VBZ O O

in IN O O
Rome NNP I-NP B-LOC

"""
ROWS = [
    {"tokens": ["Ada", "Lovelace", "sings"], "ner_tags": ["B-PER", "I-PER", "O"]},
    {"tokens": ["in", "Rome"], "ner_tags": ["O", "B-LOC"]},
]


def rows_of(folder: Path, text: str, **changes: Any) -> Rows:
    path = folder / "train.conll"
    path.write_bytes(text.encode())
    return read(Data(**({"source": str(path), "holdout": 0} | changes)), seed=0)


@pytest.mark.parametrize("text", [TABS, BLANKS, TABS.replace("\n", "\r\n"), "\ufeff" + TABS], ids=range(4))
def test_sentences_are_rows_of_words_and_tags(text: str, tmp_path: Path) -> None:
    assert rows_of(tmp_path, text).train.to_list() == ROWS


def test_compressed_files_are_read_too(tmp_path: Path) -> None:
    path = tmp_path / "train.conll.gz"
    path.write_bytes(gzip.compress(TABS.encode()))
    assert read(Data(source=str(path), holdout=0), seed=0).train.to_list() == ROWS


def test_long_files_are_read_some_sentences_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conll, "_BATCH_WORDS", 4)
    rows = rows_of(tmp_path, f"{TABS}\n\n" * 5)
    assert rows.train.to_list() == ROWS * 5
    assert [rows.origins["train"].at(row).line for row in (0, 1, 2)] == [1, 6, 9]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("Rome", "no word and tag, 1 cells, but the file's first word has 2"),
        ("Rome\tB-LOC\tx", "no word and tag, 3 cells"),
        ("Rome\t", "no word and tag"),
        ("\tB-LOC", "no word and tag"),
        ("Ro\0me\tB-LOC", "NUL character"),
    ],
)
def test_a_line_without_word_and_tag_spoils_its_sentence_alone(line: str, words: str, tmp_path: Path) -> None:
    text = TABS.replace("Rome\tB-LOC", line) + "\n\nor\tO\n"
    with pytest.raises(BadRowsError) as caught:
        rows_of(tmp_path, text)
    assert "train.conll:7: row 1 (from 0): " in str(caught.value)
    assert words in str(caught.value)
    left = rows_of(tmp_path, text, bad_rows="skip")
    assert left.train["tokens"][:] == [ROWS[0]["tokens"], ["or"]]
    assert left.origins["train"].at(1).row == 2


def test_a_file_of_words_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRowsError, match=r"(?s)train.conll:1: row 0 .*no word and tag.*no row is left"):
        rows_of(tmp_path, "Ada\nsings\n", bad_rows="skip")


@pytest.mark.data
def test_wnut_has_as_many_sentences_as_its_authors_say(shared_data: Path) -> None:
    folder = shared_data / "ner_wnut17"
    rows = read(Data(source=str(folder), train="wnut17train.conll", validation="emerging.dev.conll"), seed=0)
    assert rows.validation is not None
    assert (len(rows.train), len(rows.validation)) == (3394, 1009)
    assert sum(map(len, rows.train["tokens"][:])) == 62730
    assert {len(row["tokens"]) - len(row["ner_tags"]) for row in rows.train} == {0}
