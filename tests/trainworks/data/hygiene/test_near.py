"""Near-duplicates: what counts as one, what the bands see, and what is verified."""

from __future__ import annotations

import random

import numpy as np
import pytest

from trainworks.data.hygiene.near import Bands, candidates, clusters, near_duplicates
from trainworks.data.hygiene.words import ngrams, read_words

WORDS = [f"{first}{second}{third}" for first in "bdfghk" for second in "aeiou" for third in range(100)]


def document(rng, longest=120):
    return rng.choices(WORDS, k=rng.randint(40, longest))


def jaccard(one, other):
    first, second = ({tuple(words[place : place + 5]) for place in range(len(words) - 4)} for words in (one, other))
    return len(first & second) / len(first | second)


def changed(words, rng, number):
    """Change some words in a row, which costs few shingles, so that every similarity can be had."""
    words = list(words)
    start = rng.randrange(len(words) - number + 1)
    words[start : start + number] = rng.choices(WORDS, k=number)
    return words


def planted(number, rng):
    """Return documents of which one in ten is a near-duplicate of one before it, and those pairs."""
    documents, pairs = [], []
    while len(documents) < number:
        if len(documents) % 10 == 9:
            original = rng.randrange(len(documents))
            copy = changed(documents[original], rng, rng.randint(0, 4))
            while jaccard(documents[original], copy) < 0.85:
                copy = changed(documents[original], rng, 1) if rng.random() < 0.5 else documents[original][:-1]
            pairs.append((original, len(documents)))
            documents.append(copy)
        else:
            documents.append(document(rng))
    return [" ".join(words) for words in documents], pairs


@pytest.mark.parametrize("number", [2_000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_planted_near_duplicates_are_found_and_nothing_else(number):
    texts, pairs = planted(number, random.Random(0))
    found = near_duplicates(texts)
    removed = set(np.flatnonzero(~found.keep).tolist())
    later = {second for _, second in pairs}
    assert len(later) == number // 10
    assert len(later & removed) / len(later) >= 0.99
    verified = [jaccard(texts[one].split(), texts[other].split()) for one, other in found.pairs.tolist()]
    assert min(verified) >= 0.85
    assert len(later & removed) / len(removed) >= 0.95


@pytest.mark.slow
def test_the_share_found_rises_with_the_similarity_as_the_bands_say(record_property):
    rng = random.Random(1)
    bands = Bands.at(0.85)
    for tenths in range(10, 21):
        wanted = tenths / 20
        pairs = []
        while len(pairs) < 300:
            original = document(rng, 300)
            copy = changed(
                original, rng, min(len(original), round(len(original) * (1 - wanted) * rng.uniform(0.2, 1.2)))
            )
            if abs(jaccard(original, copy) - wanted) < 0.01:
                pairs.append((" ".join(original), " ".join(copy)))
        texts = [text for pair in pairs for text in pair]
        found = near_duplicates(texts, threshold=0.85).pairs.tolist()
        seen = _candidate_share(texts, bands)
        record_property(f"recall at {wanted}", (len(found) / len(pairs), seen))
        print(
            f"J {wanted:.2f}: candidates {seen:.3f} (expected {bands.recall(wanted):.3f}), kept {len(found) / 300:.3f}"
        )
        assert seen == pytest.approx(bands.recall(wanted), abs=0.1)
        if wanted >= 0.9:
            assert len(found) == len(pairs)
        if wanted <= 0.8:
            assert not found


def _candidate_share(texts, bands):
    from trainworks.data.hygiene.near import band_keys

    keys, filled = band_keys(texts, bands, ngram=5)
    assert filled.all()
    found = {tuple(pair) for band in keys for pair in candidates(band, np.arange(len(texts))).tolist()}
    return sum((row, row + 1) in found for row in range(0, len(texts), 2)) / (len(texts) / 2)


def test_at_every_threshold_the_bands_see_all_but_one_pair_in_a_thousand():
    for threshold in np.linspace(0.3, 1, 15):
        assert Bands.at(float(threshold)).recall(float(threshold)) >= 0.999


def test_case_punctuation_and_unicode_form_do_not_tell_texts_apart():
    one = "The café was closed, so we (all five of us) went home again."
    other = "THE CAFE\u0301 WAS CLOSED – SO WE ALL FIVE OF US WENT  HOME AGAIN"
    assert near_duplicates([one, other, "something else, of six words, altogether"]).keep.tolist() == [
        True,
        False,
        True,
    ]


def test_texts_shorter_than_a_shingle_are_compared_whole_and_empty_ones_are_left_alone():
    assert near_duplicates(["one two", "One, two!", "one", "", "  ", "..."]).keep.tolist() == [
        True,
        False,
        True,
        True,
        True,
        True,
    ]
    assert near_duplicates([]).keep.tolist() == []


def test_of_a_cluster_the_first_stays_whichever_pair_was_found_first():
    assert clusters(np.array([[3, 4], [1, 3], [0, 2]]), 6).tolist() == [0, 1, 0, 1, 1, 5]


def test_a_large_group_of_one_text_is_one_cluster_and_takes_few_pairs():
    rng = random.Random(2)
    texts = [" ".join(document(rng))] * 3_000
    found = near_duplicates(texts)
    assert found.keep.sum() == 1
    assert len(found.pairs) < 40 * len(texts)


def test_words_in_a_row_hash_alike_wherever_they_stand():
    alone, inside = (ngrams(read_words([text]), 3).hashes for text in ("b c d", "a  b, c\nd e"))
    assert alone[0] in inside
    assert len(inside) == 3


def test_a_word_hashes_alike_in_any_text_and_a_script_without_spaces_gives_a_word_a_character():
    assert read_words(["word"]).hashes.tolist() == read_words(["x WORD y"]).hashes[1:2].tolist()
    assert read_words(["猫は"]).counts.tolist() == [2]
