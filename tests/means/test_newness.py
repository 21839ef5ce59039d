"""How conditions are new, by a plain search over all of them."""

from __future__ import annotations

import itertools
from typing import get_args

import numpy as np
import pytest

from perturbdiff.means.newness import Known, New, axes


def searched(trained, names, cell_type, batch):
    same = [(c, b) for of, c, b in trained if of == names]
    if (cell_type, batch) in same:
        return "dose"
    if any(c == cell_type for c, _ in same):
        return "batch"
    if same:
        return "cell type"
    what = "perturbation"
    if len(names) > 1 and any(name in of for name in names for of, _, _ in trained):
        what = "combination"
    if not any(c == cell_type for _, c, _ in trained):
        return f"{what} and cell type"
    if not any((c, b) == (cell_type, batch) for _, c, b in trained):
        return f"{what} and batch"
    return what


@pytest.mark.parametrize("seed", range(5))
def test_what_is_new_is_what_a_search_says(seed):
    rng = np.random.default_rng([seed, np.random.default_rng().integers(1 << 30)])
    every = [frozenset(of) for of in ("A", "B", "C", "AB", "AC", "BC", "ABC")]
    every = list(itertools.product(every, ["T", "NK", "B"], ["1", "2", "3"]))
    trained = [every[i] for i in rng.choice(len(every), size=rng.integers(1, 15), replace=False)]
    known = Known(iter(trained))
    for condition in every:
        assert known.new(*condition) == searched(trained, *condition)
    assert known.names == {name for names, _, _ in trained for name in names}


def test_to_nothing_everything_is_new():
    assert Known([]).new(frozenset("A"), "T", "1") == "perturbation and cell type"
    assert Known([]).new(frozenset("AB"), "T", "1") == "perturbation and cell type"


def test_every_kind_has_a_perturbation_or_a_place():
    assert {axis for new in get_args(New) for axis in axes(new)} == {
        "perturbation", "combination", "cell type", "batch", "dose",
    }  # fmt: skip
