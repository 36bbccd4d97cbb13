"""`trainworks prepare`: everything a run looks for, once; killed at any moment, the same bytes in the end."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import yaml
from typer.testing import CliRunner

from trainworks.config import dump

WORDS = (  # noqa: SIM905
    "the old house stood on a green hill and from its windows one could see the river where small boats went by "
    "every morning while people walked slowly along the bank talking about weather bread work children and news "
    "nobody knew who had built it or when but some of them said that it was there long before their own village"
).split()
CLEANING = {"text": "text", "length": {"min_words": 3}, "exact": True, "near": {}, "pii": "count", "workers": 2}
MORE = {"language": {"keep": ["en"], "min_score": 0.01}, "decontaminate": {"against": ["validation"]}}
KILLS = int(os.environ.get("TRAINWORKS_KILLS", "10"))


def write_rows(path: Path, number: int) -> Path:
    """Write rows of which one in ten is the copy of an earlier one."""
    rng = random.Random(0)
    texts: list[str] = []
    for row in range(number):
        copied = row % 10 == 9
        texts.append(f"{rng.choice(texts)} more" if copied else " ".join(rng.choices(WORDS, k=rng.randint(40, 80))))
    rows = [{"text": text, "label": ["bad", "good"][row % 2]} for row, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run_file(folder: Path, *, rows: int, cleaning: dict[str, object]) -> Path:
    """Write the run file of a tiny classification run."""
    model = tiny.save_model(folder / "model", "sequence-classification")
    config = tiny.config(
        "sequence-classification", model, write_rows(folder / "rows.jsonl", rows), folder / "run", epochs=0.1
    )
    settings = yaml.safe_load(dump(config))
    settings["data"]["clean"] = cleaning
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in settings.items() if value is not None}))
    return path


def start(path: Path, cache: Path, *overrides: str) -> subprocess.Popen[str]:
    environment = os.environ | {"TRAINWORKS_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "trainworks.cli", "prepare", str(path), *overrides]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(path: Path, cache: Path, *overrides: str) -> str:
    process = start(path, cache, *overrides)
    said, complaint = process.communicate()
    assert process.returncode == 0, complaint
    return said


def files(cache: Path) -> dict[str, str]:
    """Return the hash of everything that is kept."""
    return {
        str(path.relative_to(cache)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(cache.rglob("*"))
        if path.is_file() and path.suffix != ".lock"
    }


def test_a_run_prepared_ahead_finds_everything_and_its_card_tells_the_cleaning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import finetune
    import model_cards
    from trainworks.config import load

    path = run_file(tmp_path, rows=200, cleaning=CLEANING)
    said = finish(path, tmp_path / "cache")
    assert "near" in said
    assert "nearly the same text as a row before: " in said
    before = files(tmp_path / "cache")
    monkeypatch.setenv("TRAINWORKS_CACHE", str(tmp_path / "cache"))
    run = finetune.prepare(load(path, model=finetune.Config))
    assert files(tmp_path / "cache") == before
    cleaning = run.record.data.cleaning
    assert [stage.name for stage in cleaning] == ["length", "exact", "near", "pii"]
    train = run.record.data.splits[0]
    assert train.rows == cleaning[0].rows_in
    assert train.samples == cleaning[-1].rows_out < train.rows
    card = str(model_cards.build(run.record))
    assert "| near" in card
    assert f"nearly the same text as a row before {cleaning[2].removed['nearly the same text as a row before']}" in card


def test_prepare_is_refused_in_the_words_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import finetune
    from trainworks.cli import app
    from trainworks.config import load
    from trainworks.errors import DataError

    monkeypatch.setenv("TRAINWORKS_CACHE", str(tmp_path / "cache"))
    path = run_file(tmp_path, rows=20, cleaning=CLEANING)
    changes = ["data.clean.text=txt"]
    with pytest.raises(DataError) as refusal:
        finetune.prepare(load(path, changes, model=finetune.Config))
    result = CliRunner().invoke(app, ["prepare", str(path), *changes])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"error: {refusal.value}\n"
    assert "no column 'txt'" in result.stderr


@pytest.mark.slow
def test_what_is_prepared_is_the_same_whether_1_2_or_4_workers_do_it(tmp_path: Path) -> None:
    path = run_file(tmp_path, rows=2_000, cleaning={**CLEANING, **MORE, "shard_rows": 200})
    made = []
    for workers in (1, 2, 4):
        cache = tmp_path / str(workers)
        finish(path, cache, f"data.clean.workers={workers}", f"data.prepare_workers={workers}")
        made.append(files(cache))
    assert sum(name.startswith("cleaned") for name in made[0]) >= 10
    assert sum(name.startswith("prepared") for name in made[0]) >= 3
    assert made[0] == made[1] == made[2]


@pytest.mark.slow
def test_prepare_killed_at_random_moments_leaves_the_bytes_of_an_undisturbed_run(tmp_path: Path) -> None:
    path = run_file(tmp_path, rows=4_000, cleaning={**CLEANING, **MORE, "shard_rows": 200})
    begun = time.monotonic()
    finish(path, tmp_path / "whole", "data.clean.workers=1")
    seconds = time.monotonic() - begun
    wanted = files(tmp_path / "whole")
    assert sum(name.endswith(".arrow") and "rows" in name for name in wanted) >= 15
    rng = random.Random(0)
    kills, rounds = 0, 0
    while kills < KILLS:
        # A round ends when it is whole; then the next begins from nothing, so that every part is met by kills.
        cache = tmp_path / f"killed-{rounds}"
        rounds += 1
        while kills < KILLS:
            process = start(path, cache, f"data.clean.workers={rng.choice([1, 2, 4])}")
            try:
                process.wait(rng.uniform(0.3, 1.0) * seconds)
            except subprocess.TimeoutExpired:
                kill = rng.choice([os.kill, os.killpg])  # without its workers, or with them
                kill(process.pid, signal.SIGKILL)
                kills += 1
            process.communicate()
            if process.returncode == 0:
                break
        finish(path, cache, "data.clean.workers=2")
        assert files(cache) == wanted
    print(f"{kills} kills in {rounds} rounds")
