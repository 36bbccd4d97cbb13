"""Records of three runs as they come out of training, made in memory."""

from __future__ import annotations

import math
import random

import pytest

from trainworks.record import (
    Comparison,
    Cost,
    CurvePoint,
    DataFacts,
    Environment,
    Estimate,
    EvalReport,
    GoalOutcome,
    ModelFacts,
    RunRecord,
    Sample,
    SplitFacts,
)

COMMIT = "714eb0fa89d2f80546fda750413ed43d93601a13"


def estimate(value: float, half: float, n: int, *, higher: bool = False) -> Estimate:
    return Estimate(value=value, low=value - half, high=value + half, n=n, higher_is_better=higher)


def curve(start: float, end: float, steps: int, every: int, per_step: int) -> tuple[CurvePoint, ...]:
    chance = random.Random(0)
    points = []
    for step in range(1, steps + 1, every):
        loss = end + (start - end) * math.exp(-4 * step / steps) + chance.gauss(0, 0.06)
        samples, lr = step * per_step, 1e-3 * (1 - step / steps)
        points.append(
            CurvePoint(
                step=step, samples=samples, tokens=samples * 250, loss=loss, lr=lr, grad_norm=1.0, seconds=step * 0.1
            )
        )
    return tuple(points)


ENVIRONMENT = Environment(
    python="3.11.9",
    platform="Linux-6.8-x86_64",
    versions={"torch": "2.13.0", "transformers": "5.23.0", "accelerate": "1.15.0"},
    device="AMD EPYC 7763",
    world_size=1,
    distributed="NO",
    mixed_precision="no",
    git_commit="0123456789abcdef0123456789abcdef01234567",
    git_dirty=False,
)


@pytest.fixture
def pretrained() -> RunRecord:
    """A small Llama trained from scratch on local text, without a place on the Hub."""
    losses = [(50, 3.61), (100, 3.02), (150, 2.79), (200, 2.71)]
    reports = [
        EvalReport(
            name="unigram",
            split="validation",
            step=0,
            is_baseline=True,
            num_examples=412,
            metrics={"loss": estimate(4.9, 0.02, 412)},
        )
    ]
    for step, loss in losses:
        reports.append(
            EvalReport(
                name="final" if step == 200 else f"step {step}",
                split="validation",
                step=step,
                is_baseline=False,
                num_examples=412,
                metrics={"loss": estimate(loss, 0.05, 412), "perplexity": estimate(math.exp(loss), 0.8, 412)},
                samples=(Sample(prompt="The function", reference="", output="The function returns\na list of"),),
            )
        )
    return RunRecord(
        kind="pretrain",
        status="complete",
        started="2026-11-20T09:00:00Z",
        finished="2026-11-20T09:00:48Z",
        command="accelerate launch --config_file configs/accelerate/cpu.yaml -m pretrain configs/pretrain/demo.yaml",
        config={
            "output": "/home/me/runs/pretrain",
            "seed": 0,
            "task": {"type": "causal-lm", "length": 256},
            "model": {"architecture": "llama", "sizes": {"hidden_size": 128}},
            "tuning": {"type": "full"},
            "data": {"source": "/home/me/texts/manual", "validation": None},
            "batch": {"per_step": 16, "micro": 8},
            "budget": {"steps": 200, "epochs": None},
            "optim": {"name": "adamw", "lr": 1e-3, "betas": [0.9, 0.95]},
            "hub": None,
        },
        task="causal-lm",
        pipeline_tag="text-generation",
        data=DataFacts(
            source="/home/me/texts/manual",
            fingerprint="9f" * 32,
            processor="7c" * 32,
            splits=(
                SplitFacts(
                    name="train", rows=2600, samples=3300, tokens=844_800, counted=841_500, dropped={"empty": 9}
                ),
                SplitFacts(name="validation", rows=137, samples=412, tokens=105_472, counted=105_060),
            ),
        ),
        model=ModelFacts(
            name=None,
            fingerprint="3e" * 32,
            architecture="LlamaForCausalLM",
            num_parameters=1_180_000,
            num_trainable=1_180_000,
            tuning="full",
            dtype="float32",
        ),
        environment=ENVIRONMENT,
        per_step=16,
        micro=8,
        steps_total=200,
        step=200,
        samples=3200,
        tokens=819_200,
        epochs=0.97,
        curve=curve(6.2, 2.65, 200, 2, 16),
        reports=tuple(reports),
        comparisons=(Comparison(metric="loss", baseline="unigram", difference=estimate(-2.19, 0.05, 412)),),
        cost=Cost(
            seconds=48.2,
            train_seconds=41.0,
            tokens_per_second=19_980,
            samples_per_second=78.0,
            peak_memory_bytes=1_400_000_000,
            energy_source="no counter can be read on this machine",
        ),
        goal=GoalOutcome(metric="loss", wanted="<= 2.8", value=2.71, met=True),
    )


@pytest.fixture
def finetuned() -> RunRecord:
    """DistilBERT with LoRA on SST-2, everything of it on the Hub."""
    majority = EvalReport(
        name="majority class",
        split="validation",
        step=0,
        is_baseline=True,
        num_examples=872,
        metrics={"accuracy": estimate(0.509, 0.033, 872, higher=True)},
    )
    untuned = EvalReport(
        name="untuned",
        split="validation",
        step=0,
        is_baseline=True,
        num_examples=872,
        metrics={"loss": estimate(0.694, 0.004, 872), "accuracy": estimate(0.491, 0.033, 872, higher=True)},
        samples=(Sample(prompt="a gorgeous film", reference="positive", output="negative"),),
    )
    final = EvalReport(
        name="final",
        split="validation",
        step=2104,
        is_baseline=False,
        num_examples=872,
        metrics={"loss": estimate(0.312, 0.03, 872), "accuracy": estimate(0.884, 0.021, 872, higher=True)},
        samples=(Sample(prompt="a gorgeous film", reference="positive", output="positive"),),
    )
    differences = [("loss", "untuned", -0.382, 0.03, False), ("accuracy", "majority class", 0.375, 0.04, True)]
    return RunRecord(
        kind="finetune",
        status="complete",
        started="2026-11-20T10:00:00Z",
        finished="2026-11-20T10:06:10Z",
        command="accelerate launch --config_file configs/accelerate/one_gpu.yaml -m finetune sst2-lora.yaml",
        config={
            "output": "runs/sst2-lora",
            "about": "Tells whether a sentence about a film is friendly.",
            "seed": 0,
            "task": {"type": "sequence-classification", "text": "sentence", "labels": ["negative", "positive"]},
            "model": {"name": "distilbert/distilbert-base-uncased", "revision": "main"},
            "tuning": {"type": "lora", "rank": 16, "alpha": 32.0, "targets": "all-linear", "options": {}},
            "data": {"source": "stanfordnlp/sst2", "validation": ["validation"]},
            "batch": {"per_step": 32, "micro": 32},
            "budget": {"epochs": 1.0},
            "optim": {"name": "adamw", "lr": 2e-4, "schedule": "linear", "warmup": 0.06},
            "hub": {"repo": "someone/distilbert-sst2-lora", "license": "apache-2.0", "language": ["en"]},
        },
        task="sequence-classification",
        pipeline_tag="text-classification",
        data=DataFacts(
            source="stanfordnlp/sst2",
            revision="8d51e7e4887a4caaa95b3fbebbf53c0490b58bbb",
            fingerprint="ab" * 32,
            processor="7c" * 32,
            license="unknown",
            splits=(
                SplitFacts(
                    name="train",
                    rows=67349,
                    samples=67349,
                    tokens=900_000,
                    counted=67349,
                    labels={"negative": 29780, "positive": 37569},
                ),
                SplitFacts(
                    name="validation", rows=872, samples=872, counted=872, labels={"negative": 428, "positive": 444}
                ),
            ),
        ),
        model=ModelFacts(
            name="distilbert/distilbert-base-uncased",
            revision=COMMIT,
            fingerprint="3e" * 32,
            architecture="DistilBertForSequenceClassification",
            num_parameters=67_900_000,
            num_trainable=1_250_000,
            tuning="lora",
            dtype="float32",
            license="apache-2.0",
        ),
        environment=ENVIRONMENT.model_copy(update={"device": "NVIDIA T4", "mixed_precision": "fp16"}),
        per_step=32,
        micro=32,
        steps_total=2104,
        step=2104,
        samples=67349,
        tokens=900_000,
        epochs=1.0,
        curve=curve(0.7, 0.28, 2104, 20, 32),
        reports=(majority, untuned, final),
        comparisons=tuple(
            Comparison(metric=metric, baseline=name, difference=estimate(value, half, 872, higher=higher))
            for metric, name, value, half, higher in differences
        ),
        cost=Cost(
            seconds=370,
            train_seconds=331,
            tokens_per_second=2718,
            mfu=0.23,
            peak_memory_bytes=3 * 2**30,
            energy_joules=21_400,
            energy_source="NVML counter",
        ),
        goal=GoalOutcome(metric="accuracy", wanted=">= 0.88", value=0.884, met=True),
        resumed_at=(1000,),
        notes=("Resumed on 1 process after starting on 2.",),
    )
