import json

import numpy as np
import pytest

from perturbdiff.config import SplitConfig
from perturbdiff.data.split_files import read_split_file
from perturbdiff.data.splits import make_split, write_split
from tests.screens import read, screen_with_cells

CELL_LOAD = """
[datasets]
study = "/data/study"
[training]
study = "train"
[zeroshot]
"study.NK" = "test"
"study.CD14 Mono.1" = "val"
[fewshot]
[fewshot."study.T"]
val = ["C"]
test = ["A", "no", "chr8:1-2"]
"""
REFERENCE = """
pbmc:
  control_pert: PBS
  holdout_{contexts}: [{names}]
  holdout_pert:
    validation: [0.10]
    test: [A, no]
"""
NAMES = ["A", "B", "C", "no", "0.10", "chr8:1-2"]


@pytest.fixture
def screen():
    contexts = [("T", "d1"), ("NK", "d1"), ("CD14 Mono.1", "d2"), ("T", "d2")]
    return read(screen_with_cells([(p, *context, 2) for p in ("control", *NAMES) for context in contexts]))


def held_out(screen, path, **settings):
    split = make_split(screen, SplitConfig(validation_fraction=0.0, file=str(path), **settings), 0)
    of = {
        part: set(map(tuple, screen.obs[getattr(split, part)].iloc[:, :3].to_numpy()))
        for part in ("test", "validation")
    }
    return of["test"], of["validation"], split


def test_a_toml_of_cell_load_holds_out_cell_types_and_lists(tmp_path, screen):
    (tmp_path / "split.toml").write_text(CELL_LOAD)
    test, validation, split = held_out(screen, tmp_path / "split.toml")
    assert test == {(p, "NK", "d1") for p in NAMES} | {
        (p, "T", d) for p in ("A", "no", "chr8:1-2") for d in ("d1", "d2")
    }
    assert validation == {(p, "CD14 Mono.1", "d2") for p in NAMES} | {("C", "T", "d1"), ("C", "T", "d2")}
    assert split.notes == ()
    assert split.config.file is None
    assert "*:NK" in split.config.hold_out


@pytest.mark.parametrize(
    ("contexts", "names", "where"),
    [("celltype", "NK", [("NK", "d1")]), ("batches", "d2", [("CD14 Mono.1", "d2"), ("T", "d2")])],
)
def test_a_yaml_of_the_reference_holds_out_perturbations_in_cell_types_or_batches(
    tmp_path, screen, contexts, names, where
):
    (tmp_path / "split.yaml").write_text(REFERENCE.format(contexts=contexts, names=names))
    test, validation, _ = held_out(screen, tmp_path / "split.yaml")
    assert test == {(p, *context) for p in ("A", "no") for context in where}
    assert validation == {("0.10", *context) for context in where}


def test_the_split_of_a_run_is_taken_up_condition_by_condition(tmp_path, screen):
    first = make_split(screen, SplitConfig(["A:T", "chr8:1-2:NK"], [], 0.3), 1)
    assert first.validation.any()
    write_split(first, screen, tmp_path / "split.json")
    *_, again = held_out(screen, tmp_path / "split.json")
    assert (again.test == first.test).all()
    assert (again.validation == first.validation).all()


def test_conditions_that_are_not_in_the_data_are_counted_and_all_of_them_are_an_error(tmp_path, screen):
    (tmp_path / "split.toml").write_text('[fewshot."x.T"]\ntest = ["A", "ZZ", "YY"]')
    assert held_out(screen, tmp_path / "split.toml")[2].notes == (
        "2 conditions of the split file are not in the data: YY:T, ZZ:T",
    )
    (tmp_path / "split.toml").write_text('[fewshot."x.T"]\ntest = ["ZZ", "YY"]')
    with pytest.raises(ValueError, match=r"has none of the 2 conditions.*no perturbed cell has perturbation 'ZZ'"):
        held_out(screen, tmp_path / "split.toml")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.toml", "[zeroshot]\nT = 'test'"), ("x.toml", "= ="), ("x.toml", '[zeroshot]\n"a.T" = "elsewhere"'),
        ("x.toml", '[fewshot."a.T"]\ntest = "A"'), ("x.yaml", "holdout_pert: [A]"), ("x.yaml", "a: {b: 1}"),
        ("x.yaml", "!!python/object/apply:os.system ['echo']"), ("x.yaml", "&a [*a]"), ("x.json", "[" * 5000),
        ("x.json", json.dumps({"conditions": {"test": [{}], "validation": []}})), ("x.txt", ""), ("x.toml", ""),
    ],
)  # fmt: skip
def test_other_files_are_refused_in_one_line(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r"give a \.toml of cell-load, a \.yaml of the reference") as error:
        read_split_file(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_split_file(tmp_path / "no.toml")


def test_a_yaml_that_refers_to_itself_many_times_is_soon_read(tmp_path):
    lines = [
        "a0: &a0 {x: 1}",
        *(f"a{i}: &a{i} {{{', '.join(f'k{j}: *a{i - 1}' for j in range(9))}}}" for i in range(1, 12)),
    ]
    (tmp_path / "x.yaml").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="is not a split file"):
        read_split_file(tmp_path / "x.yaml")


def test_data_sets_of_cell_load_are_the_sources_of_an_atlas_and_may_hold_dots(tmp_path, screen):
    (tmp_path / "split.toml").write_text(
        '[datasets]\n"rep.v1" = "x"\nnadig = "y"\n[zeroshot]\n"rep.v1.T" = "test"\n[fewshot."nadig.NK"]\nval = ["A"]'
    )
    test, validation, _ = held_out(screen, tmp_path / "split.toml")  # a screen knows no sources
    assert test == {(p, "T", donor) for p in NAMES for donor in ("d1", "d2")}
    assert validation == {("A", "NK", "d1")}
    screen.obs["source"] = np.where(screen.obs["batch"] == "d1", "rep.v1", "nadig")
    test, validation, split = held_out(screen, tmp_path / "split.toml")
    assert test == {(p, "T", "d1") for p in NAMES}
    assert validation == set()
    assert split.notes == ("1 conditions of the split file are not in the data: A:NK:source=nadig",)


def test_a_yaml_of_the_reference_with_both_contexts_is_refused(tmp_path):
    text = "holdout_celltype: [T]\nholdout_batches: [d1]\nholdout_pert: {test: [A]}"
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match="holdout_celltype and holdout_batches"):
        read_split_file(tmp_path / "x.yaml")
