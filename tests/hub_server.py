"""The Hub's upload and download endpoints on this machine's loopback, kept in memory, and failing when told to."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_" + "a" * 34


@dataclass
class Repo:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        before = self.commits.get(self.branches.get(branch, ""), {})
        sha = hashlib.sha1(f"{branch}{len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = before | files
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        sha = self.branches.get(revision, revision)
        return sha if sha in self.commits else None


@dataclass
class Fault:
    part: str
    status: int | None
    times: int
    lost_answer: bool


class HubServer:
    """A Hub for tests: `with HubServer() as hub`, then point HF_ENDPOINT to `hub.url` and disable xet.

    `requests` lists method and path of all that came in; `fail` plans an error for the next ones.
    """

    def __init__(self, user: str = "someone", role: str = "write") -> None:
        self.user, self.role = user, role
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.ignored: set[str] = set()
        """Names the server drops from every commit, as a .gitignore in the repository makes the Hub do."""
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """What a subprocess needs to talk to this Hub, with a token that it takes."""
        return {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}

    def add(self, name: str, files: dict[str, bytes], *, private: bool = True) -> str:
        """Put a repository there, as if it had been uploaded; return its commit."""
        repo = self.repos[name] = Repo(private)
        return repo.commit("main", files)

    def fail(self, part: str, status: int | None, *, times: int = 1, lost_answer: bool = False) -> None:
        """Answer the next requests whose path holds `part` by `status`, or hang up for None.

        With `lost_answer` the work is done first, and only its answer is replaced.
        """
        self.faults.append(Fault(part, status, times, lost_answer))

    def fault(self, path: str) -> Fault | None:
        """Take the fault that was planned for a request."""
        for fault in self.faults:
            if fault.part in path and fault.times > 0:
                fault.times -= 1
                return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def _serve(self) -> None:
        body = self._body()
        path = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {path}")
            fault = self.hub.fault(path)
            if fault is None or fault.lost_answer:
                status, answer, headers = self._route(path.strip("/"), body)
            if fault is None:
                self._answer(status, answer, headers)
                return
        if fault.status is None:
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self._answer(fault.status, b'{"error": "told to fail"}', {"Retry-After": "0"})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _answer(self, status: int, answer: bytes | Any, headers: dict[str, str]) -> None:
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _route(self, path: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        if path.startswith("lfs/"):
            self.hub.objects.setdefault(path.removeprefix("lfs/"), body)
            return 200, {}, {}
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}, {}
        if path == "api/whoami-v2":
            access = {"accessToken": {"role": self.hub.role}}
            return 200, {"name": self.hub.user, "type": "user", "orgs": [{"name": "a-group"}], "auth": access}, {}
        if path == "api/validate-yaml":
            return 200, {"warnings": [], "errors": []}, {}
        if path == "api/repos/create":
            return self._create(json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            return 200, {"objects": [self._large(item) for item in json.loads(body)["objects"]]}, {}
        if path.startswith("api/models/"):
            owner, name, *rest = path.removeprefix("api/models/").split("/")
            return self._model(f"{owner}/{name}", rest, body)
        owner, name, *rest = path.split("/")
        return self._download(f"{owner}/{name}", rest)

    def _create(self, wanted: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        name = f"{wanted.get('organization') or self.hub.user}/{wanted['name']}"
        if name.partition("/")[0] not in {self.hub.user, "a-group"}:
            return 403, {"error": "You don't have the rights to create a model under this namespace"}, {}
        if name in self.hub.repos:
            return 409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, {}
        private = wanted.get("visibility") == "private" or wanted.get("private") is True
        self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        return 200, {"url": f"{self.hub.url}/{name}", "name": name}, {}

    def _large(self, item: dict[str, Any]) -> dict[str, Any]:
        known = {"oid": item["oid"], "size": item["size"]}
        if item["oid"] in self.hub.objects:
            return known
        return known | {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}}

    def _model(self, name: str, rest: list[str], body: bytes) -> tuple[int, Any, dict[str, str]]:
        repo = self.hub.repos.get(name)
        if repo is None:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        action, revision = (rest[0], "/".join(rest[1:])) if rest else ("revision", "main")
        if action == "branch":
            taken = revision in repo.branches
            repo.branches.setdefault(revision, repo.branches["main"])
            return (409, {"error": "Reference already exists"}, {}) if taken else (200, {}, {})
        sha = repo.resolve(revision)
        if sha is None:
            return 404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"}
        files = repo.commits[sha]
        if action == "revision":
            siblings = [{"rfilename": path} for path in files]
            return 200, {"id": name, "sha": sha, "private": repo.private, "siblings": siblings, "tags": []}, {}
        if action == "tree":
            return 200, [_entry(path, content) for path, content in files.items()], {}
        if action == "preupload":
            listed = [self._mode(item["path"], files) for item in json.loads(body)["files"]]
            return 200, {"files": listed, "commitOid": sha}, {}
        if action == "commit":
            return self._commit(repo, name, revision, [json.loads(line) for line in body.splitlines()])
        return 404, {"error": f"no endpoint {action}"}, {}

    def _mode(self, path: str, files: dict[str, bytes]) -> dict[str, Any]:
        there = _entry(path, files[path])["oid"] if path in files else None
        mode = "lfs" if _is_large(path) else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": path in self.hub.ignored, "oid": there}

    def _commit(self, repo: Repo, name: str, branch: str, lines: list[Any]) -> tuple[int, Any, dict[str, str]]:
        parent = next(line["value"].get("parentCommit") for line in lines if line["key"] == "header")
        if parent and parent != repo.branches[branch]:
            return 412, {"error": "A commit has happened since. Please refresh and try again."}, {}
        files = {}
        for line in lines:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            if line["key"] == "lfsFile":
                files[line["value"]["path"]] = self.hub.objects[line["value"]["oid"]]
        sha = repo.commit(branch, files)
        return 200, {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"}, {}

    def _download(self, name: str, rest: list[str]) -> tuple[int, Any, dict[str, str]]:
        repo, path = self.hub.repos.get(name), "/".join(rest[2:])
        sha = repo.resolve(rest[1]) if repo and rest[:1] == ["resolve"] and len(rest) > 2 else None
        if repo is None or sha is None or path not in repo.commits[sha]:
            return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha or ""}
        content = repo.commits[sha][path]
        return 200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": sha}


def _is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".png"))


def _entry(path: str, content: bytes) -> dict[str, Any]:
    digest = hashlib.sha256(content).hexdigest()
    stored = f"oid sha256:{digest}".encode() if _is_large(path) else content
    entry = {"type": "file", "path": path, "size": len(content)}
    entry["oid"] = hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()
    large = {"lfs": {"oid": digest, "size": len(content), "pointerSize": len(stored)}}
    return entry | large if _is_large(path) else entry


@contextmanager
def reached(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Let huggingface_hub find a server of this machine in the Hub's place, as if online."""
    with HubServer() as server:
        address = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield server
