"""What predictors look up: conditions, targets, controls."""

from __future__ import annotations

import numpy as np
import pytest

from perturbdiff.data.notation import Notation
from perturbdiff.data.vocab import GeneVocab
from perturbdiff.means.training import Context, TrainingMeans
from tests.means.examples import CONDITIONS, GENES, asked, training_means


def test_illegal_means_are_refused_by_name_value_and_remedy() -> None:
    two, three = np.zeros((2, 3)), np.zeros((2, 4))
    labels = (["A", "B"], ["T", "T"], ["1", "1"])
    with pytest.raises(ValueError, match=r"training conditions \(0\) must be at least one; put perturbed cells"):
        TrainingMeans([], [], [], np.zeros((0, 3)), np.zeros((0, 3)), np.zeros(0))
    with pytest.raises(ValueError, match=r"batch \(1 entries\) must have one per condition; pass 2"):
        TrainingMeans(["A", "B"], ["T", "T"], ["1"], two, two, np.ones(2))
    with pytest.raises(ValueError, match=r"perturbed_mean \(\(2, 3\)\) must be \(conditions, genes\).*pass \(2, 4\)"):
        TrainingMeans(*labels, three, two, np.ones(2))
    with pytest.raises(ValueError, match=r"genes \(2\) must be those of control_mean; pass 3"):
        TrainingMeans(*labels, two, two, np.ones(2), genes=GeneVocab(("x", "y")))
    with pytest.raises(ValueError, match=r"control_mean \(NaN or infinite\) must be finite; drop"):
        TrainingMeans(["A"], ["T"], ["1"], np.full((1, 3), np.nan), np.zeros((1, 3)), np.ones(1))
    with pytest.raises(ValueError, match=r"n_cells \(0.0\) must be at least 1; drop conditions without cells"):
        TrainingMeans(*labels, two, two, np.array([1.0, 0.0]))


def test_controls_must_be_cells_of_the_same_genes() -> None:
    training = training_means(CONDITIONS)
    with pytest.raises(ValueError, match=r"control \(\(0, 7\)\) must be a non-empty array"):
        Context("A", "T", "1", np.zeros((0, GENES)))
    with pytest.raises(ValueError, match=r"control cells of 3 genes must have those of the training means; pass 7"):
        training.control_of(asked("A", control=np.zeros(3)))
    with pytest.raises(ValueError, match="NaN or infinite"):
        training.control_of(asked("A", control=np.full(GENES, np.inf)))


def test_float32_controls_are_averaged_in_double_precision() -> None:
    cells = np.random.default_rng(0).gamma(1.0, size=(1000, 3)).astype(np.float32)
    expected = [sum(float(x) for x in column) / 1000 for column in cells.T]
    np.testing.assert_allclose(asked("A", control=cells).control_mean, expected, rtol=1e-13)


def test_a_perturbation_is_found_in_any_spelling_at_its_nearest_dose() -> None:
    notation = Notation(frozenset("AB"), "+", "@", ("ctrl",))
    labels = ["A@1", "A@10", "A@10", "B@2+A@1", "A@1+B@50", "B"]
    training = training_means([(p, str(i), "1") for i, p in enumerate(labels)], notation=notation)
    found = {
        "A@2": [0], "A@4": [1, 2], "A@1e6": [1, 2], "A@10+ctrl": [1, 2], "A@1+B@3": [3], "B@100+A@1": [4],
        "B@7": [5], "C": [], "A+B+C": [],
    }  # fmt: skip
    for label, rows in found.items():
        assert training.of_perturbation(training.parts(label)).tolist() == rows, label


def test_targets_are_genes_by_name_or_symbol() -> None:
    genes = GeneVocab(("ENSG1", "ENSG2", "ENSG3"), symbols=("STAT1", "", "JAK2"))
    zeros = np.zeros((1, 3))
    training = TrainingMeans(["x"], ["T"], ["1"], zeros, zeros, np.ones(1), genes=genes)
    for label, columns in {"JAK2": [2], "ENSG2": [1], "JAK2+STAT1": [0, 2], "JAK2+drug": [2], "drug": []}.items():
        assert training.targets(training.parts(label)).tolist() == columns
    assert training_means(CONDITIONS).targets((("STAT1", None),)).tolist() == []  # nobody knows the genes


def test_the_log_ratio_of_targets_counts_each_target_once_and_only_what_controls_express() -> None:
    names = ("g", "h", "i", "other")
    control = np.log1p([[4.0, 9, 0.01, 1], [2, 9, 0.01, 1], [5, 8, 0.01, 1], [5, 8, 0.01, 1], [5, 8, 0.01, 1]])
    perturbed = np.log1p([[1.0, 9, 0.01, 1], [1, 9, 0.01, 1], [5, 4, 0.01, 1], [5, 8, 9.0, 1], [0, 0, 0, 0]])
    labels = ["g", "g", "h", "i", "drug"]
    training = TrainingMeans(labels, ["T"] * 5, list("12345"), control, perturbed, np.ones(5), genes=GeneVocab(names))
    of_g = (np.log(1.01 / 4.01) + np.log(1.01 / 2.01)) / 2
    of_h = np.log(4.01 / 8.01)
    for gene, expected in enumerate((of_g, of_h, (of_g + of_h) / 2, (of_g + of_h) / 2)):
        assert training.target_log_ratio(gene, "T") == pytest.approx(expected)
        assert training.target_log_ratio(gene, "new") == pytest.approx(expected)
    none = TrainingMeans(["drug"], ["T"], ["1"], control[:1], perturbed[:1], np.ones(1), genes=GeneVocab(names))
    assert none.target_log_ratio(0, "T") is None


def test_unseen_parts_are_those_that_no_condition_has_at_any_dose() -> None:
    notation = Notation(frozenset("ABCD"), "+", "@", ("ctrl",))
    training = training_means([("A@1", "T", "1"), ("B@2+C", "T", "1")], notation=notation)
    for label, names in {"A@7": "", "B+A@1": "", "C": "", "D": "D", "A@1+D@3": "D"}.items():
        assert "".join(name for name, _ in training.unseen(training.parts(label))) == names, label
