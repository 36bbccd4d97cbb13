"""Pretrain, fine-tune, evaluate and publish Hugging Face models, with one loop on Accelerate.

Nothing heavy is imported until a name needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainworks.lazy import exports

if TYPE_CHECKING:
    from trainworks.errors import ToolkitError
    from trainworks.evaluation import evaluate
    from trainworks.exporting import export
    from trainworks.launching import run_on
    from trainworks.loop import TrainStep, train_steps
    from trainworks.preview import Preview
    from trainworks.reading import Data, Limit, Mixture, Part
    from trainworks.record import EvalReport, RunRecord, read_record
    from trainworks.run import Run
    from trainworks.schema import (
        Average,
        Batch,
        Budget,
        EarlyStop,
        Every,
        Faults,
        Freeze,
        FromScratch,
        Full,
        Goal,
        Hub,
        Layout,
        LoRA,
        NewImageProcessor,
        NewTokenizer,
        Optim,
        Peft,
        Pretrained,
        Quantise,
        Speed,
    )
    from trainworks.tasks import (
        DPO,
        IPO,
        KTO,
        ORPO,
        SFT,
        CausalLM,
        ImageClassification,
        MaskedImage,
        MaskedLM,
        Mixing,
        ObjectDetection,
        Preference,
        QuestionAnswering,
        Reward,
        SemanticSegmentation,
        Seq2Seq,
        SequenceClassification,
        SequenceRegression,
        SimPO,
        TokenClassification,
    )
    from trainworks.training import fit

__version__ = "0.1.0"

__all__ = [
    "DPO",
    "IPO",
    "KTO",
    "ORPO",
    "SFT",
    "Average",
    "Batch",
    "Budget",
    "CausalLM",
    "Data",
    "EarlyStop",
    "EvalReport",
    "Every",
    "Faults",
    "Freeze",
    "FromScratch",
    "Full",
    "Goal",
    "Hub",
    "ImageClassification",
    "Layout",
    "Limit",
    "LoRA",
    "MaskedImage",
    "MaskedLM",
    "Mixing",
    "Mixture",
    "NewImageProcessor",
    "NewTokenizer",
    "ObjectDetection",
    "Optim",
    "Part",
    "Peft",
    "Preference",
    "Pretrained",
    "Preview",
    "Quantise",
    "QuestionAnswering",
    "Reward",
    "Run",
    "RunRecord",
    "SemanticSegmentation",
    "Seq2Seq",
    "SequenceClassification",
    "SequenceRegression",
    "SimPO",
    "Speed",
    "TokenClassification",
    "ToolkitError",
    "TrainStep",
    "evaluate",
    "export",
    "fit",
    "read_record",
    "run_on",
    "train_steps",
]

_SCHEMA = (
    "Average",
    "Batch",
    "Budget",
    "EarlyStop",
    "Every",
    "Faults",
    "Freeze",
    "FromScratch",
    "Full",
    "Goal",
    "Hub",
    "Layout",
    "LoRA",
    "NewImageProcessor",
    "NewTokenizer",
    "Optim",
    "Peft",
    "Pretrained",
    "Quantise",
    "Speed",
)
_TASKS = (
    "DPO",
    "IPO",
    "KTO",
    "ORPO",
    "SFT",
    "CausalLM",
    "ImageClassification",
    "MaskedImage",
    "MaskedLM",
    "Mixing",
    "ObjectDetection",
    "Preference",
    "QuestionAnswering",
    "Reward",
    "SemanticSegmentation",
    "Seq2Seq",
    "SequenceClassification",
    "SequenceRegression",
    "SimPO",
    "TokenClassification",
)

__getattr__ = exports(
    __name__,
    **dict.fromkeys(_SCHEMA, "trainworks.schema"),
    **dict.fromkeys(("Data", "Limit", "Mixture", "Part"), "trainworks.reading"),
    **dict.fromkeys(_TASKS, "trainworks.tasks"),
    **dict.fromkeys(("EvalReport", "RunRecord", "read_record"), "trainworks.record"),
    **dict.fromkeys(("TrainStep", "train_steps"), "trainworks.loop"),
    Preview="trainworks.preview",
    Run="trainworks.run",
    ToolkitError="trainworks.errors",
    evaluate="trainworks.evaluation",
    run_on="trainworks.launching",
    export="trainworks.exporting",
    fit="trainworks.training",
)
