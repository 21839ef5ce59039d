"""The opener of .h5ad files: nothing outside the file is read, and nothing grows."""

import errno
import subprocess
import sys

import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import perturbdiff
from perturbdiff.atlas.build.sources.h5ad import H5adSource
from perturbdiff.config import DataConfig, ObsColumns, SourceConfig
from perturbdiff.data import h5ad
from perturbdiff.data.h5ad import MAX_TEXT, _text_lengths, open_h5ad, read_h5ad_parts, unpacked_bytes
from perturbdiff.data.screen import control_cells
from tests.processes import PATIENCE
from tests.screens import counts_screen, written
from tests.untrained import untrained

LETTERS = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
STRINGS = h5py.string_dtype()


@pytest.fixture
def path(tmp_path):
    return written(counts_screen(n=8), tmp_path / "screen.h5ad")


@pytest.fixture
def secret(tmp_path):
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["x"] = np.ones(40, "u1")
    return tmp_path / "secret.h5"


def external_link(file, name, secret):
    file[name] = h5py.ExternalLink(secret, "/x")


def soft_link(file, name, secret):
    file["elsewhere"] = h5py.ExternalLink(secret, "/x")
    file[name] = h5py.SoftLink("/elsewhere")


def external_storage(file, name, secret):
    file.create_dataset(name, (40,), "u1", external=[(str(secret), 0, 40)])


def virtual_dataset(file, name, secret):
    layout = h5py.VirtualLayout((40,), "u1")
    layout[:] = h5py.VirtualSource(secret, "x", (40,))
    file.create_virtual_dataset(name, layout)


DOORS = {
    "parts": read_h5ad_parts,
    "screen": perturbdiff.Screen.read,
    "controls": lambda path: control_cells(path, ObsColumns(), None, None),
    "atlas": lambda path: H5adSource.open(SourceConfig(path=str(path))),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", ["X", "obs", "var", "obs/stolen", "obs/cell_type/categories", "X/data", "var/deep/in"])
@pytest.mark.parametrize(
    "point", [external_link, soft_link, external_storage, virtual_dataset], ids=lambda f: f.__name__
)
def test_what_lies_elsewhere_is_refused_by_every_door(path, secret, point, name, door):
    with h5py.File(path, "a") as file:
        if name in file:
            del file[name]
        point(file, name, secret)
    with pytest.raises(ValueError, match=f"{name} of .*screen.h5ad points to somewhere else"):
        DOORS[door](path)


def test_a_part_of_a_part_that_lies_elsewhere_is_refused(path, secret):
    with h5py.File(path, "a") as file:
        file.create_group("uns/own")
        file["uns/own/x"] = 3
        with open_h5ad(path, ("uns/own", "uns/none")) as opened:
            assert opened["uns/own/x"][()] == 3
        del file["uns"]
        file["uns"] = h5py.ExternalLink(secret, "/")
    with pytest.raises(ValueError, match=r"uns of .* points to somewhere else"), open_h5ad(path, ("uns/x",)):
        pass
    read_h5ad_parts(path)  # nobody reads uns here


@pytest.mark.parametrize("name", ["X", "obs/bomb", "var/deep/bomb"])
def test_an_array_that_nobody_wrote_is_refused_unread(path, name):
    with h5py.File(path, "a") as file:
        if name in file:
            del file[name]
        file.create_dataset(name, (10, 1 << 37), "f4", chunks=(1, 1 << 20), compression="gzip")
    with pytest.raises(ValueError, match=rf"{name} of .* grows beyond all measure: .* 5,497,5\d\d,\d\d\d,\d\d\d are"):
        read_h5ad_parts(path)


def pointed_at(path, n, text, **stored):
    """obs index of n names that are one text, stored once."""
    with h5py.File(path, "a") as file:
        index = file["obs"].attrs["_index"]
        attributes = dict(file["obs"][index].attrs)
        del file["obs"][index]
        names = file["obs"].create_dataset(index, (n,), dtype=STRINGS)
        names.attrs.update(attributes)
        names[0] = text
        file.flush()
        offset = names.id.get_offset()
    content = bytearray(path.read_bytes())
    content[offset : offset + 16 * n] = bytes(content[offset : offset + 16]) * n
    path.write_bytes(content)


def test_texts_that_are_one_text_are_refused_unread(path):
    pointed_at(path, 50_000, "T" * 9_000)
    with pytest.raises(ValueError, match=r"obs/.* grows beyond all measure: .* 450,000,000 are to be read"):
        read_h5ad_parts(path)


@pytest.mark.parametrize("where", ["obs/cell_type/categories", "var/_index"])
@pytest.mark.parametrize("kind", [STRINGS, "S"])
def test_a_label_of_many_kilobytes_is_refused(path, where, kind):
    with h5py.File(path, "a") as file:
        names = [b"T" * (MAX_TEXT + 1), *[f"n{i}".encode() for i in range(len(file[where]) - 1)]]
        texts = np.array(names, "S" if kind == "S" else object)
        attributes = dict(file[where].attrs)
        del file[where]
        file.create_dataset(where, data=texts, dtype=None if kind == "S" else kind)
        file[where].attrs.update(attributes)
    with pytest.raises(ValueError, match=f"{where} of .* holds a text of 10,001 bytes; at most 10,000 are read"):
        read_h5ad_parts(path)


def test_a_table_of_an_old_anndata_is_named(path):
    with h5py.File(path, "a") as file:
        del file["obs"]
        file.create_dataset("obs", data=np.zeros(3, [("index", "S4"), ("perturbation", "i4")]))
    with pytest.raises(ValueError, match=r"obs of .* is a table as AnnData wrote it before 0\.7"):
        read_h5ad_parts(path)


def test_more_than_the_memory_of_the_machine_is_refused(path, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1}[name])
    with pytest.raises(ValueError, match="GB of memory and this machine has 0; build an atlas of it"):
        read_h5ad_parts(path)
    DOORS["atlas"](path)  # reads it in parts


def test_a_file_that_changes_is_looked_at_again(path, secret):
    read_h5ad_parts(path)
    with h5py.File(path, "a") as file:
        file["obs/stolen"] = h5py.ExternalLink(secret, "/x")
    with pytest.raises(ValueError, match="points to somewhere else"):
        read_h5ad_parts(path)


@given(
    texts=st.lists(st.text(LETTERS, max_size=40), min_size=1, max_size=400),
    file_size=st.sampled_from([0, 1 << 40]),
    stored=st.sampled_from(
        [{}, {"chunks": (7,)}, {"chunks": (64,), "compression": "gzip"}, {"chunks": (9,), "compression": "lzf"},
         {"chunks": (5,), "compression": "gzip", "shuffle": True}]
    ),
)  # fmt: skip
def test_lengths_are_those_of_the_texts_however_they_are_stored(tmp_path_factory, texts, file_size, stored):
    path = tmp_path_factory.mktemp("texts") / "texts.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset(
            "x", data=np.array(texts, dtype=object), dtype=STRINGS, maxshape=(None,) if stored else None, **stored
        )
    with h5py.File(path, "r") as file:
        assert _text_lengths(file["x"], str(path), file_size).tolist() == [len(text.encode()) for text in texts]


def test_texts_that_nobody_wrote_have_no_length(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        plain = file.create_dataset("plain", (1000,), dtype=STRINGS)
        chunked = file.create_dataset("chunked", (1000,), dtype=STRINGS, chunks=(10,))
        chunked[20:30] = "abc"
        file.flush()
        assert _text_lengths(plain, str(tmp_path / "x.h5"), 1 << 40).sum() == 0
        assert _text_lengths(chunked, str(tmp_path / "x.h5"), 1 << 40).sum() == 30


@pytest.mark.parametrize("compression", [None, "gzip", "lzf"])
def test_what_anndata_writes_is_read(tmp_path, compression):
    adata = counts_screen(n=8)
    half = adata.n_obs // 2
    adata.obs["text"] = pd.Series(["a", "b"] * half, index=adata.obs_names)
    adata.obs["flag"] = pd.array([True, None] * half, dtype="boolean")
    adata.obs["number"] = np.arange(adata.n_obs)
    path = tmp_path / "x.h5ad"
    adata.write_h5ad(path, compression=compression)
    X, obs, var = read_h5ad_parts(path)
    assert list(obs.columns) == list(adata.obs.columns)
    assert (X != adata.X).nnz == 0
    assert list(var.index) == list(adata.var_names)
    assert unpacked_bytes(path) >= X.data.nbytes + X.indices.nbytes


# ---------------------------------------------------------------- values beside X


@pytest.fixture
def beside(tmp_path):
    """Scaled X of half the genes, counts in a layer, counts of all genes in .raw."""
    whole = counts_screen(n=8)
    adata = whole[:, : whole.n_vars // 2].copy()
    adata.layers["counts"] = adata.X.copy()
    adata.raw = whole
    X = adata.X.toarray()
    adata.X = (X - X.mean(0)) / X.std(0).clip(1e-3)
    return adata, written(adata, tmp_path / "beside.h5ad"), whole


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_layer_and_raw_are_read_in_place_of_x(beside, in_memory):
    adata, path, whole = beside
    source = adata if in_memory else path
    for layer, expected in (("counts", whole[:, : whole.n_vars // 2]), ("raw", whole)):
        screen = perturbdiff.Screen.read(source, DataConfig(layer=layer))
        assert screen.expression.genes.names == tuple(expected.var_names)
        assert (screen.expression.X != expected[screen.obs.index].X).nnz == 0
    with pytest.raises(KeyError, match="there is no layer 'count'; name other values that it holds: counts, raw"):
        perturbdiff.Screen.read(source, DataConfig(layer="count"))
    with pytest.raises(ValueError, match=r"negative \(z-scored or scaled data\?\); .* data.layer=raw"):
        perturbdiff.Screen.read(source)


@pytest.mark.parametrize("layer", ["counts", "raw"])
def test_controls_and_sources_of_atlases_are_read_of_a_layer_too(beside, layer):
    adata, path, whole = beside
    expected = whole if layer == "raw" else whole[:, : whole.n_vars // 2]
    controls = control_cells(path, ObsColumns(), None, None, layer)
    assert (controls.X != expected[controls.obs_names].X).nnz == 0
    source = H5adSource.open(SourceConfig(path=str(path), layer=layer))
    X, library_size = source.read(0, adata.n_obs)
    assert (X != expected.X).nnz == 0
    np.testing.assert_array_equal(library_size, np.asarray(expected.X.sum(1)).ravel())
    assert source.genes.names == tuple(expected.var_names)
    model = untrained(n_genes=6, perturbations=("A",))
    given = expected.copy()
    given.layers["own"] = given.X
    del given.X
    own = given[given.obs["perturbation"] == "control"].copy()
    np.testing.assert_array_equal(
        model.predict(own, perturbation="A", layer="own").X.toarray(),
        model.predict(controls, perturbation="A").X.toarray(),
    )


def test_a_file_without_genes_in_x_names_what_else_it_holds(beside, tmp_path):
    adata, _, _ = beside
    none = adata[:, :0].copy()
    none.raw = adata.raw.to_adata()
    path = written(none, tmp_path / "none.h5ad", None)
    with pytest.raises(ValueError, match=r"X of .* has no genes; name other values that it holds: counts, raw\."):
        perturbdiff.Screen.read(path)
    assert perturbdiff.Screen.read(path, DataConfig(layer="raw")).expression.X.nnz


def test_a_layer_that_lies_elsewhere_is_refused(beside, secret):
    _, path, _ = beside
    with h5py.File(path, "a") as file:
        del file["layers/counts"]
        file["layers/counts"] = h5py.ExternalLink(secret, "/x")
    with pytest.raises(ValueError, match=r"layers/counts of .* points to somewhere else"):
        perturbdiff.Screen.read(path, DataConfig(layer="counts"))
    with h5py.File(path, "a") as file:
        del file["layers"]
        file["layers"] = h5py.ExternalLink(secret, "/")
    with pytest.raises(KeyError, match="there is no layer 'counts'; name other values that it holds: raw"):
        perturbdiff.Screen.read(path, DataConfig(layer="counts"))


def test_a_layer_whose_name_is_no_text_is_not_among_those_that_can_be_given(tmp_path):
    adata = counts_screen()
    adata.layers["log"] = adata.X.copy()
    path = written(adata, tmp_path / "a.h5ad")
    with h5py.File(path, "a") as file:
        file["layers"].move("log", b"\xff")
    with pytest.raises(KeyError, match=r"there are none, and no \.raw"):
        read_h5ad_parts(path, "other")


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
def test_a_signal_while_the_library_calls_back_is_no_damage_of_the_file(path, monkeypatch, end):
    class Signal:
        def __lt__(self, number):
            raise end

    monkeypatch.setattr(h5ad, "MAX_OBJECTS", Signal())
    with pytest.raises(end):
        read_h5ad_parts(path)


def test_a_file_that_another_program_writes_is_said_to_be_open(path):
    with h5py.File(path, "r+"):
        writing = subprocess.run(
            [sys.executable, "-c", f"from perturbdiff.data.h5ad import *; read_h5ad_parts({str(path)!r})"],
            capture_output=True, text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip
    assert writing.stderr.endswith(f"{path} is open in another program that may write to it; close it there.\n")


def test_a_file_system_without_locks_is_read(path, monkeypatch):
    def without_locks(given, mode, locking=None, of=h5py.File):
        if locking is not False:
            raise OSError(errno.ENOLCK, "Unable to synchronously open file (unable to lock file, errno = 37)")
        return of(given, mode, locking=locking)

    monkeypatch.setattr(h5ad.h5py, "File", without_locks)
    assert len(h5ad.PARTS) == len(read_h5ad_parts(path))
