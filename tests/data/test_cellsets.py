import itertools
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perturbdiff.data.cellsets import (
    CellSetSampler,
    ConditionIndex,
    draw_controls,
    match_controls,
    resolve_control_match,
)
from tests.screens import counts_screen, read, screen_with_cells

LABELS = ["perturbation", "cell_type", "batch"]
PROPERTY = settings(deadline=None, derandomize=True, max_examples=60)
SEEDS = st.integers(0, 2**33)


def indexed(groups, cells=None):
    """Screen, index and pools of (perturbation, cell_type, batch, n) groups."""
    screen = read(screen_with_cells(groups, n_genes=2))
    index = ConditionIndex.build(screen, np.ones(len(screen), bool) if cells is None else cells(screen))
    return screen, index, match_controls(index, "batch")


@st.composite
def groups(draw):
    """Some perturbations in each of one to three contexts, all with controls."""
    contexts = draw(st.lists(st.tuples(st.sampled_from(["T", "NK"]), st.sampled_from(["b1", "b2"])), min_size=1,
                             max_size=3, unique=True))  # fmt: skip
    found = []
    for cell_type, batch in contexts:
        found.append(("control", cell_type, batch, draw(st.integers(1, 12))))
        for perturbation in draw(st.lists(st.sampled_from("ABC"), min_size=1, max_size=3, unique=True)):
            found.append((perturbation, cell_type, batch, draw(st.integers(1, 30))))
    return found


SIZES = {"set_size": st.integers(1, 12), "sets_per_batch": st.integers(1, 9), "seed": SEEDS, "epoch": st.integers(0, 5)}


def epoch_of(sampler, epoch, world_size=1):
    """All sets of an epoch: [step][rank] lists."""
    return [
        [sampler.batch(epoch, step, rank, world_size) for rank in range(world_size)]
        for step in range(sampler.steps_per_epoch)
    ]


def as_tuple(cell_set):
    return cell_set.key, cell_set.condition, cell_set.rows.tolist(), cell_set.control_rows.tolist()


# ---------------------------------------------------------------- the index


@PROPERTY
@given(groups(), st.data())
def test_the_condition_index_equals_a_pandas_groupby(found, data):
    screen = read(screen_with_cells(found, n_genes=2))
    chosen = np.array(data.draw(st.lists(st.booleans(), min_size=len(screen), max_size=len(screen))))
    index = ConditionIndex.build(screen, chosen)
    expected = {
        key: np.flatnonzero(chosen)[rows].tolist()
        for key, rows in screen.obs[chosen].groupby(LABELS, observed=True).indices.items()
    }
    assert {index.labels(c): index.cells(c).tolist() for c in range(len(index))} == expected
    assert index.n_cells.tolist() == [len(expected[index.labels(c)]) for c in range(len(index))]
    assert index.is_control.tolist() == [index.labels(c)[0] == "control" for c in range(len(index))]
    assert sorted(index.rows.tolist()) == np.flatnonzero(chosen).tolist()


def test_labels_that_sort_differently_than_they_are_counted_stay_apart():
    found = [("control", "T", "b", 1), ("10", "T", "b", 2), ("9", "T", "b", 3), ("ä", "T", "b", 4), ("a", "T", "b", 5)]
    _, index, _ = indexed(found)
    assert {index.labels(c)[0]: int(index.n_cells[c]) for c in range(len(index))} == {p: n for p, _, _, n in found}


# ---------------------------------------------------------------- the sampler


@PROPERTY
@given(groups(), st.integers(1, 5), st.fixed_dictionaries(SIZES))
def test_every_perturbed_cell_is_dealt_exactly_once_per_epoch_over_steps_and_ranks(found, world_size, sizes):
    screen, index, pools = indexed(found)
    sampler = CellSetSampler(index, pools, sizes["set_size"], sizes["sets_per_batch"], sizes["seed"])
    sets = [s for step in epoch_of(sampler, sizes["epoch"], world_size) for rank in step for s in rank]
    dealt = Counter(row for s in sets for row in s.rows.tolist())
    assert dealt == Counter(np.flatnonzero(~screen.is_control).tolist())
    assert len(sets) == sampler.n_sets
    assert len({s.key for s in sets}) == len(sets)
    assert sampler.batch(sizes["epoch"], sampler.steps_per_epoch) == []


@PROPERTY
@given(groups(), st.fixed_dictionaries(SIZES))
def test_sets_never_mix_conditions_and_only_the_last_of_a_condition_is_short(found, sizes):
    screen, index, pools = indexed(found)
    sampler = CellSetSampler(index, pools, sizes["set_size"], sizes["sets_per_batch"], sizes["seed"])
    lengths = {}
    for s in itertools.chain.from_iterable(itertools.chain.from_iterable(epoch_of(sampler, sizes["epoch"]))):
        conditions = screen.obs[LABELS].iloc[s.rows].drop_duplicates()
        assert [tuple(labels) for labels in conditions.to_numpy()] == [index.labels(s.condition)]
        lengths.setdefault(index.labels(s.condition), []).append(len(s.rows))
    for *labels, n in found:
        if labels[0] != "control":
            size = sizes["set_size"]
            expected = [size] * (n // size) + ([n % size] if n % size else [])
            assert sorted(lengths[tuple(labels)], reverse=True) == expected


@PROPERTY
@given(groups(), st.fixed_dictionaries(SIZES))
def test_controls_come_from_the_matched_pool_without_repeats_while_it_lasts(found, sizes):
    screen, index, pools = indexed(found)
    sampler = CellSetSampler(index, pools, sizes["set_size"], sizes["sets_per_batch"], sizes["seed"])
    pool_of = screen.obs[screen.is_control].groupby(["cell_type", "batch"], observed=True)["perturbation"].size()
    for s in itertools.chain.from_iterable(itertools.chain.from_iterable(epoch_of(sampler, sizes["epoch"]))):
        controls = screen.obs.iloc[s.control_rows]
        context = index.labels(s.condition)[1:]
        assert len(s.control_rows) == len(s.rows)
        assert set(zip(controls["cell_type"], controls["batch"], strict=True)) == {context}
        assert set(controls["perturbation"]) == {"control"}
        passes, rest = divmod(len(s.rows), int(pool_of[context]))
        assert set(Counter(s.control_rows.tolist()).values()) <= {passes, passes + 1} - {0}
        assert sum(n == passes + 1 for n in Counter(s.control_rows.tolist()).values()) == rest


@PROPERTY
@given(groups(), st.integers(2, 7), st.fixed_dictionaries(SIZES))
def test_the_union_over_ranks_of_each_step_is_the_same_for_any_world_size(found, world_size, sizes):
    _, index, pools = indexed(found)
    sampler = CellSetSampler(index, pools, sizes["set_size"], sizes["sets_per_batch"], sizes["seed"])
    for alone, together in zip(
        epoch_of(sampler, sizes["epoch"]), epoch_of(sampler, sizes["epoch"], world_size), strict=True
    ):
        (one,) = alone
        many = [s for rank in together for s in rank]
        assert sorted(map(as_tuple, many)) == sorted(map(as_tuple, one))
        assert max(map(len, together)) - min(map(len, together)) <= 1


@PROPERTY
@given(groups(), st.integers(1, 4), st.randoms(use_true_random=False), st.fixed_dictionaries(SIZES))
def test_a_batch_is_a_pure_function_of_seed_epoch_step_rank_and_world_size(found, world_size, random, sizes):
    _, index, pools = indexed(found)
    arguments = (index, pools, sizes["set_size"], sizes["sets_per_batch"], sizes["seed"])
    sampler = CellSetSampler(*arguments)
    asked = list(itertools.product(range(3), range(sampler.steps_per_epoch), range(world_size)))
    in_order = {key: list(map(as_tuple, sampler.batch(*key, world_size))) for key in asked}
    random.shuffle(asked)
    for key in asked[:6]:
        assert list(map(as_tuple, CellSetSampler(*arguments).batch(*key, world_size))) == in_order[key]
        assert list(map(as_tuple, sampler.batch(*key, world_size))) == in_order[key]


@PROPERTY
@given(groups(), st.fixed_dictionaries(SIZES))
def test_the_number_of_cells_of_a_step_is_the_real_count(found, sizes):
    _, index, pools = indexed(found)
    sampler = CellSetSampler(index, pools, sizes["set_size"], sizes["sets_per_batch"], sizes["seed"])
    for step, ranks in enumerate(epoch_of(sampler, sizes["epoch"], world_size=2)):
        dealt = [row for sets in ranks for s in sets for row in s.rows]
        assert sampler.n_cells(sizes["epoch"], step) == len(dealt)
        assert sum(len(sets) for sets in ranks) <= sizes["sets_per_batch"]


def test_epochs_and_seeds_differ_in_sets_order_and_controls():
    _, index, pools = indexed([("control", "T", "b", 40), ("A", "T", "b", 40), ("B", "T", "b", 40)])

    def epoch(seed, number):
        (step,) = epoch_of(CellSetSampler(index, pools, 4, 100, seed), number)
        return step[0]

    base, later, other = epoch(0, 0), epoch(0, 1), epoch(1, 0)
    for compared in (later, other):
        assert [s.key[1] for s in base] != [s.key[1] for s in compared]
        of_number = {s.key[1]: s for s in compared}
        assert all(set(s.rows) != set(of_number[s.key[1]].rows) for s in base)
        assert all(set(s.control_rows) != set(of_number[s.key[1]].control_rows) for s in base)


def test_conditions_are_mixed_within_an_epoch():
    _, index, pools = indexed([("control", "T", "b", 5), ("A", "T", "b", 200), ("B", "T", "b", 200)])
    (step,) = epoch_of(CellSetSampler(index, pools, 4, 100, 0), 0)
    first_half = Counter(s.condition for s in step[0][:50])
    assert min(first_half[c] for c in np.flatnonzero(~index.is_control)) > 15  # 25 expected, sd 2.5


def test_every_control_is_used_about_equally_often():
    _, index, pools = indexed([("control", "T", "b", 20), ("A", "T", "b", 500)])
    sampler = CellSetSampler(index, pools, 5, 1000, 0)
    drawn = Counter(row for (sets,) in epoch_of(sampler, 0) for s in sets for row in s.control_rows.tolist())
    assert len(drawn) == 20
    counts = np.array(list(drawn.values()))
    assert ((counts - 25) ** 2 / 25).sum() < 50.8  # chi-square, 19 degrees of freedom, p = 1e-4


def test_cells_without_any_perturbed_condition_make_an_epoch_without_steps():
    _, index, pools = indexed([("control", "T", "b", 5)])
    sampler = CellSetSampler(index, pools, 4, 3, 0)
    assert (sampler.n_sets, sampler.steps_per_epoch) == (0, 0)
    assert sampler.batch(0, 0) == []


@pytest.mark.parametrize(("n", "pool"), [(1, 1), (3, 7), (7, 7), (8, 7), (21, 7), (25, 7)])
def test_controls_are_drawn_in_whole_passes_over_the_pool(n, pool):
    drawn = draw_controls(np.arange(100, 100 + pool), n, 0, 1, 2)
    assert len(drawn) == n
    for start in range(0, n, pool):
        chunk = drawn[start : start + pool]
        assert len(set(chunk.tolist())) == len(chunk)
    assert set(drawn.tolist()) <= set(range(100, 100 + pool))


def test_no_control_is_preferred_where_the_pool_does_not_last():
    drawn = Counter(row for number in range(210) for row in draw_controls(np.arange(7), 10, 0, number).tolist())
    assert ((np.array([drawn[row] for row in range(7)]) - 300) ** 2 / 90).sum() < 40  # 210 + a binomial of mean 90


# ---------------------------------------------------------------- which controls match


MATCHED = [("control", "T", "b1", 3), ("control", "T", "b2", 4), ("A", "T", "b1", 2)]
CONFOUNDED = [("control", "T", "b1", 3), ("A", "T", "b2", 2), ("control", "NK", "b1", 3), ("A", "NK", "b2", 2)]
PARTLY = [*MATCHED, ("A", "T", "b3", 2)]


def index_of(found):
    return indexed_only(read(screen_with_cells(found, n_genes=2)))


def indexed_only(screen):
    return ConditionIndex.build(screen, np.ones(len(screen), bool))


@pytest.mark.parametrize(("found", "expected"), [(MATCHED, "batch"), (CONFOUNDED, "cell_type"), (PARTLY, "batch")])
def test_auto_matches_by_batch_unless_no_batch_holds_both_controls_and_perturbed_cells(found, expected):
    assert resolve_control_match(index_of(found), "auto") == expected


@pytest.mark.parametrize("how", ["batch", "cell_type"])
@pytest.mark.parametrize("found", [MATCHED, CONFOUNDED])
def test_what_is_asked_for_is_not_second_guessed(found, how):
    assert resolve_control_match(index_of(found), how) == how


def test_pools_by_batch_and_by_cell_type_hold_what_their_names_say():
    screen = read(counts_screen())
    index = indexed_only(screen)
    for by, shared in (("batch", ["cell_type", "batch"]), ("cell_type", ["cell_type"])):
        pools = match_controls(index, by)
        for condition in np.flatnonzero(~index.is_control):
            wanted = dict(zip(LABELS, index.labels(condition), strict=True))
            same = np.logical_and.reduce([screen.obs[name] == wanted[name] for name in shared])
            assert sorted(pools.rows(condition)) == np.flatnonzero(same & screen.is_control).tolist()
        assert all(pools.of[condition] == () for condition in np.flatnonzero(index.is_control))


def test_a_condition_without_controls_in_its_batch_is_named_with_the_setting_that_helps():
    expected = (
        "condition (perturbation 'A', cell type 'T', batch 'b3'; 2 cells) has no control cells of cell type 'T' and "
        "batch 'b3'. Set data.control_match=cell_type"
    )
    with pytest.raises(ValueError, match=re.escape(expected)):
        match_controls(index_of(PARTLY), "batch")
    match_controls(index_of(PARTLY), "cell_type")  # what the message advises works


@pytest.mark.parametrize("by", ["batch", "cell_type"])
def test_a_cell_type_without_any_control_is_not_told_to_widen_the_match(by):
    with pytest.raises(ValueError, match=r"batch 'b1'; 5 cells\) has no control cells of cell type 'B'") as error:
        match_controls(index_of([*MATCHED, ("A", "B", "b1", 5)]), by)
    assert "Add control cells of it, or drop these cells." in str(error.value)
    assert "control_match" not in str(error.value)
