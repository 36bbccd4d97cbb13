"""Losses and gradients of preference learning: those of TRL on the same batch, and of the papers in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification

from trainworks import DPO, IPO, KTO, ORPO, FromScratch, Preference, Reward, SimPO
from trainworks.models import initialise
from trainworks.tasks.objectives import Objective

TOLERANCE = 1e-5
ROWS = 6
OBJECTIVES: dict[str, Objective] = {
    "dpo": DPO(beta=0.3),
    "smoothed": DPO(beta=0.3, label_smoothing=0.2),
    "ipo": IPO(beta=0.2),
    "simpo": SimPO(beta=2.0, gamma=0.7),
    "orpo": ORPO(odds_weight=0.4),
    "kto": KTO(beta=0.3, desirable_weight=1.2, undesirable_weight=0.8),
}


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """Return a model, and another one that is its reference."""
    made = FromScratch(architecture="llama", sizes=tiny.SIZES | {"initializer_range": 0.2}, tokenizer="unused")
    policy, reference = (initialise(made, "AutoModelForCausalLM", tiny.tokenizer(), seed=seed) for seed in (2, 1))
    return policy, reference.eval()


def labelled(number: int) -> list[dict[str, Any]]:
    pairs = tiny.rows("preference", number)
    return [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for place, row in enumerate(pairs)
        for side in (("chosen", "rejected", "rejected")[place % 3],)
    ]


def batch_of(objective: Objective, rows: list[dict[str, Any]], reference: Any) -> tuple[Preference, dict[str, Tensor]]:
    """Return the task, and rows prepared, arranged, collated and annotated as a run does."""
    given = Dataset.from_list(rows)
    task = Preference(max_length=128, objective=objective).resolve(given)
    samples = task.prepare(given, tiny.tokenizer()).samples
    if (tables := task.arrange(samples)) is not None:
        samples = Dataset.from_list([row for table in tables for row in table.to_pylist()])
    whole = samples.with_format("numpy")
    batch = task.collate([whole[row] for row in range(len(whole))], tiny.tokenizer(), train=True)
    if task.annotates:
        with torch.no_grad():
            said = task.annotate(reference, batch, tiny.tokenizer())
        batch |= {name: values.t() for name, values in said.items()}
    return task, batch


def ours(model: Any, task: Preference, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """Return the loss and the gradients as the loop makes them of one micro-batch."""
    model.zero_grad()
    if task.couples:
        with torch.no_grad():
            batch = batch | {name: each.sum()[None] for name, each in task.couple(model, batch, None).items()}
    loss = task.loss(model, batch)["loss"].sum() / task.count(batch)["loss"].sum()
    loss.backward()
    return loss.item(), gradients(model)


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def check(found: tuple[float, dict[str, Tensor]], loss: float, expected: dict[str, Tensor]) -> None:
    assert found[0] == pytest.approx(loss, rel=TOLERANCE, abs=TOLERANCE)
    assert found[1].keys() == expected.keys()
    whole = math.sqrt(sum(float(gradient.double().norm() ** 2) for gradient in expected.values()))
    assert whole > 1e-3
    for name, gradient in expected.items():
        assert float((found[1][name].double() - gradient.double()).norm()) <= TOLERANCE * whole, name


# The papers, in float64


def summed(model: Any, ids: list[Tensor], trained: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return each line's log-probability and its number of tokens, line by line from whole logits."""
    logps = []
    for line, mask in zip(ids, trained, strict=True):
        logs = model(line[None]).logits[0, :-1].log_softmax(-1)
        logps.append(logs.gather(1, line[1:, None])[mask[1:], 0].sum())
    return torch.stack(logps), torch.tensor([int(mask[1:].sum()) for mask in trained])


def unpadded(batch: dict[str, Tensor], prefix: str = "") -> tuple[list[Tensor], list[Tensor]]:
    """Return the lines of a batch as ids and as masks of their answers."""
    inputs, labels = batch[f"{prefix}input_ids"], batch[f"{prefix}labels"]
    attended = batch.get(f"{prefix}attention_mask", torch.ones_like(inputs)).bool()
    ids, masks = [], []
    for row in range(len(inputs)):
        size = int(attended[row].sum())
        answer = labels[row, :size] != -100
        last = labels[row, size - 1]
        ids.append(torch.cat([inputs[row, :size], (last if last != -100 else torch.tensor(0))[None]]))
        masks.append(torch.cat([torch.tensor([False]), answer]))
    return ids, masks


def dpo(y: Tensor, r: Tensor, n: Tensor, *_: Any) -> Tensor:
    return -logsigmoid(0.3 * ((y - r)[0] - (y - r)[1]))


def smoothed(y: Tensor, r: Tensor, n: Tensor, *_: Any) -> Tensor:
    margin = 0.3 * ((y - r)[0] - (y - r)[1])
    return 0.8 * -torch.log(1 / (1 + torch.exp(-margin))) + 0.2 * -torch.log(1 / (1 + torch.exp(margin)))


def ipo(y: Tensor, r: Tensor, n: Tensor, *_: Any) -> Tensor:
    means = (y - r) / n
    return (means[0] - means[1] - 1 / (2 * 0.2)) ** 2


def simpo(y: Tensor, r: Tensor, n: Tensor, *_: Any) -> Tensor:
    return -logsigmoid(2.0 / n[0] * y[0] - 2.0 / n[1] * y[1] - 0.7)


def orpo(y: Tensor, r: Tensor, n: Tensor, *_: Any) -> Tensor:
    p = torch.exp(y / n)
    odds = p / (1 - p)
    return -y[0] / n[0] - 0.4 * torch.log(torch.sigmoid(torch.log(odds[0] / odds[1])))


def kto(y: Tensor, r: Tensor, n: Tensor, wanted: Tensor, drift: Tensor) -> Tensor:
    z = drift.mean().clamp(min=0)
    value = torch.where(wanted, torch.sigmoid(0.3 * (y - r - z)), torch.sigmoid(0.3 * (z - (y - r))))
    weight = torch.where(wanted, 1.2, 0.8)
    return weight - weight * value


FORMULAS: dict[str, Callable[..., Tensor]] = {
    "dpo": dpo,
    "smoothed": smoothed,
    "ipo": ipo,
    "simpo": simpo,
    "orpo": orpo,
    "kto": kto,
}


@pytest.mark.parametrize(("name", "single"), [*((name, False) for name in OBJECTIVES), ("kto", True)])
def test_loss_and_gradient_are_those_of_the_paper(name: str, single: bool, models: tuple[Any, Any]) -> None:
    policy, reference = models
    rows = labelled(ROWS) if single else tiny.rows("preference", ROWS)
    task, batch = batch_of(OBJECTIVES[name], rows, reference)
    exact, before = (copy.deepcopy(model).double() for model in models)
    answers, desirable = unpadded(batch), batch["desirable"]
    logps, tokens = summed(exact, *answers)
    drift = torch.zeros(1)
    with torch.no_grad():
        old, _ = summed(before, *answers)
        if task.couples:
            others = unpadded(batch, "other_")
            drift = summed(exact, *others)[0] - summed(before, *others)[0]
            assert drift.mean() > 0, "the clamp should not bind here"
    exact.zero_grad()
    logps, old, tokens = (each.view_as(desirable) for each in (logps, old, tokens))
    loss = FORMULAS[name](logps, old, tokens, desirable, drift).mean()
    loss.backward()
    check(ours(policy, task, batch), loss.item(), gradients(exact))


def test_answers_of_other_rows_stand_behind_a_rows_own_prompt(models: tuple[Any, Any]) -> None:
    rows = [{"prompt": f"the {word}", "completion": f"a {word} tree", "label": True} for word in tiny.WORDS[:5]]
    _, batch = batch_of(KTO(), rows, models[1])
    own, others = (tiny.tokenizer().batch_decode(batch[name]) for name in ("input_ids", "other_input_ids"))
    for row, (mine, mixed) in enumerate(zip(own, others, strict=True)):
        assert f"the {tiny.WORDS[row]}" in mine
        assert f"the {tiny.WORDS[row]}" in mixed
        assert f"a {tiny.WORDS[row]} tree" in mine
        assert f"a {tiny.WORDS[(row + 2) % 5]} tree" in mixed


def test_kto_is_drawn_to_no_other_prompts_where_it_is_below_its_reference(models: tuple[Any, Any]) -> None:
    task, batch = batch_of(KTO(), labelled(ROWS), models[1])
    counted = {"drift_answers": torch.tensor([6.0])}
    below, at = (
        task.loss(models[0], batch | counted | {"drift": torch.tensor([drift])})["loss"] for drift in (-5.0, 0.0)
    )
    assert torch.equal(below, at)


# TRL


def trl_arguments(folder: Path) -> dict[str, Any]:
    return {"output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True}


def trl_masks(batch: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Return lines as TRL collates them: whole ids, and which of them are the answer's."""
    ids, masks = unpadded(batch, prefix)
    attended = [torch.ones_like(line) for line in ids]
    padded = (torch.nn.utils.rnn.pad_sequence(part, batch_first=True) for part in (ids, attended, masks))
    return dict(zip(("input_ids", "attention_mask", "completion_mask"), (part.long() for part in padded), strict=True))


def trl_dpo(objective: Any, models: tuple[Any, Any], batch: dict[str, Tensor], folder: Path) -> Tensor:
    from trl import DPOConfig, DPOTrainer

    kind = {"dpo": "sigmoid", "ipo": "ipo"}[objective.type]
    told = DPOConfig(**trl_arguments(folder), loss_type=[kind], beta=objective.beta, gradient_checkpointing=False)
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    trainer = DPOTrainer(models[0], models[1], args=told, train_dataset=rows, processing_class=tiny.tokenizer())
    loss: Tensor = trainer.compute_loss(models[0], trl_masks(batch))
    return loss


def trl_kto(objective: Any, models: tuple[Any, Any], batch: dict[str, Tensor], folder: Path) -> Tensor:
    from trl import KTOConfig, KTOTrainer

    weights = {name: getattr(objective, name) for name in ("desirable_weight", "undesirable_weight")}
    told = KTOConfig(**trl_arguments(folder), beta=objective.beta, **weights, gradient_checkpointing=False)
    rows = Dataset.from_list([{"prompt": "a", "completion": "b", "label": bool(place % 2)} for place in range(4)])
    trainer = KTOTrainer(models[0], models[1], args=told, train_dataset=rows, processing_class=tiny.tokenizer())
    others = {f"KL_{name}": values for name, values in trl_masks(batch, "other_").items()}
    loss: Tensor = trainer.compute_loss(models[0], trl_masks(batch) | others | {"label": batch["desirable"].flatten()})
    return loss


def by_side(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a batch of pairs as TRL's experimental trainers collate it."""
    whole = trl_masks(batch)
    labels = whole["input_ids"].masked_fill(whole["completion_mask"] == 0, -100)
    parts = {"input_ids": whole["input_ids"], "attention_mask": whole["attention_mask"], "labels": labels}
    return {
        f"{side}_{name}": half
        for name, values in parts.items()
        for side, half in zip(("chosen", "rejected"), values.chunk(2), strict=True)
    }


def trl_simpo(objective: Any, models: tuple[Any, Any], batch: dict[str, Tensor], folder: Path) -> Tensor:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    told = CPOConfig(
        **trl_arguments(folder),
        loss_type="simpo",
        cpo_alpha=0.0,
        beta=objective.beta,
        simpo_gamma=objective.gamma,
        gradient_checkpointing=False,
    )
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    trainer = CPOTrainer(models[0], args=told, train_dataset=rows, processing_class=tiny.tokenizer())
    loss: Tensor = trainer.get_batch_loss_metrics(models[0], by_side(batch))[0]
    return loss


def trl_orpo(objective: Any, models: tuple[Any, Any], batch: dict[str, Tensor], folder: Path) -> Tensor:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    told = ORPOConfig(**trl_arguments(folder), beta=objective.odds_weight, gradient_checkpointing=False)
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    trainer = ORPOTrainer(models[0], args=told, train_dataset=rows, processing_class=tiny.tokenizer())
    # Its likelihood is over prompts too, and over the batch's tokens; the paper's is of the answer, by row.
    chosen, rejected, *_ = trainer.concatenated_forward(models[0], by_side(batch))
    ratios: Tensor = trainer.odds_ratio_loss(chosen, rejected)[0]
    return -chosen.mean() - ratios.mean()


PEERS: dict[str, Callable[..., Tensor]] = {
    "dpo": trl_dpo,
    "ipo": trl_dpo,
    "simpo": trl_simpo,
    "orpo": trl_orpo,
    "kto": trl_kto,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PEERS)
def test_loss_and_gradient_are_those_of_trl(name: str, models: tuple[Any, Any], tmp_path: Path) -> None:
    policy, reference = (copy.deepcopy(model) for model in models)
    rows = labelled(ROWS) if name == "kto" else tiny.rows("preference", ROWS)
    task, batch = batch_of(OBJECTIVES[name], rows, reference)
    found = ours(policy, task, batch)
    policy.zero_grad()
    loss = PEERS[name](OBJECTIVES[name], (policy, reference), batch, tmp_path)
    loss.backward()
    check(found, loss.item(), gradients(policy))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("center", [0.0, 0.1])
def test_a_reward_models_loss_and_gradient_are_those_of_trl(center: float, tmp_path: Path) -> None:
    from trl import RewardConfig, RewardTrainer

    made = FromScratch(architecture="llama", sizes=tiny.SIZES | {"initializer_range": 0.2}, tokenizer="unused")
    initialise(made, "AutoModel", tiny.tokenizer(), seed=1).save_pretrained(tmp_path / "model")
    model: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=1)
    rows = [row | {"better": 0.1 * place} for place, row in enumerate(tiny.rows("reward", ROWS))]
    task = Reward(max_length=128, margin="better", center=center).resolve(Dataset.from_list(rows))
    samples = task.prepare(Dataset.from_list(rows), tiny.tokenizer()).samples.with_format("numpy")
    batch = task.collate([samples[row] for row in range(ROWS)], tiny.tokenizer(), train=True)
    (task.loss(model, batch)["loss"].sum() / task.count(batch)["loss"].sum()).backward()
    found = task.loss(model, batch)["loss"].mean().item(), gradients(model)
    model.zero_grad()
    told = RewardConfig(**trl_arguments(tmp_path), center_rewards_coefficient=center, gradient_checkpointing=False)
    pairs = Dataset.from_list([{"chosen": "a b", "rejected": "a c"}])
    trainer = RewardTrainer(model, args=told, train_dataset=pairs, processing_class=tiny.tokenizer())
    loss = trainer.compute_loss(model, dict(batch))
    loss.backward()
    check(found, loss.item(), gradients(model))
