"""Ordered names: genes, and the labels of perturbations, cell types and batches; conditions as their ids.

B = sets.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from perturbdiff.data.notation import Notation, Parts, dose_text

if TYPE_CHECKING:
    import torch
    from torch import Tensor


ENSEMBL_ID = re.compile(r"(ENS[A-Z]*\d{11})(\.\d+)?")  # of a gene, and its version


@dataclass(frozen=True)
class LabelVocab:
    """Labels in a fixed order; a label's id is its position."""

    kind: str  # "perturbation", "cell_type", "batch": for messages
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        _refuse_duplicates(self.names, f"{self.kind} labels")

    @cached_property
    def ids(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: str) -> bool:
        return name in self.ids

    def id(self, name: str) -> int:
        """Raises KeyError with the nearest known labels."""
        if name not in self.ids:
            raise KeyError(f"{self.kind} {name!r} is not known to this model; {nearest(name, self.names)}.")
        return self.ids[name]


def nearest(name: str, known: Iterable[str]) -> str:
    """ "did you mean ..." with up to five of the names, those that look most alike first."""
    known = list(known)
    folded: dict[str, str] = {}
    for candidate in known:
        folded.setdefault(candidate.casefold(), candidate)
    key = name.casefold()
    close = [folded[c] for c in ([key] if key in folded else difflib.get_close_matches(key, folded, n=5, cutoff=0.5))]
    if close:
        return f"did you mean {', '.join(close)}? ({len(known)} known)"
    return f"known: {', '.join(sorted(known)[:5]) or 'none'}{', ...' if len(known) > 5 else ''} ({len(known)})"


def between_commas(text: str, known: Callable[[str], bool]) -> list[str]:
    """The names of a list; one that is known stays whole, though it holds commas."""
    pieces, names = text.split(","), list[str]()
    while pieces:
        n = next((n for n in range(len(pieces), 1, -1) if known(",".join(pieces[:n]).strip())), 1)
        names.append(",".join(pieces[:n]).strip())
        del pieces[:n]
    return names


@dataclass(frozen=True)
class Alignment:
    """Where the genes of a vocabulary lie in a file: `columns` (G,), -1 for a missing gene."""

    columns: np.ndarray
    matched_by: str  # "name" or "Ensembl id"

    @property
    def n_matched(self) -> int:
        return int((self.columns >= 0).sum())

    @property
    def overlap(self) -> float:
        return self.n_matched / len(self.columns)


@dataclass(frozen=True)
class GeneVocab:
    """Genes in model order: unique names, and Ensembl ids and symbols where the file had them ("" for a gene without).

    Symbols are there where names are ids; one of several genes stands for none.
    """

    names: tuple[str, ...]
    ensembl: tuple[str, ...] | None = None
    symbols: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _refuse_duplicates(self.names, "gene names")
        for others, what in ((self.ensembl, "Ensembl ids"), (self.symbols, "symbols")):
            if others is not None and len(others) != len(self.names):
                raise ValueError(f"{len(others)} {what} for {len(self.names)} genes; give one each.")

    def __len__(self) -> int:
        return len(self.names)

    def select(self, columns: Sequence[int] | np.ndarray) -> GeneVocab:
        others = (None if of is None else tuple(of[i] for i in columns) for of in (self.ensembl, self.symbols))
        return GeneVocab(tuple(self.names[i] for i in columns), *others)

    def align(self, file: GeneVocab, min_overlap: float) -> Alignment:
        """Find these genes in a file's, by name or, where that finds more, by Ensembl id or symbol; never by position.

        Versions of Ensembl ids do not matter.

        Raises
        ------
        ValueError
            Under `min_overlap` of the genes are there, or one of them comes twice.
        """
        if not 0 <= min_overlap <= 1:
            raise ValueError(f"min_gene_overlap ({min_overlap}) must be between 0 and 1.")
        wanted, present = self.names, file.names
        best = Alignment(_columns(wanted, present), "name")
        for own, theirs, what in (
            (self.ensembl, file.ensembl, "Ensembl id"), (self.ensembl, file.names, "Ensembl id"),
            (self.names, file.ensembl, "Ensembl id"), (self.names, file.symbols, "symbol"),
            (self.symbols, file.names, "symbol"), (self.symbols, file.symbols, "symbol"),
        ):  # fmt: skip
            if own is not None and theirs is not None:
                other = Alignment(_columns(own, theirs), what)
                if other.n_matched > best.n_matched:
                    best, (wanted, present) = other, (own, theirs)
        _refuse_repeated(wanted, present, file)
        if best.overlap < min_overlap:
            missing = [name for name, column in zip(self.names, best.columns, strict=True) if column < 0]
            raise ValueError(
                f"only {best.n_matched} of the model's {len(self)} genes ({best.overlap:.0%}) are among the file's "
                f"{len(file)}, under min_gene_overlap ({min_overlap:.0%}); missing are {', '.join(missing[:5])}, ... "
                f"{self._hint(file, best.n_matched)}Give a file with these genes (names or Ensembl ids), or lower "
                "min_gene_overlap."
            )
        return best

    def _hint(self, file: GeneVocab, n_matched: int) -> str:
        """What else would make more of the names agree."""
        n = max(2 * n_matched, len(self) // 2, 1)
        prefix, mark, _ = file.names[0].partition("_") if len(file) else ("", "", "")
        start = prefix + mark * (1 + file.names[0][len(prefix) + 1 :].startswith("_")) if mark else ""
        if start and len({name.removeprefix(start) for name in file.names} & {*self.names, *(self.ensembl or ())}) >= n:
            return f"The file's names begin with {start!r}, a genome's; cut it off. "
        species = [_species(names) for names in (self.names, file.names)]
        if None not in species and species[0] != species[1]:
            return f"The model's ids are of {species[0]}..., the file's of {species[1]}...: another species. "
        if len({name.casefold() for name in file.names} & {name.casefold() for name in self.names}) >= n:
            return f"Names agree but for capitals ({file.names[0]}, {self.names[0]}): another species? "
        return ""


def _species(names: Sequence[str]) -> str | None:
    """The letters that most Ensembl ids among names begin with, as ENSMUSG of mice; None where names are no ids."""
    found = Counter(match[1].rstrip("0123456789") for name in names if (match := ENSEMBL_ID.fullmatch(name)))
    start, n = found.most_common(1)[0] if found else ("", 0)
    return start if 2 * n > len(names) else None


def stable_id(gene_id: str) -> str:
    """An Ensembl id without its version; other names as they are."""
    match = ENSEMBL_ID.fullmatch(gene_id)
    return match[1] if match else gene_id


def _columns(wanted: Sequence[str], present: Sequence[str]) -> np.ndarray:
    positions = {stable_id(name): i for i, name in enumerate(present) if name}  # "" is an Ensembl id that is missing
    return np.array([positions.get(stable_id(name), -1) for name in wanted], dtype=np.int64)


def _refuse_repeated(wanted: Sequence[str], present: Sequence[str], file: GeneVocab) -> None:
    columns: dict[str, int] = {}
    own = {stable_id(name) for name in wanted if name}
    for i, name in enumerate(map(stable_id, present)):
        if name in own and columns.setdefault(name, i) != i:
            raise ValueError(
                f"genes {file.names[columns[name]]!r} and {file.names[i]!r} of the file are both {name}; which of them "
                "is the model's? Add them, or leave one out."
            )


def _refuse_duplicates(names: Sequence[str], what: str) -> None:
    if len(set(names)) == len(names):
        return
    seen: set[str] = set()
    twice = sorted({name for name in names if name in seen or seen.add(name)})  # type: ignore[func-returns-value]
    raise ValueError(
        f"{len(twice)} duplicate {what}, for example {', '.join(twice[:5])}; names must be unique: merge or rename "
        "them (AnnData: adata.var_names_make_unique())."
    )


NULL = -1  # id of an absent, hidden or unknown label


@dataclass(frozen=True)
class Labels:
    """Conditions of B sets; ids of the vocabularies, -1 = null.

    perturbation
        (B, P) the perturbations a cell received together, padded with -1.
    cell_type, batch
        (B,)
    hidden
        (B,) True where the whole condition is hidden; none if None.
    dose
        (B, P) log10 of the dose of each perturbation, 0 where there is none; None where the model knows no doses.
    features_only
        (B,) True where perturbations are known by their features alone, their own rows hidden; none if None.
    """

    perturbation: Tensor
    cell_type: Tensor
    batch: Tensor
    hidden: Tensor | None = None
    dose: Tensor | None = None
    features_only: Tensor | None = None

    def to(self, device: torch.device | str) -> Labels:
        return self._each(lambda values: values.to(device))

    def select(self, sets: Tensor) -> Labels:
        """The conditions of some sets."""
        return self._each(lambda values: values[sets])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Labels:
        values = (getattr(self, field.name) for field in fields(self))
        return Labels(*(None if value is None else change(value) for value in values))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Vocabularies:
    """The labels a model knows. A perturbation label "A+B" is the perturbations A and B together, "A@0.5" A at a dose.

    n_by_features
        The last so many perturbations have no row of their own: no training cell received them, and they are known by
        their features alone.
    tables
        Name and width of each table of perturbation features.
    control_labels
        Of the training cells; no part of a combination.
    doses
        Those of each perturbation that training cells received, rising; none of one that never had a dose. Empty where
        nobody knows.
    dose_unit
        Of all doses; None where nothing says one.
    """

    perturbations: LabelVocab
    cell_types: LabelVocab
    batches: LabelVocab
    combination_separator: str | None
    dose_separator: str | None = None
    n_by_features: int = 0
    tables: tuple[tuple[str, int], ...] = ()
    control_labels: tuple[str, ...] = ()
    doses: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    dose_unit: str | None = None

    @property
    def labelled(self) -> tuple[str, ...]:
        """The perturbations that training gave a row."""
        return self.perturbations.names[: len(self.perturbations) - self.n_by_features]

    @property
    def trained(self) -> tuple[str, ...]:
        """A label for each perturbation that training gave a row, at each of its doses."""
        names = [name for name in self.labelled if name not in self.control_labels]  # one may be a control by now
        known = ((name, dose) for name in names for dose in self.doses.get(name) or (None,))
        return tuple(self.notation.text((part,)) for part in known)

    @cached_property
    def notation(self) -> Notation:
        """What labels mean: a name stays whole."""
        names = frozenset(self.perturbations.names)
        return Notation(names, self.combination_separator, self.dose_separator, self.control_labels, self.dose_unit)

    def encode(self, conditions: Sequence[tuple[str | None, str | None, str | None]]) -> Labels:
        """Ids of (perturbation, cell_type, batch) names. None is null; so are unknown cell types and batches.

        Raises
        ------
        KeyError
            An unknown perturbation; the message lists the nearest. Never a silent null.
        ValueError
            A control label; a perturbation without a dose where the model was trained with doses of it.
        """
        import torch  # here: names alone are read without it

        parts = [
            [] if name is None else [(self.perturbations.id(part), dose) for part, dose in self.parts(name)]
            for name, _, _ in conditions
        ]
        width = max([1, *(len(ids) for ids in parts)])
        shape = len(conditions), width
        ids = [[i for i, _ in of] + [NULL] * (width - len(of)) for of in parts]
        doses = [[dose or 1.0 for _, dose in of] + [1.0] * (width - len(of)) for of in parts]
        return Labels(
            torch.tensor(ids, dtype=torch.int64).reshape(shape),
            torch.tensor([self.cell_types.ids.get(c or "", NULL) for _, c, _ in conditions], dtype=torch.int64),
            torch.tensor([self.batches.ids.get(b or "", NULL) for _, _, b in conditions], dtype=torch.int64),
            dose=None if self.dose_separator is None else torch.tensor(doses).reshape(shape).log10(),
        )

    def parts(self, label: str) -> Parts:
        """ "A+B" -> A, B, each with its dose; a label that is known as a whole stays whole. Raises as `encode`."""
        parts = self.notation.parse(label)
        if not parts:
            raise ValueError(f"perturbation {label!r} is a control label; controls are what predictions start from.")
        for name, dose in parts:
            doses = self.doses.get(name, ()) if self.doses else (0.5,)
            if dose is None and doses and self.dose_separator is not None and name in self.perturbations:
                raise ValueError(
                    f"perturbation {name!r} has no dose, and this model was trained with doses; "
                    f"give one, as '{name}{self.dose_separator}{dose_text(doses[0])}'."
                )
        return parts

    def knows(self, label: str) -> bool:
        """Whether `encode` takes a label."""
        try:
            return all(name in self.perturbations for name, _ in self.parts(label))
        except ValueError:
            return False

    def extrapolated(self, label: str) -> list[str]:
        """What training never saw of a label: perturbations known by features alone, doses out of the trained range."""
        described = set(self.perturbations.names[len(self.labelled) :])
        found = []
        for name, dose in self.parts(label):
            if name in described:
                found.append(f"perturbation {name}")
            elif dose is not None and (doses := self.doses.get(name)) and not doses[0] <= dose <= doses[-1]:
                found.append(f"dose {dose_text(dose)} of {name} ({dose_text(doses[0])} to {dose_text(doses[-1])})")
        return found
