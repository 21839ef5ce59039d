"""What is new in held-out conditions, and training conditions that are left out to be as new."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from perturbdiff.data.notation import Notation
from perturbdiff.training.design import MOST_FOLDS, Design, newness

PLAIN = Notation((), "+", "@", ("control",))


def every(perturbations, cell_types, batches, n=50):
    return dict.fromkeys(itertools.product(perturbations, cell_types, batches), n)


def parted(conditions, held_out):
    """Held-out and training conditions."""
    asked = {condition: n for condition, n in conditions.items() if held_out(*condition)}
    return asked, {condition: n for condition, n in conditions.items() if condition not in asked}


@pytest.mark.parametrize(
    ("condition", "new"),
    [
        (("C", "T", "b1"), "perturbation"), (("A+B", "T", "b1"), "combination"), (("A", "NK", "b1"), "cell type"),
        (("A", "T", "b3"), "batch"), (("A@2", "T", "b1"), "dose"), (("B+A@9", "NK", "b9"), "combination and cell type"),
        (("A+C", "T", "b3"), "combination and batch"), (("C+D", "T", "b1"), "perturbation"),
        (("C", "T", "b3"), "perturbation and batch"), (("C", "NK", "b1"), "perturbation and cell type"),
    ],
)  # fmt: skip
def test_what_is_new(condition, new):
    trained = every(["A", "B", "B@1"], ["T"], ["b1", "b2"])
    assert newness([condition], trained, PLAIN) == {condition: new}


def test_a_known_combination_in_another_order_is_known():
    assert newness([("B+A", "T", "b2")], every(["A+B"], ["T"], ["b1"]), PLAIN) == {("B+A", "T", "b2"): "batch"}


def test_batches_without_a_trained_condition_are_left_out_whole():
    asked, trained = parted(every("ABC", ["T", "NK"], ["b1", "b2", "b3"]), lambda p, c, b: b == "b2")
    design = Design.of(asked, trained, PLAIN, seed=0)
    assert (design.new, design.left_out, design.n_new) == ("batch", "batch", {"batch": 6})
    assert sorted(map(sorted, design.folds)) == [sorted(every("ABC", ["T", "NK"], [batch])) for batch in ("b1", "b3")]


def test_what_is_as_large_is_left_out_first():
    sizes = {"b1": 500, "b2": 40, "b3": 90, "b4": 3, "b5": 60}
    conditions = {("A", "T", batch): n for batch, n in sizes.items()}
    asked, trained = parted(conditions, lambda p, c, b: b == "b5")
    folds = Design.of(asked, trained, PLAIN, seed=0).folds
    # ln(90 / 60) is .405, as is ln(60 / 40); b4 has too few cells to say anything
    assert {fold[0][2] for fold in folds[:2]} == {"b2", "b3"}
    assert [fold[0][2] for fold in folds[2:]] == ["b1"]


def test_single_conditions_are_left_out_where_others_of_their_context_train():
    asked, trained = parted(every("ABCD", ["T", "NK"], ["all"]), lambda p, c, b: (p, c) in [("A", "T"), ("B", "T")])
    design = Design.of(asked, trained, PLAIN, seed=3)
    assert design.new == "cell type"
    for fold in design.folds:
        rest = trained.keys() - {*fold}
        # A and B are seen in NK alone: what stays there must not be all that is known of a perturbation
        assert set(newness(fold, rest, PLAIN).values()) == {"cell type"}
        assert len(fold) == 1  # a quarter of the six that train


def test_one_batch_alone_is_stood_for_by_cell_types():
    asked, trained = parted(every("AB", ["T", "NK", "B"], ["b1", "b2"]), lambda p, c, b: b == "b2")
    design = Design.of(asked, trained, PLAIN, seed=0)
    assert (design.new, design.left_out) == ("batch", "cell type")
    assert len(design.folds) == 3


def test_unseen_perturbations_are_left_out_in_every_context():
    asked, trained = parted(every("ABCDEFGHIJ", ["T"], ["b1", "b2"]), lambda p, c, b: p in "AB")
    design = Design.of(asked, trained, PLAIN, seed=1, described="ABCDEFGHIJ")
    assert design.new == "perturbation"
    assert len(design.folds) == 4
    for fold in design.folds:
        names = {p for p, _, _ in fold}
        assert len(names) == 2
        assert sorted(fold) == sorted(every(names, ["T"], ["b1", "b2"]))
    assert not {p for fold in design.folds for p, _, _ in fold} & {"A", "B"}
    assert design == Design.of(asked, trained, PLAIN, seed=1, described="ABCDEFGHIJ")
    assert design.folds != Design.of(asked, trained, PLAIN, seed=2, described="ABCDEFGHIJ").folds
    few = Design.of(asked, trained, PLAIN, seed=1, described="ABCDZ")
    assert [{p for p, _, _ in fold} for fold in few.folds] in ([{"C"}, {"D"}], [{"D"}, {"C"}])
    assert Design.of(asked, trained, PLAIN, seed=1).folds == ()  # nothing would be known of it


@pytest.mark.parametrize(("place", "new"), [(1, "perturbation and cell type"), (2, "perturbation and batch")])
def test_where_both_axes_are_new_both_are_left_out(place, new):
    where = "n1"
    types, batches = (["n1", "n2", "n3"], ["x"]) if place == 1 else (["x"], ["n1", "n2", "n3"])
    asked, trained = parted(every("ABCDEFGH", types, batches), lambda p, c, b: p in "AB" or where in (c, b))
    asked = {of: n for of, n in asked.items() if of[0] in "AB" and of[place] == where}
    design = Design.of(asked, trained, PLAIN, seed=0, described="ABCDEFGH")
    assert (design.new, design.left_out, design.n_new) == (new, new, {new: 2})
    assert design.folds
    for fold in design.folds:
        names, places = {of[0] for of in fold}, {of[place] for of in fold}
        assert len(places) == 1
        assert places < {"n2", "n3"}
        # Nothing of these perturbations is left, and nothing of this place.
        rest = [of for of in trained if of[0] not in names and of[place] not in places]
        assert set(newness(fold, rest, PLAIN).values()) == {new}
        assert sorted(fold) == sorted(of for of in trained if of[0] in names and of[place] in places)


def test_where_both_axes_are_new_and_one_place_trains_perturbations_stand_for_it():
    asked, trained = parted(every("ABCDEFGH", ["T", "NK"], ["x"]), lambda p, c, b: p == "A" or c == "NK")
    asked = {("A", "NK", "x"): 50}
    design = Design.of(asked, trained, PLAIN, seed=0, described="ABCDEFGH")
    assert (design.new, design.left_out) == ("perturbation and cell type", "perturbation")


def test_combinations_in_a_new_cell_type_are_left_out_with_one():
    _, trained = parted(
        every(["A", "B", "C", "A+B", "A+C", "B+C"], ["T", "NK", "B"], ["x"]), lambda p, c, b: p == "A+B" or c == "NK"
    )
    design = Design.of({("A+B", "NK", "x"): 50}, trained, PLAIN, seed=0)
    assert design.left_out == "combination and cell type"
    assert {of[0] for fold in design.folds for of in fold} == {"A+C", "B+C"}
    assert all(len({of[1] for of in fold}) == 1 for fold in design.folds)


def test_combinations_are_stood_for_by_combinations_alone():
    asked, trained = parted(every(["A", "B", "C", "A+B", "A+C"], ["T"], ["b"]), lambda p, c, b: p == "A+B")
    design = Design.of(asked, trained, PLAIN, seed=0)
    assert design.new == "combination"
    assert design.folds == ((("A+C", "T", "b"),),)
    asked, trained = parted(every(["A", "B", "A+B"], ["T"], ["b"]), lambda p, c, b: p == "A+B")
    assert Design.of(asked, trained, PLAIN, seed=0).folds == ()
    asked, trained = parted(every(["A", "B", "A+B", "A+C"], ["T"], ["b"]), lambda p, c, b: p == "A+B")
    assert Design.of(asked, trained, PLAIN, seed=0).folds == ()  # of C nothing else is known
    assert Design.of(asked, trained, PLAIN, seed=0, described="C").folds == ((("A+C", "T", "b"),),)


def test_doses_are_left_out_where_there_are_several():
    asked, trained = parted(every(["A@1", "A@2", "A@3", "B"], ["T"], ["b"]), lambda p, c, b: p == "A@2")
    design = Design.of(asked, trained, PLAIN, seed=0)
    assert design.new == "dose"
    assert {condition for fold in design.folds for condition in fold} == {("A@1", "T", "b"), ("A@3", "T", "b")}


def test_most_of_them_say_what_is_new():
    asked, trained = parted(every("ABC", ["T"], ["b1", "b2"]), lambda p, c, b: p == "A" or b == "b1")
    assert Design.of(asked, trained, PLAIN, seed=0).new in ("perturbation", "batch")
    assert Design.of(asked, trained, PLAIN, seed=0).n_new == {
        "perturbation": 1, "perturbation and batch": 1, "batch": 2,
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_folds_are_as_new_as_they_say_whatever_the_design(seed):
    generator = np.random.default_rng(seed)
    names = [f"g{i}" for i in range(generator.integers(1, 6))]
    names += [f"{a}+{b}" for a, b in itertools.combinations(names, 2) if generator.random() < 0.4]
    names += [f"{a}@{dose}" for a in names if "+" not in a for dose in (1, 5) if generator.random() < 0.3]
    cell_types = [f"t{i}" for i in range(generator.integers(1, 4))]
    batches = [f"b{i}" for i in range(generator.integers(1, 4))]
    conditions = {c: int(generator.integers(1, 200)) for c in every(names, cell_types, batches)}
    kept = {c: n for c, n in conditions.items() if generator.random() < 0.8} or conditions
    asked = {c: n for c, n in kept.items() if generator.random() < 0.3} or dict(list(kept.items())[:1])
    trained = {c: n for c, n in kept.items() if c not in asked}
    design = Design.of(asked, trained, PLAIN, seed)
    assert sum(design.n_new.values()) == len(asked)
    assert len(design.folds) <= MOST_FOLDS
    for fold in design.folds:
        assert fold
        assert {*fold} < trained.keys()
        assert set(newness(fold, trained.keys() - {*fold}, PLAIN).values()) == {design.left_out}
