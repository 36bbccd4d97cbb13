"""What a layout cannot do to a model is refused before weights are read, by the line to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny

from trainworks import LoRA
from trainworks.errors import LaunchError
from trainworks.models import outline
from trainworks.parallel import context
from trainworks.parallel.layout import Layout
from trainworks.parallel.tensor import check
from trainworks.schema import FromScratch, Pretrained
from trainworks.tasks import TASKS
from trainworks.tuning import rehearse

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "few keys": ("llama", {"num_key_value_heads": 2}),
    "gpt2": ("gpt2", {}),
    "experts": ("qwen3_moe", {"num_experts": 6}),
}


def made(name: str) -> Any:
    architecture, extra = MODELS[name]
    sizes = extra if architecture == "gpt2" else tiny.SIZES | extra
    scratch = FromScratch(architecture=architecture, sizes=sizes, tokenizer="-")
    return outline(scratch, "AutoModelForCausalLM", {}, tiny.tokenizer())


@pytest.mark.parametrize(
    ("name", "layout", "mend"),
    [
        ("few keys", Layout(tensor=4), "num_key_value_heads 2, intermediate_size 64; 1, 2 do"),
        ("gpt2", Layout(tensor=2), "shard it with FSDP"),
        ("llama", Layout(tensor=2, expert=2), "leave it out"),
        ("experts", Layout(tensor=4, expert=4), "num_experts 6"),
    ],
)
def test_a_model_that_cannot_be_shared_out_so_is_refused(name: str, layout: Layout, mend: str) -> None:
    with pytest.raises(LaunchError, match=mend):
        check(made(name), layout)


@pytest.mark.parametrize("name", sorted(name for name, task in TASKS.items() if task.reads == "image_processor"))
def test_models_of_images_are_refused_by_all_layouts_that_cut_a_model(name: str, tmp_path: Path) -> None:
    task = TASKS[name](**tiny.OPTIONS[name])
    model = outline(Pretrained(str(tiny.save_model(tmp_path, name))), task.auto_class, {}, tiny.processor(name))
    with pytest.raises(LaunchError, match="shard it with FSDP"):
        check(model, Layout(tensor=2))
    with pytest.raises(LaunchError, match=f"task {name} does not learn token by token"):
        context.check(model.config, 2, task)
    assert task.whole_because() == "its models do not end in a vocabulary head"


def test_norms_of_whole_matrices_are_refused() -> None:
    model = made("llama")
    rehearse(LoRA(options={"use_dora": True}), model, auto_class="AutoModelForCausalLM")
    with pytest.raises(LaunchError, match="DoRA"):
        check(model, Layout(tensor=2))


def test_what_fits_passes() -> None:
    check(made("llama"), Layout(tensor=4))
    check(made("experts"), Layout(tensor=2, expert=2))
