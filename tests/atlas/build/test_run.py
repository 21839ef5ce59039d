import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from scipy import sparse

from perturbdiff.atlas.build import plan as build_plan
from perturbdiff.atlas.build.run import build
from perturbdiff.atlas.build.sort import cuts
from perturbdiff.atlas.store import Atlas
from perturbdiff.config import BuildConfig, DataConfig, SourceConfig
from perturbdiff.data.gene_choice import best_genes
from perturbdiff.data.screen import Screen
from tests.processes import PATIENCE
from tests.screens import ROOT, counts_screen, log1p_cp10k, screen_with_cells, written

pytestmark = pytest.mark.slow

MB = 1 << 20
SMALL = 3000  # bytes of a shard: some dozen shards and buckets from a screen of a few hundred cells


def source(path: Path, **settings) -> SourceConfig:
    return SourceConfig(path=str(path), **settings)


def config(out: Path, *sources: SourceConfig, **settings) -> BuildConfig:
    return BuildConfig(out=str(out), sources=list(sources), **settings)


def built(settings: BuildConfig, workers: int = 1, **how) -> Atlas:
    atlas = build(settings, workers=workers, **how)
    assert atlas is not None
    return atlas


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def table(atlas: Atlas) -> pd.DataFrame:
    folder = Path(str(atlas.folder))
    return pd.concat([pq.read_table(folder / shard.file).to_pandas() for shard in atlas.info.shards], ignore_index=True)


def values_of(atlas: Atlas) -> dict[tuple[str, str], dict[str, float]]:
    """(source, cell) -> the genes it has and their values."""
    names = atlas.genes.names
    column = "log1p" if atlas.info.input_kind == "log1p" else "counts"
    rows = table(atlas)
    return {
        (row["source"], row["cell"]): {names[g]: float(v) for g, v in zip(row["genes"], row[column], strict=True)}
        for _, row in rows.iterrows()
    }


def expected_values(
    name: str, adata: anndata.AnnData, genes=None, rows=None
) -> dict[tuple[str, str], dict[str, float]]:
    dense = np.asarray(adata.X.todense() if sparse.issparse(adata.X) else adata.X)
    kept = set(adata.var_names if genes is None else genes)
    return {
        (name, cell): {g: float(v) for g, v in zip(adata.var_names, dense[i], strict=True) if v and g in kept}
        for i, cell in enumerate(adata.obs_names)
        if rows is None or rows[i]
    }


@pytest.fixture
def pieces(monkeypatch):
    """Reads some ten cells at a time, so that a small screen has many chunks."""
    monkeypatch.setattr(build_plan, "READ_VALUES", 100)
    monkeypatch.setattr(build_plan, "MOST_VALUES", 300)


@pytest.fixture(scope="module")
def screens(tmp_path_factory):
    """Two screens of 108 cells and 12 and 15 genes, of which 9 are common, in another order."""
    folder = tmp_path_factory.mktemp("screens")
    first, second = counts_screen(seed=1), counts_screen(n_genes=15, seed=2)
    second.var_names = [f"gene_{g}" for g in (14, 3, 5, 1, 4, 11, 12, 13, 9, 8, 7, 6, 15, 16, 17)]
    second.obs["batch"] = second.obs["batch"].map({"b1": "b2", "b2": "b3"})
    paths = written(first, folder / "one.h5ad"), written(second, folder / "two.h5ad", None)
    return first, second, *paths


# ------------------------------------------------------------------------------------ order and values


def test_an_atlas_of_one_file_holds_its_cells_in_the_order_of_the_screen(screens, tmp_path, pieces):
    adata, _, path, _ = screens
    atlas = built(config(tmp_path / "atlas", source(path)), shard_bytes=SMALL)
    screen = Screen.read(path, DataConfig(screen=str(path)))
    rows = table(atlas)
    assert len(atlas.info.shards) > 3
    assert rows["cell"].tolist() == screen.obs.index.tolist()
    for label in ("cell_type", "batch", "perturbation"):
        assert rows[label].tolist() == screen.obs[label].tolist()
    np.testing.assert_array_equal(np.concatenate(rows["genes"]), screen.expression.X.indices)
    np.testing.assert_array_equal(np.concatenate(rows["counts"]), screen.expression.X.data)
    np.testing.assert_array_equal(rows["genes"].map(len), np.diff(screen.expression.X.indptr))
    np.testing.assert_array_equal(rows["library_size"], screen.expression.library_size)
    assert set(rows["source"]) == {"one"}
    atlas.verify()
    assert atlas.genes.names == tuple(adata.var_names)


def test_conditions_say_where_their_cells_are(screens, tmp_path, pieces):
    _, _, one, two = screens
    atlas = built(config(tmp_path / "atlas", source(one), source(two)), shard_bytes=SMALL)
    rows = table(atlas)
    found = rows.groupby(["cell_type", "batch", "perturbation"], sort=True).agg(n=("cell", "size"))
    conditions = atlas.conditions.to_pandas()
    assert list(zip(*(conditions[c] for c in ("cell_type", "batch", "perturbation")), strict=True)) == list(found.index)
    assert conditions["n_cells"].tolist() == found["n"].tolist()
    assert (conditions["is_control"] == (conditions["perturbation"] == "control")).all()
    n_cells = [shard.n_cells for shard in atlas.info.shards]
    firsts = dict(zip([shard.file for shard in atlas.info.shards], np.cumsum(n_cells) - n_cells, strict=True))
    for condition in conditions.itertuples():
        row = rows.iloc[firsts[condition.shard] + condition.first_row]
        assert (row["cell_type"], row["batch"], row["perturbation"]) == condition[1:4]
    assert atlas.info.n_cells == len(rows) == 216
    assert (atlas.info.n_conditions, atlas.info.n_batches, atlas.info.n_cell_types) == (len(found), 3, 2)
    assert atlas.info.n_perturbations == 3


def test_shards_are_no_larger_than_asked(screens, tmp_path, pieces):
    _, _, one, two = screens
    for shard_bytes in (1, SMALL, 10 * SMALL):
        atlas = built(config(tmp_path / f"atlas{shard_bytes}", source(one), source(two)), shard_bytes=shard_bytes)
        folder = Path(str(atlas.folder))
        sizes = [4 * sum(map(len, pq.read_table(folder / s.file)["genes"].to_pylist())) for s in atlas.info.shards]
        n_cells = [s.n_cells for s in atlas.info.shards]
        assert all(size <= shard_bytes or n == 1 for size, n in zip(sizes, n_cells, strict=True))
        assert sum(n_cells) == 216
        if shard_bytes > 1:
            assert len(sizes) < 2 * sum(sizes) / shard_bytes + 2  # not many small ones


def test_cuts_prefer_the_end_of_a_group_and_waste_little():
    assert cuts(np.full(10, 1), np.zeros(10), 10) == [(0, 10)]
    assert cuts(np.full(10, 1), np.zeros(10), 9) == [(0, 5), (5, 10)]
    assert cuts(np.full(10, 1), np.array([0] * 4 + [1] * 6), 9) == [(0, 4), (4, 10)]
    assert cuts(np.array([50, 1, 1]), np.zeros(3), 9) == [(0, 1), (1, 3)]
    assert cuts(np.zeros(0), np.zeros(0), 9) == []
    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes, groups = rng.integers(0, 20, 200), np.sort(rng.integers(0, 9, 200))
        ranges = cuts(sizes, groups, 100)
        assert [r[0] for r in ranges] + [200] == [0] + [r[1] for r in ranges]
        assert all(0 < sizes[a:b].sum() <= 100 for a, b in ranges)


def test_cells_of_one_name_in_two_sources_stay_two(screens, tmp_path):
    first, second, one, two = screens
    assert set(first.obs_names) == set(second.obs_names)
    atlas = built(config(tmp_path / "atlas", source(one), source(two)))
    assert values_of(atlas) == expected_values("one", first) | expected_values("two", second)


def test_a_seed_gives_another_order_of_the_same_cells(screens, tmp_path):
    _, _, one, _ = screens
    atlases = [built(config(tmp_path / f"atlas{seed}", source(one), seed=seed)) for seed in (0, 1)]
    cells = [table(atlas)["cell"].tolist() for atlas in atlases]
    assert cells[0] != cells[1]
    assert sorted(cells[0]) == sorted(cells[1])


@pytest.mark.parametrize("rule", ["union", "intersection", "file", "merge-then-select:4"])
def test_genes_are_merged_as_a_direct_computation_on_dense_matrices_does(screens, tmp_path, pieces, rule):
    first, second, one, two = screens
    names = [list(first.var_names), list(second.var_names)]
    if rule == "union":
        genes = names[0] + [name for name in names[1] if name not in names[0]]
    elif rule == "intersection":
        genes = [name for name in names[0] if name in names[1]]
    elif rule == "file":
        genes = ["gene_16", "gene_3", "gene_0", "gene_2"]
        (tmp_path / "genes.txt").write_text("\n".join(genes))
    else:
        kept = second.obs["perturbation"] != "A"
        logs = [log1p_cp10k(X) for X in (first.X, second.X[kept.to_numpy()])]
        chosen = {n[g] for n, X in zip(names, logs, strict=True) for g in best_genes(4, X.var(axis=0))}
        genes = [g for g in dict.fromkeys(names[0] + names[1]) if g in chosen]
        assert 4 < len(genes) < 9
    drop = ["A"] if rule.startswith("merge") else []
    settings = config(tmp_path / "atlas", source(one), source(two, drop=drop))
    settings.genes = str(tmp_path / "genes.txt") if rule == "file" else rule
    atlas = built(settings)
    assert list(atlas.genes.names) == genes
    kept = None if not drop else (second.obs["perturbation"] != "A").to_numpy()
    assert values_of(atlas) == expected_values("one", first, genes) | expected_values("two", second, genes, kept)
    assert [s.n_genes_kept for s in atlas.info.sources] == [len(set(genes) & set(n)) for n in names]
    rows = table(atlas).set_index(["source", "cell"])
    totals = np.asarray(first.X.sum(axis=1)).ravel()  # over all genes, kept or not
    assert rows.loc[[("one", cell) for cell in first.obs_names], "library_size"].tolist() == totals.tolist()
    assert atlas.info.genes_rule == rule
    assert all((np.diff(genes.astype(int)) > 0).all() for genes in rows["genes"])


def test_genes_that_a_source_has_not_are_not_measured_in_it(screens, tmp_path, pieces):
    first, second, *paths = screens
    atlas = built(config(tmp_path / "atlas", *map(source, paths)), shard_bytes=SMALL)
    assert atlas.measured.sum(axis=1).tolist() == [12, 15]
    for row, adata in zip(atlas.measured, (first, second), strict=True):
        assert {g for g, there in zip(atlas.genes.names, row, strict=True) if there} == set(adata.var_names)
    found, labels = table(atlas), ["cell_type", "batch", "perturbation"]
    of_cells = {key: sorted(set(part["source"])) for key, part in found.groupby(labels)}
    assert {len(names) for names in of_cells.values()} == {1, 2}  # b2 is a batch of both
    for row in atlas.conditions.to_pylist():
        names = [atlas.info.sources[number].name for number in row["sources"]]
        assert names == of_cells[tuple(row[label] for label in labels)]
    atlas.verify()
    # In an atlas of it, a gene counts where all of its sources measured it.
    other = built(config(tmp_path / "other", source(tmp_path / "atlas"), source(paths[0], name="again")))
    common = [g in set(first.var_names) & set(second.var_names) for g in other.genes.names]
    assert other.measured.tolist() == [common, [g in set(first.var_names) for g in other.genes.names]]
    other.verify()


@pytest.mark.parametrize("n_genes", [300, 220])  # all, or those that vary
def test_cells_that_come_again_are_reported(tmp_path, capsys, pieces, n_genes):
    study = counts_screen(n_genes=300, n=6, seed=int(np.random.default_rng().integers(1 << 30)))
    moved = study[(study.obs["cell_type"] == "T").to_numpy() & (study.obs["perturbation"] != "B").to_numpy()].copy()
    moved.obs["cell_type"] = "T cell"
    same = study[(study.obs["perturbation"] == "B").to_numpy()].copy()
    for adata in (moved, same):
        adata.obs_names = [f"other-{name}" for name in adata.obs_names]
    moved, same = moved[:, :n_genes].copy(), same[:, ::-1].copy()
    names = ("study", "moved", "same")
    paths = [written(adata, tmp_path / f"{n}.h5ad") for n, adata in zip(names, (study, moved, same), strict=True)]
    sources = [source(paths[0]), source(paths[1]), source(paths[2], cells="perturbed")]
    atlas = built(config(tmp_path / "atlas", *sources), shard_bytes=SMALL)
    assert len(atlas.info.shards) > 3  # wherever they lie
    assert (atlas.info.repeats_within, atlas.info.repeats_across) == (len(same), len(moved))
    labels = [(r["perturbation"], r["cell_type"], r["batch"]) for r in atlas.conditions.to_pylist()]
    shared = {(labels[a], labels[b]): n for a, b, n in atlas.shared().tolist()}
    expected = {}
    for p, b in ((p, b) for p in ("control", "A", "A+B") for b in ("b1", "b2")):
        expected[(p, "T", b), (p, "T cell", b)] = expected[(p, "T cell", b), (p, "T", b)] = 9 if p == "control" else 6
    assert shared == expected
    said = " ".join(capsys.readouterr().out.split())
    assert f"repeats {len(same)} cells equal another one of their condition, {len(moved)} are in several" in said
    assert "control:T:b1 and control:T cell:b1 share 9; control:T:b2 and control:T cell:b2 share 9" in said
    atlas.verify()


def test_one_file_is_one_source(screens, tmp_path):
    *_, path, other = screens
    copy = Path(shutil.copy(path, tmp_path / "copy.h5ad"))
    (tmp_path / "link.h5ad").symlink_to(path)
    for again in (copy, tmp_path / "link.h5ad"):
        with pytest.raises(
            ValueError, match=r"sources 'one' \(.*\) and 'again' \(.*\) are the same file; give it once"
        ):
            build(config(tmp_path / "a", source(path), source(other), source(again, name="again")), workers=1)
    parts = [source(path, cells="perturbed"), source(copy, cells="unperturbed")]
    assert len(built(config(tmp_path / "b", *parts))) == 108


def test_overlap_is_reported(screens, tmp_path, capsys):
    _, _, one, two = screens
    built(config(tmp_path / "atlas", source(one), source(two), genes="intersection"))
    said = capsys.readouterr().out
    assert "two: 108 of 108 cells, 9 of 15 genes are among the atlas's 9, library sizes: row sums; raw counts" in said
    assert "conditions" in said


def test_log1p_values_stay_as_they_are(screens, tmp_path):
    first, _, _, _ = screens
    adata = first.copy()
    adata.X = sparse.csr_matrix(log1p_cp10k(first.X).astype(np.float32))
    atlas = built(config(tmp_path / "atlas", source(written(adata, tmp_path / "log.h5ad"))))
    assert atlas.info.value_type == "float32"
    assert values_of(atlas) == expected_values("log", adata)
    assert set(table(atlas)["library_size"]) == {1.0}


def test_an_atlas_is_a_source_to_filter_and_cut_anew(screens, tmp_path, pieces):
    _, _, one, two = screens
    both = built(config(tmp_path / "both", source(one), source(two)), shard_bytes=SMALL)
    again = built(config(tmp_path / "again", source(tmp_path / "both", name="both", drop=["A:T", "B"])))
    old, new = table(both), table(again)
    kept = ~((old["perturbation"] == "B") | ((old["perturbation"] == "A") & (old["cell_type"] == "T")))
    compared = ["perturbation", "cell_type", "batch", "cell", "library_size"]
    assert new[compared].to_numpy().tolist() == old.loc[kept, compared].to_numpy().tolist()
    for column in ("genes", "counts"):
        assert [v.tolist() for v in new[column]] == [v.tolist() for v in old.loc[kept, column]]
    assert len(again.info.shards) == 1


@pytest.mark.parametrize("label", ["a/b", 'quo"te', "Ω α+β", "..", "a,b;c"])
def test_labels_and_cell_names_may_be_odd(tmp_path, label):
    adata = screen_with_cells([("control", label, "b", 3), (label, label, label, 3)])
    adata.obs_names = [f"{label}{i}" for i in range(6)]
    atlas = built(config(tmp_path / "atlas", source(written(adata, tmp_path / "odd.h5ad"))))
    rows = table(atlas)
    assert sorted(rows["cell"]) == sorted(adata.obs_names)
    assert set(rows["perturbation"]) == {"control", label}
    atlas.verify()


def test_one_cell_and_a_cell_without_counts(tmp_path):
    adata = screen_with_cells([("control", "T", "b", 1)])
    atlas = built(config(tmp_path / "one", source(written(adata, tmp_path / "x.h5ad"))))
    assert atlas.info.n_cells == 1
    adata.X = sparse.csr_matrix(adata.shape, dtype=np.float32)
    atlas = built(config(tmp_path / "none", source(written(adata, tmp_path / "y.h5ad"))))
    rows = table(atlas)
    assert [len(genes) for genes in rows["genes"]] == [0]
    assert rows["library_size"].tolist() == [0.0]
    atlas.verify()


def test_controls_alone_make_an_atlas(tmp_path):
    path = written(screen_with_cells([("control", "T", "b", 5)]), tmp_path / "x.h5ad")
    atlas = built(config(tmp_path / "atlas", source(path, perturbation_col=None)))
    assert (atlas.info.n_cells, atlas.info.n_perturbations) == (5, 0)


def test_more_genes_than_uint16_names_and_counts_it_does_not_hold(tmp_path, pieces):
    n_genes = 2**16 + 5
    X = sparse.csr_matrix(([70000.0, 2, 3], [n_genes - 1, 0, 7], [0, 2, 3]), shape=(2, n_genes), dtype=np.float32)
    obs = pd.DataFrame({"perturbation": "control", "cell_type": "T", "batch": "b"}, index=["big", "small"])
    path = written(anndata.AnnData(X, obs, pd.DataFrame(index=[f"g{i}" for i in range(n_genes)])), tmp_path / "x.h5ad")
    with pytest.raises(
        ValueError,
        match="count 70000 of gene 'g65540' in cell 'big' of source 'x' does not fit uint16; give count_type=uint32",
    ):
        build(config(tmp_path / "atlas", source(path)), workers=1)
    assert not (tmp_path / "atlas").exists()
    atlas = built(config(tmp_path / "other", source(path), count_type="uint32"))
    assert (atlas.info.gene_type, atlas.info.value_type) == ("uint32", "uint32")
    assert values_of(atlas)["x", "big"] == {"g0": 2.0, "g65540": 70000.0}


def test_a_count_too_large_in_a_cell_or_gene_that_is_left_out_is_no_error(tmp_path):
    adata = screen_with_cells([("control", "T", "b", 5), ("A", "T", "b", 5)])
    X = adata.X.tolil()
    X[:, 0] = 1
    X[int(np.argmax(adata.obs["perturbation"] == "A")), 0] = 70000
    adata.X = X.tocsr()
    path = written(adata, tmp_path / "x.h5ad")
    assert built(config(tmp_path / "atlas", source(path, cells="unperturbed"))).info.n_cells == 5
    (tmp_path / "genes.txt").write_text("gene_3\ngene_1\n")
    assert built(config(tmp_path / "two", source(path), genes=str(tmp_path / "genes.txt"))).info.n_cells == 10


# -------------------------------------------------------------------------------------------- mistakes


def test_mistakes_are_named(screens, tmp_path):
    first, _, one, two = screens
    out = tmp_path / "atlas"
    adata = first.copy()
    adata.X = sparse.csr_matrix(log1p_cp10k(first.X).astype(np.float32))
    log = written(adata, tmp_path / "log.h5ad")
    empty = written(first[:0].copy(), tmp_path / "empty.h5ad")
    ids = []
    for i in range(2):
        adata = first.copy()
        adata.var["ensembl_id"] = [f"ENSG{g + (i if g == 4 else 0) * 100:011d}" for g in range(12)]
        ids.append(written(adata, tmp_path / f"ids{i}.h5ad"))
    cases = [
        (config(out), "sources"),
        (config(out, source(one), source(one)), "two sources are called 'one'"),
        (config(out, source(one), source(log)), "source 'one' holds raw counts and source 'log' log1p values"),
        (
            config(out, *map(source, ids)),
            "'gene_4' is ENSG00000000004 in source 'ids0' and ENSG00000000104 in .*_table",
        ),
        (config(out, source(one, cells="unperturbed", drop=["control"])), "no cell of one is left"),
        (config(out, source(empty)), "no cell of empty"),
        (config(out, source(one), gene_table=str(two)), "gene_table|utf-8"),
    ]
    for settings, message in cases:
        with pytest.raises(ValueError, match=message):
            build(settings, workers=1)
        assert not out.exists()
        assert not (tmp_path / ".atlas.building").exists()
    for how, message in (({"task": (0, 3)}, "task"), ({"task": (4, 3)}, "task"), ({"workers": 0}, "workers")):
        with pytest.raises(ValueError, match=message):
            build(config(out, source(one)), **how)
    out.mkdir()
    with pytest.raises(ValueError, match="exists; choose another --out"):
        build(config(out, source(one)), workers=1)


def test_an_error_in_a_worker_is_the_error_of_the_build(tmp_path):
    adata = counts_screen()
    adata.X[3, 4] = 70000
    path = written(adata, tmp_path / "x.h5ad")
    with pytest.raises(ValueError, match="count 70000 of gene 'gene_4' in cell 'cell_3'"):
        build(config(tmp_path / "atlas", source(path)), workers=2)
    assert (tmp_path / ".atlas.building" / "plan").is_dir()


def test_too_little_memory_is_an_error_that_says_how_much_works(screens, tmp_path):
    settings = config(tmp_path / "atlas", source(screens[2]))
    with pytest.raises(ValueError, match=r"max_memory \(100 MB\) is too small; .* at least (\d+) MB") as error:
        build(settings, max_memory=100 * MB, workers=2)
    enough = int(str(error.value).split("at least ")[1].split()[0])
    with pytest.raises(ValueError, match="too small"):
        build(settings, max_memory=(enough - 1) * MB, workers=2)
    assert built(settings, workers=2, max_memory=enough * MB).info.n_cells == 108


def test_other_settings_or_inputs_do_not_go_on_with_an_interrupted_build(screens, tmp_path):
    first, _, _, _ = screens
    path = written(first, tmp_path / "x.h5ad")
    settings = config(tmp_path / "atlas", source(path))
    assert build(settings, workers=1, task=(1, 2)) is None
    with pytest.raises(ValueError, match=r"interrupted build with other seed; .*delete that folder"):
        build(replace(settings, seed=3), workers=1)
    with pytest.raises(ValueError, match="interrupted build with other shard_bytes"):
        build(settings, workers=1, shard_bytes=SMALL)
    os.utime(path, ns=(1, 1))
    with pytest.raises(ValueError, match="interrupted build with other sources"):
        build(settings, workers=1)
    assert not (tmp_path / "atlas").exists()


# --------------------------------------------------------------------------------------- same bytes


@pytest.fixture(scope="module")
def reference(screens, tmp_path_factory):
    """Settings of a build of two sources whose genes are chosen, with everything small, and what it gives."""
    folder = tmp_path_factory.mktemp("reference")
    _, _, one, two = screens

    def settings(out: Path) -> BuildConfig:
        return config(out, source(one), source(two, drop=["A:NK"]), genes="merge-then-select:6", seed=5)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_plan, "READ_VALUES", 100)
        patch.setattr(build_plan, "MOST_VALUES", 300)
        atlas = built(settings(folder / "atlas"), shard_bytes=SMALL)
    assert len(atlas.info.shards) > 2
    return settings, digests(folder / "atlas")


@pytest.mark.parametrize("most_values", [1, 1000, 1 << 24])
def test_bytes_do_not_depend_on_the_size_of_chunks(reference, tmp_path, monkeypatch, most_values):
    settings, expected = reference
    monkeypatch.setattr(build_plan, "READ_VALUES", 100)
    monkeypatch.setattr(build_plan, "MOST_VALUES", most_values)
    built(settings(tmp_path / "atlas"), shard_bytes=SMALL)
    assert digests(tmp_path / "atlas") == expected
    assert not list(tmp_path.glob(".*"))


def test_bytes_do_not_depend_on_the_processes(screens, tmp_path):
    _, _, one, two = screens
    for workers, memory in ((1, 4096), (2, 1600)):
        out = tmp_path / f"atlas{workers}"
        built(config(out, source(one), source(two)), shard_bytes=SMALL, workers=workers, max_memory=memory * MB)
    assert digests(tmp_path / "atlas1") == digests(tmp_path / "atlas2")


def test_bytes_do_not_depend_on_tasks(reference, tmp_path, pieces):
    settings, expected = reference
    spill = tmp_path / ".atlas.building" / "spill"
    for i in (3, 1):
        before = set(os.listdir(spill)) if spill.is_dir() else set()
        assert build(settings(tmp_path / "atlas"), workers=1, task=(i, 3), shard_bytes=SMALL) is None
        done = {int(name.removeprefix("chunk-")) for name in set(os.listdir(spill)) - before}
        assert done
        assert {chunk % 3 for chunk in done} == {i - 1}
        assert not (tmp_path / "atlas").exists()
    built(settings(tmp_path / "atlas"), shard_bytes=SMALL)
    assert digests(tmp_path / "atlas") == expected


def test_finished_chunks_and_buckets_are_not_made_again(reference, tmp_path, pieces, monkeypatch):
    settings, expected = reference
    from perturbdiff.atlas.build import run as module

    assert build(settings(tmp_path / "atlas"), workers=1, task=(1, 1), shard_bytes=SMALL) is None
    spill = tmp_path / ".atlas.building" / "spill"
    stamps = {path.name: path.stat().st_mtime_ns for path in spill.iterdir()}
    merged = []

    def two_and_no_more(sort, bucket, memory):
        if len(merged) == 2:
            raise KeyboardInterrupt
        merged.append(bucket)
        return original(sort, bucket, memory)

    original = module.merge_bucket
    monkeypatch.setattr(module, "merge_bucket", two_and_no_more)
    with pytest.raises(KeyboardInterrupt):
        build(settings(tmp_path / "atlas"), workers=1, shard_bytes=SMALL)
    assert {path.name: path.stat().st_mtime_ns for path in spill.iterdir()} == stamps
    again = []
    monkeypatch.setattr(module, "merge_bucket", lambda sort, b, memory: again.append(b) or original(sort, b, memory))
    built(settings(tmp_path / "atlas"), shard_bytes=SMALL)
    assert not set(again) & set(merged)
    assert digests(tmp_path / "atlas") == expected


# One process imports everything, then forks for each build: the fork is killed at the n-th rename of a file or folder,
# before it or after it.
KILLED = """
import json, os, signal, sys
from perturbdiff.config import from_dict, BuildConfig
from perturbdiff.atlas.build import plan as build_plan
from perturbdiff.atlas.build.run import build

settings, shard_bytes = json.loads(sys.argv[1]), int(sys.argv[2])
build_plan.READ_VALUES, build_plan.MOST_VALUES = 100, 300

def child(out, n, after):
    left = [n]
    def counted(original):
        def move(*paths, **how):
            left[0] -= 1
            if left[0] == 0 and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            original(*paths, **how)
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return move
    os.rename, os.replace = counted(os.rename), counted(os.replace)
    build(from_dict(BuildConfig, {**settings, "out": out}), workers=1, shard_bytes=shard_bytes)
    print("moves", n - left[0], flush=True)

for line in sys.stdin:
    out, n, after = json.loads(line)
    if not (pid := os.fork()):
        try:
            child(out, n, after)
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    print("ended", os.WTERMSIG(status) if os.WIFSIGNALED(status) else "well", flush=True)
"""


def test_a_build_killed_anywhere_goes_on_to_the_same_bytes(reference, tmp_path, pieces):
    settings, expected = reference
    plain = {key: value for key, value in vars(settings(tmp_path)).items() if key != "out"}
    text = json.dumps({**plain, "sources": [vars(s) for s in plain["sources"]]})
    command = [sys.executable, "-c", KILLED, text, str(SMALL)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}

    def run(out: Path, n: int, after: bool) -> list[str]:
        process.stdin.write(json.dumps([str(out), n, after]) + "\n")
        process.stdin.flush()
        said = []
        while not said or not said[-1].startswith("ended"):
            said.append(process.stdout.readline().strip())
            assert said[-1] or process.poll() is None
        return said

    with subprocess.Popen(command, text=True, cwd=ROOT, **pipes) as process:
        said = run(tmp_path / "whole", 10**6, False)
        assert digests(tmp_path / "whole") == expected
        moves = int(next(line for line in said if line.startswith("moves")).split()[1])
        assert moves > 30  # settings, moments, plan, chunks, buckets, shards, and the atlas itself
        points = [1, 2, 3, *np.linspace(4, moves, 12).astype(int).tolist()]
        for n in points:
            for after in (False, True):
                out = tmp_path / f"killed{n}{after}"
                assert run(out, n, after)[-1] == f"ended {int(signal.SIGKILL)}"
                if n < moves or not after:
                    assert not out.exists(), n
                    assert run(out, 10**6, False)[-1] == "ended well"
                assert digests(out) == expected, (n, after)


WITH_WORKERS = """
import json, sys
from perturbdiff.config import from_dict, BuildConfig
from perturbdiff.atlas.build.run import build

if __name__ == "__main__":
    build(from_dict(BuildConfig, json.loads(sys.argv[1])), workers=2, shard_bytes=int(sys.argv[2]))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["spill", "shards"])
def test_workers_end_with_a_build_that_is_stopped(tmp_path, how, moment):
    adata = screen_with_cells([(p, "T", b, 40) for p in ("control", "A", "B") for b in "abcdefgh"], n_genes=100)
    path = written(adata, tmp_path / "x.h5ad", None)
    (tmp_path / "script.py").write_text(WITH_WORKERS)
    settings = config(tmp_path / "atlas", source(path))
    text = json.dumps({**vars(settings), "sources": [vars(s) for s in settings.sources]})
    command = [sys.executable, str(tmp_path / "script.py"), text, "2000"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    folder = tmp_path / ".atlas.building" / moment
    while not (folder.is_dir() and any(not name.startswith(".") for name in os.listdir(folder))):
        assert process.poll() is None
        time.sleep(0.002)
    workers = children(process.pid)
    assert workers
    process.send_signal(how)
    assert process.wait(PATIENCE) != 0
    assert not (tmp_path / "atlas").exists()
    deadline = time.monotonic() + PATIENCE
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers outlived the build"
        time.sleep(0.01)
    build(settings, workers=1, shard_bytes=2000)
    whole = tmp_path / "whole"
    build(config(whole, source(path)), workers=1, shard_bytes=2000)
    assert digests(tmp_path / "atlas") == digests(whole)


def children(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rsplit(")", 1)[1].split()[1]) == pid:
                found.append(int(path.parent.name))
        except OSError:  # it ended meanwhile
            continue
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


# ------------------------------------------------------------------------------------------- disk full


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a tmpfs of some kB."""
    mounted = []

    def mount(kilobytes: int, again: bool = False) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir(exist_ok=True)
        options = f"size={kilobytes}k" + (",remount" if again else "")
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"a small disk needs the right to mount a tmpfs: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in set(mounted):
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize(("workers", "kilobytes"), [(1, 100), (1, 160), (1, 240), (2, 160)])
def test_a_full_disk_is_an_error_of_one_line_and_the_build_goes_on(tmp_path, small_disk, workers, kilobytes):
    adata = screen_with_cells([(p, "T", b, 40) for p in ("control", "A", "B") for b in "ab"], n_genes=300)
    path = written(adata, tmp_path / "x.h5ad", None)
    folder = small_disk(kilobytes)
    settings = config(folder / "atlas", source(path))
    with pytest.raises(OSError, match=r"no space left on the disk of .*the same command again: it goes on") as error:
        build(settings, workers=workers)
    assert error.value.errno == errno.ENOSPC
    assert "\n" not in str(error.value)
    assert not (folder / "atlas").exists()
    for name in ("spill", "shards"):
        made = folder / ".atlas.building" / name
        assert not made.is_dir() or not [n for n in os.listdir(made) if n.endswith(".partial")]
    small_disk(100_000, again=True)
    built(settings)
    built(config(tmp_path / "whole", source(path)))
    assert digests(folder / "atlas") == digests(tmp_path / "whole")


def test_a_disk_that_fills_up_in_the_merge_is_the_same_error(tmp_path, small_disk):
    adata = screen_with_cells([(p, "T", b, 40) for p in ("control", "A", "B") for b in "ab"], n_genes=300)
    path = written(adata, tmp_path / "x.h5ad", None)
    folder = small_disk(100_000)
    settings = config(folder / "atlas", source(path))
    assert build(settings, workers=1, task=(1, 1)) is None
    used = sum(file.stat().st_blocks // 2 for file in folder.rglob("*"))
    small_disk(used + 20, again=True)
    with pytest.raises(OSError, match=r"no space left on the disk of .*, which needs about .* GB there") as error:
        build(settings, workers=1)
    assert error.value.errno == errno.ENOSPC
    assert os.listdir(folder / ".atlas.building" / "shards") == []
    small_disk(100_000, again=True)
    built(settings)
    built(config(tmp_path / "whole", source(path)))
    assert digests(folder / "atlas") == digests(tmp_path / "whole")
