"""Which tokens are masked: a share of them, words whole, drawn from a seed alone."""

from __future__ import annotations

import numpy as np
import pytest

from trainworks.data.masking import BEGINS, GOES_ON, NEVER, chosen, content_seed, kinds, replaced


def draw(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_special_tokens_are_never_masked_and_a_share_of_the_others_is() -> None:
    row = np.array([NEVER] + [BEGINS] * 100 + [NEVER], dtype=np.uint8)
    seen = np.zeros(len(row), dtype=np.int64)
    for seed in range(200):
        places = chosen(row, 0.15, draw(seed))
        assert len(places) == 15
        assert (np.diff(places) > 0).all()
        seen[places] += 1
    assert seen[0] == seen[-1] == 0
    assert seen[1:-1].min() > 10, "every place has its turn"


def test_words_are_masked_whole_or_not_at_all() -> None:
    row = np.array([GOES_ON, BEGINS, GOES_ON, GOES_ON, BEGINS, BEGINS, GOES_ON, NEVER] * 5, dtype=np.uint8)[:-1]
    words = np.cumsum(row == BEGINS)
    for seed in range(50):
        places = chosen(row, 0.3, draw(seed))
        assert 1 <= len(places) <= round(0.3 * np.count_nonzero(row))
        for word in np.unique(words[places]):
            assert (words[places] == word).sum() == ((words == word) & (row != NEVER)).sum()


def test_one_token_at_least_is_masked_where_there_is_one() -> None:
    assert chosen(np.array([NEVER, BEGINS, NEVER], dtype=np.uint8), 0.01, draw()).tolist() == [1]
    assert chosen(np.array([BEGINS, GOES_ON, GOES_ON], dtype=np.uint8), 0.15, draw()).tolist() == [0, 1, 2]
    assert chosen(np.array([NEVER, NEVER], dtype=np.uint8), 0.5, draw()).tolist() == []


def test_of_masked_tokens_eight_in_ten_are_hidden_one_is_another_and_one_stays() -> None:
    ids = np.arange(1000, 11_000)
    mixed = replaced(ids, np.arange(10_000), draw(), mask=7, vocabulary=500, mixed=True)
    hidden, kept = (mixed == 7).mean(), (mixed == ids).mean()
    assert hidden == pytest.approx(0.8, abs=0.02)
    assert kept == pytest.approx(0.1, abs=0.02)
    assert (mixed[(mixed != 7) & (mixed != ids)] < 500).all()
    assert (replaced(ids, np.arange(5), draw(), mask=7, vocabulary=500, mixed=False)[:6] == [7] * 5 + [1005]).all()


def test_a_word_is_what_the_tokenizer_numbers_alike_and_a_token_without_a_number_is_alone() -> None:
    ids = np.array([1, 5, 6, 7, 8, 9, 2])
    assert kinds(ids, [None, 0, 0, 1, None, None, None], special=[1, 2]).tolist() == [0, 1, 2, 1, 1, 1, 0]


def test_the_seed_of_a_text_is_a_function_of_its_tokens() -> None:
    ids = np.array([3, 1, 2])
    assert content_seed(ids) == content_seed(ids.astype(np.int32)) == content_seed(ids.copy())
    assert content_seed(ids) != content_seed(ids[::-1])
