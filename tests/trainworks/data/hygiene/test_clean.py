"""Cleaning as a run does it: the stages in their order, what they leave on disk, and that nothing but it decides."""

from __future__ import annotations

import json
import os
import random
import stat
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from trainworks.cleaning import (
    Clean,
    Decontaminate,
    EvaluationSet,
    Languages,
    Length,
    Local,
    NearDuplicate,
    Slurm,
)
from trainworks.data.hygiene import executors
from trainworks.data.hygiene.clean import clean
from trainworks.data.sources import read
from trainworks.data.workers import Worker
from trainworks.errors import ConfigError, DataError, LaunchError
from trainworks.reading import Data

WORDS = (  # noqa: SIM905
    "the old house stood on a green hill and from its windows one could see the river where small boats went by "
    "every morning while people walked slowly along the bank talking about weather bread work children and news"
).split()
ITEM = "Which of the seven boats on the river came back to the green hill before the other six did?"
EVERYTHING = {
    "length": Length(min_words=3, max_words=200),
    "language": Languages(keep=("en",)),
    "exact": True,
    "near": NearDuplicate(),
    "decontaminate": Decontaminate(against=("validation",)),
    "pii": "count",
    "shard_rows": 40,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRAINWORKS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def rows() -> Dataset:
    """Return 200 rows of which seven have something wrong."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=80)) for _ in range(200)]
    texts[10] = "too short"
    texts[20] = " ".join(WORDS * 10)
    texts[30] = "Die Katze saß auf der Matte und sah den Hund an, der auf der Wiese lag und schlief."
    texts[150] = texts[5]
    texts[160] = texts[6].replace(" ", "; ") + " again"
    texts[199] = f"{texts[199]} {ITEM} {texts[1]}"
    texts[7] += " write to jo@example.org"
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    return Dataset.from_dict({"text": texts, "label": [number % 2 for number in range(200)]}, features=features)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_each_stage_leaves_out_what_it_should_and_tells_why() -> None:
    cleaned = clean(rows(), Clean(**EVERYTHING), {"validation": [ITEM]})
    assert sorted(set(range(200)) - set(cleaned.kept.tolist())) == [10, 20, 30, 150, 160, 199]
    assert [(stage.name, stage.rows_in, stage.rows_out, stage.removed) for stage in cleaned.stages] == [
        ("length", 200, 198, {"too short": 1, "too long": 1}),
        ("language", 198, 197, {"another language": 1}),
        ("exact", 197, 196, {"same text as a row before": 1}),
        ("near", 196, 195, {"nearly the same text as a row before": 1}),
        ("decontaminate", 195, 194, {"holds an evaluation item": 1}),
        ("pii", 194, 194, {}),
    ]
    assert cleaned.stages[-1].found == {"texts with email address": 1}
    assert cleaned.rows.features == rows().features
    assert cleaned.rows["text"][:] == rows().select(cleaned.kept)["text"][:]


def test_every_stage_leaves_a_manifest_that_names_its_input_by_the_output_before() -> None:
    cleaned = clean(rows(), Clean(**EVERYTHING), {"validation": [ITEM]})
    manifests = [json.loads(path.read_text()) for path in sorted((cleaned.folder / "manifests").iterdir())]
    assert [manifest["facts"]["name"] for manifest in manifests] == [stage.name for stage in cleaned.stages]
    for before, after in pairwise(manifests):
        assert after["input"] == before["output"]
    for manifest in manifests:
        assert all(len(manifest[name]) == 64 for name in ("config", "code", "input", "output"))
    assert not (cleaned.folder / "making").exists()


def test_the_bytes_do_not_depend_on_the_number_of_workers(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for workers in (1, 2, 4):
        monkeypatch.setenv("TRAINWORKS_CACHE", str(cache / str(workers)))
        made.append(files(clean(rows(), Clean(**EVERYTHING, workers=workers), {"validation": [ITEM]}).folder))
    assert len(made[0]) == 5 + 6 + 2
    assert made[0] == made[1] == made[2]


def test_what_was_done_is_not_done_again_and_a_changed_setting_or_item_is(monkeypatch: pytest.MonkeyPatch) -> None:
    first = clean(rows(), Clean(**EVERYTHING), {"validation": [ITEM]})
    others = [
        clean(rows(), Clean(**EVERYTHING), {"validation": [ITEM, "and another item of some length"]}),
        clean(rows(), Clean(**EVERYTHING | {"exact": False}), {"validation": [ITEM]}),
    ]
    assert len({first.folder, *(other.folder for other in others)}) == 3

    def refuse(space: object) -> None:
        raise AssertionError("nothing is left to do")

    monkeypatch.setattr(executors, "_KINDS", {"local": refuse})
    assert clean(rows(), Clean(**EVERYTHING, workers=2), {"validation": [ITEM]}).folder == first.folder


def test_a_run_trains_on_the_rows_that_stay_and_its_evaluation_rows_stay_whole(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": ITEM, "answer": "no"}) + "\n")
    against = EvaluationSet(source=str(tmp_path), split=("test.jsonl",), columns=("question",))
    wanted = Clean(decontaminate=Decontaminate(against=("validation", against)))
    taken = read(Data(source=rows(), holdout=0.1, clean=wanted), seed=1)
    assert taken.validation is not None
    assert len(taken.validation) == 20
    assert taken.cleaning[0].rows_in == 180
    removed = 180 - len(taken.train)
    assert taken.dropped["train"] == {"holds an evaluation item": removed}
    assert any(name.endswith("test.jsonl") for name in taken.cleaning[0].found)
    numbers = [taken.origins["train"].at(row).row for row in range(len(taken.train))]
    assert taken.train["text"][:] == rows().select(numbers)["text"][:]


def test_a_mistake_is_refused_with_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"'eng' cannot be told .did you mean"):
        clean(rows(), Clean(language=Languages(keep=("eng",))), {})
    with pytest.raises(DataError, match="no column 'txt'"):
        clean(rows(), Clean(text=("txt",), exact=True), {})
    with pytest.raises(DataError, match="leaves no row; length: too short 200"):
        clean(rows(), Clean(length=Length(min_words=1_000)), {})
    with pytest.raises(DataError, match="there are no validation rows"):
        read(Data(source=rows(), holdout=0, clean=Clean(decontaminate=Decontaminate(against=("validation",)))), seed=0)


def test_a_missing_package_is_named_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "find_spec", lambda name: None)
    with pytest.raises(LaunchError, match=r"datatrove is not installed; `pip install 'trainworks\[hygiene\]'`"):
        clean(rows(), Clean(exact=True), {})


def test_a_worker_that_dies_is_told_and_its_shards_are_done_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(executors, "Worker", Killed)
        with pytest.raises(LaunchError, match="ended with code -9"):
            clean(rows(), Clean(exact=True), {})
    assert len(clean(rows(), Clean(exact=True), {}).rows) == 199


class Killed(Worker):
    """A worker that dies before it is asked anything."""

    def __init__(self, *words: str) -> None:
        super().__init__(*words)
        self._process.kill()
        self._process.wait()


SBATCH = """#!{python}
import os, re, subprocess, sys
*options, script = sys.argv[1:]
text = open(script).read()
tasks = re.search(r"--array=0-(\\d+)", text)
for task in range(int(tasks[1]) + 1 if tasks and "merge_stats" not in text else 0):
    extra = {{"SLURM_ARRAY_TASK_ID": str(task), "SLURM_NODELIST": "here", "RUN_OFFSET": "0"}}
    subprocess.run(["bash", script], env=os.environ | extra, check=True, stdout=sys.stderr)
print("Submitted batch job 17")
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Slurm that runs each job at once, on this machine."""
    commands = {
        "sbatch": SBATCH.format(python=sys.executable),
        "srun": '#!/bin/bash\nwhile [[ $1 == -* ]]; do [[ $1 == -n ]] && shift; shift; done; exec "$@"\n',
        "scontrol": "#!/bin/bash\necho here\n",
        "squeue": "#!/bin/bash\n",
    }
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in commands.items():
        path = folder / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


@pytest.mark.slow
def test_the_same_stages_run_on_slurm_by_one_line_and_give_the_same_bytes(
    slurm: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    for executor in (Local(), Slurm(type="slurm", partition="cpu", time="00:10:00", options={"mem_per_cpu_gb": 1})):
        monkeypatch.setenv("TRAINWORKS_CACHE", str(cache / executor.type))
        wanted = Clean(exact=True, near=NearDuplicate(), shard_rows=100, executor=executor)
        made.append(files(clean(rows(), wanted, {}).folder))
    assert made[0] == made[1]


def test_an_option_that_the_executor_does_not_have_is_refused_with_the_nearest() -> None:
    wanted = Slurm(type="slurm", partition="cpu", time="1", options={"mem_per_cpu": 4})
    with pytest.raises(ConfigError, match=r"no option 'mem_per_cpu' to set .did you mean 'mem_per_cpu_gb'"):
        clean(rows(), Clean(exact=True, executor=wanted), {})


def test_slurm_jobs_that_end_without_their_files_are_told(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (slurm / "sbatch").write_text("#!/bin/bash\necho Submitted batch job 17\n")
    monkeypatch.setattr(executors, "_GRACE_SECONDS", 0.0)
    monkeypatch.setattr(executors, "_POLL_SECONDS", 0.01)
    with pytest.raises(LaunchError, match=r"Slurm job 17 \(exact-digests\) is over, and shards \[0\] are not done"):
        clean(rows(), Clean(exact=True, executor=Slurm(type="slurm", partition="cpu", time="1")), {})
