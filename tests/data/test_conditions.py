import re
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perturbdiff.data.conditions import ConditionIndex, Groups, control_note, match_controls, resolve_control_match
from perturbdiff.data.samplers import draw_controls
from tests.screens import counts_screen, read, screen_with_cells

LABELS = ["perturbation", "cell_type", "batch"]
PROPERTY = settings(derandomize=True)
NAMES = {
    "perturbation": ["A", "B+A", "control", "b", "ä", "10", "9"],
    "cell_type": ["T", "NK", "t cell"],
    "batch": ["b2", "b10", ""],
}


@st.composite
def conditions(draw, max_size=12):
    """Different (perturbation, cell_type, batch, n), in any order; with and without controls."""
    labels = st.tuples(*(st.sampled_from(NAMES[name]) for name in LABELS))
    chosen = draw(st.lists(labels, max_size=max_size, unique=True))
    return [(*label, draw(st.integers(1, 12))) for label in chosen]


def expanded(found):
    """Labels of the cells of conditions, one after the other."""
    return pd.DataFrame([label for *label, n in found for _ in range(n)], columns=LABELS, dtype=object)


def index_of_conditions(found):
    """The index of cells that lie as their conditions do."""
    columns = [[c[i] for c in found] for i in range(3)]
    is_control = np.array([c[0] == "control" for c in found], bool)
    return ConditionIndex.from_conditions(*columns, is_control, np.array([c[3] for c in found], np.int64))


def as_dict(index):
    """Every number of an index, condition by condition, by what it means."""
    return [
        (index.labels(c), index.cells(c).tolist(), int(index.n_cells[c]), bool(index.is_control[c]))
        for c in range(len(index))
    ]


def rows_by_label(cells):
    """The rows of each condition, by a plain loop."""
    rows = {}
    for row, label in enumerate(cells[LABELS].itertuples(index=False, name=None)):
        rows.setdefault(label, []).append(row)
    return rows


# ---------------------------------------------------------------- the index


@PROPERTY
@given(conditions(max_size=6).map(lambda found: [*found, ("control", "B", "b", 2)]), st.data())
def test_the_condition_index_of_a_screen_equals_a_pandas_groupby(found, data):
    screen = read(screen_with_cells([(p, c, b or "none", n) for p, c, b, n in found], n_genes=2))
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


@PROPERTY
@given(conditions(), st.randoms(use_true_random=False))
def test_the_index_of_labels_in_any_order_holds_the_rows_of_each_condition_in_order(found, random):
    cells = expanded(found)
    order = list(range(len(cells)))
    random.shuffle(order)
    for some in (cells, cells.iloc[order].reset_index(drop=True), cells.sort_values(["cell_type", "batch", *LABELS])):
        index = ConditionIndex.from_labels(*(some[name] for name in LABELS), "control")
        expected = rows_by_label(some)
        sorted_labels = sorted(expected, key=lambda label: (label[1], label[2], label[0]))
        assert as_dict(index) == [
            (label, expected[label], len(expected[label]), label[0] == "control") for label in sorted_labels
        ]


@PROPERTY
@given(conditions(), st.randoms(use_true_random=False))
def test_categoricals_with_unused_and_unsorted_categories_give_the_index_of_their_strings(found, random):
    cells = expanded(found)
    categorical = {}
    for name in LABELS:
        categories = [*NAMES[name], "never", "0"]
        random.shuffle(categories)
        categorical[name] = pd.Categorical(cells[name], categories=categories, ordered=random.random() < 0.5)
    of_strings = ConditionIndex.from_labels(*(cells[name].to_numpy() for name in LABELS), "control")
    for given_as in (categorical.values(), [pd.Series(c) for c in categorical.values()]):
        index = ConditionIndex.from_labels(*given_as, "control")
        assert as_dict(index) == as_dict(of_strings)
        assert index.names == of_strings.names == tuple(tuple(sorted(set(cells[name]))) for name in LABELS)


@pytest.mark.parametrize("n_labels", [2, 60])  # sorted by counting, and by comparing
def test_rows_stay_in_order_whether_cells_have_few_labels_or_many(n_labels):
    rng = np.random.default_rng(0)
    cells = pd.DataFrame(np.tile(rng.integers(n_labels, size=(100, 3)), (3, 1)).astype(str), columns=LABELS)
    index = ConditionIndex.from_labels(*(cells[name] for name in LABELS), "1")
    assert {index.labels(c): index.cells(c).tolist() for c in range(len(index))} == rows_by_label(cells)


def test_cells_that_lie_in_order_need_no_number_each():
    cells = expanded([("A", "NK", "b", 3), ("control", "NK", "b", 2), ("A", "T", "b", 4)])
    assert ConditionIndex.from_labels(*(cells[name] for name in LABELS), "control").rows is None
    assert ConditionIndex.from_labels(*(cells[::-1][name] for name in LABELS), "control").rows is not None


def test_labels_that_sort_differently_than_they_are_counted_stay_apart():
    found = [("control", "T", "b", 1), ("10", "T", "b", 2), ("9", "T", "b", 3), ("ä", "T", "b", 4), ("a", "T", "b", 5)]
    index = index_of(found)
    assert {index.labels(c)[0]: int(index.n_cells[c]) for c in range(len(index))} == {p: n for p, _, _, n in found}


def test_no_cells_and_one_cell_have_an_index():
    for labels in ([], ["control"], ["A"]):
        index = ConditionIndex.from_labels(labels, ["T"] * len(labels), ["b"] * len(labels), "control")
        assert as_dict(index) == [((label, "T", "b"), [0], 1, label == "control") for label in labels]
        assert len(match_controls(index, "batch", np.zeros(len(index), bool)).groups) == labels.count("control")


@PROPERTY
@given(conditions())
def test_the_index_of_conditions_is_that_of_their_cells(found):
    index = index_of_conditions(found)
    expected = rows_by_label(expanded(found))
    assert as_dict(index) == [((p, c, b), expected[p, c, b], n, p == "control") for p, c, b, n in found]
    in_order = sorted(found, key=lambda c: (c[1], c[2], c[0]))
    cells = expanded(in_order)
    assert as_dict(index_of_conditions(in_order)) == as_dict(
        ConditionIndex.from_labels(*(cells[name] for name in LABELS), "control")
    )


@PROPERTY
@given(st.lists(conditions(max_size=5), min_size=1, max_size=4), st.integers(0, 50))
def test_sources_one_after_the_other_keep_their_labels_and_get_their_rows(sources, gap):
    lengths = [sum(c[3] for c in found) for found in sources]
    first_rows = [sum(lengths[:i]) + i * gap for i in range(len(sources))]
    index = ConditionIndex.concat([index_of_conditions(found) for found in sources], first_rows)
    expected = [
        (label, [row + first for row in rows], len(rows), label[0] == "control", i)
        for i, (found, first) in enumerate(zip(sources, first_rows, strict=True))
        for label, rows in rows_by_label(expanded(found)).items()
    ]
    assert [(*of, int(source)) for of, source in zip(as_dict(index), index.source, strict=True)] == expected
    for i in range(3):
        assert index.names[i] == tuple(sorted({c[i] for found in sources for c in found}))


@PROPERTY
@given(conditions(), st.randoms(use_true_random=False))
def test_selected_conditions_are_those_asked_for(found, random):
    cells = expanded(found).sample(frac=1, random_state=random.randrange(100))
    for index in (
        ConditionIndex.from_labels(*(cells[name].to_numpy() for name in LABELS), "control"),
        index_of_conditions(found),
    ):
        mask = np.array([random.random() < 0.5 for _ in range(len(index))], bool)
        expected = [one for one, chosen in zip(as_dict(index), mask, strict=True) if chosen]
        assert as_dict(index.select(mask)) == expected
        assert as_dict(index.select(np.flatnonzero(mask))) == expected


@PROPERTY
@given(conditions(), st.data())
def test_conditions_cut_at_shards_keep_every_cell_once_in_order(found, data):
    n = sum(c[3] for c in found)
    inner = data.draw(st.lists(st.integers(1, max(n - 1, 1)), max_size=8, unique=True))
    borders = np.array(sorted({0, *(b for b in inner if b < n)}), np.int64)
    chosen = np.array([data.draw(st.booleans()) for _ in found], bool)
    index = index_of_conditions(found).select(chosen)
    cut = index.cut(borders)
    expected = []  # (label, shard, rows), by a plain loop over cells
    for c in range(len(index)):
        for row in index.cells(c).tolist():
            shard = sum(border <= row for border in borders.tolist()) - 1
            if not expected or expected[-1][:2] != (index.labels(c), shard):
                expected.append((index.labels(c), shard, []))
            expected[-1][2].append(row)
    shards = cut.by_shard(borders).source.tolist()
    assert [(label, shard, rows) for (label, rows, _, _), shard in zip(as_dict(cut), shards, strict=True)] == expected
    assert all(cut.is_control == [label[0] == "control" for label, _, _ in expected])
    assert cut.n_cells.tolist() == [len(rows) for _, _, rows in expected]


@PROPERTY
@given(conditions(), st.data())
def test_groups_hold_the_cells_of_their_conditions_one_after_the_other(found, data):
    index = index_of_conditions(found)
    chosen = np.array(sorted(data.draw(st.sets(st.integers(0, len(found) - 1)) if found else st.just(set()))), np.int64)
    keys = np.array([data.draw(st.integers(0, 3)) for _ in chosen], np.int64)
    groups = Groups.by(index, chosen, keys)
    assert len(groups) == len(groups.n_cells) == len(set(keys.tolist()))
    for group, key in enumerate(sorted(set(keys.tolist()))):
        members = chosen[keys == key].tolist()
        rows = [row for condition in members for row in index.cells(condition).tolist()]
        assert groups.in_group(group).tolist() == members
        assert groups.n_cells[group] == len(rows)
        places = np.array(data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=8)), np.int64)
        assert groups.rows(group, places).tolist() == [rows[place] for place in places]
        assert groups.rows(group, np.arange(len(rows))).tolist() == rows


# ---------------------------------------------------------------- which controls match


MATCHED = [("control", "T", "b1", 3), ("control", "T", "b2", 4), ("A", "T", "b1", 2)]
CONFOUNDED = [("control", "T", "b1", 3), ("A", "T", "b2", 2), ("control", "NK", "b1", 3), ("A", "NK", "b2", 2)]
PARTLY = [*MATCHED, ("A", "T", "b3", 2)]


def index_of(found):
    screen = read(screen_with_cells(found, n_genes=2))
    return ConditionIndex.build(screen, np.ones(len(screen), bool))


@PROPERTY
@given(st.lists(conditions(max_size=8), min_size=1, max_size=3), st.sampled_from(["batch", "cell_type"]))
def test_controls_are_all_those_of_the_same_source_and_context_and_no_others(sources, by):
    first_rows = np.cumsum([0, *(sum(c[3] for c in found) for found in sources)])[:-1].tolist()
    index = ConditionIndex.concat([index_of_conditions(found) for found in sources], first_rows)

    def context(c):
        return (index.source[c], *index.labels(c)[1 : 3 if by == "batch" else 2])

    controls = {}
    for c in range(len(index)):
        if index.is_control[c]:
            controls.setdefault(context(c), []).extend(index.cells(c).tolist())
    perturbed = np.flatnonzero(~index.is_control).tolist()
    lacking = [c for c in perturbed if context(c) not in controls]
    if lacking:
        with pytest.raises(ValueError, match="has no control cells of cell type") as error:
            match_controls(index, by)
        p, c, b = index.labels(lacking[0])
        assert f"(perturbation {p!r}, cell type {c!r}, batch {b!r}; {index.n_cells[lacking[0]]} cells)" in str(
            error.value
        )
    needed = np.array([c not in lacking for c in range(len(index))], bool)
    pools = match_controls(index, by, needed)
    for c in range(len(index)):
        if c in lacking or index.is_control[c]:
            assert pools.of[c] == -1
        else:
            assert pools.rows(c).tolist() == controls[context(c)]
            assert pools.groups.n_cells[pools.of[c]] == len(controls[context(c)])


@PROPERTY
@given(conditions(max_size=10), st.integers(1, 15), st.data())
def test_controls_of_the_own_shard_are_preferred_where_there_are_enough_of_them(found, at_least, data):
    found = [("control", c, b, 1) for c in NAMES["cell_type"] for b in NAMES["batch"]] + [
        c for c in found if c[0] != "control" or data.draw(st.booleans())
    ]
    n = sum(c[3] for c in found)
    borders = np.array(sorted({0, *data.draw(st.lists(st.integers(1, n - 1), max_size=5))}), np.int64)
    index = index_of_conditions(found).cut(borders)
    shard = index.by_shard(borders)
    everywhere = match_controls(index, "cell_type")
    local = match_controls(shard, "cell_type", np.zeros(len(index), bool))
    pools = everywhere.preferring(local, at_least)
    for c in range(len(index)):
        if index.is_control[c]:
            assert pools.of[c] == -1
            continue
        of_type = [d for d in range(len(index)) if index.is_control[d] and index.codes[d, 1] == index.codes[c, 1]]
        here = [row for d in of_type if shard.source[d] == shard.source[c] for row in index.cells(d).tolist()]
        there = [row for d in of_type for row in index.cells(d).tolist()]
        assert sorted(pools.rows(c).tolist()) == sorted(here if len(here) >= at_least else there)


def test_controls_of_several_batches_are_used_equally_often():
    found = [("control", "T", f"b{i}", n) for i, n in enumerate([1, 2, 10, 27])] + [("A", "T", "b0", 5)]
    index = index_of_conditions(found)
    pools = match_controls(index, "cell_type")
    pool = pools.of[len(found) - 1]
    drawn = Counter(
        row
        for key in range(400)
        for row in pools.groups.rows(pool, draw_controls(int(pools.groups.n_cells[pool]), 5, 0, key)).tolist()
    )
    assert set(drawn) == set(range(40))
    assert ((np.array([drawn[row] for row in range(40)]) - 50) ** 2 / 50).sum() < 80.1  # 39 degrees of freedom, 1e-4


@pytest.mark.parametrize(("found", "expected"), [(MATCHED, "batch"), (CONFOUNDED, "cell_type"), (PARTLY, "batch")])
def test_auto_matches_by_batch_unless_no_batch_holds_both_controls_and_perturbed_cells(found, expected):
    assert resolve_control_match(index_of(found), "auto") == expected


@pytest.mark.parametrize("how", ["batch", "cell_type"])
@pytest.mark.parametrize("found", [MATCHED, CONFOUNDED])
def test_what_is_asked_for_is_not_second_guessed(found, how):
    assert resolve_control_match(index_of(found), how) == how


def test_pools_by_batch_and_by_cell_type_hold_what_their_names_say():
    screen = read(counts_screen())
    index = ConditionIndex.build(screen, np.ones(len(screen), bool))
    for by, shared in (("batch", ["cell_type", "batch"]), ("cell_type", ["cell_type"])):
        pools = match_controls(index, by)
        for condition in np.flatnonzero(~index.is_control):
            wanted = dict(zip(LABELS, index.labels(condition), strict=True))
            same = np.logical_and.reduce([screen.obs[name] == wanted[name] for name in shared])
            assert sorted(pools.rows(condition)) == np.flatnonzero(same & screen.is_control).tolist()
        assert all(pools.of[condition] == -1 for condition in np.flatnonzero(index.is_control))


def test_a_condition_without_controls_in_its_batch_is_named_with_the_setting_that_helps():
    expected = (
        "condition (perturbation 'A', cell type 'T', batch 'b3'; 2 cells) has no control cells of cell type 'T' and "
        "batch 'b3'. Set data.control_match=cell_type"
    )
    with pytest.raises(ValueError, match=re.escape(expected)):
        match_controls(index_of(PARTLY), "batch")
    match_controls(index_of(PARTLY), "cell_type")  # what the message advises works


def test_what_controls_leave_open_is_noted():
    def note(*found, **settings):
        return control_note(read(screen_with_cells(found), **settings))

    both = [("control", "T", "b1", 4), ("A", "T", "b1", 3)]
    assert note(*both) == ""
    lacking = note(*both, ("A", "B", "b1", 5), ("C", "B", "b1", 2))
    assert "has no control cells of cell type 'B' and batch 'b1', nor have 1 other conditions." in lacking
    apart = [("control", "T", "b1", 4), ("A", "T", "b2", 3)]
    assert note(*apart).startswith("No batch holds both controls and perturbed cells")
    assert note(*apart, control_match="cell_type") == ""
    assert note(("control", "T", "b1", 4)) == ""


@pytest.mark.parametrize("by", ["batch", "cell_type"])
def test_a_cell_type_without_any_control_is_not_told_to_widen_the_match(by):
    with pytest.raises(ValueError, match=r"batch 'b1'; 5 cells\) has no control cells of cell type 'B'") as error:
        match_controls(index_of([*MATCHED, ("A", "B", "b1", 5)]), by)
    assert "Add control cells of it, or drop these cells." in str(error.value)
    assert "control_match" not in str(error.value)
