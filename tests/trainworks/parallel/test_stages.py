"""A model cut into stages is the whole model; what cannot be cut is refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from trainworks.errors import ConfigError
from trainworks.heads import Head
from trainworks.parallel.stages import (
    SCHEDULES,
    Plan,
    check_can_cut,
    cut,
    layers_of,
    plan_stages,
    stage_of,
    tied_weight,
)
from trainworks.schema import LoRA
from trainworks.tuning import tune

SIZES: dict[str, Any] = {
    "vocab_size": 24,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
TURNS = ["sliding_attention", "full_attention"] * 2
CAN_BE_CUT: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 8},
    "qwen3_moe": EXPERTS,
    "mistral": {"sliding_window": 3},
    "gemma2": {"head_dim": 8, "sliding_window": 3, "layer_types": TURNS},
    "gemma3_text": {"head_dim": 8, "sliding_window": 3, "layer_types": TURNS},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8, "sliding_window": 3, "layer_types": TURNS},
    "phi3": {},
    "cohere": {},
    "olmo2": {},
    "gpt_neox": {},
}
CANNOT: dict[str, tuple[dict[str, Any], str]] = {
    "granite": ({"embedding_multiplier": 12.0}, "changes the states outside of its layers"),
    "gpt2": ({"n_layer": 4}, "does more with its parts than call them"),
    "bloom": ({"n_layer": 4}, "does more with its parts than call them"),
    "opt": ({"word_embed_proj_dim": 32}, "does not show one embedding and one list of layers"),
    "gemma4_text": ({"head_dim": 8, "vocab_size_per_layer_input": 24}, "does more with its parts"),
}


def build(kind: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**(SIZES | changes)))
    return model.eval()


def planned(model: PreTrainedModel, schedule: str = "1f1b", ranks: int = 2) -> Plan:
    return plan_stages(model, SCHEDULES[schedule], ranks)


@pytest.mark.parametrize("kind", CAN_BE_CUT)
def test_the_stages_of_a_model_make_its_logits(kind: str) -> None:
    model = build(kind, **CAN_BE_CUT[kind])
    plan = planned(model, "interleaved")
    check_can_cut(model, plan)
    batch = {"input_ids": torch.arange(14).view(2, 7), "attention_mask": torch.ones(2, 7).tril(4)}
    states = None
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits
        for number in range(len(plan.layers)):
            stage = stage_of(model, plan, number)
            given = batch if states is None else {"attention_mask": batch["attention_mask"], "inputs_embeds": states}
            states = stage.base_model(**given, use_cache=False).last_hidden_state
        assert states is not None
        torch.testing.assert_close(Head(stage)(states), logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", CANNOT)
def test_a_model_that_is_more_than_its_layers_is_refused(kind: str) -> None:
    changes, reason = CANNOT[kind]
    model = build(kind, **changes)
    with pytest.raises(ConfigError, match=reason):
        check_can_cut(model, planned(model))


def test_a_layer_that_is_told_the_embeddings_is_refused() -> None:
    model = build("llama")
    inner = model.base_model
    plain = inner.rotary_emb.forward
    inner.rotary_emb.forward = lambda states, position_ids: (*plain(states, position_ids), states)
    with pytest.raises(ConfigError, match="layer 0 is told more than states and batch"):
        check_can_cut(model, planned(model))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("tied", [False, True])
def test_each_weight_of_a_model_on_meta_stays_on_one_rank_and_a_tied_one_on_first_and_last(
    schedule: str, tied: bool
) -> None:
    held = []
    for rank in range(2):
        with torch.device("meta"):
            model = build("llama", tie_word_embeddings=tied)
        plan = planned(model, schedule)
        check_can_cut(model, plan)
        cut(model, plan, rank)
        held.append({name for name, _ in model.named_parameters()})
        assert len(layers_of(model)) == sum(len(plan.layers[stage]) for stage in plan.stages(rank))
        ends = {plan.rank(0), plan.rank(plan.last)}
        assert (tied_weight(model) is not None) == (tied and rank in ends)
    names = {name for name, _ in build("llama", tie_word_embeddings=tied).named_parameters()}
    assert held[0] | held[1] == names
    shared = tied and plan.rank(0) != plan.rank(plan.last)
    assert held[0] & held[1] == ({"model.embed_tokens.weight"} if shared else set())


def test_adapters_are_cut_with_their_layers_whether_they_come_before_or_after() -> None:
    names = []
    for tunes_first in (True, False):
        model = build("llama")
        plan = planned(model)
        actions = [
            lambda: tune(LoRA(rank=2, dropout=0.0), model, auto_class="AutoModelForCausalLM"),  # noqa: B023
            lambda: cut(model, plan, 1),  # noqa: B023
        ]
        for action in actions if tunes_first else actions[::-1]:
            action()
        names.append([name for name, weight in model.named_parameters() if weight.requires_grad])
    assert names[0] == names[1]
    assert names[0][0] == "model.layers.2.self_attn.q_proj.lora_A.default.weight"


def test_a_stage_without_anything_to_train_is_refused() -> None:
    model = build("llama").requires_grad_(False)
    model.lm_head.requires_grad_(True)
    with pytest.raises(ConfigError, match="nothing to train in stage 0"):
        check_can_cut(model, planned(model))


def test_a_tied_embedding_is_neither_tuned_by_an_adapter_nor_sharded_on_a_rank_that_has_both_ends() -> None:
    model = build("llama", tie_word_embeddings=True)
    with pytest.raises(ConfigError, match="say zero-bubble"):
        check_can_cut(model, planned(model, "zero-bubble-v"), is_sharded=True)
    options = {"ensure_weight_tying": True}
    tuning = LoRA(rank=2, dropout=0.0, targets=("q_proj", "embed_tokens"), options=options)
    tune(tuning, model, auto_class="AutoModelForCausalLM")
    with pytest.raises(ConfigError, match=r"take embedding and head out of tuning\.targets"):
        check_can_cut(model, planned(model))


def test_the_costliest_stage_costs_least() -> None:
    small_head = planned(build("llama", num_hidden_layers=8))
    large_head = planned(build("llama", num_hidden_layers=8, vocab_size=1000))
    assert [len(layers) for layers in small_head.layers] == [4, 4]
    assert [len(layers) for layers in large_head.layers] == [6, 2]  # the head costs as much as three to four layers
    assert [layers for stage in large_head.layers for layers in stage] == list(range(8))
    with pytest.raises(ConfigError, match="make 8 stages, and the model has 4 layers"):
        planned(build("llama"), "interleaved", ranks=4)


def test_stages_go_round_the_ranks_or_down_and_up_again() -> None:
    assert [planned(build("llama"), "interleaved").stages(rank) for rank in range(2)] == [(0, 2), (1, 3)]
    assert [planned(build("llama"), "zero-bubble-v").stages(rank) for rank in range(2)] == [(0, 3), (1, 2)]


def test_micro_batches_are_filled_up_where_a_schedule_goes_in_rounds() -> None:
    filled = [SCHEDULES["interleaved"].filled(number, 4) for number in (1, 3, 4, 5, 8, 9, 10, 11, 13)]
    assert filled == [1, 3, 4, 5, 8, 10, 10, 12, 15]
