"""Atlases on the Hub: push a folder, pull a repo; training streams from the repo id as it is."""

from __future__ import annotations

import re
from pathlib import Path

from perturbdiff.atlas.card import atlas_card
from perturbdiff.atlas.format import CHECKSUMS, SMALL_FILES
from perturbdiff.atlas.store import Atlas
from perturbdiff.hub.download import pull
from perturbdiff.hub.push import Publication, publish

OWN_FILES = re.compile(r"data/cells-[^/]*\.parquet")


def push_atlas(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    commit_message: str | None = None,
) -> Publication:
    """Verify an atlas, push it as one commit, compare with what the Hub then has, tag last.

    Manifest, genes and conditions are pulled back; of the shards, the size and sha256 that the Hub lists are compared.
    Shards that are there from an earlier push, also one that broke off, are not sent again. Parameters and errors as
    `publish`, and those of `Atlas.verify`.
    """
    atlas = Atlas.open(folder)
    if atlas.folder is None:
        raise ValueError(f"{folder} is on the Hub already; give the folder of an atlas.")
    atlas.verify()
    return publish(
        folder,
        [*atlas.digests, CHECKSUMS],
        repo_id,
        "dataset",
        own_files=OWN_FILES,
        check=lambda back: None,  # every file is the one that was verified
        pull_back=lambda path: path in (*SMALL_FILES, CHECKSUMS),
        card=atlas_card(atlas.info, repo_id),
        private=private,
        revision=revision,
        tag=tag,
        commit_message=commit_message,
    )


def pull_atlas(repo_id: str, out: str | Path, revision: str | None = None) -> Atlas:
    """Download an atlas to a folder of its own, verified: every hash, every row.

    Raises
    ------
    FileExistsError
        `out` exists.
    OSError, ValueError
        As `Atlas.open`, `Atlas.verify` and `pull`.
    """
    there = Atlas.open(repo_id, revision)
    if there.commit is None:
        raise ValueError(f"{repo_id} is a folder already; give the repo id of a data set on the Hub.")
    files = [*there.digests, CHECKSUMS]
    pull(repo_id, "dataset", there.commit, files, out, check=lambda folder: Atlas.open(folder).verify())
    return Atlas.open(out)
