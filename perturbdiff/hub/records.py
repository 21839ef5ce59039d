"""Where the weights of a model come from, and how it scored: training.json and evaluation.json of its folder."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from perturbdiff.files import few, typed

if TYPE_CHECKING:
    from perturbdiff.means.training import TrainingMeans

EVALUATION_VERSION = 2
SUM_QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)  # of `TrainingRecord.control_sums`
MAX_METHODS = 64  # and metrics
MAX_NAME = 200  # characters
MAX_TEXT = 2000
MAX_SCORE = 1e12

Direction = Literal["higher", "lower", "ideal 1", "ideal 0.5"]


def loss(direction: Direction) -> Callable[[np.ndarray], np.ndarray]:
    """From the best score there could be, up to a constant: less is better."""
    losses: dict[Direction, Callable[[np.ndarray], np.ndarray]] = {
        "higher": lambda x: -x, "lower": lambda x: x, "ideal 1": lambda x: np.abs(x - 1),
        "ideal 0.5": lambda x: np.abs(x - 0.5),
    }  # fmt: skip
    return losses[direction]


@dataclass(frozen=True)
class Width:
    """What makes an interval of a spread: mean +- factor * sqrt(spread^2 + floor^2); floor in log1p."""

    factor: float
    floor: float

    def __post_init__(self) -> None:
        if not (self.factor > 0 and self.floor > 0):
            raise ValueError(f"{self} must be two numbers above 0; calibrate the model again.")


@dataclass(frozen=True)
class Coverage:
    """How much of measured gene means intervals hold.

    conditions
        test: held out for the scores, they neither stopped nor chose nor calibrated anything. validation: each left
        out of the calibration in turn; they may have stopped training.
    of_all, of_responding
        Part of the (condition, gene) pairs, and of those that are predicted to respond; None of none.
    """

    conditions: Literal["test", "validation"]
    n_conditions: int
    of_all: float
    of_responding: float | None

    def __post_init__(self) -> None:
        parts = (self.of_all, self.of_all if self.of_responding is None else self.of_responding)
        if not (self.n_conditions > 0 and min(parts) >= 0 and max(parts) <= 1):
            raise ValueError(f"{self} cannot be; calibrate the model again.")


@dataclass(frozen=True)
class Intervals:
    """Intervals of gene means, for genes that respond and for the others (inference/calibration.py).

    level
        Part of (condition, gene) pairs that they are made to cover, in both kinds.
    change
        log1p: genes whose predicted mean changes by as much respond. 0 where all have one width.
    """

    level: float
    change: float
    others: Width
    responding: Width

    def __post_init__(self) -> None:
        if not (0 < self.level < 1 and self.change >= 0):
            raise ValueError(f"{self} cannot be; calibrate the model again.")

    def responds(self, change: np.ndarray) -> np.ndarray:
        """Which genes do, by their predicted changes, log1p."""
        found: np.ndarray = np.abs(change) >= self.change
        return found

    def half_width(self, spread: np.ndarray, change: np.ndarray) -> np.ndarray:
        """Of the interval of each gene, in the shape of `spread` and predicted `change`; NaN where either is."""
        others, responding = (of.factor * np.hypot(spread, of.floor) for of in (self.others, self.responding))
        return np.where(np.isnan(change), np.nan, np.where(self.responds(change), responding, others))


@dataclass(frozen=True)
class Calibration(Intervals):
    """Intervals, how many conditions they were made of, and how much they cover of others."""

    n_conditions: int
    coverage: Coverage

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.n_conditions > 0:
            raise ValueError(f"n_conditions ({self.n_conditions}) must be greater than 0; calibrate the model again.")


@dataclass(frozen=True)
class AtlasRecord:
    """An atlas that cells came from: name of its folder, or repo id with the commit; hash of its files."""

    name: str
    commit: str | None
    sha256: str


@dataclass(frozen=True)
class StartRecord:
    """The checkpoint that training started from.

    revision
        The commit of a repo; None for a folder.
    sha256
        Of its config.json, which states every other file's.
    method
        As `adapt.method`.
    """

    name: str
    revision: str | None
    sha256: str
    method: str


@dataclass(frozen=True)
class MeansRecord:
    """means.json: the training conditions whose means say where predictions start, one entry each; `means_control` and
    `means_perturbed` (n, G) among the weights are theirs, and where `noise` is true `means_control_noise` and
    `means_perturbed_noise`."""

    perturbation: tuple[str, ...]
    cell_type: tuple[str, ...]
    batch: tuple[str, ...]
    n_cells: tuple[int, ...]
    noise: bool

    @classmethod
    def of(cls, means: TrainingMeans) -> MeansRecord:
        labels = tuple(means.perturbation), tuple(means.cell_type), tuple(means.batch)
        noise = means.control_noise is not None and means.perturbed_noise is not None
        return cls(*labels, tuple(means.n_cells.tolist()), noise)

    @property
    def tells_batches_apart(self) -> bool:
        """Whether a perturbation has two batches of a cell type, and the noise in their means is known."""
        where = list(zip(self.perturbation, self.cell_type, strict=True))
        return self.noise and len(set(where)) < len(where)

    def __post_init__(self) -> None:
        lengths = {len(getattr(self, field.name)) for field in fields(self) if field.name != "noise"}
        if len(lengths) > 1 or 0 in lengths or min(self.n_cells) < 1:
            raise ValueError("means.json must name the same number of labels and of cells, at least one of each.")


@dataclass(frozen=True)
class ConversionRecord:
    """The published checkpoint that was converted, and what it says of its training."""

    file: str
    sha256: str
    weights: str  # "ema" or "raw"
    global_step: int | None
    epoch: int | None
    dataset: str | None


@dataclass(frozen=True)
class TrainingRecord:
    """training.json; None where nobody knows.

    screen
        File name of the .h5ad.
    control_match
        Whose controls a set had.
    hold_out
        Selectors of the conditions that training never saw.
    control_sums
        Quantiles, at 1, 25, 50, 75 and 99 %, of what the model's genes sum to in a training control, in normalised
        counts: how later control cells should look.
    measured_genes
        How many genes the training data had, over which library sizes are sums where no column gives them.
    settings
        Every setting of the run, as its own version of the library calls them, and what its tables of features say of
        their origin (`features`): for people and the card, and read by nothing else.
    """

    library_version: str | None = None
    screen: str | None = None
    atlases: tuple[AtlasRecord, ...] = ()
    steps: int | None = None
    cells_seen: int | None = None
    control_match: Literal["batch", "cell_type"] | None = None
    hold_out: tuple[str, ...] | None = None
    init_from: StartRecord | None = None
    converted_from: ConversionRecord | None = None
    license: str | None = None
    calibration: Calibration | None = None
    control_sums: tuple[float, ...] | None = None
    measured_genes: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sums = self.control_sums
        if sums is not None and (len(sums) != len(SUM_QUANTILES) or list(sums) != sorted(sums) or sums[0] < 0):
            raise ValueError(f"control_sums ({few([str(sums)])}) must be {len(SUM_QUANTILES)} rising numbers.")


@dataclass(frozen=True)
class SplitRecord:
    """What was held out, and the hash of the split.json that says so."""

    hold_out: tuple[str, ...]
    sha256: str | None


@dataclass(frozen=True)
class EvaluationRecord:
    """evaluation.json, and scores.json of an evaluation: mean scores on held-out conditions, of model and baselines.

    model, ceiling
        Which of the methods is the model, and which half of the measured cells predicting the other half.
    data
        File name of the measured screen.
    metrics
        Which way each is better.
    mean
        Method -> metric -> unweighted mean over conditions; None where it is undefined on all of them.
    n_undefined
        Method -> metric -> on how many it is.
    interval
        Method -> metric -> 95 % interval of the mean; None where nobody knows.
    verdict
        Whether the model is better than the best simple method, in a sentence or two.
    n_genes, n_left_out
        Scored genes, and those of them that were not predicted and count as no change.
    kept_response
        Part of the squared measured response that lies in the predicted genes.
    notes
        What a reader has to know besides.
    """

    library_version: str
    model: str
    ceiling: str
    data: str | None
    split: SplitRecord | None
    n_conditions: int
    metrics: dict[str, Direction]
    mean: dict[str, dict[str, float | None]]
    n_undefined: dict[str, dict[str, int]]
    interval: dict[str, dict[str, tuple[float, float] | None]]
    verdict: str
    n_genes: int | None
    n_left_out: int
    kept_response: float | None
    notes: tuple[str, ...]

    def __post_init__(self) -> None:
        """Raises ValueError where the tables do not fit each other, or a value is beyond belief."""
        names = (self.library_version, self.model, self.ceiling, self.data or "none", *self.metrics, *self.mean)
        if odd := [name for name in names if not 0 < len(name) <= MAX_NAME]:
            raise ValueError(f"name {odd[0][:40]!r} must have 1 to {MAX_NAME} characters.")
        if self.split is not None and not re.fullmatch("[0-9a-f]{64}|None", str(self.split.sha256)):
            raise ValueError(f"split.sha256 ({self.split.sha256!r:.80}) must be null or 64 hexadecimal digits.")
        if not 0 < self.n_conditions < 1 << 40:
            raise ValueError(f"n_conditions ({self.n_conditions}) must be greater than 0 and less than 2^40.")
        if not 0 < len(self.metrics) <= MAX_METHODS or not len(self.mean) <= MAX_METHODS or self.model not in self.mean:
            raise ValueError(f"metrics and mean must have the model and at most {MAX_METHODS} metrics and methods.")
        if self.n_undefined.keys() != self.mean.keys() or not self.interval.keys() <= self.mean.keys():
            raise ValueError("n_undefined must have the methods of mean, and interval no others.")
        for found in (pair for of in self.interval.values() for pair in of.values() if pair is not None):
            if len(found) != 2 or not -MAX_SCORE <= found[0] <= found[1] <= MAX_SCORE:
                raise ValueError(f"interval ({few([str(found)])}) must be null or two rising numbers.")
        if odd := [text for text in (self.verdict, *self.notes) if len(text) > MAX_TEXT]:
            raise ValueError(f"verdict and notes must have at most {MAX_TEXT} characters: {odd[0][:40]!r}.")
        for method in self.mean:
            if not self.metrics.keys() == self.mean[method].keys() == self.n_undefined[method].keys():
                raise ValueError(
                    f"{method!r} must have a value in mean and n_undefined for each of metrics and no other."
                )
            if any(abs(value or 0.0) > MAX_SCORE for value in self.mean[method].values()):
                raise ValueError(f"mean.{method!r} must be null or numbers of at most {MAX_SCORE:g}.")
            if max(self.n_undefined[method].values()) > self.n_conditions:
                raise ValueError(f"n_undefined.{method!r} must be at most n_conditions ({self.n_conditions}).")

    @property
    def scores(self) -> dict[str, float]:
        """The model's own, those that are defined."""
        own = self.mean[self.model]
        return {metric: value for metric in self.metrics if (value := own[metric]) is not None}

    @property
    def baselines(self) -> list[str]:
        return [method for method in self.mean if method not in (self.model, self.ceiling)]

    def comparable(self, metric: str) -> list[str]:
        """The baselines that are defined on as many conditions as the model: others have means over easier ones."""
        undefined = {method: of[metric] for method, of in self.n_undefined.items()}
        return [method for method in self.baselines if undefined[method] <= undefined[self.model]]

    def better(self, metric: str) -> list[str]:
        """Those of them that beat the model."""
        own = self.distance(self.model, metric)
        return [method for method in self.comparable(metric) if self.distance(method, metric) < own]

    def distance(self, method: str, metric: str) -> float:
        """From the best score there could be, up to a constant: less is better; infinite where undefined."""
        value = self.mean[method][metric]
        if value is None:
            return float("inf")
        return float(loss(self.metrics[metric])(np.array(value)))

    def as_json(self) -> dict[str, Any]:
        return {"format_version": EVALUATION_VERSION, **asdict(self)}


def read_evaluation(content: dict[str, Any], where: str = "evaluation.json") -> EvaluationRecord:
    """Raises ValueError where a key is missing or unknown, a value of the wrong kind, not finite or beyond belief."""
    version = content.get("format_version")
    if type(version) is int and version == 1:  # without doubt
        later: dict[str, Any] = {"interval": {}, "verdict": "", "notes": []}
        later |= {"n_genes": None, "n_left_out": 0, "kept_response": None}
        content, version = {**content, **later}, EVALUATION_VERSION
    if type(version) is not int or version != EVALUATION_VERSION:
        raise ValueError(f"{where}: format_version ({str(version)[:40]!r}) must be {EVALUATION_VERSION}.")
    record: EvaluationRecord = typed(
        EvaluationRecord, {key: value for key, value in content.items() if key != "format_version"}, where
    )
    return record
