"""How large the data of a recipe are, without reading them: labels, genes, cells, stored values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from perturbdiff.atlas.store import Atlas
from perturbdiff.config import AtlasSize, Config
from perturbdiff.data.screen import Screen
from perturbdiff.nn.conditioning import VocabSizes
from perturbdiff.training.dataset import TrainingSet, marginal_conditions

SAMPLE = 4096  # cells of a screen whose values are counted


@dataclass(frozen=True)
class DataSize:
    """What of the data the costs depend on.

    n_cells
        Dealt in an epoch, controls not counted.
    values_per_cell, value_bytes
        Stored values on average, and bytes of one with its gene.
    with_controls
        Share of the sets that have controls; marginal ones have none.
    """

    source: str
    n_cells: int
    n_genes: int
    values_per_cell: float
    value_bytes: int
    with_controls: float
    vocabularies: VocabSizes
    notes: tuple[str, ...] = ()


def data_size(config: Config) -> DataSize:
    """From the screen, from atlases that are folders here, or from what the recipe expects.

    Raises
    ------
    ValueError
        An atlas is no folder and `expected` is not given; atlases expect different numbers of genes; as `TrainingSet`.
    """
    data = config.data
    if data.screen is not None:
        return _of_screen(config, Screen.read(data.screen, data))
    if all(Path(atlas.path).is_dir() for atlas in data.atlases):
        return _of_atlases(config)
    for i, atlas in enumerate(data.atlases):
        if atlas.expected is None:
            raise ValueError(
                f"data.atlases[{i}] ({atlas.path}) is no folder here, and data.atlases[{i}].expected does not say how "
                "large it is; give {cells, genes, genes_per_cell, perturbations, cell_types, batches}."
            )
    return _expected(config)


def _of_screen(config: Config, screen: Screen) -> DataSize:
    made = TrainingSet.of(screen, config)
    taken = made.cells.take(np.linspace(0, len(screen) - 1, min(len(screen), SAMPLE)).astype(np.int64))
    per_cell = len(taken.values) / (len(taken.indptr) - 1)
    value_bytes = taken.genes.itemsize + taken.values.itemsize
    return _of_training_set(f"counted in {screen.path}", made, len(made.cells.genes), per_cell, value_bytes, ())


def _of_atlases(config: Config) -> DataSize:
    # Streamed, nothing is read but the manifests; genes are then not chosen, and weights not possible.
    unweighted = [replace(atlas, weight=None) for atlas in config.data.atlases]
    data = replace(config.data, streamed=True, n_hvg=None, n_streams=None, atlases=unweighted)
    made = TrainingSet.of_atlases(replace(config, data=data))
    per_cell = sum(_values(atlas) for atlas in made.atlases) / sum(len(atlas) for atlas in made.atlases)
    info = made.atlases[0].info
    value_bytes = np.dtype(info.gene_type).itemsize + np.dtype(info.value_type).itemsize
    n_genes, kept, notes = _chosen(config, len(made.atlases[0].genes))
    return _of_training_set("counted in the atlas", made, n_genes, per_cell * kept, value_bytes, notes)


def _of_training_set(
    source: str, made: TrainingSet, n_genes: int, per_cell: float, value_bytes: int, notes: tuple[str, ...]
) -> DataSize:
    index = made.train.index
    marginal = marginal_conditions(index, made.train.sources)
    assigned = marginal | ~index.is_control
    n_cells = int(index.n_cells[assigned].sum())
    with_controls = float(index.n_cells[assigned & ~marginal].sum() / n_cells)
    sizes = VocabSizes.of(made.vocabularies)
    return DataSize(source, n_cells, n_genes, per_cell, value_bytes, with_controls, sizes, notes)


def _values(atlas: Atlas) -> int:
    # Stored values, by the footers of the shards; a cell without any counts as one.
    assert atlas.folder is not None, "only folders are counted"
    total = 0
    for shard in atlas.info.shards:
        footer = pq.read_metadata(atlas.folder / shard.file)
        for group in range(footer.num_row_groups):
            columns = [footer.row_group(group).column(i) for i in range(footer.num_columns)]
            total += sum(column.num_values for column in columns if column.path_in_schema.startswith("genes."))
    return total


def _expected(config: Config) -> DataSize:
    atlases = config.data.atlases
    sizes = [atlas.expected for atlas in atlases if atlas.expected is not None]
    genes = {size.genes for size in sizes}
    if len(genes) > 1:
        raise ValueError(f"data.atlases[].expected.genes {sorted(genes)} must be the same: atlases share their genes.")
    labelled = [size for size, atlas in zip(sizes, atlases, strict=True) if atlas.sets == "perturbed"]
    n_cells = np.array([size.cells for size in sizes])
    weights = np.array([atlas.weight or size.cells for atlas, size in zip(atlases, sizes, strict=True)], dtype=float)
    share = weights / weights.sum()
    perturbed = np.array([atlas.sets == "perturbed" for atlas in atlases])
    n_genes, kept, notes = _chosen(config, genes.pop())
    if len(sizes) > 1:
        notes += ("labels are counted as if no two atlases shared one",)
    return DataSize(
        "expected by the recipe",
        int(n_cells.sum()),
        n_genes,
        kept * float(share @ np.array([size.genes_per_cell for size in sizes])),
        (2 if n_genes <= 1 << 16 else 4) + 2,
        float(share @ perturbed),
        _labels(config, sizes, labelled),
        notes,
    )


def _labels(config: Config, sizes: list[AtlasSize], labelled: list[AtlasSize]) -> VocabSizes:
    # Marginal sets have no perturbation and are pooled over batches.
    by_batch = config.data.control_match != "cell_type"
    return VocabSizes(
        sum(size.perturbations for size in labelled),
        sum(size.cell_types for size in sizes),
        sum(size.batches for size in labelled) if by_batch else 0,
    )


def _chosen(config: Config, n_genes: int) -> tuple[int, float, tuple[str, ...]]:
    # Genes of the model, the part of a cell's values that is of them, and what must be said about it.
    n = config.data.n_hvg
    if n is None or n >= n_genes:
        return n_genes, 1.0, ()
    note = f"{n:,} of {n_genes:,} genes are chosen: values a cell are scaled by that, but variable genes have more"
    return n, n / n_genes, (note,)
