import itertools
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perturbdiff.data.conditions import ConditionIndex, match_controls
from perturbdiff.data.samplers import (
    RUNS_PER_SET,
    CellSetSampler,
    SetSource,
    StreamedSampler,
    draw_controls,
    shuffled_positions,
)
from tests.screens import read, screen_with_cells

PROPERTY = settings(derandomize=True)
SEEDS = st.integers(0, 2**33)


@dataclass(frozen=True)
class Laid:
    """Conditions of several sources, one after the other, and the same cell by cell.

    cells
        (source, perturbation, cell_type, batch) of each row.
    first_rows
        Of each source.
    """

    index: ConditionIndex
    cells: list[tuple[int, str, str, str]]
    first_rows: list[int]

    @classmethod
    def of(cls, *sources):
        """From lists of (perturbation, cell_type, batch, n)."""
        lengths = [sum(c[3] for c in found) for found in sources]
        first_rows = [sum(lengths[:i]) for i in range(len(sources))]
        cells = [(i, *label) for i, found in enumerate(sources) for *label, n in found for _ in range(n)]
        indexes = [
            ConditionIndex.from_conditions(
                *([c[i] for c in found] for i in range(3)),
                np.array([c[0] == "control" for c in found], bool),
                np.array([c[3] for c in found], np.int64),
            )
            for found in sources
        ]
        return cls(ConditionIndex.concat(indexes, first_rows), cells, first_rows)

    def groups(self, marginal):
        """Rows of the cells that are dealt together, by what they share."""
        found = {}
        for row, (source, perturbation, cell_type, batch) in enumerate(self.cells):
            if perturbation != "control":
                found.setdefault((source, perturbation, cell_type, batch), []).append(row)
            elif marginal[source]:
                found.setdefault((source, perturbation, cell_type), []).append(row)
        return found


BIG = st.one_of(st.integers(1, 30), st.integers(60, 100))  # cells of a condition: some for several sets of several runs


@st.composite
def groups(draw, sizes=BIG):
    """Some perturbations in each of one to three contexts, all with controls; in no order."""
    contexts = draw(st.lists(st.tuples(st.sampled_from(["T", "NK"]), st.sampled_from(["b1", "b2"])), min_size=1,
                             max_size=3, unique=True))  # fmt: skip
    found = []
    for cell_type, batch in contexts:
        found.append(("control", cell_type, batch, draw(st.integers(1, 40))))
        for perturbation in draw(st.lists(st.sampled_from("ABC"), min_size=1, max_size=3, unique=True)):
            found.append((perturbation, cell_type, batch, draw(sizes)))
    return draw(st.permutations(found))


@st.composite
def sizes(draw):
    """What a sampler is asked for: sets of one cell, of a few, of several runs, and larger than any condition."""
    set_size = draw(st.one_of(st.integers(1, 12), st.integers(32, 70), st.just(10**6)))
    return {
        "set_size": set_size,
        "sets_per_batch": draw(st.integers(1, 9)),
        "seed": draw(SEEDS),
        "min_set_size": draw(st.integers(1, min((set_size + 1) // 2, 40))),
    }


EPOCHS = st.integers(0, 5)
WORLDS = st.integers(1, 6)


@st.composite
def mixed(draw, max_sources=3):
    """Up to three sources, each marginal or not, and sizes: a `Laid` and what a sampler takes."""
    sources = draw(st.lists(groups(), min_size=1, max_size=max_sources))
    marginal = [draw(st.booleans()) for _ in sources]
    return Laid.of(*sources), {**draw(sizes()), "sources": [SetSource(m) for m in marginal]}


def is_marginal(laid, given):
    return np.array([source.marginal for source in given["sources"]])[laid.index.source]


def sampler_of(laid, given, by="batch"):
    pools = match_controls(laid.index, by, ~is_marginal(laid, given))
    return CellSetSampler(laid.index, pools, **given)


def plain(*found):
    """A `Laid` of one source of perturbed cells."""
    return Laid.of(list(found))


def epoch_of(sampler, epoch, world_size=1):
    """All sets of an epoch: [step][rank] lists."""
    n_steps = sampler.n_steps(epoch) if isinstance(sampler, StreamedSampler) else sampler.steps_per_epoch
    return [[sampler.batch(epoch, step, rank, world_size) for rank in range(world_size)] for step in range(n_steps)]


def flat(steps):
    return [s for ranks in steps for sets in ranks for s in sets]


def as_tuple(cell_set):
    return cell_set.key, cell_set.condition, cell_set.rows.tolist(), cell_set.control_rows.tolist()


# ---------------------------------------------------------------- a shuffle in runs


@PROPERTY
@given(st.integers(1, 4000), st.integers(1, 40), SEEDS, st.data())
def test_the_pieces_of_a_shuffle_in_runs_are_one_shuffle(n, run, seed, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=8)))
    whole = shuffled_positions(n, 0, n, run, seed, "x", 3).tolist()
    assert sorted(whole) == list(range(n))
    pieces = [shuffled_positions(n, a, b, run, seed, "x", 3).tolist() for a, b in itertools.pairwise([0, *cuts, n])]
    assert [place for piece in pieces for place in piece] == whole
    assert sum(b != (a + 1) % n for a, b in itertools.pairwise(whole)) <= n // run + 1  # the runs stay together


@pytest.mark.parametrize("n", [1, 2, 7, 1500])
def test_a_shuffle_in_runs_of_one_is_any_permutation(n):
    whole = shuffled_positions(n, 0, n, 1, 0, "x")
    assert sorted(whole.tolist()) == list(range(n))
    assert (np.diff(whole) == 1).sum() <= 6  # 1 expected


@pytest.mark.parametrize(("n", "run"), [(20, 4), (23, 4), (5, 4), (3, 4), (23, 1), (4111, 16)])
def test_every_cell_is_as_likely_as_any_other_at_each_place_of_a_shuffle_in_runs(n, run):
    bins = min(n, 10)
    for place in (0, n // 2, n - 1):  # the last is among the cells that are left over when the runs are full
        held = [int(shuffled_positions(n, place, place + 1, run, 0, "x", key)[0]) for key in range(600)]
        counts = np.histogram(held, bins=bins, range=(0, bins) if n == bins else (0, n - n % bins))[0]
        expected = counts.sum() / bins
        assert ((counts - expected) ** 2 / expected).sum() < 35  # chi-square, under 10 degrees of freedom, p < 1e-4


def test_the_neighbours_of_a_run_change_between_keys():
    together = [{frozenset(shuffled_positions(160, 0, 160, 16, 0, "x", key)[:16].tolist())} for key in range(60)]
    assert len(set.union(*together)) > 40  # 160 different runs; 10 if they always began at the same cells


# ---------------------------------------------------------------- the sampler


@PROPERTY
@given(mixed(), WORLDS, EPOCHS)
def test_every_cell_is_dealt_exactly_once_per_epoch_over_steps_and_ranks(made, world_size, epoch):
    laid, given = made
    sampler = sampler_of(laid, given)
    sets = flat(epoch_of(sampler, epoch, world_size))
    of_group = laid.groups([source.marginal for source in given["sources"]]).values()
    expected = Counter(row for rows in of_group if len(rows) >= given["min_set_size"] for row in rows)
    assert Counter(row for s in sets for row in s.rows.tolist()) == expected
    assert sampler.left_out == sum(len(rows) for rows in of_group if len(rows) < given["min_set_size"])
    assert len(sets) == sampler.n_sets
    assert len({s.key for s in sets}) == len(sets)
    assert {s.key[0] for s in sets} <= {epoch}
    assert sampler.batch(epoch, sampler.steps_per_epoch) == []


@PROPERTY
@given(mixed(), EPOCHS)
def test_sets_hold_cells_of_one_group_and_there_are_as_few_as_can_be(made, epoch):
    laid, given = made
    marginal = [source.marginal for source in given["sources"]]
    groups = laid.groups(marginal)
    group_of = {row: group for group, rows in groups.items() for row in rows}
    lengths = {}
    for s in flat(epoch_of(sampler_of(laid, given), epoch)):
        (group,) = {group_of[row] for row in s.rows.tolist()}
        lengths.setdefault(group, []).append(len(s.rows))
        assert set(laid.index.cells(s.condition).tolist()) <= set(groups[group])
    size, least = given["set_size"], given["min_set_size"]
    for group, rows in groups.items():
        of_group = sorted(lengths.pop(group, []), reverse=True)
        full, rest = divmod(len(rows), size)
        if len(rows) < least:
            assert of_group == []
        elif rest == 0 or rest >= least or full == 0:
            assert of_group == [size] * full + [rest] * (rest > 0)
        else:  # the last two share
            assert of_group[: full - 1] == [size] * (full - 1)
            shared = sorted(of_group[full - 1 :])
            assert sum(shared) == size + rest
            assert len(shared) == 2
            assert shared[1] - shared[0] <= 1
            assert shared[0] >= least
    assert not lengths


@PROPERTY
@given(mixed(), EPOCHS, st.sampled_from(["batch", "cell_type"]))
def test_controls_come_from_the_matched_pool_without_repeats_while_it_lasts(made, epoch, by):
    laid, given = made
    for s in flat(epoch_of(sampler_of(laid, given, by), epoch)):
        source, perturbation, *context = laid.cells[s.rows[0]]
        if given["sources"][source].marginal:
            assert s.control_rows.shape == (0,)
            continue
        assert len(s.control_rows) == len(s.rows)
        same = slice(2, 4 if by == "batch" else 3)
        pool = {
            row
            for row, cell in enumerate(laid.cells)
            if cell[:2] == (source, "control") and cell[same] == (source, perturbation, *context)[same]
        }
        assert pool.issuperset(s.control_rows.tolist())
        passes, rest = divmod(len(s.rows), len(pool))
        times = Counter(s.control_rows.tolist())
        assert all(passes <= times[row] <= passes + 1 for row in pool)
        assert sum(times[row] == passes + 1 for row in pool) == rest


@PROPERTY
@given(mixed(), st.integers(2, 7), EPOCHS)
def test_the_union_over_ranks_of_each_step_is_the_same_for_any_world_size(made, world_size, epoch):
    sampler = sampler_of(*made)
    for alone, together in zip(epoch_of(sampler, epoch), epoch_of(sampler, epoch, world_size), strict=True):
        (one,) = alone
        many = [s for rank in together for s in rank]
        assert sorted(map(as_tuple, many)) == sorted(map(as_tuple, one))
        assert max(map(len, together)) - min(map(len, together)) <= 1


@PROPERTY
@given(mixed(), st.tuples(WORLDS, WORLDS), st.integers(0, 30), st.integers(1, 6))
def test_a_run_resumed_at_any_step_on_any_world_size_sees_the_same_remaining_sets(made, world_sizes, at, n):
    laid, given = made

    def steps_of(sampler, steps, world_size):
        return [
            sorted(as_tuple(s) for rank in range(world_size) for s in sampler.batch(*place, rank, world_size))
            for place in map(sampler.position, steps)
        ]

    before, after = sampler_of(laid, given), sampler_of(laid, given)
    if before.n_sets == 0:
        return
    uninterrupted = steps_of(before, range(at + n), world_sizes[0])
    assert steps_of(after, range(at, at + n), world_sizes[1]) == uninterrupted[at:]
    walked = [(epoch, step) for epoch in range(at + n) for step in range(before.steps_per_epoch)]
    assert [before.position(step) for step in range(at + n)] == walked[: at + n]


@PROPERTY
@given(mixed(), st.integers(1, 4), st.randoms(use_true_random=False))
def test_a_batch_is_a_pure_function_of_seed_epoch_step_rank_and_world_size(made, world_size, random):
    sampler = sampler_of(*made)
    asked = list(itertools.product(range(3), range(min(sampler.steps_per_epoch, 8)), range(world_size)))
    in_order = {key: list(map(as_tuple, sampler.batch(*key, world_size))) for key in asked}
    random.shuffle(asked)
    for key in asked[:6]:
        assert list(map(as_tuple, sampler_of(*made).batch(*key, world_size))) == in_order[key]
        assert list(map(as_tuple, sampler.batch(*key, world_size))) == in_order[key]


@PROPERTY
@given(mixed(), EPOCHS)
def test_the_number_of_cells_of_a_step_is_the_real_count(made, epoch):
    sampler = sampler_of(*made)
    for step, ranks in enumerate(epoch_of(sampler, epoch, world_size=2)):
        assert sampler.n_cells(epoch, step) == sum(len(s.rows) for sets in ranks for s in sets)
        n_sets = sum(len(sets) for sets in ranks)
        last = step == sampler.steps_per_epoch - 1
        assert n_sets == (sampler.n_sets - step * sampler.sets_per_batch if last else sampler.sets_per_batch)


def test_the_cells_of_a_screen_are_dealt_by_its_rows():
    found = [("control", "T", "b1", 9), ("A", "T", "b1", 21), ("B", "T", "b1", 5), ("control", "NK", "b1", 3)]
    screen = read(screen_with_cells([*found, ("A", "NK", "b1", 8)], n_genes=2))
    kept = np.random.default_rng(0).random(len(screen)) < 0.8
    index = ConditionIndex.build(screen, kept)
    sets = flat(epoch_of(CellSetSampler(index, match_controls(index, "batch"), 4, 3, 0), 1, 2))
    assigned = sorted(row for s in sets for row in s.rows.tolist())
    assert assigned == np.flatnonzero(kept & ~screen.is_control).tolist()
    for s in sets:
        obs, controls = screen.obs.iloc[s.rows], screen.obs.iloc[s.control_rows]
        assert set(obs[["perturbation", "cell_type", "batch"]].itertuples(index=False, name=None)) == {
            index.labels(s.condition)
        }
        assert set(controls["perturbation"]) == {"control"}
        assert set(controls["cell_type"]) == set(obs["cell_type"])
        assert kept[s.control_rows].all()


def test_epochs_and_seeds_differ_in_sets_order_and_controls():
    laid = plain(("control", "T", "b", 40), ("A", "T", "b", 40), ("B", "T", "b", 40))

    def epoch(seed, number):
        given = {"set_size": 4, "sets_per_batch": 100, "seed": seed, "sources": [SetSource()]}
        return flat(epoch_of(sampler_of(laid, given), number))

    base, later, other = epoch(0, 0), epoch(0, 1), epoch(1, 0)
    for compared in (later, other):
        assert [s.key[1] for s in base] != [s.key[1] for s in compared]
        of_number = {s.key[1]: s for s in compared}
        assert all(set(s.rows) != set(of_number[s.key[1]].rows) for s in base)
        assert all(set(s.control_rows) != set(of_number[s.key[1]].control_rows) for s in base)


def test_conditions_are_mixed_within_an_epoch():
    laid = plain(("control", "T", "b", 5), ("A", "T", "b", 200), ("B", "T", "b", 200))
    sampler = CellSetSampler(laid.index, match_controls(laid.index, "batch"), 4, 50, 0)
    first_half = Counter(s.condition for s in sampler.batch(0, 0))
    assert min(first_half[c] for c in (1, 2)) > 15  # 25 expected, sd 2.5


def test_every_control_is_used_about_equally_often():
    laid = plain(("control", "T", "b", 20), ("A", "T", "b", 500))
    sampler = CellSetSampler(laid.index, match_controls(laid.index, "batch"), 5, 1000, 0)
    drawn = Counter(row for s in flat(epoch_of(sampler, 0)) for row in s.control_rows.tolist())
    assert len(drawn) == 20
    counts = np.array(list(drawn.values()))
    assert ((counts - 25) ** 2 / 25).sum() < 50.8  # chi-square, 19 degrees of freedom, p = 1e-4


@pytest.mark.parametrize("found", [[], [("control", "T", "b", 5)]])
def test_cells_without_any_perturbed_condition_make_an_epoch_without_steps(found):
    laid = plain(*found)
    sampler = CellSetSampler(laid.index, match_controls(laid.index, "batch"), 4, 3, 0)
    assert (sampler.n_sets, sampler.steps_per_epoch, sampler.left_out) == (0, 0, 0)
    assert sampler.batch(0, 0) == []


@pytest.mark.parametrize("set_size", [1, 2, 64, 10**9])
def test_one_cell_is_one_set(set_size):
    laid = plain(("control", "T", "b", 1), ("A", "T", "b", 1))
    sampler = CellSetSampler(laid.index, match_controls(laid.index, "batch"), set_size, 3, 0)
    assert [as_tuple(s) for s in flat(epoch_of(sampler, 2))] == [((2, 0), 1, [1], [0])]


@pytest.mark.parametrize("run", [1, 3])
@pytest.mark.parametrize(("n", "pool"), [(1, 1), (3, 7), (7, 7), (8, 7), (21, 7), (25, 7)])
def test_controls_are_drawn_in_whole_passes_over_the_pool(n, pool, run):
    drawn = 100 + draw_controls(pool, n, 0, 1, 2, run=run)
    assert len(drawn) == n
    for start in range(0, n, pool):
        chunk = drawn[start : start + pool]
        assert len(set(chunk.tolist())) == len(chunk)
    assert set(drawn.tolist()) <= set(range(100, 100 + pool))


def test_each_pass_over_the_pool_is_in_an_order_of_its_own():
    passes = draw_controls(40, 120, 0, 1, 2).reshape(3, 40).tolist()
    assert len({tuple(order) for order in passes}) == 3


def test_no_control_is_preferred_where_the_pool_does_not_last():
    drawn = Counter(row for number in range(210) for row in draw_controls(7, 10, 0, number).tolist())
    assert ((np.array([drawn[row] for row in range(7)]) - 300) ** 2 / 90).sum() < 40  # 210 + a binomial of mean 90


def test_a_large_set_is_read_in_few_runs():
    laid = plain(("control", "T", "b", 5000), ("A", "T", "b", 5000))
    sampler = CellSetSampler(laid.index, match_controls(laid.index, "batch"), 256, 100, 0)
    for s in sampler.batch(0, 0):
        for rows in (s.rows, s.control_rows):
            assert (np.diff(rows) != 1).sum() <= RUNS_PER_SET + 1  # one may begin in the middle, one go round the end


# ---------------------------------------------------------------- marginal sets


def test_unperturbed_cells_of_a_marginal_source_are_pooled_by_cell_type_over_batches():
    cells = [("control", "T", "b1", 40), ("control", "NK", "b1", 6), ("A", "T", "b1", 9), ("control", "T", "b2", 40)]
    laid = Laid.of(cells, cells)
    given = {"set_size": 10, "sets_per_batch": 4, "seed": 0, "sources": [SetSource(True), SetSource(True)]}
    mixed_batches = 0
    for s in flat(epoch_of(sampler_of(laid, given), 0)):
        of_set = {laid.cells[row] for row in s.rows}
        assert len({(source, perturbation, cell_type) for source, perturbation, cell_type, _ in of_set}) == 1
        mixed_batches += len({batch for *_, batch in of_set}) == 2
    assert mixed_batches > 12  # of the 16 sets of T; a set of one batch alone has a chance of 1 in 1000


@pytest.mark.parametrize("streamed", [False, True])
def test_self_controlled_sets_are_marginal_ones_with_controls_of_their_own_group(streamed):
    cells = [("control", "T", "b1", 40), ("control", "NK", "b1", 6), ("A", "T", "b1", 9), ("control", "T", "b2", 40)]
    laid = Laid.of(cells)
    given = {"set_size": 10, "sets_per_batch": 4, "seed": 0}
    epochs = []
    for source in (SetSource(True), SetSource(True, self_controlled=True)):
        if streamed:
            pools = match_controls(laid.index, "batch", np.zeros(len(laid.index), dtype=bool))
            sampler = StreamedSampler(laid.index, pools, np.zeros(1, np.int64), 1, 10, 4, 0, sources=[source])
        else:
            sampler = sampler_of(laid, {**given, "sources": [source]})
        epochs.append(flat(epoch_of(sampler, 0)))
    same_as_rows = 0
    for without, s in zip(*epochs, strict=True):
        assert (s.rows == without.rows).all()
        assert len(without.control_rows) == 0
        assert len(set(s.control_rows.tolist())) == len(s.rows)
        assert {laid.cells[row][:3] for row in s.control_rows} == {laid.cells[row][:3] for row in s.rows}
        same_as_rows += int((s.control_rows == s.rows).sum())
    assert same_as_rows < 30  # of 95: drawn on their own


# ---------------------------------------------------------------- mixtures by weight


@st.composite
def weighted(draw):
    sources = draw(st.lists(groups(), min_size=1, max_size=3))
    given = {**draw(sizes()), "min_set_size": 1}
    weights = [draw(st.floats(0.05, 3)) for _ in sources]
    return Laid.of(*sources), {**given, "sources": [SetSource(draw(st.booleans()), w) for w in weights]}


def sets_in_all(laid, given):
    """Sets that each source has, counted by hand."""
    n_sets = [0] * len(given["sources"])
    for group, rows in laid.groups([source.marginal for source in given["sources"]]).items():
        n_sets[group[0]] += -(-len(rows) // given["set_size"])
    return n_sets


@PROPERTY
@given(weighted(), WORLDS)
def test_each_epoch_holds_each_source_in_its_share(made, world_size):
    laid, given = made
    sampler = sampler_of(laid, given)
    n_sets = sets_in_all(laid, given)
    total = sum(source.weight for source in given["sources"])
    for epoch in range(3):
        sets = flat(epoch_of(sampler, epoch, world_size))
        assigned = Counter(laid.cells[s.rows[0]][0] for s in sets)
        for i, source in enumerate(given["sources"]):
            share = source.weight / total * sum(n_sets)
            assert abs(assigned[i] - share) <= (1 if share < 1 else 0.5 + 1e-9)
            assert assigned[i] >= 1
        assert len(sets) == sampler.n_sets
        assert {s.key for s in sets} == {(epoch, number) for number in range(len(sets))}


@PROPERTY
@given(weighted())
def test_each_source_of_a_mixture_goes_through_whole_epochs_of_its_own(made):
    laid, given = made
    sampler = sampler_of(laid, given)
    n_sets = sets_in_all(laid, given)
    assigned = [[] for _ in n_sets]
    n_epochs = min(12, 1 + 300 // sampler.n_sets)
    for epoch in range(n_epochs):
        for s in sorted(flat(epoch_of(sampler, epoch)), key=lambda s: s.key):
            assigned[laid.cells[s.rows[0]][0]].append(s)
    of_group = laid.groups([source.marginal for source in given["sources"]])
    for i, sets in enumerate(assigned):
        cells = Counter(row for group, rows in of_group.items() if group[0] == i for row in rows)
        for start in range(0, len(sets), n_sets[i]):
            own_epoch = sets[start : start + n_sets[i]]
            rows = Counter(row for s in own_epoch for row in s.rows.tolist())
            if len(own_epoch) == n_sets[i]:
                assert rows == cells
            else:
                assert rows <= cells  # none twice in the part that came so far


def test_a_part_of_the_epoch_of_a_source_is_any_part():
    small = [("control", "T", "b", 5), *((f"p{i}", "T", "b", 1) for i in range(12))]
    laid = Laid.of(small, small)
    given = {"set_size": 1, "sets_per_batch": 30, "sources": [SetSource(weight=1 / 4), SetSource(weight=3 / 4)]}
    first = Counter()
    for seed in range(300):
        for s in sampler_of(laid, {**given, "seed": seed}).batch(0, 0):
            first[laid.cells[s.rows[0]][:2]] += 1
    counts = np.array([first[0, f"p{i}"] for i in range(12)])
    assert counts.sum() == 300 * 6
    assert ((counts - 150) ** 2 / (150 * 0.5 * 12 / 11)).sum() < 37.4  # 11 degrees of freedom, p = 1e-4


def test_a_source_dealt_more_than_once_an_epoch_has_other_sets_and_controls_each_time():
    laid = Laid.of([("control", "T", "b", 50), ("A", "T", "b", 40)], [("control", "T", "b", 9), ("A", "T", "b", 160)])
    given = {"set_size": 4, "sets_per_batch": 99, "seed": 0, "sources": [SetSource(weight=1), SetSource(weight=1)]}
    sets = [s for s in flat(epoch_of(sampler_of(laid, given), 0)) if laid.cells[s.rows[0]][0] == 0]
    assert len(sets) == 25
    assert len({frozenset(s.rows.tolist()) for s in sets}) == 25
    assert len({frozenset(s.control_rows.tolist()) for s in sets}) == 25


@PROPERTY
@given(st.lists(groups(), min_size=2, max_size=3), sizes(), EPOCHS)
def test_weights_as_large_as_the_sources_are_no_weights(sources, given, epoch):
    laid = Laid.of(*sources)
    given = {**given, "min_set_size": 1, "sources": [SetSource()] * len(sources)}
    weighted = {**given, "sources": [SetSource(weight=float(n)) for n in sets_in_all(laid, given)]}
    assert list(map(as_tuple, flat(epoch_of(sampler_of(laid, weighted), epoch)))) == list(
        map(as_tuple, flat(epoch_of(sampler_of(laid, given), epoch)))
    )


def test_weights_for_some_sources_only_and_sources_without_sets_are_refused():
    perturbed, unperturbed = [("control", "T", "b", 5), ("A", "T", "b", 5)], [("control", "T", "b", 5)]
    given = {"set_size": 2, "sets_per_batch": 2, "seed": 0}
    with pytest.raises(ValueError, match=r"weights \[1.0, None\] must be given to all atlases or to none"):
        sampler_of(Laid.of(perturbed, perturbed), {**given, "sources": [SetSource(weight=1.0), SetSource()]})
    equal = [SetSource(weight=1.0)] * 2
    with pytest.raises(ValueError, match="atlas 1 has no sets to mix"):
        sampler_of(Laid.of(perturbed, unperturbed), {**given, "sources": equal})
    as_marginal = [SetSource(weight=1.0), SetSource(True, 1.0)]
    assert sampler_of(Laid.of(perturbed, unperturbed), {**given, "sources": as_marginal}).n_sets == 6


# ---------------------------------------------------------------- streamed


@dataclass(frozen=True)
class Streamed:
    """A streamed sampler, made as `IndexedCells` makes it, and what it was made of."""

    laid: Laid
    given: dict
    borders: list[int]
    n_streams: int
    by: str

    def sampler(self):
        borders = np.array(self.borders, np.int64)
        index = self.laid.index.cut(borders)
        marginal = np.array([source.marginal for source in self.given["sources"]])[index.source]
        pools = match_controls(index, self.by, ~marginal)
        local = match_controls(index.by_shard(borders), self.by, np.zeros(len(index), bool))
        pools = pools.preferring(local, self.given["set_size"])
        return StreamedSampler(index, pools, borders, self.n_streams, **self.given)

    def shard(self, row):
        return sum(border <= row for border in self.borders) - 1

    def groups(self):
        """Rows dealt together: as those of the atlas, apart by shard."""
        found = {}
        for group, rows in self.laid.groups([source.marginal for source in self.given["sources"]]).items():
            for row in rows:
                found.setdefault((self.shard(row), *group), []).append(row)
        return found

    def sets_of_shards(self):
        """Sets in each shard, counted by hand."""
        n_sets = [0] * len(self.borders)
        for (shard, *_), rows in self.groups().items():
            if len(rows) >= self.given["min_set_size"]:
                n_sets[shard] += -(-len(rows) // self.given["set_size"])
        return n_sets


@st.composite
def streamed(draw):
    laid, given = draw(mixed(max_sources=2))
    inner = draw(st.lists(st.integers(1, len(laid.cells) - 1), max_size=12)) if len(laid.cells) > 1 else []
    n_streams = draw(st.integers(1, 6))
    given["sets_per_batch"] = n_streams * draw(st.integers(1, 3))
    return Streamed(
        laid, given, sorted({*laid.first_rows, *inner}), n_streams, draw(st.sampled_from(["batch", "cell_type"]))
    )


@PROPERTY
@given(streamed(), WORLDS, EPOCHS)
def test_streamed_every_cell_is_dealt_exactly_once_per_epoch_in_sets_of_one_shard(made, world_size, epoch):
    sampler = made.sampler()
    sets = flat(epoch_of(sampler, epoch, world_size))
    groups, least = made.groups(), made.given["min_set_size"]
    group_of = {row: group for group, rows in groups.items() for row in rows}
    lengths = Counter()
    for s in sets:
        (group,) = {group_of[row] for row in s.rows.tolist()}
        lengths[group] += 1
        assert least <= len(s.rows) <= made.given["set_size"]
        assert set(sampler.index.cells(s.condition).tolist()) <= set(groups[group])
    assigned = Counter(row for s in sets for row in s.rows.tolist())
    assert assigned == Counter(row for rows in groups.values() if len(rows) >= least for row in rows)
    for group, rows in groups.items():
        assert lengths[group] == (-(-len(rows) // made.given["set_size"]) if len(rows) >= least else 0)
    assert sampler.left_out == sum(len(rows) for rows in groups.values() if len(rows) < least)
    assert len(sets) == len({s.key for s in sets}) == sampler.n_sets == sum(made.sets_of_shards())
    assert sampler.batch(epoch, sampler.n_steps(epoch)) == []


@PROPERTY
@given(streamed(), EPOCHS)
def test_a_lane_reads_one_shard_after_the_other_and_no_shard_is_on_two_lanes(made, epoch):
    sampler = made.sampler()
    steps = epoch_of(sampler, epoch, made.n_streams)  # rank r has stream r
    a_step = made.given["sets_per_batch"] // made.n_streams
    seen, loads = [], []
    for stream in range(made.n_streams):
        assigned = [len(ranks[stream]) for ranks in steps]
        loads.append(sum(assigned))
        assert assigned == [min(a_step, max(0, loads[-1] - step * a_step)) for step in range(len(steps))]
        shards = [made.shard(s.rows[0]) for ranks in steps for s in ranks[stream]]
        seen += [shard for shard, _ in itertools.groupby(shards)]
    n_sets = made.sets_of_shards()
    assert sorted(seen) == [shard for shard, n in enumerate(n_sets) if n]
    assert max(loads) - min(loads) <= max(n_sets)
    assert len(steps) == sampler.n_steps(epoch) == -(-max(loads) // a_step)


@PROPERTY
@given(streamed(), WORLDS, EPOCHS)
def test_the_shards_of_a_step_are_those_of_its_sets_and_the_next_of_each_lane(made, world_size, epoch):
    sampler = made.sampler()
    by_lane = epoch_of(sampler, epoch, made.n_streams)

    def of_lanes(steps):  # the shards of each stream
        shards = [[made.shard(s.rows[0]) for ranks in steps for s in ranks[stream]] for stream in range(made.n_streams)]
        return [[shard for shard, _ in itertools.groupby(of_lane)] for of_lane in shards]

    orders, next_orders = of_lanes(by_lane), of_lanes(epoch_of(made.sampler(), epoch + 1, made.n_streams))
    for step, ranks in enumerate(epoch_of(sampler, epoch, world_size)):
        for rank, sets in enumerate(ranks):
            shards = sampler.shards(epoch, step, rank, world_size)
            needed = {made.shard(row) for s in sets for row in s.rows}
            following = set()
            for stream in range(rank, made.n_streams, world_size):
                of_lane = [made.shard(s.rows[0]) for s in by_lane[step][stream]]
                here = orders[stream].index(of_lane[-1]) + 1 if of_lane else len(orders[stream])
                following |= set(orders[stream][here : here + 1] or next_orders[stream][:1])
            assert len(set(shards)) == len(shards)
            assert set(shards[: len(needed)]) == needed
            assert set(shards[len(needed) :]) == following - needed
            assert all(isinstance(shard, int) for shard in shards)


@PROPERTY
@given(streamed(), st.integers(2, 7), EPOCHS)
def test_streamed_sets_of_a_step_do_not_depend_on_the_world_size_nor_on_what_was_asked_before(made, world_size, epoch):
    sampler = made.sampler()
    alone, together = epoch_of(sampler, epoch), epoch_of(made.sampler(), epoch, world_size)
    for step, ((one,), ranks) in enumerate(zip(alone, together, strict=True)):
        assert sorted(as_tuple(s) for rank in ranks for s in rank) == sorted(map(as_tuple, one))
        assert sampler.n_cells(epoch, step) == sum(len(s.rows) for s in one)
    for step in {0, len(alone) - 1} & set(range(len(alone))):
        sampler.batch(epoch + 1, 0)
        assert list(map(as_tuple, sampler.batch(epoch, step))) == list(map(as_tuple, alone[step][0]))


@PROPERTY
@given(streamed(), st.tuples(WORLDS, WORLDS), st.integers(0, 30), st.integers(1, 6))
def test_a_streamed_run_resumed_at_any_step_on_any_world_size_sees_the_same_remaining_sets(made, worlds, at, n):
    before, after = made.sampler(), made.sampler()
    if before.n_sets == 0:
        return
    walked, epoch = [], 0
    while len(walked) < at + n:
        walked += [(epoch, step) for step in range(made.sampler().n_steps(epoch))]
        epoch += 1
    assert [before.position(step) for step in range(at + n)] == walked[: at + n]
    for step in range(at, at + n):
        epoch, of_epoch = after.position(step)
        assert (epoch, of_epoch) == walked[step]
        assert sorted(
            as_tuple(s) for r in range(worlds[1]) for s in after.batch(epoch, of_epoch, r, worlds[1])
        ) == sorted(as_tuple(s) for r in range(worlds[0]) for s in before.batch(*walked[step], r, worlds[0]))


@PROPERTY
@given(streamed(), EPOCHS)
def test_streamed_controls_come_from_the_own_shard_where_it_has_enough(made, epoch):
    cells = made.laid.cells
    for s in flat(epoch_of(made.sampler(), epoch)):
        source, _, *context = cells[s.rows[0]]
        if made.given["sources"][source].marginal:
            assert s.control_rows.shape == (0,)
            continue
        same = slice(2, 4 if made.by == "batch" else 3)
        anywhere = {
            row
            for row, cell in enumerate(cells)
            if cell[:2] == (source, "control") and list(cell[same]) == context[: same.stop - 2]
        }
        here = {row for row in anywhere if made.shard(row) == made.shard(s.rows[0])}
        pool = here if len(here) >= made.given["set_size"] else anywhere
        assert len(s.control_rows) == len(s.rows)
        assert pool.issuperset(s.control_rows.tolist())
        times = Counter(s.control_rows.tolist())
        assert all(len(s.rows) // len(pool) <= times[row] <= -(-len(s.rows) // len(pool)) for row in pool)


def striped(n_shards=12, n=40):
    """Shards of 40 cells: 20 controls and 20 of a perturbation, all of one context."""
    found = [c for i in range(n_shards) for c in (("control", "T", f"b{i}", n // 2), (f"p{i}", "T", f"b{i}", n // 2))]
    given = {"set_size": 2, "sets_per_batch": 4, "seed": 0, "sources": [SetSource()]}
    return Streamed(plain(*found), given, [i * n for i in range(n_shards)], 4, "batch")


def test_shards_their_sets_and_their_cells_come_in_another_order_each_epoch():
    made = striped()
    sampler = made.sampler()
    shard_orders, set_orders, cells = [], [], []
    for epoch in range(6):
        sets = flat(epoch_of(sampler, epoch, 4))
        shard_orders.append(tuple(dict.fromkeys(made.shard(s.rows[0]) for s in sets)))
        for shard in (2, 5):
            of_shard = [s for s in sets if made.shard(s.rows[0]) == shard]
            set_orders.append(tuple(s.key[1] - 10 * shard for s in of_shard))
            cells.append(frozenset(frozenset(s.rows.tolist()) for s in of_shard))
    assert all(sorted(order) == list(range(10)) for order in set_orders)
    assert len(set(shard_orders)) == 6
    assert len(set(set_orders)) == len(set(cells)) == 12


def test_steps_of_unequal_epochs_are_counted_one_after_the_other():
    found = [c for i, n in enumerate([3, 5, 9, 17, 30]) for c in ((f"p{i}", "T", "b", n), ("control", "T", "b", n))]
    merged = [("control", "T", f"b{i}", c[3]) if c[0] == "control" else c for i, c in enumerate(found)]
    borders = np.cumsum([0, 6, 10, 18, 34]).tolist()
    given = {"set_size": 1, "sets_per_batch": 2, "seed": 1, "sources": [SetSource()]}
    made = Streamed(plain(*merged), given, borders, 2, "cell_type")
    sampler = made.sampler()
    lengths = [sampler.n_steps(epoch) for epoch in range(20)]
    assert len(set(lengths)) > 1
    assert sampler.steps_per_epoch == lengths[0]
    starts = np.cumsum([0, *lengths])
    for epoch in (19, 3, 0, 7):
        assert made.sampler().position(int(starts[epoch])) == (epoch, 0)
        assert sampler.position(int(starts[epoch + 1]) - 1) == (epoch, lengths[epoch] - 1)


def test_more_lanes_than_shards_leave_lanes_idle():
    made = striped(n_shards=3)
    steps = epoch_of(made.sampler(), 0, 4)
    assert sorted(len(flat([[ranks[stream]] for ranks in steps])) for stream in range(4)) == [0, 10, 10, 10]


def test_lanes_must_divide_the_sets_of_a_step_and_weights_are_refused():
    made = striped()
    with pytest.raises(ValueError, match=r"data.sets_per_batch \(5\) must be a multiple of data.n_streams \(4\)"):
        Streamed(made.laid, {**made.given, "sets_per_batch": 5}, made.borders, 4, "batch").sampler()
    with pytest.raises(ValueError, match="drop their weights or stream none"):
        Streamed(made.laid, {**made.given, "sources": [SetSource(weight=1.0)]}, made.borders, 4, "batch").sampler()


def test_a_stream_without_any_perturbed_cell_has_no_steps():
    given = {"set_size": 2, "sets_per_batch": 4, "seed": 0, "sources": [SetSource()]}
    sampler = Streamed(plain(("control", "T", "b", 9)), given, [0, 4], 2, "batch").sampler()
    assert (sampler.n_sets, sampler.steps_per_epoch, sampler.left_out) == (0, 0, 0)
    assert sampler.batch(0, 0) == sampler.shards(0, 0) == []
