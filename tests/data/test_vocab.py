import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perturbdiff.data.vocab import GeneVocab, LabelVocab, nearest

NAMES = st.lists(st.text("ABCDEF", min_size=1, max_size=3), unique=True, min_size=1, max_size=20)


def test_an_id_is_the_place_of_its_label():
    vocab = LabelVocab("perturbation", ("JAK2", "STAT1", "IRF1"))
    assert [vocab.id(name) for name in vocab.names] == [0, 1, 2]
    assert len(vocab) == 3
    assert "STAT1" in vocab
    assert "stat1" not in vocab


def test_an_unknown_label_is_an_error_that_names_kind_value_and_nearest():
    vocab = LabelVocab("perturbation", ("JAK2", "STAT1", "STAT2", "IRF1"))
    with pytest.raises(KeyError, match=r"perturbation 'stat11' is not known.*did you mean STAT1, STAT2\? \(4 known\)"):
        vocab.id("stat11")


def test_duplicate_labels_and_genes_are_refused_with_examples_and_a_remedy():
    with pytest.raises(ValueError, match="1 duplicate batch labels, for example b1"):
        LabelVocab("batch", ("b1", "b2", "b1"))
    with pytest.raises(ValueError, match=r"2 duplicate gene names, for example X, Y; .*var_names_make_unique"):
        GeneVocab(("Y", "X", "X", "Z", "Y", "Y"))


def test_nearest_finds_labels_that_differ_in_case_and_one_letter():
    known = ["IFN-beta", "IFN-gamma", "TNF", "panobinostat"]
    assert "did you mean IFN-beta" in nearest("ifn-Beta", known)
    assert "did you mean panobinostat" in nearest("panobinostt", known)


def test_nearest_lists_what_is_known_where_nothing_looks_alike():
    assert nearest("zzz", ["b", "a"]) == "known: a, b (2)"
    assert nearest("zzz", [f"k{i}" for i in range(7)]) == "known: k0, k1, k2, k3, k4, ... (7)"
    assert nearest("zzz", []) == "known: none (0)"


def test_ensembl_ids_must_be_one_for_each_gene():
    with pytest.raises(ValueError, match="1 Ensembl ids for 2 genes"):
        GeneVocab(("A", "B"), ("ENSG1",))


def test_selecting_columns_keeps_symbol_and_ensembl_id_together():
    vocab = GeneVocab(("A", "B", "C"), ("E1", "E2", "E3")).select(np.array([2, 0]))
    assert vocab == GeneVocab(("C", "A"), ("E3", "E1"))


@settings(derandomize=True)
@given(NAMES, st.data())
def test_alignment_is_by_name_whatever_the_order_and_extra_genes(names, data):
    kept = data.draw(st.lists(st.sampled_from(names), unique=True))
    file = data.draw(st.permutations([*kept, "extra1", "extra2"]))
    alignment = GeneVocab(tuple(names)).align(GeneVocab(tuple(file)), min_overlap=0.0)
    for name, column in zip(names, alignment.columns, strict=True):
        assert (file[column] == name) if column >= 0 else name not in file
    assert alignment.n_matched == len(set(names) & set(file))
    assert alignment.overlap == alignment.n_matched / len(names)


@pytest.mark.parametrize(
    ("model", "file"),
    [
        (GeneVocab(("A", "B"), ("E1", "E2")), GeneVocab(("b-new", "a-new"), ("E2", "E1"))),
        (GeneVocab(("A", "B"), ("E1", "E2")), GeneVocab(("E2", "E1"))),
        (GeneVocab(("E1", "E2")), GeneVocab(("b", "a"), ("E2", "E1"))),
    ],
    ids=["both have ids", "the file's names are ids", "the model's names are ids"],
)
def test_genes_are_found_by_ensembl_id_where_names_do_not_match(model, file):
    alignment = model.align(file, min_overlap=1.0)
    assert alignment.columns.tolist() == [1, 0]
    assert alignment.matched_by == "Ensembl id"


def test_names_decide_where_they_find_as_many_genes_as_ids():
    alignment = GeneVocab(("A", "B"), ("E1", "E2")).align(GeneVocab(("A", "B"), ("E2", "E1")), min_overlap=1.0)
    assert alignment.columns.tolist() == [0, 1]
    assert alignment.matched_by == "name"


def test_a_missing_ensembl_id_matches_no_other_missing_one():
    model = GeneVocab(("A", "B", "C"), ("", "", "E3"))
    alignment = model.align(GeneVocab(("x", "y", "z"), ("", "E3", "")), min_overlap=0.0)
    assert alignment.columns.tolist() == [-1, -1, 1]


def test_too_little_overlap_is_refused_with_the_numbers_and_some_missing_genes():
    model = GeneVocab(tuple(f"g{i}" for i in range(10)))
    with pytest.raises(ValueError, match=r"only 4 of the model's 10 genes \(40%\).*file's 5, under .*\(50%\).*g4, g5"):
        model.align(GeneVocab(("g0", "g1", "g2", "g3", "other")), min_overlap=0.5)
    assert model.align(GeneVocab(("g0", "g1", "g2", "g3", "g9")), min_overlap=0.5).overlap == 0.5


@pytest.mark.parametrize("part", [-0.1, 1.5, float("nan")])
def test_a_smallest_overlap_that_is_no_part_is_refused(part):
    with pytest.raises(ValueError, match=rf"min_gene_overlap \({part}\) must be between 0 and 1"):
        GeneVocab(("A",)).align(GeneVocab(("A",)), min_overlap=part)


@pytest.mark.parametrize("as_names", [True, False])
def test_versions_of_ensembl_ids_do_not_matter(as_names):
    ids = [f"ENSG{i:011d}" for i in range(4)]
    own = GeneVocab(tuple(ids)) if as_names else GeneVocab(("a", "b", "c", "d"), tuple(f"{i}.1" for i in ids))
    theirs = tuple(f"{name}.{7 + i}" for i, name in enumerate(reversed(ids)))
    for file in (GeneVocab(theirs), GeneVocab(("w", "x", "y", "z"), theirs)):
        assert own.align(file, 0.5).columns.tolist() == [3, 2, 1, 0]
    assert own.align(GeneVocab(("AC001.1", "AC001.2", *theirs)), 0.5).columns.tolist() == [5, 4, 3, 2]


def test_a_gene_that_comes_twice_is_refused_and_others_may():
    ids = ("ENSG00000000001", "ENSG00000000002")
    own = GeneVocab(("a", "b"), ids)
    twice = GeneVocab(("x", "y", "z"), (ids[0], f"{ids[1]}.1", f"{ids[1]}.2"))
    with pytest.raises(ValueError, match="genes 'y' and 'z' of the file are both ENSG00000000002"):
        own.align(twice, 0.5)
    others = GeneVocab(("x", "y", "z", "w"), (*ids, "ENSG00000000009", "ENSG00000000009.3"))
    assert own.align(others, 0.5).columns.tolist() == [0, 1]
    assert own.align(GeneVocab(("a", "b", "z"), ("", "", "")), 0.5).columns.tolist() == [0, 1]
