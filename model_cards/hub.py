"""One repository on the Hub, seen with one token: tried again where its client gives up, its errors saying the mend."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from model_cards.linting import TOKEN
from trainworks.errors import AccessError, PublishError, ToolkitError
from trainworks.record import file_sha256
from trainworks.redaction import redacted

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["MEND", "PublishedFile", "Repository"]

MEND = "run `hf auth login`, or set HF_TOKEN to a token with write access (https://huggingface.co/settings/tokens)"
_WAITS = (1.0, 4.0, 15.0)
Returned = TypeVar("Returned")


@dataclass(frozen=True)
class PublishedFile:
    """A file of a publication: its name in the repository, its size in bytes and its SHA-256."""

    path: str
    size: int
    sha256: str
    source: Path

    @classmethod
    def read(cls, path: Path, folder: Path) -> PublishedFile:
        """Measure the file at `path`."""
        return cls(path.relative_to(folder).as_posix(), path.stat().st_size, file_sha256(path), path)

    def blob_id(self) -> str:
        """Return git's name of the content, which is how the Hub lists a file that it does not store as a large one."""
        content = self.source.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Repository:
    """`repo` at a branch; with `token` None, the token of the environment or of `hf auth login`."""

    repo: str
    token: str | None = None
    revision: str | None = None
    waits: tuple[float, ...] = field(default_factory=lambda: _WAITS)
    """Seconds to pause before each further attempt."""

    def call(self, doing: str, action: Callable[[HfApi], Returned]) -> Returned:
        """Do `action`, and again when the Hub was busy or hung up: its client repeats neither commits nor creation."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # httpx's in 1.x, httpx2's in 2.x

        for wait in (*self.waits, None):
            try:
                return action(HfApi(token=self.token, library_name="trainworks"))
            except (HTTPError, OSError, RuntimeError, ValueError) as error:
                reason = _reason(error)
                if wait is None or not _passes(reason, HTTPError):
                    raise self._explain(doing, reason) from reason
                time.sleep(max(wait, _asked_wait(reason)))
        raise AssertionError("the last attempt returns or raises")

    def _explain(self, doing: str, error: Exception) -> ToolkitError:
        where, said = f"{self.repo}: could not {doing}", self._redact(str(error).strip() or type(error).__name__)
        kind, mend = _mend(error)
        return kind(f"{where}: {mend}" + (f"\n  {said}" if kind is PublishError else f" ({said})"))

    def _redact(self, message: str) -> str:
        hidden = message.replace(self.token, "<token>") if self.token else message
        return TOKEN.sub("<token>", redacted(hidden))

    def open(self, private: bool) -> None:
        """Make the repository, or see that the one there is as closed as asked for."""
        self.call("create the repository", lambda api: api.create_repo(self.repo, private=private, exist_ok=True))
        if self.revision:
            branch = self.revision
            self.call("create the branch", lambda api: api.create_branch(self.repo, branch=branch, exist_ok=True))
        if private and not self.call("look at the repository", lambda api: api.model_info(self.repo)).private:
            raise PublishError(
                f"{self.repo}: the repository is public, and private was asked for; to publish openly "
                "pass private=False (hub.private: false), else make it private in its settings on the Hub"
            )

    def head(self) -> str | None:
        """Return the newest commit."""
        return self.call("look at the repository", lambda api: api.model_info(self.repo, revision=self.revision)).sha

    def upload(self, files: Iterable[PublishedFile], message: str) -> str:
        """Commit the files on top of the newest commit, and return the new one."""
        from huggingface_hub import CommitOperationAdd

        parent, files = self.head(), tuple(files)

        def commit(api: HfApi) -> str:
            added = [CommitOperationAdd(file.path, str(file.source)) for file in files]
            options: dict[str, Any] = {"revision": self.revision, "parent_commit": parent}
            return str(api.create_commit(self.repo, added, commit_message=message, **options).oid)

        try:
            return self.call("upload", commit)
        except PublishError as error:
            # A connection lost after the commit was made: the repetition then meets its own work as a stale parent.
            newest = self.head() if _status(error.__cause__) == 412 else None
            if newest is None or newest == parent or list(self._differences(files, newest)):
                raise
            return newest

    def verify(self, files: Iterable[PublishedFile], commit: str) -> None:
        """Compare names, sizes and hashes at `commit` with what was sent."""
        wrong = list(self._differences(files, commit))
        if wrong:
            raise PublishError(
                f"{self.repo}: commit {commit} is not what was sent; publish again:\n  " + "\n  ".join(wrong)
            )

    def _differences(self, files: Iterable[PublishedFile], commit: str) -> Iterator[str]:
        listing = self.call(
            "list what was uploaded",
            lambda api: list(api.list_repo_tree(self.repo, recursive=True, revision=commit)),
        )
        remote: dict[str, Any] = {entry.path: entry for entry in listing}
        for file in files:
            there = remote.get(file.path)
            if there is None:
                yield f"{file.path} is missing"
            elif there.size != file.size:
                yield f"{file.path} has {there.size:,} bytes there, {file.size:,} here"
            elif (there.lfs.sha256 != file.sha256) if there.lfs else (there.blob_id != file.blob_id()):
                yield f"{file.path} has another content there"


def _reason(error: Exception) -> Exception:
    """Return what stopped a file's upload, which the client hides behind a RuntimeError that names the file only."""
    cause = error.__cause__
    return cause if isinstance(error, RuntimeError) and isinstance(cause, Exception) else error


def _status(error: BaseException | None) -> int | None:
    from huggingface_hub.errors import HfHubHTTPError

    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _passes(error: Exception, http_error: type[Exception]) -> bool:
    """Say whether the same request may succeed in a moment; a busy server's page instead of JSON counts."""
    status = _status(error)
    if status is None:
        return isinstance(error, http_error | json.JSONDecodeError)
    return status == 429 or status >= 500


def _asked_wait(error: Exception) -> float:
    from huggingface_hub.errors import HfHubHTTPError

    asked = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return min(float(asked), 60.0) if asked.isdigit() else 0.0


def _mend(error: Exception) -> tuple[type[ToolkitError], str]:
    from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError  # type: ignore[attr-defined]

    status = _status(error)
    refused = {
        401: (AccessError, f"token refused, or none given; {MEND}"),
        403: (AccessError, f"the token may not write there; {MEND}"),
        404: (AccessError, f"no such repository or branch, or not for this token; {MEND}"),
        412: (PublishError, "somebody else changed the repository meanwhile; look at their commit, then publish again"),
    }
    if status in refused:
        return refused[status]
    if isinstance(error, LocalTokenNotFoundError):
        return AccessError, f"no token; {MEND}"
    if status == 429 or (status or 0) >= 500:
        return AccessError, f"the Hub is busy (status {status}), also after waiting; try again later"
    if isinstance(error, HTTPError | ConnectionError) and status is None:
        return AccessError, "the Hub cannot be reached; check the network, HF_ENDPOINT and HF_HUB_OFFLINE"
    return PublishError, "refused"
