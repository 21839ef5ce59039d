"""Morgan fingerprints of drugs, from SMILES."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from perturbdiff.config import MAX_FEATURES
from perturbdiff.features.files import MAX_VALUES, read_texts, read_titles
from perturbdiff.features.tables import FeatureTable, read_table, table_of_file
from perturbdiff.files import few

MAX_RADIUS = 16  # in bonds


def morgan_table(path: str | Path, name: str | None = None, radius: int = 2, n_bits: int = 1024) -> FeatureTable:
    """Morgan fingerprints, zeros and ones, of the structures in a .csv or .parquet file with columns name and smiles.

    Parameters
    ----------
    radius, n_bits
        Bonds around each atom; F. Radius 2 makes what is also called ECFP4.

    Raises
    ------
    FileNotFoundError, ValueError
        As `read_table`; rdkit is not installed; a SMILES is not one.

    Notes
    -----
    Rogers & Hahn 2010, doi:10.1021/ci100050t; computed by rdkit.
    """
    try:
        from rdkit import Chem, rdBase
        from rdkit.Chem import rdFingerprintGenerator
    except ImportError as error:
        raise ValueError("fingerprints of SMILES need rdkit; install it: pip install 'perturbdiff[chem]'.") from error
    if not (0 <= radius <= MAX_RADIUS and 1 <= n_bits <= MAX_FEATURES):
        raise ValueError(
            f"Morgan fingerprints of radius {radius} with {n_bits} bits: the radius must be 0 to {MAX_RADIUS}, the "
            f"bits 1 to {MAX_FEATURES}."
        )
    path = Path(path)
    names, smiles = read_texts(path, ("name", "smiles"))
    if len(names) * n_bits > MAX_VALUES:
        raise ValueError(f"{path}: {len(names):,} fingerprints of {n_bits:,} bits are too many; take fewer bits.")
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=radius, fpSize=n_bits)
    values = np.zeros((len(names), n_bits), dtype=np.float32)
    with rdBase.BlockLogs():  # it would write of a wrong SMILES to the terminal
        for i, (entity, text) in enumerate(zip(names, smiles, strict=True)):
            molecule = Chem.MolFromSmiles(text)
            if molecule is None or not molecule.GetNumAtoms():
                raise ValueError(
                    f"{path}: SMILES {text[:80]!r} of {few([entity])} is not one; correct or leave it out."
                )
            values[i] = generator.GetFingerprintAsNumPy(molecule)
    return table_of_file(path, name, names, values)


def read_features(path: str | Path) -> FeatureTable:
    """A table of features, or fingerprints of the SMILES in a .csv that has such a column. Raises as those readers."""
    path = Path(path)
    if path.suffix == ".csv" and "smiles" in [title.strip().casefold() for title in read_titles(path)]:
        return morgan_table(path)
    return read_table(path)
