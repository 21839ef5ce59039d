"""A file is said to fit exactly where it can be predicted from, with what predictions would warn of."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse

from perturbdiff.config import ObsColumns
from perturbdiff.data.screen import control_cells
from perturbdiff.data.vocab import LabelVocab
from perturbdiff.inference.check import Labels, check_file
from tests.screens import counts_screen, log1p_cp10k, written
from tests.untrained import untrained


@pytest.fixture
def model():
    return untrained()


@pytest.fixture
def adata():
    """Twenty genes, of which the model has twelve; b2 has no T cells that are controls."""
    adata = counts_screen(n_genes=20, seed=int(np.random.default_rng().integers(1 << 30)))
    obs = adata.obs
    return adata[~((obs["perturbation"] == "control") & (obs["cell_type"] == "T") & (obs["batch"] == "b2"))].copy()


def knows(model, low, high, n_genes=20):
    """The model with quantiles of its training controls."""
    sums = (low, low, (low + high) / 2, high, high)
    model.training = replace(model.training, control_sums=sums, measured_genes=n_genes)
    return model


def test_what_a_file_holds_is_what_a_count_finds(model, adata, tmp_path):
    found = check_file(model, written(adata, tmp_path / "s.h5ad"), min_gene_overlap=1.0)
    control = (adata.obs["perturbation"] == "control").to_numpy()
    assert (found.n_cells, found.n_controls) == (adata.n_obs, control.sum())
    assert (found.n_file_genes, found.n_genes, found.missing, found.matched_by) == (20, 12, (), "name")
    X = adata.X.toarray()[control]
    assert found.library == np.median(X.sum(axis=1))
    sums = [sum(np.expm1(row[:12])) for row in log1p_cp10k(X)]
    np.testing.assert_allclose(found.sums, np.quantile(sums, [0.01, 0.5, 0.99]), rtol=1e-5)
    assert found.trained_sums is None
    assert found.perturbations == Labels(("A", "A+B", "B"))
    assert (found.cell_types, found.batches) == (Labels(("NK", "T")), Labels(("b1", "b2")))
    assert found.remarks == ()
    said = found.text()
    for piece in ("20 genes", "12 of the model's 12 matched by name", "raw counts; the model", "fits        yes"):
        assert piece in said
    assert "remark" not in said


@pytest.mark.filterwarnings("ignore:not seen in training", "ignore:the controls lack")
def test_what_is_extrapolated_is_what_a_prediction_calls_unseen(model, adata, tmp_path):
    obs = adata.obs
    obs["cell_type"] = obs["cell_type"].astype(str).replace("NK", "Treg")
    obs["batch"] = obs["batch"].astype(str).replace("b1", "b7")
    obs["perturbation"] = obs["perturbation"].astype(str).replace("B", "Bb")
    absent = sorted(np.random.default_rng().choice(12, 3, replace=False))
    path = written(adata[:, np.delete(np.arange(20), absent)].copy(), tmp_path / "s.h5ad")
    found = check_file(model, path)
    assert found.missing == tuple(f"gene_{g}" for g in absent)
    assert found.perturbations == Labels(("A", "A+B"), ("Bb",))
    assert (found.cell_types, found.batches) == (Labels(("T",), ("Treg",)), Labels(("b2",), ("b7",)))
    controls = control_cells(path, ObsColumns(), None, None)
    uns = model.predict(controls, perturbation="A").uns["perturbdiff"]
    extrapolated = [r for r in found.remarks if r.startswith("extrapolated: ")]
    assert [r.split(", ")[0].replace("extrapolated: ", "").replace("cell type", "cell_type") for r in extrapolated] == [
        *uns["unseen"]
    ]
    assert list(found.missing) == list(uns["genes_absent"])
    said = found.text()
    for piece in ("9 of the model's 12", "3 missing", "cannot be predicted: perturbation Bb; did you mean B"):
        assert piece in said
    assert f"fits        yes, with {len(found.remarks)} remarks" in said


def test_contexts_without_controls_or_without_a_column_are_said(model, adata, tmp_path):
    lone = adata[(adata.obs["perturbation"] != "control") | (adata.obs["cell_type"] == "NK")].copy()
    found = check_file(model, written(lone, tmp_path / "lone.h5ad"))
    assert found.remarks == ("no control cells to predict from: cell type T",)
    bare = adata[adata.obs["perturbation"] == "control"].copy()
    bare.obs = bare.obs[["perturbation", "batch"]]
    found = check_file(model, written(bare, tmp_path / "bare.h5ad"))
    assert found.cell_types == Labels()
    assert found.remarks == ("extrapolated unless predict is told one: cell type, which no obs column says",)
    assert "perturbed   none" in found.text()


def test_the_space_of_x_is_said(model, adata, tmp_path):
    adata.X = sparse.csr_matrix(log1p_cp10k(adata.X) / np.log(2))  # log2(1 + x)
    found = check_file(model, written(adata, tmp_path / "log2.h5ad"))
    assert found.library is None
    assert str(found.space) == "log2(1 + x) of 10,000 counts a cell"
    assert found.remarks == (
        "X holds log2(1 + x) of 10,000 counts a cell; it becomes log1p values of 10,000 counts a cell",
    )
    adata.layers["twice"] = adata.X * 2
    assert str(check_file(model, written(adata, tmp_path / "l.h5ad"), "twice").space) != str(found.space)


def test_sums_are_compared_with_those_of_training(model, adata, tmp_path):
    path = written(adata, tmp_path / "s.h5ad")
    _, median, _ = check_file(model, path).sums
    like = check_file(knows(model, median * 0.9, median * 1.1), path)
    assert like.remarks == ()
    assert like.trained_sums == pytest.approx((median * 0.9, median, median * 1.1))
    assert f"in training {median:,.0f} ({median * 0.9:,.0f} to {median * 1.1:,.0f})" in like.text()
    (odd,) = check_file(knows(model, median * 1.2, median * 1.3), path).remarks
    assert odd.endswith("another tissue or protocol?")


def few_genes(adata):
    return adata[:, 8:].copy()


def no_controls(adata):
    return adata[adata.obs["perturbation"] != "control"].copy()


def negative(adata):
    adata.X = adata.X.toarray()
    adata.X[:, 3] -= 10_000
    return adata


def other_sums(adata):
    keep = np.arange(20) < 12  # the counts of the model's genes alone
    return adata[:, keep].copy()


@pytest.mark.filterwarnings("ignore:X has 12 genes")
@pytest.mark.parametrize("change", [few_genes, no_controls, negative, other_sums])
def test_a_file_is_refused_as_a_prediction_from_it_would_be(model, adata, tmp_path, change):
    path = written(change(adata), tmp_path / "s.h5ad")
    knows(model, 3000.0, 4000.0)
    with pytest.raises(ValueError) as by_predict:  # noqa: PT011 (compared below)
        model.predict(control_cells(path, ObsColumns(), None, None), perturbation="A")
    with pytest.raises(ValueError) as by_check:  # noqa: PT011
        check_file(model, path)
    same = str(by_check.value).replace(str(path), "the given AnnData")
    assert same == str(by_predict.value).replace(str(path), "the given AnnData")


def test_a_model_without_perturbations_is_refused(model, adata, tmp_path):
    model.vocabularies = replace(model.vocabularies, perturbations=LabelVocab("perturbation", ()))
    with pytest.raises(ValueError, match="trained without perturbations"):
        check_file(model, written(adata, tmp_path / "s.h5ad"))
