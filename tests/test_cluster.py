"""The cluster files: signals reach the run through their launchers, it is saved, and the job goes on."""

from __future__ import annotations

import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import yaml

from trainworks import read_record
from trainworks.record import read_outcome

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "configs" / "cluster"
SECONDS = 90.0

FAKES = {
    # One machine: the step's command runs here, and its signals reach it as they would through Slurm.
    "srun": 'exec "$@"',
    "scontrol": 'echo "$@" >> "$SCONTROL_LOG"; echo localhost',
    "accelerate": f'exec {shlex.quote(sys.executable)} -m accelerate.commands.accelerate_cli "$@"',
    "trainworks": f'exec {shlex.quote(sys.executable)} -m trainworks.cli "$@"',
}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A machine of a cluster, as far as the files see it, and a run of many tiny steps."""
    (tmp_path / "bin").mkdir()
    for name, line in FAKES.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{line}\n", encoding="utf-8")
        path.chmod(0o755)
    tiny.save_run(tmp_path, budget={"steps": 5000})
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "SLURM_"))}
    return inherited | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "TRAINWORKS_CACHE": str(tmp_path / "cache"),
        "SCONTROL_LOG": str(tmp_path / "scontrol.log"),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "GPUS": "1",
        "HARDWARE": str(ROOT / "configs" / "accelerate" / "cpu.yaml"),
    }


@pytest.fixture
def started(tmp_path: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """The Slurm file's job, under way."""
    command = [str(CLUSTER / "slurm.sbatch"), "finetune", str(tmp_path / "run.yaml"), str(tmp_path / "run")]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            ["bash", *command], cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for_steps(process: subprocess.Popen[bytes], output: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        metrics = output / "metrics.jsonl"
        if metrics.exists() and metrics.read_text(encoding="utf-8").count('"CurvePoint"') >= 3:
            return
        time.sleep(0.05)
    raise AssertionError((output.parent / "log").read_text(encoding="utf-8")[-3000:])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_job_that_slurm_warns_is_saved_and_queued_again(
    number: signal.Signals, started: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    wait_for_steps(started, tmp_path / "run")
    started.send_signal(number)
    assert started.wait(SECONDS) == 75, (tmp_path / "log").read_text(encoding="utf-8")[-3000:]
    assert read_outcome(tmp_path / "run").code == 75
    record = read_record(tmp_path / "run")
    assert record.status == "preempted"
    assert record.config["faults"]["stop_within"] == 220
    assert (tmp_path / "scontrol.log").read_text(encoding="utf-8").splitlines()[-1] == "requeue 4711"


def test_the_kubernetes_job_counts_a_preempted_pod_as_no_failure() -> None:
    job = yaml.safe_load((CLUSTER / "kubernetes.yaml").read_text(encoding="utf-8"))
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    rules = {
        tuple(rule["onExitCodes"]["values"]): rule["action"]
        for rule in job["spec"]["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
    }
    assert rules == {(75,): "Ignore", (2, 3): "FailJob"}
    assert {rule["onExitCodes"]["containerName"] for rule in job["spec"]["podFailurePolicy"]["rules"][::2]} == {"run"}
    assert container["name"] == "run"
    assert pod["restartPolicy"] == "Never"  # what podFailurePolicy asks for
    # More than launch.sh gives the run to save.
    assert pod["terminationGracePeriodSeconds"] > 240
    program, output, *launcher = container["command"]
    assert (ROOT / program).is_file()
    assert os.access(ROOT / program, os.X_OK)
    assert not output.startswith("-")
    assert launcher[launcher.index("-m") + 1] in ("finetune", "pretrain")


def test_the_job_set_starts_one_process_group_over_all_its_pods() -> None:
    job_set = yaml.safe_load((CLUSTER / "kubernetes-jobset.yaml").read_text(encoding="utf-8"))
    (replicated,) = job_set["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (job["completionMode"], job["completions"]) == ("Indexed", job["parallelism"])
    (container,) = job["template"]["spec"]["containers"]
    words = shlex.split(container["command"][-1])
    assert (ROOT / words[1]).is_file()
    options = dict(word.removeprefix("--").split("=", 1) for word in words if word.startswith("--"))
    assert int(options["num_machines"]) == job["parallelism"]
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert int(options["num_processes"]) == job["parallelism"] * gpus
    # JobSet's name for the first pod: set, job, replica, pod, and the set's service.
    assert options["main_process_ip"] == "{0}-{1}-0-0.{0}".format(job_set["metadata"]["name"], replicated["name"])
    hardware = yaml.safe_load((ROOT / options["config_file"]).read_text(encoding="utf-8"))
    sizes = hardware["parallelism_config"].values()
    assert math.prod(sizes) == int(options["num_processes"])


def test_the_cloud_job_goes_on_after_75_from_what_outlasts_its_machines() -> None:
    task = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text(encoding="utf-8"))
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    assert any(task["envs"]["OUTPUT"].startswith(place) for place in task["file_mounts"])
    for name in ("RUN", "HARDWARE"):
        assert (ROOT / task["envs"][name]).is_file()
    assert (ROOT / shlex.split(task["run"])[0]).is_file()
