import numpy as np
import pandas as pd
import pytest

from perturbdiff.config import DataConfig, SplitConfig
from perturbdiff.data.notation import Notation
from perturbdiff.data.screen import Screen
from perturbdiff.data.selectors import Selectors
from perturbdiff.data.splits import make_split, read_split, write_split
from tests.screens import read, screen_with_cells

ODD = [
    "chr8:128746000-128747000", "1,2-diol", "(+)-JQ1", "x=1", "A", "B", "A+B", "B+(+)-JQ1", "# 5", "nan", "*", "T:b1",
]  # fmt: skip


def odd_screen():
    return read(screen_with_cells([(p, t, b, 2) for p in ("control", *ODD) for t in ("T", "CD4:naive") for b in "xy"]))


@pytest.mark.parametrize("name", [name for name in ODD if name != "*"])
@pytest.mark.parametrize("context", ["", ":T", ":CD4:naive", ":CD4:naive:x", ":*:y", ":cell_type=T"])
def test_any_label_can_be_named_and_its_contexts(name, context):
    screen = odd_screen()
    obs = screen.obs
    wanted = (obs["perturbation"] == screen.notation.canonical(name)).to_numpy()
    if "T" in context:
        wanted &= (obs["cell_type"] == "T").to_numpy()
    if "naive" in context:
        wanted &= (obs["cell_type"] == "CD4:naive").to_numpy()
    if context[-2:] in (":x", ":y"):
        wanted &= (obs["batch"] == context[-1]).to_numpy()
    np.testing.assert_array_equal(Selectors(obs, screen.notation, ~screen.is_control).rows(name + context), wanted)
    assert wanted.sum() > 0


def labels_of(screen, selector):
    return set(screen.obs["perturbation"][Selectors(screen.obs, screen.notation, ~screen.is_control).rows(selector)])


def test_a_perturbation_is_meant_at_every_dose_and_in_any_order():
    labels = ["A@0.5", "A@1e+06", "B@2", "A@1+B@2", "B@3+A@1"]
    screen = Screen.read(
        screen_with_cells([(p, "T", "b", 2) for p in ("control", *labels)]), DataConfig(dose_separator="@")
    )
    assert labels_of(screen, "A") == {"A@0.5", "A@1000000"}
    assert labels_of(screen, "A@1000000.0") == {"A@1000000"}
    assert labels_of(screen, "B+A") == {"A@1+B@2", "A@1+B@3"}
    assert labels_of(screen, "B@3+A") == {"A@1+B@3"}
    assert labels_of(screen, "A+*") == {"A@0.5", "A@1000000", "A@1+B@2", "A@1+B@3"}
    assert labels_of(screen, "A@1+*") == {"A@1+B@2", "A@1+B@3"}
    assert labels_of(screen, "A@7") == labels_of(screen, "A@0") == labels_of(screen, "C") == set()


def test_without_a_separator_labels_are_text():
    obs = pd.DataFrame({"perturbation": ["A+B", "B+A", "A"], "cell_type": "T", "batch": "b"})
    selectors = Selectors(obs, Notation((), None))
    assert selectors.rows("A+B").tolist() == [True, False, False]
    assert selectors.rows("A+*").tolist() == [False] * 3


def combined():
    found = [("control", "T", "b", 4), ("A", "T", "b", 3), ("B", "T", "b", 3), ("A+B", "T", "b", 5), ("C", "T", "b", 3)]
    return read(screen_with_cells(found))


def test_a_single_that_is_held_out_while_its_combination_trains_is_said():
    screen = combined()
    (note,) = make_split(screen, SplitConfig(["A"], [], 0.0), 0).notes
    assert note == "A is held out, but 5 cells of A+B train; A+* holds out every condition that has it"
    assert make_split(screen, SplitConfig(["A+*"], [], 0.0), 0).notes == ()
    assert make_split(screen, SplitConfig(["A+B"], [], 0.0), 0).notes == ()
    split = make_split(screen, SplitConfig(["A+*"], [], 0.0), 0)
    assert set(screen.obs["perturbation"][split.test]) == {"A", "A+B"}


def test_all_of_a_cell_type_but_some_is_held_out(tmp_path):
    screen = read(screen_with_cells([(p, t, "b", 3) for p in ("control", "A", "B", "C") for t in ("T", "NK")]))
    config = SplitConfig(["*:T"], ["*:NK"], 0.0, train=["B:T", "A:NK", "C:NK"])
    split = make_split(screen, config, 0)
    chosen = {part: set(map(tuple, screen.obs[getattr(split, part) & ~screen.is_control].iloc[:, :2].to_numpy()))
              for part in ("train", "validation", "test")}  # fmt: skip
    assert chosen == {
        "train": {("B", "T"), ("A", "NK"), ("C", "NK")}, "validation": {("B", "NK")}, "test": {("A", "T"), ("C", "T")},
    }  # fmt: skip
    write_split(split, screen, tmp_path / "split.json")
    assert read_split(tmp_path / "split.json", screen).config.train == config.train
    with pytest.raises(ValueError, match="leaves nothing held out"):
        make_split(screen, SplitConfig(["B:T"], [], 0.0, train=["B"]), 0)
