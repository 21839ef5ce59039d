"""Shards read whole, one after the other, from a folder or the Hub, and batches made ahead of the training step."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from perturbdiff.atlas.arrow import AtlasCells
from perturbdiff.atlas.format import CHECKSUMS, ROW_GROUP
from perturbdiff.atlas.store import Atlas
from perturbdiff.config import Preprocessing
from perturbdiff.data.expression import CellRows
from perturbdiff.data.vocab import GeneVocab
from perturbdiff.files import short

T = TypeVar("T")

RETRIES, LONGEST_WAIT = 10, 60.0  # waits of 1, 2, 4, ... s: five minutes without a network, or of a rate limit
PIECE = 16 << 20  # bytes after which failures are counted from 0 again
SILENCE = 30.0  # seconds without a byte after which a connection counts as broken
PASSING = (408, 429, 500, 502, 503, 504)  # HTTP statuses that may be others a minute later
DECODED = 512 << 10  # bytes of a shard whose rows are decoded at a time, some MB that a core's cache holds
MOST_DECODERS = 4  # threads that decode a shard where nothing is said
CONTROL_BYTES = 2 << 30  # of control cells kept from shards that are not open


def own_cores(most: int) -> int:
    """Cores of this machine for each of the processes of a launch that it runs, at least 1 and at most so many."""
    return min(max((os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1), most)


def prefetched(
    make: Callable[[int], T],
    first: int,
    last: int,
    ahead: int,
    stopped: Callable[[], bool] = lambda: False,
    give_up: Callable[[], None] = lambda: None,
) -> Generator[T, None, None]:
    """make(first), ..., make(last - 1) in order, made by a thread that is up to `ahead` of the caller.

    Parameters
    ----------
    stopped
        Asked each second while the next is not ready; ends the whole where it is True.
    give_up
        Called at the end, also of a caller who stops early or is interrupted, before the thread is waited for: ends a
        `make` that would take long.
    """

    def ready(future: Future[T]) -> bool:
        while not wait([future], timeout=1).done:
            if stopped():
                return False
        return True

    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as thread:
        waiting: deque[Future[T]] = deque()
        try:
            for number in range(first, last):
                waiting.append(thread.submit(make, number))
                if len(waiting) > ahead:
                    if not ready(waiting[0]):
                        return
                    yield waiting.popleft().result()
            while waiting and ready(waiting[0]):
                yield waiting.popleft().result()
        finally:
            give_up()
            thread.shutdown(wait=True, cancel_futures=True)


def read_shard(
    atlas: Atlas,
    i: int,
    closed: threading.Event | None = None,
    stretches: np.ndarray | None = None,
    decoders: ThreadPoolExecutor | None = None,
) -> pa.Table:
    """Genes, values and library sizes of shard `i`, from the folder or, without a copy on disk, from the Hub.

    Parameters
    ----------
    closed
        Set by another thread to give up a download.
    stretches
        (n, 2) first row and end of each stretch of rows that is wanted, rising; all rows if None. Row groups without
        any are not decoded, and the memory of other rows is not kept.
    decoders
        Threads that decode row groups side by side; this thread alone if None. The table is the same.

    Raises
    ------
    ValueError
        The bytes are not those of checksums.json, or not the Parquet that atlas.json promises; names the shard.
    ConnectionError
        The server could not be reached for minutes, or refuses the shard; names it.
    """
    file, n_cells = atlas.info.shards[i].file, atlas.info.shards[i].n_cells
    if atlas.folder is not None:
        source: Path | pa.Buffer = atlas.check_shard(i)
    else:
        content = _download(atlas.shard_url(i), atlas.shard_size(i), file, closed or threading.Event())
        atlas.check_shard_bytes(i, hashlib.sha256(content).hexdigest())
        source = pa.py_buffer(content)
    schema = pa.schema([atlas.info.schema.field(name) for name in ("library_size", "genes", atlas.info.value_column)])
    rows_at_once = min(max(DECODED * n_cells // atlas.shard_size(i), 1), ROW_GROUP)
    wanted = np.array([[0, n_cells]]) if stretches is None else stretches
    try:
        with pq.ParquetFile(source) as parquet:
            footer, columns = parquet.metadata, parquet.schema_arrow.remove_metadata()
        if pa.schema([field for field in columns if field.name in schema.names]) != schema:
            raise ValueError(f"shard {file} of {atlas.name} has other columns than atlas.json says; get it again.")
        if footer.num_rows != n_cells:
            raise ValueError(
                f"shard {file} of {atlas.name} has {footer.num_rows:,} cells, not {n_cells:,} as atlas.json says; get "
                "it again."
            )
        n_rows = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
        firsts = np.cumsum([0, *n_rows]).tolist()

        def decoded(group: int) -> list[pa.RecordBatch]:
            here = wanted - firsts[group]
            return _decoded(source, footer, group, schema.names, rows_at_once, here)

        in_groups = (decoders.map if decoders else map)(decoded, range(len(n_rows)))
        pieces = [piece for group in in_groups for piece in group]
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"shard {file} of {atlas.name} is not readable Parquet ({short(error)}); get it again."
        ) from error
    return pa.Table.from_batches(pieces, schema)


def _decoded(
    source: Path | pa.Buffer,
    footer: pq.FileMetaData,
    group: int,
    columns: Sequence[str],
    rows_at_once: int,
    stretches: np.ndarray,
) -> list[pa.RecordBatch]:
    # The wanted rows of a row group; `stretches` count from its first row.
    stretches = _inside(stretches, 0, footer.row_group(group).num_rows)
    if not len(stretches):
        return []
    found, first = [], 0
    # Rows that are few decode into memory that was just used. Whole row groups, and pq.read_table all the more, take
    # fresh pages from the system, which costs more than decoding.
    with pq.ParquetFile(source, metadata=footer) as parquet:
        for rows in parquet.iter_batches(rows_at_once, row_groups=[group], columns=columns, use_threads=False):
            here = _inside(stretches - first, 0, len(rows))
            found += [rows.slice(start, end - start) for start, end in here.tolist()]
            first += len(rows)
            if first >= stretches[-1, 1]:
                break
    if sum(map(len, found)) == first:
        return found
    return pa.Table.from_batches(found).combine_chunks().to_batches()  # a copy, so that the other rows can go


def _inside(stretches: np.ndarray, first: int, end: int) -> np.ndarray:
    """The parts of stretches of rows that lie from `first` to `end`; empty ones are left out."""
    parts = np.clip(stretches, first, end)
    return parts[parts[:, 1] > parts[:, 0]]


class StreamedCells:
    """Cells of atlases whose shards are opened and dropped as training goes on; rows count over all atlases.

    Rows of open shards can be taken, and control cells of any: those of a shard that is not open are copied out of it
    and kept while there is room. Once some were, those of each shard that is dropped are kept too, as far as they need
    no other's room, for it would be read again for them.
    """

    def __init__(
        self,
        atlases: Sequence[Atlas],
        preprocessing: Preprocessing,
        controls: np.ndarray,
        n_threads: int | None = None,
    ) -> None:
        """`controls` (n, 2): first row and end of each stretch of control cells. Threads as data.decoding_threads."""
        self._atlases, self._preprocessing, self._controls = atlases, preprocessing, controls
        if "ARROW_DEFAULT_MEMORY_POOL" not in os.environ:
            # Arrow's own pool gives what a shard took back to the system and takes it anew, zeroed, for the next one:
            # a fifth of the time.
            pa.set_memory_pool(pa.system_memory_pool())
        self._shards = [(atlas, i) for atlas in atlases for i in range(len(atlas.info.shards))]
        ends = np.cumsum([0, *(atlas.info.shards[i].n_cells for atlas, i in self._shards)])
        self.borders, self._ends = ends[:-1], ends[1:]
        self._open: dict[int, Future[tuple[AtlasCells, pa.Table]]] = {}
        self._kept: OrderedDict[int, tuple[AtlasCells, np.ndarray, int]] = OrderedDict()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="shard")
        n_threads = n_threads or own_cores(MOST_DECODERS)
        self._decoders = ThreadPoolExecutor(n_threads, thread_name_prefix="decode") if n_threads > 1 else None
        self._closed = threading.Event()
        self._gone: ConnectionError | None = None

    @property
    def genes(self) -> GeneVocab:
        return self._atlases[0].genes

    @property
    def preprocessing(self) -> Preprocessing:
        return self._preprocessing

    def open(self, shards: Sequence[int]) -> None:
        """Begin to read these shards, in this order, and drop all others."""
        wanted = set(shards)
        for shard in [shard for shard in self._open if shard not in wanted]:
            self._drop(shard)
        for shard in shards:
            if shard not in self._open:
                self._open[shard] = self._reader.submit(self._read, shard)

    def close(self) -> None:
        """Give up reading, also where a download waits to try again; nothing can be taken any more."""
        self._closed.set()
        self._reader.shutdown(wait=False, cancel_futures=True)
        if self._decoders is not None:
            self._decoders.shutdown(wait=False, cancel_futures=True)

    def take(self, rows: np.ndarray) -> CellRows:
        """As `Cells.take`."""
        if not len(rows):
            nothing = np.zeros(0, np.uint16)
            return CellRows(np.zeros(1, np.int64), nothing, nothing, np.zeros(0, np.float32))
        shard = np.searchsorted(self.borders, rows, "right") - 1
        taken = []
        for stretch in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(shard)) + 1):
            of = int(shard[stretch[0]])
            if of in self._open:
                taken.append(self._open[of].result()[0].take(rows[stretch] - self.borders[of]))
            else:
                taken.append(self._take_controls(of, rows[stretch]))
        return CellRows.concat(taken)

    def _read(self, shard: int) -> tuple[AtlasCells, pa.Table]:
        table = self._table(shard)
        return self._cells(shard, table), table

    def _cells(self, shard: int, table: pa.Table) -> AtlasCells:
        atlas, i = self._shards[shard]
        return atlas.shard_cells(table, i, self._preprocessing)

    def _drop(self, shard: int) -> None:
        reading = self._open.pop(shard)
        if reading.cancel() or not reading.done() or reading.exception() is not None:
            return
        stretches = self._controls_of(shard)
        if not self._kept or shard in self._kept or not len(stretches):
            return
        table, within = reading.result()[1], stretches - self.borders[shard]
        controls = pa.concat_tables([table.slice(start, end - start) for start, end in within.tolist()])
        if sum(size for _, _, size in self._kept.values()) + controls.nbytes <= CONTROL_BYTES:
            self._keep(shard, controls.combine_chunks(), stretches)
            self._kept.move_to_end(shard, last=False)  # nobody asked for them yet

    def _table(self, shard: int, stretches: np.ndarray | None = None) -> pa.Table:
        if self._gone is not None:  # minutes were waited already; not again for each shard
            raise self._gone
        atlas, i = self._shards[shard]
        try:
            return read_shard(atlas, i, self._closed, stretches, self._decoders)
        except ConnectionError as error:
            self._gone = error
            raise

    def _take_controls(self, shard: int, rows: np.ndarray) -> CellRows:
        if shard not in self._kept:
            stretches = self._controls_of(shard)
            self._keep(shard, self._table(shard, stretches - self.borders[shard]), stretches)
            while len(self._kept) > 1 and sum(size for _, _, size in self._kept.values()) > CONTROL_BYTES:
                self._kept.popitem(last=False)
        self._kept.move_to_end(shard)
        cells, stretches, _ = self._kept[shard]
        lengths = stretches[:, 1] - stretches[:, 0]
        at = np.searchsorted(stretches[:, 0], rows, "right") - 1
        if (at < 0).any() or (rows >= stretches[at, 1]).any():
            raise ValueError(f"a cell of shard {shard} was asked for that is not open; this is a bug, report it.")
        return cells.take(rows - stretches[at, 0] + (np.cumsum(lengths) - lengths)[at])

    def _controls_of(self, shard: int) -> np.ndarray:
        return _inside(self._controls, int(self.borders[shard]), int(self._ends[shard]))

    def _keep(self, shard: int, table: pa.Table, stretches: np.ndarray) -> None:
        self._kept[shard] = (self._cells(shard, table), stretches, table.nbytes)


def _download(url: str, size: int, file: str, closed: threading.Event) -> bytearray:
    # What came before a connection broke is kept; after a wait, longer each time, the rest is asked for.
    import httpx2

    content, counted, failures = bytearray(), 0, 0
    while not closed.is_set():
        try:
            status = _read_on(url, content, size, closed)
            problem, passing = f"HTTP status {status}", status in PASSING
        except httpx2.HTTPError as error:
            status, problem, passing = None, f"{type(error).__name__}: {short(error)}", True
        if status in (200, 206, 416) and not closed.is_set():  # 416: nothing follows what came
            if len(content) != size:
                raise ValueError(
                    f"shard {file} has {'more than ' if len(content) > size else ''}{min(len(content), size):,} bytes "
                    f"at {url}, {CHECKSUMS} says {size:,}; publish the atlas again."
                )
            return content
        if len(content) - counted >= PIECE:
            counted, failures = len(content), 0
        failures += 1
        if not passing or failures > RETRIES:
            raise ConnectionError(
                f"shard {file} could not be read from {url} ({problem}); the same command goes on once it can."
            )
        pause = min(2.0 ** (failures - 1), LONGEST_WAIT)
        print(f"shard {file}: {problem}; trying again in {pause:g} s ({failures} of {RETRIES}).", file=sys.stderr)
        closed.wait(pause)
    raise ConnectionError(f"shard {file} was given up.")


def _read_on(url: str, content: bytearray, size: int, closed: threading.Event) -> int:
    # Appends what the server has after `content`, hardly more than `size` in all; the HTTP status.
    from huggingface_hub.utils import build_hf_headers, get_session

    headers = {**build_hf_headers(), "Range": f"bytes={len(content)}-{size - 1}", "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=headers, timeout=SILENCE, follow_redirects=True) as response:
        if response.status_code == 200:  # the whole file, though the rest was asked for
            content.clear()
        if response.status_code in (200, 206):
            for part in response.iter_raw():
                content += part
                if len(content) > size or closed.is_set():
                    break
        return int(response.status_code)
