"""What the local Hub keeps: the files of every commit, and what the real Hub says about them."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

LFS_SUFFIXES = (".safetensors", ".parquet", ".npz")
LARGEST_REGULAR = 10 * 1024**2  # bytes; what is larger goes to the large file storage whatever its name
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
Files = dict[str, bytes]  # by path


class Refused(Exception):
    """An answer that says no: a status, and a code and message in the headers as the Hub sends them."""

    def __init__(self, status: int, code: str | None, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers or {}


@dataclass(frozen=True)
class Note:
    """What a commit says beside its files."""

    parent: str = ""
    title: str = ""
    message: str = ""
    date: datetime = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass
class Repo:
    """A model or a data set. All of it may be set by hand, for a server that lies."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)  # by 40 hex digits; any path may stand there
    branches: dict[str, str] = field(default_factory=dict)  # commits by name
    tags: dict[str, str] = field(default_factory=dict)
    notes: dict[str, Note] = field(default_factory=dict)  # by commit; those set by hand may have none
    sizes: dict[str, int] = field(default_factory=dict)  # by path: what is claimed instead of the file's own
    stored: dict[str, bytes] = field(default_factory=dict)  # the large file storage, by sha256
    announced: dict[str, int] = field(default_factory=dict)  # sizes of uploads that were granted, by sha256

    def commit(self, folder: Path, branch: str = "main") -> str:
        """Make the files of a folder the newest commit of a branch; its 40 hex digits follow from all before it."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return self.add({path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}, branch)

    def add(self, files: Files, branch: str = "main", title: str = "commit", message: str = "") -> str:
        """Make these files the newest commit of a branch."""
        parent = self.branches.get(branch, "")
        listing = "".join(f"{path} {hashlib.sha256(files[path]).hexdigest()}\n" for path in sorted(files))
        sha = hashlib.sha1(f"{parent}\n{title}\n{message}\n{listing}".encode()).hexdigest()
        self.commits[sha] = files
        self.notes[sha] = Note(parent, title, message, datetime.now(UTC))
        self.stored |= {hashlib.sha256(files[path]).hexdigest(): files[path] for path in files}
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str:
        """The commit of a branch, tag or commit."""
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def history(self, sha: str) -> list[str]:
        """The commit and those before it."""
        before = []
        while sha:
            before.append(sha)
            sha = self.notes.get(sha, Note()).parent
        return before

    def entry(self, path: str, content: bytes) -> dict[str, Any]:
        """A file in a listing: of a large one, `oid` and `size` are also those of its content."""
        size = self.sizes.get(path, len(content))
        if not is_large(path, len(content)):
            return {"type": "file", "path": path, "oid": git_oid(content), "size": size}
        sha256 = hashlib.sha256(content).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n".encode()
        lfs = {"oid": sha256, "size": size, "pointerSize": len(pointer)}
        return {"type": "file", "path": path, "oid": git_oid(pointer), "size": size, "lfs": lfs}

    def tree(self, sha: str, folder: str, recursive: bool) -> list[dict[str, Any]]:
        """The files below a folder ("": all), with the folders that they are in."""
        files = self.commits[sha]
        prefix = f"{folder}/" if folder else ""
        below = [path for path in files if path.startswith(prefix)]
        if folder and not below:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist on {sha}", {"X-Repo-Commit": sha})
        shown = [path for path in below if recursive or "/" not in path.removeprefix(prefix)]
        parents = {path[: i.start()] for path in below for i in re.finditer("/", path) if i.start() > len(prefix)}
        folders = [path for path in sorted(parents) if recursive or "/" not in path.removeprefix(prefix)]
        listed = [{"type": "directory", "path": path, "oid": git_oid(path.encode()), "size": 0} for path in folders]
        return listed + [self.entry(path, files[path]) for path in shown]

    def info(self, name: str, sha: str, blobs: bool) -> dict[str, Any]:
        """What model_info and dataset_info answer; `blobs` adds sizes and hashes."""
        try:
            card = front_matter(self.commits[sha].get("README.md", b"").decode())
        except ValueError:
            card = {}
        siblings = []
        for path, content in self.commits[sha].items():
            listed = self.entry(path, content)
            sibling: dict[str, Any] = {"rfilename": path}
            if blobs:
                sibling |= {"size": listed["size"], "blobId": listed["oid"]}
            if blobs and "lfs" in listed:
                lfs = listed["lfs"]
                sibling["lfs"] = {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": lfs["pointerSize"]}
            siblings.append(sibling)
        first, last = (self.notes.get(commit, Note()).date for commit in (self.history(sha)[-1], sha))
        answer = {"id": name, "author": name.split("/")[0], "sha": sha, "private": self.private, "tags": tags(card)}
        answer |= {"lastModified": stamp(last), "createdAt": stamp(first), "gated": False, "disabled": False}
        answer |= {"downloads": 0, "likes": 0, "siblings": siblings, "cardData": card}
        return answer | {key: card[key] for key in ("library_name", "pipeline_tag") if key in card}

    def change(self, branch: str, body: bytes) -> str:
        """Carry out the body of a commit request, one JSON object a line; the new commit."""
        if branch not in self.branches:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {branch}")
        head = self.branches[branch]
        files, header = dict(self.commits[head]), {}
        for line in filter(None, body.split(b"\n")):
            key, value = (json.loads(line)[name] for name in ("key", "value"))
            if key == "header":
                header = value
                if not head.startswith(header.get("parentCommit", "")):
                    raise Refused(412, None, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self._uploaded(value)
            elif key == "deletedFile" and value["path"] in files:
                del files[value["path"]]
            elif key == "deletedFolder" and any(path.startswith(value["path"].rstrip("/") + "/") for path in files):
                prefix = value["path"].rstrip("/") + "/"
                files = {path: content for path, content in files.items() if not path.startswith(prefix)}
            elif key in ("deletedFile", "deletedFolder"):
                raise Refused(404, "EntryNotFound", f"A file with this name doesn't exist: {value['path']}")
            else:
                raise Refused(400, None, f"no such operation: {key}")
        return self.add(files, branch, header.get("summary", ""), header.get("description", ""))

    def _uploaded(self, value: dict[str, Any]) -> bytes:
        content = self.stored.get(value["oid"])
        if content is None:
            raise Refused(400, None, f"LFS pointer pointed to a file that does not exist: {value['path']}")
        if len(content) != value.get("size", len(content)):
            raise Refused(400, None, f"{value['path']} has {len(content)} bytes, not {value['size']}")
        return content


def is_large(path: str, size: int) -> bool:
    """Whether a file goes to the large file storage; the client sends empty ones as regular whatever it is told."""
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > LARGEST_REGULAR)


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def stamp(date: datetime) -> str:
    return date.strftime("%Y-%m-%dT%H:%M:%S.000Z")


def front_matter(readme: str) -> dict[str, Any]:
    """The YAML at the head of a card, {} if there is none; a ValueError says what is wrong with it."""
    found = re.match(r"---\r?\n(.*?\n)?---[ \t]*\r?(\n|$)", readme, re.DOTALL)
    try:
        card = yaml.safe_load(found[1] or "{}") if found else {}
    except yaml.YAMLError as error:
        raise ValueError(f"the metadata is not YAML: {error}") from error
    if not isinstance(card, dict):
        raise ValueError(f"the metadata is not a mapping but {type(card).__name__}")
    return card


def tags(card: dict[str, Any]) -> list[str]:
    """Tags as the Hub derives them: those of the card, its library, and `license:`, `dataset:`, `base_model:`."""

    def several(key: str) -> Iterable[str]:
        value = card.get(key) or []
        return [str(one) for one in value] if isinstance(value, list) else [str(value)]

    found = [*several("library_name"), *several("tags")]
    for key, prefix in (("license", "license"), ("datasets", "dataset"), ("base_model", "base_model")):
        found += [f"{prefix}:{value}" for value in several(key)]
    return list(dict.fromkeys(found))
