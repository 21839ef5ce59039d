"""Training means with known conditions, for tests."""

from __future__ import annotations

import numpy as np

from perturbdiff.data.notation import Notation
from perturbdiff.data.vocab import GeneVocab
from perturbdiff.means.training import Context, TrainingMeans

GENES = 7
CONDITIONS = [
    ("A", "T", "1"),
    ("B", "T", "1"),
    ("C", "T", "1"),
    ("A", "T", "2"),
    ("B", "NK", "1"),
    ("A+B", "NK", "1"),
    ("C+D", "NK", "2"),
    ("A", "NK", "2"),
]


def training_means(
    conditions: list[tuple[str, str, str]],
    seed: int = 0,
    genes: int = GENES,
    names: tuple[str, ...] | None = None,
    notation: Notation | None = None,
) -> TrainingMeans:
    """Random means; conditions of one context share the mean of their controls."""
    rng = np.random.default_rng(seed)
    contexts = {c[1:]: rng.gamma(1.0, size=genes) for c in conditions}
    perturbation, cell_type, batch = (list(column) for column in zip(*conditions, strict=True))
    noise = np.random.default_rng(seed).gamma(1.0, size=(len(conditions), genes)) * 0.1
    return TrainingMeans(
        perturbation,
        cell_type,
        batch,
        np.stack([contexts[c[1:]] for c in conditions]),
        rng.gamma(1.0, size=(len(conditions), genes)),
        rng.integers(1, 500, size=len(conditions)),
        notation or Notation(()),
        None if names is None else GeneVocab(names),
        control_noise=noise * 0.1,
        perturbed_noise=noise,
    )


def asked(
    perturbation: str, cell_type: str = "Mk", batch: str = "9", control: np.ndarray | None = None, genes: int = GENES
) -> Context:
    """What is asked for; a (G,) control is one cell, none are five random ones."""
    if control is None:
        control = np.random.default_rng(99).gamma(1.0, size=(5, genes))
    return Context(perturbation, cell_type, batch, np.atleast_2d(control))
