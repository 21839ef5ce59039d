"""Push model folders and atlases to the Hub: one commit, pulled back and verified, tagged last."""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from perturbdiff._version import __version__
from perturbdiff.cards import read_card, renewed, with_own_text
from perturbdiff.files import few, sha256
from perturbdiff.hub.model_folder import CARD
from perturbdiff.hub_client import REPO_ID, hub_errors, refuse_address

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@dataclass(frozen=True)
class Publication:
    """What a push left on the Hub."""

    repo: str
    url: str
    commit: str
    tag: str | None


def publish(
    folder: str | Path,
    files: Sequence[str],
    repo: str,
    repo_type: str,
    own_files: re.Pattern[str],
    check: Callable[[Path], object],
    pull_back: Callable[[str], bool],
    card: str,
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    commit_message: str | None = None,
    texts: dict[str, str] | None = None,
    token: str | bool | None = None,
) -> Publication:
    """Push files of a folder as one commit.

    Parameters
    ----------
    files
        Paths in the folder.
    own_files
        Which paths of the repo are of such a folder: those that are there and not pushed now are deleted.
    check
        Called with a folder of the files that were pulled back; raises where something is wrong.
    pull_back
        Which of the files are pulled; of the others, the size and hash that the Hub lists are compared.
    card
        README.md as generated. What its owner wrote into that of the repo, or else of the folder, stays in it; one
        without generated parts stays as it is, with a warning.
    revision
        Branch, made where there is none; main if None.
    tag
        Set when everything has passed.
    texts
        Further files by path.

    Raises
    ------
    FileExistsError
        The tag is there already.
    PermissionError
        `private` was asked for, and the repo is public.
    ValueError
        Not owner/name; what came back is not what was pushed.
    OSError
        No room here for what is pulled back; as `hub_errors`. No tag is set after an error.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    refuse_address(repo)
    if not REPO_ID.fullmatch(repo):
        raise ValueError(f"{repo!r} is no name of a repo; write owner/name.")
    folder, texts = Path(folder), dict(texts or {})
    _check_room(sum((folder / path).stat().st_size for path in files if pull_back(path)))
    api = HfApi(token=token, library_name="perturbdiff", library_version=__version__)
    with hub_errors(f"{repo_type} {repo!r}"):
        url = api.create_repo(repo, repo_type=repo_type, private=private, exist_ok=True)
        if private and not api.repo_info(repo, repo_type=repo_type).private:
            raise PermissionError(f"{repo_type} {repo!r} is public; make it private on its page, or push elsewhere.")
        if tag is not None and tag in [ref.name for ref in api.list_repo_refs(repo, repo_type=repo_type).tags]:
            raise FileExistsError(f"{repo_type} {repo!r} has a tag {tag!r} already; choose another.")
        if revision is not None:
            api.create_branch(repo, branch=revision, repo_type=repo_type, exist_ok=True)
        there = api.list_repo_files(repo, repo_type=repo_type, revision=revision)
        texts[CARD] = _with_own_text(api, card, folder, repo, repo_type, revision, CARD in there)
        stale = [path for path in there if own_files.fullmatch(path) and path not in {*files, *texts}]
        pushed = {path: texts[path].encode() if path in texts else folder / path for path in {*files, *texts}}
        commit = api.create_commit(
            repo,
            [CommitOperationAdd(path, content) for path, content in sorted(pushed.items())]
            + [CommitOperationDelete(path) for path in stale],
            commit_message=commit_message or f"Push {folder.resolve().name}",
            repo_type=repo_type,
            revision=revision,
        ).oid
    _verify(api, pushed, repo, repo_type, commit, check, pull_back)
    if tag is not None:
        with hub_errors(f"{repo_type} {repo!r}"):
            api.create_tag(repo, tag=tag, revision=commit, repo_type=repo_type)
    return Publication(repo, str(url), commit, tag)


def _check_room(n_bytes: int) -> None:
    # Before anything is sent: a push that cannot be verified would stay without its tag.
    where = tempfile.gettempdir()
    if (free := shutil.disk_usage(where).free) < n_bytes:
        raise OSError(
            f"what is pushed is pulled back and checked; it has {n_bytes:,} bytes, and {where} has room for {free:,}: "
            "make room, or set TMPDIR."
        )


def _with_own_text(
    api: HfApi, card: str, folder: Path, repo: str, repo_type: str, revision: str | None, is_there: bool
) -> str:
    here, there = read_card(folder / CARD), None
    if is_there:
        with tempfile.TemporaryDirectory() as temporary:
            there = read_card(
                Path(api.hf_hub_download(repo, CARD, repo_type=repo_type, revision=revision, local_dir=temporary))
            )
    if there is None or with_own_text(card, there) == card:  # nobody wrote into that of the repo
        return renewed(card, here, str(folder))
    if here is not None and with_own_text(card, here) not in (card, with_own_text(card, there)):
        warnings.warn(
            f"the {CARD} of {repo} and that of {folder} were both edited: that of {repo} stays",
            UserWarning,
            stacklevel=2,
        )
    return renewed(card, there, repo)


def _verify(
    api: HfApi,
    pushed: dict[str, bytes | Path],
    repo: str,
    repo_type: str,
    commit: str,
    check: Callable[[Path], object],
    pull_back: Callable[[str], bool],
) -> None:
    from huggingface_hub import RepoFile

    pulled = [path for path in pushed if pull_back(path)]
    with tempfile.TemporaryDirectory() as temporary:
        with hub_errors(f"{repo_type} {repo!r}"):
            back = Path(
                api.snapshot_download(
                    repo, repo_type=repo_type, revision=commit, allow_patterns=pulled, local_dir=temporary
                )
            )
            listed = {
                file.path: (file.size, file.lfs.sha256 if file.lfs else None)
                for start in range(0, len(pushed), 500)
                for file in api.get_paths_info(
                    repo, sorted(pushed)[start : start + 500], revision=commit, repo_type=repo_type
                )
                if isinstance(file, RepoFile)
            }
        wrong = []
        for path, content in pushed.items():
            size, digest = listed.get(path, (None, None))
            right_size = len(content) if isinstance(content, bytes) else content.stat().st_size
            right = hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else sha256(content)
            came_back = sha256(back / path) if path in pulled and (back / path).is_file() else None
            if size != right_size or digest not in (None, right) or (path in pulled and came_back != right):
                wrong.append(path)
        if wrong:
            raise ValueError(
                f"commit {commit} of {repo} is not what was pushed: {few(sorted(wrong))} came back different or not at "
                "all. No tag was set; push again."
            )
        check(back)
