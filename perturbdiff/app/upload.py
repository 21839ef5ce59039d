"""An uploaded file, read by a process of its own, which ends alone where it hangs or grows in the HDF5 library."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from anndata import AnnData

from perturbdiff.config import ObsColumns
from perturbdiff.data.h5ad import PARTS, open_h5ad, read_h5ad_parts, unpacked_bytes
from perturbdiff.data.screen import controls_and_perturbed
from perturbdiff.files import short, typed

MAX_SAID = 1 << 16  # characters of what the process says
CONTROLS, PERTURBED = "controls.h5ad", "perturbed.h5ad"
WRITE_ANEW = "write it with AnnData and upload that"


@dataclass(frozen=True)
class Limits:
    """What an uploaded file may take."""

    file_bytes: int = 500 << 20
    cells: int = 100_000  # in the file, perturbed ones included
    unpacked_bytes: int = 1 << 30  # X, obs and var: a compressed file may be a thousand times larger in memory
    memory_bytes: int = 4 << 30  # of the process that reads it, beyond what it has at its start
    seconds: int = 60  # of CPU


def read_upload(
    path: str | Path, name: str, obs: ObsColumns, limits: Limits, most: int
) -> tuple[AnnData, AnnData, int]:
    """Cells of an uploaded .h5ad as `controls_and_perturbed` gives them, and how many are in the file.

    The process writes them into a file of its own, which is read as any other: nothing of the upload is opened here.

    Raises
    ------
    ValueError
        As `control_cells`; beyond the limits.
    """
    if (size := Path(path).stat().st_size) > limits.file_bytes:
        raise ValueError(f"{name} has {_megabytes(size)}; the app takes at most {_megabytes(limits.file_bytes)}.")
    with tempfile.TemporaryDirectory(prefix="perturbdiff-upload-") as folder:
        job = {"path": str(path), "out": folder, "obs": asdict(obs), "limits": asdict(limits), "most": most}
        command = [sys.executable, "-m", __name__]
        try:
            ended = subprocess.run(
                command, input=json.dumps(job), stdout=subprocess.PIPE, text=True, timeout=10 * limits.seconds
            )
        except subprocess.TimeoutExpired as error:
            raise ValueError(f"{name} could not be read in time; {WRITE_ANEW}.") from error
        if ended.returncode:  # ended by its limits, or by the library
            raise ValueError(
                f"{name} could not be read within {limits.seconds} seconds and {_megabytes(limits.memory_bytes)} of "
                f"memory; {WRITE_ANEW}."
            )
        said = json.loads(ended.stdout[:MAX_SAID])
        if "error" in said:
            raise ValueError(str(said["error"]).replace(str(path), name))
        controls, perturbed = (_taken(Path(folder) / file) for file in (CONTROLS, PERTURBED))
        return controls, perturbed, int(said["n_cells"])


def _taken(path: Path) -> AnnData:
    X, table, var = read_h5ad_parts(path)
    return AnnData(X=X, obs=table, var=var)


def count_cells(path: str | Path, limits: Limits | None) -> int:
    """Cells in the file, known without reading it; `limits` is None for one that is trusted.

    Raises ValueError for what must not be read.
    """
    with open_h5ad(path) as file:
        if missing := [part for part in PARTS if part not in file]:
            raise ValueError(f"{path} is not an .h5ad: it has no {', '.join(missing)}. Write it with AnnData.")
        X = file["X"]
        shape = X.shape if isinstance(X, h5py.Dataset) else tuple(X.attrs.get("shape", ()))
    if len(shape) != 2:
        raise ValueError(f"X of {path} is not a matrix of cells by genes; write the file with AnnData.")
    n_cells = int(shape[0])
    if limits is not None and n_cells > limits.cells:
        raise ValueError(
            f"{path} has {n_cells:,} cells; the app takes at most {limits.cells:,}. Upload the control cells only, "
            "or fewer of them."
        )
    if limits is not None and (unpacked := unpacked_bytes(path)) > limits.unpacked_bytes:
        raise ValueError(
            f"{path} unpacks to {_megabytes(unpacked)}; the app takes at most {_megabytes(limits.unpacked_bytes)}. "
            "Upload fewer cells, or X as a sparse matrix."
        )
    return n_cells


def _main() -> None:
    job: dict[str, Any] = json.load(sys.stdin)
    path, limits = job["path"], Limits(**job["limits"])
    _limit(limits)
    said: dict[str, Any]
    try:
        n_cells = count_cells(path, limits)
        both = controls_and_perturbed(path, typed(ObsColumns, job["obs"], "obs"), int(job["most"]))
        for file, cells in zip((CONTROLS, PERTURBED), both, strict=True):
            for table in (cells.obs, cells.var):  # AnnData reads texts of a kind that it does not write by itself
                for column in table.columns[[isinstance(kind, pd.StringDtype) for kind in table.dtypes]]:
                    table[column] = table[column].astype(object)
            cells.write_h5ad(Path(job["out"]) / file)
        said = {"n_cells": n_cells}
    except Exception as error:
        text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        # HDF5 has words of its own for it: "image null after H5MM_realloc()".
        if isinstance(error, MemoryError) or "alloc" in text:
            text = f"{path} takes more than {_megabytes(limits.memory_bytes)} of memory; upload fewer cells."
        elif not isinstance(error, ValueError | KeyError):
            text = short(error)
        said = {"error": " ".join(text.split())}
    print(json.dumps(said)[:MAX_SAID])


def _limit(limits: Limits) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + 1 + limits.seconds
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    statm = Path("/proc/self/statm")  # elsewhere nobody counts address space
    if statm.exists():
        n_bytes = int(statm.read_text().split()[0]) * resource.getpagesize() + limits.memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (n_bytes, n_bytes))


def _megabytes(n_bytes: int) -> str:
    return f"{np.ceil(n_bytes / (1 << 20)):,.0f} MB"


if __name__ == "__main__":
    _main()
