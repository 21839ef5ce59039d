"""Cells of an atlas by row number: the gather over the chunks of Arrow tables, memory-mapped or in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from perturbdiff.config import Preprocessing
from perturbdiff.data.expression import CellRows
from perturbdiff.data.vocab import GeneVocab


class AtlasCells:
    """Cells in Arrow tables as `expression.Cells`; nothing is copied before it is asked for.

    Parameters
    ----------
    tables
        One after the other, columns `genes`, `library_size` and `value_column`.
    file_genes
        The genes that the tables' indices mean.
    genes
        Those to give, in their order; the others are left out. Within a cell they keep the order of the tables, so
        that they are sorted unless `genes` are in another order.
    row_name
        What to call a row in a message.

    Raises
    ------
    ValueError
        `genes` has one that the tables lack.
    """

    def __init__(
        self,
        tables: Sequence[pa.Table],
        value_column: str,
        file_genes: GeneVocab,
        genes: GeneVocab,
        preprocessing: Preprocessing,
        row_name: Callable[[int], str],
    ) -> None:
        self.genes = genes
        self.preprocessing = preprocessing
        self._n_file_genes = len(file_genes)
        self._column = None if genes.names == file_genes.names else _columns(file_genes, genes)
        self._row_name = row_name
        self._chunks = [
            (
                *_list_buffers(batch.column("genes")),
                *_list_buffers(batch.column(value_column)),
                batch.column("library_size").to_numpy(),
            )
            for table in tables
            for batch in table.to_batches()
            if batch.num_rows
        ]
        sizes = [len(chunk[-1]) for chunk in self._chunks]
        self._chunk_first = np.cumsum([0, *sizes], dtype=np.int64)
        self._gene_type = tables[0].schema.field("genes").type.value_type.to_pandas_dtype()
        self._value_type = tables[0].schema.field(value_column).type.value_type.to_pandas_dtype()

    def __len__(self) -> int:
        return int(self._chunk_first[-1])

    def take(self, rows: np.ndarray) -> CellRows:
        """The cells of these rows, in this order; a row may come twice. Runs of consecutive rows are fastest.

        Raises
        ------
        IndexError
            A row that is not here.
        ValueError
            A gene index outside of the vocabulary, or a cell with more genes than values; names the row.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self)):
            bad = rows[(rows < 0) | (rows >= len(self))][0]
            raise IndexError(f"row {bad} is not one of these {len(self)} cells, 0 to {len(self) - 1}.")
        chunk_of = np.searchsorted(self._chunk_first, rows, side="right") - 1
        starts = np.flatnonzero(np.diff(rows, prepend=-2) - 1 | np.diff(chunk_of, prepend=-1))
        lengths = np.diff(starts, append=len(rows)).tolist()
        run_chunk = chunk_of[starts]
        run_row = (rows[starts] - self._chunk_first[run_chunk]).tolist()
        genes, values, library, n_genes, n_values = [], [], [], [], []
        for c, row, length in zip(run_chunk.tolist(), run_row, lengths, strict=True):
            gene_offsets, all_genes, value_offsets, all_values, all_library = self._chunks[c]
            cut = gene_offsets[row : row + length + 1]
            value_cut = value_offsets[row : row + length + 1]
            n_genes.append(cut[1:] - cut[:-1])
            n_values.append(value_cut[1:] - value_cut[:-1])
            genes.append(all_genes[cut[0] : cut[-1]])
            values.append(all_values[value_cut[0] : value_cut[-1]])
            library.append(all_library[row : row + length])
        per_cell = _joined(n_genes, np.int32)
        if not np.array_equal(per_cell, other := _joined(n_values, np.int32)):
            bad = int((per_cell != other).argmax())
            raise ValueError(
                f"{self._row_name(int(rows[bad]))} has {per_cell[bad]} genes but {other[bad]} values; "
                "build or get the atlas again."
            )
        indptr = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum(per_cell, out=indptr[1:])
        found = CellRows(
            indptr, _joined(genes, self._gene_type), _joined(values, self._value_type), _joined(library, np.float32)
        )
        self._refuse_unknown_genes(found, rows)
        return found if self._column is None else _renumbered(found, self._column, len(self.genes))

    def _refuse_unknown_genes(self, cells: CellRows, rows: np.ndarray) -> None:
        """An index beyond the vocabulary would be written outside of the batch."""
        if not len(cells.genes) or cells.genes.max() < self._n_file_genes:
            return
        position = int((cells.genes >= self._n_file_genes).argmax())
        row = int(rows[np.searchsorted(cells.indptr, position, side="right") - 1])
        raise ValueError(
            f"{self._row_name(row)} has gene index {cells.genes[position]}, but there are {self._n_file_genes} genes; "
            "build or get the atlas again."
        )


def _list_buffers(lists: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """Views of offsets and elements. The offsets of a slice lead into the elements of the whole."""
    if lists.null_count or lists.values.null_count:
        raise ValueError("cells have missing lists or missing elements; build or get the atlas again.")
    return lists.offsets.to_numpy(), lists.values.to_numpy()


def _columns(file_genes: GeneVocab, genes: GeneVocab) -> np.ndarray:
    """(G of the file,) position of each of the file's genes among `genes`; len(genes) for one that is not wanted."""
    position = {name: i for i, name in enumerate(genes.names)}
    if missing := sorted(position.keys() - set(file_genes.names)):
        raise ValueError(
            f"the atlas lacks {len(missing)} of the {len(genes)} wanted genes, for example {', '.join(missing[:5])}; "
            "ask for genes that it has."
        )
    dtype = np.uint16 if len(genes) < 1 << 16 else np.uint32
    return np.array([position.get(name, len(genes)) for name in file_genes.names], dtype=dtype)


def _renumbered(cells: CellRows, column: np.ndarray, n_genes: int) -> CellRows:
    """Gene indices through `column`; those that lead to `n_genes` are left out."""
    genes = column.take(cells.genes, mode="clip")  # indices were checked; clipping spares numpy a second look
    kept = np.flatnonzero(genes < n_genes)
    if len(kept) == len(genes):
        return replace(cells, genes=genes)
    return CellRows(np.searchsorted(kept, cells.indptr), genes.take(kept), cells.values.take(kept), cells.library_size)


def _joined(parts: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=dtype)
