"""Baselines against pandas, scikit-learn's Ridge, brute-force refits and the anchors of the quality protocol."""

from __future__ import annotations

import os
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import Ridge

from perturbdiff.data.notation import Notation
from perturbdiff.evaluation.metrics import score_condition
from perturbdiff.means.shifts import (
    BASELINES,
    PENALTIES,
    RidgeFit,
    TrainingEffects,
    context_mean_shift,
    no_change,
    perturbation_mean_shift,
    ridge,
    shift_cells,
)

QUALITY = Path(os.environ.get("PERTURBDIFF_QUALITY", Path(__file__).parents[2] / "../shared/quality"))
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


def training_effects(conditions: list[tuple[str, str, str]], seed: int = 0, genes: int = GENES) -> TrainingEffects:
    """Random effects; conditions of one context share the mean of their controls."""
    rng = np.random.default_rng(seed)
    contexts = {c[1:]: rng.gamma(1.0, size=genes) for c in conditions}
    perturbation, cell_type, batch = (list(column) for column in zip(*conditions, strict=True))
    return TrainingEffects(
        perturbation,
        cell_type,
        batch,
        np.stack([contexts[c[1:]] for c in conditions]),
        rng.normal(size=(len(conditions), genes)),
        rng.integers(1, 500, size=len(conditions)),
    )


def features(effects: TrainingEffects, perturbation: str, control_mean: np.ndarray) -> list[float]:
    """The documented features, written independently: scaled centred control mean, then one column per single."""
    centre = effects.control_mean.mean(axis=0)
    scale = np.sqrt(np.mean([np.dot(c - centre, c - centre) for c in effects.control_mean]))
    singles = sorted(set("+".join(effects.perturbation).split("+")))
    return [*((control_mean - centre) / scale), *(float(s in perturbation.split("+")) for s in singles)]


def design(effects: TrainingEffects) -> np.ndarray:
    return np.array([features(effects, p, c) for p, c in zip(effects.perturbation, effects.control_mean, strict=True)])


@pytest.fixture
def effects() -> TrainingEffects:
    return training_effects(CONDITIONS)


def test_no_change_leaves_the_controls_as_they_are(effects: TrainingEffects) -> None:
    controls = np.random.default_rng(1).gamma(1.0, size=(5, GENES))
    shift = no_change(effects, "A", "T", "1", controls.mean(axis=0))
    np.testing.assert_array_equal(shift_cells(controls, shift), controls)


def test_context_mean_falls_back_from_batch_to_cell_type_to_everything(effects: TrainingEffects) -> None:
    table = pd.DataFrame(effects.effect).assign(cell_type=effects.cell_type, batch=effects.batch)
    genes = list(range(GENES))
    in_context = table.groupby(["cell_type", "batch"])[genes].mean().loc[("T", "1")]
    in_cell_type = table.groupby("cell_type")[genes].mean().loc["NK"]
    expected = {("T", "1"): in_context, ("NK", "never seen"): in_cell_type, ("Mk", "1"): table[genes].mean()}
    for (cell_type, batch), mean in expected.items():
        shift = context_mean_shift(effects, "Z", cell_type, batch, np.zeros(GENES))
        np.testing.assert_allclose(shift, mean.to_numpy(), atol=1e-12)


def test_perturbation_mean_is_over_training_contexts_and_counts_each_once(effects: TrainingEffects) -> None:
    shift = perturbation_mean_shift(effects, "A", "Mk", "9", np.zeros(GENES))
    np.testing.assert_allclose(shift, (effects.effect[0] + effects.effect[3] + effects.effect[7]) / 3, atol=1e-12)


def test_a_combination_is_taken_as_seen_or_else_summed_from_its_parts(effects: TrainingEffects) -> None:
    def shift(perturbation: str) -> np.ndarray:
        return perturbation_mean_shift(effects, perturbation, "T", "1", np.zeros(GENES))

    np.testing.assert_array_equal(shift("A+B"), effects.effect[5])
    np.testing.assert_array_equal(shift("B+A"), effects.effect[5])
    np.testing.assert_allclose(shift("A+C"), shift("A") + shift("C"), atol=1e-12)


@pytest.mark.parametrize("perturbation", ["Z", "A+Z", "A+D"])  # D was seen only within C+D
def test_an_unknown_perturbation_or_part_gets_the_context_mean(effects: TrainingEffects, perturbation: str) -> None:
    shift = perturbation_mean_shift(effects, perturbation, "T", "1", np.zeros(GENES))
    np.testing.assert_allclose(shift, effects.effect[:3].mean(axis=0), atol=1e-12)


@pytest.mark.parametrize("genes", [3, 200])  # fewer and more than conditions
def test_ridge_equals_scikit_learn_at_the_chosen_penalty(genes: int) -> None:
    effects = training_effects(CONDITIONS, seed=2, genes=genes)
    model = Ridge(alpha=effects.ridge_fit.penalty).fit(design(effects), effects.effect)
    control_mean = np.random.default_rng(3).gamma(1.0, size=genes)
    for perturbation in ("A", "B+A", "C+A", "Z"):
        expected = model.predict(np.array([features(effects, perturbation, control_mean)]))[0]
        np.testing.assert_allclose(ridge(effects, perturbation, "Mk", "9", control_mean), expected, atol=1e-8)


@pytest.mark.parametrize("genes", [3, 200])
@pytest.mark.parametrize("conditions", [CONDITIONS, CONDITIONS[:3], [("A", str(i), "1") for i in range(6)]])
def test_closed_form_leave_one_out_equals_refitting(conditions: list[tuple[str, str, str]], genes: int) -> None:
    effects = training_effects(conditions, seed=4, genes=genes)
    if len({c[1:] for c in conditions}) == 1:
        x = np.array([[float(s in p.split("+")) for s in "ABC"] for p in effects.perturbation])
    else:
        x = design(effects)
    refitted = []
    for penalty in PENALTIES:
        total = 0.0
        for i in range(len(x)):
            others = np.arange(len(x)) != i
            model = Ridge(alpha=penalty).fit(x[others], effects.effect[others])
            total += ((model.predict(x[i : i + 1])[0] - effects.effect[i]) ** 2).sum()
        refitted.append(total)
    np.testing.assert_allclose(effects.ridge_fit.loo_error, refitted, rtol=1e-6)
    assert refitted[list(PENALTIES).index(effects.ridge_fit.penalty)] <= min(refitted) * (1 + 1e-6)


def test_ridge_extrapolates_to_a_new_context_what_controls_explain_linearly() -> None:
    rng = np.random.default_rng(5)
    factors, genes_of = rng.normal(size=(13, 2)), rng.normal(size=(2, 50))  # 13 cell types in two dimensions
    controls = 3 + factors @ genes_of
    response = rng.normal(size=(2, 50))
    types = [str(i) for i in range(12)]
    effects = TrainingEffects(["A"] * 12, types, ["1"] * 12, controls[:12], factors[:12] @ response, np.ones(12))
    truth = factors[12] @ response
    error = np.square(ridge(effects, "A", "new", "1", controls[12]) - truth).sum()
    error_of_mean = np.square(context_mean_shift(effects, "A", "new", "1", controls[12]) - truth).sum()
    assert error < 1e-3 * error_of_mean


def test_ridge_shrinks_to_the_mean_where_the_controls_explain_nothing() -> None:
    effects = training_effects([("A", str(i), "1") for i in range(40)], seed=6, genes=400)
    assert effects.ridge_fit.penalty >= 100
    np.testing.assert_allclose(
        ridge(effects, "A", "40", "1", effects.control_mean[3]), effects.effect.mean(axis=0), atol=0.05
    )


def test_ridge_with_one_or_two_conditions_is_their_mean() -> None:
    one, two = training_effects(CONDITIONS[:1]), training_effects([("A", "T", "1"), ("A", "NK", "1")])
    new = np.random.default_rng(7).gamma(1.0, size=GENES)
    np.testing.assert_array_equal(ridge(one, "A", "NK", "1", new), one.effect[0])
    assert two.ridge_fit.penalty == PENALTIES[-1]  # left out, each is predicted by the other under any penalty
    np.testing.assert_allclose(ridge(two, "A", "B", "1", new), two.effect.mean(axis=0), atol=1e-3)


def test_ridge_is_fitted_once_and_refuses_other_genes(
    effects: TrainingEffects, monkeypatch: pytest.MonkeyPatch
) -> None:
    ridge(effects, "A", "T", "1", effects.control_mean[0])
    monkeypatch.setattr(RidgeFit, "__init__", lambda *_: pytest.fail("fitted again"))
    ridge(effects, "B", "NK", "1", effects.control_mean[4])
    with pytest.raises(ValueError, match=r"control_mean \(\(3,\)\) must be \(genes,\); pass \(7,\)"):
        ridge(effects, "A", "T", "1", np.zeros(3))


def test_shift_cells_adds_the_shift_clips_at_zero_and_keeps_the_dtype() -> None:
    controls = np.array([[0.0, 1.0, 2.0], [0.5, 0.0, 3.0]], dtype=np.float32)
    predicted = shift_cells(controls, np.array([-0.25, 0.5, -2.5]))
    np.testing.assert_array_equal(predicted, np.array([[0, 1.5, 0], [0.25, 0.5, 0.5]], dtype=np.float32))
    assert predicted.dtype == np.float32
    assert controls[0, 2] == 2


def test_illegal_arguments_are_refused_by_name_value_and_remedy(effects: TrainingEffects) -> None:
    with pytest.raises(ValueError, match=r"training conditions \(0\) must be at least one; put perturbed cells"):
        TrainingEffects([], [], [], np.zeros((0, 3)), np.zeros((0, 3)), np.zeros(0))
    with pytest.raises(ValueError, match=r"batch \(1 entries\) must have one per condition; pass 2"):
        TrainingEffects(["A", "B"], ["T", "T"], ["1"], np.zeros((2, 3)), np.zeros((2, 3)), np.ones(2))
    with pytest.raises(ValueError, match=r"effect \(\(2, 3\)\) must be \(conditions, genes\).*pass \(2, 4\)"):
        TrainingEffects(["A", "B"], ["T", "T"], ["1", "1"], np.zeros((2, 4)), np.zeros((2, 3)), np.ones(2))
    with pytest.raises(ValueError, match=r"control_mean \(NaN or infinite\) must be finite; drop"):
        TrainingEffects(["A"], ["T"], ["1"], np.full((1, 3), np.nan), np.zeros((1, 3)), np.ones(1))
    with pytest.raises(ValueError, match=r"shift \(\(3,\)\) must be \(genes,\) of the controls; pass \(7,\)"):
        shift_cells(np.zeros((2, GENES)), np.zeros(3))
    with pytest.raises(ValueError, match=r"controls \(\(0, 7\)\) must be a non-empty array"):
        shift_cells(np.zeros((0, GENES)), np.zeros(GENES))


@pytest.fixture(scope="module")
def kang() -> tuple[TrainingEffects, np.ndarray, np.ndarray]:
    """Task T1: effects of the training cell types, the real CD4T cells under IFN-beta and their controls."""
    folder = QUALITY / "T1"
    if not folder.exists():
        pytest.skip(f"no {folder}; set PERTURBDIFF_QUALITY to the folder of the quality protocol")
    data, held_out = anndata.read_h5ad(folder / "data.h5ad"), anndata.read_h5ad(folder / "real.h5ad")
    train = data[(data.obs["split"] == "train").to_numpy()]
    means = pd.DataFrame(np.asarray(train.X, dtype=float)).groupby(
        [train.obs[column].astype(str).to_numpy() for column in ("perturbation", "cell_type", "batch")]
    )
    mean, size = means.mean(), means.size()
    treated = [key for key in mean.index if key[0] != "control"]
    control_mean = mean.loc[[("control", *key[1:]) for key in treated]].to_numpy()
    effects = TrainingEffects(
        *(list(column) for column in zip(*treated, strict=True)),
        control_mean=control_mean,
        effect=mean.loc[treated].to_numpy() - control_mean,
        n_cells=size.loc[treated].to_numpy(),
    )
    is_control = (held_out.obs["perturbation"] == "control").to_numpy()
    return effects, held_out.X[~is_control], held_out.X[is_control]


@pytest.mark.parametrize(
    ("name", "pearson", "energy"),
    # The anchors of the protocol's README. It resampled the 814 controls to 901 cells, we shift each once: the
    # differences of up to .01 (energy) are that draw.
    [("context mean shift", 0.80, 0.76), ("perturbation mean shift", 0.80, 0.76), ("ridge", 0.883, 0.31)],
)
def test_baselines_reach_the_anchors_of_the_kang_task(
    kang: tuple[TrainingEffects, np.ndarray, np.ndarray], name: str, pearson: float, energy: float
) -> None:
    effects, real, controls = kang
    assert "CD4T" not in effects.cell_type
    shift = BASELINES[name](effects, "IFN-beta", "CD4T", "kang", controls.mean(axis=0))
    scores = score_condition(shift_cells(controls, shift), real, controls)
    assert scores["pearson_delta"] == pytest.approx(pearson, abs=0.005)
    assert scores["energy_distance"] == pytest.approx(energy, abs=0.015)


def test_labels_are_read_as_the_screen_wrote_them():
    """Parts in any order and with another separator; of doses the nearest on a log scale."""
    notation = Notation(frozenset("ABC"), "|", "@")
    labels = ["A@1", "A@100", "B@1", "A@1|C@1"]
    effect = np.eye(4)
    effects = TrainingEffects(labels, ["T"] * 4, ["b"] * 4, np.zeros((4, 4)), effect, np.ones(4), notation)

    def shift(label):
        return perturbation_mean_shift(effects, label, "T", "b", np.zeros(4)).tolist()

    assert shift("A@1") == shift("A@9") == effect[0].tolist()
    assert shift("A@11") == effect[1].tolist()
    assert shift("C@1|A@1") == effect[3].tolist()
    assert shift("B@1|A@100") == (effect[1] + effect[2]).tolist()
    assert shift("B@1|C@1") == effect.mean(axis=0).tolist()  # C was never seen alone
