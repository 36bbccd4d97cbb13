"""Write a run's model in Hugging Face format, whole, from any layout over devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from trainworks.models import load, outline
from trainworks.parallel.placement import collect
from trainworks.run import Run
from trainworks.schema import LoRA, Pretrained
from trainworks.tuning import rehearse

__all__ = ["export"]


def export(run: Run, folder: str | Path | None = None) -> Path:
    """Write weights (or the adapter), configuration and processor to `folder`, by default `model` in the run's own. All
    ranks.

    Tensors are collected in the main process's memory, part by part. With `tuning: {type: lora, merge: true}`, the
    base model with the update added in is written beside it, to `merged`.
    """
    folder = Path(folder or run.folder / "model")
    weights = _gathered(run)
    if run.world.is_main:
        _write(run, folder, weights)
        if isinstance(run.config.tuning, LoRA) and run.config.tuning.merge:
            _write_merged(run, folder, folder.with_name("merged"))
    run.world.wait_patiently()
    return folder


def _gathered(run: Run) -> dict[str, Tensor]:
    """Return the model's whole state on the main process, nothing on the others."""
    wanted = _adapter_only if run.tuned.adapter is not None else _everything
    tied = {*(run.model.all_tied_weights_keys or ())}  # collected, they are no longer one tensor: write the first
    return collect({name: tensor for name, tensor in wanted(run).items() if name not in tied}, run.world)


def _everything(run: Run) -> dict[str, Tensor]:
    return run.model.state_dict()


def _adapter_only(run: Run) -> dict[str, Tensor]:
    trained = {name for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    return {name: tensor for name, tensor in run.model.state_dict().items() if name in trained}


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
            str(folder), state_dict={f"base_model.model.{name}": value for name, value in weights.items()}
        )
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
    adapter: Any = rehearse(run.config.tuning, model, auto_class=run.task.auto_class).adapter
    adapter.peft_config = run.tuned.adapter.peft_config
    return adapter


def _write_merged(run: Run, adapter: Path, folder: Path) -> None:
    """Add the exported adapter into a fresh copy of the base, so that the live weights are not rounded by merging and
    unmerging."""
    from peft import PeftModel

    assert isinstance(run.config.model, Pretrained)  # an adapter is trained beside weights that were there
    base = load(run.config.model, run.task.auto_class, run.task.head(), run.processor, seed=run.config.seed)
    merged: Any = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    _stopping(merged, run.ends).save_pretrained(folder)
    run.processor.save_pretrained(folder)
