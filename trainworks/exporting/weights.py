"""Write a run's model in Hugging Face format, whole, from any layout over devices."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainworks.models import dequantised, load, new_ids, outline
from trainworks.parallel.placement import collect
from trainworks.record import write_json
from trainworks.run import Run
from trainworks.schema import LoRA, Peft, Pretrained
from trainworks.tuning import Tuned, rehearse

__all__ = ["export"]


def export(run: Run, folder: str | Path | None = None) -> Path:
    """Write weights (or the adapter), configuration and processor to `folder`, by default `model` in the run's own. All
    ranks.

    Tensors are collected in the main process's memory, part by part. With `tuning: {type: lora, merge: true}`, the
    base model with the update added in is written beside it, to `merged`; of a base that was rounded to a few bits, it
    is these values that the update is added to, since it was trained beside them.
    """
    folder = Path(folder or run.folder / "model")
    with run.averaged("export"):
        weights = _gathered(run)
        if run.world.is_main:
            _write(run, folder, weights)
    if run.world.is_main and isinstance(run.config.tuning, LoRA | Peft) and run.config.tuning.merge:
        _write_merged(run, folder, folder.with_name("merged"))
    run.world.wait_patiently()
    return folder


def _gathered(run: Run) -> dict[str, Tensor]:
    """Return the model's whole state on the main process, nothing on the others."""
    return collect(_wanted(run), run.world)


def _wanted(run: Run) -> dict[str, Tensor]:
    """Return the adapter's state under PEFT's names, or all of the model's."""
    if run.tuned.adapter is not None:
        return {name: tensor for name, tensor in run.tuned.adapter.state_dict().items() if name in run.tuned.added}
    tied = {*(run.model.all_tied_weights_keys or ())}  # gathered copies are no longer one tensor: write the first
    return {name: tensor for name, tensor in run.model.state_dict().items() if name not in tied}


def _stopping(model: Any, ends: tuple[int, ...]) -> Any:
    """Return a model whose generation stops where an answer of its task ends, and where it did before."""
    if ends:
        before = model.generation_config.eos_token_id
        known = before if isinstance(before, list) else [before]
        model.generation_config.eos_token_id = sorted({*ends, *known} - {None})
    return model


def _write(run: Run, folder: Path, weights: dict[str, Tensor]) -> None:
    adapter = run.tuned.adapter if run.world.layout.pipeline == 1 else _over_all_layers(run)
    model = _stopping(run.model, run.ends)
    if adapter is None:
        model.save_pretrained(folder, state_dict=weights)
    else:
        adapter.save_pretrained(
            str(folder), state_dict=_beside_the_base(run.tuned, weights), save_embedding_layers=False
        )
        if run.tuned.initial:
            _say_plain_lora(folder / "adapter_config.json")
        (folder / "README.md").unlink(missing_ok=True)  # PEFT writes an empty card
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
    run.processor.save_pretrained(folder)


def _over_all_layers(run: Run) -> Any:
    """Return the run's adapter over a model without weights: PEFT (0.21) writes what belongs to layers that it finds,
    and a rank of a pipeline has some of them."""
    if run.tuned.adapter is None:
        return None
    model = outline(run.config.model, run.task.auto_class, run.task.head(), run.processor)
    new = new_ids(run.config.model, run.processor)
    adapter: Any = rehearse(run.config.tuning, model, auto_class=run.task.auto_class, new_tokens=new).adapter
    adapter.peft_config = run.tuned.adapter.peft_config
    return adapter


def _beside_the_base(tuned: Tuned, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return an adapter that was taken out of the base model's weights as one that stands beside these untouched.

    With B A for what was learned and B' A' for what was taken out, B A - B' A' = [B, -B'] [A; A'].
    """
    joined = {
        name: torch.cat([weights[name], begin], 0) if ".lora_A." in name else torch.cat([weights[name], -begin], 1)
        for name, begin in tuned.initial.items()
    }
    return weights | joined


def _say_plain_lora(path: Path) -> None:
    """Say in an adapter's configuration that it has twice the rank, scaled as before, and leaves the base as it is."""
    config = json.loads(path.read_bytes())
    factor = math.sqrt(2) if config["use_rslora"] else 2
    doubled = {"r": 2 * config["r"], "lora_alpha": factor * config["lora_alpha"], "init_lora_weights": True}
    write_json(path, config | doubled)


def _write_merged(run: Run, adapter: Path, folder: Path) -> None:
    """Add the exported adapter into a fresh copy of the base, so that the live weights are not rounded by merging and
    unmerging."""
    from peft import PeftModel

    assert isinstance(run.config.model, Pretrained)  # an adapter is trained beside weights that were there
    base = load(run.config.model, run.task.auto_class, run.task.head(), run.processor, seed=run.config.seed)
    if run.config.model.quantise is not None:
        base = dequantised(base)
    run.task.adapt(base, run.processor)
    merged: Any = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    _stopping(merged, run.ends).save_pretrained(folder)
    run.processor.save_pretrained(folder)
