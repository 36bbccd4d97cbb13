"""Several GPUs of one host: whether layouts train alike, how fast they are, and whether runs resume.

    python benchmarks/multi_gpu.py [--parts parity speed resume] [--gpus 2] [--work 1b-full 8b-full] [--json FILE]
    python benchmarks/multi_gpu.py --shape tiny --gpus 2      # on processors, with gloo, to try the script

parity: the small models of tests/layouts.py, 20 steps of packed rows with uneven masks, in float32 and in bf16, over
every layout that the GPUs suffice for, against one GPU: the largest relative difference of a step's loss and of its
gradient norm, and the largest absolute difference of an exported weight. In bf16 one GPU differs from itself, too: from
its float32 run, and from one with other micro-batches. A cell says NOT beyond twice the larger of the two.

speed: steps as in `gpu_train.py`, each GPU with the same tokens a step in every layout; against a plain loop on
accelerate's own FSDP2 and against TRL. MFU counts model FLOPs (`trainworks.cost.flops_per_token`, and the experts that
a token goes through); efficiency is a GPU's rate over that of one GPU alone.

launch: a short run with each hardware file of configs/accelerate that suits the GPUs, by accelerate's launcher.

resume: 50 steps with `deterministic: true` and dropout, a rank killed in training, and one while saving: who is named,
how long the others stay, and whether the next start ends with the same bits; and a run that moves from all GPUs to half
of them and back, in float32 without dropout, against one that never moved.

Every piece runs in processes of its own, with a time limit. What they found is written after each.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_train import mfu

if TYPE_CHECKING:
    from layouts import Spread

ROOT = Path(__file__).parents[1]
RANK = Path(__file__).with_name("multi_gpu_rank.py")
FIXED = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
"""NVLink multicast stays off in every process: not every host that lends its GPUs allows it."""
ONE = "1 GPU"
Begun = dict[str, "Future[Any]"]
"""Pieces that were begun, by name."""


@dataclass(frozen=True)
class Work:
    """What is trained for speed; `batch` lines on each GPU."""

    shape: str
    tuning: str
    batch: int
    length: int
    layouts: tuple[str, ...]
    others: tuple[str, ...] = ()


WORK = {
    "1b-full": Work(
        "1b", "full", 4, 4096, (ONE, "DDP", "FSDP2", "hybrid", "TP", "TP x FSDP2", "PP"), ("accelerate", "TRL")
    ),
    "1b-32k": Work("1b", "full", 1, 32_768, (ONE, "FSDP2", "CP")),
    "1b-128k": Work("1b", "full", 1, 131_072, ("CP",)),
    "8b-full": Work("8b", "full", 1, 8192, ("FSDP2", "hybrid", "TP", "TP x FSDP2", "PP"), ("accelerate", "TRL")),
    "8b-lora": Work("8b", "lora", 2, 4096, (ONE, "DDP", "FSDP2"), ("accelerate", "TRL")),
    "experts-full": Work("experts", "full", 4, 4096, (ONE, "DDP", "FSDP2", "EP"), ("accelerate",)),
}
AT_ONCE = 32_768
"""Tokens that a GPU has at once where ranks share lines."""


def spread_over(layout: str, gpus: int) -> Spread | None:
    """Return a layout of so many GPUs, None where it wants more."""
    from layouts import Spread

    half = gpus // 2
    made = {
        ONE: Spread(1),
        "DDP": Spread(gpus),
        "FSDP2": Spread(gpus, "fsdp2"),
        "hybrid": Spread(gpus, "fsdp2", {"dp_replicate": 2, "dp_shard": half}),
        "TP": Spread(gpus, sizes={"tp": gpus}),
        "TP x FSDP2": Spread(gpus, "fsdp2", {"tp": 2, "dp_shard": half}),
        "CP": Spread(gpus, "fsdp2", {"cp": gpus}),
        "PP": Spread(gpus, layout={"pipeline": gpus}),
        "EP": Spread(gpus, sizes={"tp": gpus}, layout={"expert": gpus}),
    }[layout]
    return None if half < 2 and layout in ("hybrid", "TP x FSDP2") else made


# Processes


@dataclass(frozen=True)
class Ended:
    """What processes came to."""

    code: int | None
    """None where the time limit ended them."""
    said: str
    seconds: float
    last_seen: dict[int, float] = field(default_factory=dict)
    """By rank, when its process was there for the last time."""

    @property
    def failure(self) -> dict[str, Any]:
        """What is kept of a failure."""
        late = "" if self.code is not None else f"over its time limit, after {self.seconds:.0f} s: "
        return {"failed": late + error_line(self.said), "end_of_log": self.said[-6000:]}


_ERROR = re.compile(r"^(\[rank\d+\]:)?\s*([\w.]*(Error|Exception)\b|error:)")


def error_line(said: str) -> str:
    """Return the last line that tells of an error, other than the launcher's own; the last line where none does."""
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["nothing was said"]
    told = [line for line in lines if _ERROR.match(line) and "ChildFailedError" not in line]
    return (told or lines)[-1][:400]


@dataclass(frozen=True)
class Machine:
    """The devices, and the time that there is."""

    devices: tuple[str, ...]
    """As CUDA_VISIBLE_DEVICES names them."""
    on_gpu: bool
    seconds: float
    """For one piece."""
    until: float

    def run(self, words: Sequence[str], spread: Spread, log: Path, *, first: int = 0, **environment: str) -> Ended:
        """Run a Python program on the ranks of a layout, from the device of number `first` on, and follow it to its
        end."""
        import psutil

        begun = time.monotonic()
        limit = min(self.seconds, self.until - begun)
        if limit < 0:
            return Ended(None, "no time was left", 0.0)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(spread.ranks)]
        last_seen: dict[int, float] = {}
        ranks: dict[int, int | None] = {}
        with log.open("wb") as file:
            process = psutil.Popen(
                [sys.executable, *(launcher if spread.ranks > 1 else []), *words],
                env=self._environment(spread, first) | environment,
                cwd=log.parent,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )
            while process.poll() is None and time.monotonic() - begun < limit:
                last_seen |= dict.fromkeys(_living_ranks(process, ranks), time.monotonic())
                time.sleep(0.05)
        code = process.poll()
        if code is None:
            _kill(process)
        return Ended(code, log.read_text(encoding="utf-8", errors="replace"), time.monotonic() - begun, last_seen)

    def _environment(self, spread: Spread, first: int) -> dict[str, str]:
        from distributed import ENVIRONMENT, LAUNCHER_VARIABLES

        own = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER_VARIABLES)}
        paths = [str(path) for path in (ROOT, ROOT / "tests", ROOT / "benchmarks")]
        asked = dict(ENVIRONMENT["ddp" if spread.ranks == 1 else spread.mode])
        if self.on_gpu:
            asked = {name: value for name, value in asked.items() if name not in _FOR_CPU}
            asked["CUDA_VISIBLE_DEVICES"] = ",".join(self.devices[first : first + spread.ranks])
        else:
            asked["OMP_NUM_THREADS"] = "1"
        asked |= {f"PARALLELISM_CONFIG_{name.upper()}_SIZE": str(size) for name, size in spread.sizes.items()}
        asked["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        return own | FIXED | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"} | asked


_FOR_CPU = ("ACCELERATE_USE_CPU", "ACCELERATE_TORCH_DEVICE")


def _living_ranks(launcher: Any, known: dict[int, int | None]) -> Iterator[int]:
    import psutil

    try:
        for child in launcher.children(recursive=True):
            if child.pid not in known:
                known[child.pid] = int(child.environ().get("RANK", "-1"))
            if known[child.pid] != -1 and child.status() != psutil.STATUS_ZOMBIE:
                yield known[child.pid] or 0
    except psutil.Error:
        return  # it ended meanwhile


def _kill(process: Any) -> None:
    import psutil

    for each in (process, *process.children(recursive=True)):
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


class Report:
    """What was found so far, on disk."""

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self.path = path
        self._facts = dict(facts)
        self._lock = threading.Lock()
        self._begun = time.monotonic()
        self.found: list[dict[str, Any]] = []

    def add(self, part: str, name: str, said: str, **found: Any) -> None:
        """Keep and print what a piece came to."""
        with self._lock:
            self.found.append({"part": part, "name": name} | found)
            whole = self._facts | {"seconds": round(time.monotonic() - self._begun, 1), "pieces": self.found}
            new = self.path.with_suffix(".new")
            new.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
            os.replace(new, self.path)
            print(f"[{time.monotonic() - self._begun:5.0f} s] {part}: {name}: {said}", flush=True)

    def settle(self, part: str, begun: Begun) -> None:
        """Wait for pieces, and keep and print what this script itself could not do with them."""
        for name, piece in begun.items():
            if error := piece.exception():
                said = f"{type(error).__name__}: {str(error)[:300]}"
                self.add(part, name, f"failed: {said}", failed=said)

    def failed(self, part: str, name: str, ended: Ended) -> None:
        """Keep and print that a piece failed."""
        self.add(part, name, f"failed: {ended.failure['failed']}", seconds=round(ended.seconds, 1), **ended.failure)


def results(path: Path, ranks: int) -> list[Any]:
    """Return what the ranks of a piece wrote."""
    return [json.loads(Path(f"{path}.{rank}").read_text(encoding="utf-8")) for rank in range(ranks)]


@dataclass(frozen=True)
class Bench:
    """What the parts share."""

    args: argparse.Namespace
    machine: Machine
    report: Report
    folder: Path

    def piece(self, name: str, told: Mapping[str, Any], spread: Spread, *, first: int = 0, **own: str) -> Ended:
        """Let ranks do a piece of `multi_gpu_rank.py`; they write to `NAME.RANK` of the folder."""
        place = self.folder / re.sub(r"\W+", "-", name)
        place.mkdir(exist_ok=True)
        shape = {"ranks": spread.ranks, "layout": spread.layout}
        whole = dict(told) | {"gpus": spread.ranks, "spread": shape}
        (place / "told.json").write_text(json.dumps(whole), encoding="utf-8")
        caches = {"HF_DATASETS_CACHE": str(place / "datasets"), "TRAINWORKS_CACHE": str(place / "cache")}
        words = [str(RANK), str(place / "told.json"), str(place / "result")]
        return self.machine.run(words, spread, place / "log.txt", first=first, **caches | own)

    def result(self, name: str, ranks: int) -> list[Any]:
        """Return what the ranks of a piece wrote, in order."""
        return results(self.folder / re.sub(r"\W+", "-", name) / "result", ranks)


# Parity


def parity(bench: Bench, pool: ThreadPoolExecutor) -> Begun:
    """Begin to train the small models in every layout, and to compare them with one GPU."""
    import layouts

    place = bench.folder / "parity"
    (place / "runs").mkdir(parents=True)
    layouts.prepare(place)
    expected = pool.submit(_trained, bench, ONE, layouts.ONE)
    other = pool.submit(_trained, bench, OTHER, layouts.ONE, micro=8)
    own = pool.submit(_differs_from_itself, bench, expected, other)
    begun: Begun = {f"{ONE}, bf16 against itself": own}
    most = max(bench.args.gpus)
    spreads = layouts.SPREADS | ({OFFLOADED: layouts.SPREADS["FSDP2 2"]} if bench.machine.on_gpu else {})
    for name, spread in spreads.items():
        if spread.ranks <= most and name in (bench.args.layouts or spreads):
            begun[name] = pool.submit(_compared, bench, name, spread, expected, own)
    return begun


OTHER = f"{ONE}, other micro-batches"
OFFLOADED = "FSDP2 2, offloaded"
PRECISIONS = {"no": "float32", "bf16": "bf16"}


def _trained(bench: Bench, name: str, spread: Spread, *, micro: int = 2) -> dict[str, Any]:
    """Train the small models in a layout; return the curves by precision, of those that were done."""
    import layouts

    every = [(model, tuning) for model in layouts.MODELS for tuning in bench.args.tunings]
    cases = [case for case in every if (name, case[0]) not in layouts.REFUSED]
    told = {"piece": "parity", "folder": str(bench.folder / "parity"), "name": name, "cases": cases}
    told |= {"precisions": list(PRECISIONS), "micro": micro, "steps": bench.args.parity_steps}
    told |= {"compiled": bench.args.parity_compiled}
    own = {"FSDP_OFFLOAD_PARAMS": "true"} if name == OFFLOADED else {}
    ended = bench.piece(f"parity {name}", told, spread, **own)
    if ended.code != 0:
        bench.report.failed("parity", name, ended)
    found: dict[str, Any] = bench.result(f"parity {name}", 1)[0]
    return found


def _differs_from_itself(bench: Bench, expected: Future[Any], other: Future[Any]) -> dict[str, list[float]]:
    """Compare one GPU's bf16 runs with its float32 ones, and with those of other micro-batches; return the larger
    difference of each case."""
    here = expected.result()
    rounding = _apart(bench, (f"{ONE}-bf16", here["bf16"]), (f"{ONE}-no", here["no"]))
    order = _apart(bench, (f"{OTHER}-bf16", other.result()["bf16"]), (f"{ONE}-bf16", here["bf16"]))
    largest = {key: [max(pair) for pair in zip(rounding[key], order[key], strict=True)] for key in rounding}
    bench.report.add("parity", f"{ONE}, bf16 against itself", _cells(largest), apart=largest)
    return largest


def _compared(bench: Bench, name: str, spread: Spread, expected: Future[Any], own: Future[Any]) -> None:
    found, there = _trained(bench, name, spread), expected.result()
    for precision, told in PRECISIONS.items():
        far = _apart(bench, (f"{name}-{precision}", found[precision]), (f"{ONE}-{precision}", there[precision]))
        limits = {
            key: [1e-5, 1e-5, 1e-4] if precision == "no" else [2 * each for each in own.result()[key]] for key in far
        }
        beyond = [key for key in far if any(one > most for one, most in zip(far[key], limits[key], strict=True))]
        bench.report.add("parity", f"{name}, {told}", _cells(far, beyond), apart=far, limits=limits, beyond=beyond)


def _apart(bench: Bench, found: tuple[str, Any], expected: tuple[str, Any]) -> dict[str, list[float]]:
    """Return how far the runs of one name are from those of another, for the cases that both have."""
    import layouts

    far = {}
    for key in found[1].keys() & expected[1].keys():
        each = layouts.apart(bench.folder / "parity", found[1], expected[1], (found[0], expected[0]), key)
        far[key] = [each.loss, each.norm, each.weights]
    return dict(sorted(far.items()))


def _cells(far: Mapping[str, Sequence[float]], beyond: Sequence[str] = ()) -> str:
    told = {key: ", ".join(f"{each:.0e}" for each in values) for key, values in far.items()}
    return " | ".join(f"{key} {'NOT: ' if key in beyond else ''}{text}" for key, text in told.items())


# Speed


@dataclass(frozen=True)
class Timed:
    """What is timed: who trains what, and in which layout."""

    name: str
    work: Work
    who: str
    spread: Spread

    @property
    def data(self) -> int:
        """How many ranks have samples of their own."""
        sizes = self.spread.sizes
        return self.spread.ranks // (sizes.get("tp", 1) * sizes.get("cp", 1) * self.spread.layout.get("pipeline", 1))

    @property
    def micro(self) -> int:
        """How many lines a rank has at once: one where they go through a pipeline, more where ranks share them."""
        if "pipeline" in self.spread.layout:
            return 1
        if "cp" in self.spread.sizes:
            return max(1, self.spread.ranks * AT_ONCE // self.work.length)
        return self.work.batch

    @property
    def per_step(self) -> int:
        """How many lines a step takes."""
        lines = self.work.batch * self.spread.ranks
        return min(lines, self.micro) if "cp" in self.spread.sizes else lines


def speed(bench: Bench) -> None:
    """Time the work asked for: that on one GPU side by side, and then one piece after the other."""
    pieces = list(_pieces(bench))
    shapes = {piece.work.shape: piece.work for piece in pieces}
    made = {shape for shape, work in shapes.items() if _made(bench, work)}
    pieces = [piece for piece in pieces if piece.work.shape in made]
    alone = [piece for piece in pieces if piece.spread.ranks == 1]
    places = max(1, len(bench.machine.devices))
    waves = [alone[begin : begin + places] for begin in range(0, len(alone), places)]
    for wave in [*waves, *([piece] for piece in pieces if piece.spread.ranks > 1)]:
        with ThreadPoolExecutor(places) as pool:
            begun = {piece.name: pool.submit(_time, bench, piece, place) for place, piece in enumerate(wave)}
        bench.report.settle("speed", begun)


def _pieces(bench: Bench) -> Iterator[Timed]:
    for name in bench.args.work:
        work = WORK[name]
        for gpus in sorted(bench.args.gpus):
            for layout in [each for each in work.layouts if (each == ONE) == (gpus == 1)]:
                spread = spread_over(layout, gpus)
                wanted = "Trainworks" in bench.args.contenders and layout in (bench.args.layouts or work.layouts)
                if spread and wanted:
                    yield Timed(f"{name}, {gpus} GPUs: {layout}", work, "Trainworks", spread)
            for who in work.others if gpus > 1 else ():
                layout = "DDP" if work.tuning == "lora" else "FSDP2"
                spread = spread_over(layout, gpus)
                if spread and who in bench.args.contenders:
                    yield Timed(f"{name}, {gpus} GPUs: {who}, {layout}", work, who, spread)


def _model(bench: Bench, work: Work) -> Path:
    return bench.folder / f"model-{work.shape}"


def _made(bench: Bench, work: Work) -> bool:
    """Write a model in a process of its own; in bf16, from which float32 weights are made, too."""
    import layouts

    told = f"pathlib.Path({str(_model(bench, work))!r}), {work.shape!r}, 131072, 'bfloat16'"
    code = f"import pathlib, gpu_train; gpu_train.make({told})"
    ended = bench.machine.run(["-c", code], layouts.ONE, bench.folder / f"{work.shape}.log")
    if ended.code != 0:
        bench.report.failed("speed", f"the model of shape {work.shape}", ended)
    return ended.code == 0


def _time(bench: Bench, piece: Timed, first: int = 0) -> None:
    work, args = piece.work, bench.args
    folder = bench.folder / "timed" / re.sub(r"\W+", "-", piece.name)
    told = {"piece": piece.who, "model": str(_model(bench, work)), "folder": str(folder), "compiled": args.compiled}
    told |= {
        "weights": None,
        "moments": "float32",
        "tuning": work.tuning,
        "batch": work.batch,
        "length": work.length,
        "per_step": piece.per_step,
    }
    told |= {"micro": piece.micro, "warmup": args.warmup, "steps": args.warmup + args.steps + 1}
    precision = "bf16" if bench.machine.on_gpu else "no"
    ended = bench.piece(piece.name, told, piece.spread, first=first, ACCELERATE_MIXED_PRECISION=precision)
    if ended.code != 0:
        bench.report.failed("speed", piece.name, ended)
        return
    ranks = bench.result(piece.name, piece.spread.ranks)
    seconds = statistics.median(ranks[0]["seconds"])
    rate = piece.per_step * work.length / seconds / piece.spread.ranks
    found = {
        "tokens_per_second_per_gpu": rate,
        "mfu": mfu(work.shape, work.tuning, work.length, rate),
        "peak_bytes": max(rank["peak_bytes"] for rank in ranks),
        "seconds_a_step": ranks[0]["seconds"],
        "losses": ranks[0]["losses"],
        "per_step": piece.per_step,
        "micro": piece.micro,
        "ranks": piece.spread.ranks,
        "work": vars(work),
        "whole_seconds": ended.seconds,
    }
    bench.report.add("speed", piece.name, _row(bench, piece.name, found), **found)


def _row(bench: Bench, name: str, found: Mapping[str, Any]) -> str:
    """Return a piece's figures as they are printed."""
    alone = [each for each in bench.report.found if each["name"] == f"{name.partition(',')[0]}, 1 GPUs: {ONE}"]
    rate = found["tokens_per_second_per_gpu"]
    beside = [each["tokens_per_second_per_gpu"] for each in alone if "failed" not in each]
    efficiency = f"{rate / beside[0]:7.1%}" if beside else "      -"
    mfu = "    -" if found["mfu"] is None else f"{found['mfu']:5.1%}"
    spread = (max(found["seconds_a_step"]) - min(found["seconds_a_step"])) / statistics.median(found["seconds_a_step"])
    losses = f"{found['losses'][0]:.4f} -> {found['losses'][-1]:.4f}" if found["losses"] else "-"
    return (
        f"{rate:9,.0f} tok/s/GPU  MFU {mfu}  {1000 * statistics.median(found['seconds_a_step']):7.1f} ms a step "
        f"(spread {spread:.0%})  {found['peak_bytes'] / 2**30:5.1f} GiB  efficiency {efficiency}  loss {losses}"
    )


# Resume


def resume(bench: Bench, pool: ThreadPoolExecutor) -> Begun:
    """Begin the runs that are killed and gone on with."""
    import layouts

    gpus = max(bench.args.gpus)
    _write_run(bench, "dropping", dropout=0.1)
    _write_run(bench, "moving", dropout=0.0)
    begun: Begun = {}
    for name, spread in {"DDP": layouts.Spread(gpus), "FSDP2": layouts.Spread(gpus, "fsdp2")}.items():
        whole = pool.submit(_finetune, bench, "dropping", f"{name}-whole", spread)
        for when, faults in {"in training": _in_training(spread), "while saving": _while_saving(spread)}.items():
            told = f"{name}, killed {when}"
            begun[told] = pool.submit(_killed, bench, told, spread, whole, faults)
    alone = pool.submit(_finetune, bench, "moving", "whole", layouts.ONE)
    begun["moved"] = pool.submit(_moved, bench, gpus, alone)
    return begun


SAVED = 10
"""Steps between two checkpoints."""


def _write_run(bench: Bench, name: str, *, dropout: float) -> None:
    """Write a small model, rows, and a run file over them."""
    import tiny

    settings = {
        "batch": {"per_step": 8, "micro": 1, "pack": 64},
        "budget": {"steps": bench.args.resume_steps},
        "every": {"log": 1, "save": SAVED},
        "deterministic": dropout > 0,
        "faults": {"rank_timeout": 60},
    }
    (bench.folder / name).mkdir()
    tiny.save_run(bench.folder / name, **settings)
    tiny.save_model(bench.folder / name / "model", "sft", dropout=dropout)


def _in_training(spread: Spread) -> dict[str, str]:
    return {"FAULT": f"{spread.ranks - 1}:{2 * SAVED + 7}:killed:broken"}


def _while_saving(spread: Spread) -> dict[str, str]:
    return {"TRAINWORKS_FAIL_AT": f"save.rank:3@{spread.ranks - 1}"}


def _finetune(bench: Bench, place: str, output: str, spread: Spread, **faults: str) -> Ended:
    """Start a run, or go on with it, as `python -m finetune` does."""
    precision = "bf16" if place == "dropping" else "no"
    own = {"FAULT": "none:::", "ACCELERATE_MIXED_PRECISION": precision} | faults
    own["TRAINWORKS_CACHE"] = str(bench.folder / place / "cache")
    folder = bench.folder / place / "runs" / output
    folder.mkdir(parents=True, exist_ok=True)
    words = [str(ROOT / "tests" / "faulty.py"), str(bench.folder / place / "run.yaml"), f"output={folder / 'run'}"]
    return bench.machine.run(words, spread, folder / f"log-{len(list(folder.glob('log-*')))}.txt", **own)


def _killed(bench: Bench, name: str, spread: Spread, whole: Future[Ended], faults: dict[str, str]) -> None:
    """Kill the last rank, start all again, and compare with the run that nothing disturbed."""
    from trainworks.record import read_outcome

    output = name.replace(", ", "-").replace(" ", "-")
    run = bench.folder / "dropping" / "runs" / output / "run"
    broken = _finetune(bench, "dropping", output, spread, **faults)
    culprit = spread.ranks - 1
    if broken.code in (0, None) or not (run / "outcome.json").exists() or len(broken.last_seen) < spread.ranks:
        bench.report.failed("resume", f"{name}: the rank that breaks", broken)
        return
    reason = read_outcome(run).reason
    others = [seen for rank, seen in broken.last_seen.items() if rank != culprit]
    stayed = max(others) - broken.last_seen[culprit]
    again = _finetune(bench, "dropping", output, spread)
    for ended in (again, whole.result()):
        if ended.code != 0:
            bench.report.failed("resume", f"{name}: going on", ended)
            return
    found: dict[str, Any] = {"reason": reason, "named": f"rank {culprit} (" in reason, "others_stayed": stayed}
    found |= _equality(run.parents[1] / f"{name.partition(',')[0]}-whole" / "run", run)
    who = "named" if found["named"] else f"NOT named ({reason[:200]})"
    bench.report.add("resume", name, f"{who}, the others out after {stayed:.1f} s; {found['equal']}", **found)


def _equality(expected: Path, found: Path) -> dict[str, Any]:
    """Tell in words whether two runs ended with the same bits, and where the second went on."""
    from trainworks.checkpoint import checkpoints
    from trainworks.checks.comparing import compare_curves, compare_tensors, tensor_files
    from trainworks.record import read_record

    curves = read_record(expected).curve, read_record(found).curve
    resumed = read_record(found).resumed_at
    files = [file.relative_to(expected) for file in tensor_files(checkpoints(expected)[0].path, expected / "model")]
    number, parting = compare_tensors(expected, found, files)
    parting = compare_curves(*curves) or parting
    said = f"equal: {len(curves[0])} losses and {number} tensors, bit for bit" if parting is None else f"NOT: {parting}"
    return {"equal": f"went on at {', '.join(map(str, resumed))}; {said}", "resumed_at": resumed}


def _moved(bench: Bench, gpus: int, alone: Future[Ended]) -> None:
    """Move a run from all GPUs to half of them and back, and compare with one that stayed on one."""
    from layouts import Spread

    from trainworks.checks.comparing import largest_difference
    from trainworks.record import read_record

    half = gpus // 2
    name = f"moved {gpus} -> {half} -> {gpus}"
    few, many = Spread(half, "fsdp2" if half > 1 else "ddp"), Spread(gpus, "fsdp2")
    for part, spread in enumerate((many, few, many)):
        fault = {"FAULT": f"0:{SAVED + 5}:killed:broken-{part}"} if part < 2 else {}
        ended = _finetune(bench, "moving", "moved", spread, **fault)
        if (ended.code == 0) != (part == 2):
            bench.report.failed("resume", name, ended)
            return
    if alone.result().code != 0:
        bench.report.failed("resume", f"{name}: on one", alone.result())
        return
    records = [read_record(bench.folder / "moving" / "runs" / each / "run") for each in ("whole", "moved")]
    far = largest_difference(*(record.curve for record in records))
    said = f"went on at {records[1].resumed_at}; {len(records[1].curve)} losses within {far:.1e} of one GPU's"
    bench.report.add("resume", name, said, apart=far, resumed_at=records[1].resumed_at)


# Launch


def launch(bench: Bench, pool: ThreadPoolExecutor) -> Begun:
    """Begin a short run with each hardware file that ships and that the GPUs suit, by accelerate's launcher."""
    if not bench.machine.on_gpu:
        return {}  # where accelerate's launcher starts one process only
    _write_run(bench, "launched", dropout=0.0)
    files = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
    suited = {file.stem: processes for file in files if (processes := _processes(file, max(bench.args.gpus)))}
    return {name: pool.submit(_launched, bench, name, processes) for name, processes in suited.items()}


def _processes(file: Path, gpus: int) -> int:
    """Return how many processes to start with a hardware file: 0 where it is not for these GPUs."""
    import yaml

    told = yaml.safe_load(file.read_text(encoding="utf-8"))
    if told["use_cpu"] or told["num_machines"] > 1 or told["distributed_type"] == "NO":
        return 0
    return 0 if gpus % math.prod(told.get("parallelism_config", {}).values()) else gpus


def _launched(bench: Bench, name: str, processes: int) -> None:
    from distributed import free_port
    from layouts import ONE as ALONE

    from trainworks.record import read_record

    place = bench.folder / "launched"
    words = ["-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", str(processes)]
    words += ["--config_file", str(ROOT / "configs" / "accelerate" / f"{name}.yaml")]
    words += ["--main_process_port", str(free_port()), "-m", "finetune", str(place / "run.yaml")]
    words += [f"output={place / name}", "budget.steps=12", "every.evaluate=6"]
    own = {"CUDA_VISIBLE_DEVICES": ",".join(bench.machine.devices), "TRAINWORKS_CACHE": str(place / "cache")}
    ended = bench.machine.run(words, ALONE, place / f"{name}.txt", **own)
    if ended.code != 0:
        bench.report.failed("launch", name, ended)
        return
    record = read_record(place / name)
    losses = [point.loss for point in record.curve]
    said = f"{record.status}, {len(losses)} steps, loss {losses[0]:.5f} -> {losses[-1]:.5f}, {ended.seconds:.0f} s"
    bench.report.add("launch", name, said, losses=losses, processes=processes)


# The command


PARTS: dict[str, Callable[[Bench, ThreadPoolExecutor], Begun]] = {
    "parity": parity,
    "resume": resume,
    "launch": launch,
}
"""Parts whose pieces share the GPUs, since nothing is timed."""


def main() -> None:
    """Run what was asked for, and print and write what it came to."""
    args = arguments()
    sys.path += [str(ROOT), str(ROOT / "tests")]
    import torch

    on_gpu = torch.cuda.is_available()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    args.gpus = args.gpus or sorted({1, len(devices) if on_gpu else 2})
    args.device = torch.cuda.get_device_name() if on_gpu else "cpu"
    machine = Machine(tuple(devices), on_gpu, args.seconds, time.monotonic() + args.within)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    report = Report(args.json, facts(args))
    with tempfile.TemporaryDirectory(prefix="multi-gpu-") as folder:
        bench = Bench(args, machine, report, Path(folder))
        with ThreadPoolExecutor(args.at_once) as pool:
            for part, begun in {part: PARTS[part](bench, pool) for part in PARTS if part in args.parts}.items():
                report.settle(part, begun)
        if "speed" in args.parts:
            speed(bench)
    print(f"{report.path}: {len(report.found)} pieces")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=(*PARTS, "speed"), default=[*PARTS, "speed"])
    parser.add_argument("--gpus", nargs="+", type=int, help="how many to use; as many as there are, and one")
    parser.add_argument("--work", nargs="+", choices=WORK, default=["1b-full", "8b-full", "8b-lora", "experts-full"])
    parser.add_argument("--shape", choices=("own", "tiny"), default="own", help="tiny: to try the script")
    parser.add_argument("--layouts", nargs="+", help="by the names in this file, and in tests/layouts.py for parity")
    parser.add_argument("--contenders", nargs="+", default=["Trainworks", "accelerate", "TRL"])
    parser.add_argument("--eager", dest="compiled", action="store_false", help="compile nothing that is timed")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--steps", type=int, default=15, help="that are timed")
    parser.add_argument("--parity-steps", type=int, default=20)
    parser.add_argument("--parity-compiled", action="store_true", help="compile the layers of the small models, too")
    parser.add_argument("--tunings", nargs="+", choices=("full", "lora"), default=["full", "lora"])
    parser.add_argument("--resume-steps", type=int, default=50)
    parser.add_argument("--at-once", type=int, default=6, help="pieces that share the GPUs where nothing is timed")
    parser.add_argument("--seconds", type=float, default=180.0, help="the time limit of a piece")
    parser.add_argument("--within", type=float, default=86_400.0, help="seconds after which no piece begins")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "multi-gpu.json")
    args = parser.parse_args()
    if args.shape == "tiny":
        WORK.update({name: _tiny(work) for name, work in WORK.items()})
    return args


def _tiny(work: Work) -> Work:
    shape = "tiny experts" if work.shape == "experts" else "tiny"
    return replace(work, shape=shape, length=min(work.length // 64, 128), batch=min(work.batch, 2))


def facts(args: argparse.Namespace) -> dict[str, Any]:
    """Return the device, the versions and the settings."""
    from importlib.metadata import PackageNotFoundError, version

    def found(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    packages = ("torch", "transformers", "accelerate", "peft", "trl", "liger-kernel", "torchtitan")
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    return {"device": args.device, "versions": {name: found(name) for name in packages}, "settings": settings}


if __name__ == "__main__":
    main()
