"""Every task there is; a new one is a file and a word here."""

from __future__ import annotations

from trainworks.tasks.base import Baseline, Processor, Task
from trainworks.tasks.causal_lm import CausalLM
from trainworks.tasks.image_classification import ImageClassification, Mixing
from trainworks.tasks.masked_image import MaskedImage
from trainworks.tasks.masked_lm import MaskedLM
from trainworks.tasks.object_detection import ObjectDetection
from trainworks.tasks.objectives import DPO, IPO, KTO, ORPO, SimPO
from trainworks.tasks.preference import Preference
from trainworks.tasks.question_answering import QuestionAnswering
from trainworks.tasks.reward import Reward
from trainworks.tasks.semantic_segmentation import SemanticSegmentation
from trainworks.tasks.seq2seq import Seq2Seq
from trainworks.tasks.sequence_classification import SequenceClassification
from trainworks.tasks.sequence_regression import SequenceRegression
from trainworks.tasks.sft import SFT
from trainworks.tasks.token_classification import TokenClassification

__all__ = [
    "DPO",
    "IPO",
    "KTO",
    "ORPO",
    "SFT",
    "TASKS",
    "Baseline",
    "CausalLM",
    "ImageClassification",
    "MaskedImage",
    "MaskedLM",
    "Mixing",
    "ObjectDetection",
    "Preference",
    "Processor",
    "QuestionAnswering",
    "Reward",
    "SemanticSegmentation",
    "Seq2Seq",
    "SequenceClassification",
    "SequenceRegression",
    "SimPO",
    "Task",
    "TokenClassification",
]

TASKS: dict[str, type[Task]] = {
    "causal-lm": CausalLM,
    "masked-lm": MaskedLM,
    "preference": Preference,
    "reward": Reward,
    "sft": SFT,
    "seq2seq": Seq2Seq,
    "sequence-classification": SequenceClassification,
    "sequence-regression": SequenceRegression,
    "token-classification": TokenClassification,
    "question-answering": QuestionAnswering,
    "image-classification": ImageClassification,
    "masked-image": MaskedImage,
    "object-detection": ObjectDetection,
    "semantic-segmentation": SemanticSegmentation,
}
