"""Contamination: items found whole, recased, cut in half or edited, inside other text; and clean text left alone."""

from __future__ import annotations

import json
import random
import re

import numpy as np
import pytest

from trainworks.data.hygiene.contamination import contaminated, index_items

ITEM = "A farmer has twelve hens and each of them lays two eggs a day; how many eggs does he sell in a week?"


def verbatim(text, rng):
    return text


def recased(text, rng):
    return re.sub(r"[.,?!;]", lambda _: rng.choice(["", " ...", ";"]), text).swapcase().replace(" ", "  ")


def halved(text, rng):
    words = text.split()
    middle = len(words) // 2
    return " ".join(rng.choice([words[:middle], words[middle:]]))


def edited(text, rng):
    """Change, leave out or add one word in thirty, and one at least."""
    words = text.split()
    for place in range(rng.randrange(min(30, len(words))), len(words), 30):
        words[place] = rng.choice(["changed", "", f"{words[place]} added"])
    return " ".join(words)


CHANGES = {verbatim: 0.99, recased: 0.95, halved: 0.95, edited: 0.95}


def inside(text, passage):
    middle = passage.find(" ", len(passage) // 2)
    return f"{passage[:middle]} {text} {passage[middle:]}"


def passages(folder):
    whole = "\n\n".join(path.read_text(encoding="utf-8") for path in sorted((folder / "gutenberg_books").glob("*.txt")))
    return [part for part in re.split(r"\n\s*\n", whole) if len(part.split()) > 30]


@pytest.mark.data
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_planted_items_of_a_real_evaluation_set_are_found(shared_data, change):
    lines = (shared_data / "eval_gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    items = [json.loads(line)["question"] for line in lines]
    rng, clean = random.Random(0), passages(shared_data)
    planted = [inside(change(item, rng), rng.choice(clean)) for item in items[:1000]]
    found = contaminated(planted, index_items(items))
    assert len(found) == 1000
    assert (found >= 0).mean() >= CHANGES[change]


@pytest.mark.data
def test_clean_text_is_left_alone(shared_data):
    lines = (shared_data / "eval_gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    items = [json.loads(line)["question"] for line in lines]
    dolly = json.loads((shared_data / "sft_dolly3k" / "dolly_3k.json").read_text(encoding="utf-8"))
    clean = passages(shared_data) + [f"{row['instruction']}\n{row['output']}" for row in dolly]
    assert len(clean) > 5_000
    assert (contaminated(clean, index_items(items)) >= 0).mean() <= 0.005
    # Questions of the same hand as the items, but other ones, are the hardest clean text there is.
    assert (contaminated(items[700:], index_items(items[:700])) >= 0).mean() <= 0.005


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_an_item_is_found_however_it_was_changed(change):
    rng = random.Random(0)
    text = inside(change(ITEM, rng), "It was a long story that nobody wanted to hear to its very end, so he left.")
    assert contaminated([text, "A farmer has twelve hens."], index_items([ITEM])).tolist() == [0, -1]


def test_a_short_item_must_be_there_whole_and_a_very_short_one_is_counted_as_not_looked_for():
    index = index_items(["who wrote the magic mountain", "2 + 2", "yes"])
    assert index.num_short == 2
    assert contaminated(
        ["Who wrote 'The Magic Mountain'?", "who wrote the magic flute", "yes 2 + 2"], index
    ).tolist() == [0, -1, -1]


def test_words_of_an_item_in_another_order_are_no_contamination():
    first, second, third = "one two three four five", "six seven eight nine ten", "a b c d e"
    filler = " ".join(f"filler{number}" for number in range(30))
    index = index_items([f"{first} {second} {third}"], share=0.6)
    assert contaminated([f"{first} {second} {third}"], index).tolist() == [0]
    assert contaminated([f"{third} {filler} {second} {filler} {first}"], index).tolist() == [-1]


def test_items_that_share_most_of_their_words_are_all_found():
    items = [f"which of these {number} statements about the moon landing is not true at all" for number in range(50)]
    assert (contaminated(items, index_items(items)) >= 0).all()


def test_without_items_nothing_is_found():
    assert np.array_equal(contaminated(["some text of more than five words"], index_items([])), [-1])
