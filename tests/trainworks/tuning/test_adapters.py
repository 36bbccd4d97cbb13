"""Every way to tune: as many weights as it says, a batch learned by heart, the same logits loaded and merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import finetune
from trainworks import (
    Batch,
    Budget,
    Freeze,
    FromScratch,
    Full,
    LoRA,
    Optim,
    Peft,
    Pretrained,
    Quantise,
    Run,
    export,
    train_steps,
    tuning,
)
from trainworks.checkpoint import save
from trainworks.checkpoint.pieces import buffers
from trainworks.errors import ConfigError
from trainworks.models import dequantised, initialise, load

TOKENS = ("<think>", "</think>")


def prepared(folder: Path, tuned: Any, *, tied: bool = False, output: str = "run", **model: Any) -> Run:
    place = folder / "model"
    if not place.exists():
        # Frozen layers of tiny numbers could say nothing, whatever stands beside them.
        sizes = tiny.SIZES | {"max_position_embeddings": 256, "tie_word_embeddings": tied, "initializer_range": 0.1}
        made = FromScratch(architecture="llama", sizes=sizes, tokenizer="unused")
        fresh = initialise(made, "AutoModelForCausalLM", tiny.tokenizer(), seed=1)
        with torch.no_grad():
            fresh.get_output_embeddings().weight.mul_(3)
        fresh.save_pretrained(place)
        tiny.tokenizer().save_pretrained(place)
        rows = [{"prompt": f"{word} <think> the cat </think>", "completion": word} for word in tiny.WORDS[:8]]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = tiny.config("sft", place, folder / "rows.jsonl", folder / output)
    changes = {
        "model": Pretrained(str(place), **model),
        "tuning": tuned,
        "data": config.data.model_copy(update={"holdout": 0.0}),
        "budget": Budget(steps=25),
        "batch": Batch(per_step=8, micro=8),
        "optim": Optim(lr=1e-2, schedule="constant"),
    }
    return finetune.prepare(config.model_copy(update=changes))


def trained(run: Run) -> list[float]:
    return [step.loss.item() for step in train_steps(run)]


def ids(run: Run) -> Tensor:
    return run.processor("the cat <think> likes </think> a dog", return_tensors="pt").input_ids


def logits(model: Any, given: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(given).logits


def base(run: Run) -> Any:
    """Return the base as a user of the adapter has it: the plain model, with room for the tokens."""
    model = AutoModelForCausalLM.from_pretrained(run.config.model.name)
    if run.config.model.new_tokens:
        model.resize_token_embeddings(len(run.processor), mean_resizing=False)
    return model


def same_base(run: Run) -> Any:
    """Return the base as the run has it, rounded or not."""
    return load(run.config.model, "AutoModelForCausalLM", {}, run.processor, seed=0)


LORAS = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "PiSSA by power iterations": {"init_lora_weights": "pissa_niter_16"},
    "PiSSA and rsLoRA": {"init_lora_weights": "pissa", "use_rslora": True},
    "PiSSA and DoRA": {"init_lora_weights": "pissa", "use_dora": True},
    "OLoRA": {"init_lora_weights": "olora"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "MiCA": {"init_lora_weights": "mica"},
}
RANK = 4
WIDTH, INNER, LAYERS = (tiny.SIZES[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers"))
LINEAR = [(WIDTH, WIDTH)] * 4 + [(WIDTH, INNER)] * 2 + [(INNER, WIDTH)]
"""The sizes (in, out) of a layer's linear layers."""


def check(run: Run, *, least: float = 0.5) -> None:
    """Train a run to the loss that `least` of its first one is, and see that what is exported says the same."""
    losses = trained(run)
    assert losses[-1] < least * losses[0]
    expected = logits(run.model, ids(run))
    folder = export(run)
    said = [logits(PeftModel.from_pretrained(base(run), str(folder)), ids(run))]
    said.append(
        logits(AutoPeftModelForCausalLM.from_pretrained(str(folder)), ids(run))
    )  # as the card tells a reader to
    if run.config.tuning.merge:
        said.append(logits(AutoModelForCausalLM.from_pretrained(folder.with_name("merged")), ids(run)))
    for found in said:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def check_lora(name: str, *, tokens: tuple[str, ...], tied: bool, folder: Path) -> None:
    run = prepared(folder, LoRA(rank=RANK, alpha=8.0, options=LORAS[name], merge=True), tied=tied, new_tokens=tokens)
    first, second = (RANK * LAYERS * sum(sizes[end] for sizes in LINEAR) for end in (0, 1))
    lengths = LAYERS * sum(out for _, out in LINEAR) if "DoRA" in name else 0
    rows = len(tokens) * WIDTH * (1 if tied else 2)
    assert run.record.model.num_trainable == first + (0 if name == "MiCA" else second) + lengths + rows
    if not tokens:  # it begins as the base is
        torch.testing.assert_close(logits(run.model, ids(run)), logits(base(run), ids(run)), rtol=0, atol=1e-5)
    check(run)


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "PiSSA and rsLoRA"])
def test_an_adapter_with_new_tokens_is_the_same_exported_and_merged(name: str, tmp_path: Path) -> None:
    check_lora(name, tokens=TOKENS, tied=False, folder=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", LORAS)
@pytest.mark.parametrize("tokens", [(), TOKENS], ids=["", "new tokens"])
def test_an_adapter_of_tied_embeddings_is_the_same_exported_and_merged(
    name: str, tokens: tuple[str, ...], tmp_path: Path
) -> None:
    check_lora(name, tokens=tokens, tied=True, folder=tmp_path)


METHODS: dict[str, dict[str, Any]] = {
    "C3A": {"block_size": 16},
    "DEFT": {},
    "DELORA": {},
    "FOURIERFT": {"init_weights": True},
    "GLORA": {},
    "GRALORA": {},
    "HIRA": {},
    "HRA": {},
    "LOHA": {},
    "LOKR": {},
    "MISS": {"r": 8},
    "OFT": {},
    "OSF": {},
    "PEANUT": {},
    "PSOFT": {},
    "PVERA": {},
    "RANDLORA": {"r": 8, "randlora_alpha": 64},
    "ROAD": {"group_size": 16},
    "SUPERTUNING": {},
    "TINYLORA": {},
    "UNILORA": {},
    "VBLORA": {"vector_length": 16, "num_vectors": 8},
    "WAVEFT": {"n_frequency": 64},
}
"""Methods of PEFT, with options that let them fit a tiny model."""
COUNTED = {
    "IA3": LAYERS * (2 * WIDTH + INNER),
    "VERA": LAYERS * 2 * (256 + WIDTH),
}
"""Methods of PEFT with what they train by themselves: factors for keys, values and what goes into the down projection;
two vectors for queries and values."""


def test_the_second_factor_of_an_update_may_learn_at_a_rate_of_its_own(tmp_path: Path) -> None:
    def change(ratio: float) -> tuple[Tensor, Tensor]:
        run = prepared(tmp_path, LoRA(rank=RANK, b_lr_ratio=ratio, options={"init_lora_weights": False}))
        layer: Any = run.model.get_submodule("model.layers.0.self_attn.q_proj")
        weights = [part["default"].weight for part in (layer.lora_A, layer.lora_B)]
        before = [weight.detach().clone() for weight in weights]
        next(train_steps(run))
        first, second = (after.detach() - start for after, start in zip(weights, before, strict=True))
        return first, second

    (first, second), (same, faster) = change(1.0), change(16.0)
    torch.testing.assert_close(same, first)
    torch.testing.assert_close(faster, 16 * second, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", COUNTED)
def test_another_method_of_peft_is_the_same_exported_and_merged(method: str, tmp_path: Path) -> None:
    run = prepared(tmp_path, Peft(method=method, merge=True))
    assert run.record.model.num_trainable == COUNTED[method]
    check(run, least=0.9)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_other_method_of_peft_is_the_same_exported_and_merged(method: str, tmp_path: Path) -> None:
    run = prepared(tmp_path, Peft(method=method.lower(), options=METHODS[method], merge=True))
    check(run, least=0.95)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ADAPTION_PROMPT", "LILY"])
def test_a_method_that_cannot_be_merged_is_trained_and_exported(method: str, tmp_path: Path) -> None:
    options = {"adapter_len": 4, "adapter_layers": 1} if method == "ADAPTION_PROMPT" else {}
    with pytest.raises(ConfigError, match=f"tuning.merge: PEFT cannot work {method} into the base"):
        prepared(tmp_path, Peft(method=method, options=options, merge=True))
    check(prepared(tmp_path, Peft(method=method, options=options)), least=0.97)


def test_every_method_of_peft_is_trained_here_or_refused_with_the_reason() -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    model, refused, warns = Pretrained("some/model"), {}, {"BEFT", "BOFT", "LN_TUNING"}
    for kind in PEFT_TYPE_TO_CONFIG_MAPPING:
        try:
            tuning.check(Peft(method=kind.value), model)
        except ConfigError as error:
            refused[kind.value] = str(error)
    known = {*METHODS, *COUNTED, *refused, *warns, "ADAPTION_PROMPT", "LILY"}
    assert {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING} == known
    assert len(refused) == 15
    assert all(said.startswith(f"tuning.method: {kind} ") for kind, said in refused.items())


@pytest.mark.parametrize(
    ("bits", "double"),
    [(4, True), pytest.param(4, False, marks=pytest.mark.slow), pytest.param(8, True, marks=pytest.mark.slow)],
    ids=["4, double", "4", "8"],
)
def test_an_adapter_beside_weights_in_few_bits_is_merged_into_what_these_are(
    bits: int, double: bool, tmp_path: Path
) -> None:
    quantise = Quantise(bits=bits, double=double)
    run = prepared(tmp_path, LoRA(rank=RANK, merge=True), quantise=quantise, new_tokens=TOKENS)
    rounded = run.model.get_submodule("model.layers.0.self_attn.q_proj.base_layer").weight
    assert rounded.dtype == (torch.uint8 if bits == 4 else torch.int8)
    assert run.record.model.num_parameters > 30_000
    losses = trained(run)
    assert losses[-1] < 0.5 * losses[0]
    expected = logits(run.model, ids(run))
    folder = export(run)
    adapter = PeftModel.from_pretrained(same_base(run), str(folder))
    torch.testing.assert_close(logits(adapter, ids(run)), expected, rtol=0, atol=1e-5)
    merged = AutoModelForCausalLM.from_pretrained(folder.with_name("merged"))
    assert {weight.dtype for weight in merged.parameters()} == {torch.float32}
    # 8 bits round what goes into a layer too, which no merged weights can say.
    torch.testing.assert_close(logits(merged, ids(run)), expected, rtol=0, atol=1e-5 if bits == 4 else 0.3)
    beside = PeftModel.from_pretrained(dequantised(same_base(run)), str(folder))
    torch.testing.assert_close(logits(merged, ids(run)), logits(beside, ids(run)), rtol=0, atol=1e-5)
    assert [f"rounded to {bits} bits" in note or "rounded values" in note for note in run.record.notes] == [True, True]


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_a_classifier_beside_weights_in_few_bits_learns_and_resumes_bit_for_bit(bits: int, tmp_path: Path) -> None:
    task = "sequence-classification"
    place, rows = tiny.save_model(tmp_path / "model", task), tiny.save_rows(tmp_path / "rows.jsonl", task, 40)

    def run(output: str) -> Run:
        config = tiny.config(task, place, rows, tmp_path / output, tuning="lora")
        model = config.model.model_copy(update={"quantise": Quantise(bits=bits)})
        return finetune.prepare(config.model_copy(update={"model": model}))

    whole = run("whole")
    assert whole.model.classifier.weight.dtype == torch.float32
    expected = trained(whole)
    first = run("parts")
    first.save_record()
    begun = [next(train_steps(first)).loss.item()]
    save(first)
    assert begun + trained(run("parts")) == expected
    names = {name for name, _ in buffers(whole).items()}
    assert not any("weight" in name for name in names), "what is rounded is no part of a checkpoint"


def test_an_evaluation_leaves_training_beside_4_bits_as_it_is(tmp_path: Path) -> None:
    def gradients(evaluated: bool) -> Tensor:
        run = prepared(tmp_path, LoRA(rank=RANK, options={"init_lora_weights": False}), quantise=Quantise(bits=4))
        if evaluated:
            logits(run.model, ids(run))
        run.step.train()
        run.model(ids(run)).logits.square().mean().backward()
        return torch.cat([weight.grad.flatten() for weight in run.model.parameters() if weight.grad is not None])

    torch.testing.assert_close(gradients(evaluated=True), gradients(evaluated=False), rtol=0, atol=0)


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_new_tokens_are_words_of_their_own_that_begin_as_the_mean_of_the_others(tied: bool, tmp_path: Path) -> None:
    run = prepared(tmp_path, Full(), tied=tied, new_tokens=TOKENS)
    assert len(run.processor("<think>").input_ids) == 1
    weights = {id(layer.weight): layer.weight for layer in (run.model.lm_head, run.model.get_input_embeddings())}
    assert len(weights) == (1 if tied else 2)
    for weight in weights.values():
        assert len(weight) == len(run.processor) == 322
        torch.testing.assert_close(weight[320:], weight[:320].mean(0).expand(2, -1))
    before = run.model.get_input_embeddings().weight[320:].detach().clone()
    losses = trained(run)
    assert losses[-1] < 0.5 * losses[0]
    folder = export(run)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(loaded, ids(run)), logits(run.model, ids(run)), rtol=0, atol=1e-5)
    assert not torch.equal(loaded.get_input_embeddings().weight[320], before[0])
    assert AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(list(TOKENS)) == [320, 321]


def test_new_tokens_take_rows_that_no_token_had(tmp_path: Path) -> None:
    fresh = prepared(tmp_path, Full()).model
    fresh.resize_token_embeddings(384, mean_resizing=False)
    fresh.save_pretrained(tmp_path / "model")
    run = prepared(tmp_path, LoRA(rank=RANK), new_tokens=TOKENS, output="other")
    assert len(run.model.lm_head.weight) == 384
    torch.testing.assert_close(run.model.lm_head.weight[321], fresh.lm_head.weight[:320].mean(0))


def test_a_part_of_the_weights_is_trained_by_pattern(tmp_path: Path) -> None:
    run = prepared(tmp_path, Freeze(train=("model.layers.1.*", "lm_head.*"), freeze=("*norm*",)))
    before = {name: weight.detach().clone() for name, weight in run.model.named_parameters()}
    own = {name for name in before if ("layers.1." in name and "norm" not in name) or name == "lm_head.weight"}
    assert run.record.model.num_trainable == sum(before[name].numel() for name in own) > 0
    losses = trained(run)
    assert losses[-1] < 0.5 * losses[0]
    assert {name for name, weight in run.model.named_parameters() if not torch.equal(weight, before[name])} == own
    loaded = AutoModelForCausalLM.from_pretrained(export(run))
    torch.testing.assert_close(logits(loaded, ids(run)), logits(run.model, ids(run)), rtol=0, atol=1e-5)


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "a pattern": (Freeze(train=("model.layrs.1.*",)), {}, r"tuning.train: no weight.*'model.layrs.1.\*'.*layers.1"),
    "a frozen pattern": (Freeze(freeze=("*embed_token.*",)), {}, r"tuning.freeze: .*did you mean 'embed_tokens'"),
    "nothing to train": (Freeze(freeze=("*",)), {}, "nothing is left to train"),
    "frozen new tokens": (
        Freeze(freeze=("*embed*",)),
        {"new_tokens": TOKENS},
        "model.embed_tokens.weight is frozen, and with it the embeddings of model.new_tokens",
    ),
    "a token that is there": (Full(), {"new_tokens": ("the",)}, "the tokenizer has 'the' already"),
    "a method": (Peft(method="LOHAA"), {}, "PEFT has no 'LOHAA'.*'LOHA'"),
    "LoRA's method": (Peft(method="LORA"), {}, "say tuning: {type: lora}"),
    "a prompt": (Peft(method="PREFIX_TUNING"), {}, "puts tokens of its own before"),
    "a method's option": (
        Peft(method="IA3", options={"target_module": ["k_proj"]}),
        {},
        "no such IA3 option.*'target_mod",
    ),
    "a method's target": (Peft(method="IA3", options={"target_modules": ["kproj"]}), {}, "no layer 'kproj'.*'k_proj'"),
    "a method beside new tokens": (Peft(method="IA3"), {"new_tokens": TOKENS}, "cannot train the embeddings"),
    "tokens as an option": (LoRA(options={"trainable_token_indices": [1]}), {}, "say model.new_tokens"),
    "a beginning from data": (LoRA(options={"init_lora_weights": "eva"}), {}, "computed from data"),
    "a beginning from rounded weights": (
        LoRA(options={"init_lora_weights": "pissa"}),
        {"quantise": Quantise(bits=4)},
        "changes the base model's weights, and model.quantise rounds them",
    ),
    "PiSSA of many ranks": (
        LoRA(options={"init_lora_weights": "pissa", "rank_pattern": {"q_proj": 2}}),
        {},
        "leave out tuning.options.rank_pattern",
    ),
    "rounded weights that are trained": (Full(), {"quantise": Quantise(bits=8)}, "rounded cannot be trained"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_with_the_mend(name: str, tmp_path: Path) -> None:
    tuned, model, said = REFUSED[name]
    with pytest.raises(ConfigError, match=said):
        prepared(tmp_path, tuned, **model)


def test_a_run_that_begins_with_the_models_own_directions_resumes_bit_for_bit(tmp_path: Path) -> None:
    tuned = LoRA(rank=RANK, options={"init_lora_weights": "pissa"})
    whole = prepared(tmp_path, tuned, new_tokens=TOKENS, output="whole")
    expected = trained(whole)
    first = prepared(tmp_path, tuned, new_tokens=TOKENS)
    first.save_record()
    begun = []
    for step in train_steps(first):
        begun.append(step.loss.item())
        if step.number == 5:
            save(first)
            break
    second = prepared(tmp_path, tuned, new_tokens=TOKENS)
    assert second.progress.step == 5
    assert begun + trained(second) == expected
    assert torch.equal(logits(second.model, ids(second)), logits(whole.model, ids(whole)))
