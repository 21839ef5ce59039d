"""Model folders and atlases from wherever they are: a folder here, a registered name, a repo of the Hub at one commit.

Files of the Hub come through its cache, small ones first: what they say bounds what is fetched next.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from perturbdiff.cards import MAX_CARD_BYTES
from perturbdiff.files import printable
from perturbdiff.hub.metadata import ModelMetadata, parse_metadata
from perturbdiff.hub.model_folder import (
    ADAPTER_CONFIG,
    CARD,
    CONFIG,
    EVALUATION,
    JSON_FILES,
    MAX_JSON_BYTES,
    MEANS,
    SPLIT,
    WEIGHTS_INDEX,
    ModelFolder,
    is_replaced_now,
    read_folder,
)
from perturbdiff.hub.registry import find_entry
from perturbdiff.hub_client import (
    MAX_CONNECT,
    REPO_ID,
    asked_again,
    check_connection,
    hub_errors,
    name_and_revision,
    no_folder,
)

LIBRARY = "perturbdiff"  # as the front matter of our cards has it
READ_AGAIN = 5  # times, a folder that is replaced while it is read
SMALL_FILES = (CONFIG, *JSON_FILES, EVALUATION, SPLIT, MEANS, WEIGHTS_INDEX, ADAPTER_CONFIG)


@dataclass(frozen=True)
class ModelSource:
    """A model folder that was found; of one on the Hub, the small files are here.

    name
        The folder's, or owner/name.
    folder
        Where its files are, or will be.
    repo, commit
        None for a folder that is not of the Hub.
    sha256
        What a registry says that config.json must hash to.
    """

    name: str
    folder: Path
    repo: str | None = None
    commit: str | None = None
    sha256: str | None = None
    subfolder: str = ""
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    token: str | bool | None = field(default=None, repr=False)
    sizes: dict[str, int] | None = field(default=None, repr=False)  # of the repo's files as listed; None when offline

    def read(self) -> tuple[ModelFolder, ModelMetadata]:
        """Its JSON, raw and as our types.

        Raises as `read_folder` and `parse_metadata`, and ValueError where it is not what the registry states.
        """
        folder = read_folder(self.folder)
        if self.sha256 is not None and folder.sha256 != self.sha256:
            raise ValueError(
                f"{self.name}: config.json has sha256 {folder.sha256}, not {self.sha256} as the registry states; it "
                "is another model than the registered one."
            )
        return folder, parse_metadata(folder)

    def fetch_tensors(self, folder: ModelFolder, max_bytes: int) -> None:
        """Bring weights, features and golden check of this commit here; nothing to do for a folder.

        Raises
        ------
        ValueError
            They are larger than `max_bytes`, what the architecture can need.
        OSError
            As `hub_errors`.
        """
        if self.repo is None:
            return
        self.check_sizes(folder, max_bytes)
        files = [self.subfolder + name for name in folder.tensor_files]
        # Without sizes, only what is here already.
        _snapshot(self.repo, self.commit, files, self.cache_dir, self.sizes is None, self.token)

    def check_sizes(self, folder: ModelFolder, max_bytes: int) -> None:
        """Compare what the Hub lists with `max_bytes`. Raises ValueError."""
        if (total := self.listed_bytes(folder.tensor_files)) > max_bytes:
            raise ValueError(
                f"the tensors of {self.name} have {total:,} bytes; its {CONFIG} describes a model of at most "
                f"{max_bytes:,}. They do not belong together: nothing was downloaded."
            )

    def listed_bytes(self, files: Iterable[str]) -> int:
        """Size of files as the Hub lists them; 0 of those that it does not."""
        return sum((self.sizes or {}).get(self.subfolder + name, 0) for name in files)


def find_model(
    path_or_repo_id: str | Path,
    revision: str | None = None,
    subfolder: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> ModelSource:
    """Find a model folder: a folder here, else a registered name, else a repo of the Hub (`revision` at one commit).

    owner/name@v1 is a repo at a revision; the folder of a run stands for its model/.

    Raises
    ------
    FileNotFoundError, ValueError
        None of these; a subfolder that leads out of the folder; a revision of a folder.
    OSError
        As `hub_errors`.
    """
    how = revision, subfolder, cache_dir, local_files_only, token
    for _ in range(READ_AGAIN):
        wait_while_replaced(path_or_repo_id)
        try:
            return _find(path_or_repo_id, *how)
        except FileNotFoundError:
            # Unless it was replaced between the two looks, and is there again or about to be.
            if not Path(path_or_repo_id).is_dir() and not is_replaced_now(path_or_repo_id):
                raise
    return _find(path_or_repo_id, *how)


def wait_while_replaced(folder: str | Path) -> None:
    """A moment, unless whoever replaces it was killed in it."""
    for _ in range(50):
        if not is_replaced_now(folder):
            return
        time.sleep(0.1)


def _find(
    path_or_repo_id: str | Path,
    revision: str | None,
    subfolder: str | None,
    cache_dir: str | Path | None,
    local_files_only: bool,
    token: str | bool | None,
) -> ModelSource:
    (name, inline), sha256 = name_and_revision(str(path_or_repo_id)), None
    if inline is not None and revision is not None:
        raise ValueError(f"{path_or_repo_id} names a revision already; leave revision={revision!r} out.")
    revision = revision or inline
    inner = PurePosixPath(subfolder or "")
    if inner.is_absolute() or ".." in inner.parts or re.search(r"[*?\[\\]", str(inner)):
        raise ValueError(f"subfolder ({subfolder!r}) must be a plain path inside of the repo.")
    folder = Path(name)
    is_folder = folder.is_dir()  # looked at once: a run that replaces it must not turn its path into a repo id
    if not is_folder and not REPO_ID.fullmatch(name):
        if "/" in name or "\\" in name or name.startswith(("~", ".")):
            raise FileNotFoundError(f"no such folder here ({printable(name)}); give a folder made by save_pretrained.")
        entry = find_entry(name)
        if revision is None:
            revision, sha256 = entry.revision, entry.sha256
        name, folder = entry.repo, Path(entry.repo)
        is_folder = folder.is_dir()
    if is_folder:
        if revision is not None:
            raise ValueError(f"{name} is a folder and has no revision {revision!r}; leave the revision out.")
        if not subfolder and not (folder / CONFIG).is_file() and (folder / "model" / CONFIG).is_file():
            folder /= "model"  # of a run
        found = ModelSource((folder / inner).resolve().name, folder / inner, sha256=sha256)
        return replace(found, cache_dir=cache_dir, local_files_only=local_files_only, token=token)
    prefix = f"{inner}/" if subfolder else ""
    small = [prefix + file for file in SMALL_FILES]
    commit, sizes, problem = revision, None, None  # type: str | None, dict[str, int] | None, OSError | None
    if not local_files_only:
        try:
            commit, sizes = _listed(name, revision, token)
        except (ConnectionError, FileNotFoundError, PermissionError) as error:
            problem = error  # the cache may have it all
    if large := [file for file in small if (sizes or {}).get(file, 0) > MAX_JSON_BYTES]:
        raise ValueError(f"{large[0]} of {name} has {sizes[large[0]]:,} bytes; at most {MAX_JSON_BYTES:,} are read.")  # type: ignore[index]
    try:
        snapshot = _snapshot(name, commit, small, cache_dir, sizes is None, token)
    except FileNotFoundError as error:
        if isinstance(problem, ConnectionError):
            problem = ConnectionError(
                f"{problem} It is not whole in the cache either: connect, or copy a folder here and give its path."
            )
        problem = problem or error
        may_be_folder = name == str(path_or_repo_id) and not isinstance(problem, PermissionError)
        raise (no_folder(name, problem) if may_be_folder else problem) from None
    if not (snapshot / inner / CONFIG).is_file():
        raise FileNotFoundError(
            f"{_called(name, revision)} has no {prefix}{CONFIG}: it holds no model folder; `perturbdiff hub list` "
            "shows repos that are one."
        )
    if sizes is not None and commit != revision:
        _note_revision(name, prefix + CONFIG, revision, cache_dir, token)
    return ModelSource(
        name, snapshot / inner, name, snapshot.name, sha256, prefix, cache_dir, local_files_only, token, sizes
    )


def own_folder(path: str | Path) -> Path:
    """The model folder at a path, or in the folder of a run, to be written to.

    Raises FileNotFoundError where there is none, as for a repo.
    """
    if not Path(path).is_dir():
        raise FileNotFoundError(f"no such folder here ({printable(str(path))}); give a folder made by save_pretrained.")
    return find_model(path).folder


def pull(
    repo: str,
    repo_type: str,
    commit: str,
    files: Sequence[str],
    out: str | Path,
    check: Callable[[Path], object],
    token: str | bool | None = None,
    subfolder: str = "",
) -> None:
    """Download files of a commit to a folder of their own; it appears when `check` has passed.

    `subfolder`, with a / at its end, is where in the repo they are.

    A pull that was interrupted goes on with the same call, from `.NAME.partial` beside `out`.

    Raises
    ------
    FileExistsError
        `out` exists.
    OSError, ValueError
        As `hub_errors`; what `check` raises, and then nothing is kept.
    """
    from huggingface_hub import snapshot_download

    out = Path(out)
    if out.exists():
        raise FileExistsError(f"--out {out} exists; choose another name or remove it.")
    partial = out.parent / f".{out.name}.partial"
    if (partial / "commit").exists() and (partial / "commit").read_text() != f"{repo} {commit}":
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    (partial / "commit").write_text(f"{repo} {commit}")
    with hub_errors(f"{repo_type} {repo!r}"):
        snapshot_download(
            repo,
            repo_type=repo_type,
            revision=commit,
            allow_patterns=[subfolder + name for name in files],
            local_dir=partial / "files",
            token=token,
        )
    shutil.rmtree(partial / "files" / ".cache", ignore_errors=True)
    try:
        check(partial / "files" / subfolder)
    except (OSError, ValueError):
        shutil.rmtree(partial)
        raise
    (partial / "files" / subfolder).rename(out)
    shutil.rmtree(partial)


def pull_model(source: ModelSource, out: str | Path, check: Callable[[Path], object]) -> None:
    """Download a model that was found to a folder of its own. As `pull`; ValueError if it is a folder already.

    What is larger than its settings can need is not downloaded, but a ValueError.
    """
    if source.repo is None or source.commit is None:
        raise ValueError(f"{source.folder} is a folder already; give the name or repo id of a model on the Hub.")
    if source.sizes is None:
        raise ConnectionError(f"model {source.repo!r} is pulled from the Hub, which cannot be reached; connect.")
    from perturbdiff.hub.tensors import denoiser_of, max_tensor_bytes  # here: finding a model needs no torch

    folder, metadata = source.read()
    source.check_sizes(folder, max_tensor_bytes(denoiser_of(metadata)))
    card = [CARD] if source.listed_bytes([CARD]) <= MAX_CARD_BYTES else []
    pull(source.repo, "model", source.commit, [*folder.files, *card], out, check, source.token, source.subfolder)


def list_models(owner: str | None = None, search: str | None = None) -> list[str]:
    """Models on the Hub that say they are of this library: a line each, the newest first. Raises as `hub_errors`."""
    from huggingface_hub import HfApi

    check_connection("the list of models")
    with hub_errors("the list of models"):
        found = list(HfApi().list_models(filter=LIBRARY, author=owner, search=search, sort="last_modified"))
    return [f"{printable(model.id)}{' (private)' if model.private else ''}" for model in found]


def _listed(repo: str, revision: str | None, token: str | bool | None) -> tuple[str, dict[str, int]]:
    # Commit and sizes of its files.
    import httpx2
    from huggingface_hub import HfApi, constants

    timeout: Any = httpx2.Timeout(constants.HF_HUB_ETAG_TIMEOUT, connect=MAX_CONNECT)
    with hub_errors(_called(repo, revision)):
        info = asked_again(
            lambda: HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=timeout, token=token)
        )
    if not re.fullmatch("[0-9a-f]{40}", info.sha or ""):  # it becomes the name of a folder
        raise ValueError(f"{_called(repo, revision)}: {printable(str(info.sha))[:80]!r} is no commit; is this a Hub?")
    return info.sha or "", {file.rfilename: file.size or 0 for file in info.siblings or []}


def _note_revision(
    repo: str, file: str, revision: str | None, cache_dir: str | Path | None, token: str | bool | None
) -> None:
    # In the cache, so that a branch or tag is known offline; files come by their commit.
    from huggingface_hub import hf_hub_download

    with hub_errors(_called(repo, revision)):
        hf_hub_download(repo, file, revision=revision, cache_dir=cache_dir, token=token)


def _snapshot(
    repo: str,
    revision: str | None,
    files: Sequence[str],
    cache_dir: str | Path | None,
    local_files_only: bool,
    token: str | bool | None,
) -> Path:
    from huggingface_hub import snapshot_download

    with hub_errors(_called(repo, revision)):
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=list(files),
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                token=token,
            )
        )


def _called(repo: str, revision: str | None) -> str:
    return f"model {repo!r}" + ("" if revision is None else f" at revision {revision!r}")
