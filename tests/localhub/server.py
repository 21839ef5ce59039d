"""A Hub on this machine for tests: data sets read as the unmodified huggingface_hub client reads them, with faults.

What it answers is what the client was seen to need; one file, the standard library, no state on disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import socket
import threading
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

SIGNATURE = "signature=of-a-signed-url"  # of the addresses on the other origin; as good as a password for an hour


@dataclass
class Fault:
    """What goes wrong with the GETs of a file, and how many times before all is well."""

    times: float = math.inf
    status: int | None = None  # answered instead
    cut_after: int | None = None  # bytes of the body before the connection breaks
    stalls: bool = False  # silence instead of the rest of the body
    content: bytes | None = None  # served instead of the file's own
    whole: bool = False  # Range is ignored


@dataclass(frozen=True)
class Request:
    """One line of the log."""

    server: str  # "hub", or "cdn", the other origin
    method: str
    path: str  # of the file, or of the API
    range: str | None
    token: str | None
    status: int


@dataclass
class Repo:
    """The files of each commit, by path; branches and tags are names of commits."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, folder: Path, branch: str = "main") -> str:
        """Make the files of a folder the newest commit of a branch; its 40 hex digits follow from the content."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        parent = self.refs.get(branch, "")
        listing = "".join(f"{path} {hashlib.sha256(content).hexdigest()}\n" for path, content in files.items())
        sha = hashlib.sha1((parent + listing).encode()).hexdigest()
        self.commits[sha] = files
        self.refs[branch] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch, tag or commit."""
        return self.refs.get(revision) or (revision if revision in self.commits else None)


def entry(path: str, content: bytes) -> dict[str, object]:
    """A file in a listing. Parquet goes to the large file storage, as .gitattributes on the Hub has it."""
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    listed: dict[str, object] = {"type": "file", "path": path, "oid": oid, "size": len(content)}
    if path.endswith(".parquet"):
        listed["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return listed


class LocalHub:
    """Data sets by repo id, on a port of this machine; a context.

    Parameters
    ----------
    token
        What a request must carry; without it the repos seem not to exist. None: public.
    redirects
        Large files are answered with a redirect to another origin, as on the Hub.
    """

    def __init__(self, token: str | None = None, redirects: bool = False) -> None:
        self.token, self.redirects = token, redirects
        self.repos: dict[str, Repo] = {}
        self.faults: dict[str, Fault] = {}  # by the path of the file in its repo
        self.log: list[Request] = []
        self.lock = threading.Lock()
        self._servers = {name: _Server(self, name) for name in ("hub", "cdn")}

    def __enter__(self) -> LocalHub:
        for server in self._servers.values():
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return self._servers["hub"].url

    @property
    def cdn_url(self) -> str:
        return self._servers["cdn"].url

    def stop(self) -> None:
        """Be gone: open connections break, new ones are refused."""
        for server in self._servers.values():
            server.stop()

    def gets(self, path: str) -> list[Request]:
        """The GETs of a file that were not redirected, in their order."""
        return [r for r in self.log if r.method == "GET" and r.path == path and r.status != 302]

    def fault_of(self, path: str) -> Fault | None:
        """The fault of a GET that is being answered; counts it."""
        with self.lock:
            fault = self.faults.get(path)
            if fault is None or fault.times <= 0:
                return None
            self.faults[path] = replace(fault, times=fault.times - 1)
            return fault


class _Server(ThreadingHTTPServer):
    def __init__(self, hub: LocalHub, name: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub, self.name = hub, name
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.stopped = threading.Event()
        self.connections: set[socket.socket] = set()

    def stop(self) -> None:
        if self.stopped.is_set():
            return
        self.stopped.set()
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):  # the other side may have closed it
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients are killed in tests


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        if self.server.name == "hub" and hub.token is not None and self._token() != hub.token:
            self._error(401, "RepoNotFound", "Invalid username or password.", path)  # as for a repo that is not there
        elif match := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(*match.groups())
        elif match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            self._api(path, match[1], match[2], match[3] or "main")
        else:
            self._error(404, None, "Not Found", path)

    do_HEAD = do_GET

    def _resolve(self, name: str, revision: str, path: str) -> None:
        hub = self.server.hub
        found = self._commit(name, revision, path)
        if found is None:
            return
        sha, files = found
        if path not in files:
            self._error(404, "EntryNotFound", "Entry not found", path, {"X-Repo-Commit": sha})
            return
        content, listed = files[path], entry(path, files[path])
        etag = listed["oid"]
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if isinstance(large := listed.get("lfs"), dict):
            etag = large["oid"]
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{etag}"'}
            if hub.redirects and self.server.name == "hub":
                location = f"{hub.cdn_url}/datasets/{quote(name)}/resolve/{sha}/{quote(path)}?{SIGNATURE}"
                self._answer(302, path, {**headers, "Location": location})
                return
        self._file(path, content, {**headers, "ETag": f'"{etag}"'})

    def _file(self, path: str, content: bytes, headers: dict[str, str]) -> None:
        fault = (self.server.hub.fault_of(path) if self.command == "GET" else None) or Fault()
        if fault.status is not None:
            self._error(fault.status, None, "out of order", path)
            return
        if fault.content is not None:
            content = fault.content
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None or fault.whole:
            self._answer(200, path, headers, content, fault)
            return
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        if first > last:
            self._answer(416, path, {**headers, "Content-Range": f"bytes */{len(content)}"})
            return
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self._answer(206, path, headers, content[first : last + 1], fault)

    def _api(self, path: str, name: str, what: str | None, revision: str) -> None:
        found = self._commit(name, revision, path)
        if found is None:
            return
        sha, files = found
        answer: object = [entry(path, content) for path, content in files.items()]
        if what != "tree":
            siblings = [{"rfilename": path} for path in files]
            answer = {"id": name, "sha": sha, "private": False, "tags": [], "siblings": siblings}
        self._answer(200, path, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    def _commit(self, name: str, revision: str, path: str) -> tuple[str, dict[str, bytes]] | None:
        # What was asked for, or None after an error was answered.
        repo = self.server.hub.repos.get(name)
        if repo is None:
            self._error(404, "RepoNotFound", "Repository not found", path)
            return None
        sha = repo.resolve(revision)
        if sha is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}", path)
            return None
        return sha, repo.commits[sha]

    def _error(
        self, status: int, code: str | None, message: str, path: str, headers: dict[str, str] | None = None
    ) -> None:
        told = {"X-Error-Message": message, **(headers or {})} | ({} if code is None else {"X-Error-Code": code})
        self._answer(status, path, told, json.dumps({"error": message}).encode())

    def _answer(
        self, status: int, path: str, headers: dict[str, str], body: bytes = b"", fault: Fault | None = None
    ) -> None:
        hub = self.server.hub
        asked = self.headers.get("Range")
        with hub.lock:
            hub.log.append(Request(self.server.name, self.command, path, asked, self._token(), status))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body if fault is None else body[: fault.cut_after])
        if fault is not None and fault.stalls:
            self.server.stopped.wait()
        if fault is not None and (fault.stalls or fault.cut_after is not None):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
