"""Means of effects against pandas and loops."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from perturbdiff.data.notation import Notation
from perturbdiff.means.shifts import (
    additive,
    context_mean,
    no_change,
    perturbation_mean,
    perturbed_mean,
    shift_cells,
)
from perturbdiff.means.training import TrainingMeans
from tests.means.examples import CONDITIONS, GENES, asked, training_means


@pytest.fixture
def training() -> TrainingMeans:
    return training_means(CONDITIONS)


def test_no_change_leaves_the_controls_as_they_are(training: TrainingMeans) -> None:
    context = asked("A", "T", "1")
    np.testing.assert_array_equal(shift_cells(context.control, no_change(training, context)), context.control)


def test_context_mean_falls_back_from_batch_to_cell_type_to_everything(training: TrainingMeans) -> None:
    table = pd.DataFrame(training.effect).assign(cell_type=training.cell_type, batch=training.batch)
    genes = list(range(GENES))
    in_context = table.groupby(["cell_type", "batch"])[genes].mean().loc[("T", "1")]
    in_cell_type = table.groupby("cell_type")[genes].mean().loc["NK"]
    expected = {("T", "1"): in_context, ("NK", "never seen"): in_cell_type, ("Mk", "1"): table[genes].mean()}
    for (cell_type, batch), mean in expected.items():
        np.testing.assert_allclose(context_mean(training, asked("Z", cell_type, batch)), mean.to_numpy(), atol=1e-12)


@pytest.mark.parametrize(
    ("cell_type", "batch", "rows"), [("T", "1", [0, 1, 2]), ("NK", "9", [4, 5, 6, 7]), ("Mk", "1", range(8))]
)
def test_perturbed_mean_counts_cells(training: TrainingMeans, cell_type: str, batch: str, rows: list[int]) -> None:
    cells = np.concatenate([np.repeat(training.perturbed_mean[i : i + 1], training.n_cells[i], axis=0) for i in rows])
    context = asked("A", cell_type, batch)
    reached = context.control.mean(axis=0) + perturbed_mean(training, context)
    np.testing.assert_allclose(reached, cells.mean(axis=0), atol=1e-12)


def test_perturbation_mean_is_over_training_contexts_and_counts_each_once(training: TrainingMeans) -> None:
    effect = training.perturbed_mean - training.control_mean
    np.testing.assert_allclose(
        perturbation_mean(training, asked("A")), (effect[0] + effect[3] + effect[7]) / 3, atol=1e-12
    )


def test_a_combination_that_was_seen_is_one_in_any_order(training: TrainingMeans) -> None:
    for label in ("A+B", "B+A", " B + A "):
        np.testing.assert_array_equal(perturbation_mean(training, asked(label)), training.effect[5])
        assert additive(training, asked(label)) is None


@pytest.mark.parametrize("perturbation", ["Z", "A+Z", "A+C", "D"])  # D was seen only within C+D
def test_what_was_never_seen_gets_the_context_mean(training: TrainingMeans, perturbation: str) -> None:
    shift = perturbation_mean(training, asked(perturbation, "T", "1"))
    np.testing.assert_allclose(shift, training.effect[:3].mean(axis=0), atol=1e-12)


def test_additive_sums_the_parts_and_unknown_ones_count_as_the_context_mean(training: TrainingMeans) -> None:
    def single(perturbation: str) -> np.ndarray:
        return perturbation_mean(training, asked(perturbation, "T", "1"))

    everything = training.effect[:3].mean(axis=0)
    for label, expected in {
        "A+C": single("A") + single("C"),
        "C+A": single("A") + single("C"),
        "A+Z": single("A") + everything,
        "Y+Z": 2 * everything,
        "A+B+C": single("A") + single("B") + single("C"),
    }.items():
        np.testing.assert_allclose(additive(training, asked(label, "T", "1")), expected, atol=1e-12)
    for label in ("A", "Z", "A+B", "D+C"):
        assert additive(training, asked(label, "T", "1")) is None


def test_labels_are_read_as_the_screen_wrote_them() -> None:
    """Parts in any order and with another separator; of doses the nearest on a log scale."""
    notation = Notation(frozenset("ABC"), "|", "@")
    labels = ["A@1", "A@100", "B@1", "A@1|C@1"]
    effect = np.eye(4)
    training = TrainingMeans(labels, ["T"] * 4, ["b"] * 4, np.zeros((4, 4)), effect, np.ones(4), notation)

    def shift(label: str) -> list[float]:
        return list(perturbation_mean(training, asked(label, "T", "b", genes=4)))

    assert shift("A@1") == shift("A@9") == list(effect[0])
    assert shift("A@11") == list(effect[1])
    assert shift("C@1|A@1") == shift("A@2|C@1") == list(effect[3])
    assert shift("B@1|A@100") == list(effect.mean(axis=0))  # never seen together
    assert list(additive(training, asked("B@7|A@30", "T", "b", genes=4))) == list(effect[1] + effect[2])
    assert additive(training, asked("C@3|A@1", "T", "b", genes=4)) is None


def test_shifted_cells_have_the_mean_that_was_asked_for_and_no_less_than_nothing() -> None:
    rng = np.random.default_rng(15)
    controls = (rng.random((50, 6)) * (rng.random((50, 6)) < 0.4)).astype(np.float32)
    controls[:, 5] = 0
    shift = np.array([0.3, -0.5, -0.05, 0.0, -9.0, -1.0]) * np.append(controls.mean(axis=0)[:5], 1.0)
    predicted = shift_cells(controls, shift)
    np.testing.assert_allclose(predicted.mean(axis=0), np.maximum(controls.mean(axis=0) + shift, 0), atol=1e-6)
    assert predicted.min() >= 0
    assert predicted.dtype == np.float32
    assert (predicted[:, 2] == 0).sum() == (controls[:, 2] == 0).sum()


def test_shift_cells_refuses_other_genes_and_no_cells() -> None:
    with pytest.raises(ValueError, match=r"shift \(\(3,\)\) must be \(genes,\) of the controls; pass \(7,\)"):
        shift_cells(np.zeros((2, GENES)), np.zeros(3))
    with pytest.raises(ValueError, match=r"controls \(\(0, 7\)\) must be a non-empty array"):
        shift_cells(np.zeros((0, GENES)), np.zeros(GENES))
