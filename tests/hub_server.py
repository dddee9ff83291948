"""A Hugging Face hub on this machine: serves folders as repositories, with the faults of real ones on request.

It speaks what huggingface_hub asks of the real one: `repo_info` with and without the files' metadata, the tree of a
revision, and `resolve` with HEAD, GET and ranges.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import pytest

__all__ = ["TOKEN", "Cut", "HubServer", "Repository", "serving", "use_hub"]

TOKEN = "hf_token_of_the_tests"
_TEXT = {".json", ".md", ".txt", ".jinja", ".gitattributes"}
"""What git keeps itself; other files are kept by git LFS, with a sha256."""


@dataclass(frozen=True)
class Cut:
    """A connection that breaks after so many bytes of a file: once, or for good (then the hub answers 503).

    One that `hangs` stays open, with nothing more to come, until the server ends.
    """

    at: int
    for_good: bool = False
    hangs: bool = False


@dataclass
class Repository:
    """A folder as a repository. `faults` maps a file's path to what is sent instead of it, or to where it is cut off.

    `branches` are its other revisions, by their names. `gated` refuses files, and `private` everything, to whoever does
    not show TOKEN.
    """

    folder: Path
    kind: Literal["dataset", "model"] = "dataset"
    licence: str = "mit"
    gated: bool = False
    private: bool = False
    faults: dict[str, bytes | Cut] = field(default_factory=dict)
    branches: dict[str, "Repository"] = field(default_factory=dict)

    @cached_property
    def files(self) -> dict[str, bytes]:
        """What it holds, by path."""
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in paths}

    @cached_property
    def commit(self) -> str:
        """The id of its one revision."""
        return hashlib.sha1(repr([(path, self.etag(path)) for path in self.files]).encode()).hexdigest()

    def is_lfs(self, path: str) -> bool:
        """Whether a file is kept by git LFS."""
        return Path(path).suffix not in _TEXT

    def etag(self, path: str) -> str:
        """The sha256 of a file in LFS, git's own hash of any other."""
        content = self.files[path]
        if self.is_lfs(path):
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Request:
    """What was asked for: HEAD or GET, the path, and the headers that matter."""

    method: str
    path: str
    range: str | None
    authorization: str | None


class HubServer(ThreadingHTTPServer):
    """Serves repositories by their ids and remembers what was asked for; with `far`, files come from another host."""

    daemon_threads = True

    def __init__(self, repositories: dict[str, Repository], far: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.far = far
        self.requests: list[Request] = []
        self.cuts: set[str] = set()
        self.renamed: dict[str, str] = {}
        self.hanging = Event()
        self.ended = Event()

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT is set to."""
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def far_endpoint(self) -> str:
        """The same server under another name, as a store of files that must not see a token of the hub."""
        return f"http://localhost:{self.server_port}/far"

    def downloaded(self) -> list[str]:
        """The files of which any content was asked for, each once, in order."""
        paths = [r.path.split("/resolve/")[1].split("/", 1)[1] for r in self.requests if self._is_content(r)]
        return list(dict.fromkeys(paths))

    def _is_content(self, request: Request) -> bool:
        return request.method == "GET" and "/resolve/" in request.path


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_: Any) -> None:
        """Stay silent."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path == "/api/agent-harnesses":  # huggingface_hub asks who calls it, once a day
            return self._error(404, "RepoNotFound")
        for old, new in self.server.renamed.items():
            if f"/{old}" in path:
                return self._answer(b"", 307, {"Location": self.path.replace(f"/{old}", f"/{new}", 1)})
        headers = (self.headers.get("Range"), self.headers.get("Authorization"))
        self.server.requests.append(Request(self.command, path, *headers))
        for hub_id, repository in self.server.repositories.items():
            prefix = "/datasets/" if repository.kind == "dataset" else "/"
            if path.startswith(f"/api/{repository.kind}s/{hub_id}"):
                return self._information(repository, hub_id, path.removeprefix(f"/api/{repository.kind}s/{hub_id}"))
            for start, is_far in ((f"{prefix}{hub_id}/resolve/", False), (f"/far{prefix}{hub_id}/resolve/", True)):
                if path.startswith(start):
                    return self._file(repository, is_far)
        self._error(404, "RepoNotFound")

    def _information(self, repository: Repository, hub_id: str, rest: str) -> None:
        if repository.private and not self._has_token():
            return self._error(401, "RepoNotFound")
        if rest.startswith("/tree/"):
            return self._answer(json.dumps([self._tree_entry(repository, path) for path in repository.files]).encode())
        entry = self._at(repository, rest.removeprefix("/revision/") or "main")
        if entry is None:
            return self._error(404, "RevisionNotFound")
        repository = entry
        information = {
            "_id": "0",
            "id": hub_id,
            "sha": repository.commit,
            "private": repository.private,
            "gated": "auto" if repository.gated else False,
            "cardData": {"license": repository.licence},
            "siblings": [self._sibling(repository, path) for path in repository.files],
        }
        self._answer(json.dumps(information).encode())

    def _sibling(self, repository: Repository, path: str) -> dict[str, Any]:
        if "blobs=" not in self.path:
            return {"rfilename": path}
        size, etag = len(repository.files[path]), repository.etag(path)
        if not repository.is_lfs(path):
            return {"rfilename": path, "size": size, "blobId": etag}
        lfs = {"sha256": etag, "size": size, "pointerSize": 134}
        return {"rfilename": path, "size": size, "blobId": "0" * 40, "lfs": lfs}

    def _tree_entry(self, repository: Repository, path: str) -> dict[str, Any]:
        size, etag = len(repository.files[path]), repository.etag(path)
        entry = {"type": "file", "path": path, "size": size, "oid": etag}
        if repository.is_lfs(path):
            entry |= {"oid": "0" * 40, "lfs": {"oid": etag, "size": size, "pointerSize": 134}}
        return entry

    def _file(self, repository: Repository, is_far: bool) -> None:
        # Split before it is unquoted: a branch may have a slash in its name.
        revision, path = map(unquote, urlsplit(self.path).path.split("/resolve/", 1)[1].split("/", 1))
        if (repository.gated or repository.private) and not is_far and not self._has_token():
            return self._error(401, "GatedRepo" if repository.gated else "RepoNotFound")
        entry = self._at(repository, revision)
        if entry is None:
            return self._error(404, "RevisionNotFound")
        repository = entry
        if path not in repository.files:
            return self._error(404, "EntryNotFound")
        whole, fault = repository.files[path], repository.faults.get(path)
        content = fault if isinstance(fault, bytes) else whole
        headers = {
            "ETag": f'"{repository.etag(path)}"',
            "X-Repo-Commit": repository.commit,
            "X-Linked-Etag": f'"{repository.etag(path)}"',
            "X-Linked-Size": str(len(whole)),
            "Accept-Ranges": "bytes",
        }
        if self.server.far and repository.is_lfs(path) and not is_far:
            where = f"{self.server.far_endpoint}{urlsplit(self.path).path}"
            return self._answer(b"", 302, headers | {"Location": where})
        status, start = 200, 0
        if range_ := self.headers.get("Range"):
            start = int(range_.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            content, status = content[start:], 206
        if isinstance(fault, Cut) and path not in self.server.cuts and self.command == "GET":
            self.server.cuts.add(path)
            return self._answer(content, status, headers, max(0, fault.at - start), fault.hangs)
        if isinstance(fault, Cut) and fault.for_good and self.command == "GET":
            return self._error(503, "Down")
        self._answer(content, status, headers)

    def _has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _at(self, repository: Repository, revision: str) -> Repository | None:
        """A repository as it is at a revision: main, another branch, or the commit of one."""
        known = {"main": repository, **repository.branches}
        return (known | {branch.commit: branch for branch in known.values()}).get(revision)

    def _error(self, status: int, code: str) -> None:
        self._answer(b"", status, {"X-Error-Code": code, "X-Error-Message": code})

    def _answer(
        self,
        content: bytes,
        status: int = 200,
        headers: dict[str, str] | None = None,
        cut: int | None = None,
        hangs: bool = False,
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(content[:cut])
        if cut is not None and cut < len(content):
            self.close_connection = True
        if hangs:
            self.server.hanging.set()
            self.server.ended.wait(60)


@contextmanager
def serving(repositories: dict[str, Repository], far: bool = False) -> Iterator[HubServer]:
    """A hub that runs for a while."""
    server = HubServer(repositories, far)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()


def use_hub(monkeypatch: pytest.MonkeyPatch, endpoint: str, cache: Path, token: str | None = None) -> None:
    """Let huggingface_hub of this process speak with a hub and keep its files in a folder of the test's.

    huggingface_hub reads the environment once, when it is imported; since then these constants are asked at each call
    (`constants.ENDPOINT` by HfApi() and hf_hub_url, but as the default of HfApi's one ready-made instance it is fixed:
    use HfApi()). A process of its own takes HF_ENDPOINT, HF_HOME and HF_TOKEN from its environment instead.
    """
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    if token is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
    else:
        monkeypatch.setenv("HF_TOKEN", token)
