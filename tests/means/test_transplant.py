"""Which conditions lend their cells."""

from __future__ import annotations

import numpy as np
import pytest

from perturbdiff.data.notation import Notation
from perturbdiff.means.transplant import transplant_rows
from tests.means.examples import CONDITIONS, asked, training_means


@pytest.mark.parametrize("seed", [0, None])
def test_the_same_perturbation_is_taken_likest_controls_first(seed):
    training = training_means([("A", str(i), "1") for i in range(6)] + [("B", "0", "1")], seed)
    context = asked("A", "new", "1")
    distance = [np.linalg.norm(control - context.control.mean(axis=0)) for control in training.control_mean[:6]]
    assert transplant_rows(training, context) == sorted(range(6), key=distance.__getitem__)


def test_an_unseen_perturbation_takes_all_of_its_context():
    training = training_means(CONDITIONS)
    assert transplant_rows(training, asked("Z", "T", "1")) == [0, 1, 2]
    assert transplant_rows(training, asked("A+C", "NK", "1")) == [4, 5]
    assert transplant_rows(training, asked("Z", "T", "9")) is None


def test_spelling_and_doses_do_not_hide_a_perturbation():
    assert transplant_rows(training_means(CONDITIONS), asked("D+C")) == [6]
    doses = training_means([("A@1", "T", "1"), ("A@100", "T", "1")], notation=Notation({"A"}, "+", "@"))
    assert transplant_rows(doses, asked("A@30")) == [1]
