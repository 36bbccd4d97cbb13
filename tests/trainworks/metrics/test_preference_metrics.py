"""Metrics of compared answers: who wins, and by how much, of pairs and of single answers."""

from __future__ import annotations

import math

import pytest

from trainworks.metrics import Mean, Prediction, PreferenceAccuracy, RewardGap

PAIRS = [Prediction(0.5, True), Prediction(-0.1, True), Prediction(0.0, True), Prediction(2.0, True)]
SINGLE = [Prediction(0.5, True), Prediction(-1.0, False), Prediction(2.0, False), Prediction(1.5, True)]


def test_a_pair_is_right_where_the_chosen_answer_wins_and_half_right_where_neither_does() -> None:
    metric = PreferenceAccuracy()
    assert metric.statistics(PAIRS).tolist() == [[1.0], [0.0], [0.5], [1.0]]
    assert metric.value(metric.statistics(PAIRS)) == 0.625


def test_a_single_answer_is_right_where_its_reward_has_the_sign_of_its_label() -> None:
    metric = PreferenceAccuracy()
    assert metric.value(metric.statistics(SINGLE)) == 0.75


def test_the_margin_of_pairs_is_their_mean() -> None:
    metric = Mean("reward_margin")
    assert metric.value(metric.statistics(PAIRS)) == pytest.approx(0.6)


def test_the_margin_of_single_answers_is_between_the_means_of_both_kinds() -> None:
    metric = RewardGap("reward_margin")
    assert metric.value(metric.statistics(SINGLE)) == pytest.approx(1.0 - 0.5)
    assert math.isnan(metric.value(metric.statistics(SINGLE[:1])))


@pytest.mark.parametrize("metric", [PreferenceAccuracy(), Mean("m"), RewardGap("m")])
def test_no_example_has_no_value(metric: PreferenceAccuracy | Mean | RewardGap) -> None:
    assert math.isnan(metric.value(metric.statistics([])))
