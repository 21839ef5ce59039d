import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perturbdiff.atlas.store import Atlas
from perturbdiff.atlas.stream import StreamedCells, prefetched, read_shard
from perturbdiff.config import Preprocessing
from tests.atlases import random_cells, seal, write_atlas
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


def streamed(*atlases):
    """Streamed cells with every control of the atlases, and all cells of the atlases as a dense matrix."""
    first, stretches = 0, []
    for atlas in atlases:
        n_cells = atlas.conditions.column("n_cells").to_numpy()
        ends = first + np.cumsum(n_cells)
        control = atlas.conditions.column("is_control").to_numpy()
        stretches += np.stack([ends - n_cells, ends], axis=1)[control].tolist()
        first += len(atlas)
    return StreamedCells(atlases, HOW, np.array(stretches))


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
    cells = streamed(*atlases)
    shard_of = np.searchsorted(cells.borders, np.arange(2 * n_cells), "right") - 1
    control = np.concatenate([is_control(atlas) for atlas in atlases])
    for _ in range(2):
        opened = data.draw(st.lists(st.integers(0, len(cells.borders) - 1), max_size=3, unique=True))
        cells.open(opened)
        there = np.flatnonzero(np.isin(shard_of, opened) | control)
        rows = np.array(data.draw(st.lists(st.sampled_from(there.tolist()), max_size=30)), dtype=np.int64)
        taken = cells.take(rows)
        np.testing.assert_array_equal(dense(taken, n_genes), expected[rows])
        np.testing.assert_array_equal(taken.library_size, expected.sum(1)[rows] + 1)


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
