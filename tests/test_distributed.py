"""The launcher of distributed tests: several processes give the gradient of one, and a failing rank is shown."""

from __future__ import annotations

import pytest
from distributed import Mode, run_ranks


def gradient_norm(lengths: list[int], *, failing_rank: int | None = None) -> float:
    import torch
    from accelerate import Accelerator
    from accelerate.utils import fsdp2_prepare_model

    accelerator = Accelerator()
    rank, ranks = accelerator.process_index, accelerator.num_processes
    assert rank != failing_rank, "a mistake on this rank"
    model = torch.nn.Linear(3, 2, bias=False)
    torch.nn.init.constant_(model.weight, 0.5)
    wrapped = fsdp2_prepare_model(accelerator, model) if accelerator.is_fsdp2 else accelerator.prepare(model)
    for length in lengths[rank::ranks]:
        loss = wrapped(torch.ones(length, 3)).square().sum() / sum(lengths)
        (loss * ranks).backward()
    norm = torch.nn.utils.clip_grad_norm_(wrapped.parameters(), max_norm=1.0)
    return float(norm.full_tensor() if accelerator.is_fsdp2 else norm)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_two_processes_give_the_gradient_of_one(mode: Mode) -> None:
    target, arguments = f"{__file__}:gradient_norm", {"lengths": [1, 5, 2, 7]}
    (alone,) = run_ranks(target, arguments, ranks=1)
    assert alone == pytest.approx(3 * 6**0.5)
    assert run_ranks(target, arguments, ranks=2, mode=mode) == pytest.approx([alone, alone], rel=1e-6)


def test_a_rank_that_fails_ends_the_others_and_shows_its_output() -> None:
    with pytest.raises(AssertionError, match=r"rank 1 of 2(.|\n)*a mistake on this rank"):
        run_ranks(f"{__file__}:gradient_norm", {"lengths": [1, 5], "failing_rank": 1}, ranks=2, timeout=60)
