"""Requests for predictions: one line of a csv each, checked before the first is made."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from perturbdiff.config import ObsColumns
from perturbdiff.data.screen import control_cells
from perturbdiff.data.vocab import nearest
from perturbdiff.files import few, printable, short
from perturbdiff.model import PerturbDiff

COLUMNS = ("perturbation", "cell_type", "batch", "n_cells", "n_populations", "seed")
MAX_FILE_BYTES = 1 << 26
MAX_REQUESTS = 100_000


@dataclass(frozen=True)
class Request:
    """One prediction to make, with the meaning of `PerturbDiff.predict`; `line` is that of the file, for messages."""

    perturbation: str
    cell_type: str | None = None
    batch: str | None = None
    n_cells: int | None = None
    n_populations: int = 1
    seed: int = 0
    line: int | None = field(default=None, compare=False)

    @property
    def where(self) -> str:
        return "" if self.line is None else f"line {self.line} of the requests: "


def read_requests(path: str | Path, default: Request | None = None) -> list[Request]:
    """The requests of a csv: a column `perturbation`, and perhaps others of `COLUMNS`; empty is `default`'s value.

    Raises
    ------
    FileNotFoundError, ValueError
        No such file; too large, not a csv, a column that is missing or unknown, no request, or a value that is not a
        whole number: the message names the line.
    """
    path, default = Path(path), default or Request("")
    if not path.is_file():
        raise FileNotFoundError(f"requests {path} does not exist or is not a file; give a csv.")
    if (size := path.stat().st_size) > MAX_FILE_BYTES:
        raise ValueError(f"requests {path} has {size:,} bytes; at most {MAX_FILE_BYTES:,} are read: cut it in parts.")
    requests: list[Request] = []
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            _check_header(path, header)
            for values in reader:
                if not any(value.strip() for value in values):
                    continue
                requests.append(_request(path, reader.line_num, header, values, default))
                if len(requests) > MAX_REQUESTS:
                    raise ValueError(f"requests {path} has more than {MAX_REQUESTS:,} lines; cut it in parts.")
        except (csv.Error, UnicodeDecodeError) as error:
            line = f", line {reader.line_num}" if isinstance(error, csv.Error) else ""  # text is decoded in blocks
            raise ValueError(f"requests {path} is not a csv{line} ({short(error)}); write one in UTF-8.") from error
    if not requests:
        raise ValueError(f"requests {path} has no line below its header; give one a prediction.")
    return requests


def check_requests(model: PerturbDiff, requests: Sequence[Request]) -> None:
    """Refuse what could not be predicted, before anything is.

    Raises
    ------
    KeyError, ValueError
        An unknown perturbation, with the nearest ones and the lines of others; a number that cannot be.
    """
    if not requests:
        raise ValueError("no requests; give at least one.")
    for request in requests:
        if min(1 if request.n_cells is None else request.n_cells, request.n_populations) < 1 or request.seed < 0:
            raise ValueError(
                f"{request.where}n_cells ({request.n_cells}), n_populations ({request.n_populations}) and seed "
                f"({request.seed}) must be at least 1, 1 and 0."
            )
    unknown: dict[str, str] = {}
    for label in dict.fromkeys(request.perturbation for request in requests):
        try:
            model.vocabularies.encode([(label, None, None)])
        except (KeyError, ValueError) as error:
            unknown[label] = str(error.args[0])
    if wrong := [request for request in requests if request.perturbation in unknown]:
        lines = ", ".join(str(request.line) for request in wrong[1:6] if request.line is not None)
        more = f" So {len(wrong) - 1} more{f', lines {lines}' if lines else ''}." if len(wrong) > 1 else ""
        raise KeyError(f"{wrong[0].where}{unknown[wrong[0].perturbation]}{more}")


def controls_for(
    model: PerturbDiff,
    controls: AnnData | str | Path,
    cell_type: str | None = None,
    batch: str | None = None,
    layer: str | None = None,
) -> AnnData:
    """Control cells to start from: an AnnData of them, or those of an .h5ad; of one cell type or batch if given.

    Raises as `PerturbDiff.predict` and `control_cells`.
    """
    if isinstance(controls, str | Path):
        return model.in_own_space(control_cells(controls, model.config.obs, cell_type, batch, layer))
    return model.controls_of(controls, layer, cell_type, batch)


def context_rows(obs: pd.DataFrame, columns: ObsColumns, requests: Sequence[Request]) -> list[np.ndarray]:
    """Rows of the control cells of each request: of its cell type and batch, or of all where it or obs says none.

    Raises ValueError where there are none; the message lists what is there.
    """
    labels = {name: obs[name].astype(str).to_numpy() for name in (columns.cell_type, columns.batch) if name in obs}
    found: dict[tuple[str | None, str | None], np.ndarray] = {}
    for what, column in (("cell_type", columns.cell_type), ("batch", columns.batch)):
        if (given := {getattr(request, what) for request in requests} - {None}) and column not in labels:
            warnings.warn(
                f"no obs column {column!r}: all {len(obs):,} control cells are taken for each {what} of the requests, "
                f"{few(sorted(map(str, given)))}",
                UserWarning,
                stacklevel=3,
            )
    for request in requests:
        context = (request.cell_type, request.batch)
        if context in found:
            continue
        chosen = np.ones(len(obs), dtype=bool)
        for column, value in ((columns.cell_type, request.cell_type), (columns.batch, request.batch)):
            if value is None or column not in labels:
                continue
            here = chosen & (labels[column] == value)
            if not here.any():
                raise ValueError(
                    f"{request.where}no control cell has {column} {value!r}"
                    f"{f' with the cell type {request.cell_type!r}' if chosen.sum() < len(chosen) else ''}; "
                    f"{nearest(value, set(labels[column][chosen]))}."
                )
            chosen = here
        found[context] = np.flatnonzero(chosen)
    return [found[request.cell_type, request.batch] for request in requests]


def _check_header(path: Path, header: Sequence[str]) -> None:
    if "perturbation" not in header:
        raise ValueError(
            f"requests {path} has no column 'perturbation'; found {printable(', '.join(header))[:200]!r}. The first "
            "line names the columns, between commas."
        )
    for name in header:
        if name not in COLUMNS:
            raise ValueError(f"requests {path} has a column {printable(name[:80])!r}; {nearest(name, COLUMNS)}.")
        if header.count(name) > 1:
            raise ValueError(f"requests {path} has {header.count(name)} columns {name!r}; keep one.")


def _request(path: Path, line: int, header: Sequence[str], values: Sequence[str], default: Request) -> Request:
    if len(values) != len(header):
        raise ValueError(f"requests {path}, line {line}, has {len(values)} fields; the header has {len(header)}.")
    given: dict[str, Any] = {name: value.strip() for name, value in zip(header, values, strict=True) if value.strip()}
    if "perturbation" not in given:
        raise ValueError(f"requests {path}, line {line}, names no perturbation; fill it in or drop the line.")
    for name, least in (("n_cells", 1), ("n_populations", 1), ("seed", 0)):
        if name in given:
            given[name] = _whole_number(given[name], least, f"requests {path}, line {line}: {name}")
    return Request(**{**asdict(default), **given, "line": line})


def _whole_number(text: str, least: int, what: str) -> int:
    try:
        number = float(text)  # "12.0" too: a table with gaps writes whole numbers so
        whole = int(text) if text.isdecimal() else int(number) if number.is_integer() else None
    except ValueError:
        whole = None
    if whole is None or not least <= whole < 1 << 63:
        raise ValueError(f"{what} ({printable(text[:40])}) must be a whole number of at least {least}.")
    return whole
