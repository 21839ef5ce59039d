"""A Hub on this machine for tests: the unmodified huggingface_hub client pushes to it and reads from it, with faults.

Two origins as on the real one: "hub" has the API and the files, "cdn" stores large files under addresses whose
signature lets anybody in. What is answered is what the client was seen to need; no state on disk.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qs, quote, unquote

from tests.localhub.connection import Answer, Broken, Fault, Handler, Request, Server, as_json
from tests.localhub.repos import GITATTRIBUTES, Note, Refused, Repo, front_matter, git_oid, is_large, stamp

__all__ = ["SIGNATURE", "USER", "Fault", "LocalHub", "Repo", "Request"]

SIGNATURE = "signature=of-a-signed-url"  # of the addresses on the other origin; as good as a password for an hour
USER = "lab"  # whose tokens these are


def at(kind: str, name: str) -> str:
    """Where a repo is below the address of the Hub."""
    return name if kind == "models" else f"datasets/{name}"


class LocalHub:
    """Models and data sets by repo id, on ports of this machine; a context.

    Parameters
    ----------
    token
        What a request must carry; without it the repos seem not to exist. None: public, but for private repos.
    redirects
        Large files are answered with a redirect to the other origin, as on the Hub. Uploads always go there.
    write_token
        What writing needs (403 with `token` alone), good for reading too; if None, `token`. Both None: all may write.
    port
        Of the Hub; 0 takes a free one.

    Notes
    -----
    `faults` are keyed by the path of a file for its GETs, by (operation, what) for all else. Operations are "head" and
    those of ROUTES below; `what` is the path of the file for "head", the repo id, or "*" for all. Those without a repo
    in their address ("whoami", "validate", "list_repos", "create", "delete") have "*" only.
    """

    def __init__(
        self, token: str | None = None, redirects: bool = False, write_token: str | None = None, port: int = 0
    ) -> None:
        self.token, self.redirects, self.write_token = token, redirects, write_token
        self.models: dict[str, Repo] = {}
        self.datasets: dict[str, Repo] = {}
        self.faults: dict[str | tuple[str, str], Fault] = {}
        self.log: list[Request] = []
        self.lock = threading.RLock()
        self._servers = {"hub": Server(self, "hub", port, _Hub), "cdn": Server(self, "cdn", 0, _Hub)}

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

    def repos(self, kind: str) -> dict[str, Repo]:
        """The repos of a kind, "models" or "datasets"."""
        return self.models if kind == "models" else self.datasets

    def gets(self, path: str) -> list[Request]:
        """The GETs of a file that were not redirected, in their order."""
        return [r for r in self.log if r.operation == "get" and r.path == path and r.status != 302]

    def operations(self) -> list[str]:
        """What was asked for, in order."""
        return [request.operation for request in self.log]

    def fault_of(self, operation: str, what: str) -> Fault:
        """The fault of what is being answered; counts it."""
        keys = [what] if operation == "get" else [(operation, what), (operation, "*")]
        with self.lock:
            for key in keys:
                fault = self.faults.get(key)
                if fault is not None and fault.times > 0:
                    self.faults[key] = replace(fault, times=fault.times - 1)
                    return fault
        return Fault()


class _Hub(Handler):
    """Each public method answers one operation of the API; ROUTES says which. `kind` is "models" or "datasets"."""

    def operate(self) -> Answer:
        self.operation, groups = self._route()
        if self.operation == "resolve":
            self.operation, self.shown = self.command.lower(), groups["path"]
            answer = self.resolve(**groups)
        else:
            self.meet(groups.get("name", "*"))
            answer = getattr(self, self.operation)(**groups)
            answer.body = answer.body if self.fault.content is None else self.fault.content
        if self.fault.location is not None:
            answer.status = 302
            answer.headers["Location"] = self.fault.location
        self.fail()
        return answer

    def _route(self) -> tuple[str, dict[str, str]]:
        asked = self.server.name, self.command.replace("HEAD", "GET")
        for server, method, pattern, operation in ROUTES:
            match = re.fullmatch(pattern, self.url.path, re.DOTALL)
            if match and asked == (server, method):
                return operation, {name: unquote(text) for name, text in match.groupdict().items() if text is not None}
        raise Refused(404, None, "Not Found")

    def _repo(self, kind: str, name: str, write: bool = False) -> Repo:
        repo = self.hub.repos(kind).get(name)
        self._authorize(write, hidden=repo is None or repo.private or self.hub.token is not None)
        if repo is None:
            raise Refused(404, "RepoNotFound", "Repository not found")
        return repo

    def _authorize(self, write: bool = False, hidden: bool = False) -> None:
        tokens = [token for token in (self.hub.token, self.hub.write_token) if token is not None]
        if not tokens:
            return
        if self.token is None and (write or hidden):
            # As for a repo that is not there.
            code = None if self.operation in ("create", "list_repos") else "RepoNotFound"
            raise Refused(401, code, "Invalid username or password.")
        if self.token is not None and self.token not in tokens:
            raise Refused(401, None, "Invalid credentials in Authorization header")
        if write and self.token != tokens[-1]:
            raise Refused(403, None, "Forbidden: you must use a write token to upload to a repository")

    def _signed(self) -> None:
        if self.url.query != SIGNATURE:
            raise Refused(403, None, "the signature does not match")

    # ------------------------------------------------------------ reading

    def resolve(self, name: str, revision: str, path: str, kind: str = "models") -> Answer:
        at_hub = self.server.name == "hub"
        if at_hub:
            repo = self._repo(kind, name)
        else:
            self._signed()
            repo = self.hub.repos(kind)[name]
        sha = repo.resolve(revision)
        if path not in repo.commits[sha]:
            raise Refused(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": sha})
        content = repo.commits[sha][path]
        listed = repo.entry(path, content)
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes", "ETag": f'"{listed["oid"]}"'}
        if "lfs" in listed:
            headers["X-Linked-Size"] = str(listed["size"])
            headers["ETag"] = headers["X-Linked-Etag"] = f'"{listed["lfs"]["oid"]}"'
        redirected = "lfs" in listed and self.hub.redirects and at_hub
        if not redirected or self.command == "HEAD":  # a GET has the faults of where it is led
            self.meet(path)
        if redirected:
            place = f"{at(kind, name)}/resolve/{sha}/{quote(path)}"
            return Answer(302, {**headers, "Location": f"{self.hub.cdn_url}/{place}?{SIGNATURE}"})
        if self.command == "HEAD":
            return Answer(200, {**headers, "Content-Length": str(listed["size"])})
        if self.fault.content is not None:
            content = self.fault.content
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None or self.fault.whole:
            return Answer(200, headers, content)
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        if first > last:
            return Answer(416, {**headers, "Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return Answer(206, headers, content[first : last + 1])

    def whoami(self) -> Answer:
        if self.token is None:
            raise Refused(401, None, "Invalid username or password.")
        self._authorize()
        role = "write" if self.hub.write_token in (None, self.token) else "read"
        auth = {"type": "access_token", "accessToken": {"displayName": "local", "role": role}}
        return as_json({"type": "user", "id": USER, "name": USER, "orgs": [], "auth": auth})

    def list_repos(self, kind: str) -> Answer:
        self._authorize(hidden=self.hub.token is not None)
        anonymous = self.token is None and self.hub.write_token is not None
        found = []
        for name, repo in self.hub.repos(kind).items():
            if "main" not in repo.branches or (repo.private and anonymous):
                continue
            info = repo.info(name, repo.resolve("main"), blobs=False)
            wanted = all(word.lower() in name.lower() for word in self.query.get("search", []))
            wanted = wanted and self.query.get("author", [info["author"]]) == [info["author"]]
            if wanted and set(self.query.get("filter", [])) <= set(info["tags"]):
                hidden = set() if "full" in self.query else {"sha", "siblings", "author", "lastModified", "cardData"}
                hidden -= {"cardData"} if "cardData" in self.query else set()
                found.append(self._expanded(info, hidden))
        return as_json(found[: int(self.query.get("limit", ["1000"])[0])])

    def _expanded(self, info: dict[str, Any], hidden: set[str]) -> dict[str, Any]:
        if "expand" in self.query:
            return {key: value for key, value in info.items() if key in ("id", *self.query["expand"])}
        return {key: value for key, value in info.items() if key not in hidden}

    def info(self, kind: str, name: str, revision: str = "main") -> Answer:
        repo = self._repo(kind, name)
        info = repo.info(name, repo.resolve(revision), blobs="blobs" in self.query)
        return as_json(self._expanded(info, set()))

    def tree(self, kind: str, name: str, revision: str, path: str = "") -> Answer:
        repo = self._repo(kind, name)
        return as_json(repo.tree(repo.resolve(revision), path, self.query.get("recursive") == ["true"]))

    def paths_info(self, kind: str, name: str, revision: str) -> Answer:
        repo = self._repo(kind, name)
        asked = parse_qs(self.body().decode()).get("paths", [])
        return as_json([item for item in repo.tree(repo.resolve(revision), "", True) if item["path"] in asked])

    def refs(self, kind: str, name: str) -> Answer:
        repo = self._repo(kind, name)
        answer: dict[str, list[dict[str, str]]] = {"converts": []}
        for key, folder, names in (("branches", "heads", repo.branches), ("tags", "tags", repo.tags)):
            answer[key] = [{"name": n, "ref": f"refs/{folder}/{n}", "targetCommit": sha} for n, sha in names.items()]
        return as_json(answer)

    def commits(self, kind: str, name: str, revision: str) -> Answer:
        repo = self._repo(kind, name)
        answer = []
        for sha in repo.history(repo.resolve(revision)):
            note = repo.notes.get(sha, Note())
            said = {"title": note.title, "message": note.message, "date": stamp(note.date)}
            answer.append({"id": sha, **said, "authors": [{"user": USER}]})
        return as_json(answer)

    # ------------------------------------------------------------ writing

    def create(self) -> Answer:
        self._authorize(write=True)
        kind, name, asked = self._named()
        answer = {"url": f"{self.hub.url}/{at(kind, name)}", "name": name}
        with self.hub.lock:
            if name in self.hub.repos(kind):
                return as_json({"error": f"You already created this {kind[:-1]} repo", **answer}, 409)
            repo = Repo(private=asked.get("visibility") == "private")
            repo.add({".gitattributes": GITATTRIBUTES}, title="initial commit")
            self.hub.repos(kind)[name] = repo
        return as_json(answer)

    def delete(self) -> Answer:
        kind, name, _ = self._named()
        self._repo(kind, name, write=True)
        del self.hub.repos(kind)[name]
        return as_json({})

    def _named(self) -> tuple[str, str, dict[str, Any]]:
        # The repo that a request is about which says so in its body.
        asked = json.loads(self.body())
        kind = asked.get("type") or "model"
        if kind not in ("model", "dataset"):
            raise Refused(400, None, f"no repos of type {kind}")
        return f"{kind}s", f"{asked['organization'] or USER}/{asked['name']}", asked

    def validate(self) -> Answer:
        try:
            front_matter(json.loads(self.body())["content"])
        except ValueError as error:
            return as_json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        return as_json({"errors": [], "warnings": []})

    def preupload(self, kind: str, name: str, revision: str) -> Answer:
        repo = self._repo(kind, name, write=True)
        files = repo.commits[repo.resolve(revision)]
        answer = []
        for asked in json.loads(self.body())["files"]:
            path, large = asked["path"], is_large(asked["path"], asked["size"])
            oid = None
            if path in files:
                oid = hashlib.sha256(files[path]).hexdigest() if large else git_oid(files[path])
            mode = "lfs" if large else "regular"
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return as_json({"files": answer})

    def batch(self, name: str, kind: str = "models") -> Answer:
        repo = self._repo(kind, name, write=True)
        answer = []
        for asked in json.loads(self.body())["objects"]:
            if asked["oid"] not in repo.stored:
                repo.announced[asked["oid"]] = asked["size"]
                upload = {"href": f"{self.hub.cdn_url}/lfs/{kind}/{name}/{asked['oid']}?{SIGNATURE}", "header": {}}
                verify = {"href": f"{self.hub.url}/{at(kind, name)}.git/info/lfs/verify"}
                asked["actions"] = {"upload": upload, "verify": verify}
            answer.append(asked)
        return as_json({"transfer": "basic", "objects": answer})

    def put(self, kind: str, name: str, oid: str) -> Answer:
        self._signed()
        repo = self.hub.repos(kind)[name]
        if repo.announced.get(oid) != self.unread:
            raise Refused(400, None, f"{self.unread} bytes, not {repo.announced.get(oid)}")
        if self.fault.cut_after is not None:
            self.body(self.fault.cut_after)
            raise Broken
        content = self.body()
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refused(400, None, f"the content's sha256 is not {oid}")
        repo.stored[oid] = content
        return Answer(200)

    def verify(self, name: str, kind: str = "models") -> Answer:
        repo, asked = self._repo(kind, name, write=True), json.loads(self.body())
        if asked["oid"] not in repo.stored or len(repo.stored[asked["oid"]]) != asked["size"]:
            raise Refused(404, None, f"no {asked['oid']} of {asked['size']} bytes")
        return as_json({})

    def commit(self, kind: str, name: str, revision: str) -> Answer:
        repo = self._repo(kind, name, write=True)
        with self.hub.lock:
            sha = repo.change(revision, self.body())
        place = f"{self.hub.url}/{at(kind, name)}/commit/{sha}"
        return as_json({"success": True, "commitUrl": place, "commitOid": sha})

    def tag(self, kind: str, name: str, revision: str) -> Answer:
        repo, tag = self._repo(kind, name, write=True), json.loads(self.body())["tag"]
        if tag in repo.tags:
            raise Refused(409, None, f"Tag {tag} already exists")
        repo.tags[tag] = repo.resolve(revision)
        return as_json({}, 201)

    def delete_tag(self, kind: str, name: str, revision: str) -> Answer:
        repo = self._repo(kind, name, write=True)
        if repo.tags.pop(revision, None) is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return as_json({})

    def branch(self, kind: str, name: str, revision: str) -> Answer:
        repo, asked = self._repo(kind, name, write=True), json.loads(self.body())
        if revision in repo.branches:
            raise Refused(409, None, f"Branch {revision} already exists")
        repo.branches[revision] = repo.resolve(asked.get("startingPoint", "main"))
        return as_json({}, 201)

    def delete_branch(self, kind: str, name: str, revision: str) -> Answer:
        repo = self._repo(kind, name, write=True)
        if revision == "main" or repo.branches.pop(revision, None) is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return as_json({})


_ID = "(?P<name>[^/]+/[^/]+?)"
_API = f"/api/(?P<kind>models|datasets)/{_ID}"
_FILES = f"(?:/(?P<kind>datasets))?/{_ID}"
_REVISION = "/(?P<revision>[^/]+)"
ROUTES = [
    ("hub", "GET", f"{_FILES}/resolve{_REVISION}/(?P<path>.+)", "resolve"),
    ("cdn", "GET", f"{_FILES}/resolve{_REVISION}/(?P<path>.+)", "resolve"),
    ("cdn", "PUT", f"/lfs/(?P<kind>models|datasets)/{_ID}/(?P<oid>[0-9a-f]+)", "put"),
    ("hub", "GET", "/api/whoami-v2", "whoami"),
    ("hub", "GET", "/api/(?P<kind>models|datasets)", "list_repos"),
    ("hub", "GET", f"{_API}(?:/revision{_REVISION})?", "info"),
    ("hub", "GET", f"{_API}/tree{_REVISION}(?:/(?P<path>.*))?", "tree"),
    ("hub", "POST", f"{_API}/paths-info{_REVISION}", "paths_info"),
    ("hub", "GET", f"{_API}/refs", "refs"),
    ("hub", "GET", f"{_API}/commits{_REVISION}", "commits"),
    ("hub", "POST", "/api/repos/create", "create"),
    ("hub", "DELETE", "/api/repos/delete", "delete"),
    ("hub", "POST", "/api/validate-yaml", "validate"),
    ("hub", "POST", f"{_API}/preupload{_REVISION}", "preupload"),
    ("hub", "POST", rf"{_FILES}\.git/info/lfs/objects/batch", "batch"),
    ("hub", "POST", rf"{_FILES}\.git/info/lfs/verify", "verify"),
    ("hub", "POST", f"{_API}/commit{_REVISION}", "commit"),
    ("hub", "POST", f"{_API}/tag{_REVISION}", "tag"),
    ("hub", "DELETE", f"{_API}/tag{_REVISION}", "delete_tag"),
    ("hub", "POST", f"{_API}/branch{_REVISION}", "branch"),
    ("hub", "DELETE", f"{_API}/branch{_REVISION}", "delete_branch"),
]
