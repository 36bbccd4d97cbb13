"""A checkpoint from anybody, checksums and all: nothing in it runs, and no file outside of it is read or written."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

import finetune
from trainworks import Budget, Every, Run, train_steps
from trainworks.checkpoint import checkpoints, restore, save
from trainworks.errors import CheckpointError

pytestmark = pytest.mark.faults


class _Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({str(self.mark)!r}, 'w').close()",)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, rows, and a run that was saved after its first step."""
    folder = tmp_path_factory.mktemp("good")
    tiny.save_model(folder / "model", "sft")
    tiny.save_rows(folder / "rows.jsonl", "sft", 24)
    run = prepared(folder, folder)
    next(train_steps(run))
    save(run)
    run.save_record()
    return folder


def prepared(good: Path, folder: Path) -> Run:
    config = tiny.config("sft", good / "model", good / "rows.jsonl", folder / "run", every=Every(log=1, save=1))
    return finetune.prepare(config.model_copy(update={"budget": Budget(steps=3)}))


@pytest.fixture
def run(good: Path, tmp_path: Path) -> Run:
    """A new run, into whose folder the good one's checkpoint is put."""
    made = prepared(good, tmp_path)
    shutil.copytree(good / "run" / "checkpoints", made.folder / "checkpoints")
    (tmp_path / "outside").mkdir()
    return made


def checkpoint_of(run: Run) -> Path:
    (found,) = checkpoints(run.folder)
    return found.path


def sign(folder: Path, files: dict[str, Path] | None = None) -> None:
    """Write the manifest anew over what is in the folder, as anybody can; `files` are listed besides."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    named = {path.name: path for path in folder.iterdir() if path.name != "manifest.json"} | (files or {})
    listed = {
        name: {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for name, path in named.items()
    }
    body = {"format": manifest["format"], "files": listed}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(body | {"sha256": digest}))


def index_of(folder: Path) -> tuple[Path, dict[str, Any]]:
    path = folder / "rank-00000.json"
    return path, json.loads(path.read_bytes())


def listed_outside(folder: Path, outside: Path) -> None:
    (outside / "file").write_bytes(b"anything")
    sign(folder, {"../../../outside/file": outside / "file"})


def listed_anywhere(folder: Path, outside: Path) -> None:
    (outside / "file").write_bytes(b"anything")
    sign(folder, {str(outside / "file"): outside / "file"})


def linked_weights(folder: Path, outside: Path) -> None:
    weights = next(folder.glob("*.safetensors"))
    shutil.move(weights, outside / "weights")
    weights.symlink_to(outside / "weights")
    sign(folder)


def linked_state(folder: Path, outside: Path) -> None:
    shutil.move(folder / "state.json", outside / "state")
    (folder / "state.json").symlink_to(outside / "state")
    sign(folder)


def linked_manifest(folder: Path, outside: Path) -> None:
    shutil.move(folder / "manifest.json", outside / "manifest")
    (folder / "manifest.json").symlink_to(outside / "manifest")


def pieces_outside(folder: Path, outside: Path) -> None:
    """Have the index say that the pieces stand in a file outside, which is a good one."""
    weights = next(folder.glob("*.safetensors"))
    shutil.copy(weights, outside / "weights.safetensors")
    path, index = index_of(folder)
    for piece in index["pieces"].values():
        piece["file"] = "../../../outside/weights.safetensors"
    path.write_text(json.dumps(index))
    sign(folder)


def pickles_beside(folder: Path, outside: Path) -> None:
    for name in ("custom_checkpoint_0.pkl", "optimizer.bin", "random_states_0.pkl", ".metadata"):
        (folder / name).write_bytes(pickle.dumps(_Payload(outside / "mark")))
    sign(folder)


def pickled_weights(folder: Path, outside: Path) -> None:
    next(folder.glob("*.safetensors")).write_bytes(pickle.dumps(_Payload(outside / "mark")))
    sign(folder)


def pickled_index(folder: Path, outside: Path) -> None:
    index_of(folder)[0].write_bytes(pickle.dumps(_Payload(outside / "mark")))
    sign(folder)


def pickled_state(folder: Path, outside: Path) -> None:
    (folder / "state.json").write_bytes(pickle.dumps(_Payload(outside / "mark")))
    sign(folder)


def a_function_for_a_type(folder: Path, outside: Path) -> None:
    """Have the index name a function of torch where a type of numbers belongs."""
    path, index = index_of(folder)
    for name, piece in index["pieces"].items():
        if name.startswith("optimizer."):
            piece["dtype"] = "load"
    path.write_text(json.dumps(index))
    sign(folder)


SPOILT: list[Callable[[Path, Path], None]] = [
    listed_outside,
    listed_anywhere,
    linked_weights,
    linked_state,
    linked_manifest,
    pieces_outside,
    pickles_beside,
    pickled_weights,
    pickled_index,
    pickled_state,
    a_function_for_a_type,
]


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__)
def test_a_checkpoint_is_refused_or_set_aside_though_its_checksums_are_right(
    spoil: Callable[[Path, Path], None], run: Run, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    spoil(checkpoint_of(run), outside)
    before = {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()}
    try:
        restored = restore(run)
    except CheckpointError:
        restored = None
    assert not (outside / "mark").exists(), "a payload ran"
    assert {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()} == before
    if spoil is not pickles_beside:  # what is read of a checkpoint is told by name, and these files are not
        assert restored is None


def test_the_payload_leaves_the_mark_where_it_is_believed(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(_Payload(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


def test_a_good_checkpoint_signed_anew_is_restored(run: Run) -> None:
    sign(checkpoint_of(run))
    restored = restore(run)
    assert restored is not None
    assert run.progress.step == 1


def test_a_linked_checkpoint_folder_is_not_taken_for_one(run: Run, tmp_path: Path) -> None:
    path = checkpoint_of(run)
    shutil.move(path, tmp_path / "outside" / path.name)
    path.symlink_to(tmp_path / "outside" / path.name)
    assert restore(run) is None
    assert (tmp_path / "outside" / path.name / "manifest.json").exists()
