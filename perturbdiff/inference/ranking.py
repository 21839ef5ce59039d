"""Which perturbations push cells where one wants them: candidates ordered by a signature or a reference population.

Every candidate is predicted from the same control cells with the same random draws, so that scores differ by the
perturbation alone. Of population k, with delta_g the mean over its cells minus the mean over the controls they were
started from,

    signature   mean over up genes of z_g - mean over down genes of z_g,  z_g = delta_g / max(sd_g, floor)      (1)
    reference   1 - E(population k, reference) / E(controls, reference)                                         (2)

where sd_g is over control cells, floor half the median sd of the genes that vary among them (rarely seen genes would
weigh most), and E the energy distance. No change scores 0 in both; a population like the reference scores 1 in (2).

How sure a signature's score is, the calibrated intervals of its genes say. With w_g what gene g counts in (1), s_g the
standard error of its mean by its interval (normal) and sd that of the populations' scores,

    se = max(sd sqrt(1 + 1/K), sqrt(sum over genes of w_g^2 s_g^2)),   p_above = Phi(score / se)                 (3)

as if genes erred apart: on simulated screens such p held, and those of genes that all err together said too little.
Without a calibration, and towards a reference, only the populations speak (Student's t), which is too sure.

K = populations, G = genes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from scipy.special import ndtr, stdtr

from perturbdiff.data.expression import gene_means
from perturbdiff.data.h5ad import read_h5ad_parts
from perturbdiff.data.screen import Expression, expression_of, unique_names
from perturbdiff.data.vocab import GeneVocab, nearest, stable_id
from perturbdiff.diffusion.distances import NO_SPREAD, cell_distances, energy_of
from perturbdiff.files import few
from perturbdiff.inference.candidates import Question, Score, answers
from perturbdiff.inference.requests import controls_for
from perturbdiff.model import PerturbDiff

FLOOR = 0.5  # of the median sd over the genes that vary
MAX_CELLS = 256  # of a population, by default


def rank_perturbations(
    model: PerturbDiff | str | Path,
    controls: AnnData | str | Path,
    *,
    up: str | Sequence[str] = (),
    down: str | Sequence[str] = (),
    towards: AnnData | str | Path | None = None,
    candidates: str | Sequence[str] | None = None,
    cell_type: str | None = None,
    batch: str | None = None,
    layer: str | None = None,
    n_cells: int | None = None,
    n_populations: int = 5,
    guidance_scale: float | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    seed: int = 0,
    min_gene_overlap: float = 0.5,
    n_processes: int = 1,
    kept: str | Path | None = None,
) -> pd.DataFrame:
    """Predict every candidate perturbation from the same control cells and order them by their score.

    Parameters
    ----------
    model
        One in memory, or what `PerturbDiff.from_pretrained` takes.
    controls
        Control cells, or an .h5ad, whose control cells are taken.
    up, down
        Genes, by name or Ensembl id, that should rise and fall; one list may be empty. The score is the mean change of
        `up` minus that of `down`, in standard deviations of the control cells.
    towards
        Cells of the reference population, or an .h5ad of them, instead of genes. The score is the part of the energy
        distance between controls and reference that goes away: 0 is no change, 1 is like the reference.
    candidates
        Labels as `predict` takes them; by default the perturbations that training cells received, at each dose of
        training. "all" are also those
        that only features describe, perhaps ten thousand more.
    n_cells
        Of each population; by default as many as there are controls, at most 256.
    n_populations
        Draws of each response distribution; their scores make the uncertainty.
    cell_type, batch, layer, guidance_scale, steps, sampler, seed, min_gene_overlap
        As `PerturbDiff.predict`.
    n_processes
        That share the candidates; a script that asks for several needs `if __name__ == "__main__":`.
    kept
        A file of what was done, for a long ranking: where this call is ended, the same one takes it up. Remove it once
        the table is safe.

    Returns
    -------
    One row a candidate, best first:
    `rank`; `perturbation`; `score`, the mean over populations; `sd` between populations; `p_above`, the probability
    that the response scores above no change, by calibrated intervals (Eq. 3) or, where `calibrated` is False, that one
    more population does (Student's t of K - 1 degrees of freedom); `rank_low`, `rank_high`, the best and the worst rank
    among the populations; `features_only`, True where training saw no cell of it or of a part; `verdict` and
    `expected_pearson` of `means.trust.Trust`: the place of one that "cannot tell" is a guess, whatever its p_above. sd
    and p_above are NaN for one population.

    Raises
    ------
    KeyError
        An unknown candidate, or no gene of a list is in the model; with the nearest names.
    ValueError
        The controls lack every gene of a list. Neither or both of genes and reference, a gene that should rise and
        fall, no candidate, controls that are the reference; and as `PerturbDiff.predict`.
    FileNotFoundError
        No such file or model.
    OSError
        One of several processes was killed; `kept` cannot be written.
    """
    up, down = _names(up), _names(down)
    if (towards is None) == (not up and not down):
        raise ValueError("give genes (up, down) or a reference population (towards), one of them.")
    if towards is not None and n_cells == 1:
        raise ValueError("n_cells (1) must be at least 2 with towards: one cell has no energy distance.")
    if not isinstance(model, PerturbDiff):
        model = PerturbDiff.from_pretrained(model)
    if candidates is None:
        candidates = model.vocabularies.trained
    labels = list(dict.fromkeys(_names(candidates)))
    if labels == ["all"]:
        described = model.perturbations[len(model.vocabularies.labelled) :]
        labels = [*model.vocabularies.trained, *described]
    if not labels:
        raise ValueError("no candidates; name perturbations, or leave candidates out for all that were trained.")
    model.vocabularies.encode([(label, None, None) for label in labels])
    controls = controls_for(model, controls, cell_type, batch, layer).copy()
    controls.obs_names = unique_names(controls.obs_names.astype(str))
    expression, present = _in_model(model, controls, min_gene_overlap)
    score: Score
    weights = None
    if towards is None:
        weights = _signature(model.genes, expression, present, up, down)
        score = _Along(weights, expression.log1p())
    else:
        score = _nearness(model, expression, present, _cells(towards, model), min_gene_overlap)
    question = Question(
        controls, score, weights, pd.Series(gene_means(expression.log1p()), index=model.genes.names),
        min(controls.n_obs, MAX_CELLS) if n_cells is None else n_cells, n_populations,
        {
            "cell_type": cell_type, "batch": batch, "guidance_scale": guidance_scale, "steps": steps,
            "sampler": sampler, "seed": seed, "min_gene_overlap": min_gene_overlap,
        },
    )  # fmt: skip
    found = answers(model, question, labels, n_processes, None if kept is None else Path(kept))
    scores = np.array([of.scores for of in found], dtype=float)
    errors = np.array([of.error for of in found], dtype=float)  # NaN where there is none
    expected = [of.trust for of in found]
    return _table(labels, scores, errors, _features_only(model, labels), expected)


def find_genes(genes: GeneVocab, names: Iterable[str]) -> tuple[list[int], list[str]]:
    """Positions of genes in a vocabulary, by name, Ensembl id or symbol, each once; the names that are not in it."""
    positions = {stable_id(name): i for i, name in enumerate(genes.names)}
    others = [*enumerate(genes.ensembl or ()), *enumerate(genes.symbols or ())]
    ensembl = {stable_id(name): i for i, name in others if name}
    found: dict[int, None] = {}
    missing: dict[str, None] = {}
    for name in names:
        position = positions.get(stable_id(name), ensembl.get(stable_id(name)))
        if position is None:
            missing[name] = None
        else:
            found[position] = None
    return list(found), list(missing)


def _names(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _cells(source: AnnData | str | Path, model: PerturbDiff) -> AnnData:
    if not isinstance(source, AnnData):
        X, obs, var = read_h5ad_parts(source)
        source = AnnData(X=X, obs=obs, var=var)
    return model.in_own_space(source)


def _signature(
    genes: GeneVocab, controls: Expression, present: np.ndarray, up: Sequence[str], down: Sequence[str]
) -> np.ndarray:
    # (G,) what the change of each gene counts in Eq. 1.
    columns = []
    for what, names in (("up", up), ("down", down)):
        found, missing = find_genes(genes, names)
        if names and not found:
            raise KeyError(
                f"none of the {len(missing)} {what} genes ({few(missing)}) is a gene of the model; "
                f"{nearest(missing[0], genes.names)}."
            )
        if missing:
            print(f"note        {len(missing)} of the {what} genes are not in the model: {few(missing)}", flush=True)
        columns.append(found)
    if both := sorted(set(columns[0]) & set(columns[1])):
        raise ValueError(f"{few([genes.names[i] for i in both])} must not be an up and a down gene; keep one.")
    columns = [_measured(genes, present, found, what) for what, found in zip(("up", "down"), columns, strict=True)]
    values = controls.log1p()
    exact = values.astype(np.float64)
    variance = gene_means(exact.multiply(exact)) - gene_means(exact) ** 2
    if not (varies := variance > NO_SPREAD).any():
        raise ValueError("no gene varies among the control cells; give several real ones.")
    sd = np.sqrt(np.maximum(variance, 0.0))
    sd = np.maximum(sd, FLOOR * np.median(sd[varies]))

    weights = np.zeros(len(sd))
    for sign, of in zip((1, -1), columns, strict=True):
        weights[of] += sign / sd[of] / max(len(of), 1)
    return weights


@dataclass(frozen=True, eq=False)
class _Along:
    """Eq. 1; `values` are of the controls."""

    weights: np.ndarray
    values: sparse.csr_matrix

    def __call__(self, cells: sparse.csr_matrix, source: np.ndarray) -> float:
        return float(self.weights @ (gene_means(cells) - gene_means(self.values[source])))

    def parts(self) -> list[np.ndarray]:
        return [self.weights]


@dataclass(frozen=True, eq=False)
class _Nearness:
    """Eq. 2, over some genes: `wanted` are the values of the reference, `apart` its distance from the controls."""

    genes: np.ndarray
    wanted: np.ndarray
    apart: float

    def __call__(self, cells: sparse.csr_matrix, source: np.ndarray) -> float:
        return 1 - self.energy(cells) / self.apart

    def energy(self, cells: sparse.csr_matrix) -> float:
        return float(energy_of(cell_distances(cells[:, self.genes].toarray(), self.wanted)))

    def parts(self) -> list[np.ndarray]:
        return [self.genes, self.wanted]


def _measured(genes: GeneVocab, present: np.ndarray, columns: Sequence[int], what: str) -> list[int]:
    # Those of a list that the controls have: of the others nobody knows whether they change.
    measured = [i for i in columns if present[i]]
    absent = [genes.names[i] for i in columns if not present[i]]
    if absent and not measured:
        raise ValueError(
            f"the controls have none of the {what} genes ({few(absent)}); name genes that they have, or give controls "
            "with these."
        )
    if absent:
        print(f"note        the controls lack {len(absent)} of the {what} genes: {few(absent)}", flush=True)
    return measured


def _nearness(
    model: PerturbDiff, controls: Expression, present: np.ndarray, towards: AnnData, min_gene_overlap: float
) -> _Nearness:
    # Over the genes that both files have: one that a file lacks is zero there, which is no likeness.
    if towards.n_obs < 2:
        raise ValueError(f"the reference population has {towards.n_obs} cells; give at least 2.")
    reference, there = _in_model(model, towards, min_gene_overlap)
    genes = np.flatnonzero(present & there)
    if len(genes) == 0:
        raise ValueError("the controls and the reference population have no gene of the model in common.")
    nearness = _Nearness(genes, reference.log1p()[:, genes].toarray(), 1.0)
    apart = nearness.energy(controls.log1p())
    if not apart > 0:
        raise ValueError(
            f"the controls are no further from the reference population than its own cells (energy distance "
            f"{apart:.3g}); give one that differs, and two or more control cells."
        )
    return replace(nearness, apart=apart)


def _in_model(model: PerturbDiff, cells: AnnData, min_gene_overlap: float) -> tuple[Expression, np.ndarray]:
    # In the model's genes, and which of them the cells have.
    expression = expression_of(cells, model.preprocessing)
    columns = model.genes.align(expression.genes, min_gene_overlap).columns
    return expression.with_genes(model.genes, columns), columns >= 0


def _features_only(model: PerturbDiff, labels: Sequence[str]) -> list[bool]:
    known = set(model.vocabularies.labelled)
    return [not all(name in known for name, _ in model.vocabularies.parts(label)) for label in labels]


def _table(
    labels: Sequence[str],
    scores: np.ndarray,
    errors: np.ndarray,
    features_only: Sequence[bool],
    expected: Sequence[Mapping[str, Any]],
) -> pd.DataFrame:
    # `errors` by calibrated intervals, NaN where there are none.
    n = scores.shape[1]
    mean = scores.mean(axis=1)
    sd = scores.std(axis=1, ddof=1) if n > 1 else np.full(len(labels), np.nan)
    one_more, calibrated = sd * np.sqrt(1 + 1 / n), np.isfinite(errors)
    error = np.fmax(one_more, errors)
    with np.errstate(divide="ignore", invalid="ignore"):  # populations without spread are certain
        t = np.where((error == 0) & (mean == 0), 0.0, mean / error)
    above = np.where(calibrated, ndtr(t), stdtr(n - 1, t)) if n > 1 else np.full(len(labels), np.nan)
    ranks = np.stack([1 + np.searchsorted(np.sort(own), own) for own in -scores.T], axis=1)
    table = pd.DataFrame(
        {
            "perturbation": labels,
            "score": mean,
            "sd": sd,
            "p_above": above,
            "calibrated": calibrated,
            "rank_low": ranks.min(axis=1),
            "rank_high": ranks.max(axis=1),
            "features_only": features_only,
            "verdict": [of["verdict"] for of in expected],
            "expected_pearson": [of.get("expected_pearson", np.nan) for of in expected],
        }
    )
    table = table.sort_values(["score", "perturbation"], ascending=[False, True], ignore_index=True)
    table.insert(0, "rank", table["score"].rank(method="min", ascending=False).astype(int))  # the same where it is
    return table
