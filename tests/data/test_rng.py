import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perturbdiff.data import rng
from perturbdiff.data.rng import SMALL, cell_order_key, numpy_generator, permuted, torch_generator, uniform_at

KEYS = [
    (0, "controls", (1, 2)),
    (1, "controls", (1, 2)),
    (0, "set order", (1, 2)),
    (0, "controls", (2, 1)),
    (0, "controls", (1, 3)),
    (2**40, "controls", (1, 2)),
]


def test_numbers_at_positions_are_those_of_splitmix64(monkeypatch):
    """Its published first outputs, from state 0; in any order, and for other keys others."""

    class Zero:
        def generate_state(self, n, dtype):
            return np.zeros(n, dtype)

    with monkeypatch.context() as patch:
        patch.setattr(rng, "_sequence", lambda *_: Zero())
        found = uniform_at(np.array([[2, 0], [1, 2]]), 0, "any") * 2**53
    first = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert found.tolist() == [[first[2] >> 11, first[0] >> 11], [first[1] >> 11, first[2] >> 11]]
    draws = [uniform_at(np.arange(20_000), seed, purpose, *key) for seed, purpose, key in KEYS]
    for own in draws:
        assert own.min() >= 0
        assert own.max() < 1
        assert np.abs(np.histogram(own, 20)[0] / 1000 - 1).max() < 0.2
    assert np.abs(np.corrcoef(draws)[np.triu_indices(len(KEYS), 1)]).max() < 0.05


def test_seed_purpose_and_every_key_change_the_draws():
    draws = [numpy_generator(seed, purpose, *key).random(4).tolist() for seed, purpose, key in KEYS]
    assert len({tuple(d) for d in draws}) == len(KEYS)
    states = [torch_generator("cpu", seed, purpose, *key).initial_seed() for seed, purpose, key in KEYS]
    assert len(set(states)) == len(KEYS)


def test_draws_do_not_depend_on_what_was_drawn_before():
    before = numpy_generator(0, "a", 1).random(3)
    numpy_generator(0, "b", 1).random(1000)
    np.random.default_rng(0).random(5)
    torch.rand(5)
    np.testing.assert_array_equal(numpy_generator(0, "a", 1).random(3), before)
    first, second = (torch.rand(3, generator=torch_generator("cpu", 0, "a", 1)) for _ in range(2))
    assert torch.equal(first, second)


def test_generators_leave_the_global_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    torch.rand(7, generator=torch_generator("cpu", 0, "noise"))
    assert torch.equal(torch.rand(3), expected)


def test_first_draws_of_consecutive_keys_look_independent():
    first = np.array([numpy_generator(0, "cells of a condition", 0, key).random() for key in range(2000)])
    assert len(np.unique(first)) == 2000
    counts = np.histogram(first, bins=10, range=(0, 1))[0]
    assert ((counts - 200) ** 2 / 200).sum() < 33.7  # chi-square, 9 degrees of freedom, p = 1e-4
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.09  # 4 / sqrt(2000)


@pytest.mark.slow
def test_another_process_with_another_hash_seed_draws_the_same():
    code = (
        "from perturbdiff.data.rng import *;"
        "print(numpy_generator(3, 'set order', 4).integers(0, 2**62), torch_generator('cpu', 3, 'x', 4).initial_seed(),"
        " *cell_order_key(np.array(['a', 'ß']), 7), *permuted(5000, np.arange(3), 7, 'x', 1))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "77"},
        capture_output=True,
        text=True,
        check=True,
    )
    own = [
        *(numpy_generator(3, "set order", 4).integers(0, 2**62), torch_generator("cpu", 3, "x", 4).initial_seed()),
        *(*cell_order_key(np.array(["a", "ß"]), 7), *permuted(5000, np.arange(3), 7, "x", 1)),
    ]
    assert run.stdout.split() == [str(value) for value in own]


def test_a_negative_seed_is_refused_by_its_value():
    for draw in (lambda: numpy_generator(-3, "x"), lambda: torch_generator("cpu", -3, "x")):
        with pytest.raises(ValueError, match=r"seed \(-3\) must not be negative"):
            draw()


# ---------------------------------------------------------------- permutations evaluated at places


def order_of(n, key=(0, "order", 0)):
    return permuted(n, np.arange(n), *key)


EDGES = sorted({SMALL, SMALL + 1, *(4**k + d for k in range(1, 8) for d in (-1, 0, 1)), 2 * 4**5, 2 * 4**5 + 1})


@pytest.mark.parametrize("n", EDGES)
def test_a_permutation_at_the_edges_of_its_domain_holds_every_number_once(n):
    assert np.array_equal(np.sort(order_of(n)), np.arange(n))


@settings(derandomize=True)
@given(st.integers(1, 20_000), st.integers(0, 2**40), st.integers(0, 9), st.data())
def test_a_permutation_holds_every_number_once_and_the_same_whichever_places_are_asked_for(n, seed, key, data):
    whole = permuted(n, np.arange(n), seed, "order", key)
    assert whole.dtype == np.int64
    assert np.bincount(whole, minlength=n).tolist() == [1] * n
    places = data.draw(st.lists(st.integers(0, n - 1), max_size=30))
    assert permuted(n, np.array(places, np.int64), seed, "order", key).tolist() == [int(whole[i]) for i in places]


@pytest.mark.parametrize("n", [900, 5000])
def test_permutations_differ_between_seeds_purposes_and_keys(n):
    orders = [permuted(n, np.arange(n), seed, purpose, *key) for seed, purpose, key in KEYS]
    for i, j in itertools.combinations(range(len(KEYS)), 2):
        assert (orders[i] == orders[j]).sum() < 10  # 1 expected


@pytest.mark.parametrize("n", [40, 1025, 3000, 5 * 10**9])
def test_a_place_of_a_permutation_holds_every_number_equally_often(n):
    for place in (0, n - 1):
        held = [int(permuted(n, np.array([place]), 0, "order", key)[0]) for key in range(1000)]
        counts = np.histogram(held, bins=10, range=(0, n))[0]
        assert ((counts - 100) ** 2 / 100).sum() < 33.7  # chi-square, 9 degrees of freedom, p = 1e-4


@pytest.mark.parametrize("n", [1000, 20_000, 5 * 10**9])
def test_neighbours_are_not_kept_together(n):
    held = permuted(n, np.arange(1000), 0, "order").astype(np.float64)
    steps = np.diff(held) / n
    assert (np.abs(steps) < 0.01).sum() < 45  # 20 expected, sd 4.4
    assert abs(np.corrcoef(held[:-1], held[1:])[0, 1]) < 0.13  # 4 / sqrt(1000)
    assert 270 < ((steps[1:] > 0) == (steps[:-1] > 0)).sum() < 400  # up or down twice: 333 expected


def test_a_permutation_of_billions_is_found_without_making_it():
    n = 5 * 10**9
    places = np.concatenate([np.arange(50_000), np.arange(n - 50_000, n)])
    held = permuted(n, places, 3, "order")
    assert held.min() >= 0
    assert held.max() < n
    assert len(np.unique(held)) == len(places)
    assert held.max() > 4.99e9
    assert permuted(n, places[::-1], 3, "order").tolist() == held[::-1].tolist()


@pytest.mark.parametrize("n", [0, 1, 10, 5000])
def test_no_places_of_a_permutation_are_no_numbers(n):
    assert permuted(n, np.zeros(0, np.int64), 0, "order").shape == (0,)


# ---------------------------------------------------------------- the order of cells


def test_the_key_of_a_cell_depends_on_its_name_and_the_seed_alone():
    names = np.array([f"cell_{i}" for i in range(3000)])
    keys = dict(zip(names, cell_order_key(names, 0), strict=True))
    assert cell_order_key(names, 0).dtype == np.uint64
    assert len(set(keys.values())) == 3000
    some = np.random.default_rng(0).permutation(names)[:500]
    assert cell_order_key(some, 0).tolist() == [keys[name] for name in some]
    assert cell_order_key(np.concatenate([some, some]).astype(object), 0).tolist() == [keys[n] for n in some] * 2
    assert set(cell_order_key(names, 1).tolist()).isdisjoint(keys.values())
    assert cell_order_key(names[:0], 0).shape == (0,)


def test_the_order_of_cells_is_as_good_as_random():
    # Names that are alike and count up, as barcodes of a plate do; and alphabets beyond ASCII.
    for names in ([f"AAACCTG-{i}" for i in range(4000)], [f"zäll_{i:06d}" for i in range(4000)]):
        place = np.argsort(np.argsort(cell_order_key(np.array(names), 0)))
        counts = np.histogram2d(np.arange(4000), place, bins=5)[0]
        assert ((counts - 160) ** 2 / 160).sum() < 46.3  # chi-square, 16 degrees of freedom, p = 1e-4
        assert abs(np.corrcoef(place[:-1], place[1:])[0, 1]) < 0.065  # 4 / sqrt(4000)
