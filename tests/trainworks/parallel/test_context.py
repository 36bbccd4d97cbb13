"""Ranks that share the tokens of each line find one process's loss and gradients; models that cannot are refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import layouts
import numpy as np
import pytest
import tiny
import torch
from distributed import run_ranks

import finetune
from trainworks import Full, LoRA
from trainworks.errors import ConfigError, LaunchError
from trainworks.evaluation import evaluate
from trainworks.models import initialise
from trainworks.parallel import context
from trainworks.schema import FromScratch
from trainworks.speed.packed_attention import rows_apart
from trainworks.tasks import SFT, SequenceClassification
from trainworks.tuning import tune

TASK = SFT(max_length=128)
SIZES = tiny.SIZES | {"num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "qwen3": SIZES | {"head_dim": 8, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "mistral": SIZES | {"sliding_window": 5},
    "gemma3_text": SIZES | {"head_dim": 8, "sliding_window": 5},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "qwen3_moe": SIZES | EXPERTS,
    "mixtral": SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2},
}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
MAMBA = {"mamba_n_heads": 8, "mamba_d_state": 8, "mamba_d_head": 8, "shared_intermediate_size": 32}
REFUSED: dict[str, dict[str, Any]] = {
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "granitemoehybrid": SIZES | MAMBA | {"layer_types": ["attention", "mamba"], "num_local_experts": 0},
    "lfm2": SIZES | {"num_hidden_layers": 8, "layer_types": ["full_attention"] * 7 + ["conv"]},
    "minimax": SIZES
    | {"head_dim": 8, "num_local_experts": 4, "layer_types": ["linear_attention", "full_attention"], "block_size": 8},
    "qwen3_next": SIZES
    | EXPERTS
    | LINEAR
    | {"head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "shared_expert_intermediate_size": 16},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "nemotron": SIZES,
    "gpt_oss": SIZES | {"head_dim": 8, "num_local_experts": 4},
}
"""Recurrent states; convolutions, or linear attention, beside attention; attention that does not heed position_ids, is
not told where rows begin, or has sinks."""


@dataclass(frozen=True)
class Case:
    architecture: str
    rows: str
    tuning: str = "full"
    exact: bool = False
    recomputes: bool = False


CASES = {
    "llama, packed rows": Case("llama", "packed"),
    "llama, padded rows": Case("llama", "padded"),
    "llama, rows of one length": Case("llama", "even"),
    "llama, slices with nothing to learn": Case("llama", "barren"),
    "llama, LoRA": Case("llama", "packed", tuning="lora"),
    "llama, layers computed twice": Case("llama", "packed", recomputes=True),
    "llama, float64": Case("llama", "packed", exact=True),
    "qwen3, tied, one key head": Case("qwen3", "packed"),
    "qwen3, padded rows": Case("qwen3", "padded"),
    "mistral, a sliding window": Case("mistral", "packed"),
    "gemma 3": Case("gemma3_text", "packed"),
    "gpt2": Case("gpt2", "padded"),
    "qwen3_moe": Case("qwen3_moe", "packed"),
    "qwen3_moe, LoRA": Case("qwen3_moe", "padded", tuning="lora"),
    "mixtral": Case("mixtral", "padded"),
}


def model(architecture: str, sizes: dict[str, Any], scale: float = 0.2) -> Any:
    """Return a tiny model; the larger the `scale` of its weights, the more its attention matters."""
    settings = FromScratch(architecture=architecture, sizes=sizes | {"initializer_range": scale}, tokenizer="unused")
    return initialise(settings, "AutoModelForCausalLM", tiny.tokenizer(), seed=3).eval()


def batch(kind: str) -> dict[str, torch.Tensor]:
    """Return lines with rows of uneven masks; the last row is a filler."""
    lines = {
        "packed": [[30, 2, 9], [12, 27], [1, 7, 17, 4]],
        "padded": [[37], [2], [21]],
        "even": [[23], [23]],
        "barren": [[41], [3]],
    }[kind]
    rng = np.random.default_rng(7)
    rows = []
    for line, inside in enumerate(lines):
        for size in inside:
            trained = rng.random(size + 1) < 0.6
            trained[-1] = True
            if kind == "barren":
                trained[6:] = False
                trained[1] = True
            rows.append(
                {
                    "input_ids": rng.integers(0, 320, size + 1).astype(np.int32),
                    "trained": trained,
                    "pack": line,
                    "weight": 1.0,
                }
            )
    rows[-1]["weight"] = 0.0
    given = TASK.collate(rows, tiny.tokenizer(), train=True)
    return given | {"weight": torch.tensor([row["weight"] for row in rows])}


@dataclass(frozen=True)
class Ranks:
    """What `split` asks of a process group."""

    number: int
    mine: int

    def size(self) -> int:
        return self.number

    def rank(self) -> int:
        return self.mine


@pytest.mark.parametrize("kind", ["packed", "padded", "even", "barren"])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_slices_are_the_lines_and_count_each_token_once(kind: str, size: int) -> None:
    given = batch(kind)
    lines, tokens = given["input_ids"].shape
    slices: list[Any] = [context.split(given, Ranks(size, rank)) for rank in range(size)]  # type: ignore[arg-type]
    for name, filler in {"input_ids": 0, "labels": -100, "row": 0}.items():
        whole = torch.cat([own[name] for own in slices], 1)
        assert whole.shape == (lines, -(-tokens // size) * size)
        assert torch.equal(whole[:, :tokens], given[name])
        assert (whole[:, tokens:] == filler).all()
        assert len({own[name].shape for own in slices}) == 1
    assert torch.equal(sum(own["learned"] for own in slices), given["learned"])
    assert all(torch.equal(own["weight"], given["weight"]) for own in slices)
    assert all("attention_mask" not in own for own in slices)


@pytest.mark.parametrize("kind", ["packed", "padded", "even", "barren"])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_bounds_are_those_of_whole_lines(kind: str, size: int) -> None:
    given = batch(kind)
    own = context.split(given, Ranks(size, 0))  # type: ignore[arg-type]
    width = own["input_ids"].shape[1] * size
    bounds, sizes = own["bounds"].tolist(), own["bounds"].diff()
    assert own["bounds"].dtype == torch.int32
    assert bounds[0] == 0
    assert bounds[-1] == width * len(own["input_ids"])
    assert 0 < sizes.min() <= sizes.max() <= len(own["longest"])
    assert len(own["slices"]) == size
    begins = torch.stack([given["row"][line] for line in range(len(given["row"]))])
    used = given.get("attention_mask", torch.ones_like(begins)).bool()
    for line, (rows, inside) in enumerate(zip(begins, used, strict=True)):
        changes = [0, *((rows[1:] != rows[:-1]).nonzero().flatten() + 1).tolist(), int(inside.sum())]
        assert {line * width + place for place in changes} <= set(bounds)


def test_positions_are_those_in_the_row() -> None:
    packed, padded = batch("packed"), batch("padded")
    slices = [context.split(packed, Ranks(2, rank)) for rank in range(2)]  # type: ignore[arg-type]
    assert torch.equal(torch.cat([own["position_ids"] for own in slices], 1), packed["position_ids"])
    last = context.split(padded, Ranks(4, 3))  # type: ignore[arg-type]
    assert last["position_ids"][0].tolist() == [30, 31, 32, 33, 34, 35, 36, 0, 0, 0]


def test_a_size_that_does_not_divide_the_heads_is_refused_with_those_that_do() -> None:
    config = model("llama", SIZES).config
    for size in (1, 2, 4):
        context.check(config, size, TASK)
    with pytest.raises(LaunchError, match=r"cp_size: 3, llama: 3 ranks cannot share 4 attention heads.*do: 1, 2, 4$"):
        context.check(config, 3, TASK)
    with pytest.raises(LaunchError, match="8 ranks cannot share 4"):
        context.check(config, 8, TASK)


def test_scores_that_are_capped_and_frequencies_that_move_are_refused() -> None:
    with pytest.raises(LaunchError, match="gemma2: its attention caps its scores"):
        context.check(model("gemma2", SIZES | {"head_dim": 8}).config, 2, TASK)
    scaled = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    with pytest.raises(LaunchError, match=r"llama: its rotary embedding \(rope_type: dynamic\) depends on the longest"):
        context.check(model("llama", SIZES | {"rope_parameters": scaled}).config, 2, TASK)


def test_a_task_that_does_not_learn_token_by_token_is_refused() -> None:
    task = SequenceClassification(text="text", label="label", max_length=64)
    with pytest.raises(LaunchError, match="llama: task sequence-classification does not learn token by token"):
        context.check(model("llama", SIZES).config, 2, task)


def join(sizes: list[int]) -> dict[int, Any]:
    """Return this rank's context group of each size, neighbours together."""
    from accelerate import Accelerator

    accelerator = Accelerator()
    ranks = max(sizes)
    assert torch.distributed.get_world_size() == accelerator.num_processes == ranks
    groups = {}
    for size in sizes:
        whole = [list(range(first, first + size)) for first in range(0, ranks, size)]
        groups[size] = [torch.distributed.new_group(each) for each in whole][accelerator.process_index // size]
        assert groups[size].size() == size
    return groups


def backward(made: Any, given: dict[str, torch.Tensor], count: torch.Tensor) -> torch.Tensor:
    made.zero_grad()
    loss = (TASK.loss(made, given)["loss"] * given["weight"]).sum() / count
    loss.backward()
    return loss.detach()


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (found.double() - expected.double()).norm()
    return 0.0 if difference == 0 else (difference / expected.double().norm()).item()


def apart(case: Case, group: Any) -> dict[str, Any]:
    """Return by how much a group's loss and gradients, summed over its ranks, differ from those of one process."""
    made, given = model(case.architecture, SHAPES[case.architecture]), batch(case.rows)
    tuning = {"full": Full(), "lora": LoRA(rank=4, dropout=0.0)}[case.tuning]
    tune(tuning, made, auto_class="AutoModelForCausalLM")
    torch.manual_seed(5)
    for name, weight in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    made = made.double() if case.exact else made
    trained = {name: weight for name, weight in made.named_parameters() if weight.requires_grad}
    count = (given["learned"] * given["weight"]).sum()
    expected_loss = backward(made, given, count)
    expected = {name: weight.grad.clone() for name, weight in trained.items()}
    if case.recomputes:
        made.gradient_checkpointing_enable()
        made.train()
    context.spread(made, group)
    own = context.split(given, group)
    loss = backward(made, own, count)
    torch.distributed.all_reduce(loss, group=group)
    for weight in trained.values():
        torch.distributed.all_reduce(weight.grad, group=group)
    differences = {name: distance(weight.grad, expected[name]) for name, weight in trained.items()}
    return {
        "loss": distance(loss, expected_loss),
        "gradients": max(differences.values()),
        "worst": max(differences, key=lambda name: differences[name]),
        "weights": len(differences),
        "learned": int(own["learned"].sum()),
    }


def proved(architecture: str, sizes: dict[str, Any], group: Any, *, half: bool = False) -> str:
    """Return what a model of new weights is refused with, or an empty string."""
    made = model(architecture, sizes, scale=0.02).train()
    before = made.config._attn_implementation
    try:
        context.verify(made.bfloat16() if half else made, group)
    except LaunchError as error:
        return str(error)
    assert made.training
    assert made.config._attn_implementation == before
    return ""


def misused(group: Any) -> list[str]:
    """Return the errors of forwards whose attention does not fit their batch, and what still works."""
    made, given, errors = model("llama", SIZES), batch("packed"), []
    ids = given["input_ids"][:1, :4]

    def attempt(action: Any) -> None:
        with pytest.raises((ConfigError, RuntimeError)) as caught:
            action()
        errors.append(str(caught.value))

    attempt(lambda: TASK.loss(made, context.split(given, group)))
    said = made.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, pad_token_id=0)
    context.spread(made, group)
    attempt(lambda: TASK.loss(made, given))
    attempt(lambda: made(ids))
    with context.whole_lines(made):
        again = made.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, pad_token_id=0
        )
        assert torch.equal(said, again)
    assert "rows_apart" not in str(made.config.to_dict())
    return errors


def measure(sizes: list[int]) -> dict[str, Any]:
    groups = join(sizes)
    return {
        "apart": {name: {size: apart(case, group) for size, group in groups.items()} for name, case in CASES.items()},
        "proved": {name: proved(name, SHAPES[name], groups[max(sizes)]) for name in SHAPES}
        | {f"{name} in bf16": proved(name, SHAPES[name], groups[min(sizes)], half=True) for name in SHAPES},
        "refused": {name: proved(name, REFUSED[name], groups[max(sizes)]) for name in REFUSED}
        | {f"{name} in bf16": proved(name, REFUSED[name], groups[min(sizes)], half=True) for name in REFUSED},
        "misused": misused(groups[max(sizes)]),
    }


@pytest.fixture(scope="module")
def four() -> list[Any]:
    results = run_ranks(f"{__file__}:measure", {"sizes": [2, 4]}, ranks=4, timeout=400)
    assert len(results) == 4
    return results


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_ranks_that_share_tokens_find_the_loss_and_gradients_of_one_process(
    four: list[Any], name: str, size: int
) -> None:
    for result in four:
        found = result["apart"][name][str(size)]
        assert found["weights"] > 10
        assert found["loss"] <= (1e-12 if CASES[name].exact else 1e-6)
        assert found["gradients"] <= (1e-12 if CASES[name].exact else 1e-5), found["worst"]


@pytest.mark.slow
def test_a_slice_with_nothing_to_learn_was_among_them(four: list[Any]) -> None:
    learned = [result["apart"]["llama, slices with nothing to learn"]["4"]["learned"] for result in four]
    assert learned[0] > 0
    assert learned[1:] == [0, 0, 0]


@pytest.mark.slow
def test_attention_models_prove_that_slices_have_the_states_of_the_lines(four: list[Any]) -> None:
    assert [set(result["proved"].values()) for result in four] == [{""}] * 4


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_models_that_mix_tokens_otherwise_are_refused_by_name(four: list[Any], name: str) -> None:
    reasons = {"nemotron": "is not told where rows begin", "gpt_oss": "is given s_aux"}
    for result in four:
        for refused in (result["refused"][name], result["refused"][f"{name} in bf16"]):
            assert "ForCausalLM cannot work on slices of its lines: its " in refused
            assert reasons.get(name, "look at other tokens than by attention") in refused


@pytest.mark.slow
def test_attention_that_does_not_fit_the_batch_is_an_error(four: list[Any]) -> None:
    for result in four:
        assert result["misused"] == [
            "slices of lines came to attention over whole lines",
            "whole lines came to attention over slices of lines",
            "its attention is not told where rows begin",
        ]


def test_what_attention_is_given_and_no_kernel_does_is_an_error() -> None:
    made, given = model("llama", SIZES), batch("packed")
    with rows_apart(made, given) as told, pytest.raises(ConfigError, match="is given softcap"):
        made.model(given["input_ids"], position_ids=given["position_ids"], **told, softcap=30.0, use_cache=False)


def test_attention_that_is_not_spread_stays_as_it_is() -> None:
    made = model("llama", SIZES)
    made.set_attn_implementation("eager")
    with context.whole_lines(made):
        assert made.config._attn_implementation == "eager"


RUNS = [["llama", "full"]]


def run_both(folder: str, name: str) -> dict[str, Any]:
    """Train, and measure a model as it stands; return curves, losses on held-out rows, and what the model says."""
    curves = layouts.train(folder, RUNS, name, {})
    run = finetune.prepare(layouts.config(Path(folder), "llama", "full", f"{name}-measured"))
    report = evaluate(run)
    return {
        "curves": curves,
        "rows": run.statistics[report.name]["loss"][1].tolist(),
        "loss": report.metrics["loss"].value,
        "said": [sample.output for sample in report.samples],
        "ranks": [run.world.processes, run.world.ranks, run.world.layout.context],
    }


@pytest.mark.slow
def test_a_run_whose_ranks_share_tokens_takes_the_steps_of_one_process(tmp_path: Path) -> None:
    layouts.prepare(tmp_path)
    whole = run_both(str(tmp_path), "one")
    spread = layouts.SPREADS["CP 2"]
    arguments = {"folder": str(tmp_path), "name": "two"}
    results = run_ranks(f"{__file__}:run_both", arguments, ranks=2, mode=spread.mode, sizes=spread.sizes, timeout=300)
    assert [result["ranks"] for result in results] == [[2, 1, 2]] * 2
    for result in results:
        for case, found in result["curves"].items():
            assert len(found["curve"]) == layouts.STEPS
            assert np.array(found["curve"]) == pytest.approx(np.array(whole["curves"][case]["curve"]), rel=1e-5)
        assert np.array(result["rows"]) == pytest.approx(np.array(whole["rows"]), rel=1e-6)
        assert result["loss"] == pytest.approx(whole["loss"], rel=1e-6)
        assert result["said"] == whole["said"]
