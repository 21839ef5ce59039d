"""Small screens for tests: AnnData with known labels and counts, .h5ad files of them, and where real ones lie."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from perturbdiff.config import Config, DataConfig, SplitConfig, load_config
from perturbdiff.data.screen import Screen

ROOT = Path(__file__).resolve().parents[1]


def screen_with_cells(conditions: Iterable[tuple[str, str, str, int]], n_genes: int = 12, seed: int = 0):
    """AnnData of counts with n cells of each (perturbation, cell_type, batch, n), in shuffled order."""
    rng = np.random.default_rng(seed)
    labels = [condition[:3] for condition in conditions for _ in range(condition[3])]
    obs = pd.DataFrame(
        [labels[i] for i in rng.permutation(len(labels))],
        columns=["perturbation", "cell_type", "batch"],
        index=[f"cell_{i}" for i in range(len(labels))],
    )
    means = rng.lognormal(0.5, 1.2, n_genes)
    counts = rng.poisson(means * rng.lognormal(0, 0.3, (len(labels), 1))).astype(np.float32)
    var = pd.DataFrame(index=[f"gene_{g}" for g in range(n_genes)])
    return anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=var)


def counts_screen(n_genes: int = 12, n: int = 6, seed: int = 0):
    """Perturbations A, B, A+B and control, 2 cell types, 2 batches; n cells a condition and n + 3 controls."""
    return screen_with_cells(
        [
            (perturbation, cell_type, batch, n + 3 if perturbation == "control" else n)
            for perturbation in ("control", "A", "B", "A+B")
            for cell_type in ("T", "NK")
            for batch in ("b1", "b2")
        ],
        n_genes,
        seed,
    )


def log1p_cp10k(counts) -> np.ndarray:
    """Dense float64 log1p of counts per 10,000 of the row; rows without counts stay zero."""
    dense = np.asarray(counts.todense() if sparse.issparse(counts) else counts, dtype=np.float64)
    total = dense.sum(axis=1, keepdims=True)
    return np.log1p(np.divide(dense * 1e4, total, out=np.zeros_like(dense), where=total > 0))


def read(adata: anndata.AnnData, **settings: object) -> Screen:
    """The screen of an AnnData in memory."""
    return Screen.from_parts(adata.X, adata.obs, adata.var, DataConfig(screen="memory", **settings), "memory")


def written(adata: anndata.AnnData, path: Path, compression: str | None = "gzip") -> Path:
    adata.write_h5ad(path, compression=compression)
    return path


def config_for(
    screen: str | Path = "memory", out: str | Path = "unused", *words: str, split: SplitConfig | None = None
):
    """Settings of a run with sets of four cells."""
    given: dict[str, object] = {"out": str(out), "data": {"screen": str(screen)}}
    if split is not None:
        given["split"] = vars(split)
    config: Config = load_config(None, ["data.set_size=4", "data.sets_per_batch=3", *words], given)
    return config


def shared(variable: str, default: str, name: str) -> Path:
    """A path among the data beside the project; skips the test where it is not."""
    path = Path(os.environ.get(variable, ROOT / ".." / "shared" / default)) / name
    if not path.exists():
        pytest.skip(f"{path} is not here; set {variable} to the folder that holds {name}")
    return path


def real_screen(name: str) -> Path:
    return shared("PERTURBDIFF_REAL_DATA", "data", name)


def quality_file(name: str) -> Path:
    return shared("PERTURBDIFF_QUALITY", "quality", name)


def never_returns(path: Path) -> None:
    """Give the free room of each heap no size: the library goes round and round in it."""
    content = bytearray(path.read_bytes())
    heaps = [found.start() for found in re.finditer(b"GCOL\1\0\0\0", content)]
    for heap in heaps:
        place, end = heap + 16, heap + int.from_bytes(content[heap + 8 : heap + 16], "little") - 16
        while place <= end and content[place : place + 2] != b"\0\0":
            place += 16 + (int.from_bytes(content[place + 8 : place + 16], "little") + 7) // 8 * 8
        if place <= end:
            content[place + 8 : place + 16] = bytes(8)
    path.write_bytes(content)
