"""Metrics: predictions to statistics of single examples, and those to a value; nothing distributed inside."""

from trainworks.metrics.answers import AnswerF1, ExactMatch
from trainworks.metrics.base import Metric, Prediction, RankedPrediction, Statistics
from trainworks.metrics.classification import Accuracy, BinaryF1, MacroF1, MultiLabelF1, TopAccuracy
from trainworks.metrics.correlation import Correlation
from trainworks.metrics.detection import MOST_DETECTIONS, Boxes, MeanAveragePrecision
from trainworks.metrics.entities import EntityScore, TagAccuracy
from trainworks.metrics.generation import CorpusScore, Rouge
from trainworks.metrics.hugging_face import HuggingFaceMetric
from trainworks.metrics.preference import Mean, PreferenceAccuracy, RewardGap
from trainworks.metrics.ratio import Ratio, SumOfRatios
from trainworks.metrics.segmentation import MeanIoU, PixelAccuracy

__all__ = [
    "MOST_DETECTIONS",
    "Accuracy",
    "AnswerF1",
    "BinaryF1",
    "Boxes",
    "CorpusScore",
    "Correlation",
    "EntityScore",
    "ExactMatch",
    "HuggingFaceMetric",
    "MacroF1",
    "Mean",
    "MeanAveragePrecision",
    "MeanIoU",
    "Metric",
    "MultiLabelF1",
    "PixelAccuracy",
    "Prediction",
    "PreferenceAccuracy",
    "RankedPrediction",
    "Ratio",
    "RewardGap",
    "Rouge",
    "Statistics",
    "SumOfRatios",
    "TagAccuracy",
    "TopAccuracy",
]
