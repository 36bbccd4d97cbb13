"""Metrics: predictions to statistics of single examples, and those to a value; nothing distributed inside."""

from trainworks.metrics.answers import AnswerF1, ExactMatch
from trainworks.metrics.base import Metric, Prediction, Statistics
from trainworks.metrics.classification import Accuracy, BinaryF1, MacroF1, MultiLabelF1
from trainworks.metrics.correlation import Correlation
from trainworks.metrics.entities import EntityScore, TagAccuracy
from trainworks.metrics.generation import CorpusScore, Rouge
from trainworks.metrics.hugging_face import HuggingFaceMetric
from trainworks.metrics.preference import Mean, PreferenceAccuracy, RewardGap
from trainworks.metrics.ratio import Ratio

__all__ = [
    "Accuracy",
    "AnswerF1",
    "BinaryF1",
    "CorpusScore",
    "Correlation",
    "EntityScore",
    "ExactMatch",
    "HuggingFaceMetric",
    "MacroF1",
    "Mean",
    "Metric",
    "MultiLabelF1",
    "Prediction",
    "PreferenceAccuracy",
    "Ratio",
    "RewardGap",
    "Rouge",
    "Statistics",
    "TagAccuracy",
]
