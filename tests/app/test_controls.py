"""Uploaded files: what is taken of them, and what is refused before it takes memory."""

import os

import anndata
import h5py
import pytest

from perturbdiff.app.controls import Limits, read_controls, remove_old_files
from perturbdiff.data.screen import control_cells


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


def test_groups_that_hold_each_other_are_walked_once(upload, model):
    expected = read_controls(upload, "a file", model, Limits())
    with h5py.File(upload, "a") as file:
        file["obs/loop"] = file["obs"]
    assert read_controls(upload, "a file", model, Limits()).cells.n_obs == expected.cells.n_obs


def test_only_files_nobody_wrote_to_for_long_are_removed(tmp_path):
    old, new = tmp_path / "a" / "old.h5ad", tmp_path / "a" / "new.h5ad"
    old.parent.mkdir()
    for path in (old, new):
        path.write_text("")
    age = new.stat().st_mtime - 5000
    os.utime(old, (age, age))
    remove_old_files(tmp_path, 3600)
    assert [path.name for path in tmp_path.rglob("*.h5ad")] == ["new.h5ad"]
