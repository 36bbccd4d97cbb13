"""Noise on the embeddings is drawn from a row's own seed: it does not depend on how a step is cut up, nor on a stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import finetune
from trainworks import SFT, Batch, Run, evaluate, train_steps
from trainworks.checkpoint import save

LENGTH, ALPHA = 128, 5.0


def prepared(folder: Path, output: str, alpha: float = ALPHA, **changes: Any) -> Run:
    if not (folder / "model").exists():
        tiny.save_model(folder / "model", "sft")
        tiny.save_rows(folder / "rows.jsonl", "sft", 40)
    task = SFT(max_length=LENGTH, neftune=alpha)
    config = tiny.config("sft", folder / "model", folder / "rows.jsonl", folder / output, **changes)
    return finetune.prepare(config.model_copy(update={"task": task}))


def losses(run: Run, until: int = 0) -> list[float]:
    found = []
    for step in train_steps(run):
        found.append(step.loss.item())
        if step.number == until:
            break
    return found


def test_the_curve_does_not_depend_on_the_micro_batch(tmp_path: Path) -> None:
    whole = losses(prepared(tmp_path, "8"))
    assert losses(prepared(tmp_path, "3", micro=3)) == pytest.approx(whole, rel=1e-6)
    assert losses(prepared(tmp_path, "none", alpha=0.0)) != pytest.approx(whole, rel=1e-6)


def test_a_resumed_run_draws_the_same_noise(tmp_path: Path) -> None:
    whole = losses(prepared(tmp_path, "whole"))
    first = prepared(tmp_path, "run")
    first.save_record()
    begun = losses(first, until=2)
    save(first)
    torch.manual_seed(5)
    assert begun + losses(prepared(tmp_path, "run")) == whole


def test_noise_is_within_its_bounds_other_in_each_pass_and_alike_packed_or_not(tmp_path: Path) -> None:
    run = prepared(tmp_path, "run")
    table = [run.train.with_format("numpy")[number] for number in range(3)]
    width = run.model.config.hidden_size
    embedding = run.model.get_input_embeddings()

    def noise(seeds: list[int], lines: list[int]) -> list[torch.Tensor]:
        rows = [row | {"seed": seed, "pack": line} for row, seed, line in zip(table, seeds, lines, strict=True)]
        batch = run.task.collate(rows, run.processor, train=True)
        seen = []
        handle = run.model.base_model.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        run.step(batch)
        handle.remove()
        added = (seen[0] - embedding(batch["input_ids"])).detach()
        sizes = [len(row["input_ids"]) - 1 for row in rows]
        ends, found = [0] * len(set(lines)), []
        for line, size in zip(lines, sizes, strict=True):
            found.append(added[line, ends[line] : ends[line] + size])
            ends[line] += size
        return found

    apart, packed, later = noise([1, 2, 3], [0, 1, 2]), noise([1, 2, 3], [0, 0, 1]), noise([1, 2, 4], [0, 1, 2])
    for one, other in zip(apart, packed, strict=True):
        bound = ALPHA / (len(one) * width) ** 0.5
        assert 0.9 * bound < one.abs().max() < bound + 1e-6
        assert one.mean().abs() < 0.1 * bound
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert torch.equal(apart[1], later[1])
    assert not torch.equal(apart[2], later[2])


def test_an_evaluation_and_a_packed_run_have_the_noise_they_should(tmp_path: Path) -> None:
    plain, noisy = prepared(tmp_path, "plain", alpha=0.0), prepared(tmp_path, "noisy")
    assert evaluate(noisy).metrics["loss"].value == evaluate(plain).metrics["loss"].value
    packed = prepared(tmp_path, "packed", batch=Batch(per_step=4, micro=2, pack=LENGTH))
    assert losses(packed)[-1] < 6.0
