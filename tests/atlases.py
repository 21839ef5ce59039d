"""Small atlases for tests, written without the build: of random cells, or of the cells of a screen in its order."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import sparse

from perturbdiff.atlas.card import atlas_card
from perturbdiff.atlas.format import (
    CHECKSUMS,
    CONDITIONS_SCHEMA,
    SORTED_BY,
    AtlasInfo,
    AtlasSource,
    Shard,
    parquet_options,
    shard_name,
    shard_schema,
    write_manifest,
)
from perturbdiff.data.screen import Screen
from perturbdiff.data.vocab import GeneVocab
from perturbdiff.files import sha256

CONDITIONS = (
    ("control", "NK", "b1", 7),
    ("A", "NK", "b1", 9),
    ("control", "T", "b1", 5),
    ("A", "T", "b1", 1),
    ("B", "T", "b1", 12),
    ("control", "T", "b2", 6),
    ("B", "T", "b2", 4),
)


def words_beyond(path: Path, name: str, last: int = 1) -> None:
    """Write a Parquet file anew, with numbers of words that are not there in the `last` bytes of a column of texts."""
    pq.write_table(pq.read_table(path), path, compression="none", use_dictionary=[name], write_statistics=False)
    group = pq.read_metadata(path).row_group(0)
    (column,) = (of for of in map(group.column, range(group.num_columns)) if of.path_in_schema == name)
    end, content = column.dictionary_page_offset + column.total_compressed_size, bytearray(path.read_bytes())
    content[end - last : end] = b"\xff" * last
    path.write_bytes(content)


def odd_histogram(path: Path) -> None:
    """Make the last column of a Parquet file, of lists, contradict itself: three counts of levels, of which it has two.

    Asked for that column, pyarrow ends the process.
    """
    content = path.read_bytes()
    length = int.from_bytes(content[-8:-4], "little")
    cells, footer = content[: -8 - length], content[-8 - length : -8]
    at = footer.rindex(b"\x19\x26")  # the next field, a list of two whole numbers
    footer = footer[:at] + b"\x19\x36\x00" + footer[at + 2 :]
    path.write_bytes(cells + footer + len(footer).to_bytes(4, "little") + content[-4:])


def random_cells(
    n_cells: int, n_genes: int, seed: int = 0, value_type: str = "uint16", gene_type: str = "uint16"
) -> sparse.csr_matrix:
    """Cells with 0 to n_genes / 2 values each, the first and one in ten without any."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, max(n_genes // 2, 2), n_cells) * (rng.random(n_cells) > 0.1)
    sizes[:1] = 0
    genes = [np.sort(rng.choice(n_genes, size, replace=False)) for size in sizes]
    top = 2**16 + 7 if value_type == "uint32" else 9
    values = rng.integers(1, top, sizes.sum()) / (1 if value_type != "float32" else 3)
    indptr = np.concatenate([[0], np.cumsum(sizes)])
    indices = np.concatenate([*genes, np.zeros(0, int)]).astype(gene_type)
    return sparse.csr_matrix((values.astype(value_type), indices, indptr), (n_cells, n_genes))


def write_atlas(
    folder: Path,
    conditions: Sequence[tuple[str, str, str, int]] = CONDITIONS,
    n_genes: int = 20,
    rows_per_shard: int = 17,
    row_group: int = 5,
    seed: int = 0,
    value_type: str = "uint16",
    gene_type: str = "uint16",
    cells: sparse.csr_matrix | None = None,
    library_size: np.ndarray | None = None,
    genes: GeneVocab | None = None,
    names: Sequence[str] | None = None,
    measured: np.ndarray | None = None,
    **info: object,
) -> Path:
    """An atlas of n cells of each (perturbation, cell_type, batch, n); shards may end within a condition.

    `cells`, in the order of the sorted conditions, are random if not given; value_type "float32" makes them log1p.
    `info` replaces fields of atlas.json.
    """
    conditions = sorted(conditions, key=lambda c: (c[1], c[2], c[0]))
    n_cells = sum(condition[3] for condition in conditions)
    if cells is None:
        cells = random_cells(n_cells, n_genes, seed, value_type, gene_type)
    if library_size is None:
        totals = np.asarray(cells.sum(axis=1, dtype=np.float64)).ravel() + 1
        library_size = np.ones(n_cells) if value_type == "float32" else totals
    kind = "log1p" if value_type == "float32" else "counts"
    schema = shard_schema(gene_type, kind, value_type)
    labels = [[c[i] for c in conditions for _ in range(c[3])] for i in range(3)]
    names = [f"cell_{i}" for i in range(n_cells)] if names is None else names
    (folder / "data").mkdir(parents=True)
    shards, digests = [], {}
    for i, first in enumerate(range(0, n_cells, rows_per_shard)):
        rows = slice(first, min(first + rows_per_shard, n_cells))
        part = cells[rows]
        offsets = pa.array(part.indptr, pa.int32())
        columns = [
            *(pa.array(column[rows]) for column in labels),
            pa.array(["random"] * part.shape[0]),
            pa.array(names[rows], pa.string()),
            pa.array(np.asarray(library_size)[rows], pa.float32()),
            pa.ListArray.from_arrays(offsets, part.indices.astype(gene_type), type=schema.field("genes").type),
            pa.ListArray.from_arrays(offsets, part.data.astype(value_type), type=schema.field(kind).type),
        ]
        path = folder / shard_name(i)
        with pq.ParquetWriter(path, schema, **parquet_options(kind)) as writer:
            writer.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=row_group)
        shards.append(Shard(shard_name(i), part.shape[0]))
        digests[shard_name(i)] = (sha256(path), path.stat().st_size)
    genes = GeneVocab(tuple(f"gene_{g}" for g in range(n_genes))) if genes is None else genes
    perturbations, cell_types, batches = ({c[i] for c in conditions} for i in range(3))
    manifest = AtlasInfo(
        library_version="0",
        input_kind=kind,
        normalisation="log1p(count * 1e4 / library_size).",
        n_cells=n_cells,
        n_genes=len(genes),
        n_conditions=len(conditions),
        n_perturbations=len(perturbations - {"control"}),
        n_cell_types=len(cell_types),
        n_batches=len(batches),
        gene_type=gene_type,
        value_type=value_type,
        control_label="control",
        dose_separator=None,
        license="cc-by-4.0",
        seed=seed,
        genes_rule="union",
        target_sum=None,
        sources=(AtlasSource("random", "random.h5ad", None, n_cells, len(genes), len(genes), "row sums"),),
        shards=tuple(shards),
    )
    changed = replace(manifest, **info)
    table = condition_table(conditions, rows_per_shard)
    write_manifest(folder, changed, genes, table, digests, atlas_card(changed), measured)
    return folder


def condition_table(conditions: Sequence[tuple[str, str, str, int]], rows_per_shard: int) -> pa.Table:
    """conditions.parquet of cells that lie in the order of `conditions`."""
    rows, first = [], 0
    for perturbation, cell_type, batch, n_cells in conditions:
        shard, row = divmod(first, rows_per_shard)
        place = {"cell_type": cell_type, "batch": batch, "perturbation": perturbation}
        place |= {"is_control": perturbation == "control", "n_cells": n_cells}
        rows.append(
            {**place, "shard": shard_name(shard), "first_row": row, "sources": [0], "shared_with": [], "n_shared": []}
        )
        first += n_cells
    return pa.Table.from_pylist(rows, schema=CONDITIONS_SCHEMA)


def atlas_of_screen(folder: Path, screen: Screen, rows_per_shard: int = 17, **settings: object) -> Path:
    """The cells of a screen with control label "control", in its order, as an atlas."""
    labels = screen.obs[list(SORTED_BY)].itertuples(index=False, name=None)
    conditions = [(p, c, b, len(list(cells))) for (c, b, p), cells in groupby(labels)]
    expression = screen.expression
    return write_atlas(
        folder,
        conditions,
        rows_per_shard=rows_per_shard,
        value_type=expression.X.dtype.name,
        cells=expression.X,
        library_size=expression.library_size,
        genes=expression.genes,
        names=list(screen.obs.index),
        **settings,
    )


def seal(folder: Path) -> None:
    """State the sizes and hashes that the files of an atlas have now, as one who changes them on purpose would."""
    path = folder / CHECKSUMS
    content = json.loads(path.read_text())
    for name, entry in content["files"].items():
        if (folder / name).is_file():
            entry |= {"sha256": sha256(folder / name), "size": (folder / name).stat().st_size}
    path.write_text(json.dumps(content))


def change_shard(folder: Path, i: int, change: Callable[[pa.Table], pa.Table]) -> None:
    """Write a shard anew with other content, and seal the atlas."""
    path = folder / shard_name(i)
    pq.write_table(change(pq.read_table(path)), path, row_group_size=5)
    seal(folder)
