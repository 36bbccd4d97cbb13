"""A data set through the stages of `data.clean`, once: kept by content, and gone on with after a kill."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trainworks.cleaning import Clean
from trainworks.data.cache import digest, folder, once, opened
from trainworks.data.columns import fingerprint
from trainworks.data.hygiene.contamination import index_items
from trainworks.data.hygiene.documents import check_columns
from trainworks.data.hygiene.executors import check_installed, executor
from trainworks.data.hygiene.language import known_languages
from trainworks.data.hygiene.plan import write_plan
from trainworks.data.hygiene.stages import INDEX, Stage, chosen, kept_rows, phases, verdicts
from trainworks.data.hygiene.workspace import GONE, STAYS, Workspace, write_arrays, write_table
from trainworks.errors import ConfigError, DataError, nearest
from trainworks.record import StageFacts, file_sha256, write_json

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Cleaned", "clean"]

_SHARD_BYTES = 32 * 2**20
_SAMPLED_ROWS = 1_000
_KEPT = "kept.npz"

Items = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Cleaned:
    """The rows that stay, mapped into memory, and what each stage did."""

    rows: Dataset
    kept: NDArray[np.int64]
    """Which of the rows before each of these is."""
    stages: tuple[StageFacts, ...]
    folder: Path


def clean(rows: Dataset, settings: Clean, items: Items, *, source: str = "rows") -> Cleaned:
    """Return the rows that pass every stage, from disk where that was done before.

    `items` are the evaluation texts to decontaminate against, by the name of their set. Any process may call it, any
    number at once: one works and the others wait. A killed one leaves the shards it finished. The rows, and the bytes
    of their files, do not depend on `workers` or `executor`. DataError when a column cannot be used or no row stays;
    LaunchError when a package or a worker is missing.
    """
    _check(rows, settings, source)
    inputs = {"rows": fingerprint(rows), "items": _digest_items(items)}
    key = digest(_said(settings), _code(), *inputs.values())
    place = folder() / "cleaned" / key
    space = Workspace(place, settings, _sizes(rows, settings))
    # The lock lies outside, since what killed processes left inside is removed.
    lock = place.with_name(f".{key}.lock")
    once(place / "manifest.json", lambda: _make(space, rows, items, inputs), lock=lock)
    shutil.rmtree(space.making, ignore_errors=True)
    try:
        return _cleaned(space, place, key, source)
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise DataError(f"{place}: what was kept of the rows cannot be read: {error}; remove that folder") from error


def _cleaned(space: Workspace, place: Path, key: str, source: str) -> Cleaned:
    done = json.loads((place / "manifest.json").read_bytes())
    stages = tuple(StageFacts.model_validate(stage["facts"]) for stage in done["stages"])
    if stages and not stages[-1].rows_out:
        raise DataError(f"{source}: data.clean leaves no row; {_told(stages)}")
    kept = opened([space.kept(shard) for shard in range(len(space.sizes))], key)
    with np.load(place / _KEPT) as held:
        return Cleaned(kept, held["rows"], stages, place)


def _told(stages: Sequence[StageFacts]) -> str:
    return "; ".join(
        f"{stage.name}: {reason} {number:,}" for stage in stages for reason, number in stage.removed.items()
    )


def _check(rows: Dataset, settings: Clean, source: str) -> None:
    check_installed(settings)
    check_columns(rows.features.arrow_schema, settings.text, where=f"{source}: data.clean.text")
    if settings.language:
        known = known_languages()
        for code in settings.language.keep:
            if code not in known:
                raise ConfigError(
                    f"data.clean.language.keep: '{code}' cannot be told{nearest(code, known)}; there are "
                    f"{', '.join(known)}"
                )


def _said(settings: Clean) -> str:
    """Return the settings that decide which rows stay, and in which files."""
    return settings.model_dump_json(exclude={"workers", "executor"})


def _code() -> str:
    """Return the SHA-256 of this package's code, and of what else decides."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    versions = [version(name) for name in ("numpy", "pyarrow", "py3langid")]
    return digest(*versions, *(file.read_text(encoding="utf-8") for file in files))


def _digest_items(items: Items) -> str:
    return digest(*(part for name, texts in sorted(items.items()) for part in (name, str(len(texts)), *texts)))


def _sizes(rows: Dataset, settings: Clean) -> tuple[int, ...]:
    """Return how many rows each shard has; it depends on the rows and the settings alone."""
    size = _auto_size(rows) if settings.shard_rows == "auto" else settings.shard_rows
    return tuple(min(size, len(rows) - start) for start in range(0, len(rows), size))


def _auto_size(rows: Dataset) -> int:
    sample = rows.with_format("arrow")[:_SAMPLED_ROWS]
    return max(1, _SHARD_BYTES * len(sample) // max(1, int(sample.nbytes)))


def _make(space: Workspace, rows: Dataset, items: Items, inputs: Mapping[str, str]) -> None:
    write_plan(space)
    for shard in range(len(space.sizes)):
        if not space.source(shard).exists():
            part = rows.with_format("arrow")[space.starts[shard] : space.starts[shard + 1]]
            write_table(space.source(shard), part.cast(rows.features.arrow_schema))
    short = _write_index(space, items)
    with executor(space) as run:
        for phase in phases(space):
            run(phase)
    stages = _manifests(space, inputs, short)
    for staged in space.folder.rglob(".*"):  # what a process that was killed had begun to write
        staged.unlink(missing_ok=True)
    write_arrays(space.folder / _KEPT, {"rows": kept_rows(space)})
    files = {f"{shard:05d}.arrow": file_sha256(space.kept(shard)) for shard in range(len(space.sizes))}
    write_json(space.folder / "manifest.json", {"input": inputs, "stages": stages, "files": files})


def _write_index(space: Workspace, items: Items) -> int:
    """Write the index of evaluation items for the workers; return how many are too short to be looked for."""
    wanted = space.settings.decontaminate
    if wanted is None:
        return 0
    texts = [text for part in items.values() for text in part]
    sets = np.repeat(np.arange(len(items)), [len(part) for part in items.values()])
    index = index_items(texts, wanted.ngram, wanted.share)
    names = np.array(list(items), np.str_)
    write_arrays(space.path(INDEX, 0), {**vars(index), "sets": sets, "names": names})
    return index.num_short


def _manifests(space: Workspace, inputs: Mapping[str, str], short: int) -> list[dict[str, Any]]:
    """Write each stage's manifest and return them all."""
    made: list[dict[str, Any]] = []
    before = digest(*inputs.values())
    for number, stage in enumerate(chosen(space), start=1):
        facts, after = _facts(space, stage, before)
        if stage.name == "decontaminate":
            facts = facts.model_copy(
                update={"found": facts.found | ({"items too short to look for": short} if short else {})}
            )
        wanted = space.settings.model_dump(mode="json")[stage.name]
        manifest = {
            "facts": facts.model_dump(mode="json"),
            "settings": wanted,
            "config": digest(json.dumps(wanted, sort_keys=True)),
            "code": _code(),
            "input": before,
            "output": after,
        }
        write_json(space.folder / "manifests" / f"{number}-{stage.name}.json", manifest)
        made.append(manifest)
        before = after
    return made


def _facts(space: Workspace, stage: Stage, before: str) -> tuple[StageFacts, str]:
    counts, content = np.zeros(256, np.int64), sha256(before.encode())
    found: Counter[str] = Counter()
    last = stage.jobs[-1]
    for shard in range(len(space.sizes)):
        codes = verdicts(space, stage.name, shard)
        counts += np.bincount(codes, minlength=256)
        content.update(codes.tobytes())
    for rank in range(last.ranks(space)):
        told = space.arrays(last.name, rank)
        found.update(dict(zip(told["found"].tolist(), told["counts"].tolist(), strict=True)))
    removed = {reason: int(counts[code]) for code, reason in enumerate(stage.reasons, start=1) if counts[code]}
    facts = StageFacts(
        name=stage.name,
        rows_in=sum(space.sizes) - int(counts[GONE]),
        rows_out=int(counts[STAYS]),
        removed=removed,
        found=dict(sorted(found.items())),
    )
    return facts, content.hexdigest()
