import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perturbdiff.data.notation import Notation, dose_text, split_dose

GEARS = ("FOSB+ctrl", "ctrl+FOSB", "CEBPE+ctrl", "FOSB+CEBPE", "ctrl")


def learned(*labels, separator="+", dose=None, controls=("ctrl",), names=()):
    return Notation.learned(labels, separator, dose, controls, names)


def names_of(notation, label):
    return [name for name, _ in notation.parse(label)]


def test_a_part_that_is_the_control_label_is_no_part():
    notation = learned(*GEARS)
    assert set(notation.names) == {"FOSB", "CEBPE"}
    assert {notation.canonical(label) for label in ("FOSB+ctrl", "ctrl+FOSB", "FOSB")} == {"FOSB"}
    assert notation.parse("ctrl") == notation.parse("ctrl+ctrl") == ()
    assert notation.canonical("ctrl+ctrl") == "ctrl"
    assert notation.canonical("FOSB+CEBPE") == "CEBPE+FOSB"


def test_parts_have_no_order_and_are_there_once():
    notation = learned("CBL", "CNN1", "CBL+CNN1", "CNN1+CBL", "KLF1+KLF1")
    assert notation.canonical("CNN1+CBL") == notation.canonical("CBL+CNN1") == "CBL+CNN1"
    assert notation.canonical("KLF1+KLF1") == "KLF1"
    assert notation.canonical("CBL + CNN1+CBL") == "CBL+CNN1"


@pytest.mark.parametrize(
    "name", ["(+)-JQ1", "Na+", "+", "1,2-diol", "CD3+CD28", "chr8:128746000-128747000", "+A", "A++B", "a@b"]
)
def test_a_name_that_holds_the_separator_stays_whole(name):
    notation = learned(name, "A", f"{name}+A", dose="@")
    assert notation.parse(name) == ((name, None),)
    if name != "A++B":  # of which "A" stands alone
        assert sorted(names_of(notation, f"{name}+A")) == sorted({name, "A"})
    assert notation.canonical(f"A+{name}") == notation.canonical(f"{name}+A")


def test_a_name_of_which_one_part_stands_nowhere_else_stays_whole_in_any_order():
    notation = learned("A", "A+X", "X+A")
    assert notation.canonical("A+X") == notation.canonical("X+A") == "A+X"
    assert names_of(notation, "A+X") == ["A+X"]
    assert names_of(learned("A", "A+X", names=["X"]), "A+X") == ["A", "X"]  # as a gene of the file


def test_nothing_is_split_without_a_separator():
    notation = learned("A", "B", "A+B", separator=None)
    assert names_of(notation, "A+B") == ["A+B"]


@pytest.mark.parametrize(
    ("label", "parts"),
    [
        ("A@0.50", (("A", 0.5),)), ("A@5e-1", (("A", 0.5),)), ("A@1e+06", (("A", 1e6),)),
        ("A@1e+06+B@2", (("A", 1e6), ("B", 2.0))), ("B@2+A@1", (("A", 1.0), ("B", 2.0))),
        ("ctrl@0+B@3", (("B", 3.0),)), ("A@1+A@2", (("A", 1.0), ("A", 2.0))), ("A", (("A", None),)),
    ],
)  # fmt: skip
def test_doses_are_numbers(label, parts):
    assert learned("A@1e+06", "A@0.5", "B@2", dose="@").parse(label) == parts


@pytest.mark.parametrize("dose", ["0", "-1", "inf", "nan", "1e400"])
def test_a_dose_that_is_none_is_an_error(dose):
    with pytest.raises(ValueError, match="finite and greater than 0"):
        learned(f"A@{dose}", dose="@")


def test_the_dose_is_behind_the_last_separator_and_must_be_a_number():
    assert split_dose("A@B@2", "@") == ("A@B", 2.0)
    assert split_dose("A@B", "@") == ("A@B", None)
    assert split_dose("@2", "@") == ("@2", None)
    assert split_dose("A@0.5", None) == ("A@0.5", None)


@given(st.floats(min_value=1e-12, max_value=1e12))
@settings(derandomize=True)
def test_a_dose_is_written_so_that_it_is_read_back_and_holds_no_separator(dose):
    assert float(dose_text(dose)) == dose
    assert not set(dose_text(dose)) & set("+-eE")


SINGLES = ["A", "B", "(+)-JQ1", "1,2-diol", "CD4", "nan"]


@given(st.lists(st.lists(st.sampled_from([*SINGLES, "ctrl"]), min_size=1, max_size=4), min_size=1, max_size=8))
@settings(derandomize=True)
def test_a_label_is_the_set_of_what_it_was_made_of(found):
    """Whatever the order of its parts, however often they come, and whichever labels are beside it."""
    labels = ["+".join(parts) for parts in found]
    notation = learned(*SINGLES, *labels)
    for label, parts in zip(labels, found, strict=True):
        assert names_of(notation, label) == sorted(set(parts) - {"ctrl"})
        canonical = notation.canonical(label)
        assert notation.canonical(canonical) == canonical
        assert {notation.canonical("+".join(order)) for order in itertools.permutations(parts)} == {canonical}


@given(st.lists(st.text("AB+@1e(", max_size=8), min_size=1, max_size=12), st.sampled_from([None, "@"]))
@settings(derandomize=True)
def test_what_was_written_in_one_way_is_read_again_as_the_same(labels, dose):
    try:
        notation = learned(*labels, dose=dose)
        written = {label: notation.canonical(label) for label in labels}
        again = learned(*written.values(), dose=dose)
    except ValueError:  # a dose of 0
        return
    for label, canonical in written.items():
        assert notation.parse(canonical) == notation.parse(label)
        assert again.canonical(canonical) == canonical


def test_space_around_labels_and_parts_says_nothing():
    notation = learned("A", " A", "X + Y", "Y+X ", "A + ctrl")
    assert set(notation.names) == {"A", "X + Y"}
    assert notation.canonical("A ") == notation.canonical("A+ctrl") == "A"
    assert notation.canonical(" Y+X") == notation.canonical("X+Y") == "X + Y"
