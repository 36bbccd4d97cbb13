"""Where rows come from: the Hub, local files and folders, a Dataset in memory, or Python's own documentation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from trainworks.data.cache import table
from trainworks.data.columns import fingerprint, rename
from trainworks.data.files import READERS, read_files
from trainworks.data.order import permuted
from trainworks.errors import AccessError, DataError, nearest

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder
    from huggingface_hub import DatasetInfo

    from trainworks.schema import Data

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


class _Opened(NamedTuple):
    train: Dataset
    validation: Dataset | None
    revision: str | None = None
    license: str | None = None


def read(data: Data, *, seed: int) -> Rows:
    """Read both splits, rename their columns, hold out and limit as `data` says; the seed decides which rows.

    Every rank may call it and gets the same. DataError for a file, row, split or column that cannot be used;
    AccessError when the Hub cannot be reached or does not let us in.
    """
    source = data.source if isinstance(data.source, str) else f"<{type(data.source).__name__} in memory>"
    opened = _open(data, source)
    train = _ready(opened.train, data, f"{source} (train)")
    if opened.validation is not None:
        validation: Dataset | None = _ready(opened.validation, data, f"{source} (validation)")
    else:
        train, validation = _hold_out(train, data.holdout, seed)
    train = _limited(train, data.limit.train, seed)
    validation = None if validation is None else _limited(validation, data.limit.validation, seed)
    content = fingerprint(*(rows for rows in (train, validation) if rows is not None))
    return Rows(train, validation, source, data.subset, opened.revision, opened.license, content)


def _open(data: Data, source: str) -> _Opened:
    if not isinstance(data.source, str):
        _refuse_hub_settings(data, source)
        splits = dict(data.source) if isinstance(data.source, dict) else {"train": data.source}
        return _named_splits(splits, data, source)
    if source == "python-docs":
        return _python_docs(data)
    path = Path(source).expanduser()
    if path.exists():
        _refuse_hub_settings(data, source)
        return _local(path, data)
    if path.suffix.lower() in READERS or source.startswith((".", "/", "~")) or source.count("/") > 1:
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


def _ready(rows: Dataset, data: Data, source: str) -> Dataset:
    if len(rows) == 0:
        raise DataError(f"{source}: there are no rows")
    return rename(rows.with_format(None), data.columns, source=source)


def _hold_out(rows: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset | None]:
    if share == 0 or len(rows) < 2:
        return rows, None
    count = min(max(1, round(len(rows) * share)), len(rows) - 1)
    shuffled = permuted(np.arange(len(rows)), len(rows), seed, 1)
    return rows.select(np.sort(shuffled[count:])), rows.select(np.sort(shuffled[:count]))


def _limited(rows: Dataset, limit: int | None, seed: int) -> Dataset:
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
    try:
        return concatenate_datasets([splits[name] for name in wanted]) if wanted else None
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
    if path.is_file():
        return _named_splits({"train": read_files([path])}, data, str(path))
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return _saved(path, data)
    files = sorted(file for file in path.rglob("*") if _is_readable(file.relative_to(path)) and file.is_file())
    if not files:
        raise DataError(f"{path}: no files that can be read; there may be: {', '.join(READERS)}")
    names = {file.relative_to(path).as_posix(): file for file in files}
    validation = _matching(names, data.validation or (), f"{path}: data.validation")
    train = _train_files(names, data.train, validation, path)
    if both := sorted(set(train).intersection(validation)):
        raise DataError(f"{path}: {', '.join(both)} would be in both data.train and data.validation; name it in one")
    held = read_files([names[name] for name in validation]) if validation else None
    return _Opened(read_files([names[name] for name in train]), held)


def _is_readable(file: Path) -> bool:
    return file.suffix.lower() in READERS and not any(part.startswith(".") for part in file.parts)


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
    return re.fullmatch(rf"{re.escape(split)}(-\d+-of-\d+)?", path.stem) is not None


def _saved(folder: Path, data: Data) -> _Opened:
    from datasets import load_from_disk

    try:
        saved = load_from_disk(folder)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder}: a folder of Dataset.save_to_disk that cannot be read: {error}") from error
    return _named_splits({"train": saved} if (folder / "state.json").exists() else saved, data, str(folder))
