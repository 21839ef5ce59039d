"""The scores of many candidates: by one process or several, and taken up where an earlier call was ended."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from scipy.special import ndtri

from perturbdiff._version import __version__
from perturbdiff.data.expression import as_csr
from perturbdiff.files import json_sha256, progress, read_json, short, typed, write_json
from perturbdiff.generation import Wanted
from perturbdiff.hub.model_folder import CONFIG, GOLDEN, MAX_JSON_BYTES
from perturbdiff.hub.records import Calibration
from perturbdiff.inference.intervals import calibration_for, population_summary
from perturbdiff.model import PerturbDiff
from perturbdiff.workers import Crew

if TYPE_CHECKING:
    from tqdm import tqdm

SHARES = 2  # of each process, at least: what a share does not have in common with others is done anew for each
MOST_AT_ONCE = 64  # candidates of a share: what was done is kept after each
KEPT_EVERY = 60.0  # s
MAX_KEPT_BYTES = 1 << 30


class Score(Protocol):
    """The score of a population of cells, (n, G) log1p values, that start from these rows of the controls, (n,)."""

    def __call__(self, cells: sparse.csr_matrix, source: np.ndarray, /) -> float: ...

    def parts(self) -> Sequence[np.ndarray]:
        """What it is made of, besides the controls."""


@dataclass(frozen=True, eq=False)
class Question:
    """What all candidates are asked.

    weights
        (G,) what the change of each gene counts, where the score is that of genes.
    control_mean
        Of the log1p values of the controls, by gene.
    how
        Arguments of `PerturbDiff.generate_each`.
    """

    controls: AnnData
    score: Score
    weights: np.ndarray | None
    control_mean: pd.Series
    n_cells: int
    n_populations: int
    how: Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """Of one candidate: the score of each population; its standard error by calibrated intervals, if there are any;
    `Trust.as_uns`."""

    scores: tuple[float, ...]
    error: float | None
    trust: dict[str, Any]


@dataclass(frozen=True)
class _Kept:
    of: str
    answers: dict[str, Answer] = field(default_factory=dict)


def answers(
    model: PerturbDiff, question: Question, labels: Sequence[str], n_processes: int = 1, kept: Path | None = None
) -> list[Answer]:
    """Of each candidate, in their order.

    Parameters
    ----------
    n_processes
        That share the candidates, at most one a core. Each loads the model; a candidate has the same cells, to
        rounding, in any.
    kept
        A file of what was done, written each minute at most and where the call is ended; taken up by one that asks the
        same of the same model and cells. Several processes give back some dozen candidates at a time. Of a call that
        took longer than a minute it has all in the end.

    Raises
    ------
    ValueError
        n_processes is less than 1; `kept` is damaged.
    OSError
        `kept` cannot be written; a process was killed, perhaps for want of memory.
    """
    if n_processes < 1:
        raise ValueError(f"n_processes ({n_processes}) must be at least 1.")
    if kept is not None:
        _check_writable(kept)
    with TemporaryDirectory(prefix="perturbdiff-") as temporary:
        copy = _Copy(model, question, Path(temporary) / "model")
        found = _taken_up(kept, copy, labels)
        left = [label for label in labels if label not in found]
        of_each = question.n_cells * question.n_populations
        total, done = len(labels) * of_each, len(found) * of_each
        began = last = time.monotonic()
        with progress(total, "rank", "cell", initial=done) as bar:
            some: Iterable[tuple[str, Answer]] = ()
            if left:
                one = n_processes == 1
                some = _alone(model, question, left, bar) if one else _shared(copy, left, n_processes, bar)
            try:
                for label, answer in some:
                    found[label] = answer
                    if kept is not None and time.monotonic() - last > KEPT_EVERY:
                        _keep(kept, copy, found)
                        last = time.monotonic()
            except BaseException:
                if kept is not None and found and _keep(kept, copy, found):
                    n = f"{len(found):,} of {len(labels):,}"
                    print(f"kept        {n} candidates in {kept}; the same command goes on", flush=True)
                raise
        if kept is not None and time.monotonic() - began > KEPT_EVERY:
            _keep(kept, copy, found)
    return [found[label] for label in labels]


class _Copy:
    """A question and the model it is asked, for other processes and calls: nothing is written before it is needed."""

    def __init__(self, model: PerturbDiff, question: Question, folder: Path) -> None:
        self.model, self.question, self._folder = model, question, folder

    @property
    def folder(self) -> Path:
        if not self._folder.exists():
            self.model.save_pretrained(self._folder)
        return self._folder

    @cached_property
    def identity(self) -> str:
        """By content: of the files of the model, the cells, and how they are scored."""
        asked = self.question
        cells, content = asked.controls, hashlib.sha256()
        X = as_csr(cells.X)
        names = (pd.util.hash_pandas_object(of).to_numpy() for of in (cells.obs.map(ascii), cells.var_names.to_frame()))
        for part in [X.indptr, X.indices, X.data, *names, *asked.score.parts()]:
            content.update(np.ascontiguousarray(part).tobytes())
        settings: list[Any] = [asked.n_cells, asked.n_populations, *(asked.how[name] for name in sorted(asked.how))]
        settings = [of.item() if isinstance(of, np.generic) else of for of in settings]
        files = read_json(self.folder / CONFIG, MAX_JSON_BYTES)["sha256"]
        del files[GOLDEN]  # to the last bit it is the machine's
        return json_sha256([files, self.model.device.type, content.hexdigest(), __version__, settings])


def _taken_up(kept: Path | None, copy: _Copy, labels: Sequence[str]) -> dict[str, Answer]:
    if kept is None or not kept.is_file():
        return {}
    try:
        before: _Kept = typed(_Kept, read_json(kept, MAX_KEPT_BYTES), kept.name)
    except ValueError as error:
        raise ValueError(f"{kept} is not what a ranking has kept ({short(error)}); remove it to begin anew.") from error
    if before.of != copy.identity:
        print(f"note        {kept} is of another question, and is written over", flush=True)
        return {}
    found = {label: before.answers[label] for label in labels if label in before.answers}
    print(f"resuming    {len(found):,} of {len(labels):,} candidates are in {kept}", flush=True)
    return found


def _check_writable(kept: Path) -> None:
    # Before the work: nothing else writes there until it is done.
    if kept.exists() and not kept.is_file():
        raise FileExistsError(f"{kept}, where what is done is kept, is not a file; remove it, or choose another name.")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=kept.parent):
            pass
    except OSError as error:
        raise OSError(f"nothing can be written in {kept.parent} ({short(error)}); choose another folder.") from error


def _keep(kept: Path, copy: _Copy, found: Mapping[str, Answer]) -> bool:
    """Whether it could be written: a full disk does not end the work."""
    try:
        write_json(kept, asdict(_Kept(copy.identity, dict(found))))
    except OSError as error:
        print(f"note        what is done cannot be kept in {kept} ({short(error)}); make room", flush=True)
        return False
    return True


def _alone(
    model: PerturbDiff, question: Question, labels: Sequence[str], bar: tqdm[Any] | None
) -> Iterator[tuple[str, Answer]]:
    calibration = calibration_for(model, *(question.how[name] for name in ("guidance_scale", "steps", "sampler")))
    wanted = [Wanted(label, question.n_cells) for label in labels]
    made = model.generate_each(
        question.controls, wanted, n_populations=question.n_populations, all_genes=True, bar=bar, **question.how
    )
    for label, predicted in zip(labels, made, strict=True):
        error = None
        if question.weights is not None and calibration is not None:
            error = _error(question.weights, population_summary(predicted, question.control_mean), calibration)
        scores = _of_populations(predicted, question.controls, question.score)
        yield label, Answer(scores, error, predicted.uns["perturbdiff"]["trust"])


def _shared(copy: _Copy, labels: Sequence[str], n_processes: int, bar: tqdm[Any]) -> Iterator[tuple[str, Answer]]:
    n_processes = min(n_processes, os.cpu_count() or 1)
    size = min(MOST_AT_ONCE, -(-len(labels) // (n_processes * SHARES)))
    shares = [tuple(labels[start : start + size]) for start in range(0, len(labels), size)]
    n_threads = max(1, (os.cpu_count() or 1) // n_processes)
    dtype = next(copy.model.denoiser.parameters()).dtype
    job = copy.folder, copy.model.device, dtype, n_threads, copy.question
    with Crew(job, n_processes) as crew:
        for share, found in crew.run(_of_share, shares):
            bar.update(len(share) * copy.question.n_cells * copy.question.n_populations)
            yield from zip(share, found, strict=True)


def _of_share(job: tuple[Path, torch.device, torch.dtype, int, Question], labels: Sequence[str]) -> list[Answer]:
    folder, device, dtype, n_threads, question = job
    torch.set_num_threads(n_threads)
    with progress(0, "rank", "cell", shown=False) as unseen:
        return [answer for _, answer in _alone(_opened(folder, device, dtype), question, labels, unseen)]


@lru_cache(maxsize=1)
def _opened(folder: Path, device: torch.device, dtype: torch.dtype) -> PerturbDiff:
    return PerturbDiff.from_pretrained(folder, device=device, dtype=dtype, golden_check=False)


def _error(weights: np.ndarray, summary: pd.DataFrame, calibration: Calibration) -> float | None:
    # Standard error of a weighted sum of genes that err apart, by the half widths of their intervals; one population
    # has none.
    half = calibration.half_width(summary["spread"].to_numpy(), summary["delta"].to_numpy())
    used = weights != 0
    error = float(np.linalg.norm(weights[used] * half[used]) / ndtri((1 + calibration.level) / 2))
    return None if np.isnan(error) else error


def _of_populations(predicted: AnnData, controls: AnnData, score: Score) -> tuple[float, ...]:
    X, population = as_csr(predicted.X), predicted.obs["population"].to_numpy()
    source = controls.obs_names.get_indexer(predicted.obs["source_control"])
    return tuple(score(X[population == k], source[population == k]) for k in np.unique(population))
