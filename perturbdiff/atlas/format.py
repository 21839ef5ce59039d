"""The files of an atlas beside its cells: how they are named and written, and read strictly (README, "Atlas").

Everything read here is untrusted: JSON and Parquet only; versions, sizes, hashes and paths are checked before memory
is taken.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from perturbdiff.config import Preprocessing
from perturbdiff.data.space import InputKind
from perturbdiff.data.vocab import GeneVocab
from perturbdiff.files import few, inside, sha256, short, write_json
from perturbdiff.files import read_json as read_object

FORMAT_VERSION = 3
PREPROCESSING = Preprocessing("counts", 1e4, 10.0)  # for choosing genes, and the space of logarithms
MANIFEST = "atlas.json"
GENES = "genes.parquet"
CONDITIONS = "conditions.parquet"
CHECKSUMS = "checksums.json"
CARD = "README.md"
SMALL_FILES = (MANIFEST, GENES, CONDITIONS, CARD)  # every file but the shards and the checksums themselves
CONTROL_LABEL = "control"
SORTED_BY = ("cell_type", "batch", "perturbation")  # the order of cells, not that in which a condition is named
ROW_GROUP = 8192  # rows of a Parquet row group, and of a record batch of the Arrow cache
SHARD_BYTES = 512 << 20  # genes and values of a shard, in memory
MAX_BYTES = {MANIFEST: 64 << 20, CHECKSUMS: 64 << 20, GENES: 256 << 20, CONDITIONS: 2 << 30}  # more is not read
MAX_SHARD_FILE = 4 << 30
MAX_GENES = 1 << 20
MAX_CONDITIONS = 1 << 26
MAX_LINKS = 400  # of a cell to conditions
MAX_MEASURED = 1 << 30  # genes times sources
MAX_NAME = 4096  # bytes of a name or label
AGAIN = "Get or build the atlas again."

T = TypeVar("T")


def _lists(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, pa.list_(pa.field("element", kind, nullable=False)), nullable=False)


GENES_SCHEMA = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("ensembl", pa.string(), nullable=False),
        _lists("measured", pa.bool_()),  # by each source, in the order of atlas.json
    ]
)
CONDITIONS_SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.string(), nullable=False) for name in SORTED_BY),
        pa.field("is_control", pa.bool_(), nullable=False),
        pa.field("n_cells", pa.int64(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("first_row", pa.int64(), nullable=False),  # within the shard
        _lists("sources", pa.int32()),  # numbers of those that it has cells of, rising
        _lists("shared_with", pa.int32()),  # other conditions that hold some of its cells too, rising
        _lists("n_shared", pa.int64()),  # how many
    ]
)
DICTIONARY = ("perturbation", "cell_type", "batch", "source")


def gene_type(n_genes: int) -> str:
    """Of the gene indices of an atlas."""
    return "uint16" if n_genes < 2**16 else "uint32"


def shard_name(i: int) -> str:
    """Path of shard `i` within the folder."""
    return f"data/cells-{i:05d}.parquet"


def shard_schema(gene_type: str, value_column: str, value_type: str) -> pa.Schema:
    """Columns of a shard.

    Parameters
    ----------
    gene_type
        "uint16" or "uint32", of the gene indices.
    value_column, value_type
        "counts" with "uint16" or "uint32"; "log1p" with "float32".
    """
    texts = [pa.field(name, pa.string(), nullable=False) for name in (*DICTIONARY, "cell")]
    library = pa.field("library_size", pa.float32(), nullable=False)
    values = _lists("genes", getattr(pa, gene_type)()), _lists(value_column, getattr(pa, value_type)())
    return pa.schema([*texts, library, *values])


def parquet_options(value_column: str) -> dict[str, Any]:
    """How shards are written, for pq.ParquetWriter; rows go in groups of ROW_GROUP.

    Of the encodings of Parquet these take the least room at no cost in time: sorted gene indices as differences, small
    counts by their bytes.
    """
    return {
        "compression": "zstd",
        "compression_level": 1,
        "use_dictionary": list(DICTIONARY),
        "column_encoding": {
            "genes.list.element": "DELTA_BINARY_PACKED",
            f"{value_column}.list.element": "BYTE_STREAM_SPLIT",
        },
        "write_statistics": [*DICTIONARY, "cell", "library_size"],
    }


@dataclass(frozen=True)
class Shard:
    """A file of cells: its path within the folder, and how many it holds."""

    file: str
    n_cells: int


@dataclass(frozen=True)
class AtlasSource:
    """What an atlas was built from."""

    name: str
    file: str  # base name or repo id
    license: str | None
    n_cells: int
    n_genes: int
    n_genes_kept: int
    library_size: str  # "row sums", or the column


@dataclass(frozen=True)
class AtlasInfo:
    """atlas.json."""

    library_version: str
    input_kind: InputKind
    normalisation: str  # what a reader must do, for people
    n_cells: int
    n_genes: int
    n_conditions: int
    n_perturbations: int  # without control
    n_cell_types: int
    n_batches: int
    gene_type: str  # "uint16" or "uint32"
    value_type: str  # "uint16", "uint32" or "float32"
    control_label: str
    dose_separator: str | None  # "A@0.5" is A at dose 0.5; None: labels have no doses
    license: str | None
    seed: int
    genes_rule: str
    target_sum: float | None  # counts a cell that log1p values are of; None: nobody knows, or counts
    sources: tuple[AtlasSource, ...]
    shards: tuple[Shard, ...]
    repeats_within: int = 0  # cells that another cell of their condition equals
    repeats_across: int = 0  # cells that come in several conditions
    dose_unit: str | None = None  # of all doses; None where no source says one
    format_version: int = field(default=FORMAT_VERSION, compare=False)  # of the files that were read

    @property
    def value_column(self) -> str:
        return "log1p" if self.input_kind == "log1p" else "counts"

    @property
    def schema(self) -> pa.Schema:
        """Of every shard."""
        return shard_schema(self.gene_type, self.value_column, self.value_type)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "format_version": FORMAT_VERSION}


def write_manifest(
    folder: Path,
    info: AtlasInfo,
    genes: GeneVocab,
    conditions: pa.Table,
    digests: Mapping[str, tuple[str, int]],
    card: str,
    measured: np.ndarray | None = None,
) -> None:
    """Write every file of an atlas but its shards; the checksums, without which nothing opens, last.

    Parameters
    ----------
    conditions
        As CONDITIONS_SCHEMA, sorted by SORTED_BY.
    digests
        sha256 and size of each shard by its path within the folder.
    card
        Markdown of the README.md, as `atlas_card` makes it.
    measured
        (n_sources, G) bool, the genes that each source measured; all if None.
    """
    if measured is None:
        measured = np.ones((len(info.sources), len(genes)), dtype=bool)
    ensembl = genes.ensembl or ("",) * len(genes)
    by_gene = pa.array(list(np.ascontiguousarray(measured.T)), GENES_SCHEMA.field("measured").type)
    columns = [pa.array(genes.names, pa.string()), pa.array(ensembl, pa.string()), by_gene]
    pq.write_table(pa.Table.from_arrays(columns, schema=GENES_SCHEMA), folder / GENES, compression="zstd")
    pq.write_table(conditions.cast(CONDITIONS_SCHEMA), folder / CONDITIONS, compression="zstd")
    write_json(folder / MANIFEST, info.as_json())
    (folder / CARD).write_text(card, encoding="utf-8")
    small = {name: (sha256(folder / name), (folder / name).stat().st_size) for name in SMALL_FILES}
    files = {name: {"sha256": digest, "size": size} for name, (digest, size) in sorted({**small, **digests}.items())}
    write_json(folder / CHECKSUMS, {"format_version": FORMAT_VERSION, "files": files})


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """One of the JSON files, its format version checked and taken out, but of the manifest.

    Raises
    ------
    FileNotFoundError, ValueError
        No such file; too large; not a JSON object; a version that this library does not read.
    """
    path = inside(folder, name)
    if not path.is_file():
        found = sorted(p.name for p in folder.iterdir())[:8]
        raise FileNotFoundError(f"{folder} is not an atlas: it has no {name}; found {found or 'nothing'}.")
    content = read_object(path, MAX_BYTES[name])
    version = content.pop("format_version", None)
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {str(version)[:40]}; this version of perturbdiff reads 1 to {FORMAT_VERSION}. "
            "Update perturbdiff, or get an atlas of that format."
        )
    if name == MANIFEST and version < 3:
        content = _from_version_1(content) if version == 1 else content
        content = {**content, "target_sum": None, "dose_separator": None}
        content |= {"repeats_within": 0, "repeats_across": 0, "dose_unit": None}  # nobody looked
    return {**content, "format_version": version} if name == MANIFEST else content


def read_checksums(folder: Path) -> dict[str, tuple[str, int]]:
    """sha256 and size of every file, by its path within the folder. Raises as `read_json`."""
    path, content = folder / CHECKSUMS, read_json(folder, CHECKSUMS)
    files = content.get("files")
    if set(content) != {"files"} or not isinstance(files, dict):
        raise ValueError(f"{path} must hold format_version and files, not {few(sorted(content))}. {AGAIN}")
    for name, entry in files.items():
        right = isinstance(entry, dict) and set(entry) == {"sha256", "size"}
        if right:
            digest, size = entry["sha256"], entry["size"]
            right = isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) is not None
            right = right and type(size) is int and 0 <= size < 1 << 62
        if not right:
            raise ValueError(f"{path} has {str(entry)[:80]} for {name[:80]!r}; it must be a sha256 and a size. {AGAIN}")
    return {name: (entry["sha256"], entry["size"]) for name, entry in files.items()}


def read_info(folder: Path) -> AtlasInfo:
    """atlas.json, every field there and in its range. Raises as `read_json`."""
    path = folder / MANIFEST
    content = read_json(folder, MANIFEST)
    for name, schema in (("sources", AtlasSource), ("shards", Shard)):
        entries = content.get(name)
        if not isinstance(entries, list):
            raise ValueError(f"{path}: {name} must be a list, not {str(entries)[:80]}. {AGAIN}")
        content[name] = tuple(_fields(schema, entry, f"{path}: {name}") for entry in entries)
    info = _fields(AtlasInfo, content, str(path))
    for i, shard in enumerate(info.shards):
        if shard.file != shard_name(i):  # hence no path leads elsewhere
            raise ValueError(f"{path}: shard {i} is {shard.file[:80]!r}; it must be {shard_name(i)!r}. {AGAIN}")
    for name, most in (("n_genes", MAX_GENES), ("n_conditions", MAX_CONDITIONS), ("n_cells", 1 << 62)):
        if not 0 < getattr(info, name) <= most:
            raise ValueError(f"{path}: {name} is {getattr(info, name):,}; it must be 1 to {most:,}. {AGAIN}")
    allowed = {
        "input_kind": ("counts", "log1p"),
        "gene_type": ("uint16", "uint32") if info.n_genes <= 1 << 16 else ("uint32",),
        "value_type": ("float32",) if info.input_kind == "log1p" else ("uint16", "uint32"),
        "control_label": (CONTROL_LABEL,),
    }
    for name, words in allowed.items():
        if (value := getattr(info, name)) not in words:
            raise ValueError(f"{path}: {name} is {value[:40]!r}; it must be {' or '.join(words)}. {AGAIN}")
    return info


def read_genes(folder: Path, info: AtlasInfo) -> tuple[GeneVocab, np.ndarray]:
    """genes.parquet: the genes, and (n_sources, G) which of them each source measured.

    Raises ValueError where it is damaged, has duplicates or not the stated number.
    """
    path, n_sources = folder / GENES, len(info.sources)
    table = _read_table(path, GENES_SCHEMA, info, info.n_genes, min(info.n_genes * n_sources, MAX_MEASURED))
    names, ensembl = (tuple(table.column(i).cast(pa.string()).to_pylist()) for i in range(2))
    genes = GeneVocab(names, ensembl if any(ensembl) else None)
    if info.format_version < 3:  # nobody knows
        return genes, np.ones((n_sources, len(genes)), dtype=bool)
    lists = table["measured"].chunk(0)
    wrong = lists.value_lengths().to_numpy() != n_sources
    if wrong.any():
        raise ValueError(f"{path}, row {int(wrong.argmax())}: measured must hold {n_sources}, one a source. {AGAIN}")
    return genes, lists.flatten().to_numpy(zero_copy_only=False).reshape(-1, n_sources).T


def read_conditions(folder: Path, info: AtlasInfo) -> pa.Table:
    """conditions.parquet, as `Atlas.conditions`.

    Raises
    ------
    ValueError
        It is damaged, not sorted, or does not say the same of the shards as atlas.json; names the row.
    """
    path = folder / CONDITIONS
    table = _read_table(path, CONDITIONS_SCHEMA, info, info.n_conditions, MAX_LINKS * info.n_cells)
    shard, n_cells, first_row = table["shard"].chunk(0), table["n_cells"].to_numpy(), table["first_row"].to_numpy()
    position = {s.file: i for i, s in enumerate(info.shards)}
    if foreign := [name for name in shard.dictionary.to_pylist() if name not in position]:
        raise ValueError(f"{path} has cells in {foreign[0][:80]!r}, which is no shard of {MANIFEST}. {AGAIN}")

    def refuse(wrong: np.ndarray, rule: str) -> None:
        if wrong.any():
            row = int(wrong.argmax())
            values = {name: table[name][row].as_py() for name in table.column_names}
            raise ValueError(f"{path}, row {row}: {str(values)[:400]}: {rule}. {AGAIN}")

    codes = [table[name].chunk(0).indices.to_numpy() for name in SORTED_BY]
    after = np.zeros(max(len(table) - 1, 0), dtype=bool)
    for column in reversed(codes):
        step = np.sign(np.diff(column))
        after = (step > 0) | ((step == 0) & after)
    refuse(np.concatenate([[False], ~after]), "conditions must be sorted and each there once")
    n_labels = dict(zip(SORTED_BY, (len(table[name].chunk(0).dictionary) for name in SORTED_BY), strict=True))
    control = pc.equal(table["perturbation"].cast(pa.string()), info.control_label).to_numpy()
    refuse(table["is_control"].to_numpy() != control, f"is_control is for {info.control_label!r} alone")
    n_labels["perturbation"] -= bool(control.any())
    stated = (("cell_type", "n_cell_types"), ("batch", "n_batches"), ("perturbation", "n_perturbations"))
    for name, key in stated:
        if n_labels[name] != getattr(info, key):
            raise ValueError(f"{path} has {n_labels[name]} of {key}, {MANIFEST} {getattr(info, key)}. {AGAIN}")

    shard_sizes = np.array([s.n_cells for s in info.shards], dtype=np.int64)
    shard_first = np.cumsum(shard_sizes) - shard_sizes
    of = np.array([position[name] for name in shard.dictionary.to_pylist()], dtype=np.int64)[shard.indices.to_numpy()]
    refuse((n_cells < 1) | (n_cells > info.n_cells), f"n_cells must be 1 to {info.n_cells}")
    refuse((first_row < 0) | (first_row >= shard_sizes[of]), "first_row must be a row of the shard")
    # No sum of int64 wraps round unseen: it would turn negative first, and no first row is.
    ends = np.cumsum(n_cells)
    refuse(shard_first[of] + first_row != ends - n_cells, "it must start where the last one ends")
    refuse((np.arange(len(table)) == len(table) - 1) & (ends != info.n_cells), "the last must end with the shards")
    if info.format_version < 3:  # nobody wrote them down
        for column in CONDITIONS_SCHEMA:
            if column.name not in table.column_names:
                table = table.append_column(column, pa.array([[]] * len(table), column.type))
        return table
    for name, most in (("sources", len(info.sources)), ("shared_with", len(table))):
        refuse(_not_rising(table[name].chunk(0), most), f"{name} must be numbers of 0 to {most - 1}, rising")
    lengths = {name: table[name].chunk(0).value_lengths().to_numpy() for name in ("sources", "shared_with", "n_shared")}
    refuse(lengths["sources"] == 0, "it must have a source")
    refuse(lengths["shared_with"] != lengths["n_shared"], "n_shared must hold one number for each of shared_with")
    return table


def _not_rising(lists: pa.ListArray, most: int) -> np.ndarray:
    """(n,) True for lists that are not of rising numbers from 0 to under `most`."""
    numbers, row = lists.flatten().to_numpy(), np.repeat(np.arange(len(lists)), lists.value_lengths().to_numpy())
    wrong = (numbers < 0) | (numbers >= most)
    wrong[1:] |= (np.diff(numbers) <= 0) & (np.diff(row) == 0)
    return np.bincount(row[wrong], minlength=len(lists)) > 0


def check_file(folder: Path, name: str, digests: Mapping[str, tuple[str, int]]) -> Path:
    """Path of a file that has the size and sha256 of the checksums.

    Raises
    ------
    FileNotFoundError, ValueError
        No such file; another size or sha256; it lies outside of the folder, or is too large.
    """
    path = check_size(folder, name, digests)
    if (found := sha256(path)) != digests[name][0]:
        raise ValueError(f"{path} has sha256 {found}, not {digests[name][0]} as {CHECKSUMS} states. {AGAIN}")
    return path


def check_size(folder: Path, name: str, digests: Mapping[str, tuple[str, int]]) -> Path:
    """As `check_file`, without reading it."""
    if name not in digests:
        raise ValueError(f"{folder / CHECKSUMS} does not name {name}. {AGAIN}")
    path, most = inside(folder, name), MAX_BYTES.get(name, MAX_SHARD_FILE)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; the atlas is not complete. {AGAIN}")
    size, stated = path.stat().st_size, digests[name][1]
    if size != stated:
        raise ValueError(f"{path} has {size:,} bytes, not {stated:,} as {CHECKSUMS} states. {AGAIN}")
    if size > most:
        raise ValueError(f"{path} has {size:,} bytes; at most {most:,} are read. {AGAIN}")
    return path


class _FooterRead(Exception):
    """All that was wanted of a file."""


class _Footer:
    """A Parquet file, nothing of which is read once its footer is."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.is_read = file, False

    def read(self, n_bytes: int = -1) -> bytes:
        if self.is_read:
            raise _FooterRead
        return self._file.read(n_bytes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def footer_of(file: BinaryIO) -> pq.FileMetaData:
    """Of a Parquet file, safe to be asked for its columns.

    Where what is said of a column contradicts itself (sizes of histograms, keys), `row_group(i).column(j)` ends the
    process: no Python error is made of that of C++. Reading looks at the same before it turns to the cells, and raises.

    Raises pyarrow's errors and OSError.
    """
    footer = _Footer(file)
    parquet = pq.ParquetFile(footer)
    footer.is_read = True
    with suppress(_FooterRead):
        parquet.read_row_groups(range(parquet.num_row_groups), use_threads=False)
    return parquet.metadata


def columns_of(footer: pq.FileMetaData) -> list[pq.ColumnChunkMetaData]:
    """What a footer as of `footer_of` says of each column of each row group."""
    groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
    return [group.column(i) for group in groups for i in range(footer.num_columns)]


def read_footer(path: Path, schema: pa.Schema, n_rows: int) -> pq.FileMetaData:
    """Of a Parquet file that has these columns and rows, as `footer_of`. Raises ValueError otherwise."""
    try:
        with open(path, "rb") as file:
            footer = footer_of(file)
        columns = footer.schema.to_arrow_schema().remove_metadata()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable Parquet file ({short(error)}). {AGAIN}") from error
    if not columns.equals(schema):
        odd = [text for text in _texts(schema) if text not in _texts(columns)]
        odd = odd or [text for text in _texts(columns) if text not in _texts(schema)]
        raise ValueError(f"{path} has other columns than an atlas; check {few(odd) if odd else 'their order'}. {AGAIN}")
    if footer.num_rows != n_rows:
        raise ValueError(f"{path} has {footer.num_rows:,} rows, not {n_rows:,} as {MANIFEST} states. {AGAIN}")
    return footer


def _from_version_1(manifest: dict[str, Any]) -> dict[str, Any]:
    # `license` was spelled otherwise.
    def renamed(content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        return {"license" if key == "licence" else key: value for key, value in content.items()}

    sources = manifest.get("sources")
    return renamed({**manifest, "sources": [renamed(s) for s in sources] if isinstance(sources, list) else sources})


def _texts(schema: pa.Schema) -> list[str]:
    return [f"{field.name} {field.type}{'' if field.nullable else ' not null'}" for field in schema]


def _fields(schema: type[T], content: Any, where: str) -> T:
    """A dataclass of texts, whole numbers that are not negative, and tuples."""
    if not isinstance(content, dict):
        raise ValueError(f"{where} must be a JSON object, not {str(content)[:80]}. {AGAIN}")
    types = {f.name: str(f.type) for f in fields(schema)}  # type: ignore[arg-type]
    missing, unknown = sorted(types.keys() - content.keys()), sorted(content.keys() - types.keys())
    if missing or unknown:
        raise ValueError(f"{where}: missing {few(missing)}; unknown {few(unknown)}. {AGAIN}")
    for name, kind in types.items():
        value = content[name]
        if kind == "int" and not (type(value) is int and 0 <= value < 1 << 62):
            raise ValueError(f"{where}: {name} is {str(value)[:40]}; it must be a whole number, not negative. {AGAIN}")
        if kind.startswith(("str", "InputKind")) and not (
            isinstance(value, str) or (value is None and kind == "str | None")
        ):
            raise ValueError(f"{where}: {name} is {str(value)[:40]}; it must be a text. {AGAIN}")
    return schema(**content)


def _read_table(path: Path, schema: pa.Schema, info: AtlasInfo, n_rows: int, n_elements: int) -> pa.Table:
    """A table with one chunk a column; texts as dictionaries, whose words are sorted.

    As dictionaries, because a small file may state one long text for every row. Its lists, which came with version 3,
    hold at most `n_elements`.
    """
    if info.format_version < 3:
        schema = pa.schema([field for field in schema if not pa.types.is_list(field.type)])
    footer = read_footer(path, schema, n_rows)
    chunks = columns_of(footer)
    size = sum(column.total_uncompressed_size for column in chunks)
    if size > MAX_BYTES[path.name]:
        raise ValueError(f"{path} holds {size:,} bytes; at most {MAX_BYTES[path.name]:,} are read. {AGAIN}")
    stated = sum(column.num_values for column in chunks if column.path_in_schema.endswith(".list.element"))
    if stated > n_elements:
        raise ValueError(f"{path} states {stated:,} elements of lists; it must be at most {n_elements:,}. {AGAIN}")
    texts = [field.name for field in schema if field.type == pa.string()]
    try:
        table = pq.ParquetFile(path, read_dictionary=texts).read()
        table.validate(full=True)  # pyarrow keeps numbers of words as the file has them, beyond the last one too
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged ({short(error)}). {AGAIN}") from error
    if len(table) != n_rows:  # the footer's number of all rows is not read
        raise ValueError(f"{path} has {len(table):,} rows, not {n_rows:,} as {MANIFEST} states. {AGAIN}")
    for i, name in enumerate(table.column_names):
        if table[name].null_count:
            raise ValueError(f"{path} has missing values in {name}. {AGAIN}")
        if name in texts:
            table = table.set_column(i, name, _sorted_words(table[name], path))
    return table.combine_chunks()


def _sorted_words(column: pa.ChunkedArray, path: Path) -> pa.Array:
    codes = column.unify_dictionaries().combine_chunks()
    lengths = pc.binary_length(codes.dictionary)
    if (longest := pc.max(lengths).as_py()) > MAX_NAME:
        raise ValueError(f"{path} has a text of {longest:,} bytes; at most {MAX_NAME:,} are read. {AGAIN}")
    words = codes.dictionary.to_pylist()
    known = {word: i for i, word in enumerate(sorted(set(words)))}
    used, indices = np.unique(np.array([known[w] for w in words])[codes.indices.to_numpy()], return_inverse=True)
    ordered = pa.array(list(known), pa.string()).take(pa.array(used))
    return pa.DictionaryArray.from_arrays(pa.array(indices, pa.int32()), ordered)
