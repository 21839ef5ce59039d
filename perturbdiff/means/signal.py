"""Which part of a measured response is no noise of finitely many cells.

Of a perturbation p, d_p is the mean of its effects over conditions and v_p the variance of that which finitely many
cells make. Effects are normal around no change, larger for some perturbations and for some genes:

    d_pg ~ N(0, a_p t_g + v_pg),   a_p = mean_g (d_pg^2 - v_pg),   t_g = mean_p (d_pg^2 - v_pg) / mean of all

both at least 0, and t_g with a share of the mean over genes, since some that answer little elsewhere answer here. The
expected response is a_p t_g / (a_p t_g + v_pg) of the measured one (empirical Bayes; Efron & Morris 1973, JASA 68:117).

n = conditions, P = perturbations, G = genes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from perturbdiff.data.notation import Parts

SHARE = 0.05  # of the mean over genes, that every gene has


def signal(perturbation: Sequence[Parts], effect: np.ndarray, noise: np.ndarray) -> dict[Parts, np.ndarray]:
    """(G,) between 0 and 1 of each perturbation: a_p t_g / (a_p t_g + v_pg).

    Parameters
    ----------
    perturbation
        (n,) what each condition is of.
    effect, noise
        (n, G) log1p space, and the variance of it that finitely many cells make.
    """
    rows: dict[Parts, list[int]] = {}
    for i, parts in enumerate(perturbation):
        rows.setdefault(parts, []).append(i)
    variance = np.stack([noise[of].sum(axis=0) / len(of) ** 2 for of in rows.values()])
    beyond = np.stack([effect[of].mean(axis=0) for of in rows.values()]) ** 2 - variance
    genes = np.maximum(beyond.mean(axis=0), 0.0)
    genes += SHARE * genes.mean()
    if not genes.any():
        return {parts: np.zeros(len(genes)) for parts in rows}
    prior = np.maximum(beyond.mean(axis=1), 0.0)[:, None] * (genes / genes.mean())
    known = prior + variance
    return dict(zip(rows, np.divide(prior, known, out=np.zeros(known.shape), where=known > 0), strict=True))
