"""What is decided before the first cell is moved: genes, conditions, buckets, chunks.

A plan is made once and kept, so that every process, every task on every machine and every restart has the same.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from perturbdiff.atlas.build.genes import merge_genes, n_selected, read_gene_table
from perturbdiff.atlas.build.sort import CELL_BYTES, Conditions, Sort
from perturbdiff.atlas.build.sources.base import Selection, Source
from perturbdiff.atlas.build.sources.checks import parsed
from perturbdiff.atlas.format import CONTROL_LABEL, PREPROCESSING, ROW_GROUP, SORTED_BY, gene_type
from perturbdiff.config import BuildConfig
from perturbdiff.data.expression import log1p_normalised
from perturbdiff.data.gene_choice import GeneMoments, best_genes
from perturbdiff.data.labels import DOSE
from perturbdiff.data.notation import Notation, one_unit
from perturbdiff.data.vocab import GeneVocab
from perturbdiff.files import progress, write_json, written
from perturbdiff.workers import Crew

MB = 1 << 20
PROCESS_BYTES = 320 * MB  # of a process that holds no cells: libraries, and memory that is not given back
READ_VALUES = 1 << 21  # of a source at a time; fixed, because the moments of genes depend on it
READ_BYTES = READ_VALUES * 40  # of them, at the most crowded moment
GROUP_TIMES = 8  # what a row group takes while it is gathered and written as Parquet, of its genes and values
VALUE_BYTES = 14  # of a value of a chunk that waits to be written
MOST_VALUES = 1 << 24  # of a chunk; more saves nothing
ARRAYS = ("keys", "n_cells", "first_bucket", "n_parts", "sources")  # of `Conditions`
BLOCK_CELLS = 1 << 18  # one piece of work where only labels or moments are read


@dataclass(frozen=True)
class Inputs:
    """What the processes of a build share: the folder of the work, the settings and the opened sources."""

    folder: Path
    config: BuildConfig
    sources: tuple[Source, ...]
    shard_bytes: int

    @cached_property
    def plan(self) -> Plan:
        return Plan.read(self)


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the first cell is moved, the same in every process and after every restart.

    source_cells
        Cells that are kept of each source.
    max_values
        The chunks' size, by the memory of who planned.
    cell_bytes
        Genes and values of a cell of the source that has most.
    disk_bytes
        What the build needs, about.
    """

    genes: GeneVocab
    sort: Sort
    source_cells: tuple[int, ...]
    max_values: int
    cell_bytes: float
    disk_bytes: int

    def write(self) -> None:
        """Keep the plan. Where another task of the same build was faster, its plan is the one that holds."""
        sort, conditions = self.sort, self.sort.conditions
        temporary = sort.folder / f".plan.{socket.gethostname()}.{os.getpid()}.partial"
        temporary.mkdir()
        content = {
            "names": conditions.names,
            "perturbations": sort.perturbations,
            "dose_separator": sort.dose_separator,
            "dose_unit": sort.dose_unit,
            "genes": self.genes.names,
            "ensembl": self.genes.ensembl,
            "value_type": sort.value_type,
            "source_cells": self.source_cells,
            "max_values": self.max_values,
            "cell_bytes": self.cell_bytes,
            "disk_bytes": self.disk_bytes,
        }
        arrays = {name: getattr(conditions, name) for name in ARRAYS}
        arrays |= {f"columns_{i}": columns for i, columns in enumerate(sort.columns)}
        write_json(temporary / "plan.json", content)
        with written(temporary / "plan.npz") as partial, open(partial, "wb") as file:
            np.savez(file, chunks=sort.chunks, pieces=sort.pieces, **arrays)
        try:
            temporary.rename(sort.folder / "plan")
        except OSError as error:
            shutil.rmtree(temporary)
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise

    @classmethod
    def read(cls, inputs: Inputs) -> Plan:
        content = json.loads((inputs.folder / "plan" / "plan.json").read_bytes())
        with np.load(inputs.folder / "plan" / "plan.npz", allow_pickle=False) as arrays:
            found = dict(arrays)
        names = tuple(tuple(names) for names in content["names"])
        sort = Sort(
            folder=inputs.folder,
            sources=inputs.sources,
            columns=tuple(found[f"columns_{i}"] for i in range(len(inputs.sources))),
            gene_names=tuple(content["genes"]),
            conditions=Conditions(names, *(found[name] for name in ARRAYS)),  # type: ignore[arg-type]
            chunks=found["chunks"],
            pieces=found["pieces"],
            perturbations=tuple(content["perturbations"]),
            dose_separator=content["dose_separator"],
            dose_unit=content["dose_unit"],
            value_type=content["value_type"],
            seed=inputs.config.seed,
            shard_bytes=inputs.shard_bytes,
        )
        genes = GeneVocab(sort.gene_names, None if content["ensembl"] is None else tuple(content["ensembl"]))
        numbers = (content[name] for name in ("max_values", "cell_bytes", "disk_bytes"))
        return cls(genes, sort, tuple(content["source_cells"]), *numbers)


def make_plan(crew: Crew[Inputs], densities: Sequence[Density], max_values: int, task: tuple[int, int] | None) -> Plan:
    """Look at all labels and, where the rule asks for it, at all values.

    Raises
    ------
    FileNotFoundError, ValueError
        As `merge_genes` and `Selection.check`.
    """
    inputs, config = crew.job, crew.job.config
    table = read_gene_table(config.gene_table) if config.gene_table else None
    vocabs = {source.name: source.genes for source in inputs.sources}
    space = merge_genes(vocabs, config.genes, table)
    pieces = [source.chunks(READ_VALUES) for source in inputs.sources]
    chunks = _chunks(pieces, [density.mean() for density in densities], max_values)
    kept, found, selections = _conditions(crew, pieces, chunks)
    written, dose_separator, dose_unit = _written(found, inputs, space.genes.names)
    counts = _rewritten(found, written)
    if (n := n_selected(config.genes)) is not None:
        variable = [best_genes(n, moments.variance()) for moments in _moments(crew, pieces, task)]
        space = space.among(variable)
    value_type = config.count_type if inputs.sources[0].input_kind == "counts" else "float32"
    value_bytes = np.dtype(gene_type(len(space.genes))).itemsize + np.dtype(value_type).itemsize
    means = np.array([density.mean(columns >= 0) for density, columns in zip(densities, space.columns, strict=True)])
    # Buckets are a little smaller than shards, as sizes are estimates; CELL_BYTES is for cells without counts.
    sizes, bucket = np.maximum(means * value_bytes, CELL_BYTES), max(inputs.shard_bytes * 4 // 5, 1)
    sort = Sort(
        folder=inputs.folder,
        sources=inputs.sources,
        columns=space.columns,
        gene_names=space.genes.names,
        conditions=Conditions.from_counts(counts, sizes, bucket),
        chunks=kept,
        pieces=np.array([piece for ranges in pieces for piece in ranges], dtype=np.int64).reshape(-1, 2),
        perturbations=written,
        dose_separator=dose_separator,
        dose_unit=dose_unit,
        value_type=value_type,
        seed=config.seed,
        shard_bytes=inputs.shard_bytes,
    )
    source_cells = tuple(selection.n_cells for selection in selections)
    disk = float(((1.5 * means * value_bytes + 2 * CELL_BYTES) * source_cells).sum())
    return Plan(space.genes, sort, source_cells, max_values, row_bytes(inputs, densities), int(disk))


def _chunks(pieces: list[list[tuple[int, int]]], means: list[float], max_values: int) -> list[tuple[int, int, int]]:
    """(source, first piece, end) of chunks of about `max_values` values, the pieces of all sources counted together."""
    chunks: list[tuple[int, int, int]] = []
    position = 0
    for number, (ranges, mean) in enumerate(zip(pieces, means, strict=True)):
        begin, values = position, 0.0
        for first, last in ranges:
            # A piece is no more than this; where zeros are stored too it is less.
            size = min((last - first) * mean * 1.5, READ_VALUES)
            if values and values + size > max_values:
                chunks.append((number, begin, position))
                begin, values = position, 0.0
            values += size
            position += 1
        if position > begin:
            chunks.append((number, begin, position))
    return chunks


def _conditions(
    crew: Crew[Inputs], pieces: list[list[tuple[int, int]]], chunks: list[tuple[int, int, int]]
) -> tuple[np.ndarray, dict[tuple[str, str, str], np.ndarray], list[Selection]]:
    """One look at all labels: chunks (as `Sort`) that hold a cell, cells of each condition by source, selections."""
    sources = crew.job.sources
    flat = [piece for ranges in pieces for piece in ranges]
    selections = [Selection(source.config) for source in sources]
    counts: dict[tuple[str, str, str], np.ndarray] = {}
    kept = []
    items = {(number, flat[begin][0], flat[end - 1][1]): (number, begin, end) for number, begin, end in chunks}
    with progress(sum(source.n_cells for source in sources), "labels", "cell") as bar:
        for item, (selection, found) in crew.run(_count, items):
            number, begin, end = items[item]
            selections[number].merge(selection)
            for labels, n in found.items():
                counts.setdefault(labels, np.zeros(len(sources), dtype=np.int64))[number] += n
            if selection.n_cells:
                kept.append((number, selection.n_cells, begin, end))
            bar.update(item[2] - item[1])
    for selection in selections:
        selection.check()
    return np.array(sorted(kept, key=lambda chunk: chunk[2]), dtype=np.int64).reshape(-1, 4), counts, selections


def _written(
    counts: dict[tuple[str, str, str], np.ndarray], inputs: Inputs, genes: Sequence[str]
) -> tuple[tuple[dict[str, str], ...], str | None, str | None]:
    """How the atlas writes the perturbations of each source, what stands before a dose if there is one, and its unit.

    What stands alone in one source may be a part of a combination in another.
    """
    labels = [{key[2] for key, n in counts.items() if n[i]} for i in range(len(inputs.sources))]
    configs = [source.config for source in inputs.sources]
    alone = set(genes)
    for found, config in zip(labels, configs, strict=True):
        names = {name for parts in parsed(found, config, genes)[0].values() for name, _ in parts}
        alone |= {name for name in names if (config.combination_separator or "\0") not in name}
    taken = [parsed(found, config, alone) for found, config in zip(labels, configs, strict=True)]
    meanings, unit = [known for known, _ in taken], one_unit({unit for _, unit in taken}, "the sources of an atlas")
    has_doses = any(dose is not None for known in meanings for parts in known.values() for _, dose in parts)
    notation = Notation((), "+", DOSE if has_doses else None, (CONTROL_LABEL,))
    written = tuple({label: notation.text(parts) for label, parts in known.items()} for known in meanings)
    return written, notation.dose_separator, unit


def _rewritten(
    counts: dict[tuple[str, str, str], np.ndarray], written: Sequence[dict[str, str]]
) -> dict[tuple[str, str, str], np.ndarray]:
    found: dict[tuple[str, str, str], np.ndarray] = {}
    for (cell_type, batch, label), n_cells in counts.items():
        for i in np.flatnonzero(n_cells).tolist():
            key = cell_type, batch, written[i][label]
            found.setdefault(key, np.zeros_like(n_cells))[i] += n_cells[i]
    return found


def _count(inputs: Inputs, rows: tuple[int, int, int]) -> tuple[Selection, dict[tuple[str, str, str], int]]:
    number, first, last = rows
    selection = Selection(inputs.sources[number].config)
    labels = selection.labels(inputs.sources[number], first, last)
    counts = labels.groupby(list(SORTED_BY), observed=True, sort=False).size()
    return selection, {labels: int(n) for labels, n in counts.items()}  # type: ignore[misc]


def _moments(
    crew: Crew[Inputs], pieces: list[list[tuple[int, int]]], task: tuple[int, int] | None
) -> list[GeneMoments]:
    """Mean and variance of each gene of each source over its kept cells; what other tasks did is not done again."""
    inputs = crew.job
    parts = [(i, k, block) for i, ranges in enumerate(pieces) for k, block in enumerate(_blocks(ranges))]
    start = (task[0] - 1) * len(parts) // task[1] if task is not None else 0
    with progress(sum(source.n_cells for source in inputs.sources), "choice of genes", "cell") as bar:
        for (_, _, block), _ in crew.run(_moments_of, parts[start:] + parts[:start]):
            bar.update(block[-1][1] - block[0][0])
    moments = [GeneMoments(len(source.genes)) for source in inputs.sources]
    for i, k, _ in parts:  # always in this order, because sums of floats depend on it
        with np.load(_moments_file(inputs, i, k), allow_pickle=False) as part:
            moments[i].n_cells += part["n_cells"]
            moments[i].total += part["total"]
            moments[i].total_square += part["total_square"]
    return moments


def _moments_of(inputs: Inputs, part: tuple[int, int, list[tuple[int, int]]]) -> None:
    number, k, block = part
    path = _moments_file(inputs, number, k)
    if path.exists():
        return
    source = inputs.sources[number]
    moments, preprocessing = GeneMoments(len(source.genes)), replace(PREPROCESSING, input_kind=source.input_kind)
    kept = source.labels(block[0][0], block[-1][1])["row"].to_numpy()
    for first, last in block:
        rows = kept[slice(*np.searchsorted(kept, (first, last)))] - first
        if len(rows):
            X, library_size = source.read(first, last)
            moments.add(log1p_normalised(X[rows], library_size[rows], preprocessing))
    with written(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, n_cells=moments.n_cells, total=moments.total, total_square=moments.total_square)


def _moments_file(inputs: Inputs, source: int, block: int) -> Path:
    return inputs.folder / "moments" / f"source-{source:03d}-{block:06d}.npz"


def _blocks(pieces: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Neighbouring pieces together, up to BLOCK_CELLS."""
    blocks: list[list[tuple[int, int]]] = []
    for piece in pieces:
        if blocks and piece[1] - blocks[-1][0][0] <= BLOCK_CELLS:
            blocks[-1].append(piece)
        else:
            blocks.append([piece])
    return blocks


@dataclass(frozen=True)
class Density:
    """How many values of each gene a source stores in a few of its cells."""

    n_cells: int
    n_values: np.ndarray

    def mean(self, kept: np.ndarray | slice = slice(None)) -> float:
        return float(self.n_values[kept].sum() / max(self.n_cells, 1))


def density(source: Source) -> Density:
    """From a few pieces of a source, spread over it."""
    ranges = source.chunks(READ_VALUES)
    n_values, n_cells = np.zeros(len(source.genes), dtype=np.int64), 0
    for i in np.unique(np.linspace(0, len(ranges) - 1, min(4, len(ranges))).astype(int)) if ranges else ():
        first, last = ranges[i]
        X, _ = source.read(first, first + -(-(last - first) // 2))
        n_values += np.bincount(X.indices, minlength=len(n_values))
        n_cells += X.shape[0]
    return Density(n_cells, n_values)


def row_bytes(inputs: Inputs, densities: Sequence[Density]) -> float:
    """Genes and values of a cell of the source that has most, before any gene is left out."""
    small = inputs.config.count_type == "uint16" and inputs.sources[0].input_kind == "counts"
    width = np.dtype(gene_type(sum(len(source.genes) for source in inputs.sources))).itemsize + (2 if small else 4)
    return width * max(density.mean() for density in densities)


def share_memory(max_memory: int, workers: int, cell_bytes: float, known: int | None) -> tuple[int, int, int]:
    """Processes, bytes that each may fill with cells, and values of a chunk (`known` if they were planned before).

    Parameters
    ----------
    cell_bytes
        Genes and values of a cell, about.

    Raises
    ------
    ValueError
        One process alone needs more than `max_memory`.
    """
    need = max(READ_BYTES + (known or READ_VALUES) * VALUE_BYTES, int(cell_bytes * ROW_GROUP * GROUP_TIMES))
    if max_memory < PROCESS_BYTES + need:
        begun = " (the interrupted build was begun with more)" if known else ""
        raise ValueError(
            f"max_memory ({max_memory / MB:.0f} MB) is too small{begun}; this build needs at least "
            f"{-(-(PROCESS_BYTES + need) // MB)} MB."
        )
    # With several processes the first one holds no cells, but it is there.
    fitting = (max_memory - PROCESS_BYTES) // (PROCESS_BYTES + need)
    n_workers = min(workers, fitting) if fitting > 1 else 1
    shared = max_memory if n_workers == 1 else (max_memory - PROCESS_BYTES) // n_workers
    memory = shared - PROCESS_BYTES
    return n_workers, memory, known or min((memory - READ_BYTES) // VALUE_BYTES, MOST_VALUES)
