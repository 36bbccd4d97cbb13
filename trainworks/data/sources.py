"""Where rows come from: the Hub, local files and folders, a Dataset in memory, or Python's own documentation."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from trainworks.data.bad_rows import Policy
from trainworks.data.cache import table
from trainworks.data.columns import fingerprint, numbers_of, rename
from trainworks.data.files import READERS, FileRows, is_readable, read_files, stem
from trainworks.data.layouts.base import image_files
from trainworks.data.layouts.reading import read_layout
from trainworks.data.order import Integers, permuted
from trainworks.data.places import Origin
from trainworks.errors import AccessError, DataError, nearest

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder
    from huggingface_hub import DatasetInfo

    from trainworks.cleaning import Clean
    from trainworks.reading import Data
    from trainworks.record import StageFacts

__all__ = ["Rows", "read"]

_EVERYTHING = ("train",)
"""What `data.train` says when nobody set it: in a folder without such a file, every file not named for validation."""
_EVALUATION_STEMS = {"validation", "valid", "val", "dev", "eval", "test"}
_HUB_SECONDS = 10


@dataclass(frozen=True)
class Rows:
    """What a run reads, before a task prepares it; the columns are renamed as `data.columns` says."""

    train: Dataset
    validation: Dataset | None
    """None when no split is named and `holdout` is 0, or there is one row only."""
    source: str
    """As the configuration says it; `<Dataset in memory>` for one in memory."""
    subset: str | None
    revision: str | None
    """The Hub data set's commit."""
    license: str | None
    """The Hub card's, or that of `python-docs`."""
    fingerprint: str
    """SHA-256 over the content of both splits; the same for the same rows from any format, machine or cache."""
    bad_rows: Policy = "error"
    """What is to be done with rows that cannot be used."""
    origins: Mapping[str, Origin] = field(default_factory=dict)
    """For each split, where its rows come from."""
    dropped: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """For each split, how many bad rows were left out, by reason; of a file that both share, with the first."""
    listings: tuple[Path, ...] = ()
    """Files that list the bad rows, where that was asked for."""
    cleaning: tuple[StageFacts, ...] = ()
    """What `data.clean` did to the training rows, stage by stage."""

    @property
    def splits(self) -> dict[str, Dataset]:
        """The splits there are, by name."""
        named = {"train": self.train, "validation": self.validation}
        return {name: rows for name, rows in named.items() if rows is not None}


class _Opened(NamedTuple):
    train: Dataset
    validation: Dataset | None
    revision: str | None = None
    license: str | None = None
    files: FileRows | None = None
    """What `train` was read from, if from files."""
    held_files: FileRows | None = None
    """What `validation` was read from, if from files of its own."""


@dataclass(frozen=True)
class _Part:
    """Rows of one split, and where each comes from."""

    rows: Dataset
    origin: Origin

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, indices: Integers) -> _Part:
        return _Part(self.rows.select(indices), self.origin.select(indices))


def read(data: Data, *, seed: int) -> Rows:
    """Read both splits, rename their columns, hold out and limit as `data` says; the seed decides which rows.

    Every rank may call it and gets the same. DataError for a file, row, split or column that cannot be used;
    AccessError when the Hub cannot be reached or does not let us in.
    """
    source = data.source if isinstance(data.source, str) else f"<{type(data.source).__name__} in memory>"
    opened = _open(data, source)
    train = _ready(opened.train, opened.files, data, source, "train")
    if opened.validation is not None:
        validation: _Part | None = _ready(opened.validation, opened.held_files, data, source, "validation")
    else:
        train, validation = _hold_out(train, data, seed, source)
    parts = {"train": _limited(train, data.limit.train, seed)}
    if validation is not None:
        parts["validation"] = _limited(validation, data.limit.validation, seed)
    cleaning: tuple[StageFacts, ...] = ()
    if data.clean is not None:
        parts["train"], cleaning = _cleaned(parts, data.clean, source)
    read_from = {"train": opened.files, "validation": opened.held_files}
    dropped = {name: dict(files.dropped) for name, files in read_from.items() if files is not None}
    for stage in cleaning:
        dropped["train"] = dropped.get("train", {}) | stage.removed
    return Rows(
        train=parts["train"].rows,
        validation=parts["validation"].rows if "validation" in parts else None,
        source=source,
        subset=data.subset,
        revision=opened.revision,
        license=opened.license,
        fingerprint=fingerprint(*(part.rows for part in parts.values())),
        bad_rows=data.bad_rows,
        origins={name: part.origin for name, part in parts.items()},
        dropped=dropped,
        listings=tuple(files.listing for files in read_from.values() if files is not None and files.listing),
        cleaning=cleaning,
    )


def _cleaned(parts: Mapping[str, _Part], wanted: Clean, source: str) -> tuple[_Part, tuple[StageFacts, ...]]:
    """Clean the training rows; the sets to decontaminate against are read as any source is."""
    from trainworks.data.hygiene.clean import clean
    from trainworks.data.hygiene.documents import items_of
    from trainworks.reading import Data

    items: dict[str, list[str]] = {}
    for chosen in wanted.decontaminate.against if wanted.decontaminate else ():
        if chosen == "validation":
            if "validation" not in parts:
                raise DataError(
                    f"{source}: data.clean.decontaminate.against: there are no validation rows; name data.validation, "
                    "or set data.holdout above 0"
                )
            items["validation"] = items_of(parts["validation"].rows, wanted.text, where=f"{source} (validation)")
        else:
            named = chosen.model_dump(include={"source", "subset", "revision"})
            rows = read(Data(**named, train=chosen.split, holdout=0), seed=0).train
            name = " ".join(filter(None, [chosen.source, chosen.subset, "+".join(chosen.split)]))
            items[name] = items.get(name, []) + items_of(rows, chosen.columns, where=name)
    cleaned = clean(parts["train"].rows, wanted, items, source=f"{source} (train)")
    return _Part(cleaned.rows, parts["train"].origin.select(cleaned.kept)), cleaned.stages


def _open(data: Data, source: str) -> _Opened:
    if not isinstance(data.source, str):
        _refuse_hub_settings(data, source)
        splits = dict(data.source) if isinstance(data.source, dict) else {"train": data.source}
        return _named_splits(splits, data, source)
    if source == "python-docs":
        return _python_docs(data)
    path = Path(source).expanduser()
    if data.layout != "rows" and not path.exists():
        raise DataError(f"data.source: no folder {source}{_nearest_path(path)}; data.layout: {data.layout} is of one")
    if path.exists():
        _refuse_hub_settings(data, source)
        return _local(path, data)
    if is_readable(path) or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise DataError(f"data.source: no file or folder {source}{_nearest_path(path)}")
    return _hub(data, source)


def _refuse_hub_settings(data: Data, source: str) -> None:
    given = [name for name, idle in (("subset", None), ("revision", "main")) if getattr(data, name) != idle]
    if given:
        raise DataError(f"{source}: data.{' and data.'.join(given)} can be used with a Hub data set only; leave out")


def _nearest_path(path: Path) -> str:
    """Say which existing name comes nearest in the deepest folder of the path that exists."""
    missing = path
    while not missing.parent.exists():
        missing = missing.parent
    return nearest(str(missing), [str(missing.with_name(other.name)) for other in missing.parent.iterdir()])


def _ready(rows: Dataset, files: FileRows | None, data: Data, source: str, split: str) -> _Part:
    named = f"{source} ({split})"
    if len(rows) == 0:
        raise DataError(f"{named}: there are no rows")
    renamed = rename(rows.with_format(None), data.columns, source=named)
    return _Part(renamed, Origin(named, None if files is None else files.places))


def _hold_out(rows: _Part, data: Data, seed: int, source: str) -> tuple[_Part, _Part | None]:
    groups = np.arange(len(rows)) if data.holdout_by is None else _groups(rows.rows, data.holdout_by, source)
    sizes = np.bincount(groups)
    if data.holdout == 0 or len(sizes) < 2:
        return rows, None
    count = max(1, round(len(rows) * data.holdout))
    shuffled = permuted(np.arange(len(sizes)), len(sizes), seed, 1)
    wanted = int(np.searchsorted(np.cumsum(sizes[shuffled]), count)) + 1
    held = np.isin(groups, shuffled[: min(wanted, len(sizes) - 1)])
    return rows.select(np.flatnonzero(~held)), rows.select(np.flatnonzero(held))


def _groups(rows: Dataset, column: str, source: str) -> Integers:
    """Return a number for each row, from 0, the same for equal values of the column."""
    if column not in rows.column_names:
        raise DataError(f"{source}: data.holdout_by: no column '{column}'{nearest(column, rows.column_names)}")
    _, first, groups = np.unique(numbers_of(rows[column][:]), return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[groups]


def _limited(rows: _Part, limit: int | None, seed: int) -> _Part:
    if limit is None or limit >= len(rows):
        return rows
    return rows.select(permuted(np.arange(limit), len(rows), seed, 2))


def _named_splits(splits: Mapping[str, Dataset], data: Data, source: str) -> _Opened:
    train, validation = (_joined(splits, wanted, source) for wanted in (data.train, data.validation or ()))
    if both := set(data.train).intersection(data.validation or ()):
        raise DataError(f"{source}: split {', '.join(sorted(both))} stands in both data.train and data.validation")
    return _Opened(train, validation if data.validation else None)


def _joined(splits: Mapping[str, Dataset], wanted: Sequence[str], source: str) -> Any:
    from datasets import concatenate_datasets

    missing = [f"no split '{name}'{nearest(name, splits)}" for name in wanted if name not in splits]
    if missing:
        raise DataError(f"{source}: {'; '.join(missing)}; there are: {', '.join(splits)}")
    if len(wanted) < 2:
        return splits[wanted[0]] if wanted else None
    try:
        return concatenate_datasets([splits[name] for name in wanted])
    except ValueError as error:
        raise DataError(f"{source}: {' and '.join(wanted)} do not have the same columns: {error}") from error


def _python_docs(data: Data) -> _Opened:
    from trainworks.data import pydocs

    if data.revision != "main":
        raise DataError("python-docs: data.revision can be used with a Hub data set only; leave it out")
    splits = {name: table(columns) for name, columns in pydocs.read(data.subset).items()}
    return _named_splits(splits, data, "python-docs")._replace(license=pydocs.LICENSE)


# The Hub


def _hub(data: Data, name: str) -> _Opened:
    info = _ask_hub(name, data.revision)
    if info is not None and f"{Path(name).name}.py" in {file.rfilename for file in info.siblings or ()}:
        raise DataError(
            f"{name}: a data set made by a script, and scripts are never run; "
            f"the Hub may hold a converted copy: data.revision: refs/convert/parquet"
        )
    revision = data.revision if info is None else info.sha
    builder = _prepared(name, data.subset, revision)
    if info is None and data.revision not in ("main", builder.hash):
        raise AccessError(f"{name}: offline, and the cache holds {builder.hash}, not revision {data.revision}")
    opened = _named_splits(builder.as_dataset(), data, name)
    return opened._replace(revision=builder.hash if info is None else info.sha, license=_license(info))


def _license(info: DatasetInfo | None) -> str | None:
    said = info.card_data.get("license") if info is not None and info.card_data is not None else None
    return ", ".join([said] if isinstance(said, str) else said) if said else None


def _ask_hub(name: str, revision: str) -> DatasetInfo | None:
    """Ask once, with a short timeout, before `datasets` tries for minutes; None when HF_HUB_OFFLINE is set."""
    from huggingface_hub import HfApi, errors

    try:
        return HfApi().dataset_info(name, revision=revision, timeout=_HUB_SECONDS)
    except errors.OfflineModeIsEnabled:
        return None
    except errors.HFValidationError:
        _fail(DataError, name, "neither an existing file or folder nor a Hub name (owner/name)")
    except errors.GatedRepoError:
        page = f"https://huggingface.co/datasets/{name}"
        _fail(AccessError, name, f"gated; accept its terms at {page}, then `hf auth login` with that account")
    except errors.RevisionNotFoundError:
        _fail(AccessError, name, f"no revision '{revision}' on the Hub; check data.revision")
    except errors.RepositoryNotFoundError:
        mend = "check the spelling; for a private one, `hf auth login` with a token that may read it"
        _fail(AccessError, name, f"not on the Hub (nor a local path), or private and not open to us: {mend}")
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        mend = "the token is missing, wrong or expired: `hf auth login`" if status in (401, 403) else "try again later"
        _fail(AccessError, name, f"the Hub answered {status}; {mend}")
    # httpx or httpx2, by the version of huggingface_hub. Their messages may quote the token's header.
    except (errors.HTTPError, OSError, ValueError) as error:  # type: ignore[attr-defined]
        mend = "check the network and HF_ENDPOINT, or set HF_HUB_OFFLINE=1 to use what is cached"
        _fail(AccessError, name, f"the Hub cannot be reached ({type(error).__name__}); {mend}")


def _fail(kind: type[DataError | AccessError], name: str, message: str) -> NoReturn:
    raise kind(f"{name}: {message}") from None


def _prepared(name: str, subset: str | None, revision: str | None) -> DatasetBuilder:
    """Download a Hub data set into the cache of `datasets`, or find it there."""
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        builder = load_dataset_builder(name, subset, revision=revision)
        builder.download_and_prepare()
    except (DatasetNotFoundError, ConnectionError, HTTPError) as error:
        mend = "check the network; when offline, load it once online first"
        _fail(AccessError, name, f"cannot be fetched and is not in the cache ({type(error).__name__}); {mend}")
    except (DatasetsError, FileNotFoundError, RuntimeError, ValueError) as error:
        _fail(DataError, name, f"cannot be read as a data set{f', subset {subset}' if subset else ''}: {error}")
    return builder


# Local files and folders


def _local(path: Path, data: Data) -> _Opened:
    if data.layout != "rows":
        learned, held = read_layout(path, data.layout, data.train, data.validation, data.bad_rows)
        return _Opened(learned.rows, None if held is None else held.rows, files=learned, held_files=held)
    if path.is_file():
        only = read_files([path], data.bad_rows)
        return _named_splits({"train": only.rows}, data, str(path))._replace(files=only)
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return _saved(path, data)
    files = sorted(file for file in path.rglob("*") if _is_readable(file.relative_to(path)) and file.is_file())
    if not files:
        images = "; of images, say how they are laid out: data.layout" if image_files(path) else ""
        raise DataError(f"{path}: no files that can be read; there may be: {', '.join(READERS)}{images}")
    names = {file.relative_to(path).as_posix(): file for file in files}
    validation = _matching(names, data.validation or (), f"{path}: data.validation")
    train = _train_files(names, data.train, validation, path)
    if both := sorted(set(train).intersection(validation)):
        raise DataError(f"{path}: {', '.join(both)} would be in both data.train and data.validation; name it in one")
    held = read_files([names[name] for name in validation], data.bad_rows) if validation else None
    learned = read_files([names[name] for name in train], data.bad_rows)
    return _Opened(learned.rows, None if held is None else held.rows, files=learned, held_files=held)


def _is_readable(file: Path) -> bool:
    return is_readable(file) and not any(part.startswith(".") for part in file.parts)


def _train_files(names: Mapping[str, Path], wanted: Sequence[str], taken: Sequence[str], folder: Path) -> list[str]:
    if wanted != _EVERYTHING or any(_is_split(path, "train") for path in names.values()):
        return _matching(names, wanted, f"{folder}: data.train")
    rest = [name for name in names if name not in taken]
    held = [name for name in rest if any(_is_split(names[name], stem) for stem in _EVALUATION_STEMS)]
    if held or not rest:
        found = f"{', '.join(held)} would be trained on" if held else "data.validation takes every file"
        raise DataError(f"{folder}: no file named train, and {found}; name the files to train on: data.train: [...]")
    return rest


def _matching(names: Mapping[str, Path], wanted: Sequence[str], where: str) -> list[str]:
    """Return the files that are named, match a pattern or have the split's name as stem; each once, in order."""
    hits = {
        word: [name for name, path in names.items() if fnmatchcase(name, word) or _is_split(path, word)]
        for word in wanted
    }
    if missing := [f"no file '{word}'{nearest(word, names)}" for word in wanted if not hits[word]]:
        raise DataError(f"{where}: {'; '.join(missing)}; there are: {', '.join(islice(names, 20))}")
    return list(dict.fromkeys(chain(*hits.values())))


def _is_split(path: Path, split: str) -> bool:
    return re.fullmatch(rf"{re.escape(split)}(-\d+-of-\d+)?", stem(path)) is not None


def _saved(folder: Path, data: Data) -> _Opened:
    from datasets import load_from_disk

    try:
        for file in _saved_files(folder):
            if not file.resolve().is_relative_to(folder.resolve()):
                raise DataError(f"{folder}: {file} stands outside the folder; put a copy inside")
        saved = load_from_disk(folder)
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise DataError(f"{folder}: a folder of Dataset.save_to_disk that cannot be read: {error}") from error
    return _named_splits({"train": saved} if (folder / "state.json").exists() else saved, data, str(folder))


def _saved_files(folder: Path) -> Iterator[Path]:
    """Yield the files that a folder of `save_to_disk` says its rows stand in."""
    whole = folder / "dataset_dict.json"
    for part in [folder / name for name in json.loads(whole.read_bytes())["splits"]] if whole.exists() else [folder]:
        yield from (part / file["filename"] for file in json.loads((part / "state.json").read_bytes())["_data_files"])
