"""Upload a model with its card: only files that belong to it, in one commit, and looked at again on the other side."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from model_cards.card import Card
from model_cards.hub import MEND, PublishedFile, Repository
from model_cards.linting import lint
from trainworks.errors import AccessError, PublishError

__all__ = ["PUBLISHED", "Publication", "check_access", "publish"]

PUBLISHED = (
    *("README.md", "curve.png", "example-[1-9].jpg", "run.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE"),
    *("model*.safetensors", "model*.safetensors.index.json", "adapter_model*.safetensors"),
    *("config.json", "generation_config.json", "adapter_config.json", "*processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "*.model", "*.jinja", "additional_chat_templates/*.jinja"),
)
"""What belongs to a published model; anything else in the folder stays there."""

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]{1,96}", re.ASCII)


@dataclass(frozen=True)
class Publication:
    """What was uploaded, or would be: `commit` is None after a dry run."""

    repo: str
    url: str
    commit: str | None
    files: tuple[PublishedFile, ...]
    left_out: tuple[str, ...] = ()
    """Names in the folder that are no part of a published model."""

    def __str__(self) -> str:
        width = max((len(file.path) for file in self.files), default=0)
        rows = [f"  {file.path:<{width}}  {_size(file.size):>10}  {file.sha256}" for file in self.files]
        total = _size(sum(file.size for file in self.files))
        done = f"commit {self.commit}" if self.commit else "dry run, nothing was uploaded"
        left = [f"left out: {', '.join(self.left_out)}"] if self.left_out else []
        return "\n".join([f"{self.url} ({done})", *rows, f"{len(self.files)} files, {total}", *left])


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def publish(
    folder: str | Path,
    card: Card,
    *,
    repo: str,
    private: bool = True,
    dry_run: bool = False,
    token: str | None = None,
    revision: str | None = None,
    message: str = "Publish the model with its card",
) -> Publication:
    """Upload the model in `folder` with `card` to `repo` on the Hub, in one commit. Main process only.

    The card is first written into the folder, over a README.md that is there, and so is `run.json` when it is missing.
    A dry run does all but reach for the Hub: it needs neither token nor network. Raises PublishError for a card that
    `lint` finds fault with, a folder without weights, a repository more open than `private` asks for or one that
    changed meanwhile, and an upload that is not what was sent; AccessError where the Hub cannot be reached or refuses
    the token.
    """
    address = _address(repo, revision)
    files, left_out = _collect(Path(folder), card)
    planned = Publication(repo, address, None, files, left_out)
    if dry_run:
        return planned
    hub = Repository(repo, token, revision)
    hub.open(private)
    commit = hub.upload(files, message)
    hub.verify(files, commit)
    return replace(planned, commit=commit)


def check_access(repo: str, token: str | None = None) -> str:
    """Ask the Hub, before a long run, who the token belongs to, and return the name.

    AccessError when there is no token, it is refused, or it cannot write under the owner of `repo`.
    """
    identity = Repository(repo, token, waits=(0.5,)).call("ask who the token belongs to", lambda api: api.whoami())
    owner, names = repo.partition("/")[0], [identity["name"], *(group["name"] for group in identity.get("orgs", ()))]
    if owner not in names:
        raise AccessError(
            f"{repo}: the token belongs to {names[0]}, who can publish under {', '.join(names)}, not {owner}"
        )
    if identity.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise AccessError(f"{repo}: the token of {names[0]} may only read; {MEND}")
    return str(names[0])


def _address(repo: str, revision: str | None) -> str:
    from huggingface_hub import constants

    if not _REPOSITORY.fullmatch(repo):
        raise PublishError(
            f"repo {repo!r} is no name the Hub takes: write owner/name in letters, digits, `-`, `_`, `.`"
        )
    return f"{constants.ENDPOINT}/{repo}" + (f"/tree/{revision}" if revision else "")


def _collect(folder: Path, card: Card) -> tuple[tuple[PublishedFile, ...], tuple[str, ...]]:
    if not folder.is_dir():
        raise PublishError(f"{folder}: no such folder; export the model first")
    card.save(folder)
    if not (folder / "run.json").exists():
        card.record.write(folder)
    paths = sorted(path for path in _candidates(folder) if _belongs(path, folder))
    findings = [*lint(card, folder), *_misplaced(paths, folder)]
    if findings:
        listed = "\n".join(f"  - {finding}" for finding in findings)
        raise PublishError(f"{folder} cannot be published as it is:\n{listed}")
    chosen = {path.relative_to(folder).parts[0] for path in paths}
    left_out = tuple(sorted(path.name for path in folder.iterdir() if path.name not in chosen))
    return tuple(PublishedFile.read(path, folder) for path in paths), left_out


def _candidates(folder: Path) -> Iterator[Path]:
    yield from folder.iterdir()
    yield from (folder / "additional_chat_templates").glob("*")


def _belongs(path: Path, folder: Path) -> bool:
    name = path.relative_to(folder).as_posix()
    return path.is_file() and not path.name.startswith(".") and any(_matches(name, pattern) for pattern in PUBLISHED)


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern)


def _misplaced(paths: Iterable[Path], folder: Path) -> Iterator[str]:
    root, names = folder.resolve(), []
    for path in paths:
        names.append(path.name)
        if not path.resolve().is_relative_to(root):
            yield f"{path.name} is a link to a file outside the folder; put a copy in its place"
    if not any(name.endswith(".safetensors") for name in names):
        yield "it holds no weights (model*.safetensors or adapter_model*.safetensors); export the model first"
