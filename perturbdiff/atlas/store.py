"""An atlas: Parquet shards of cells in condition order, with a manifest, on disk or on the Hub (README, "Atlases").

The content of a shard is believed once its sha256 is right; what could do harm is looked at again where it is used.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock

from perturbdiff.atlas.arrow import AtlasCells
from perturbdiff.atlas.format import (
    AGAIN,
    CHECKSUMS,
    CONDITIONS,
    DICTIONARY,
    GENES,
    MANIFEST,
    MAX_BYTES,
    MAX_SHARD_FILE,
    ROW_GROUP,
    SHARD_BYTES,
    SMALL_FILES,
    SORTED_BY,
    AtlasInfo,
    check_file,
    check_size,
    columns_of,
    read_checksums,
    read_conditions,
    read_footer,
    read_genes,
    read_info,
)
from perturbdiff.config import Preprocessing
from perturbdiff.data.vocab import GeneVocab
from perturbdiff.files import few, hanging, inside, json_sha256, printable, progress, short
from perturbdiff.hub_client import REPO_ID, check_connection, hub_errors, no_folder, refuse_address


@dataclass
class Atlas:
    """Cells in condition order, in a folder or on the Hub; opening one reads the manifest and no cells.

    name
        As it was given: the folder or the repo id.
    folder
        Where the shards lie; None for a repo that was not downloaded.
    conditions
        One row a condition in the order of the cells, as CONDITIONS_SCHEMA but the label columns and `shard` as one
        chunk of dictionary<int32, string>, whose words are sorted.
    shard_first
        (n_shards + 1,) int64 row of each shard's first cell.
    digests
        sha256 and size of each file.
    measured
        (n_sources, G) bool, the genes that each source measured; all where a format before 3 does not tell.
    commit
        Of the repo; None for a folder.
    """

    name: str
    folder: Path | None
    info: AtlasInfo
    genes: GeneVocab
    conditions: pa.Table
    shard_first: np.ndarray
    digests: dict[str, tuple[str, int]]
    measured: np.ndarray
    commit: str | None = None

    @classmethod
    def open(cls, path_or_repo: str | Path, revision: str | None = None) -> Atlas:
        """Open a folder, or a data set on the Hub at one commit (of `revision`, a branch, tag or commit).

        Raises
        ------
        FileNotFoundError, ValueError
            Neither a folder nor a repo; a file is missing; a format version from the future; a manifest that is
            damaged, contradicts itself or what is there, or leads outside of the folder.
        """
        name = str(path_or_repo)
        if Path(path_or_repo).is_dir():
            if revision is not None:
                raise ValueError(f"{name} is a folder and has no revision {revision!r}; leave the revision out.")
            atlas = cls._read(name, Path(path_or_repo))
            atlas._check_shards(Path(path_or_repo))
            return atlas
        if Path(path_or_repo).is_file():
            raise ValueError(f"{name} is a file, and an atlas a folder; `perturbdiff atlas build` makes one of it.")
        folder = _from_hub(name, revision)
        return replace(cls._read(name, folder), folder=None, commit=folder.name)

    @classmethod
    def _read(cls, name: str, folder: Path) -> Atlas:
        info, digests = read_info(folder), read_checksums(folder)
        for small in (MANIFEST, GENES, CONDITIONS):  # not the card, which people edit on the Hub
            check_file(folder, small, digests)
        named = {*SMALL_FILES, *(shard.file for shard in info.shards)}
        if odd := sorted(digests.keys() ^ named):
            raise ValueError(f"{folder / CHECKSUMS} and {MANIFEST} do not name the same files: {few(odd)}. {AGAIN}")
        for shard in info.shards:
            size = digests[shard.file][1]
            if not 0 < shard.n_cells <= size <= MAX_SHARD_FILE:  # a cell takes some hundred bytes
                raise ValueError(
                    f"{folder / MANIFEST}: {shard.file} of {size:,} bytes cannot hold {shard.n_cells:,} cells. {AGAIN}"
                )
        shard_first = np.cumsum([0, *(shard.n_cells for shard in info.shards)], dtype=np.int64)
        if info.n_cells != shard_first[-1]:
            raise ValueError(
                f"{folder / MANIFEST}: n_cells is {info.n_cells:,}, but the shards hold {shard_first[-1]:,}. {AGAIN}"
            )
        (genes, measured), conditions = read_genes(folder, info), read_conditions(folder, info)
        return cls(name, folder, info, genes, conditions, shard_first, digests, measured)

    def __len__(self) -> int:
        return self.info.n_cells

    @cached_property
    def sha256(self) -> str:
        """Hash of all files' hashes: two atlases that share it are the same."""
        return json_sha256(self.digests)

    @cached_property
    def _source_sets(self) -> tuple[np.ndarray, list[np.ndarray]]:
        # Which sources each condition has cells of: (n_conditions,) the place of their numbers in a list.
        lists = self.conditions.column("sources").combine_chunks()
        lengths = lists.value_lengths().to_numpy()
        sources = np.full((len(lists), max(int(lengths.max(initial=0)), 1)), -1)
        sources[np.arange(sources.shape[1]) < lengths[:, None]] = lists.flatten().to_numpy()
        if sources.shape[1] == 1:  # numbers are sorted much faster than rows
            found, of = np.unique(sources[:, 0], return_inverse=True)
        else:
            found, of = np.unique(sources, axis=0, return_inverse=True)
        return of.reshape(-1), [numbers[numbers >= 0] for numbers in found.reshape(-1, sources.shape[1])]

    def panels(self) -> tuple[np.ndarray, np.ndarray]:
        """Genes measured in all cells of each condition: rows (n_conditions,) of a table, and the table (n, G) bool."""
        of, sets = self._source_sets
        return of, np.stack([self.measured[numbers].all(axis=0) for numbers in sets])

    def sources(self) -> np.ndarray:
        """(n_conditions,) names of the sources of each, joined; "" where a format before 3 does not tell."""
        of, sets = self._source_sets
        return np.array([self._source_names(numbers) for numbers in sets], dtype=object)[of]

    def _source_names(self, numbers: Iterable[int]) -> str:
        return ", ".join(self.info.sources[i].name for i in numbers)

    def shared(self) -> np.ndarray:
        """(n, 3) int64: two conditions, and how many cells of the first are in the second too, under its labels."""
        others, numbers = (self.conditions.column(name).combine_chunks() for name in ("shared_with", "n_shared"))
        condition = np.repeat(np.arange(len(others)), others.value_lengths().to_numpy())
        return np.column_stack([condition, others.flatten().to_numpy(), numbers.flatten().to_numpy()])

    def row_name(self, row: int) -> str:
        """A cell, for messages."""
        i = int(np.searchsorted(self.shard_first, row, side="right")) - 1
        return f"row {row - self.shard_first[i]} of {self.info.shards[i].file} of {self.name}"

    def shard_url(self, i: int) -> str:
        """Where the Hub has a shard of this commit."""
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.name, self.info.shards[i].file, repo_type="dataset", revision=self.commit)

    def download(self) -> None:
        """Get the shards of a repo into the cache of the Hub and set `folder`; nothing to do for a folder.

        Raises
        ------
        FileNotFoundError, ValueError
            As `open`.
        """
        if self.folder is not None:
            return
        from huggingface_hub import snapshot_download

        files = [shard.file for shard in self.info.shards]
        with hub_errors(f"atlas {self.name!r}"):
            got = snapshot_download(self.name, repo_type="dataset", revision=self.commit, allow_patterns=files)
        self._check_shards(Path(got))
        self.folder = Path(got)

    def shard_size(self, i: int) -> int:
        """Bytes of a shard's file."""
        return self.digests[self.info.shards[i].file][1]

    def check_shard_bytes(self, i: int, digest: str) -> None:
        """Compare the sha256 of a shard that was read elsewhere; ValueError names the shard."""
        file = self.info.shards[i].file
        if digest != self.digests[file][0]:
            raise ValueError(
                f"{file} of {self.name} has sha256 {digest}, not {self.digests[file][0]} as {CHECKSUMS} states. {AGAIN}"
            )

    def check_shard(self, i: int) -> Path:
        """Path of a local shard whose sha256 is right.

        Raises
        ------
        FileNotFoundError, ValueError
            No such file; not the size or sha256 that the checksums state.
        """
        return check_file(self._local(), self.info.shards[i].file, self.digests)

    def arrow_cells(
        self, genes: GeneVocab | None, preprocessing: Preprocessing, cache_dir: str | Path | None = None
    ) -> AtlasCells:
        """All cells, memory-mapped from the Arrow cache of `datasets`, which is made first where it is not there.

        Parameters
        ----------
        genes
            Those to give, in their order; all if None.
        cache_dir
            As `cache`.

        Raises
        ------
        FileNotFoundError, ValueError, OSError
            As `cache`; `genes` or `preprocessing` do not fit.
        """
        self._check_kind(preprocessing)
        builders = self.cache(cache_dir)
        with _quiet_datasets():
            tables = [builder.as_dataset("train").data.table for builder in builders]
        wanted = self.genes if genes is None else genes
        return AtlasCells(tables, self.info.value_column, self.genes, wanted, preprocessing, self.row_name)

    def cache(self, cache_dir: str | Path | None = None) -> list[Any]:
        """Make the Arrow cache of `datasets` where it is not there; the builder of each shard's.

        Each shard has a cache of its own under its sha256, which is checked when the cache is made and not again: a
        cache that was interrupted goes on where it was. Of several processes one hashes and makes a shard's cache, and
        the others wait for it.

        Parameters
        ----------
        cache_dir
            The cache of `datasets` ($HF_DATASETS_CACHE) if None.

        Raises
        ------
        FileNotFoundError, ValueError
            As `check_shard`; a shard that cannot be read.
        OSError
            No room for the cache.
        """
        import datasets

        columns = ["library_size", "genes", self.info.value_column]
        with _quiet_datasets():
            builders = [
                datasets.load_dataset_builder(
                    "parquet",
                    data_files=[glob.escape(str(inside(self._local(), shard.file)))],
                    columns=columns,
                    batch_size=ROW_GROUP,
                    writer_batch_size=ROW_GROUP,
                    config_id=f"cells-{self.digests[shard.file][0]}",
                    cache_dir=None if cache_dir is None else str(cache_dir),
                )
                for shard in self.info.shards
            ]
            missing = [i for i, builder in enumerate(builders) if not Path(builder.cache_dir).is_dir()]
            if missing:
                n_cells = sum(self.info.shards[i].n_cells for i in missing)
                first = os.environ.get("LOCAL_RANK", "0") == "0"
                with progress(n_cells, f"Arrow cache of {self.name}", "cell", shown=first) as bar:
                    for i in missing:
                        there = Path(builders[i].cache_dir)
                        there.parent.mkdir(parents=True, exist_ok=True)
                        with FileLock(f"{there}.making"):
                            if not there.is_dir():
                                self.check_shard(i)
                                self._make_cache(i, builders[i])
                        bar.update(self.info.shards[i].n_cells)
            for builder in builders:
                builder.download_and_prepare()  # only takes note of what is there
        return builders

    def shard_cells(self, table: pa.Table, i: int, preprocessing: Preprocessing) -> AtlasCells:
        """Cells of shard `i` that were read into memory; rows count from 0 in the table."""

        def row_name(row: int) -> str:
            return f"row {row} of what was read of {self.info.shards[i].file} of {self.name}"

        return AtlasCells([table], self.info.value_column, self.genes, self.genes, preprocessing, row_name)

    def _make_cache(self, i: int, builder: Any) -> None:
        from datasets.exceptions import DatasetGenerationError

        try:
            builder.download_and_prepare()
        except (DatasetGenerationError, pa.ArrowException, OSError) as error:
            cause = error.__cause__ or error
            if getattr(cause, "errno", None) is not None:  # of the file system, not of the file
                raise OSError(
                    f"no Arrow cache of {self.name} in {builder.cache_dir} ({short(cause)}); point HF_DATASETS_CACHE "
                    "to a disk with room, or read the atlas streamed."
                ) from error
            raise ValueError(
                f"{self.info.shards[i].file} of {self.name} is damaged ({short(cause)}). {AGAIN}"
            ) from error

    def verify(self) -> list[str]:
        """Read every shard and compare it with the manifest, with a progress bar.

        Returns
        -------
        Files of the folder that are not of the atlas; they do no harm.

        Raises
        ------
        FileNotFoundError, ValueError
            The first problem: the shard, the row and what is wrong. Size, sha256, columns, labels, gene indices that
            are unknown or not increasing, values that are not positive, library sizes that are not finite.
        """
        with progress(len(self), f"verify {self.name}", "cell") as bar:
            for i, shard in enumerate(self.info.shards):
                path = self.check_shard(i)
                try:
                    file = pq.ParquetFile(path, read_dictionary=list(DICTIONARY))
                    row = int(self.shard_first[i])
                    for batch in file.iter_batches(ROW_GROUP):
                        batch.validate(full=True)  # as of tables, in format.py
                        self._verify_cells(batch, row)
                        row += len(batch)
                        bar.update(len(batch))
                except (pa.ArrowException, OSError) as error:
                    raise ValueError(f"{shard.file} of {self.name} is damaged ({short(error)}). {AGAIN}") from error
                if row != self.shard_first[i + 1]:
                    raise ValueError(f"{shard.file} of {self.name} has not the {shard.n_cells} rows it states. {AGAIN}")

        folder = self._local()
        found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
        return sorted(found - self.digests.keys() - {CHECKSUMS})

    def _verify_cells(self, batch: pa.RecordBatch, first: int) -> None:
        def refuse(wrong: np.ndarray, what: str, rows: np.ndarray | None = None) -> None:
            if wrong.any():
                position = int(wrong.argmax())
                row = position if rows is None else int(np.searchsorted(rows, position, side="right")) - 1
                raise ValueError(f"{self.row_name(first + row)} has {what}. {AGAIN}")

        ends = self._condition_ends
        condition = np.searchsorted(ends, np.arange(first, first + len(batch)), side="right")
        for name in SORTED_BY:
            column, own = batch.column(name), self.conditions.column(name).chunk(0)
            known = pc.index_in(column.dictionary, own.dictionary).fill_null(-1).to_numpy()
            expected = own.indices.to_numpy()[condition]
            refuse(known[column.indices.to_numpy()] != expected, f"another {name} than {CONDITIONS} states")
        source = batch.column("source")
        known = pc.index_in(source.dictionary, pa.array([s.name for s in self.info.sources])).fill_null(-1).to_numpy()
        number = known[source.indices.to_numpy()]
        refuse(number < 0, f"a source that is not in {MANIFEST}")
        if self.info.format_version >= 3:
            pair = condition * len(self.info.sources) + number
            refuse(~np.isin(pair, self._condition_sources), f"another source than {CONDITIONS} states")
        library = batch.column("library_size").to_numpy()
        refuse(~(np.isfinite(library) & (library >= 0)), "a library size that is negative or not finite")
        genes, values = batch.column("genes"), batch.column(self.info.value_column)
        offsets, value_offsets = (lists.offsets.to_numpy() - lists.offsets[0].as_py() for lists in (genes, values))
        refuse(offsets[1:] != value_offsets[1:], "not as many genes as values")
        indices, numbers = genes.flatten().to_numpy(), values.flatten().to_numpy()
        refuse(indices >= len(self.genes), f"a gene index of {len(self.genes)} or more, the number of genes", offsets)
        falls = np.zeros(len(indices), dtype=bool)
        falls[1:] = indices[1:] <= indices[:-1]
        falls[offsets[:-1][offsets[:-1] < len(falls)]] = False  # the first of a cell follows nothing
        refuse(falls, "gene indices that do not increase", offsets)
        refuse(~(np.isfinite(numbers) & (numbers > 0)), "a value that is not positive and finite", offsets)

    @cached_property
    def _condition_sources(self) -> np.ndarray:
        # condition * n_sources + source, of all that conditions.parquet states
        lists = self.conditions.column("sources").chunk(0)
        condition = np.repeat(np.arange(len(lists)), lists.value_lengths().to_numpy())
        return condition * len(self.info.sources) + lists.flatten().to_numpy()

    @cached_property
    def _condition_ends(self) -> np.ndarray:
        return np.cumsum(self.conditions.column("n_cells").to_numpy())

    def summary(self) -> str:
        """What is in it, for a person, several lines."""
        info = self.info
        n_cells = self.conditions.column("n_cells").to_numpy()
        control = self.conditions.column("is_control").to_numpy()
        kind = "raw counts" if info.input_kind == "counts" else "log1p values"
        size = sum(self.digests[shard.file][1] for shard in info.shards)
        lines = [
            f"atlas       {self.name}" + (f" at commit {self.commit}" if self.commit else ""),
            f"cells       {len(self):,}: {n_cells[~control].sum():,} perturbed, {n_cells[control].sum():,} "
            f"{info.control_label!r}",
            f"genes       {len(self.genes):,} ({info.genes_rule})",
            f"values      {kind}, {info.value_type}; {info.normalisation}",
            f"shards      {len(info.shards)}, {size / 1e9:.2f} GB, "
            + ("on the Hub only" if self.folder is None else f"in {self.folder}"),
            f"license     {info.license or 'not stated'}",
        ]
        for source in info.sources:
            lines.append(
                f"source      {source.name} ({source.file}): {source.n_cells:,} cells, {source.n_genes_kept:,} of "
                f"{source.n_genes:,} genes, license {source.license or 'not stated'}"
            )
        plurals = ("perturbation", "perturbations"), ("cell_type", "cell types"), ("batch", "batches")
        for name, plural in plurals:
            column = self.conditions.column(name).chunk(0)
            wanted = ~control if name == "perturbation" else np.ones_like(control)
            per_label = np.bincount(column.indices.to_numpy()[wanted], n_cells[wanted], len(column.dictionary))
            top = [i for i in np.argsort(-per_label, kind="stable") if per_label[i]]
            shown = ", ".join(f"{column.dictionary[int(i)]} ({per_label[i]:,.0f})" for i in top[:6])
            lines.append(f"{plural:<11} {len(top)}: {shown}{', ...' if len(top) > 6 else ''}")
        if len(sizes := n_cells[~control]):
            lines.append(
                f"conditions  {len(sizes)} (perturbation, cell type, batch) with {sizes.min():,} to {sizes.max():,} "
                f"cells, median {np.median(sizes):,.0f}"
            )
        if mixed := self._mixed_contexts():
            lines.append(
                "note        cells of several sources share a cell type and a batch, and their controls stand for each "
                f"other: {few(mixed)}"
            )
        if info.repeats_within or info.repeats_across:
            lines.append(self._repeats())
        return "\n".join([lines[0], *(hanging(line, 12) for line in lines[1:])])  # not the path

    def _mixed_contexts(self) -> list[str]:
        of, sets = self._source_sets
        cell_type, batch = (self.conditions.column(name).chunk(0) for name in ("cell_type", "batch"))
        context = cell_type.indices.to_numpy().astype(np.int64) * len(batch.dictionary) + batch.indices.to_numpy()
        contexts: dict[int, set[int]] = {}
        for pair in np.unique(context * len(sets) + of).tolist():
            contexts.setdefault(pair // len(sets), set()).update(sets[pair % len(sets)].tolist())
        return [
            f"{cell_type.dictionary[i // len(batch.dictionary)]}:{batch.dictionary[i % len(batch.dictionary)]} "
            f"({self._source_names(sorted(numbers))})"
            for i, numbers in contexts.items()
            if len(numbers) > 1
        ]

    def _repeats(self) -> str:
        shared = self.shared()
        shared = shared[shared[:, 0] < shared[:, 1]]
        names = [self.conditions.column(name) for name in ("perturbation", "cell_type", "batch")]

        def named(condition: int) -> str:
            return ":".join(str(column[condition].as_py()) for column in names)

        top = shared[np.argsort(-shared[:, 2], kind="stable")[:3]].tolist()
        examples = "; ".join(f"{named(a)} and {named(b)} share {n:,}" for a, b, n in top)
        return (
            f"repeats     {self.info.repeats_within:,} cells equal another one of their condition, "
            f"{self.info.repeats_across:,} are in several conditions"
            + (f": {examples}{'; ...' if len(shared) > 3 else ''}" if top else "")
            + ". Was a source given twice, or cells of one in another?"
        )

    def _check_shards(self, folder: Path) -> None:
        """Sizes and Parquet footers: cheap, and enough to know what reading will take."""
        widths = {"genes": self.info.gene_type, self.info.value_column: self.info.value_type}
        for shard in self.info.shards:
            path = check_size(folder, shard.file, self.digests)
            columns = columns_of(read_footer(path, self.info.schema, shard.n_cells))
            for name, kind in widths.items():
                n_values = sum(c.num_values for c in columns if c.path_in_schema == f"{name}.list.element")
                n_values -= shard.n_cells  # a cell without values counts as one
                if n_values * np.dtype(kind).itemsize > SHARD_BYTES:
                    raise ValueError(f"{path} holds {n_values:,} values, more than fit in a shard. {AGAIN}")

    def _check_kind(self, preprocessing: Preprocessing) -> None:
        if preprocessing.input_kind != self.info.input_kind:
            raise ValueError(
                f"{self.name} holds {self.info.input_kind}, but {preprocessing.input_kind} are wanted; build an atlas "
                "of those."
            )

    def _local(self) -> Path:
        if self.folder is None:
            raise ValueError(f"the shards of {self.name} are on the Hub only; call download(), or read it streamed.")
        return self.folder


def _from_hub(repo: str, revision: str | None) -> Path:
    """The folder of the commit in the cache of the Hub that has the manifest; from that cache alone when offline."""
    from huggingface_hub import hf_hub_download

    refuse_address(repo)
    if not REPO_ID.fullmatch(repo):
        raise FileNotFoundError(
            f"no such folder here ({printable(repo)}); give that of an atlas, or owner/name of a data set on the Hub."
        )
    what = f"atlas {repo!r}" + ("" if revision is None else f" at revision {revision!r}")
    offline: OSError | None = None
    try:
        check_connection(what)
    except ConnectionError as error:
        offline = error
    try:
        with hub_errors(what):
            first = Path(
                hf_hub_download(
                    repo, CHECKSUMS, repo_type="dataset", revision=revision, local_files_only=offline is not None
                )
            )
            digests = read_checksums(first.parent)
            for name in (MANIFEST, GENES, CONDITIONS):
                if name in digests and digests[name][1] > MAX_BYTES[name]:
                    raise ValueError(
                        f"{name} of {repo} has {digests[name][1]:,} bytes; at most {MAX_BYTES[name]:,} are read."
                    )
                commit = first.parent.name
                hf_hub_download(repo, name, repo_type="dataset", revision=commit, local_files_only=offline is not None)
    except (FileNotFoundError, ConnectionError) as error:
        problem = error
        if offline is not None:
            problem = FileNotFoundError(
                f"{offline} It is not whole in the cache either: connect, or copy a folder here and give its path."
            )
        raise (no_folder(repo, problem) if revision is None else problem) from None
    return first.parent


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    import datasets

    if datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
