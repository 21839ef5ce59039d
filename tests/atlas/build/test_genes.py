import re

import numpy as np
import pytest

from perturbdiff.atlas.build.genes import merge_genes, n_selected, read_gene_file, read_gene_table
from perturbdiff.data.vocab import GeneVocab
from tests.atlases import write_atlas

E = [f"ENSG{i:011d}" for i in range(9)]


def vocab(*genes: str) -> GeneVocab:
    """ "name" or "name/Ensembl id"."""
    parts = [gene.partition("/") for gene in genes]
    ids = tuple(part[2] for part in parts)
    return GeneVocab(tuple(part[0] for part in parts), ids if any(ids) else None)


def merged(*sources: GeneVocab, rule="union", table=None):
    return merge_genes({f"s{i}": source for i, source in enumerate(sources)}, rule, table)


def columns(space) -> list[list[int]]:
    return [column.tolist() for column in space.columns]


def test_union_keeps_the_first_sources_order_and_adds_new_genes_as_they_come():
    space = merged(vocab("B", "A"), vocab("C", "A", "D", "B"))
    assert space.genes.names == ("B", "A", "C", "D")
    assert columns(space) == [[0, 1], [2, 1, 3, 0]]
    assert [space.n_kept(0), space.n_kept(1)] == [2, 4]
    assert space.genes.ensembl is None


def test_intersection_keeps_the_first_sources_order():
    space = merged(vocab("B", "A", "C"), vocab("C", "X", "B"), vocab("C", "B", "A"), rule="intersection")
    assert space.genes.names == ("B", "C")
    assert columns(space) == [[0, -1, 1], [1, -1, 0], [1, 0, -1]]


def test_no_common_gene_is_an_error():
    with pytest.raises(ValueError, match="no gene is left with genes=intersection of s0, s1; map their names"):
        merged(vocab("A"), vocab("B"), rule="intersection")


def test_a_source_that_shares_no_gene_is_refused():
    with pytest.raises(ValueError, match=r"no gene of source 's2' \(x, y\) is in another one, as 's0' \(A, B\); give"):
        merged(vocab("A", "B"), vocab("B", "C"), vocab("x", "y"))
    assert merged(vocab("A", "B"), vocab("x", "y"), table={"x": "A"}).genes.names == ("A", "B", "y")


@pytest.mark.parametrize(
    ("second", "why"),
    [
        (vocab(f"new/{E[0]}"), "one Ensembl id, two names"),
        (vocab(f"new/{E[0]}.17"), "versions do not matter"),
        (vocab(E[0]), "a name that is an Ensembl id"),
        (vocab("A"), "a source without ids"),
        (vocab(f"A/{E[0]}.2"), "both"),
    ],
)
def test_genes_are_one_by_name_or_ensembl_id(second, why):
    space = merged(vocab(f"A/{E[0]}.1", f"B/{E[1]}"), second)
    assert space.genes.names == ("A", "B"), why
    assert space.genes.ensembl == (f"{E[0]}.1", E[1])
    assert columns(space)[1] == [0]


def by_ids(*genes: str) -> GeneVocab:
    """ "symbol/Ensembl id", named by the ids."""
    parts = [gene.partition("/") for gene in genes]
    ids = tuple(part[2] for part in parts)
    return GeneVocab(ids, ids, tuple(part[0] for part in parts))


def test_genes_named_by_ids_are_those_of_their_symbols_in_every_order():
    ids, symbols = by_ids(f"A/{E[0]}", f"B/{E[1]}", f"/{E[2]}"), vocab("C", "B", "A")
    space = merged(ids, symbols)
    assert space.genes.names == ("A", "B", E[2], "C")
    assert space.genes.ensembl == (*E[:3], "")
    assert columns(space) == [[0, 1, 2], [3, 1, 0]]
    space = merged(symbols, ids)
    assert space.genes.names == ("C", "B", "A", E[2])
    assert space.genes.ensembl == ("", E[1], E[0], E[2])
    assert columns(space) == [[0, 1, 2], [2, 1, 3]]


def test_an_id_without_a_symbol_is_known_by_the_name_another_source_gives_it():
    space = merged(vocab(E[0], E[1]), vocab(f"A/{E[0]}.3"), vocab("B", "A"))
    assert columns(space) == [[0, 1], [0], [2, 0]]
    assert space.genes.names == (E[0], E[1], "B")


def test_a_symbol_of_another_id_or_of_a_gene_of_its_own_file_is_not_taken():
    space = merged(vocab(f"A/{E[0]}", "B"), by_ids(f"A/{E[1]}", f"B/{E[2]}"))
    assert columns(space) == [[0, 1], [2, 1]]
    assert space.genes.names == ("A", "B", E[1])
    of_both = GeneVocab((E[1], E[2], "GFP"), (E[1], E[2], ""), ("GFP", "B", ""))
    assert columns(merged(vocab("GFP", "B"), of_both)) == [[0, 1], [2, 1, 0]]
    assert columns(merged(vocab("B"), by_ids(f"A/{E[1]}", f"B/{E[2]}"), vocab(f"B/{E[2]}"))) == [[0], [1, 0], [0]]


def test_the_table_overrules_symbols():
    space = merged(by_ids(f"A/{E[0]}", f"B/{E[1]}"), vocab("A", "B"), table={E[0]: "new"})
    assert space.genes.names == ("new", "B", "A")


def test_an_id_is_learnt_from_a_later_source():
    space = merged(vocab("A", "B"), vocab(f"A/{E[0]}"), vocab(f"alias/{E[0]}"))
    assert space.genes == GeneVocab(("A", "B"), (E[0], ""))
    assert columns(space) == [[0, 1], [0], [0]]


def test_one_name_with_two_ensembl_ids_is_an_error_with_the_remedy():
    with pytest.raises(ValueError, match=f"'A' is {E[0]} in source 's0' and {E[1]} in source 's1'.*gene_table"):
        merged(vocab(f"A/{E[0]}"), vocab(f"A/{E[1]}"))
    space = merged(vocab("B", f"A/{E[0]}"), vocab("B", f"A/{E[1]}"), table={E[1]: "A-other"})
    assert space.genes == GeneVocab(("B", "A", "A-other"), ("", E[0], E[1]))
    assert columns(space) == [[0, 1], [0, 2]]


def test_two_genes_of_a_source_that_are_one_are_an_error_with_the_remedy():
    sources = vocab(f"A/{E[0]}"), vocab(f"A/{E[0]}", f"alias/{E[0]}")
    with pytest.raises(ValueError, match=r"genes 'A' and 'alias' of source 's1' are both 'A' in the atlas.*gene_table"):
        merged(*sources)
    assert columns(merged(*sources, table={"alias": ""})) == [[0], [0, -1]]
    with pytest.raises(ValueError, match=r"genes 'A' and 'B' of source 's0' are both 'C'"):
        merged(vocab("A", "B"), table={"A": "C", "B": "C"})


def test_a_gene_that_is_two_genes_of_other_sources_is_an_error():
    with pytest.raises(ValueError, match=f"'A' .{E[0]}. of source 's1' is two genes.*'A' by name and 'B' by Ensembl"):
        merged(vocab("A", f"B/{E[0]}"), vocab(f"A/{E[0]}"))


def test_the_table_names_genes_by_symbol_or_ensembl_id_and_overrules_ids():
    table = {"old": "A", f"{E[3]}": "B", "gone": ""}
    space = merged(vocab(f"A/{E[0]}", "B"), vocab(f"old/{E[5]}", f"x/{E[3]}.4", "gone", "new"), table=table)
    assert space.genes.names == ("A", "B", "new")
    assert columns(space)[1] == [0, 1, -1, 2]
    assert space.genes.ensembl == (E[0], f"{E[3]}.4", "")  # the id of a renamed gene fills a gap, and no more


def test_a_table_that_fits_nothing_is_an_error():
    with pytest.raises(ValueError, match="no gene of gene_table is in any source, 'Z' among them"):
        merged(vocab("A"), table={"Z": "Y"})


def test_a_file_gives_the_order_and_may_name_genes_no_source_has(tmp_path):
    path = tmp_path / "genes.txt"
    path.write_text(f"C\n\nnobody\nA\n{E[1]}.3\n")
    space = merged(vocab("A", f"B/{E[1]}", "D"), vocab("C", "A"), rule=str(path))
    assert space.genes.names == ("C", "nobody", "A", f"{E[1]}.3")
    assert space.genes.ensembl == ("", "", "", E[1])
    assert columns(space) == [[2, 3, -1], [0, 2]]


def test_a_file_whose_genes_nobody_has_or_has_twice_is_an_error(tmp_path):
    path = tmp_path / "genes.txt"
    path.write_text("x\ny\nA\n")
    with pytest.raises(ValueError, match=r"only 1 of the 3 genes of .* are in any source; missing are x, y"):
        merged(vocab("A"), rule=str(path))
    path.write_text(f"A\n{E[0]}\n")
    with pytest.raises(ValueError, match=f"'A' and '{E[0]}' of .* are one gene"):
        merged(vocab(f"A/{E[0]}"), rule=str(path))
    path.write_text("A\nA\n")
    with pytest.raises(ValueError, match="duplicate gene names"):
        read_gene_file(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        read_gene_file(path)


def test_the_genes_of_another_atlas_are_taken_from_its_file(tmp_path):
    write_atlas(tmp_path / "atlas", n_genes=6)
    names = tuple(f"gene_{g}" for g in range(6))
    assert read_gene_file(tmp_path / "atlas" / "genes.parquet") == names
    with pytest.raises(ValueError, match=r"conditions\.parquet is no genes\.parquet"):
        read_gene_file(tmp_path / "atlas" / "conditions.parquet")


def test_a_rule_that_is_none_is_an_error():
    with pytest.raises(FileNotFoundError, match="must be union, intersection, merge-then-select:N, or a file"):
        merged(vocab("A"), rule="unoin")
    for rule in ("merge-then-select", "merge-then-select:0", "merge-then-select:x"):
        with pytest.raises(ValueError, match=re.escape(repr(rule))):
            n_selected(rule)
    assert n_selected("merge-then-select:20") == 20
    assert n_selected("union") is None


def test_chosen_genes_are_the_union_of_the_choices_in_the_order_of_the_union():
    space = merged(vocab("B", "A", "X"), vocab("C", "A", "D"), rule="merge-then-select:2", table={"X": ""})
    chosen = space.among([np.array([0, 2]), np.array([1, 2])])  # B and a gene left out; A and D
    assert chosen.genes.names == ("B", "A", "D")
    assert columns(chosen) == [[0, 1, -1], [-1, 1, 2]]


def test_the_table_is_read_from_csv(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text('from,to\nA, B\n\n"x,y",z\ngone,\nA,B\n')
    assert read_gene_table(path) == {"A": "B", "x,y": "z", "gone": ""}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n", "first line of gene_table .* must be from,to"),
        ("from,to\nA\n", "line 2 of gene_table .* is 'A'"),
        ("from,to\n,A\n", "line 2 of gene_table"),
        ("from,to\nA,B\nA,C\n", "line 3 of gene_table .* maps 'A' to 'C', an earlier one to 'B'"),
    ],
)
def test_a_table_that_is_none_is_an_error(tmp_path, text, message):
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_gene_table(path)
    with pytest.raises(FileNotFoundError, match="gene_table"):
        read_gene_table(tmp_path / "none.csv")
