"""Intervals that cover what they say, on conditions they were not made from."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from perturbdiff.inference import calibration as module
from perturbdiff.inference.calibration import (
    calibrate,
    coverage_on_test,
    fit_calibration,
    held_out_means,
    read_means,
    write_means,
)
from perturbdiff.inference.intervals import mean_expression, population_summary
from tests.screens import counts_screen, log1p_cp10k, read
from tests.untrained import untrained


def pairs(measured, mean, spread, change=None):
    """(C, G) arrays as a table; without `change` all genes change as much."""
    C, G = measured.shape
    change = np.ones((C, G)) if change is None else change
    labels = {"perturbation": np.repeat([f"p{c}" for c in range(C)], G), "cell_type": "t", "batch": "b"}
    values = {"measured": measured, "mean": mean, "spread": spread, "delta": change}
    return pd.DataFrame({**labels, **{name: of.ravel() for name, of in values.items()}})


def gaussian(rng, n_conditions, n_genes, n_populations, own_sd, responding_sd=None):
    """Measured means, and predictions whose populations scatter around the same truth; spread differs by gene.

    A tenth of the genes changes most, in both directions, and errs by `responding_sd`.
    """
    sd = rng.lognormal(-1.5, 0.7, (n_conditions, n_genes))
    truth = rng.normal(5, 1, (n_conditions, n_genes))
    change = rng.uniform(0, 0.5, sd.shape)
    responds = np.arange(n_genes) % 10 == 0
    change[:, responds] = rng.choice([-1, 1], change[:, responds].shape) * rng.uniform(1, 2, change[:, responds].shape)
    own = np.where(responds, own_sd if responding_sd is None else responding_sd, own_sd)
    measured = truth + own * sd * rng.normal(size=sd.shape)
    drawn = truth[:, None] + sd[:, None] * rng.normal(size=(n_conditions, n_populations, n_genes))
    return pairs(measured, drawn.mean(axis=1), drawn.std(axis=1, ddof=1), change)


@pytest.mark.parametrize(("own_sd", "responding_sd"), [(0.5, 0.5), (1.0, 4.0), (3.0, 0.5)])
def test_intervals_cover_fresh_conditions_as_often_as_they_say_responding_genes_too(own_sd, responding_sd):
    # All pairs are independent here. Of responding genes 40 x 20 calibrate and 100 x 20 are fresh: the standard error
    # of their coverage is sqrt(0.09 / 800 + 0.09 / 2000) = 0.0125, that of all genes 0.004; four of them are allowed.
    rng = np.random.default_rng(1)
    found = fit_calibration(gaussian(rng, 40, 200, 5, own_sd, responding_sd))
    assert 0.5 < found.change <= 2
    fresh = coverage_on_test(found, gaussian(rng, 100, 200, 5, own_sd, responding_sd))
    assert (fresh.conditions, fresh.n_conditions) == ("test", 100)
    assert (found.coverage.conditions, found.coverage.n_conditions, found.n_conditions) == ("validation", 40, 40)
    for coverage in (fresh, found.coverage):
        assert abs(coverage.of_all - 0.9) < 0.016
        assert abs(coverage.of_responding - 0.9) < 0.05


def test_coverage_is_measured_on_conditions_left_out_not_on_its_own():
    # One condition errs ten times as much: nothing that the others say covers it, and its own genes would.
    rng = np.random.default_rng(2)
    table = gaussian(rng, 3, 400, 4, 1.0)
    last = table["perturbation"] == "p2"
    table.loc[last, "measured"] = table.loc[last, "mean"] + 50
    found = fit_calibration(table)
    assert coverage_on_test(found, table).of_all >= 0.9
    assert found.coverage.of_all == pytest.approx((1.0 + 1.0 + 0.0) / 3)


def test_each_kind_of_genes_has_the_conformal_quantile_with_its_correction_and_its_own_median_error():
    error = np.concatenate([np.arange(1, 181), 1000 * np.arange(1, 21)]).astype(float).reshape(1, -1)
    change = np.where(np.arange(200) < 180, 0.1, -2.0).reshape(1, -1)
    table = pairs(*(np.repeat(of, 2, axis=0) for of in (error, 0 * error, 0 * error, change)))  # each score twice
    found = fit_calibration(table)
    assert found.change == 2.0
    assert found.others.floor == 90.5
    assert found.others.factor * found.others.floor == pytest.approx(163)  # the ceil(361 * 0.9) = 325th smallest of 360
    assert found.responding.floor == 10_500
    assert found.responding.factor * 10_500 == pytest.approx(19_000)  # the ceil(41 * 0.9) = 37th of 40


def test_few_pairs_or_equal_changes_have_one_width_for_all():
    error = np.arange(1, 20, dtype=float).reshape(1, -1).repeat(2, axis=0)
    for table in (pairs(error[:, :9], error[:, :9] * 0, error[:, :9] * 0, error[:, :9]),
                  pairs(error, error * 0, error * 0)):  # fmt: skip
        found = fit_calibration(table)
        assert found.change == 0
        assert found.others == found.responding
        assert found.responds(np.array([0.0, -9.0])).all()
    assert found.others.floor == 10.0  # the median error
    assert found.others.factor * found.others.floor == pytest.approx(18.0)  # the ceil(39 * 0.9) = 36th smallest


@pytest.mark.parametrize(
    ("n_conditions", "n_genes", "level", "message"),
    [(1, 50, 0.9, "1 conditions are too few"), (2, 2, 0.9, "too few for intervals"),
     (3, 50, 1.0, "level \\(1.0\\)"), (3, 50, math.nan, "level \\(nan\\)")],
)  # fmt: skip
def test_too_little_to_calibrate_on_is_refused(n_conditions, n_genes, level, message):
    values = np.ones((n_conditions, n_genes))
    with pytest.raises(ValueError, match=message):
        fit_calibration(pairs(values, values, values), level)


def test_spreads_of_one_population_are_refused():
    values = np.ones((3, 40))
    with pytest.raises(ValueError, match="not finite"):
        fit_calibration(pairs(values, values, values * np.nan))


@pytest.mark.parametrize("match", ["batch", "cell_type"])
def test_a_model_is_calibrated_on_its_held_out_conditions(match):
    model, adata = untrained(std=0.1), counts_screen(n=6)
    if match == "cell_type":  # controls in a batch of their own
        adata.obs["batch"] = np.where(adata.obs["perturbation"] == "control", "c", adata.obs["batch"])
    screen = read(adata)
    held_out = (screen.obs["perturbation"] == "A+B").to_numpy()
    found = calibrate(model, screen, held_out, match, n_populations=3, seed=2)
    assert found.n_conditions == 4
    assert model.training.calibration == found
    log1p = pd.DataFrame(log1p_cp10k(adata.X), index=adata.obs_names)
    control = adata.obs["perturbation"] == "control"
    tables = []
    for cell_type in ("NK", "T"):
        for batch in ("b1", "b2"):
            here = (adata.obs["cell_type"] == cell_type) & ((adata.obs["batch"] == batch) | (match == "cell_type"))
            own = adata[screen.obs.index[screen.obs.index.isin(adata.obs_names[control & here])]].copy()
            condition = (adata.obs["cell_type"] == cell_type) & (adata.obs["batch"] == batch)
            real = log1p[(condition & (adata.obs["perturbation"] == "A+B")).to_numpy()]
            predicted = model.generate(own, "A+B", cell_type, batch, len(real), 3, seed=2)
            table = population_summary(predicted, mean_expression(model, own))
            X = predicted.X.toarray().astype(np.float64)
            populations = {f"population_{k}": X[predicted.obs["population"] == k].mean(axis=0) for k in range(3)}
            labels = {"perturbation": "A+B", "cell_type": cell_type, "batch": batch}
            tables.append(table.assign(**labels, measured=real.mean(0).to_numpy(), **populations))
    expected = pd.concat(tables, ignore_index=True)
    assert repr(found)[:60] == repr(fit_calibration(expected))[:60]
    assert found.responding.factor == pytest.approx(fit_calibration(expected).responding.factor, rel=1e-3)
    assert found.coverage == fit_calibration(expected).coverage
    again = held_out_means(model, screen, held_out, match, n_populations=3, seed=2)
    assert list(again.columns)[:4] == ["perturbation", "cell_type", "batch", "gene"]
    numbers = ["measured", "mean", "control_mean", "delta", "spread", *(f"population_{k}" for k in range(3))]
    np.testing.assert_allclose(again[numbers], expected[numbers], rtol=1e-3, atol=1e-5)
    half = found.half_width(again["spread"].to_numpy(), again["delta"].to_numpy())
    np.testing.assert_allclose(again["upper"] - again["mean"], half, rtol=1e-5)


def test_genes_that_the_screen_lacks_do_not_count_in_a_calibration():
    adata = counts_screen(n=6)
    held_out = (read(adata).obs["perturbation"] == "A+B").to_numpy()
    found = [
        held_out_means(untrained(std=0.1), read(cells), held_out, "batch", n_populations=3, seed=2)
        for cells in (adata[:, :10].copy(), with_zeros(adata))
    ]
    assert len(found[0]) == 4 * 10
    pd.testing.assert_frame_equal(*found, rtol=1e-5)  # a gene that is zero everywhere does not count


def with_zeros(adata):
    adata = adata.copy()
    adata.X = sparse.csr_matrix(adata.X.toarray() * (np.arange(12) < 10))
    return adata


def test_of_many_conditions_some_are_taken_evenly(monkeypatch):
    monkeypatch.setattr(module, "MAX_CONDITIONS", 3)
    screen = read(counts_screen(n=4))
    found = held_out_means(untrained(std=0.1), screen, ~screen.is_control, "batch", n_populations=2)
    taken = found[["perturbation", "cell_type", "batch"]].drop_duplicates().astype(str).values.tolist()
    everything = sorted(
        map(list, {*screen.obs[["perturbation", "cell_type", "batch"]][~screen.is_control].itertuples(index=False)}),
        key=lambda labels: (labels[1], labels[2], labels[0]),
    )
    assert len(everything) == 12
    assert taken == [everything[0], everything[6], everything[11]]


def test_means_are_read_as_they_were_written_and_damage_is_refused(tmp_path):
    screen = read(counts_screen(n=4))
    found = held_out_means(untrained(std=0.1), screen, ~screen.is_control, "batch", n_populations=2)
    write_means(found, tmp_path / "means.parquet")
    pd.testing.assert_frame_equal(
        read_means(tmp_path / "means.parquet"), found, check_dtype=False, check_categorical=False
    )
    found.drop(columns="population_0").to_parquet(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"other\.parquet lacks the columns \['population_0'\]"):
        read_means(tmp_path / "other.parquet")


def test_calibrating_needs_populations_and_conditions():
    model, screen = untrained(), read(counts_screen())
    everything = ~screen.is_control
    with pytest.raises(ValueError, match=r"n_populations \(1\)"):
        calibrate(model, screen, everything, "batch", n_populations=1)
    with pytest.raises(ValueError, match="0 conditions are too few to calibrate on"):
        calibrate(model, screen, screen.is_control, "batch")
    assert model.training.calibration is None
    assert len(held_out_means(model, screen, screen.is_control, "batch")) == 0
