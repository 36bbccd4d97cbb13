"""The record of a run: plain data, written as `run.json`, and the only thing a card or a report reads."""

from __future__ import annotations

import hashlib
import json
import os
from base64 import b64decode
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from trainworks.errors import CheckpointError
from trainworks.fail_points import reached
from trainworks.redaction import redacted

__all__ = [
    "BadStep",
    "Comparison",
    "Cost",
    "CurvePoint",
    "DataFacts",
    "Environment",
    "Estimate",
    "EvalReport",
    "GoalOutcome",
    "ModelFacts",
    "Outcome",
    "PackingFacts",
    "RunRecord",
    "Sample",
    "SplitFacts",
    "StageFacts",
    "file_sha256",
    "read_outcome",
    "read_record",
    "replace_file",
    "sync",
    "write_json",
]

SCHEMA_VERSION = 1

_LEFT = 'style="text-align: left"'
_TEXT = 'style="text-align: left; vertical-align: top; white-space: pre-wrap"'


class _Fact(BaseModel):
    """Base of everything recorded: frozen, no unknown keys; NaN and infinity are written as the strings JSON lacks
    words for."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="strings")


class Estimate(_Fact):
    """A number with its 95% interval over `n` examples."""

    value: float
    low: float
    high: float
    n: int
    higher_is_better: bool

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


class Sample(_Fact):
    """One worked example: what the model was given, what was wanted, what it said."""

    prompt: str
    reference: str
    output: str
    picture: str = ""
    """A JPEG as base64: on the left the image with what is wanted, on the right with what the model said. Kept of the
    newest evaluation only."""

    def jpeg(self) -> bytes:
        """Return the picture's bytes; none where there is no picture, or something else in its place."""
        try:
            return b64decode(self.picture, validate=True)
        except ValueError:
            return b""


class EvalReport(_Fact):
    """One model (or a baseline) measured on one split."""

    name: str
    """What was measured: `final`, `best`, `step 200`, or a baseline: `untuned`, `majority class`, `unigram`."""
    split: str
    """The split's name, such as `validation`."""
    step: int
    """Optimizer steps taken before it."""
    is_baseline: bool
    """True for what the final model is compared with."""
    num_examples: int
    num_clusters: int | None = None
    """Of how many clusters the examples are that intervals were drawn by, such as questions; None where by examples."""
    metrics: dict[str, Estimate]
    """By metric name; `loss` (nats per counted unit) is there for every model, not for every baseline."""
    slices: dict[str, dict[str, Estimate]] = {}
    """The metrics on the rows of each source, where there are several."""
    samples: tuple[Sample, ...] = ()
    seconds: float = 0.0

    def without_pictures(self) -> EvalReport:
        """Return the report without the pictures of its samples, which take room."""
        return self.model_copy(
            update={"samples": tuple(sample.model_copy(update={"picture": ""}) for sample in self.samples)}
        )

    def __str__(self) -> str:
        lines = [f"{self.name} on {self.split} (n={self.num_examples})"]
        return "\n".join(lines + [f"  {name:<20} {estimate}" for name, estimate in self.metrics.items()])

    def _repr_html_(self) -> str:
        from html import escape

        rows = "".join(
            f"<tr><th {_LEFT}>{escape(name)}</th><td>{e.value:.4g}</td><td>{e.low:.4g} to {e.high:.4g}</td></tr>"
            for name, e in self.metrics.items()
        )
        head = f"<tr><th {_LEFT}>metric</th><th>value</th><th>95% interval</th></tr>"
        about = f"<b>{escape(self.name)}</b> on {self.num_examples:,} examples of {escape(self.split)}"
        return f"<div>{about}<table>{head}{rows}</table>{self._samples_html()}</div>"

    def _samples_html(self) -> str:
        from html import escape

        parts = ("prompt", "reference", "output")
        head = "".join(f"<th {_LEFT}>{part}</th>" for part in parts)
        rows = "".join(
            "<tr>"
            + "".join(f"<td {_TEXT}>{escape(getattr(sample, part))}</td>" for part in parts)
            + (f'<td><img src="data:image/jpeg;base64,{sample.picture}"></td></tr>' if sample.jpeg() else "</tr>")
            for sample in self.samples
        )
        return f"<table><tr>{head}</tr>{rows}</table>" if rows else ""


class Comparison(_Fact):
    """The final model minus a baseline on the same examples, with the paired interval."""

    metric: str
    baseline: str
    difference: Estimate


class CurvePoint(_Fact):
    """One logged step of training."""

    step: int
    samples: int
    tokens: int
    """Tokens the model was given so far, padding not counted (0 for tasks without tokens)."""
    loss: float
    lr: float
    grad_norm: float
    seconds: float
    """Wall seconds of training since the run began, over all its resumed parts."""
    source_losses: dict[str, float] = {}
    """The step's loss on the rows of each source, where there are several."""


class BadStep(_Fact):
    """A training step that did not reach the weights."""

    step: int
    kind: str
    """`not a number`, of its loss or its gradient, or `spike`."""
    loss: float
    grad_norm: float
    samples: tuple[int, ...] = ()
    """The numbers of the training samples it saw."""
    remedy: str = ""
    """What was done then: `stop`, `skip` or `rollback`."""


class SplitFacts(_Fact):
    """What a split held once it was prepared."""

    name: str
    rows: int
    """Rows read from the source."""
    samples: int
    """Training sequences made from them."""
    tokens: int = 0
    counted: int = 0
    """Tokens (or labels) the loss counts."""
    dropped: dict[str, int] = {}
    """Rows or tokens left out, by reason."""
    labels: dict[str, int] = {}
    """Rows per class, for classification; words per tag, where words are classified."""


class StageFacts(_Fact):
    """What a cleaning stage did to the training rows."""

    name: str
    """Its key in `data.clean`."""
    rows_in: int
    rows_out: int
    removed: dict[str, int] = {}
    """Rows left out, by reason."""
    found: dict[str, int] = {}
    """What was counted on the way."""


class DataFacts(_Fact):
    """Where the data came from."""

    source: str
    subset: str | None = None
    revision: str | None = None
    """The commit, for a Hub data set."""
    fingerprint: str
    """SHA-256 over the rows that were read."""
    processor: str
    """SHA-256 over what turned rows to samples: vocabulary, template, special tokens."""
    license: str | None = None
    listings: tuple[str, ...] = ()
    """Files that list the bad rows that were left out, where that was asked for."""
    cleaning: tuple[StageFacts, ...] = ()
    """The stages the training rows went through, in order; of several sources, each in `parts`."""
    splits: tuple[SplitFacts, ...]
    parts: dict[str, DataFacts] = {}
    """The sources by name, where there are several; the rest then speaks of all together."""


class PackingFacts(_Fact):
    """How the training rows were put together to samples."""

    size: int
    """Most tokens a sample holds."""
    rows: int
    samples: int
    utilisation: float
    """Tokens of all rows over size x samples."""

    def __str__(self) -> str:
        into = f"{self.samples:,} samples of {self.size:,} tokens"
        return f"{self.rows:,} rows into {into}, {100 * self.utilisation:.1f}% full"


class ModelFacts(_Fact):
    """What was trained."""

    name: str | None
    """Hub name or folder of the weights it began from; None when from scratch."""
    revision: str | None = None
    fingerprint: str
    """SHA-256 over the weights as they were before training."""
    architecture: str
    """The model's class, such as `LlamaForCausalLM`."""
    num_parameters: int
    num_trainable: int
    tuning: str
    """`full`, `lora`, ..."""
    dtype: str
    license: str | None = None


class Environment(_Fact):
    """The machine and the software."""

    python: str
    platform: str
    versions: dict[str, str]
    device: str
    """The device's name, such as `NVIDIA H100 80GB HBM3` or the processor's."""
    world_size: int
    layout: dict[str, int] = {}
    """Over what its processes are laid out, where there are several: `shard`, `tensor`, ..., with sizes."""
    distributed: str
    """`NO`, `MULTI_GPU`, `FSDP`, ..., as accelerate says it."""
    mixed_precision: str
    git_commit: str | None = None
    git_dirty: bool | None = None


class Cost(_Fact):
    """What the run took. Energy is None where no counter can be read, with the reason in `energy_source`."""

    seconds: float = 0.0
    """Training, evaluation and saving; loading not counted."""
    train_seconds: float = 0.0
    tokens_per_second: float | None = None
    samples_per_second: float | None = None
    mfu: float | None = None
    """Model FLOPs over the device's peak; None where the peak is not known."""
    peak_memory_bytes: int | None = None
    """The largest of all ranks: GPU memory allocated, or resident memory on a CPU."""
    energy_joules: float | None = None
    energy_source: str = "not measured"


class GoalOutcome(_Fact):
    """Whether the run reached the number its configuration asked for."""

    metric: str
    wanted: str
    """Such as `>= 0.88`."""
    value: float
    met: bool


class Outcome(_Fact):
    """How the process ended; written to `outcome.json` before it exits, since launchers flatten exit codes."""

    code: int
    """0 ok, 2 usage/config/data, 3 environment, 75 preempted (the same command goes on), 130 interrupted."""
    reason: str


class RunRecord(_Fact):
    """Everything there is to know about a run."""

    schema_version: int = SCHEMA_VERSION
    kind: Literal["pretrain", "finetune"]
    status: Literal["running", "complete", "preempted", "interrupted", "failed"] = "running"
    started: str
    """ISO 8601, UTC."""
    finished: str | None = None
    command: str
    """The command that reproduces the run."""
    config: dict[str, Any]
    """The resolved configuration."""
    task: str
    pipeline_tag: str
    """The Hub's name of the task."""
    data: DataFacts
    model: ModelFacts
    environment: Environment
    per_step: int
    """Samples per optimizer step over all processes."""
    micro: int
    packing: PackingFacts | None = None
    """None where every row is a sample of its own."""
    steps_total: int
    step: int = 0
    samples: int = 0
    tokens: int = 0
    epochs: float = 0.0
    curve: tuple[CurvePoint, ...] = ()
    reports: tuple[EvalReport, ...] = ()
    """In the order they were made: baselines first, `final` last."""
    comparisons: tuple[Comparison, ...] = ()
    cost: Cost = Cost()
    goal: GoalOutcome | None = None
    bad_steps: tuple[BadStep, ...] = ()
    resumed_at: tuple[int, ...] = ()
    """Steps at which the run was continued after a stop."""
    notes: tuple[str, ...] = ()
    """What a reader of the card must know, such as a resume at another world size."""

    def write(self, folder: str | Path) -> Path:
        """Write `run.json` in one atomic step; main process only."""
        path = Path(folder) / "run.json"
        write_json(path, json.loads(self.model_dump_json()))
        return path

    @property
    def final(self) -> EvalReport | None:
        """The newest report of the trained model itself."""
        return next((report for report in reversed(self.reports) if not report.is_baseline), None)


def write_json(path: str | Path, value: Any) -> None:
    """Replace `path` by `value` as JSON, without secrets; see `replace_file`."""
    text = json.dumps(redacted(value), indent=2, ensure_ascii=False)
    replace_file(Path(path), f"{text}\n".encode())


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file so that a crash at any moment leaves either the old one or the new one; never what a link there
    leads to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    staged.unlink(missing_ok=True)
    try:
        with staged.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        reached("file.staged")
        os.replace(staged, path)
    except OSError:  # a full disk: what was written of it would only take room
        staged.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """See to it that a file, or a folder's list of files, is on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_record(folder: str | Path) -> RunRecord:
    """Read a run folder's `run.json`; CheckpointError when it is missing, broken, or of another schema version."""
    path = Path(folder) / "run.json"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value.get("schema_version") != SCHEMA_VERSION:
            raise CheckpointError(
                f"{path}: written in record schema {value.get('schema_version')}, this version reads {SCHEMA_VERSION}"
            )
        return RunRecord.model_validate(value)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not there, so {folder} is not the folder of a run") from None
    except (json.JSONDecodeError, UnicodeDecodeError, ValidationError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as a run record: {error}; put back a copy of it, or name another output folder"
        ) from error


def read_outcome(folder: str | Path) -> Outcome:
    """Read how a run's last process ended; CheckpointError when it wrote no outcome."""
    path = Path(folder) / "outcome.json"
    try:
        return Outcome.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        raise CheckpointError(f"{path}: no outcome can be read: {error}") from error
