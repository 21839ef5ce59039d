from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from perturbdiff.atlas.format import (
    CHECKSUMS,
    CONDITIONS,
    CONDITIONS_SCHEMA,
    GENES,
    GENES_SCHEMA,
    MANIFEST,
    MAX_BYTES,
    AtlasSource,
    footer_of,
    parquet_options,
    shard_name,
    shard_schema,
    write_manifest,
)
from perturbdiff.atlas.store import Atlas
from perturbdiff.config import Preprocessing
from perturbdiff.data.vocab import GeneVocab
from perturbdiff.files import sha256
from tests.atlases import CONDITIONS as CELLS
from tests.atlases import atlas_of_screen, change_shard, odd_histogram, random_cells, seal, words_beyond, write_atlas
from tests.processes import PATIENCE
from tests.screens import counts_screen, read

COUNTS = Preprocessing("counts", 1e4, 10.0)
N_CELLS = sum(condition[3] for condition in CELLS)
N_GENES = 20
SORTED = sorted(CELLS, key=lambda c: (c[1], c[2], c[0]))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    return write_atlas(tmp_path_factory.mktemp("pristine") / "atlas")


@pytest.fixture
def folder(pristine, tmp_path) -> Path:
    """An atlas that a test may spoil."""
    return Path(shutil.copytree(pristine, tmp_path / "atlas"))


def refused(match: str, call, kind: type[Exception] = ValueError) -> None:
    """It fails in one line, before it takes memory."""
    tracemalloc.start()
    arrow = pa.default_memory_pool().bytes_allocated()
    try:
        with pytest.raises(kind, match=match) as raised:
            call()
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert pa.default_memory_pool().bytes_allocated() - arrow < 64 << 20
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 4000


def change_json(folder: Path, name: str, change) -> None:
    """Change a JSON file and seal the atlas."""
    content = json.loads((folder / name).read_text())
    changed = change(content)
    (folder / name).write_text(json.dumps(content if changed is None else changed))
    seal(folder) if name != CHECKSUMS else None


def flip_byte(path: Path, place: int = 100) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)


def test_an_atlas_opens_with_what_was_written(folder):
    atlas = Atlas.open(str(folder))
    assert (atlas.name, atlas.folder, atlas.commit, len(atlas)) == (str(folder), folder, None, N_CELLS)
    assert atlas.genes == GeneVocab(tuple(f"gene_{g}" for g in range(N_GENES)))
    assert [s.n_cells for s in atlas.info.shards] == np.diff(atlas.shard_first).tolist() == [17, 17, 10]
    rows = atlas.conditions.to_pylist()
    assert [(r["perturbation"], r["cell_type"], r["batch"], r["n_cells"]) for r in rows] == SORTED
    assert [r["is_control"] for r in rows] == [c[0] == "control" for c in SORTED]
    firsts = [atlas.shard_first[int(r["shard"][11:16])] + r["first_row"] for r in rows]
    assert firsts == np.cumsum([0, *(c[3] for c in SORTED)])[:-1].tolist()
    for name in ("cell_type", "batch", "perturbation"):
        words = atlas.conditions[name].chunk(0).dictionary.to_pylist()
        assert words == sorted({r[name] for r in rows})
    atlas.verify()
    assert atlas.check_shard(1) == folder / shard_name(1)
    assert atlas.row_name(17 + 16) == f"row 16 of data/cells-00001.parquet of {folder}"
    assert atlas.row_name(17 + 17) == f"row 0 of data/cells-00002.parquet of {folder}"


@pytest.mark.parametrize("value_type", ["uint16", "uint32", "float32"])
@pytest.mark.parametrize("gene_type", ["uint16", "uint32"])
def test_atlases_of_every_type_are_verified(tmp_path, value_type, gene_type):
    assert Atlas.open(write_atlas(tmp_path / "a", value_type=value_type, gene_type=gene_type)).verify() == []


def test_an_atlas_of_a_screen_gives_the_cells_of_the_screen(tmp_path):
    screen = read(counts_screen())
    atlas = Atlas.open(atlas_of_screen(tmp_path / "atlas", screen))
    atlas.verify()
    rows = np.random.default_rng(0).permutation(len(screen))
    taken, expected = atlas.arrow_cells(None, COUNTS, tmp_path / "cache").take(rows), screen.expression.take(rows)
    for name in ("indptr", "genes", "values", "library_size"):
        np.testing.assert_array_equal(getattr(taken, name), getattr(expected, name))


def test_ensembl_ids_come_back(tmp_path):
    genes = GeneVocab(tuple(f"g{i}" for i in range(N_GENES)), ("", *(f"ENSG{i}" for i in range(1, N_GENES))))
    assert Atlas.open(write_atlas(tmp_path / "a", genes=genes)).genes == genes


def test_labels_sort_as_python_strings_do(tmp_path):
    names = ["control", "Ärzte", "a", "Z", "😀", "\uffee", "a+b", "a b", ""]
    folder = write_atlas(tmp_path / "a", [(name, "T", "b", 2) for name in names])
    atlas = Atlas.open(folder)
    assert atlas.conditions["perturbation"].to_pylist() == sorted(names)
    atlas.verify()


def test_the_manifest_is_written_to_the_same_bytes(tmp_path):
    a, b = write_atlas(tmp_path / "a"), write_atlas(tmp_path / "b")
    files = sorted(p.relative_to(a) for p in a.rglob("*") if p.is_file())
    assert len(files) == 8
    for file in files:
        assert (a / file).read_bytes() == (b / file).read_bytes()


def test_checksums_state_every_file_but_themselves(folder):
    stated = json.loads((folder / CHECKSUMS).read_text())["files"]
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert list(stated) == sorted(files - {CHECKSUMS})
    for name, entry in stated.items():
        assert entry == {"sha256": sha256(folder / name), "size": (folder / name).stat().st_size}


def test_without_its_checksums_an_atlas_that_is_being_built_does_not_open(folder):
    (folder / CHECKSUMS).unlink()
    refused("is not an atlas: it has no checksums.json", lambda: Atlas.open(folder), FileNotFoundError)


def expected_rows(n_genes: int = N_GENES) -> list[dict]:
    X = random_cells(N_CELLS, n_genes)
    labels = [c[:3] for c in SORTED for _ in range(c[3])]
    return [
        {"perturbation": p, "cell_type": t, "batch": b, "source": "random", "cell": f"cell_{i}"}
        | {"library_size": float(X[i].sum() + 1), "genes": X[i].indices.tolist(), "counts": X[i].data.tolist()}
        for i, (p, t, b) in enumerate(labels)
    ]


def test_pyarrow_reads_the_shards_as_they_are(folder):
    assert pq.read_table(folder / "data").to_pylist() == expected_rows()
    assert pq.read_schema(folder / shard_name(0)).equals(shard_schema("uint16", "counts", "uint16"))


def test_datasets_reads_an_atlas_with_nothing_but_its_path(folder, tmp_path):
    import datasets

    found = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert list(found) == ["train"]
    assert found["train"].to_list() == expected_rows()


def test_shards_are_written_with_the_encodings_that_were_measured(folder):
    groups = pq.read_metadata(folder / shard_name(0))
    columns = {c.path_in_schema: c for c in (groups.row_group(1).column(i) for i in range(groups.num_columns))}
    assert columns["genes.list.element"].encodings == ("RLE", "DELTA_BINARY_PACKED")
    assert "BYTE_STREAM_SPLIT" in columns["counts.list.element"].encodings
    assert all(c.compression == "ZSTD" for c in columns.values())
    assert [n for n, c in columns.items() if c.has_dictionary_page] == [
        "perturbation", "cell_type", "batch", "source"
    ]  # fmt: skip
    assert parquet_options("log1p")["column_encoding"]["log1p.list.element"] == "BYTE_STREAM_SPLIT"


@pytest.mark.parametrize(
    ("license", "line"),
    [("cc-by-4.0", "license: cc-by-4.0"), ("Ask: me\n- x", "license_name: ask-me-x"), (None, "configs:")],
)
def test_the_card_states_the_license(tmp_path, license, line):
    lines = (write_atlas(tmp_path / "a", license=license) / "README.md").read_text().splitlines()
    head = lines[1 : lines.index("---", 1)]
    assert line in head
    assert any(word.startswith("license") for word in head) == (license is not None)


def test_the_summary_tells_a_person_what_is_in_it(folder):
    text = Atlas.open(folder).summary()
    for words in (
        str(folder), "44: 26 perturbed, 18 'control'", "2: B (16), A (10)", "2: T (28), NK (16)", "2: b1 (34), b2 (10)",
        "conditions  4 ", "1 to 12 cells, median 6", "cc-by-4.0", "random.h5ad", "20 (union)", "raw counts",
    ):  # fmt: skip
        assert words in text
    assert [line for line in text.splitlines() if len(line) > 80 and str(folder) not in line] == []


# The manifest


def test_an_atlas_of_format_1_opens_with_its_licenses(folder):
    info = Atlas.open(folder).info

    def older(content):
        content["format_version"] = 1
        for part in (content, *content["sources"]):
            part["licence"] = part.pop("license")
        del content["target_sum"]

    change_json(folder, MANIFEST, older)
    without_sources(folder)
    change_json(folder, CHECKSUMS, set_to(format_version=1))
    opened = Atlas.open(folder)
    assert opened.info == info
    assert opened.info.license == "cc-by-4.0"
    opened.verify()


def without_sources(folder: Path) -> None:
    """The tables of formats before 3."""
    for name, columns in ((GENES, ["measured"]), (CONDITIONS, ["sources", "shared_with", "n_shared"])):
        pq.write_table(pq.read_table(folder / name).drop_columns(columns), folder / name)
    seal(folder)


def test_in_an_atlas_of_format_2_all_genes_were_measured(folder):
    def older(content):
        content["format_version"] = 2
        del content["target_sum"]

    change_json(folder, MANIFEST, older)
    refused("has other columns than an atlas", lambda: Atlas.open(folder))  # those of format 3
    without_sources(folder)
    atlas = Atlas.open(folder)
    assert atlas.measured.all()
    assert atlas.panels()[1].all()
    atlas.verify()


def test_an_atlas_of_format_3_states_sources_and_what_they_measured(folder):
    without_sources(folder)
    refused("genes.parquet has other columns than an atlas; check measured", lambda: Atlas.open(folder))


@pytest.mark.parametrize("n_sources", [1, 2, 5])
def test_genes_of_a_condition_are_those_that_all_of_its_sources_measured(tmp_path, n_sources):
    rng = np.random.default_rng(n_sources)
    measured = rng.random((n_sources, N_GENES)) < 0.6
    random = AtlasSource("random", "x", None, N_CELLS, N_GENES, N_GENES, "row sums")
    sources = tuple(replace(random, name=f"random{i or ''}") for i in range(n_sources))
    folder = write_atlas(tmp_path / "atlas", measured=measured, sources=sources)
    chosen = [sorted({0, *rng.choice(n_sources, rng.integers(1, n_sources + 1), False).tolist()}) for _ in CELLS]
    change_conditions(
        folder, lambda rows: [row.update(sources=c) for row, c in zip(rows, chosen, strict=True)] and None
    )
    atlas = Atlas.open(folder)
    np.testing.assert_array_equal(atlas.measured, measured)
    panel, table = atlas.panels()
    for condition, of in enumerate(chosen):
        expected = [all(measured[source, g] for source in of) for g in range(N_GENES)]
        assert table[panel[condition]].tolist() == expected
    atlas.verify()


def test_a_source_that_a_condition_does_not_state_is_found(tmp_path):
    random = AtlasSource("random", "x", None, N_CELLS, N_GENES, N_GENES, "row sums")
    folder = write_atlas(tmp_path / "atlas", sources=(random, replace(random, name="other")))
    change_conditions(folder, row(2, sources=[1]))
    atlas = Atlas.open(folder)
    refused(r"row 16 of data/cells-00000\.parquet .* has another source than conditions\.parquet", atlas.verify)


def test_what_sources_measured_must_be_told_of_each(folder):
    columns = pq.read_table(folder / GENES)
    lists = pa.array([[True]] * (N_GENES - 1) + [[]], GENES_SCHEMA.field("measured").type)
    pq.write_table(columns.set_column(2, GENES_SCHEMA.field("measured"), lists), folder / GENES)
    seal(folder)
    refused("row 19: measured must hold 1, one a source", lambda: Atlas.open(folder))


def test_lists_that_are_longer_than_they_can_be_take_no_memory(folder):
    genes, conditions = (GENES, GENES_SCHEMA, "measured", True), (CONDITIONS, CONDITIONS_SCHEMA, "sources", 0)
    for name, schema, column, value in (genes, conditions):
        table, field = pq.read_table(folder / name), schema.field(column)
        offsets = pa.array(np.arange(len(table) + 1) * 500_000, pa.int32())
        values = pa.array(np.full(500_000 * len(table), value), field.type.value_type)
        lists = pa.ListArray.from_arrays(offsets, values, type=field.type)
        wrong = table.set_column(table.column_names.index(column), field, lists)
        before = (folder / name).read_bytes()
        pq.write_table(wrong, folder / name, compression="zstd")
        seal(folder)
        del values, lists, wrong
        refused(r"states [\d,]{9,} elements of lists; it must be at most", lambda: Atlas.open(folder))
        (folder / name).write_bytes(before)
        seal(folder)


def set_to(**values):
    return lambda content: content.update(values)


def in_shard(i: int, **values):
    return lambda content: content["shards"][i].update(values)


def both(*changes):
    return lambda content: [change(content) for change in changes] and None


def in_source(**values):
    return lambda content: content["sources"][0].update(values)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (set_to(format_version=4), "format_version 4; this version of perturbdiff reads 1 to 3. Update perturbdiff"),
        (set_to(format_version=4, x=1, shards=3), "format_version 4; .* Update perturbdiff"),
        (set_to(format_version=0), "format_version 0; .* Update perturbdiff"),
        (set_to(format_version="1"), "format_version 1; "),
        (set_to(format_version=True), "format_version True; "),
        (lambda content: content.pop("format_version"), "format_version None"),
        (set_to(colour="red"), "missing nothing; unknown colour"),
        (lambda content: content.update({"a\nb": 1}), r"unknown 'a\\nb'"),
        (lambda content: content.pop("license") and None, "missing license; unknown nothing"),
        (set_to(n_cells=10**15), "n_cells is 1,000,000,000,000,000, but the shards hold 44"),
        (both(set_to(n_cells=10**15 + 27), in_shard(0, n_cells=10**15)), "cannot hold 1,000,000,"),
        (in_shard(1, n_cells=10**30), "10+ is not a number of 64 bits"),
        (both(set_to(n_cells=45), in_shard(2, n_cells=11)), "the last must end with the shards"),
        (in_shard(1, n_cells=0), "cannot hold 0 cells"),
        (set_to(n_genes=10**12), "n_genes is 1,000,000,000,000; it must be 1 to 1,048,576"),
        (set_to(n_genes=21), "genes.parquet has 20 rows, not 21"),
        (set_to(n_genes=0), "n_genes is 0; "),
        (set_to(n_conditions=10**12), "n_conditions is 1,000,000,000,000; it must be 1 to"),
        (set_to(n_conditions=6), "conditions.parquet has 7 rows, not 6"),
        (set_to(n_perturbations=3), "2 of n_perturbations, atlas.json 3"),
        (set_to(n_cell_types=1), "2 of n_cell_types, atlas.json 1"),
        (set_to(n_batches=1), "2 of n_batches, atlas.json 1"),
        (set_to(n_cells=-44), "n_cells is -44; it must be a whole number, not negative"),
        (set_to(n_cells=44.0), "n_cells is 44.0; it must be a whole number"),
        (set_to(n_cells=True), "n_cells is True; it must be a whole number"),
        (set_to(n_cells=None), "n_cells is None; it must be a whole number"),
        (set_to(license=3), "license is 3; it must be a text"),
        (set_to(genes_rule=None), "genes_rule is None; it must be a text"),
        (set_to(input_kind="raw"), "input_kind is 'raw'; it must be counts or log1p"),
        (set_to(input_kind="log1p"), "value_type is 'uint16'; it must be float32"),
        (set_to(value_type="float32"), "value_type is 'float32'; it must be uint16 or uint32"),
        (set_to(value_type="uint32"), "has other columns than an atlas; check .*counts"),
        (set_to(gene_type="int64"), "gene_type is 'int64'; it must be uint16 or uint32"),
        (set_to(n_genes=2**17), "gene_type is 'uint16'; it must be uint32"),
        (set_to(control_label="ctrl"), "control_label is 'ctrl'; it must be control"),
        (set_to(sources=None), "sources must be a list, not None"),
        (set_to(shards=[]), "atlas.json do not name the same files: data/cells-00000.parquet, "),
        (set_to(shards=[3]), "shards must be a JSON object, not 3"),
        (in_source(path="x"), "sources: missing nothing; unknown path"),
        (in_source(n_genes="20"), "sources: n_genes is 20; it must be a whole number"),
        (in_shard(0, file="../cells.parquet"), "shard 0 is '../cells.parquet'; it must be 'data/cells-00000.parquet'"),
        (in_shard(0, file="/etc/passwd"), "shard 0 is '/etc/passwd'; it must be 'data/cells-00000.parquet'"),
        (lambda content: content["shards"].reverse(), "shard 0 is 'data/cells-00002.parquet'"),
        (lambda content: [content], "must hold a JSON object, not a list"),
    ],
)  # fmt: skip
def test_a_manifest_that_is_not_right_is_refused(folder, change, match):
    def changed(content):
        result = change(content)
        return result if isinstance(result, list) else None

    change_json(folder, MANIFEST, changed)
    refused(match, lambda: Atlas.open(folder))


@pytest.mark.parametrize("name", [MANIFEST, CHECKSUMS])
@pytest.mark.parametrize(
    "text", ["", "{", '{"format_version": 1, "n_cells', "[" * 100_000, '{"format_version": ' + "1" * 5000, "\udcff"]
)
def test_json_that_is_truncated_or_no_json_is_refused(folder, name, text):
    (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(f"{name} is not valid JSON", lambda: Atlas.open(folder))


@pytest.mark.parametrize("name", [MANIFEST, CHECKSUMS, GENES, CONDITIONS])
def test_files_too_large_to_read_are_refused(folder, name):
    os.truncate(folder / name, MAX_BYTES[name] + 1)  # takes no room
    if name != CHECKSUMS:
        change_json(folder, CHECKSUMS, lambda c: c["files"][name].update(size=MAX_BYTES[name] + 1))
    refused(f"{name} has .* bytes; at most", lambda: Atlas.open(folder))


@pytest.mark.parametrize("name", [MANIFEST, GENES, CONDITIONS])
def test_a_file_of_the_manifest_that_was_changed_or_lost_is_named(folder, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content + b" ")
    refused(f"{name} has .* bytes, not", lambda: Atlas.open(folder))
    (folder / name).write_bytes(content.replace(b"7", b"8") if name == MANIFEST else bytes(len(content)))
    refused(f"{name} has sha256 [0-9a-f]*, not [0-9a-f]* as", lambda: Atlas.open(folder))
    (folder / name).unlink()
    refused(f"{name}", lambda: Atlas.open(folder), FileNotFoundError)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c.update(format_version=7), "checksums.json has format_version 7; .* Update"),
        (lambda c: c.update(more=1), "must hold format_version and files, not files, more"),
        (lambda c: c.update(files=[]), "must hold format_version and files"),
        (lambda c: c["files"].update(x={}), "{} for 'x'; it must be a sha256 and a size"),
        (lambda c: c["files"].update({"x" * 100_000: {}}), "{} for 'x{80}'; it must be a sha256 and a size"),
        (lambda c: c["files"][GENES].update(size=-1), "for 'genes.parquet'; it must be"),
        (lambda c: c["files"][GENES].update(size=10**30), "10+ is not a number of 64 bits"),
        (lambda c: c["files"][GENES].update(sha256="x" * 64), "for 'genes.parquet'; it must be"),
        (lambda c: c["files"].pop(GENES) and None, "does not name genes.parquet"),
        (lambda c: c["files"].pop(shard_name(1)) and None, "do not name the same files: data/cells-00001.parquet"),
        (lambda c: c["files"].update({"../x": c["files"][GENES]}), "do not name the same files: ../x"),
    ],
)
def test_checksums_that_are_not_right_are_refused(folder, change, match):
    change_json(folder, CHECKSUMS, change)
    refused(match, lambda: Atlas.open(folder))


# genes.parquet and conditions.parquet


def change_conditions(folder: Path, change, schema: pa.Schema = CONDITIONS_SCHEMA) -> None:
    rows = pq.read_table(folder / CONDITIONS).to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / CONDITIONS)
    change_json(folder, MANIFEST, set_to(n_conditions=len(rows)))


def row(i: int, **values):
    return lambda rows: rows[i].update(values)


def swap(rows):
    rows[2], rows[3] = rows[3], rows[2]


def one_more_and_one_less(rows):
    rows[0]["n_cells"] += 1
    rows[1]["n_cells"] -= 1


def cells_that_wrap_round(rows):
    for i in range(3):
        rows[i]["n_cells"] = 2**63 - 1


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (row(6, n_cells=2**63 - 1), "row 6: .*: n_cells must be 1 to 44"),
        (cells_that_wrap_round, "row 0: .*: n_cells must be 1 to 44"),
        (row(6, n_cells=5), "row 6: .*: the last must end with the shards"),
        (row(6, n_cells=7), "row 6: .*: the last must end with the shards"),
        (row(2, n_cells=-1), "row 2: .*: n_cells must be 1 to 44"),
        (row(2, n_cells=0), "row 2: .*: n_cells must be 1 to 44"),
        (one_more_and_one_less, "row 1: .*: it must start where the last one ends"),
        (row(1, first_row=-1), "row 1: .*: first_row must be a row of the shard"),
        (row(1, first_row=10**15), "row 1: .*: first_row must be a row of the shard"),
        (row(1, shard=shard_name(1)), "row 1: .*: it must start where the last one ends"),
        (row(3, shard=shard_name(3)), "has cells in 'data/cells-00003.parquet', which is no shard"),
        (row(3, shard="../atlas/data/cells-00001.parquet"), r"has cells in '\.\./atlas/.*', which is no shard"),
        (row(3, shard="/etc/passwd"), "has cells in '/etc/passwd', which is no shard"),
        (swap, "row 3: .*: conditions must be sorted and each there once"),
        (row(1, perturbation="A"), "row 1: .*: conditions must be sorted and each there once"),
        (row(1, cell_type="A"), "row 1: .*: conditions must be sorted and each there once"),
        (row(0, is_control=True), "row 0: .*: is_control is for 'control' alone"),
        (row(1, is_control=False), "row 1: .*: is_control is for 'control' alone"),
        (row(1, sources=[]), "row 1: .*: it must have a source"),
        (row(2, sources=[1]), "row 2: .*: sources must be numbers of 0 to 0, rising"),
        (row(3, sources=[-1]), "row 3: .*: sources must be numbers of 0 to 0, rising"),
        (row(1, shared_with=[7], n_shared=[1]), "row 1: .*: shared_with must be numbers of 0 to 6, rising"),
        (row(1, shared_with=[3, 2], n_shared=[1, 1]), "row 1: .*: shared_with must be numbers of 0 to 6, rising"),
        (row(1, shared_with=[2], n_shared=[]), "row 1: .*: n_shared must hold one number for each of shared_with"),
        (row(4, sources=[0, 0]), "row 4: .*: sources must be numbers of 0 to 0, rising"),
        (lambda rows: rows.pop(), "row 5: .*: the last must end with the shards|of n_batches"),
        (row(0, batch="x" * 5000), "has a text of 5,000 bytes; at most 4,096"),
    ],
)
def test_conditions_that_are_not_right_are_refused(folder, change, match):
    change_conditions(folder, change)
    refused(match, lambda: Atlas.open(folder))


def test_conditions_with_other_columns_are_refused(folder):
    nullable = pa.schema([field.with_nullable(True) for field in CONDITIONS_SCHEMA])
    change_conditions(folder, row(1, batch=None), nullable)
    refused("conditions.parquet has other columns than an atlas; check ", lambda: Atlas.open(folder))


def change_genes(folder: Path, names: list[str]) -> None:
    columns = [pa.array(names), pa.array([""] * len(names)), pa.array([[True]] * len(names))]
    pq.write_table(pa.Table.from_arrays(columns, schema=GENES_SCHEMA), folder / GENES)
    seal(folder)


def test_duplicate_genes_are_refused(folder):
    change_genes(folder, ["a", "b", "a", *(f"g{i}" for i in range(N_GENES - 3))])
    refused("1 duplicate gene names, for example a; ", lambda: Atlas.open(folder))


def test_one_long_name_stated_for_all_genes_takes_no_memory(folder):
    n, length = 2000, 10_000_000  # 20 GB, in a file of some kilobytes
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), pa.array(["x" * length]))
    *texts, measured = GENES_SCHEMA
    schema = pa.schema([*(pa.field(f.name, column.type, nullable=False) for f in texts), measured])
    table = pa.Table.from_arrays([column, column, pa.array([[True]] * n, measured.type)], schema=schema)
    pq.write_table(table, folder / GENES, store_schema=False, compression="zstd", write_statistics=False)
    change_json(folder, MANIFEST, set_to(n_genes=n))
    assert (folder / GENES).stat().st_size < 1 << 16
    refused("has a text of 10,000,000 bytes", lambda: Atlas.open(folder))


@pytest.mark.parametrize("name", [GENES, CONDITIONS, shard_name(1)])
def test_parquet_that_is_none_is_refused_though_its_checksum_is_right(folder, name):
    (folder / name).write_bytes(b"PAR1" + bytes(20_000) + b"PAR1")
    seal(folder)
    refused(f"{name} is not a readable Parquet file", lambda: Atlas.open(folder))


@pytest.mark.parametrize("name", [GENES, CONDITIONS])
def test_parquet_with_damaged_pages_is_refused_though_its_checksum_is_right(folder, name):
    content = bytearray((folder / name).read_bytes())
    content[4:60] = bytes(56)
    (folder / name).write_bytes(content)
    seal(folder)
    refused(f"{name} is damaged", lambda: Atlas.open(folder))


@pytest.mark.parametrize(("name", "column", "last"), [(GENES, "name", 3), (CONDITIONS, "perturbation", 1)])
def test_numbers_of_words_that_are_not_there_are_refused(folder, name, column, last):
    words_beyond(folder / name, column, last)
    seal(folder)
    refused(f"{name} is damaged .*out of bounds", lambda: Atlas.open(folder))


@pytest.mark.parametrize("name", [GENES, CONDITIONS, shard_name(1)])
def test_a_column_that_would_end_the_process_is_refused(folder, name):
    odd_histogram(folder / name)
    seal(folder)
    refused(f"{name} is not a readable Parquet file .*histogram size mismatch", lambda: Atlas.open(folder))


def test_of_a_footer_no_cells_are_read(folder):
    path = folder / shard_name(1)
    content = path.read_bytes()
    length = int.from_bytes(content[-8:-4], "little") + 8
    path.write_bytes(b"PAR1" + b"\xff" * (len(content) - length - 4) + content[-length:])
    with open(path, "rb") as file:
        assert footer_of(file).equals(pq.read_metadata(path))


def test_a_table_without_the_rows_that_its_footer_states_is_refused(folder):
    pq.write_table(pq.read_table(folder / GENES)[:0], folder / GENES, store_schema=False, compression="none")
    content = (folder / GENES).read_bytes()
    number, stated = b"\x16\x00\x19", bytes([0x16, 2 * N_GENES, 0x19])  # of rows, before the list of row groups
    assert content.count(number) == 1
    (folder / GENES).write_bytes(content.replace(number, stated))
    seal(folder)
    refused(f"{GENES} has 0 rows, not {N_GENES} as {MANIFEST} states", lambda: Atlas.open(folder))


# Shards


def test_a_shard_that_is_missing_or_cut_is_named(folder):
    path = folder / shard_name(1)
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    refused("cells-00001.parquet has .* bytes, not .* as checksums.json states", lambda: Atlas.open(folder))
    path.unlink()
    refused("cells-00001.parquet is missing", lambda: Atlas.open(folder), FileNotFoundError)


def test_a_corrupt_shard_is_named_and_refused_by_verify_and_when_the_cache_is_made(folder, tmp_path):
    original = (folder / shard_name(1)).read_bytes()
    flip_byte(folder / shard_name(1))
    atlas = Atlas.open(folder)
    match = "cells-00001.parquet has sha256 [0-9a-f]{64}, not [0-9a-f]{64} as checksums.json states"
    for call in (atlas.verify, lambda: atlas.arrow_cells(None, COUNTS, tmp_path / "c"), lambda: atlas.check_shard(1)):
        refused(match, call)
    assert atlas.check_shard(0).is_file()
    (folder / shard_name(1)).write_bytes(original)
    atlas.verify()
    assert len(atlas.arrow_cells(None, COUNTS, tmp_path / "c")) == N_CELLS


def test_a_shard_with_damaged_pages_is_refused_though_its_checksum_is_right(folder, tmp_path):
    content = bytearray((folder / shard_name(1)).read_bytes())
    footer = pq.read_metadata(folder / shard_name(1))
    for name in range(footer.num_columns):
        start = footer.row_group(2).column(name).data_page_offset
        content[start : start + 30] = bytes(30)
    (folder / shard_name(1)).write_bytes(content)
    seal(folder)
    atlas = Atlas.open(folder)
    refused(f"{shard_name(1)} of .* is damaged", atlas.verify)
    refused(f"{shard_name(1)} of .* is damaged", lambda: atlas.arrow_cells(None, COUNTS, tmp_path / "cache"))


@pytest.mark.parametrize("column", ["perturbation", "source"])
def test_labels_of_cells_that_are_not_there_are_refused(folder, column):
    words_beyond(folder / shard_name(1), column)
    seal(folder)
    refused(f"{shard_name(1)} of .* is damaged .*out of bounds", Atlas.open(folder).verify)


def test_the_arrow_cache_is_made_once_and_goes_on_where_it_was(folder, tmp_path, monkeypatch):
    flip_byte(folder / shard_name(2))
    checked = []
    check = Atlas.check_shard
    monkeypatch.setattr(Atlas, "check_shard", lambda self, i: checked.append(i) or check(self, i))
    atlas = Atlas.open(folder)
    with pytest.raises(ValueError, match="cells-00002"):
        atlas.arrow_cells(None, COUNTS, tmp_path / "cache")
    flip_byte(folder / shard_name(2))
    atlas.arrow_cells(None, COUNTS, tmp_path / "cache")
    atlas.arrow_cells(GeneVocab(("gene_3",)), COUNTS, tmp_path / "cache")
    assert checked == [0, 1, 2, 2]


def test_the_arrow_cache_is_that_of_the_content_wherever_it_lies(folder, tmp_path):
    first = Atlas.open(folder).arrow_cells(None, COUNTS, tmp_path / "cache").take(np.arange(N_CELLS))
    other = write_atlas(tmp_path / "other [1]*", seed=1)
    Atlas.open(other).arrow_cells(None, COUNTS, tmp_path / "cache")
    moved = folder.rename(tmp_path / "moved")
    again = Atlas.open(moved).arrow_cells(None, COUNTS, tmp_path / "cache").take(np.arange(N_CELLS))
    np.testing.assert_array_equal(first.values, again.values)
    assert len(list((tmp_path / "cache" / "parquet").iterdir())) == 6


def test_the_arrow_cache_says_where_there_is_no_room(folder, tmp_path, monkeypatch):
    import datasets

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(datasets.arrow_writer.ArrowWriter, "write_table", full)
    with pytest.raises(OSError, match=r"no Arrow cache of .* in .*No space left.*HF_DATASETS_CACHE"):
        Atlas.open(folder).arrow_cells(None, COUNTS, tmp_path / "cache")


def test_bars_of_datasets_are_as_they_were(folder, tmp_path):
    import datasets

    for enabled in (True, False):
        (datasets.enable_progress_bars if enabled else datasets.disable_progress_bars)()
        Atlas.open(folder).arrow_cells(None, COUNTS, tmp_path / "cache")
        assert datasets.are_progress_bars_disabled() != enabled
    datasets.enable_progress_bars()


def test_the_other_kind_of_values_is_refused(folder, tmp_path):
    log1p = Preprocessing("log1p", 1e4, 10.0)
    refused("holds counts, but log1p are wanted", lambda: Atlas.open(folder).arrow_cells(None, log1p, tmp_path))


def test_a_gene_outside_of_the_vocabulary_is_refused_though_its_checksum_is_right(tmp_path):
    X = random_cells(N_CELLS, N_GENES)
    genes = GeneVocab(tuple("abcdefghij"))
    atlas = Atlas.open(write_atlas(tmp_path / "a", cells=X, genes=genes))
    bad = int((X.toarray()[:, 10:] > 0).any(axis=1).argmax())
    match = (
        f"row {bad} of data/cells-00000.parquet of .* has (gene index 1[0-9], but there are 10|a gene index of 10 or)"
    )
    refused(match, atlas.verify)
    for wanted in (None, GeneVocab(("c", "a"))):
        cells = atlas.arrow_cells(wanted, COUNTS, tmp_path / "cache")
        refused(match, lambda cells=cells: cells.take(np.arange(N_CELLS)))


def altered(name: str, change):
    """Change the Python values of one column of a shard."""

    def change_table(table: pa.Table) -> pa.Table:
        values = table[name].to_pylist()
        change(values)
        at = table.column_names.index(name)
        return table.set_column(at, table.schema.field(name), pa.array(values, table.schema.field(name).type))

    return change_table


def place(row: int, value):
    return lambda values: values.__setitem__(row, value)


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("perturbation", place(7, "C"), "row 7 .* has another perturbation than conditions.parquet states"),
        ("perturbation", place(16, "B"), "row 16 .* has another perturbation"),
        ("cell_type", place(0, "NK"), "row 0 .* has another cell_type"),
        ("batch", place(6, "b2"), "row 6 .* has another batch"),
        ("source", place(3, "elsewhere"), "row 3 .* has a source that is not in atlas.json"),
        ("library_size", place(5, float("nan")), "row 5 .* has a library size that is negative or not finite"),
        ("library_size", place(16, -1.0), "row 16 .* has a library size that is negative or not finite"),
        ("library_size", place(9, float("inf")), "row 9 .* has a library size that is negative or not finite"),
        ("genes", place(11, [5] * 99), "row 11 .* has not as many genes as values"),
        ("counts", place(12, [1] * 99), "row 12 .* has not as many genes as values"),
    ],
)
def test_verify_names_the_row_that_is_wrong(folder, name, change, match):
    change_shard(folder, 1, altered(name, change))
    atlas = Atlas.open(folder)
    refused(match.replace("row ", "^row ").replace(".*", f"of data/cells-00001.parquet of {folder}", 1), atlas.verify)


@pytest.mark.parametrize(
    ("genes", "values", "match"),
    [
        ([3, 3], [1, 1], "has gene indices that do not increase"),
        ([4, 3], [1, 1], "has gene indices that do not increase"),
        ([3, 4], [1, 0], "has a value that is not positive and finite"),
        ([3, 20], [1, 1], "has a gene index of 20 or more"),
    ],
)
def test_verify_names_the_row_of_wrong_values(folder, genes, values, match):
    for at in (0, 4, 5, 9):  # the first and last of a row group among them
        change_shard(folder, 2, altered("genes", place(at, genes)))
        change_shard(folder, 2, altered("counts", place(at, values)))
        refused(f"^row {at} of data/cells-00002.parquet of .* {match}", Atlas.open(folder).verify)
        change_shard(folder, 2, altered("genes", place(at, [])))
        change_shard(folder, 2, altered("counts", place(at, [])))
        Atlas.open(folder).verify()


def test_verify_tells_of_files_that_are_not_of_the_atlas(folder):
    assert Atlas.open(folder).verify() == []
    (folder / "data" / "notes.txt").touch()
    assert Atlas.open(folder).verify() == ["data/notes.txt"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.5, 0.0])
def test_verify_refuses_log1p_values_that_are_none(tmp_path, value):
    folder = write_atlas(tmp_path / "a", value_type="float32")
    change_shard(folder, 0, altered("genes", place(2, [1])))
    change_shard(folder, 0, altered("log1p", place(2, [value])))
    refused("^row 2 .* has a value that is not positive and finite", Atlas.open(folder).verify)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.slice(0, 16), "cells-00001.parquet has 16 rows, not 17 as atlas.json states"),
        (lambda t: pa.concat_tables([t, t]), "cells-00001.parquet has 34 rows, not 17"),
        (
            lambda t: t.drop_columns("cell"),
            "cells-00001.parquet has other columns than an atlas; check cell string not null",
        ),
        (lambda t: t.append_column("x", [[1] * 17]), "other columns than an atlas; check .*x"),
        (lambda t: t.select(t.column_names[::-1]), "other columns than an atlas; check their order"),
        (lambda t: t.cast(pa.schema([f.with_nullable(True) for f in t.schema])), "other columns than an atlas"),
    ],
)
def test_shards_with_other_rows_or_columns_are_refused_on_opening(folder, change, match):
    change_shard(folder, 1, change)
    refused(match, lambda: Atlas.open(folder))


def test_a_shard_with_more_values_than_fit_is_refused_on_opening(folder, monkeypatch):
    monkeypatch.setattr("perturbdiff.atlas.store.SHARD_BYTES", 100)
    refused("cells-00000.parquet holds .* values, more than fit in a shard", lambda: Atlas.open(folder))


@pytest.mark.parametrize("name", [MANIFEST, CONDITIONS, shard_name(1)])
def test_a_link_that_leaves_the_folder_is_refused(folder, tmp_path, name):
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    refused(f"{name} leads out of the folder", lambda: Atlas.open(folder))


def test_a_link_to_a_folder_elsewhere_is_refused(folder, tmp_path):
    (folder / "data").rename(tmp_path / "elsewhere")
    (folder / "data").symlink_to(tmp_path / "elsewhere")
    refused("cells-00000.parquet leads out of the folder", lambda: Atlas.open(folder))


def test_an_atlas_that_is_itself_a_link_opens(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    Atlas.open(tmp_path / "link").verify()


# The Hub


@pytest.fixture
def hub_cache(pristine, tmp_path, monkeypatch):
    """The cache of the Hub with the metadata of one data set, and the shards in `blobs` only; no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repo, commit = tmp_path / "hub" / "datasets--someone--cells", "0123456789abcdef" * 2 + "01234567"
    snapshot = repo / "snapshots" / commit
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "blobs").mkdir()
    (snapshot / "data").mkdir(parents=True)
    for path in pristine.rglob("*.*"):
        name = path.relative_to(pristine)
        blob = repo / "blobs" / sha256(path)
        shutil.copy(path, blob)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    return snapshot


def test_a_repo_opens_from_the_cache_when_offline(hub_cache, tmp_path):
    atlas = Atlas.open("someone/cells")
    assert (atlas.name, atlas.folder, atlas.commit) == ("someone/cells", None, hub_cache.name)
    assert "on the Hub only" in atlas.summary()
    assert atlas.shard_url(1).endswith(
        f"/datasets/someone/cells/resolve/{hub_cache.name}/data%2Fcells-00001.parquet"
    ) or atlas.shard_url(1).endswith(f"/datasets/someone/cells/resolve/{hub_cache.name}/data/cells-00001.parquet")
    refused(r"on the Hub only; call download\(\)", lambda: atlas.arrow_cells(None, COUNTS, tmp_path / "cache"))
    atlas.download()
    assert atlas.folder == hub_cache
    atlas.verify()
    assert len(atlas.arrow_cells(None, COUNTS, tmp_path / "cache")) == N_CELLS
    Atlas.open(hub_cache).verify()  # the folder of the cache itself


def test_a_shard_that_came_cut_is_refused_by_download(hub_cache):
    shard = (hub_cache / shard_name(2)).resolve()
    shard.write_bytes(shard.read_bytes()[:-1])
    atlas = Atlas.open("someone/cells")
    refused("cells-00002.parquet has .* bytes, not", atlas.download)
    assert atlas.folder is None


def test_links_that_leave_the_cache_of_the_repo_are_refused(hub_cache, tmp_path):
    shutil.copy((hub_cache / MANIFEST).resolve(), tmp_path / "elsewhere")
    (hub_cache / MANIFEST).unlink()
    (hub_cache / MANIFEST).symlink_to(tmp_path / "elsewhere")
    refused("leads out of the folder", lambda: Atlas.open("someone/cells"))


def test_manifests_of_the_hub_are_not_loaded_where_they_are_too_large(hub_cache):
    path = hub_cache / CHECKSUMS
    content = json.loads(path.read_text())
    content["files"][CONDITIONS]["size"] = 10**15
    path.unlink()
    path.write_text(json.dumps(content))
    (hub_cache / CONDITIONS).unlink()
    refused("conditions.parquet of someone/cells has 1,000,000,000,000,000 bytes", lambda: Atlas.open("someone/cells"))


@pytest.mark.parametrize("name", ["no/such", "/no/such/folder", "./nowhere", "a/b/c", "x y"])
@pytest.mark.usefixtures("hub_cache")
def test_neither_a_folder_nor_a_repo_is_said(name):
    refused(
        r"^no such folder here \(.*owner/name|^no such folder here \(no/such\), and", lambda: Atlas.open(name), OSError
    )


@pytest.mark.usefixtures("hub_cache")
def test_a_revision_that_is_not_in_the_cache_is_said():
    refused(
        "'someone/cells' at revision 'v9'.* is not whole in the cache",
        lambda: Atlas.open("someone/cells", "v9"),
        FileNotFoundError,
    )


def test_a_folder_has_no_revision(folder):
    refused("is a folder and has no revision 'main'", lambda: Atlas.open(folder, "main"))


def test_a_folder_that_is_no_atlas_is_said(tmp_path):
    (tmp_path / "x.txt").touch()
    refused(r"has no atlas.json; found \['x.txt'\]", lambda: Atlas.open(tmp_path), FileNotFoundError)


def test_the_room_does_not_wait_for_datasets():
    code = "import sys, perturbdiff.atlas.store; assert not {'datasets', 'huggingface_hub'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_write_manifest_refuses_conditions_with_other_columns(folder):
    atlas = Atlas.open(folder)
    table = pq.read_table(folder / CONDITIONS).drop_columns("shard")
    with pytest.raises(ValueError, match="shard"):
        write_manifest(folder, atlas.info, atlas.genes, table, {}, "")


CACHE = """
import sys
from pathlib import Path
from perturbdiff.atlas.store import Atlas
check = Atlas.check_shard
def checked(atlas, i):
    print("hashed", i, flush=True)
    return check(atlas, i)
Atlas.check_shard = checked
atlas = Atlas.open(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
atlas.cache(Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_of_several_processes_one_hashes_and_caches_a_shard_and_the_others_wait_for_it(tmp_path):
    path = write_atlas(tmp_path / "atlas", [("control", "NK", "b1", 60), ("A", "NK", "b1", 60)], rows_per_shard=40)
    command = [sys.executable, "-c", CACHE, str(path), str(tmp_path / "cache")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(3)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    ended = [process.communicate(timeout=PATIENCE) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], ended
    assert sorted(line for said, _ in ended for line in said.splitlines()) == ["hashed 0", "hashed 1", "hashed 2"]
