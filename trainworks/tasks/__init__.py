"""Every task there is; a new one is a file and a word here."""

from __future__ import annotations

from trainworks.tasks.base import Baseline, Processor, Task
from trainworks.tasks.causal_lm import CausalLM
from trainworks.tasks.masked_lm import MaskedLM
from trainworks.tasks.seq2seq import Seq2Seq
from trainworks.tasks.sequence_classification import SequenceClassification
from trainworks.tasks.sequence_regression import SequenceRegression
from trainworks.tasks.sft import SFT

__all__ = [
    "SFT",
    "TASKS",
    "Baseline",
    "CausalLM",
    "MaskedLM",
    "Processor",
    "Seq2Seq",
    "SequenceClassification",
    "SequenceRegression",
    "Task",
]

TASKS: dict[str, type[Task]] = {
    "causal-lm": CausalLM,
    "masked-lm": MaskedLM,
    "sft": SFT,
    "seq2seq": Seq2Seq,
    "sequence-classification": SequenceClassification,
    "sequence-regression": SequenceRegression,
}
