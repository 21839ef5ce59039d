import builtins
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from perturbdiff.features import fingerprints
from perturbdiff.features.fingerprints import morgan_table, read_features

DRUGS = {"ethanol": "CCO", "aspirin": "CC(=O)Oc1ccccc1C(=O)O", "salt": "[Na+].[Cl-]", "ethanol again": "OCC"}


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_fingerprints_are_those_of_rdkit(tmp_path, suffix):
    Chem = pytest.importorskip("rdkit.Chem")
    from rdkit.Chem import rdFingerprintGenerator

    frame = pd.DataFrame({"dose": 1.0, "smiles": DRUGS.values(), "name": DRUGS.keys()})
    path = tmp_path / f"drugs{suffix}"
    frame.to_csv(path) if suffix == ".csv" else frame.to_parquet(path)  # with row numbers, and a column beside
    for radius, n_bits in ((2, 1024), (3, 300)):
        found = morgan_table(path, radius=radius, n_bits=n_bits)
        assert (found.name, found.values.shape) == ("drugs", (4, n_bits))
        assert set(np.unique(found.values)) == {0, 1}
        generator = rdFingerprintGenerator.GetMorganGenerator(radius=radius, fpSize=n_bits)
        for name, smiles in DRUGS.items():
            on = list(generator.GetFingerprint(Chem.MolFromSmiles(smiles)).GetOnBits())
            assert np.flatnonzero(found.rows([name])[0]).tolist() == on
    np.testing.assert_array_equal(found.rows(["ethanol"]), found.rows(["ethanol again"]))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name,smiles\nA,CCO\nB,CC(\n", "SMILES 'CC\\(' of B is not one"),
        ("name,smiles\nA,\n", "SMILES '' of A"),
        ("name,smiles\nA,C1\n", "of A is not one"),
        ("name,smiles\nA,CCO\nA,C\n", "same name: A;"),
        ("name,SMILES\nA,CCO\n", "one column 'smiles', not 0; found name, SMILES"),
        ("name,smiles,smiles\nA,CCO,C\n", "one column 'smiles', not 2"),
        ("name,smiles\nA,CCO,1\n", "Expected 2 columns, got 3"),
        ("name,smiles\n", "at least one name"),
        ("name,smiles\nA," + "C" * 6000 + "\n", "6,000 bytes"),
    ],
)
def test_structures_that_are_wrong_are_refused_in_one_line(tmp_path, capfd, text, says):
    pytest.importorskip("rdkit")
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=says) as error:
        morgan_table(tmp_path / "t.csv")
    assert str(error.value).isprintable()
    assert capfd.readouterr() == ("", "")


def test_fingerprints_of_no_radius_or_size_and_too_many_are_refused(tmp_path, monkeypatch):
    pytest.importorskip("rdkit")
    (tmp_path / "t.csv").write_text("name,smiles\nA,CCO\n")
    for wrong in ({"radius": -1}, {"radius": 17}, {"n_bits": 0}, {"n_bits": 1 << 21}):
        with pytest.raises(ValueError, match="radius must be 0 to 16"):
            morgan_table(tmp_path / "t.csv", **wrong)
    monkeypatch.setattr(fingerprints, "MAX_VALUES", 1023)
    with pytest.raises(ValueError, match="1 fingerprints of 1,024 bits are too many"):
        morgan_table(tmp_path / "t.csv")


def test_structures_are_in_a_csv_or_parquet_file(tmp_path):
    pytest.importorskip("rdkit")
    np.savez(tmp_path / "t.npz", A=np.ones(2))
    for name, kind in (("no.csv", FileNotFoundError), ("t.npz", ValueError)):
        with pytest.raises(kind, match=r"\.csv, \.parquet"):
            morgan_table(tmp_path / name)


def test_a_csv_with_structures_becomes_fingerprints_and_any_other_a_table(tmp_path):
    pytest.importorskip("rdkit")
    (tmp_path / "drugs.csv").write_text('"name","smiles"\nethanol,CCO\nbenzene,c1ccccc1\n')
    (tmp_path / "genes.csv").write_text("name,smile\nSTAT1,1\n")
    assert read_features(str(tmp_path / "drugs.csv")).values.shape == (2, 1024)
    assert read_features(tmp_path / "genes.csv").values.tolist() == [[1.0]]
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_features(tmp_path / "no.csv")


def test_without_rdkit_fingerprints_say_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "rdkit":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"perturbdiff\[chem\]"):
        morgan_table(Path("t.csv"))
