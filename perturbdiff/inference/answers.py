"""Many predictions into one file: kept one by one as they are made, joined at the end.

Each request is predicted as `PerturbDiff.predict` would alone, whatever the others are and whoever does it, and is
written to `OUT.parts/` as soon as it is done. A run that was killed goes on where it was; under a launcher (`accelerate
launch`, torchrun) the processes share the requests, and the result is that of one, bit for bit. Memory is that of the
largest request, and for an .h5ad that of obs.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from filelock import FileLock, Timeout
from torch import distributed as dist

from perturbdiff._version import __version__
from perturbdiff.config import as_dict
from perturbdiff.data.expression import as_csr
from perturbdiff.data.screen import expression_of
from perturbdiff.files import json_sha256, progress, read_json, short, write_json, write_whole
from perturbdiff.inference.intervals import mean_expression, median_width, population_summary
from perturbdiff.inference.output import join_h5ad, join_parquet, read_predicted, read_said, write_parquet
from perturbdiff.inference.requests import COLUMNS, Request, check_requests, context_rows
from perturbdiff.model import MAX_PREDICTED_CELLS, PerturbDiff

RUN = "run.json"  # in the folder of parts: what they are of
MAX_WAIT = timedelta(days=2)  # for the slowest process
JOIN = {".h5ad": join_h5ad, ".parquet": join_parquet}


@dataclass(frozen=True)
class Answers:
    """What a finished run wrote.

    unseen
        Labels that training has not seen, and the numbers of the requests that have them.
    widths
        Of each request, the median interval width (log1p) over the expressed genes; NaN where it is not known.
    """

    path: Path
    n_cells: int
    n_requests: int
    n_found: int  # requests that an earlier run had done
    said: dict[str, Any]
    unseen: dict[str, list[int]]
    widths: np.ndarray


def predict_requests(
    model: PerturbDiff,
    controls: AnnData,
    requests: Sequence[Request],
    out: str | Path,
    guidance_scale: float | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    min_gene_overlap: float = 0.5,
    summary: str | Path | None = None,
    overwrite: bool = False,
) -> Answers | None:
    """Predict each request from the control cells of its cell type and batch, and write all cells into one file.

    Parameters
    ----------
    controls
        Control cells of all contexts. A request is predicted from those with its cell type and batch; where the file
        has no such column, or the request leaves it open, from all.
    out
        FILE.h5ad, an AnnData as `PerturbDiff.predict` returns it, or FILE.parquet (see `predicted_cells`). obs has the
        number of the `request`, from 0.
    guidance_scale, steps, sampler, min_gene_overlap
        As `PerturbDiff.predict`, for all requests.
    summary
        A csv to write: request and perturbation, then the columns of `uncertainty.population_summary`.

    Returns
    -------
    What was written; None in a process that only helped.

    Raises
    ------
    FileExistsError
        `out` or `summary` exists, or another run writes the same.
    KeyError, ValueError
        Before anything is predicted: an unknown perturbation with the nearest ones, no such controls, a number that
        cannot be, X as in `PerturbDiff.predict`; or the parts that are there are of another run.
    """
    out = Path(out)
    for path in (out, *([] if summary is None else [Path(summary)])):
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} exists; choose another name, or overwrite it (--overwrite).")
    if out.suffix not in JOIN:
        raise ValueError(f"out ({out}) must end in .h5ad or .parquet.")
    how = {"guidance_scale": guidance_scale, "steps": steps, "sampler": sampler, "min_gene_overlap": min_gene_overlap}
    check_requests(model, requests)
    model.genes.align(expression_of(controls, model.preprocessing).genes, min_gene_overlap)
    rows = context_rows(controls.obs, model.config.obs, requests)
    n_cells = [(r.n_cells or len(own)) * r.n_populations for r, own in zip(requests, rows, strict=True)]
    for request, n in zip(requests, n_cells, strict=True):
        if n > MAX_PREDICTED_CELLS:
            raise ValueError(
                f"{request.where}{n:,} cells asked for; a request is at most {MAX_PREDICTED_CELLS:,}: use several."
            )
    folder = out.with_name(f"{out.name}.parts")
    parts = [folder / f"part-{number:06d}.parquet" for number in range(len(requests))]
    with _processes() as (rank, world_size, everyone), _alone_in(folder, rank):
        if rank == 0:
            _begin(folder, _identity(model, controls, requests, how))
        everyone()
        done = [_is_whole(part) for part in parts]
        everyone()  # has looked, before anybody writes
        todo = [number for number in range(len(requests)) if not done[number]]
        own_share = _dealt(todo, n_cells, world_size)[rank]
        total = sum(n_cells[number] for number in own_share)
        before = sum(n_cells) - total if world_size == 1 else 0
        with progress(before + total, "predict", "cell", before, shown=rank == 0) as bar:
            for number in own_share:
                cells = controls[rows[number]].copy()
                write_parquet(_predict(model, cells, requests[number], number, how, bar), parts[number])
        everyone()
        if rank > 0:
            return None
        answers = _joined(model, requests, parts, out, sum(done))
        if summary is not None:
            _write_summary(model, controls, rows, requests, parts, Path(summary))
        _clear(folder)
        return answers


def _predict(
    model: PerturbDiff, controls: AnnData, request: Request, number: int, how: Mapping[str, Any], bar: Any
) -> AnnData:
    predicted = model.generate(
        controls,
        request.perturbation,
        request.cell_type,
        request.batch,
        n_cells=request.n_cells,
        n_populations=request.n_populations,
        seed=request.seed,
        bar=bar,
        **how,
    )
    predicted.obs.insert(0, "request", number)
    predicted.obs_names = pd.Index([f"{number}-{cell}" for cell in range(predicted.n_obs)])
    calibration = model.training.calibration
    width = median_width(population_summary(predicted, mean_expression(model, controls), calibration))
    predicted.uns["perturbdiff"]["interval_width"] = width
    return predicted


def _joined(model: PerturbDiff, requests: Sequence[Request], parts: Sequence[Path], out: Path, n_found: int) -> Answers:
    said = [read_said(part)["uns"] for part in parts]
    widths = np.array([one.pop("interval_width") for one in said], dtype=np.float64)
    unseen: dict[str, list[int]] = {}
    for number, one in enumerate(said):
        for label in one["unseen"]:
            unseen.setdefault(label, []).append(number)
    common = {key: value for key, value in said[0].items() if all(one[key] == value for one in said)}
    table = {name: [getattr(request, name) for request in requests] for name in COLUMNS}
    table = {name: ["" if v is None else str(v) for v in values] for name, values in table.items()}
    table["unseen"] = ["; ".join(one["unseen"]) for one in said]
    n_cells = JOIN[out.suffix](parts, {**common, "unseen": sorted(unseen), "requests": table}, out)
    return Answers(out, n_cells, len(parts), n_found, said[0], unseen, widths)


def _write_summary(
    model: PerturbDiff,
    controls: AnnData,
    rows: Sequence[np.ndarray],
    requests: Sequence[Request],
    parts: Sequence[Path],
    path: Path,
) -> None:
    calibration = model.training.calibration

    def write(temporary: Path) -> None:
        for number, (part, request) in enumerate(zip(parts, requests, strict=True)):
            control_mean = mean_expression(model, controls[rows[number]])
            table = population_summary(read_predicted(part), control_mean, calibration)
            table.insert(0, "request", number)
            table.insert(1, "perturbation", request.perturbation)
            table.to_csv(temporary, mode="a" if number else "w", header=not number, index=False)

    write_whole(path, write)


# ---------------------------------------------------------------- the folder of parts


def _identity(
    model: PerturbDiff, controls: AnnData, requests: Sequence[Request], how: Mapping[str, Any]
) -> dict[str, Any]:
    """What the cells of a run are a function of; what differs is named by its key."""
    weights, cells = hashlib.sha256(), hashlib.sha256()
    for name, tensor in sorted(model.denoiser.state_dict().items()):
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    said = (as_dict(model.config.sampling), as_dict(model.config.diffusion), as_dict(model.preprocessing))
    names = (model.genes.names, asdict(model.vocabularies), model.config.set_size)
    weights.update(json.dumps([*said, *names]).encode())
    X = as_csr(controls.X)
    for values in (X.indptr.astype(np.int64), X.indices.astype(np.int64), X.data):
        cells.update(np.ascontiguousarray(values).data)
    cells.update(json.dumps([controls.var_names.astype(str).tolist(), controls.obs.astype(str).to_csv()]).encode())
    return {
        "requests": json_sha256([[getattr(request, name) for name in COLUMNS] for request in requests]),
        "model": weights.hexdigest(),
        "controls": cells.hexdigest(),
        "settings": dict(how),
        "library_version": __version__,
        "device": next(model.denoiser.parameters()).device.type,
    }


def _begin(folder: Path, identity: dict[str, Any]) -> None:
    run = folder / RUN
    parts = sorted(folder.glob("part-*.parquet"))
    if parts and not run.is_file():
        raise ValueError(f"{folder} holds parts of nobody knows what; remove it, or choose another name.")
    if parts and (before := read_json(run, 1 << 20)) != identity:
        changed = ", ".join(key for key in identity if before.get(key) != identity[key]) or "keys"
        raise ValueError(
            f"{folder} holds {len(parts)} predictions of a run that had another {changed}; give the same command again "
            "to go on, or remove the folder to begin anew."
        )
    write_json(run, identity)


def _clear(folder: Path) -> None:
    # What a run has made there, and nothing else.
    for pattern in ("part-*.parquet", ".part-*.partial", RUN, ".lock"):
        for path in folder.glob(pattern):
            path.unlink()
    with suppress(OSError):
        folder.rmdir()


def _is_whole(part: Path) -> bool:
    try:
        return part.exists() and bool(read_said(part))
    except ValueError:  # it is predicted again
        return False


def _dealt(todo: Sequence[int], n_cells: Sequence[int], world_size: int) -> list[list[int]]:
    # The largest first, each to who has least.
    shares: list[list[int]] = [[] for _ in range(world_size)]
    loads = [(0, rank) for rank in range(world_size)]
    for number in sorted(todo, key=lambda number: (-n_cells[number], number)):
        load, rank = heapq.heappop(loads)
        shares[rank].append(number)
        heapq.heappush(loads, (load + n_cells[number], rank))
    return [sorted(share) for share in shares]


# ---------------------------------------------------------------- processes


@contextmanager
def _alone_in(folder: Path, rank: int) -> Iterator[None]:
    # The lock ends with its process, however that ends; an empty folder is not left behind.
    folder.mkdir(parents=True, exist_ok=True)
    if rank > 0:
        yield
        return
    lock = folder / ".lock"
    try:
        with FileLock(lock, timeout=0):
            try:
                yield
            finally:
                if not any(folder.glob("part-*.parquet")):
                    _clear(folder)
    except Timeout as error:
        raise FileExistsError(f"another process writes {folder}; wait for its end, or stop it.") from error


@contextmanager
def _processes() -> Iterator[tuple[int, int, Callable[[], None]]]:
    """Rank, number of processes as the launcher says them, and a function that waits for all.

    Parts on disk are all that the processes tell each other.
    """
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if world_size == 1:
        yield 0, 1, lambda: None
        return

    def everyone() -> None:
        try:
            dist.monitored_barrier(timeout=MAX_WAIT)
        except RuntimeError as error:
            raise ConnectionError(
                f"another process has failed or does not answer ({short(error)}); give the same command again: what "
                "is done is kept."
            ) from error

    dist.init_process_group("gloo", timeout=MAX_WAIT)
    try:
        yield rank, world_size, everyone
    finally:
        dist.destroy_process_group()
