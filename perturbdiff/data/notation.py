"""How labels say what a cell received: "A+B" is A and B together, "A@0.5" A at dose 0.5.

A label is parsed once, where it is read, to a set of (name, dose), and written in one way from then on: parts that are
a control label dropped, each part once, sorted, doses as plain numbers. "B+A", "A+B+ctrl" and "A+B" are one condition.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from perturbdiff.files import few

Parts = tuple[tuple[str, float | None], ...]
"""(name, dose) of each perturbation that a cell received together, sorted; a dose is None where nothing says one."""

NO_LABEL = frozenset({"", "nan", "none", "null", "na", "n/a", "<na>"})  # texts, in lower case, of what is missing


@dataclass(frozen=True)
class Notation:
    """The names of single perturbations, and how labels combine them.

    A label that is a name stays whole, whatever it holds ("(+)-JQ1" has no parts), and so does one of which not every
    part is a name or a control label.
    """

    names: Collection[str]
    combination_separator: str | None = "+"
    dose_separator: str | None = None
    controls: tuple[str, ...] = ()
    dose_unit: str | None = None  # of the numbers; None where nothing says one

    @classmethod
    def learned(
        cls,
        labels: Iterable[str],
        combination_separator: str | None,
        dose_separator: str | None,
        controls: Sequence[str],
        names: Iterable[str] = (),
    ) -> Notation:
        """The notation of these labels: names are what stands alone in one of them, besides `names`.

        Raises ValueError where a dose is not greater than 0.
        """
        known = set(names)
        notation = cls(known, combination_separator, dose_separator, tuple(controls))
        together = []
        for label in sorted({label.strip() for label in labels}):
            pieces = notation._pieces(label)
            left = [piece for piece in pieces if not notation._is_control(piece)]
            if notation._is_control(label) or not left:
                continue
            name, _ = split_dose(label, dose_separator)
            if len(notation._pieces(name)) == 1:  # "A", "A@1e+06"
                known.add(name)
            elif "" not in left and len({split_dose(piece, dose_separator)[0] for piece in left}) == 1:
                known.add(split_dose(left[0], dose_separator)[0])  # "A+ctrl", "A+A"
            else:
                doses = [split_dose(piece, dose_separator) for piece in left]
                known.update(name for name, _ in doses if all(dose is not None for _, dose in doses))  # "A@1+B@2"
                together.append((len(pieces), label))
        for _, label in sorted(together):  # the shorter ones first: longer ones may hold them
            if notation._split(label) is None and notation._spelled(label) is None:
                known.add(name := split_dose(label, dose_separator)[0])
                notation._whole[tuple(sorted(notation._pieces(name)))] = name
        return notation

    def parse(self, label: str) -> Parts:
        """What a label stands for; () is the control. Names that are not known are returned as they are.

        Raises ValueError where a dose is not finite and greater than 0.
        """
        label = label.strip()
        if self._is_control(label):
            return ()
        parts = self._split(label)
        if parts is None:
            spelled = self._spelled(label)
            pieces = [label] if spelled or self._is_whole(label) else self._pieces(label)
            parts = [self._part(spelled or piece) for piece in pieces if spelled or not self._is_control(piece)]
        return tuple(sorted(set(parts), key=lambda part: (part[0], part[1] or 0.0)))

    def text(self, parts: Parts) -> str:
        """The label of some parts; the first control label of none."""
        if not parts:
            return self.controls[0]
        words = [name if dose is None else f"{name}{self.dose_separator}{dose_text(dose)}" for name, dose in parts]
        return (self.combination_separator or "").join(words)

    def canonical(self, label: str) -> str:
        """The one way to write a label."""
        return self.text(self.parse(label))

    def _pieces(self, label: str) -> list[str]:
        pieces = [label] if self.combination_separator is None else label.split(self.combination_separator)
        return [piece.strip() for piece in pieces]

    def _part(self, text: str) -> tuple[str, float | None]:
        return (text, None) if text in self.names else split_dose(text, self.dose_separator)

    def _is_whole(self, label: str) -> bool:
        return self._part(label)[0] in self.names or self.combination_separator is None

    @cached_property
    def _whole(self) -> dict[tuple[str, ...], str]:
        # Names that hold the separator, by their pieces in any order.
        separator = self.combination_separator
        names = sorted((name for name in self.names if separator and separator in name), reverse=True)
        return {tuple(sorted(self._pieces(name))): name for name in names}

    def _spelled(self, label: str) -> str | None:
        # A name that was written with its pieces in another order.
        return self._whole.get(tuple(sorted(self._pieces(label)))) if self._whole else None

    def _split(self, label: str) -> list[tuple[str, float | None]] | None:
        # The fewest parts, each a name or a control label, that make the label; None where there are none.
        if self._is_whole(label):
            return [self._part(label)]
        assert self.combination_separator is not None, "a label is whole without it"
        pieces = self._pieces(label)
        longest = 2 + max(map(len, self._whole), default=0)  # "@1e+06" adds one piece
        best: list[list[tuple[str, float | None]] | None] = [[]] + [None] * len(pieces)
        for end in range(1, len(pieces) + 1):
            for begin in range(max(0, end - longest), end):
                before = best[begin]
                text = self.combination_separator.join(pieces[begin:end])
                if before is None or not text:
                    continue
                found = self._control_or_part(text)
                if found is not None and (best[end] is None or len(before) + len(found) < len(best[end])):  # type: ignore[arg-type]
                    best[end] = before + found
        return best[-1]

    def _is_control(self, text: str) -> bool:
        # With a dose, too: of no drug there may be 0.
        before = text.rpartition(self.dose_separator)[0] if self.dose_separator else text
        return text in self.controls or before in self.controls

    def _control_or_part(self, text: str) -> list[tuple[str, float | None]] | None:
        if self._is_control(text):
            return []
        part = self._part(text)
        return [part] if part[0] in self.names else None


def split_dose(part: str, separator: str | None) -> tuple[str, float | None]:
    """ "A@0.5" -> A, 0.5; a part without a number behind its last separator has no dose.

    Raises ValueError where the dose is not greater than 0: no dose is the control.
    """
    name, found, number = part.rpartition(separator) if separator else ("", "", part)
    try:
        dose = float(number) if found and name else None
    except ValueError:
        dose = None
    if dose is None:
        return part, None
    if not 0 < dose < math.inf:
        raise ValueError(f"perturbation {part!r} has dose {number}; doses must be finite and greater than 0.")
    return name, dose


def dose_text(dose: float) -> str:
    """The shortest plain number, without an exponent: its "+" would look like a combination."""
    return np.format_float_positional(dose, trim="-")


def plain_unit(text: object) -> str:
    """A unit as it is compared: of micro there are two characters, and a "u"."""
    plain = str(text).strip().replace("\u00b5", "u").replace("\u03bc", "u")
    return "" if plain.lower() in NO_LABEL else plain


def one_unit(units: Collection[str | None], where: str) -> str | None:
    """The unit of some doses; None where nothing says one. Raises ValueError where there are several."""
    known = sorted({unit for unit in units if unit})
    if len(known) > 1:
        raise ValueError(f"{where}: doses are in {few(known)}; write them in one unit, numbers are compared.")
    return known[0] if known else None
