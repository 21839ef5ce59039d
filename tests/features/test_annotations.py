"""Which genes have which terms, of files of every kind; what is wrong with one in one line."""

from __future__ import annotations

import gzip

import numpy as np
import pytest

from perturbdiff.features import annotations
from perturbdiff.features.annotations import read_columns, read_gaf, read_gmt, read_obo, read_org_db
from tests.features.sources import OBO, gaf, org_db


def pairs(known):
    """As a set of (gene, term)."""
    rows, columns = known.has.nonzero()
    assert (known.has.data == 1).all()
    return {(known.genes[i], known.terms[j]) for i, j in zip(rows, columns, strict=True)}


ROWS = [
    ("STAT1", "GO:3", "IDA"), ("STAT1", "GO:3", "IMP"), ("IRF1", "GO:33", "IEA"), ("IRF1", "GO:5", "TAS"),
    ("X", "GO:1", "ND"),
]  # fmt: skip


@pytest.fixture(params=["gaf", "gaf.gz", "sqlite"])
def read(request, tmp_path):
    """Reads ROWS from a file of each kind, with further words."""
    path = tmp_path / f"go.{request.param}"
    if request.param == "sqlite":
        org_db(path, ROWS, [("STAT91", "STAT1"), ("IRF1", "IRF1"), ("TWO", "IRF1"), ("TWO", "STAT1")])
        return lambda **words: read_org_db(path, **words)
    text = gaf(ROWS[:1], synonyms="STAT91|TWO") + gaf(ROWS[1:3], synonyms="TWO") + gaf(ROWS[3:], synonyms="IRF1")
    text += gaf([("NOTED", "GO:2", "IDA")], "NOT|involved_in") + gaf([("OTHER", "GO:2", "IDA")], aspect="F")
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return lambda **words: read_gaf(path, **words)


def test_annotations_without_electronic_evidence_and_negations(read):
    known = read()
    assert pairs(known) == {("STAT1", "GO:3"), ("IRF1", "GO:5")}
    assert known.about["evidence"] == "IDA IMP TAS"
    assert known.about["left out"] == "IEA ND"
    assert known.about["date"] in ("2024-01-17", "2022-Sep12")
    assert pairs(read(without=())) == {(gene, term) for gene, term, _ in ROWS}


def test_an_alias_is_of_one_gene_alone(read):
    assert read().aliases == {"STAT91": "STAT1"}


def test_ancestors_are_of_the_ontology(read, tmp_path):
    (tmp_path / "go.obo").write_text(OBO)
    known = read(obo=tmp_path / "go.obo", without=("ND",))
    up = {"GO:3", "GO:2", "GO:4", "GO:1"}
    assert pairs(known) == {("STAT1", term) for term in up} | {("IRF1", term) for term in up | {"GO:5"}}
    assert known.about["ancestors"] == "by go.obo (releases/2024-01-17)"


def test_the_date_is_of_the_newest_annotation_where_the_file_has_none(tmp_path):
    text = "".join(line for line in gaf(ROWS).splitlines(True) if not line.startswith("!"))
    (tmp_path / "a.gaf").write_text(text)
    assert read_gaf(tmp_path / "a.gaf").about["date"] == "newest annotation 20230401"


def test_ancestors_of_random_ontologies_are_those_of_a_walk(tmp_path):
    rng = np.random.default_rng()
    for _ in range(20):
        n = int(rng.integers(1, 40))
        parents = {i: sorted(set(rng.integers(0, i, size=rng.integers(0, 4)).tolist())) if i else [] for i in range(n)}
        order = rng.permutation(n).tolist()
        lines = [f"[Term]\nid: T:{i}\n" + "".join(f"is_a: T:{p}\n" for p in parents[i]) for i in order]
        (tmp_path / "r.obo").write_text("\n".join(lines))

        def walk(i, parents=parents):
            return {f"T:{i}"}.union(*(walk(p) for p in parents[i]))

        assert read_obo(tmp_path / "r.obo")[0] == {f"T:{i}": tuple(sorted(walk(i))) for i in range(n)}


def test_an_ontology_deeper_than_calls_can_be_is_read_and_a_circle_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "deep.obo"
    path.write_text("".join(f"[Term]\nid: T:{i}\nis_a: T:{i + 1}\n" for i in range(3000)))
    assert len(read_obo(path)[0]["T:0"]) == 3001
    monkeypatch.setattr(annotations, "MAX_PAIRS", 1000)
    with pytest.raises(ValueError, match=r"deep\.obo: its terms have more than 1,000 ancestors"):
        read_obo(path)
    path.write_text("[Term]\nid: A\nis_a: B\n[Term]\nid: B\nis_a: C\n[Term]\nid: C\nis_a: A\n")
    with pytest.raises(ValueError, match=r"term '[ABC]' is its own ancestor"):
        read_obo(path)


def test_sets_of_a_gmt_and_of_columns(tmp_path):
    (tmp_path / "s.gmt").write_text("one\thttp://x\tA\tB\t\ntwo\tna\tB\tC\r\n\n")
    expected = {("A", "one"), ("B", "one"), ("B", "two"), ("C", "two")}
    assert pairs(read_gmt(tmp_path / "s.gmt")) == expected
    (tmp_path / "s.csv").write_text('\ufeffID,Name,Genes,Length\n1,one,"A;B",2\n2,two,B|C,2\n')
    assert pairs(read_columns(tmp_path / "s.csv")) == expected
    (tmp_path / "s.tsv").write_text("set\tmembers\none\tA B\ntwo\tB\ntwo\tC\n")
    assert pairs(read_columns(tmp_path / "s.tsv", sets_in=("set", "members"))) == expected


def test_what_has_a_common_partner_has_a_common_term(tmp_path):
    (tmp_path / "p.csv").write_text("ligand,receptor,other\nL1,R1_R2,x\nL2,R1,y\n")
    known = read_columns(tmp_path / "p.csv")
    assert pairs(known) == {
        ("L1", "with R1"), ("L1", "with R2"), ("L2", "with R1"), ("R1", "of L1"), ("R2", "of L1"), ("R1", "of L2"),
    }  # fmt: skip
    assert pairs(read_columns(tmp_path / "p.csv", pairs_in=("ligand", "other"))) >= {("L1", "with x"), ("y", "of L2")}


def test_terms_of_few_and_of_most_genes_are_left_out(tmp_path):
    (tmp_path / "s.gmt").write_text("all\t\tA\tB\tC\tD\nrare\t\tA\nsome\t\tA\tB\n")
    known = read_gmt(tmp_path / "s.gmt").with_terms(2, 0.5)
    assert pairs(known) == {("A", "some"), ("B", "some")}
    assert known.genes == ("A", "B")
    with pytest.raises(ValueError, match="of 3 terms none is that of 3 genes or more and of at most 50%"):
        read_gmt(tmp_path / "s.gmt").with_terms(3, 0.5)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.gaf", "!gaf-version: 1.0\n" + gaf(ROWS).split("GOC\n")[1], "is of GAF version 1.0"),
        ("a.gaf", gaf(ROWS) + "UniProtKB\tP1\n", "line 9 is no annotation of GAF 2.x"),
        ("a.gaf", gaf([("A", "GO:1", "IEA")]), "says nothing of any gene"),
        (
            "a.gaf",
            gaf(ROWS, aspect="C"),
            r"has no annotation of aspect P \(.*\), only of C; name one of these \(--aspect\)",
        ),
        ("a.gaf", gaf([("A" * 500, "GO:1", "IDA")]), "is no name of 1 to 400 letters"),
        ("a.gaf", b"!gaf-version: 2.2\n\xff\xfe", "damaged"),
        ("a.gaf.gz", gzip.compress(gaf(ROWS).encode())[:-9], "damaged"),
        ("a.gmt", "one\tdescription\n", "line 1 is no set"),
        ("a.csv", "a,b\nx,y\n", r"columns \(a, b\) do not say"),
        ("a.csv", "ligand,receptor\nx\n", "a row has 1 fields where the first line names 2"),
        ("a.csv", "name,genes,ligand,receptor\n", "do not say what it holds"),
        ("a.csv", "ligand,receptor\n" + "x" * (1 << 22), "is it a text"),
        ("a.obo", "id: x\n", r"it has no \[Term\]"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(tmp_path, name, content, says):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    read = {"gaf": read_gaf, "gmt": read_gmt, "csv": read_columns, "obo": read_obo}[name.split(".")[1]]
    with pytest.raises(ValueError, match=says) as refused:
        read(path)
    assert "\n" not in str(refused.value)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("DROP TABLE go_bp", "no such table"),
        ("UPDATE gene_info SET symbol = x'00'", "is .* no text"),
        ("UPDATE gene_info SET symbol = zeroblob(3000000)", "damaged|no text|too big"),
        (
            "DROP TABLE go_bp; CREATE VIEW go_bp AS WITH RECURSIVE r(_id) AS (SELECT 0 UNION ALL SELECT _id FROM r) "
            "SELECT _id, 'GO:1' AS go_id, 'IEA' AS evidence FROM r",
            "interrupted",
        ),
    ],
)
def test_a_database_that_never_ends_or_lacks_its_tables_is_refused(tmp_path, monkeypatch, script, says):
    monkeypatch.setattr(annotations, "MAX_STEPS", 3)
    path = org_db(tmp_path / "o.sqlite", ROWS, script=script)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=says):
        read_org_db(path)
    assert path.read_bytes() == before


def test_a_damaged_database_is_refused(tmp_path):
    path = tmp_path / "o.sqlite"
    path.write_bytes(b"SQLite format 3\0" + b"\1" * 5000)
    with pytest.raises(ValueError, match="damaged"):
        read_org_db(path)


def test_more_pairs_than_are_read_and_a_file_that_unpacks_to_more_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(annotations, "MAX_PAIRS", 3)
    (tmp_path / "s.gmt").write_text("one\t\tA\tB\tC\tD\n")
    with pytest.raises(ValueError, match="more than 3 pairs"):
        read_gmt(tmp_path / "s.gmt")
    monkeypatch.undo()
    monkeypatch.setattr(annotations, "MAX_BYTES", 2000)
    (tmp_path / "s.gmt.gz").write_bytes(gzip.compress(b"one\t\tA\n" * 1000))
    with pytest.raises(ValueError, match="all have over 2,000"):
        read_gmt(tmp_path / "s.gmt.gz")
