"""Predictions into files: one request, or many that are kept one by one as they are made and joined at the end.

Each request has the cells that `PerturbDiff.predict` gives it alone, to rounding, whatever the others are. Of many,
small ones from the same controls are predicted together, always the same ones, and each is written to `OUT.parts/` as
soon as it is done: a run that was killed goes on where it was, and under a launcher (`accelerate launch`, torchrun) the
processes share the requests, and the result is that of one, bit for bit. Memory is that of the largest request, and for
an .h5ad that of obs.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from torch import distributed as dist

from perturbdiff._version import __version__
from perturbdiff.config import as_dict
from perturbdiff.data.expression import as_csr
from perturbdiff.data.guides import gene_rows
from perturbdiff.data.screen import genes_of
from perturbdiff.files import (
    few,
    hanging,
    json_sha256,
    progress,
    read_json,
    sha256,
    short,
    to_disk,
    write_json,
    written,
)
from perturbdiff.generation import Wanted
from perturbdiff.inference.intervals import (
    Calibration,
    calibration_for,
    certainty,
    latent_share,
    mean_expression,
    median_width,
    population_summary,
)
from perturbdiff.inference.output import (
    WRITTEN,
    check_outputs,
    join_predicted,
    parts_of,
    read_metadata,
    read_predicted,
    write_predicted,
)
from perturbdiff.inference.requests import COLUMNS, Request, check_requests, context_rows, controls_for
from perturbdiff.lock import alone
from perturbdiff.model import MAX_PREDICTED_CELLS, PerturbDiff

RUN = "run.json"  # in the folder of parts: what they are of
BLOCK_CELLS = 1024  # of requests that are predicted together: as many may be lost when a run is killed
MAX_WAIT = timedelta(days=2)  # for the slowest process


@dataclass(frozen=True)
class Predictions:
    """What was predicted and written.

    n_genes, absent
        Of the model, and those of them that the controls lack: all but these are written, or all with `all_genes`.
    n_controls
        Control cells that were written behind the predicted ones.
    n_requests, n_found
        Requests, None where one was predicted alone; and those of them that an earlier run had done.
    uns
        uns["perturbdiff"] of the first request.
    unseen
        Labels that training has not seen, and the numbers of the requests that have them.
    widths
        Of each request, the median interval width (log1p) over the expressed genes; NaN where it is not known.
    trust
        Of each request, what is known of `means.trust.Trust`.
    latent_share
        As of `intervals.latent_share`, where one was predicted alone.
    """

    out: Path
    summary: Path | None
    n_cells: int
    n_genes: int
    absent: tuple[str, ...]
    all_genes: bool
    n_requests: int | None
    n_found: int
    uns: dict[str, Any]
    unseen: dict[str, list[int]]
    widths: np.ndarray
    calibration: Calibration | None
    otherwise: bool
    trust: tuple[dict[str, Any], ...]
    n_controls: int = 0
    latent_share: float | None = None

    def text(self) -> str:
        """For a person, several lines."""
        uns, lines = self.uns, []
        if self.n_requests is not None:
            found = f", {self.n_found:,} of them done before" if self.n_found else ""
            lines.append(f"requests    {self.n_requests:,}{found}")
        lines.append(f"genes       {uns['n_genes_matched']:,} of {self.n_genes:,} matched by {uns['genes_matched_by']}")
        n_written = self.n_genes if self.all_genes else self.n_genes - len(self.absent)
        if self.absent:
            what = "kept, var says they are not measured" if self.all_genes else "left out (--all-genes keeps them)"
            lines.append(
                f"absent      {len(self.absent):,} genes that the controls lack, {what}: {few(list(self.absent))}"
            )
        for label, numbers in sorted(self.unseen.items()):
            first = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
            which = "" if self.n_requests is None else f", in {len(numbers):,} requests (number {first})"
            how = "its features or other doses" if label.startswith("perturbation ") else "its control cells"
            lines.append(f"unseen      {label}{which}: extrapolated from {how}")
        lines += _trust_lines(self.trust)
        lines.append(f"sampler     {uns['sampler']}, {uns['n_steps']} steps, guidance {uns['guidance_scale']:g}")
        if uns["n_populations"] == 1 and "one draw" in uns["populations_differ"]:
            lines.append("populations 1, one draw of how batches differ (--average: their mean)")
        else:
            lines.append(f"populations {uns['n_populations']:,}, differing {uns['populations_differ']}")
        if self.latent_share is not None:
            lines.append(
                f"            {self.latent_share:.0%} of the variance of their means is real, the rest is noise of few "
                "cells"
            )
        lines.append(f"certainty   {certainty(self.calibration, self.widths, self.otherwise)}")
        lines = [hanging(line, 12) for line in lines]  # not the paths
        controls = f" and {self.n_controls:,} control cells" if self.n_controls else ""
        lines.append(f"written     {self.out}: {self.n_cells:,} cells{controls}, {n_written:,} genes")
        if self.summary is not None:
            unknown = f", NaN for the {len(self.absent):,} absent ones" if self.absent else ""
            lines.append(f"            {self.summary}: mean, spread and interval of each gene{unknown}")
        return "\n".join(lines)


def predict_request(
    model: PerturbDiff,
    controls: AnnData | str | Path,
    request: Request,
    out: str | Path,
    *,
    layer: str | None = None,
    summary: str | Path | None = None,
    overwrite: bool = False,
    all_genes: bool = False,
    with_controls: bool = False,
    **sampling: Any,
) -> Predictions | None:
    """Predict one request into a file that holds what `PerturbDiff.predict` returns. Otherwise as `predict_requests`.

    `summary` then has the columns of `intervals.population_summary` alone. Under a launcher the first process does it.
    """
    if int(os.environ.get("RANK", "0")) > 0:
        return None
    out, summary = check_outputs(out, summary, overwrite)
    calibration = calibration_for(model, **sampling)
    controls = controls_for(model, controls, request.cell_type, request.batch, layer)
    folder = parts_of(out)
    with _alone_in(folder, 0):
        predicted, table = _predict(model, controls, request, calibration, all_genes=all_genes, **sampling)
        n_cells, n_controls, share = predicted.n_obs, controls.n_obs if with_controls else 0, latent_share(predicted)
        if with_controls:
            predicted = model.add_controls(predicted, controls, request.cell_type, request.batch)
        write_predicted(predicted, _made(folder, out))
        with _put_in_place(folder, out, summary, overwrite) as temporary:
            if temporary is not None:
                table.to_csv(temporary, index=False)
        (folder / WRITTEN).unlink()
    uns = predicted.uns["perturbdiff"]
    unseen = {label: [0] for label in uns["unseen"]}
    widths = np.array([median_width(table)])
    n_genes, absent = len(model.genes), tuple(uns["genes_absent"])
    return Predictions(
        out, summary, n_cells, n_genes, absent, all_genes, None, 0, uns, unseen, widths, calibration,
        calibration is not model.training.calibration, (uns["trust"],), n_controls, share,
    )  # fmt: skip


def predict_requests(
    model: PerturbDiff,
    controls: AnnData | str | Path,
    requests: Sequence[Request],
    out: str | Path,
    *,
    layer: str | None = None,
    summary: str | Path | None = None,
    overwrite: bool = False,
    guidance_scale: float | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    min_gene_overlap: float = 0.5,
    all_genes: bool = False,
    with_controls: bool = False,
    varied: bool = True,
) -> Predictions | None:
    """Predict each request from the control cells of its cell type and batch, and write all cells into one file.

    Parameters
    ----------
    controls
        Control cells of all contexts, or an .h5ad, whose control cells are taken. A request is predicted from those
        with its cell type and batch; where obs has no such column, or the request leaves it open, from all.
    out
        FILE.h5ad, an AnnData as `PerturbDiff.predict` returns it, or FILE.parquet (see `output`). obs has the number of
        the `request`, from 0.
    layer
        Of the controls, to read in place of X.
    summary
        A csv to write: request, perturbation and verdict (`means.trust`), then the columns of
        `intervals.population_summary`.
    overwrite
        Replace `out` and `summary`.
    guidance_scale, steps, sampler, min_gene_overlap, all_genes, varied
        As `PerturbDiff.predict`, for all requests.
    with_controls
        Write the control cells that any request starts from behind the predicted ones, each once, as
        `PerturbDiff.control_rows`.

    Returns
    -------
    What was written; None in a process that only helped.

    Raises
    ------
    FileExistsError
        `out` or `summary` exists, or another run writes the same.
    KeyError, ValueError
        Before anything is predicted: an `out` of another format, an unknown perturbation with the nearest ones, no such
        controls, a number that cannot be, X as in `PerturbDiff.predict`; or the parts that are there are of another
        run.
    """
    out, summary = check_outputs(out, summary, overwrite)
    sampling: dict[str, Any] = {
        "guidance_scale": guidance_scale, "steps": steps, "sampler": sampler, "min_gene_overlap": min_gene_overlap,
        "all_genes": all_genes, "varied": varied,
    }  # fmt: skip
    check_requests(model, requests)
    calibration = calibration_for(model, **sampling)
    controls = controls_for(model, controls, layer=layer)
    model.genes.align(genes_of(controls.var[gene_rows(controls.var)]), min_gene_overlap)
    rows = context_rows(controls.obs, model.config.obs, requests)
    n_cells = [(r.n_cells or len(own)) * r.n_populations for r, own in zip(requests, rows, strict=True)]
    for request, n in zip(requests, n_cells, strict=True):
        if n > MAX_PREDICTED_CELLS:
            raise ValueError(
                f"{request.where}{n:,} cells asked for; a request is at most {MAX_PREDICTED_CELLS:,}: use several."
            )
    folder = parts_of(out)
    parts = [folder / f"part-{number:06d}.parquet" for number in range(len(requests))]
    with _processes() as (rank, world_size, wait_for_all), _alone_in(folder, rank):
        if rank == 0:
            _begin(folder, _identity(model, controls, requests, sampling))
        wait_for_all()
        done = [_is_whole(part) for part in parts]
        wait_for_all()  # to have looked, before anybody writes
        blocks = [block for block in _blocks(requests, n_cells) if not all(done[number] for number in block)]
        of_block = [sum(n_cells[number] for number in block) for block in blocks]
        own_share = _assigned(of_block, world_size)[rank]
        total = sum(of_block[i] for i in own_share)
        before = sum(n_cells) - total if world_size == 1 else 0
        with progress(before + total, "predict", "cell", before, shown=rank == 0) as bar:
            for block in (blocks[i] for i in own_share):
                cells, first = controls[rows[block[0]]].copy(), requests[block[0]]
                control_mean = mean_expression(model, cells)
                made = model.generate_each(
                    cells,
                    [Wanted(requests[number].perturbation, requests[number].n_cells) for number in block],
                    first.cell_type,
                    first.batch,
                    n_populations=first.n_populations,
                    seed=first.seed,
                    **sampling,
                    bar=bar,
                )
                for number, predicted in zip(block, made, strict=True):
                    if done[number]:
                        continue
                    predicted.obs.insert(0, "request", number)
                    predicted.obs_names = pd.Index([f"{number}-{cell}" for cell in range(predicted.n_obs)])
                    table = population_summary(predicted, control_mean, calibration)
                    predicted.uns["perturbdiff"]["interval_width"] = median_width(table)
                    write_predicted(predicted, parts[number])
        wait_for_all()
        if rank > 0:
            return None
        of_parts = [read_metadata(part)["uns"] for part in parts]
        widths = np.array([uns.pop("interval_width") for uns in of_parts], dtype=np.float64)
        common, written_too, n_controls = _common(of_parts, requests), [], 0
        if with_controls:
            own = np.unique(np.concatenate(rows))
            n_controls = len(own)
            common |= {"control_label": model.config.obs.control_label, "n_controls": n_controls}
            written_too = [folder / "part-controls.parquet"]
            write_predicted(_control_rows(model, controls[own].copy(), requests, parts[0]), written_too[0])
        join_predicted([*parts, *written_too], common, _made(folder, out))
        with _put_in_place(folder, out, summary, overwrite) as temporary:
            if temporary is not None:
                means = (mean_expression(model, controls[own]) for own in rows)
                _write_summary(parts, requests, means, calibration, temporary)
        _clear(folder)
    unseen: dict[str, list[int]] = {}
    for number, uns in enumerate(of_parts):
        for label in uns["unseen"]:
            unseen.setdefault(label, []).append(number)
    n_genes, absent = len(model.genes), tuple(of_parts[0]["genes_absent"])
    return Predictions(
        out, summary, sum(n_cells), n_genes, absent, all_genes, len(parts), sum(done), of_parts[0], unseen, widths,
        calibration, calibration is not model.training.calibration, tuple(uns["trust"] for uns in of_parts), n_controls,
    )  # fmt: skip


def _made(folder: Path, out: Path) -> Path:
    return folder / f"joined{out.suffix}"


@contextmanager
def _put_in_place(folder: Path, out: Path, summary: Path | None, overwrite: bool) -> Iterator[Path | None]:
    """Gives the summary's file to be filled, then moves it and what was `_made` to their names.

    A kill between the two moves leaves their hashes in the folder, by which `check_outputs` knows them.
    """
    made = _made(folder, out)
    with nullcontext() if summary is None else written(summary) as temporary:
        yield temporary
        check_outputs(out, summary, overwrite)  # somebody else may have written it meanwhile
        write_json(folder / WRITTEN, {path.name: sha256(path) for path in (made, temporary) if path is not None})
        made.replace(out)
        to_disk(out.parent)


def _predict(
    model: PerturbDiff, controls: AnnData, request: Request, calibration: Calibration | None, **sampling: Any
) -> tuple[AnnData, pd.DataFrame]:
    predicted = model.generate(
        controls,
        request.perturbation,
        request.cell_type,
        request.batch,
        n_cells=request.n_cells,
        n_populations=request.n_populations,
        seed=request.seed,
        **sampling,
    )
    return predicted, population_summary(predicted, mean_expression(model, controls), calibration)


def _control_rows(model: PerturbDiff, controls: AnnData, requests: Sequence[Request], part: Path) -> AnnData:
    # A context that all requests have is that of cells whose obs says none.
    cell_type, batch = (
        found.pop() if len(found := {getattr(request, name) for request in requests}) == 1 else None
        for name in ("cell_type", "batch")
    )
    return model.control_rows(controls, read_predicted(part), cell_type, batch)


def _common(made: Sequence[Mapping[str, Any]], requests: Sequence[Request]) -> dict[str, Any]:
    # uns of the joined file: what is the same in all, and a table of the requests.
    common = {key: value for key, value in made[0].items() if all(uns[key] == value for uns in made)}
    table = {name: [getattr(request, name) for request in requests] for name in COLUMNS}
    table = {name: ["" if v is None else str(v) for v in values] for name, values in table.items()}
    table["unseen"] = ["; ".join(uns["unseen"]) for uns in made]
    for name in ("verdict", "expected_pearson"):
        table[name] = [str(uns["trust"].get(name, "")) for uns in made]
    differ = "; ".join(sorted({str(uns["populations_differ"]) for uns in made}))
    unseen = sorted({label for uns in made for label in uns["unseen"]})
    return {**common, "unseen": unseen, "populations_differ": differ, "requests": table}


def _trust_lines(trust: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which responses can be told, for people; nothing where all were trained, or nobody can know."""
    said = [of for of in trust if of["verdict"] in ("known", "cannot tell")]
    if not said:
        return []
    if len(trust) == 1:
        how = f"trust       {said[0]['verdict']}: new is the {said[0]['new']}"
        if "low" not in said[0] or not said[0]["n_left_out"]:
            return [how, "            no training conditions, left out, say how well such a response is told"]
        r, low, high = (said[0][name] for name in ("expected_pearson", "low", "high"))
        return [
            f"{how}; {said[0]['n_left_out']} such training conditions,",
            "            left out, say that beyond what all perturbations do Pearson's r is",
            f"            {r:.2f}, 90 % range {low:.2f} to {high:.2f}",
        ]
    new = [(number, of) for number, of in enumerate(trust) if of["verdict"] in ("known", "cannot tell")]
    told, untold, unknown = ([number for number, of in new if _told(of) is kind] for kind in (True, False, None))
    parts = [f"{len(told):,} new response{'' if len(told) == 1 else 's'} can be told"]
    if untold:
        parts.append(f"of {_numbers(untold)} nobody can tell more than what all perturbations do")
    if unknown:
        parts.append(f"of {_numbers(unknown)} it is not known: no training condition that was left out is as new")
    return [f"trust       {'; '.join(parts)}"]


def _told(trust: Mapping[str, Any]) -> bool | None:
    """Whether a new response can be told; None where nothing as new was left out."""
    return True if trust["verdict"] == "known" else False if trust.get("n_left_out") else None


def _numbers(of: Sequence[int]) -> str:
    return f"{len(of):,} (number {', '.join(map(str, of[:5]))}{', ...' if len(of) > 5 else ''})"


def _write_summary(
    parts: Sequence[Path],
    requests: Sequence[Request],
    control_means: Iterator[pd.Series],
    calibration: Calibration | None,
    path: Path,
) -> None:
    for number, (part, request, mean) in enumerate(zip(parts, requests, control_means, strict=True)):
        predicted = read_predicted(part)
        table = population_summary(predicted, mean, calibration)
        table.insert(0, "request", number)
        table.insert(1, "perturbation", request.perturbation)
        table.insert(2, "verdict", predicted.uns["perturbdiff"]["trust"]["verdict"])
        table.to_csv(path, mode="a" if number else "w", header=not number, index=False)


# ---------------------------------------------------------------- the folder of parts


def _identity(
    model: PerturbDiff, controls: AnnData, requests: Sequence[Request], sampling: Mapping[str, Any]
) -> dict[str, Any]:
    """What the cells of a run are a function of; what differs is named by its key."""
    weights, cells = hashlib.sha256(), hashlib.sha256()
    for name, tensor in sorted(model.denoiser.state_dict().items()):
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    settings = (as_dict(model.config.sampling), as_dict(model.config.diffusion), as_dict(model.preprocessing))
    if model.means is not None:  # where predictions start, how populations differ, what counts are drawn
        means = model.means
        weights.update(json.dumps([means.perturbation, means.cell_type, means.batch]).encode())
        for array in (
            means.n_cells, means.control_mean, means.perturbed_mean, means.control_noise, means.perturbed_noise,
            means.overdispersion,
        ):  # fmt: skip
            weights.update(b"none" if array is None else np.ascontiguousarray(array, dtype=np.float32).data)
    names = (model.genes.names, asdict(model.vocabularies), model.config.set_size)
    weights.update(json.dumps([*settings, *names]).encode())
    X = as_csr(controls.X)
    for values in (X.indptr.astype(np.int64), X.indices.astype(np.int64), X.data):
        cells.update(np.ascontiguousarray(values).data)
    cells.update(json.dumps([controls.var_names.astype(str).tolist(), controls.obs.astype(str).to_csv()]).encode())
    return {
        "requests": json_sha256([[getattr(request, name) for name in COLUMNS] for request in requests]),
        "model": weights.hexdigest(),
        "controls": cells.hexdigest(),
        "settings": dict(sampling),
        "library_version": __version__,
        "device": model.device.type,
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
    for pattern in ("part-*.parquet", ".*.partial", "joined.*", RUN, WRITTEN):
        for path in folder.glob(pattern):
            path.unlink()


def _is_whole(part: Path) -> bool:
    try:
        return part.exists() and bool(read_metadata(part))
    except ValueError:  # it is predicted again
        return False


def _blocks(requests: Sequence[Request], n_cells: Sequence[int]) -> list[list[int]]:
    """Numbers of the requests that are predicted together, whoever does it: of the same controls, populations, seed."""
    blocks: list[list[int]] = []
    filling: dict[tuple[str | None, str | None, int, int], list[int]] = {}
    for number, of in enumerate(requests):
        key = of.cell_type, of.batch, of.n_populations, of.seed
        if key not in filling:
            filling[key] = []
            blocks.append(filling[key])
        filling[key].append(number)
        if sum(n_cells[each] for each in filling[key]) >= BLOCK_CELLS:
            del filling[key]
    return blocks


def _assigned(n_cells: Sequence[int], world_size: int) -> list[list[int]]:
    # The largest first, each to who has least.
    shares: list[list[int]] = [[] for _ in range(world_size)]
    loads = [(0, rank) for rank in range(world_size)]
    for number in sorted(range(len(n_cells)), key=lambda number: (-n_cells[number], number)):
        load, rank = heapq.heappop(loads)
        shares[rank].append(number)
        heapq.heappush(loads, (load + n_cells[number], rank))
    return [sorted(share) for share in shares]


# ---------------------------------------------------------------- processes


@contextmanager
def _alone_in(folder: Path, rank: int) -> Iterator[None]:
    # An empty folder is not left behind.
    if rank > 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with alone(folder / "lock", f"writing {folder}"):
            try:
                yield
            finally:
                if not any(folder.glob("part-*.parquet")) and not (folder / WRITTEN).exists():
                    _clear(folder)
    finally:
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def _processes() -> Iterator[tuple[int, int, Callable[[], None]]]:
    """Rank, number of processes as the launcher says them, and a function that waits for all.

    Parts on disk are all that the processes tell each other.
    """
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if world_size == 1:
        yield 0, 1, lambda: None
        return

    def wait_for_all() -> None:
        try:
            dist.monitored_barrier(timeout=MAX_WAIT)
        except RuntimeError as error:
            raise ConnectionError(
                f"another process has failed or does not answer ({short(error)}); give the same command again: what "
                "is done is kept."
            ) from error

    dist.init_process_group("gloo", timeout=MAX_WAIT)
    try:
        yield rank, world_size, wait_for_all
    finally:
        dist.destroy_process_group()
