"""The command in the record is what was typed, launcher and hardware file included."""

from __future__ import annotations

import pytest

from trainworks.environment import launched

LAUNCH = "accelerate launch --config_file a.yaml -m finetune r.yaml"


@pytest.mark.parametrize(
    ("words", "typed"),
    [
        (f"/venv/bin/python /venv/bin/{LAUNCH}", LAUNCH),
        (f"/venv/bin/{LAUNCH} optim.lr=1", f"{LAUNCH} optim.lr=1"),
        ("python -m accelerate.commands.launch -m finetune r.yaml", "accelerate launch -m finetune r.yaml"),
        ("python -m torch.distributed.run --standalone -m finetune a.yaml", "torchrun --standalone -m finetune a.yaml"),
        ("/bin/bash -c finetune", ""),
        ("python /venv/bin/accelerate launch -m pretrain r.yaml", ""),
    ],
)
def test_a_launcher_is_known_by_its_process(words: str, typed: str) -> None:
    assert " ".join(launched(words.split(), "finetune")) == typed
