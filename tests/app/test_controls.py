"""Uploaded files: what is taken of them, and what is refused before it takes memory."""

import os
import re

import anndata
import h5py
import pandas as pd
import pytest

from perturbdiff.app.controls import read_controls, remove_old_files
from perturbdiff.app.upload import Limits
from perturbdiff.data.h5ad import ALWAYS_READ
from perturbdiff.data.screen import control_cells
from tests.app.test_page import bad_files
from tests.screens import never_returns, shared


def refused(path, model, match, **limits):
    with pytest.raises(ValueError, match=match):
        read_controls(path, path.name, model, Limits(**limits))


@pytest.fixture
def upload(screen, tmp_path):
    path = tmp_path / "upload.h5ad"
    path.write_bytes(screen.read_bytes())
    return path


def test_only_the_controls_of_a_file_are_taken(screen, model):
    controls = read_controls(screen, "a file", model, Limits())
    table = anndata.read_h5ad(screen).obs
    assert list(controls.cells.obs_names) == list(table.index[table["perturbation"] == "control"])
    assert (controls.n_in_file, controls.n_genes, controls.n_genes_matched) == (len(table), 40, 40)
    assert list(controls.cell_types) == sorted(table["cell_type"].unique())
    for cell_type in controls.cell_types:
        expected = control_cells(screen, model.config.obs, cell_type, None)
        assert list(controls.select(cell_type).obs_names) == list(expected.obs_names)
        assert (controls.select(cell_type).X != expected.X).nnz == 0


def test_without_cell_types_in_the_file_those_of_the_model_can_be_chosen(upload, model):
    cells = anndata.read_h5ad(upload)
    del cells.obs["cell_type"]
    cells.write_h5ad(upload)
    controls = read_controls(upload, "a file", model, Limits())
    assert controls.cell_types == model.vocabularies.cell_types.names
    assert controls.select(controls.cell_types[0]).n_obs == controls.cells.n_obs


def test_each_limit_is_checked(upload, model):
    n_cells = anndata.read_h5ad(upload).n_obs
    read_controls(upload, "a file", model, Limits(cells=n_cells))
    refused(upload, model, f"has {n_cells} cells; the app takes at most {n_cells - 1}", cells=n_cells - 1)
    refused(upload, model, "the app takes at most 1 MB", file_bytes=upload.stat().st_size - 1)
    refused(upload, model, "unpacks to", unpacked_bytes=1000)


def test_a_file_that_is_none_is_refused(upload, model):
    upload.write_bytes(upload.read_bytes()[:100])
    refused(upload, model, "is not a readable .h5ad")


@pytest.mark.slow
def test_what_is_wrong_with_an_upload_is_said_by_its_name(screen, model, tmp_path, capfd):
    for name, message in bad_files(tmp_path, screen).items():
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            read_controls(tmp_path / f"{name}.h5ad", f"{name}.h5ad", model, Limits(cells=1000))
        assert "/tmp" not in str(error.value)
        assert str(tmp_path) not in str(error.value)
    assert "Traceback" not in capfd.readouterr().err


def test_groups_that_hold_each_other_are_walked_once(upload, model):
    expected = read_controls(upload, "a file", model, Limits())
    with h5py.File(upload, "a") as file:
        file["obs/loop"] = file["obs"]
    assert read_controls(upload, "a file", model, Limits()).cells.n_obs == expected.cells.n_obs


@pytest.mark.slow
@pytest.mark.parametrize("of", ["our own", "the shared case"])
def test_a_file_over_which_the_library_never_returns_ends_with_its_time(upload, model, of):
    if of == "our own":
        never_returns(upload)
    else:
        (found,) = shared("PERTURBDIFF_CASES", "cases", "guard").glob("g05_*.h5ad")
        upload.write_bytes(found.read_bytes())
    refused(upload, model, "a heap of texts that never ends")
    os.truncate(upload, ALWAYS_READ + 1)  # in larger files nobody looks for that
    refused(upload, model, "could not be read within 2 seconds", seconds=2)


@pytest.mark.slow
def test_a_file_that_takes_more_memory_than_is_allowed_is_refused(upload, model):
    with h5py.File(upload, "a") as file:
        del file["X"]
        file.create_dataset("X", (file["obs/_index"].size, 40), "f4", chunks=(8, 40), compression="gzip")
        text = file["obs/cell_type/categories"]
        n, attrs = 2_000_000, dict(text.attrs)
        del file["obs/cell_type/categories"]
        names = file.create_dataset("obs/cell_type/categories", (n,), data=[f"{i}" for i in range(n)])
        names.attrs.update(attrs)
    refused(upload, model, "memory", memory_bytes=100 << 20)


def test_of_an_upload_everything_that_a_prediction_needs_comes_back(upload, model):
    cells = anndata.read_h5ad(upload)
    cells.obs["note"] = pd.array(["a", None] * (cells.n_obs // 2), dtype="string")
    cells.obs["n"] = pd.array([1, None] * (cells.n_obs // 2), dtype="Int64")
    cells.var["ensembl"] = [f"ENSG{i}" for i in range(cells.n_vars)]
    with anndata.settings.override(allow_write_nullable_strings=True):
        cells.write_h5ad(upload)
    ours = read_controls(upload, "a file", model, Limits()).cells
    same = read_controls(upload, "a file", model, None).cells
    assert (ours.X != same.X).nnz == 0
    assert ours.X.dtype == same.X.dtype
    pd.testing.assert_frame_equal(ours.var.astype(str), same.var.astype(str))
    pd.testing.assert_frame_equal(
        ours.obs.drop(columns="note").astype(str), same.obs.drop(columns="note").astype(str), check_names=False
    )
    assert list(ours.obs["note"].isna()) == list(same.obs["note"].isna())


def test_of_too_many_bytes_the_oldest_files_go(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}").write_bytes(bytes(100))
        os.utime(tmp_path / f"{i}", (1e9 + i, 1e9 + i))
    remove_old_files(tmp_path, 1e12, most_bytes=350)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3", "4"]


def test_only_files_nobody_wrote_to_for_long_are_removed(tmp_path):
    old, new = tmp_path / "a" / "old.h5ad", tmp_path / "a" / "new.h5ad"
    old.parent.mkdir()
    for path in (old, new):
        path.write_text("")
    age = new.stat().st_mtime - 5000
    os.utime(old, (age, age))
    remove_old_files(tmp_path, 3600, 1 << 30)
    assert [path.name for path in tmp_path.rglob("*.h5ad")] == ["new.h5ad"]
