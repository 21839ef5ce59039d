"""Counts of made-up cells, and the spaces that people keep such values in."""

import numpy as np


def counts(seed, n_cells=60, n_genes=80, depth=400):
    """Cells of several library sizes, some genes much higher than others; no cell is empty."""
    rng = np.random.default_rng(seed)
    share = rng.gamma(0.5, 1.0, n_genes) + 0.02
    X = rng.poisson(rng.lognormal(np.log(depth), 0.4, n_cells)[:, None] * share / share.sum()).astype(np.float64)
    X[X.sum(1) == 0, 0] = 1
    return X


def normalised(X, total):
    return X / X.sum(1, keepdims=True) * total


def in_two_batches(X):
    return normalised(X, np.repeat([300.0, 500.0], [len(X) // 2, len(X) - len(X) // 2])[:, None])


SPACES = {
    "log1p of 10,000": lambda X: np.log1p(normalised(X, 1e4)),
    "log1p of the median": lambda X: np.log1p(normalised(X, np.median(X.sum(1)))),
    "log1p of a million": lambda X: np.log1p(normalised(X, 1e6)),
    "log1p of the median of each batch": lambda X: np.log1p(
        normalised(X, np.repeat([300.0, 500.0], len(X) // 2)[:, None])
    ),
    "log2": lambda X: np.log2(1 + normalised(X, 1e4)),
    "log10": lambda X: np.log10(1 + normalised(X, 1e4)),
    "log1p of counts": np.log1p,
    "log2 of counts": lambda X: np.log2(1 + X),
    "logged twice": lambda X: np.log1p(np.log1p(normalised(X, 1e4))),
    "not logged": lambda X: normalised(X, 1e4),
    "shares": lambda X: normalised(X, 1.0),
    "counts by way of a logarithm": lambda X: np.expm1(np.log1p(X).astype(np.float32)),
}
