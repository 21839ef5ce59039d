"""Genes of a file and of a model: ids and symbols as names of each other, what is no gene, and what a refusal says."""

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData, concat

from perturbdiff.atlas.build.run import build
from perturbdiff.atlas.build.sources.h5ad import H5adSource
from perturbdiff.config import BuildConfig, DataConfig, ObsColumns, SourceConfig
from perturbdiff.data.screen import Screen, control_cells, genes_of
from perturbdiff.data.vocab import GeneVocab
from tests.screens import read, screen_with_cells

IDS = tuple(f"ENSG{i:011d}" for i in range(6))
SYMBOLS = ("STAT1", "IL2", "MYC", "CD4", "JUN", "FOS")


def var_of(index, **columns):
    return pd.DataFrame(columns, index=list(index))


@pytest.mark.parametrize("column", ["gene_symbol", "feature_name", "gene_name", "gene_short_name"])
def test_a_file_named_by_ids_is_found_by_its_symbols_and_the_other_way_round(column):
    by_id = genes_of(var_of(IDS, **{column: SYMBOLS}))
    by_symbol, with_ids = genes_of(var_of(SYMBOLS[::-1])), genes_of(var_of(SYMBOLS[::-1], gene_ids=IDS[::-1]))
    assert by_id.names == IDS
    for model, file in ((by_id, by_symbol), (by_symbol, by_id), (by_id, with_ids), (with_ids, by_id)):
        found = model.align(file, 1.0)
        assert found.columns.tolist() == [5, 4, 3, 2, 1, 0]
    assert by_id.align(by_symbol, 1.0).matched_by == "symbol"
    assert by_id.align(with_ids, 1.0).matched_by == "Ensembl id"
    assert by_id.select([1, 3]).symbols == ("IL2", "CD4")


def test_a_symbol_of_several_ids_names_none_of_them():
    file = genes_of(var_of(IDS, gene_symbol=[*SYMBOLS[:4], "FOS", "FOS"]))
    assert file.symbols == (*SYMBOLS[:4], "", "")
    assert GeneVocab(SYMBOLS).align(file, 0.0).columns.tolist() == [0, 1, 2, 3, -1, -1]


@pytest.mark.parametrize(
    ("model", "file", "hint"),
    [
        (SYMBOLS, [f"GRCh38_{name}" for name in SYMBOLS], "begin with 'GRCh38_', a genome's; cut it off"),
        (SYMBOLS, [f"hg19__{name}" for name in SYMBOLS], "begin with 'hg19__'"),
        (SYMBOLS, [name.capitalize() for name in SYMBOLS], "agree but for capitals (Stat1, STAT1): another species?"),
        (IDS, [name.replace("ENSG", "ENSMUSG") for name in IDS], "are of ENSG..., the file's of ENSMUSG..."),
    ],
)
def test_a_refusal_says_what_else_the_names_may_be(model, file, hint):
    with pytest.raises(ValueError, match="only 0 of the model's 6 genes") as error:
        GeneVocab(tuple(model)).align(GeneVocab(tuple(file)), 0.5)
    assert hint in str(error.value)


def test_a_refusal_of_quite_other_names_guesses_nothing():
    with pytest.raises(ValueError, match=r"\.\.\. Give a file with these genes"):
        GeneVocab(SYMBOLS).align(GeneVocab(("a_1", "b_2", "c_3")), 0.5)


def screen_with_rows(**rows):
    """Cells of A, B, A+B and controls, besides genes with these rows, each a function of the perturbation."""
    found = [(p, "T", "b", 20) for p in ("control", "A", "B", "A+B")]
    adata = screen_with_cells(found, n_genes=30)
    p = adata.obs["perturbation"].to_numpy()
    X = np.column_stack([adata.X.toarray(), *(np.array([float(row(label)) for label in p]) for row in rows.values())])
    return AnnData(X.astype(np.float32), obs=adata.obs, var=pd.DataFrame(index=[*adata.var_names, *rows]))


def test_a_row_counted_in_cells_of_its_own_perturbation_alone_is_no_gene():
    adata = screen_with_rows(
        A=lambda p: 7 * (p in ("A", "A+B")), B_2=lambda p: 3 * (p in ("B", "A+B")), Bg1=lambda p: p == "B",
        B=lambda p: 1 + (p == "B"), other=lambda p: 5 * (p == "A"),
    )  # fmt: skip
    screen = read(adata)
    assert screen.expression.genes.names == (*(f"gene_{i}" for i in range(30)), "B", "other")
    assert "A, B_2, Bg1 are counted in cells of their own perturbation alone" in "\n".join(screen.notes)
    genes = adata[screen.obs.index, list(screen.expression.genes.names)].X
    np.testing.assert_array_equal(screen.expression.X.toarray(), genes)
    np.testing.assert_array_equal(screen.expression.library_size, genes.sum(1))


def test_a_knocked_out_gene_that_all_cells_but_its_own_have_stays():
    adata = screen_with_rows(A=lambda p: 0 if "A" in p else 3, gene=lambda p: 0)
    assert "A" in Screen.read(adata).expression.genes.names
    few = screen_with_rows(A=lambda p: 0)
    few.X[np.flatnonzero(few.obs["perturbation"] == "A")[0], -1] = 1  # one count in one cell says nothing
    assert "A" in read(few).expression.genes.names


def test_guides_of_controls_are_no_genes_either():
    adata = screen_with_rows(control_1=lambda p: 9 * (p == "control"), A_1=lambda p: 9 * (p in ("A", "A+B")))
    assert not {"control_1", "A_1"} & set(read(adata).expression.genes.names)


@pytest.mark.parametrize("part", [1, 7, 10_000])
def test_guides_are_found_in_sources_and_controls_files_as_in_a_screen(tmp_path, monkeypatch, part):
    adata = screen_with_rows(
        A=lambda p: 7 * (p in ("A", "A+B")), control_1=lambda p: 9 * (p == "control"), B=lambda p: 1 + (p == "B"),
        stray_1=lambda p: 5 * (p == "doublet"),
    )  # fmt: skip
    doublets = adata[adata.obs["perturbation"] == "B"].copy()
    doublets.X[:, -4] = 3  # cells that are left out say nothing of a guide
    doublets.obs["perturbation"] = "doublet"
    adata = concat([adata, doublets], index_unique="-")
    adata.write_h5ad(path := tmp_path / "x.h5ad")
    monkeypatch.setattr("perturbdiff.data.guides.CELLS", part)
    monkeypatch.setattr("perturbdiff.atlas.build.sources.h5ad._GUIDE_VALUES", 40 * part)
    source = H5adSource.open(SourceConfig(path=str(path), drop=["doublet"]))
    screen = Screen.read(path, DataConfig(drop=["doublet"]))
    assert source.genes == screen.expression.genes
    assert source.genes.names == (*(f"gene_{i}" for i in range(30)), "B", "stray_1")
    assert "2 columns of X are no genes, A, control_1 counted in cells of their own perturbation" in source.values
    X, library = source.read(0, source.n_cells)
    names = adata.obs_names[adata.obs["perturbation"] != "doublet"]
    rows = screen.obs.index.get_indexer(names)
    np.testing.assert_array_equal(X.toarray()[: len(rows)], screen.expression.X[rows].toarray())
    np.testing.assert_array_equal(library[: len(rows)], screen.expression.library_size[rows])
    adata[~adata.obs["perturbation"].eq("doublet")].write_h5ad(path)
    controls = control_cells(path, ObsColumns(), None, None)
    assert tuple(controls.var_names) == screen.expression.genes.names


def test_an_atlas_of_a_source_with_guides_has_none(tmp_path):
    screen_with_rows(A_2=lambda p: 7 * (p in ("A", "A+B"))).write_h5ad(path := tmp_path / "x.h5ad")
    atlas = build(BuildConfig(out=str(tmp_path / "atlas"), sources=[SourceConfig(str(path))]), workers=1)
    assert atlas.genes.names == tuple(f"gene_{i}" for i in range(30))


def test_symbols_of_a_file_named_by_ids_may_be_parts_of_combinations():
    adata = screen_with_cells([(p, "T", "b", 3) for p in ("control", "STAT1+MYC", "MYC+STAT1")], n_genes=6)
    adata.var_names = list(IDS)
    adata.var["gene_name"] = list(SYMBOLS)
    screen = read(adata)
    assert set(screen.obs["perturbation"]) == {"control", "MYC+STAT1"}
    assert len(screen.notation.parse("MYC+STAT1")) == 2


def test_guides_of_many_spellings_are_found_and_those_of_stray_counts():
    rows = {name: (lambda p: 7 * (p in ("A", "A+B"))) for name in ("sgA_1", "A_sgRNA2", "A#1", "A_P1", "gRNA-A-3")}
    adata = screen_with_rows(**rows, keep_7=lambda p: 5 * (p == "A"))
    stray = adata.X.copy()
    stray[np.flatnonzero(adata.obs["perturbation"] == "B")[0], 30:32] = 1  # one cell of forty
    for X in (adata.X, stray):
        genes = read(AnnData(X, obs=adata.obs, var=adata.var)).expression.genes.names
        assert genes == (*(f"gene_{i}" for i in range(30)), "keep_7")


@pytest.mark.parametrize("column", ["feature_types", "feature_type"])
def test_rows_that_a_column_calls_guides_are_no_genes(column):
    adata = screen_with_rows(x=lambda p: 3, y=lambda p: 4)
    adata.var[column] = [*["gene"] * 30, "guide", "CRISPR Guide Capture"]
    assert read(adata).expression.genes.names == tuple(f"gene_{i}" for i in range(30))
