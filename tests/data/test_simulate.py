import os
import signal
import subprocess
import sys
import time
import tracemalloc

import anndata
import h5py
import numpy as np
import pytest
import scipy.sparse as sp

from perturbdiff.data import simulate as module
from perturbdiff.data.simulate import LIBRARY_LOG_SD, SimulationConfig, ground_truth, simulate
from tests.processes import PATIENCE

SMALL = SimulationConfig(
    n_genes=40,
    n_cell_types=2,
    n_perturbations=3,
    n_pairs=2,
    doses=(0.5, 2.0),
    cells_per_condition=7,
    control_cells_per_context=13,
    n_effect_genes=8,
)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "new" / "folder" / "screen.h5ad"
    return simulate(SMALL, path), anndata.read_h5ad(path)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Few conditions, many cells: what expectations are compared with."""
    config = SimulationConfig(
        n_genes=120,
        n_cell_types=2,
        n_perturbations=2,
        n_pairs=1,
        doses=(0.3, 2.0),
        cells_per_condition=1000,
        control_cells_per_context=1000,
        n_effect_genes=30,
        seed=7,
    )
    path = tmp_path_factory.mktemp("deep") / "screen.h5ad"
    return simulate(config, path), anndata.read_h5ad(path)


def conditions(screen):
    """(perturbation, cell_type, batch, dose) and (n, G) counts of each condition."""
    for key, rows in screen.obs.groupby(["perturbation", "cell_type", "batch", "dose"], observed=True).indices.items():
        yield key, screen.X[rows].toarray().astype(float)


def raw(path):
    with h5py.File(path) as file:
        x = {name: file["X"][name][:] for name in ("data", "indices", "indptr")}
        return x | {"order": file["obs/perturbation/codes"][:], "dose": file["obs/dose"][:]}


def test_the_file_reads_as_anndata_with_csr_int32_counts_and_its_config(small):
    truth, screen = small
    assert isinstance(screen.X, sp.csr_matrix)
    assert screen.X.dtype == np.int32
    assert screen.X.has_canonical_format
    assert screen.X.data.min() >= 1
    assert list(screen.var_names) == list(truth.genes)
    assert [screen.obs[c].dtype.name for c in ("perturbation", "cell_type", "batch", "dose")] == [
        *["category"] * 3,
        "float64",
    ]
    assert screen.uns["x_kind"] == "raw_counts"
    stored = dict(screen.uns["simulation"])
    assert SimulationConfig(**stored | {"doses": tuple(stored["doses"])}) == SMALL


def test_the_file_has_the_parts_and_attributes_that_anndata_writes(tmp_path):
    simulate(SMALL, tmp_path / "ours.h5ad")
    screen = anndata.read_h5ad(tmp_path / "ours.h5ad")
    screen.write_h5ad(tmp_path / "theirs.h5ad")

    def encodings(path):
        found = {}
        with h5py.File(path) as file:
            found["/"] = dict(file.attrs)
            file.visititems(
                lambda name, item: found.update({name: {k: np.asarray(v).tolist() for k, v in item.attrs.items()}})
            )
        return found

    assert encodings(tmp_path / "ours.h5ad") == encodings(tmp_path / "theirs.h5ad")
    with h5py.File(tmp_path / "ours.h5ad") as file:
        assert file["X/indptr"].dtype == file["X/indices"].dtype == np.int32


def test_a_rewritten_copy_is_the_same_screen(small, tmp_path):
    _, screen = small
    screen.write_h5ad(tmp_path / "copy.h5ad")
    copy = anndata.read_h5ad(tmp_path / "copy.h5ad")
    assert (copy.X != screen.X).nnz == 0
    assert copy.obs.equals(screen.obs)


def test_every_condition_has_the_cells_asked_for(small):
    truth, screen = small
    sizes = screen.obs.groupby(["perturbation", "cell_type", "batch", "dose"], observed=True).size()
    treated = sizes.drop("control", level="perturbation")
    assert len(treated) == (3 + 2) * 2 * 2 * 2
    assert set(treated) == {7}
    assert set(treated.index.get_level_values("dose")) == {0.5, 2.0}
    control = sizes["control"]
    assert len(control) == 2 * 2
    assert set(control) == {13}
    assert set(control.index.get_level_values("dose")) == {0.0}
    assert set(treated.index.get_level_values("perturbation")) == set(truth.perturbations[1:])


def test_labels_are_unique_and_sort_like_numbers(small):
    _, screen = small
    assert screen.obs_names.is_unique
    assert screen.obs_names[1] == "cell_00000001"
    many = ground_truth(SimulationConfig(n_genes=1001, n_perturbations=12, n_cell_types=11, n_batches=10, n_pairs=66))
    assert many.perturbations[0] == "control"
    assert many.genes[3] == "gene_0003"
    assert many.perturbations[1:13] == tuple(f"pert_{i:02d}" for i in range(12))
    for labels in (many.genes, many.cell_types, many.batches, many.perturbations[1:13]):
        assert list(labels) == sorted(set(labels))
    pairs = {tuple(label.split("+")) for label in many.perturbations[13:]}
    assert pairs == {(a, b) for a in many.perturbations[1:13] for b in many.perturbations[1:13] if a < b}


def test_scipy_can_work_with_what_anndata_reads(small):
    X = small[1].X
    assert X.indptr.dtype == X.indices.dtype
    assert X.multiply(np.ones((X.shape[0], 1))).sum() == X.sum()  # what normalising does


def test_cells_are_shuffled_over_the_file(small):
    codes = small[1].obs["perturbation"].cat.codes.to_numpy()
    neighbours_alike = np.mean(codes[1:] == codes[:-1])
    assert neighbours_alike < 0.4  # 0.17 by chance, 0.98 in condition order


def test_mean_fractions_agree_with_the_truth_within_sampling_error(deep):
    truth, screen = deep
    scores = []
    for key, counts in conditions(screen):
        expected = truth.mean_fraction(*key)
        assert expected.sum() == pytest.approx(1, abs=1e-12)
        total = counts.sum(axis=1)
        residual = counts - total[:, None] * expected  # the ratio estimator's linearisation
        common = expected * total.sum() > 100  # enough counts for a normal error
        scores.append((residual.sum(axis=0) / np.sqrt((residual**2).sum(axis=0)))[common])
    scores = np.concatenate(scores)
    assert len(scores) > 0.8 * 120 * (4 + 3 * 2 * 4)
    assert np.abs(scores).max() < 6.5  # tails are heavy where only the cells that respond most express a gene
    assert np.sqrt(np.mean(scores**2)) == pytest.approx(1, abs=0.15)  # genes of a condition are correlated


def test_library_sizes_are_lognormal_with_the_mean_asked_for(deep):
    truth, screen = deep
    total = np.asarray(screen.X.sum(axis=1)).ravel()
    # The noise of the counts adds to the spread, so only the mean is exact.
    assert total.mean() == pytest.approx(
        truth.config.mean_library_size, rel=5 * total.std() / total.mean() / len(total) ** 0.5
    )
    assert LIBRARY_LOG_SD < np.log(total).std() < 1.5 * LIBRARY_LOG_SD


@pytest.mark.parametrize("dispersion", [0.0, 0.3, 1.5])
def test_variance_follows_the_negative_binomial_law(tmp_path, dispersion):
    config = SimulationConfig(
        n_genes=40,
        n_cell_types=1,
        n_batches=1,
        n_perturbations=1,
        cells_per_condition=1,
        control_cells_per_context=20_000,
        n_effect_genes=1,
        effect_size=0.0,
        mean_library_size=400.0,
        dispersion=dispersion,
    )
    truth = simulate(config, tmp_path / "x.h5ad")
    counts = anndata.read_h5ad(tmp_path / "x.h5ad").X.toarray().astype(float)
    mean = 400 * truth.mean_fraction("control", "type_0", "batch_0")
    # Total variance over library sizes L: E[mu + disp mu^2] + Var(mu), with Var(L) / E[L]^2 of the lognormal.
    library = np.exp(LIBRARY_LOG_SD**2) - 1
    expected = mean + dispersion * mean**2 * (1 + library) + mean**2 * library
    ratio = counts.var(axis=0) / expected
    assert np.median(ratio) == pytest.approx(1, abs=0.03)
    assert ratio[np.argsort(mean)[-4:]].mean() == pytest.approx(1, abs=0.08)  # where the dispersion's term dominates


def test_empirical_log_fold_change_correlates_with_the_truth(deep):
    truth, screen = deep
    fraction = {key: (counts.sum(axis=0) + 0.5) / counts.sum() for key, counts in conditions(screen)}
    for (perturbation, cell_type, batch, dose), treated in fraction.items():
        if perturbation == "control" or dose < 1:
            continue
        measured = np.log(treated / fraction["control", cell_type, batch, 0.0])
        expected = truth.log_fold_change(perturbation, cell_type, batch, dose)
        assert np.corrcoef(measured, expected)[0, 1] > 0.9


def test_effects_are_sparse_with_the_size_asked_for_and_mostly_shared_by_cell_types():
    config = SimulationConfig(n_perturbations=40, n_batches=1, effect_size=0.7, batch_variability=0.0)
    truth = ground_truth(config)
    change = np.array(
        [[truth.log_fold_change(p, t, "batch_0") for t in truth.cell_types] for p in truth.perturbations[1:]]
    )
    assert set((change != 0).sum(axis=2).ravel()) == {40}
    moved = change[:, 0] != 0
    assert len({tuple(row) for row in moved}) == 40
    values = np.stack([change[:, t][moved] for t in range(4)])
    assert values.std() == pytest.approx(0.7, rel=0.06)
    correlation = np.corrcoef(values)[np.triu_indices(4, 1)]
    assert np.all((correlation > 0.65) & (correlation < 0.85))


def test_cells_respond_with_different_strengths(tmp_path):
    # Without count noise and library, what is left of a treated gene's variance is the heterogeneity of the response.
    config = SimulationConfig(
        n_genes=50,
        n_cell_types=1,
        n_batches=1,
        n_perturbations=1,
        cells_per_condition=800,
        control_cells_per_context=800,
        n_effect_genes=5,
        mean_library_size=1e6,
        dispersion=0.0,
    )
    truth = simulate(config, tmp_path / "x.h5ad")
    change = truth.log_fold_change("pert_0", "type_0", "batch_0")
    moved = np.argmax(np.abs(change))
    spread = {}
    for (perturbation, *_), counts in conditions(anndata.read_h5ad(tmp_path / "x.h5ad")):
        reference = counts[:, change == 0].sum(axis=1)
        spread[perturbation] = np.log((counts[:, moved] + 0.5) / reference).std()
    assert spread["pert_0"] == pytest.approx(np.sqrt(0.2) * abs(change[moved]), rel=0.15)  # sd of 2 Beta(2, 2)
    assert spread["control"] < 0.2 * spread["pert_0"]


def test_effects_differ_between_batches_by_the_variability_asked_for():
    sizes = {"n_genes": 60, "n_perturbations": 30, "n_batches": 20, "n_cell_types": 2, "n_effect_genes": 20}

    def changes(variability):
        truth = ground_truth(SimulationConfig(**sizes, batch_variability=variability))
        return np.array(
            [[truth.log_fold_change(p, "type_1", k) for k in truth.batches] for p in truth.perturbations[1:]]
        )

    same, random = changes(0.0), changes(0.4)
    assert np.all(same == same[:, :1])
    moved = same != 0
    ratio = (random[moved] / same[moved]).reshape(30, 20, 20)  # (P, K, E)
    assert ratio.mean() == pytest.approx(1, abs=0.05)
    assert ratio.std() == pytest.approx(0.4, rel=0.1)
    assert ratio.mean(axis=2).std() == pytest.approx(0.4 / 2**0.5, rel=0.15)  # the part common to the genes
    assert np.all(random[~moved] == 0)


def test_response_grows_with_dose_and_saturates():
    truth = ground_truth(SimulationConfig(n_genes=60, n_pairs=1))
    doses = [0.0, 0.1, 0.5, 1.0, 3.0, 10.0]
    for label in ("pert_2", truth.perturbations[-1]):
        size = np.array([np.linalg.norm(truth.log_fold_change(label, "type_0", "batch_0", d)) for d in doses])
        assert size[0] == 0
        assert np.all(np.diff(size) > 0)
        assert np.all(np.diff(np.diff(size) / np.diff(doses)) < 0)
        assert size[5] / size[4] < 1.06
    control = truth.mean_fraction("control", "type_0", "batch_0", 0.0)
    distance = [np.abs(truth.mean_fraction("pert_2", "type_0", "batch_0", d) - control).sum() for d in doses]
    assert distance[0] == pytest.approx(0, abs=1e-12)
    assert np.all(np.diff(distance) > 0)
    assert not truth.log_fold_change("control", "type_0", "batch_0", 3.0).any()


def test_pairs_are_the_sum_of_their_singles_and_a_small_interaction():
    truth = ground_truth(SimulationConfig(n_pairs=15, n_effect_genes=40))
    for label in truth.perturbations[7:]:
        first, second = label.split("+")
        pair, a, b = (truth.log_fold_change(p, "type_3", "batch_1") for p in (label, first, second))
        interaction = pair - a - b
        genes = np.abs(interaction) > 1e-9
        assert genes.sum() == 10
        assert np.all((a != 0) | (b != 0) | ~genes)
        assert np.linalg.norm(interaction) < 0.3 * np.linalg.norm(a + b)


def test_asking_for_pairs_or_more_cells_leaves_the_single_effects_alone():
    plain = ground_truth(SimulationConfig())
    more = ground_truth(SimulationConfig(n_pairs=4, cells_per_condition=5, doses=(1.0, 2.0), mean_library_size=10.0))
    for label in plain.perturbations:
        of_plain, of_more = (x.mean_fraction(label, "type_2", "batch_1") for x in (plain, more))
        np.testing.assert_array_equal(of_plain, of_more)


def test_zeros_come_from_depth_alone(tmp_path):
    sizes = {"n_genes": 100, "n_cell_types": 1, "n_batches": 1, "n_perturbations": 1, "cells_per_condition": 1}
    library = np.exp(np.random.default_rng(0).normal(-(LIBRARY_LOG_SD**2) / 2, LIBRARY_LOG_SD, 4000))
    seen = []
    for depth in (30.0, 300.0, 3000.0):
        config = SimulationConfig(**sizes, control_cells_per_context=4000, mean_library_size=depth)
        fraction = simulate(config, tmp_path / "x.h5ad").mean_fraction("control", "type_0", "batch_0")
        x = anndata.read_h5ad(tmp_path / "x.h5ad").X
        seen.append(1 - x.nnz / np.prod(x.shape))
        mu = depth * library[:, None] * fraction
        expected = np.mean((1 + config.dispersion * mu) ** (-1 / config.dispersion))  # NB probability of 0
        assert seen[-1] == pytest.approx(expected, abs=0.01)
    assert seen[0] > seen[1] + 0.2 > seen[2] + 0.4


@pytest.mark.parametrize("chunk_cells", [1, 100, 256])
def test_the_same_config_gives_the_same_file_whatever_the_chunk(tmp_path, chunk_cells):
    simulate(SMALL, tmp_path / "whole.h5ad")
    simulate(SMALL, tmp_path / "cut.h5ad", chunk_cells=chunk_cells)
    whole, cut = raw(tmp_path / "whole.h5ad"), raw(tmp_path / "cut.h5ad")
    assert len(whole["order"]) == 332  # neither a multiple of a block nor of a chunk
    for name in whole:
        np.testing.assert_array_equal(whole[name], cut[name])
        assert whole[name].dtype == cut[name].dtype


def test_another_seed_gives_other_cells_and_another_truth(tmp_path):
    other = SimulationConfig(**vars(SMALL) | {"seed": 1})
    truths = [simulate(config, tmp_path / f"{config.seed}.h5ad") for config in (SMALL, other)]
    a, b = raw(tmp_path / "0.h5ad"), raw(tmp_path / "1.h5ad")
    assert np.any(a["order"] != b["order"])
    assert np.mean(a["indptr"] == b["indptr"]) < 0.1
    changes = [truth.log_fold_change("pert_1", "type_0", "batch_0") for truth in truths]
    assert not np.allclose(*changes)


@pytest.mark.slow
def test_peak_memory_does_not_hold_the_cells(tmp_path):
    def peak(cells):
        config = SimulationConfig(
            n_genes=1000, n_cell_types=1, n_batches=1, n_perturbations=1, cells_per_condition=cells,
            control_cells_per_context=1, mean_library_size=500.0,
        )  # fmt: skip
        tracemalloc.start()
        simulate(config, tmp_path / "x.h5ad", chunk_cells=256)
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    peak(64)  # imports and caches
    low, high = peak(1000), peak(9000)
    assert high < 9000 * 1000 * 4 / 4  # a quarter of the dense matrix in int32
    assert high - low < 8000 * 400  # bytes per cell: obs and its names, against 2000 for CSR


def test_an_interrupted_write_leaves_nothing_and_keeps_the_old_file(tmp_path, monkeypatch):
    draw = module._block

    def interrupted(truth, obs, first):
        if first >= 128:
            raise KeyboardInterrupt
        return draw(truth, obs, first)

    simulate(SMALL, tmp_path / "old.h5ad")
    before = (tmp_path / "old.h5ad").read_bytes()
    monkeypatch.setattr(module, "_block", interrupted)
    for name in ("old.h5ad", "new.h5ad"):
        with pytest.raises(KeyboardInterrupt):
            simulate(SMALL, tmp_path / name, chunk_cells=64)
    assert [path.name for path in tmp_path.iterdir()] == ["old.h5ad"]
    assert (tmp_path / "old.h5ad").read_bytes() == before


@pytest.mark.slow
def test_a_killed_write_leaves_no_file_under_the_final_name(tmp_path):
    code = (
        "import sys; from perturbdiff.data.simulate import *\n"
        "simulate(SimulationConfig(n_genes=2000, cells_per_condition=10_000), sys.argv[1])"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "x.h5ad")])
    try:
        deadline = time.monotonic() + PATIENCE
        while not any(path.stat().st_size > 1 << 20 for path in tmp_path.iterdir()):
            assert process.poll() is None
            assert time.monotonic() < deadline
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not os.path.exists(tmp_path / "x.h5ad")


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("n_genes", 0, "at least 1"),
        ("n_cell_types", -1, "at least 1"),
        ("n_batches", 0, "at least 1"),
        ("n_perturbations", 0, "at least 1"),
        ("cells_per_condition", 0, "at least 1"),
        ("control_cells_per_context", 0, "at least 1"),
        ("n_effect_genes", 0, "at least 1"),
        ("n_effect_genes", 501, r"must not exceed n_genes \(500\)"),
        ("n_pairs", 16, "between 0 and 15"),
        ("n_pairs", -1, "between 0 and 15"),
        ("doses", (), "positive, finite and distinct"),
        ("doses", (0.0, 1.0), "positive, finite and distinct"),
        ("doses", (1.0, 1.0), "positive, finite and distinct"),
        ("doses", (1.0, float("nan")), "positive, finite and distinct"),
        ("effect_size", -1.0, "not negative"),
        ("effect_size", float("nan"), "finite"),
        ("batch_variability", -0.1, "not negative"),
        ("dispersion", float("inf"), "finite"),
        ("seed", -1, "not negative"),
        ("mean_library_size", 0.0, "positive"),
    ],
)
def test_a_senseless_config_is_refused_with_its_value(field, value, rule):
    with pytest.raises(ValueError, match=rule) as error:
        SimulationConfig(**{field: value})
    assert f"{field} ({value})" in str(error.value)


def test_wrong_arguments_are_refused_with_their_value(small, tmp_path):
    truth, _ = small
    with pytest.raises(ValueError, match=r"chunk_cells \(0\)"):
        simulate(SMALL, tmp_path / "x.h5ad", chunk_cells=0)
    with pytest.raises(KeyError, match=r"cell_type \('type_9'\).*'type_0', 'type_1'"):
        truth.mean_fraction("pert_0", "type_9", "batch_0")
    with pytest.raises(ValueError, match=r"dose \(-1\.0\)"):
        truth.log_fold_change("pert_0", "type_0", "batch_0", -1.0)
    with pytest.raises(ValueError, match=r"count \(\d+\) must fit in int32"):
        simulate(SimulationConfig(mean_library_size=1e13), tmp_path / "x.h5ad")
    assert not list(tmp_path.iterdir())
