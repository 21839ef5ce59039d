import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from perturbdiff.data.seeds import numpy_generator, torch_generator

KEYS = [
    (0, "controls", (1, 2)),
    (1, "controls", (1, 2)),
    (0, "set order", (1, 2)),
    (0, "controls", (2, 1)),
    (0, "controls", (1, 3)),
    (2**40, "controls", (1, 2)),
]


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


def test_another_process_with_another_hash_seed_draws_the_same():
    code = (
        "from perturbdiff.data.seeds import numpy_generator, torch_generator; import torch;"
        "print(numpy_generator(3, 'set order', 4).integers(0, 2**62), torch_generator('cpu', 3, 'x', 4).initial_seed())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "77"},
        capture_output=True,
        text=True,
        check=True,
    )
    own = (numpy_generator(3, "set order", 4).integers(0, 2**62), torch_generator("cpu", 3, "x", 4).initial_seed())
    assert run.stdout.split() == [str(value) for value in own]


def test_a_negative_seed_is_refused_by_its_value():
    for draw in (lambda: numpy_generator(-3, "x"), lambda: torch_generator("cpu", -3, "x")):
        with pytest.raises(ValueError, match=r"seed \(-3\) must not be negative"):
            draw()
