import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perturbdiff.atlas.format import read_checksums
from perturbdiff.atlas.store import Atlas
from perturbdiff.atlas.stream import StreamedCells, own_cores, prefetched, read_shard
from perturbdiff.config import Preprocessing
from tests.atlases import odd_histogram, random_cells, seal, write_atlas
from tests.processes import PATIENCE

HOW = Preprocessing("counts", 1e4, 10.0)


# ---------------------------------------------------------------- prefetch


@pytest.mark.parametrize("ahead", [0, 1, 3, 50])
def test_what_is_made_ahead_comes_in_order(ahead):
    assert list(prefetched(lambda number: number**2, 3, 20, ahead)) == [number**2 for number in range(3, 20)]


def test_work_goes_on_while_the_caller_is_busy_but_not_further_than_asked():
    made, fourth = [], threading.Event()

    def make(number):
        made.append(number)
        if number == 3:
            fourth.set()
        return number

    numbers = prefetched(make, 0, 100, ahead=3)
    assert next(numbers) == 0
    assert fourth.wait(PATIENCE)  # 1, 2 and 3 are made though nobody asked for them yet
    time.sleep(0.05)
    assert made == [0, 1, 2, 3]
    numbers.close()


def test_an_error_comes_where_its_item_would_have_come():
    def make(number):
        if number == 2:
            raise ValueError("the second")
        return number

    numbers = prefetched(make, 0, 5, ahead=4)
    assert [next(numbers), next(numbers)] == [0, 1]
    with pytest.raises(ValueError, match="the second"):
        next(numbers)


def test_a_caller_that_is_told_to_stop_does_not_wait_for_what_is_not_ready():
    release, asked = threading.Event(), threading.Event()

    def make(number):
        if number == 1:
            release.wait(PATIENCE)
        return number

    numbers = prefetched(make, 0, 9, ahead=2, stopped=asked.is_set, give_up=release.set)
    assert next(numbers) == 0
    asked.set()
    assert list(numbers) == []
    assert release.is_set()


def test_no_thread_is_left_when_the_caller_stops_early():
    numbers = prefetched(lambda number: number, 0, 10**9, ahead=5)
    next(numbers)
    numbers.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]


def test_what_would_take_long_is_given_up_when_the_caller_stops_early():
    begun, given_up = threading.Event(), threading.Event()

    def make(number):
        if number == 1:
            begun.set()
            given_up.wait(PATIENCE)
        return number

    numbers = prefetched(make, 0, 10, ahead=1, give_up=given_up.set)
    next(numbers)
    assert begun.wait(PATIENCE)
    assert not given_up.is_set()
    numbers.close()
    assert given_up.is_set()


# ---------------------------------------------------------------- shards from a folder


@pytest.fixture
def atlas(tmp_path):
    return Atlas.open(write_atlas(tmp_path / "atlas"))


def streamed(*atlases, n_threads=None):
    """Streamed cells with every control of the atlases, and all cells of the atlases as a dense matrix."""
    first, stretches = 0, []
    for atlas in atlases:
        n_cells = atlas.conditions.column("n_cells").to_numpy()
        ends = first + np.cumsum(n_cells)
        control = atlas.conditions.column("is_control").to_numpy()
        stretches += np.stack([ends - n_cells, ends], axis=1)[control].tolist()
        first += len(atlas)
    return StreamedCells(atlases, HOW, np.array(stretches), n_threads)


def is_control(atlas):
    """Of each cell."""
    return np.repeat(*(atlas.conditions.column(name).to_numpy() for name in ("is_control", "n_cells")))


def dense(taken, n_genes):
    values = np.zeros((len(taken.indptr) - 1, n_genes))
    rows = np.repeat(np.arange(len(values)), np.diff(taken.indptr))
    values[rows, taken.genes] = taken.values
    return values


@settings(derandomize=True)
@given(st.data())
def test_rows_of_open_shards_and_controls_of_any_are_those_of_the_atlas(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "streamed"
    seeds = (0, 1)
    if not folder.exists():
        for seed in seeds:
            write_atlas(folder / str(seed), seed=seed)
    atlases = [Atlas.open(folder / str(seed)) for seed in seeds]
    n_cells, n_genes = len(atlases[0]), len(atlases[0].genes)
    expected = np.concatenate([random_cells(n_cells, n_genes, seed).toarray() for seed in seeds])
    cells = streamed(*atlases, n_threads=data.draw(st.sampled_from([1, 3])))
    shard_of = np.searchsorted(cells.borders, np.arange(2 * n_cells), "right") - 1
    control = np.concatenate([is_control(atlas) for atlas in atlases])
    for _ in range(3):
        opened = data.draw(st.lists(st.integers(0, len(cells.borders) - 1), max_size=3, unique=True))
        cells.open(opened)
        there = np.flatnonzero(np.isin(shard_of, opened) | control)
        rows = np.array(data.draw(st.lists(st.sampled_from(there.tolist()), max_size=30)), dtype=np.int64)
        taken = cells.take(rows)
        np.testing.assert_array_equal(dense(taken, n_genes), expected[rows])
        np.testing.assert_array_equal(taken.library_size, expected.sum(1)[rows] + 1)
    cells.close()


def test_a_perturbed_cell_of_a_shard_that_is_not_open_is_an_error(atlas):
    cells = streamed(atlas)
    perturbed = int(np.flatnonzero(~is_control(atlas))[0])
    with pytest.raises(ValueError, match="not open"):
        cells.take(np.array([perturbed]))


def test_controls_that_do_not_fit_are_dropped_and_read_again(atlas, monkeypatch):
    cells = streamed(atlas)
    control = np.flatnonzero(is_control(atlas))
    before = cells.take(control)
    monkeypatch.setattr("perturbdiff.atlas.stream.CONTROL_BYTES", 1)
    cells = streamed(atlas)
    for _ in range(2):
        after = cells.take(control)
        np.testing.assert_array_equal(after.values, before.values)
    assert len(cells._kept) == 1


def control_rows(atlas, shard):
    rows = np.arange(*atlas.shard_first[shard : shard + 2])
    return rows[is_control(atlas)[rows]]


def dropped_after_controls_of_another(atlas):
    """Streamed cells that were asked for controls of shard 0 when it was not open, and had the others open."""
    cells = streamed(atlas)
    cells.take(control_rows(atlas, 0))
    others = list(range(1, len(atlas.info.shards)))
    cells.open(others)
    cells.take(cells.borders[others])
    cells.open([])
    return cells


def test_controls_of_a_shard_that_was_open_are_kept_and_not_read_again(atlas):
    expected = streamed(atlas).take(np.flatnonzero(is_control(atlas)))
    cells = dropped_after_controls_of_another(atlas)
    for shard in atlas.info.shards:
        (atlas.folder / shard.file).unlink()
    taken = cells.take(np.flatnonzero(is_control(atlas)))
    np.testing.assert_array_equal(taken.values, expected.values)
    np.testing.assert_array_equal(taken.genes, expected.genes)
    np.testing.assert_array_equal(taken.library_size, expected.library_size)


def test_controls_that_nobody_asked_for_take_no_room_of_others(atlas, monkeypatch):
    cells = streamed(atlas)
    cells.open([0, 1])
    cells.take(cells.borders[:2])
    cells.open([])
    assert not cells._kept  # where all sets find controls in their own shard, none are kept
    monkeypatch.setattr("perturbdiff.atlas.stream.CONTROL_BYTES", 1)
    assert set(dropped_after_controls_of_another(atlas)._kept) == {0}


def test_shards_that_are_closed_leave_memory(atlas):
    cells = streamed(atlas)
    cells.open([0, 1])
    cells.open([1])
    assert set(cells._open) == {1}


def test_a_shard_whose_bytes_changed_is_named_and_refused(atlas):
    path = atlas.folder / atlas.info.shards[1].file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    cells = streamed(atlas)
    cells.open([0, 1])
    cells.take(np.array([0]))
    with pytest.raises(ValueError, match=r"cells-00001\.parquet"):
        cells.take(cells.borders[1:2])


def test_a_shard_with_other_columns_is_named_and_refused(atlas):
    path = atlas.folder / atlas.info.shards[0].file
    table = pq.read_table(path)
    genes = table.column("genes").cast(pa.list_(pa.int64()))
    pq.write_table(table.set_column(table.column_names.index("genes"), "genes", genes), path)
    seal(atlas.folder)
    with pytest.raises(ValueError, match=r"cells-00000\.parquet.*(columns|type)"):
        read_shard(Atlas.open(atlas.folder), 0)


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("decoded", [1, 1 << 30])
@pytest.mark.parametrize(
    ("n_genes", "gene_type", "value_type"),
    [(20, "uint16", "uint16"), (70_000, "uint32", "uint32"), (20, "uint16", "float32")],
)
def test_a_shard_is_what_any_reader_of_parquet_finds(
    tmp_path, monkeypatch, n_genes, gene_type, value_type, decoded, n_threads
):
    monkeypatch.setattr("perturbdiff.atlas.stream.DECODED", decoded)  # a row at a time, or whole row groups
    folder = write_atlas(tmp_path / "atlas", n_genes=n_genes, gene_type=gene_type, value_type=value_type)
    atlas = Atlas.open(folder)
    columns = ["library_size", "genes", atlas.info.value_column]
    stretches = np.array([[0, 1], [3, 5], [5, 9], [14, 17]])  # of row groups of five
    rows = np.concatenate([np.arange(*stretch) for stretch in stretches])
    with ThreadPoolExecutor(n_threads) as threads:
        for i, shard in enumerate(atlas.info.shards[:2]):
            expected = pq.read_table(folder / shard.file, columns=columns)
            assert read_shard(atlas, i, decoders=threads).equals(expected)
            assert read_shard(atlas, i).equals(expected)
            assert read_shard(atlas, i, None, stretches, threads).equals(expected.take(pa.array(rows)))
            assert len(read_shard(atlas, i, None, stretches[:0])) == 0


def damaged(atlas, shard, group):
    """Overwrite the pages of genes of a row group, under a checksum that is right."""
    path = atlas.folder / atlas.info.shards[shard].file
    column = pq.read_metadata(path).row_group(group).column(6)
    assert column.path_in_schema == "genes.list.element"
    content = bytearray(path.read_bytes())
    first, end = column.data_page_offset, column.data_page_offset + column.total_compressed_size
    content[first:end] = b"\xff" * (end - first)
    path.write_bytes(content)
    seal(atlas.folder)
    return Atlas.open(atlas.folder)


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("group", [0, 3])
def test_damaged_pages_are_refused_by_the_name_of_the_shard(atlas, group, n_threads):
    cells = streamed(damaged(atlas, 1, group), n_threads=n_threads)
    cells.open([0, 1])
    cells.take(cells.borders[:1])
    with pytest.raises(
        ValueError, match=r"^shard data/cells-00001\.parquet of .* is not readable Parquet \(.*get it again\.$"
    ):
        cells.take(cells.borders[1:2])


def test_row_groups_without_controls_are_not_decoded_for_controls(tmp_path):
    conditions = [("A", "T", "b1", 10), ("B", "T", "b1", 2), ("control", "T", "b1", 6), ("pert", "T", "b1", 7)]
    atlas = Atlas.open(write_atlas(tmp_path / "atlas", conditions, rows_per_shard=25))
    control = control_rows(atlas, 0)
    assert control.tolist() == list(range(12, 18))  # in the third and fourth row group
    expected = streamed(atlas).take(control)
    for group in (0, 1, 4):
        atlas = damaged(atlas, 0, group)
    taken = streamed(atlas).take(control)
    np.testing.assert_array_equal(taken.values, expected.values)
    np.testing.assert_array_equal(taken.genes, expected.genes)
    with pytest.raises(ValueError, match="not readable"):
        read_shard(damaged(atlas, 0, 3), 0, None, control[[0, -1]][None] + [0, 1])


def test_a_shard_whose_footer_contradicts_itself_is_refused(atlas):
    opened = Atlas.open(atlas.folder)  # a repo on the Hub is opened without its shards
    odd_histogram(atlas.folder / atlas.info.shards[0].file)
    seal(atlas.folder)
    opened.digests = read_checksums(atlas.folder)
    with pytest.raises(ValueError, match=r"cells-00000\.parquet"):
        read_shard(opened, 0)


def test_a_shard_with_another_number_of_cells_is_named_and_refused(atlas):
    path = atlas.folder / atlas.info.shards[0].file
    pq.write_table(pq.read_table(path).slice(1), path)
    seal(atlas.folder)
    atlas.digests = read_checksums(atlas.folder)
    with pytest.raises(ValueError, match=r"cells-00000\.parquet of .* has 16 cells, not 17 as atlas\.json says"):
        read_shard(atlas, 0)


@pytest.mark.parametrize(
    ("cores", "processes", "expected"), [(2, 1, 2), (64, 8, 4), (8, 4, 2), (4, 8, 1), (None, 1, 1)]
)
def test_cores_are_shared_by_the_processes_of_a_machine(monkeypatch, cores, processes, expected):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert own_cores(4) == expected
