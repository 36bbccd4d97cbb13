"""What is told of one text: its words, its language, personal data; and the text of a row."""

from __future__ import annotations

import pyarrow as pa
import pytest

from trainworks.data.hygiene import count_personal_data, exact_duplicates, languages
from trainworks.data.hygiene.documents import check_columns, documents
from trainworks.data.hygiene.language import known_languages
from trainworks.data.hygiene.length import count_words
from trainworks.data.hygiene.pii import KINDS
from trainworks.errors import DataError

SENTENCES = {
    "en": "The cat sat on the mat and looked at the dog.",
    "de": "Die Katze saß auf der Matte und sah den Hund an.",
    "fr": "Le chat était assis sur le tapis et regardait le chien.",
    "es": "El gato estaba sentado en la alfombra y miraba al perro.",
    "pl": "Kot siedział na macie i patrzył na psa.",
    "tr": "Kedi minderin üzerinde oturuyor ve köpeğe bakıyordu.",
    "zh": "猫坐在垫子上看着狗。",
    "ja": "猫はマットの上に座って犬を見ていた。",
    "ar": "جلست القطة على السجادة ونظرت إلى الكلب.",
    "hi": "बिल्ली चटाई पर बैठी थी और कुत्ते को देख रही थी।",
}

PERSONAL = {
    "email address": ("write to jo.doe+news@mail.example.org today", "the @ sign, user@localhost"),
    "telephone number": ("call +49 30 1234 5678 or (555) 123-4567", "in 1998, 2001 and 2012, 12.5 of 1234"),
    "payment card": ("paid with 4111 1111 1111 1111 yesterday", "order 4111 1111 1111 1112"),
    "bank account (IBAN)": ("to DE89 3704 0044 0532 0130 00, please", "part DE88 3704 0044 0532 0130 00"),
    "IP address": ("from 192.168.10.254 to 8.8.8.8", "version 1.2.3, then 300.1.1.1 and 1.2.3.4.5"),
}


def test_a_language_is_told_without_a_network_and_surely_enough():
    told = languages(list(SENTENCES.values()))
    assert [code for code, _ in told] == list(SENTENCES)
    assert min(score for _, score in told) >= 0.5
    assert set(SENTENCES) <= set(known_languages())


@pytest.mark.parametrize("kind", KINDS)
def test_personal_data_of_each_kind_is_counted_and_what_only_looks_like_it_is_not(kind):
    found, similar = count_personal_data(PERSONAL[kind])[:, KINDS.index(kind)]
    assert found == PERSONAL[kind][0].count(" or ") + PERSONAL[kind][0].count(" to 8") + 1
    assert similar == 0


def test_words_are_counted_in_scripts_with_and_without_spaces():
    texts = ["It's a test.", "", "über_alles", "猫坐在", "बिल्ली चटाई", "a\n\nb\tc", "\ud800 odd"]
    assert count_words(texts).tolist() == [4, 0, 2, 3, 2, 3, 1]


def test_the_first_of_the_same_texts_stays():
    assert exact_duplicates(["a", "b", "a", "A", "b"]).tolist() == [True, True, False, True, False]


def test_the_text_of_a_row_is_what_its_columns_say():
    table = pa.Table.from_pylist(
        [
            {
                "ask": "Why?",
                "say": None,
                "messages": [{"role": "user", "content": "Hi"}, {"role": "x", "content": "Yo"}],
            },
            {"ask": "", "say": "So.", "messages": None},
        ]
    )
    assert documents(table, ["ask"]) == ["Why?", ""]
    assert documents(table, ["ask", "say"]) == ["Why?", "So."]
    assert documents(table, ["messages"]) == ["Hi\n\nYo", ""]


def test_a_column_without_text_is_refused_with_what_there_is():
    schema = pa.schema({"text": pa.string(), "label": pa.int64()})
    with pytest.raises(DataError, match=r"no column 'texts' .did you mean 'text'.*there are: text, label"):
        check_columns(schema, ["texts"], where="rows")
    with pytest.raises(DataError, match="'label' holds int64; expected text"):
        check_columns(schema, ["label"], where="rows")
