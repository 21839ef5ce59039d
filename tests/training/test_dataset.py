import re

import anndata
import datasets
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from scipy import sparse

from perturbdiff.atlas.build.run import build
from perturbdiff.config import (
    AtlasConfig,
    BuildConfig,
    Config,
    DataConfig,
    DenoiserConfig,
    DiffusionConfig,
    SourceConfig,
    SplitConfig,
)
from perturbdiff.data.gene_choice import GeneMoments, best_genes
from perturbdiff.data.screen import Screen
from perturbdiff.data.vocab import GeneVocab
from perturbdiff.diffusion.draws import training_draws
from perturbdiff.diffusion.losses import DiffusionLoss
from perturbdiff.nn.conditioning import VocabSizes
from perturbdiff.nn.denoiser import Denoiser
from perturbdiff.training.dataset import TrainingSet
from tests.data.test_gene_choice import response_by_loops
from tests.screens import config_for, counts_screen, log1p_cp10k, read, screen_with_cells, written


def training_set(adata, *words, hold_out=(), validation=(), fraction=0.0):
    split = SplitConfig(list(hold_out), list(validation), fraction)
    config = config_for("memory", "unused", *words, split=split)
    return TrainingSet.from_screen(Screen.read(adata, config.data), config)


def spoiled(adata, chosen):
    """The same cells with absurd expression in those where `chosen`: ten genes at 60,000, the rest 0."""
    X = adata.X.toarray()
    rng = np.random.default_rng(1)
    X[chosen] = 0
    X[np.ix_(chosen, rng.choice(adata.n_vars, 10, replace=False))] = rng.integers(1, 60_000, (chosen.sum(), 10))
    spoiled = adata.copy()
    spoiled.X = sparse.csr_matrix(X)
    return spoiled


@pytest.fixture
def adata():
    return counts_screen(n_genes=80, n=10)


def held_out(adata):
    obs = adata.obs
    return ((obs["perturbation"] == "A") & (obs["cell_type"] == "NK")).to_numpy()


def test_genes_are_chosen_on_training_cells(adata):
    data = training_set(adata, "data.n_hvg=15", hold_out=["A:NK"])
    train = pd.Series(data.split.train, data.origin.obs.index)[adata.obs_names].to_numpy()
    assert not train[held_out(adata)].any()
    variance = log1p_cp10k(adata.X[train]).var(axis=0)
    expected = best_genes(15, variance, response_by_loops(adata, train, {"cell_type", "batch"}))
    assert data.cells.genes.names == tuple(adata.var_names[expected])
    assert len(expected) == 15


def test_genes_of_a_checkpoint_are_kept_beside_the_variable_ones(adata):
    plain = training_set(adata, "data.n_hvg=15")
    known = GeneVocab((*[str(name) for name in adata.var_names[[70, 3, 41]]], "of another panel"))
    config = config_for("memory", "unused", "data.n_hvg=15", split=SplitConfig([], [], 0.0))
    data = TrainingSet.from_screen(read(adata), config, known_genes=known)
    kept = set(plain.cells.genes.names) | set(known.names[:3])
    assert data.cells.genes.names == tuple(name for name in adata.var_names if name in kept)


def test_genes_that_are_perturbed_or_asked_for_are_kept_and_what_is_left_out_is_said(adata):
    plain = training_set(adata, "data.n_hvg=15")
    others = [name for name in adata.var_names if name not in plain.cells.genes.names]
    adata.obs["perturbation"] = adata.obs["perturbation"].astype(str).replace("A", others[3])
    data = training_set(adata, "data.n_hvg=15", f"data.keep_genes=[{others[5]}]", hold_out=[f"{others[3]}:NK"])
    assert {others[3], others[5]} < set(data.cells.genes.names)
    left_out = 80 - len(data.cells.genes)
    said = re.search(
        r"left out    (\d+) of 80 genes, which hold ([\d.]+)% of the variance and ([\d.]+)% of", data.summary()
    )
    assert said is not None
    assert int(said[1]) == left_out
    assert 0 < float(said[2]) < 100
    with pytest.raises(ValueError, match=r"data.keep_genes names gene_x, which the data lack; "):
        training_set(adata, "data.keep_genes=[gene_x]")


def test_perturbed_genes_are_known_by_symbols_and_ensembl_ids_too(adata):
    plain = training_set(adata, "data.n_hvg=15")
    first, second, third = [i for i, name in enumerate(adata.var_names) if name not in plain.cells.genes.names][:3]
    adata.var_names = [f"ENSG{i:011d}" for i in range(adata.n_vars)]
    adata.var["gene_name"] = ["A" if i == first else f"symbol_{i}" for i in range(adata.n_vars)]
    data = training_set(adata, "data.n_hvg=15", f"data.keep_genes=[symbol_{second},ENSG{third:011d}]")
    assert {*adata.var_names[[first, second, third]]} < set(data.cells.genes.names)


@pytest.mark.parametrize("part", ["hold_out", "validation"])
def test_the_expression_of_held_out_cells_chooses_nothing(adata, part):
    chosen = held_out(adata)
    plain = training_set(adata, "data.n_hvg=15", **{part: ["A:NK"]})
    changed = training_set(spoiled(adata, chosen), "data.n_hvg=15", **{part: ["A:NK"]})
    assert changed.cells.genes == plain.cells.genes
    assert changed.vocabularies == plain.vocabularies
    assert changed.match == plain.match
    rows = plain.train.index.rows
    np.testing.assert_array_equal(changed.train.index.rows, rows)
    for name in ("X", "library_size"):
        own, other = (getattr(data.cells, name)[rows] for data in (plain, changed))
        assert (own != other).sum() == 0
    # The same change in training cells does change the choice, so that this test can fail.
    everywhere = training_set(spoiled(adata, chosen), "data.n_hvg=15")
    assert everywhere.cells.genes != training_set(adata, "data.n_hvg=15").cells.genes


def test_library_sizes_are_of_all_genes_of_the_file(adata):
    data = training_set(adata, "data.n_hvg=15")
    totals = dict(zip(adata.obs_names, adata.X.sum(1).A1, strict=True))
    np.testing.assert_array_equal(data.cells.library_size, [totals[name] for name in data.origin.obs.index])


@pytest.mark.parametrize("word", ["data.n_hvg=null", "data.n_hvg=80", "data.n_hvg=2000"])
def test_all_genes_stay_in_file_order_where_no_fewer_are_asked_for(adata, word):
    assert training_set(adata, word).cells.genes.names == tuple(adata.var_names)


def test_only_labels_that_training_gives_a_meaning_are_known():
    adata = screen_with_cells(
        [
            *[("control", cell_type, "b1", 4) for cell_type in ("T", "NK", "B")],
            ("A", "T", "b1", 4), ("B", "T", "b1", 4), ("A", "NK", "b1", 4), ("C", "T", "b1", 4),
            ("A+D", "T", "b1", 4), ("D", "T", "b2", 4), ("E+F", "T", "b1", 4), ("control", "T", "b2", 4),
            ("A", "T", "b2", 4),
        ]
    )  # fmt: skip
    known = training_set(adata, hold_out=["C", "A:NK", "E+F", "*:*:b2"]).vocabularies
    assert known.perturbations.names == ("A", "B", "D")  # C and E+F were held out; A+D teaches A and D
    assert known.cell_types.names == ("T",)  # NK was held out, B has controls only
    assert known.batches.names == ("b1",)


def test_labels_are_not_split_without_a_separator(adata):
    assert training_set(adata, "data.combination_separator=null").vocabularies.perturbations.names == ("A", "A+B", "B")
    assert training_set(adata).vocabularies.perturbations.names == ("A", "B")


def test_labels_of_a_batch_that_gives_the_perturbation_away_are_left_out():
    adata = screen_with_cells([("control", "T", "run1", 5), ("A", "T", "run2", 4)])
    data = training_set(adata)
    assert data.match == "cell_type"
    assert data.vocabularies.batches.names == ()
    assert (data.train.labels.batch == -1).all()
    assert "cell type only" in data.summary()


def test_controls_are_indexed_with_the_null_perturbation(adata):
    index, labels = training_set(adata).train.index, training_set(adata).train.labels
    for condition in range(len(index)):
        ids = set(labels.perturbation[condition].tolist()) - {-1}
        known = {"A": {0}, "B": {1}, "A+B": {0, 1}, "control": set()}
        assert ids == known[index.labels(condition)[0]]


def test_a_held_out_condition_without_controls_is_refused_before_training():
    adata = screen_with_cells([("control", "T", "b", 3), ("A", "T", "b", 3), ("A", "NK", "b", 3)])
    with pytest.raises(ValueError, match="cell type 'NK', batch 'b'; 3 cells\\) has no control cells"):
        training_set(adata, hold_out=["A:NK"])


def test_validating_a_perturbation_that_is_never_trained_is_refused(adata):
    with pytest.raises(ValueError, match=r"split.validation cannot be scored: perturbation 'B' is not known"):
        training_set(adata, hold_out=["A+B"], validation=["B"])


def test_a_validation_that_is_wholly_held_out_is_refused(adata):
    with pytest.raises(ValueError, match=r"split.validation \['A:NK'\] is held out"):
        training_set(adata, hold_out=["A"], validation=["A:NK"])


def test_the_summary_gives_the_numbers(adata):
    text = training_set(adata, "data.n_hvg=15", hold_out=["A:NK"], validation=["B:T:b1"]).summary()
    assert "genes       15 in the model" in text
    assert "90 perturbed cells to train on, 10 to validate, 20 held out" in text
    assert "2 perturbations, 2 cell types, 2 batches" in text
    assert "matched by cell type and batch" in text


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("cache")
def test_library_sizes_of_a_column_are_those_of_the_atlas_and_of_the_model(adata, tmp_path):
    """One rule for the cells of training and for those of predictions, whoever gave it."""
    adata.obs["n"] = np.asarray(adata.X.sum(1)).ravel() * 7.0
    path = written(adata, tmp_path / "a.h5ad")
    columns = {"total": "n", "sums": None}
    for name, column in columns.items():
        build(BuildConfig(out=str(tmp_path / name), sources=[SourceConfig(path=str(path), library_size_col=column)]))

    def of(*names, **given):
        atlases = [AtlasConfig(path=str(tmp_path / name)) for name in names]
        data = DataConfig(atlases=atlases, n_hvg=None, set_size=4, sets_per_batch=2, control_match="batch", **given)
        return TrainingSet.from_atlases(Config(out="unused", data=data))

    assert of("total").cells.preprocessing.library_size_col == "n"
    assert of("sums").cells.preprocessing.library_size_col is None
    assert of("total", "sums").cells.preprocessing.library_size_col is None
    assert "library sizes of sources are column 'n' and row sums; predictions take" in of("total", "sums").summary()
    assert of("total", library_size_col="n").cells.preprocessing.library_size_col == "n"
    np.testing.assert_allclose(of("total").control_sums, 1e4 / 7, rtol=1e-5)
    np.testing.assert_allclose(of("sums").control_sums, 1e4, rtol=1e-5)
    assert of("sums").measured_genes == adata.n_vars
    for setting, value in {"library_size_col": "m", "layer": "counts", "dose_col": "d", "input_kind": "log1p"}.items():
        with pytest.raises(ValueError, match=rf"data.{setting} \('{value}'\): an atlas cannot honour it"):
            of("total", **{setting: value})


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("seed", range(3))
def test_a_screen_and_the_atlas_built_from_it_have_one_index_and_deal_the_same_cells(tmp_path, seed):
    adata = counts_screen(n_genes=9, n=11 + seed, seed=seed)
    path = written(adata, tmp_path / "screen.h5ad")
    build(BuildConfig(str(tmp_path / "atlas"), [SourceConfig(str(path))]), workers=1, shard_bytes=1000)
    split = SplitConfig([], [], 0.2)  # of a context with held-out cells a screen keeps half of the controls
    of_screen = TrainingSet.from_screen(read(adata), config_for("memory", "unused", split=split))
    config = config_for("memory", "unused", split=split)
    config.data.screen, config.data.atlases = None, [AtlasConfig(str(tmp_path / "atlas"))]
    of_atlas = TrainingSet.from_atlases(config)
    names = np.concatenate([pq.read_table(p)["cell"].to_numpy() for p in sorted((tmp_path / "atlas/data").iterdir())])
    assert len(list((tmp_path / "atlas/data").iterdir())) > 1
    assert of_atlas.vocabularies == of_screen.vocabularies
    for part in ("train", "validation"):
        own, other = getattr(of_screen, part), getattr(of_atlas, part)
        conditions = [
            [(cells.index.labels(c), int(cells.index.n_cells[c])) for c in range(len(cells.index))]
            for cells in (own, other)
        ]
        assert conditions[0] == conditions[1]
        samplers = own.sampler(config), other.sampler(config)
        for epoch in range(2):
            for step in range(samplers[0].steps_per_epoch):
                sets = zip(samplers[0].batch(epoch, step), samplers[1].batch(epoch, step), strict=True)
                for of_cells, of_rows in sets:
                    assert of_cells.key == of_rows.key
                    for rows in ("rows", "control_rows"):
                        found = of_screen.origin.obs.index[getattr(of_cells, rows)]
                        assert found.tolist() == names[getattr(of_rows, rows)].tolist()


@pytest.fixture
def unlike_sources(tmp_path, monkeypatch):
    """An atlas of two screens of 30 and 22 genes, of which 12 are common, under batches of their own; its settings."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    seed = int(np.random.default_rng().integers(1 << 30))
    first, second = counts_screen(n_genes=30, seed=seed), counts_screen(n_genes=22, seed=seed + 1)
    second.var_names = [f"gene_{g}" for g in range(18, 40)]
    second.obs["batch"] = second.obs["batch"].map({"b1": "b3", "b2": "b4"})
    paths = [written(adata, tmp_path / f"{name}.h5ad") for name, adata in (("one", first), ("two", second))]
    build(BuildConfig(str(tmp_path / "atlas"), [SourceConfig(str(path)) for path in paths]), workers=1)

    def config(**settings):
        data = DataConfig(atlases=[AtlasConfig(str(tmp_path / "atlas"))], set_size=4, sets_per_batch=8, **settings)
        return Config(out="unused", data=data, split=SplitConfig([], [], 0.0))

    return first, second, config


@pytest.mark.parametrize("settings", [{"n_hvg": None}, {"n_hvg": 25}, {"n_hvg": None, "streamed": True}], ids=str)
def test_sets_of_a_source_give_genes_that_it_lacks_no_gradient(unlike_sources, settings):
    first, second, config = unlike_sources
    data = TrainingSet.from_atlases(config(**settings))
    names, sampler = data.cells.genes.names, data.train.sampler(config(**settings))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        denoiser = Denoiser(DenoiserConfig(width=12, depth=1, n_heads=2), len(names), VocabSizes(9, 9, 9))
        for parameter in denoiser.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    seen = set()
    for step in range(sampler.steps_per_epoch):
        batch = data.train.batch(sampler, 0, step, 0, 1)
        for b, condition in enumerate(batch.conditions):
            own = first if data.train.index.labels(condition)[2] in ("b1", "b2") else second
            has = np.isin(names, own.var_names)
            assert batch.measured[b].tolist() == has.tolist()
            denoiser.zero_grad()
            draws = training_draws(batch, DiffusionConfig(), step)
            DiffusionLoss(DiffusionConfig())(denoiser, batch, draws).total[b].backward()
            gradient = denoiser.head.weight.grad.abs().sum(1)
            assert (gradient[~has] == 0).all()
            assert (gradient[has] > 0).any()
            for layer in (denoiser.embed_x, denoiser.embed_control):
                assert (layer.weight.grad[:, ~has] == 0).all()
            seen.add(own is first)
    assert seen == {True, False}
    data.train.close()
    assert "not measured in every source" in data.summary()


def test_genes_are_chosen_by_the_cells_that_measured_them(unlike_sources):
    first, second, config = unlike_sources
    moments = GeneMoments(40)
    for adata, genes in ((first, slice(0, 30)), (second, slice(18, 40))):
        values, measured = np.zeros((len(adata), 40)), np.zeros(40, dtype=bool)
        values[:, genes], measured[genes] = log1p_cp10k(adata.X), True
        moments.add(sparse.csr_matrix(values), measured)
    chosen = TrainingSet.from_atlases(config(n_hvg=20)).cells.genes.names
    assert chosen == tuple(f"gene_{g}" for g in best_genes(20, moments.variance()))


def test_loadings_are_of_cells_in_which_all_genes_were_measured(unlike_sources):
    with pytest.raises(ValueError, match="needs cells in which all genes were measured, and no training condition"):
        TrainingSet.from_atlases(unlike_sources[-1](n_hvg=None, perturbation_features=["coexpression"]))


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """An atlas of a study and of some of its cells under another cell type, as integrated objects hold them."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    study = counts_screen(n_genes=80, n=10, seed=int(np.random.default_rng().integers(1 << 30)))
    again = study[(study.obs["cell_type"] == "T").to_numpy()].copy()
    again.obs["cell_type"] = "T cell, type 1"
    again.obs_names = [f"other-{name}" for name in again.obs_names]
    paths = [written(adata, tmp_path / f"{name}.h5ad") for name, adata in (("study", study), ("integrated", again))]
    build(BuildConfig(str(tmp_path / "atlas"), [SourceConfig(str(path)) for path in paths]), workers=1)
    return tmp_path / "atlas"


def on_atlases(hold_out, *atlases):
    data = DataConfig(atlases=list(atlases), n_hvg=None, set_size=4, sets_per_batch=8)
    return TrainingSet.from_atlases(Config(out="unused", data=data, split=SplitConfig(hold_out, [], 0.0)))


def test_held_out_cells_that_train_under_another_label_are_refused(copied):
    atlas = AtlasConfig(str(copied))
    with pytest.raises(ValueError, match="10 cells of the held-out condition") as raised:
        on_atlases(["A:T:b1"], atlas)
    said = str(raised.value)
    assert "(perturbation 'A', cell type 'T', batch 'b1') are also in the training condition (perturbation 'A'" in said
    assert "hold out A:T cell, type 1:b1 too" in said
    data = on_atlases(["A:T:b1", "A:T cell, type 1:b1"], atlas)  # what it says
    trained = {data.train.index.labels(i) for i in range(len(data.train.index))}
    assert ("A", "T", "b1") not in trained
    assert ("A", "T cell, type 1", "b2") in trained
    on_atlases(["A:NK"], atlas)  # nobody else's cells
    said = " ".join(data.summary().split())  # lines are broken
    assert "repeats 0 cells equal another one of their condition, 86 are in several conditions" in said


def test_an_atlas_is_given_once(copied):
    atlas, marginal = AtlasConfig(str(copied)), AtlasConfig(str(copied), sets="marginal")
    with pytest.raises(ValueError, match=r"are the same atlas \(sha256 .*\), both with sets=perturbed; give it once"):
        on_atlases([], atlas, atlas)
    on_atlases([], atlas, marginal)  # with labels and without them


def test_a_held_out_cell_that_trains_under_another_label_is_refused():
    adata = screen_with_cells([(p, t, "b", 6) for p in ("control", "A") for t in ("T", "NK")], n_genes=60)
    copied = adata[(adata.obs["perturbation"] == "A") & (adata.obs["cell_type"] == "T")].copy()
    copied.obs["cell_type"] = "T, integrated"
    copied.obs_names = [f"copy {name}" for name in copied.obs_names]
    twice = anndata.concat([adata, copied])
    twice.obs["perturbation"] = twice.obs["perturbation"].astype(str)
    with pytest.raises(ValueError, match=r"6 held-out cells of .* as a cell of A:T:b under A:T, integrated:b"):
        training_set(twice, "data.control_match=cell_type", hold_out=["A:T"])
    training_set(adata, hold_out=["A:T"])


def test_validation_conditions_are_not_trained_on_where_controls_match_by_cell_type():
    cells = [(p, t, b, 4) for p in ("control", *"ABCDEF") for t in ("T", "NK") for b in ("b1", "b2")]
    screen = read(screen_with_cells(cells, n_genes=5))
    data = DataConfig(screen="x", n_hvg=None, set_size=4, sets_per_batch=2, control_match="cell_type")
    split = TrainingSet.from_screen(screen, Config(out="unused", data=data)).split
    known = screen.obs["perturbation"] + ":" + screen.obs["cell_type"]
    assert set(known[split.validation])
    assert not set(known[split.validation]) & set(known[split.train & ~screen.is_control])
