"""From a screen or atlases and their settings to what training reads: cells split, genes chosen, indexed, labelled."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd
from scipy import sparse

from perturbdiff.atlas.format import CONTROL_LABEL
from perturbdiff.atlas.store import Atlas
from perturbdiff.atlas.stream import StreamedCells
from perturbdiff.config import COEXPRESSION, Config, DataConfig, Preprocessing
from perturbdiff.data.batch import CellSetBatch, Moves, make_batch
from perturbdiff.data.conditions import (
    ConditionIndex,
    ControlMatch,
    ControlPools,
    encode_conditions,
    match_controls,
    resolve_control_match,
    vocabularies_of,
)
from perturbdiff.data.expression import Cells, ConcatenatedCells, log1p_of
from perturbdiff.data.gene_choice import GeneMoments, best_genes, kept_genes, left_out, squared_response
from perturbdiff.data.identity import content_hashes, gene_keys
from perturbdiff.data.measured import MeasuredGenes
from perturbdiff.data.notation import Notation, one_unit
from perturbdiff.data.rng import permuted
from perturbdiff.data.samplers import CellSet, CellSetSampler, SetSource, StreamedSampler
from perturbdiff.data.screen import Screen
from perturbdiff.data.selectors import LABELS
from perturbdiff.data.space import totals
from perturbdiff.data.splits import Labelled, Split, make_split
from perturbdiff.data.vocab import GeneVocab, Labels, Vocabularies
from perturbdiff.features.coexpression import coexpression_table
from perturbdiff.features.fingerprints import read_features
from perturbdiff.features.tables import FeatureTable, coverage, with_tables
from perturbdiff.files import progress
from perturbdiff.hub.records import SUM_QUANTILES
from perturbdiff.means.training import TrainingMeans
from perturbdiff.training.means import Starts

ROWS_AT_ONCE = 8192
CELLS_OF_LOADINGS = 20_000  # at most
CELLS_OF_SUMS = 2_000
MOST_MEANS = 1 << 23  # conditions x genes: 134 MB in a model folder


@dataclass(frozen=True)
class IndexedCells:
    """The conditions of some cells, their controls and labels (one row a condition), and how they become sets.

    measured
        The genes that were measured in which cells; None where all were in all.
    moves
        Where sets start, where that is not the controls.
    """

    cells: Cells
    index: ConditionIndex
    pools: ControlPools
    labels: Labels
    sources: Sequence[SetSource]
    measured: MeasuredGenes | None = None
    moves: Moves | None = None

    @classmethod
    def build(
        cls,
        cells: Cells,
        index: ConditionIndex,
        match: ControlMatch,
        vocabularies: Vocabularies,
        sources: Sequence[SetSource],
        set_size: int,
        measured: MeasuredGenes | None = None,
    ) -> IndexedCells:
        """Match and label an index that holds the controls too. Raises as `match_controls`, `encode`."""
        borders = cells.borders if isinstance(cells, StreamedCells) else None
        index = index if borders is None else index.cut(borders)
        marginal = marginal_conditions(index, sources)
        pools = match_controls(index, match, ~marginal)
        if borders is not None:  # other shards are read for controls only where a condition's own has too few
            here = match_controls(index.by_shard(borders), match, np.zeros(len(index), dtype=bool))
            pools = pools.preferring(here, set_size)
        return cls(cells, index, pools, encode_conditions(vocabularies, index, marginal), sources, measured)

    def release(self) -> None:
        """Free the memory of shards until the next batch."""
        if isinstance(self.cells, StreamedCells):
            self.cells.open([])

    def close(self) -> None:
        """Give up reading shards that nobody waits for any more."""
        if isinstance(self.cells, StreamedCells):
            self.cells.close()

    def sampler(self, config: Config) -> CellSetSampler | StreamedSampler:
        data = config.data
        rest = (data.set_size, data.sets_per_batch, config.training.seed, data.min_set_size, self.sources)
        if not isinstance(self.cells, StreamedCells):
            return CellSetSampler(self.index, self.pools, *rest)
        return StreamedSampler(self.index, self.pools, self.cells.borders, data.n_streams or 1, *rest)

    def batch(
        self, sampler: CellSetSampler | StreamedSampler, epoch: int, step: int, rank: int, world_size: int
    ) -> CellSetBatch:
        """The batch of one rank in one step."""
        return self.batches(sampler, epoch, step, rank, world_size, 1)[0]

    def batches(
        self, sampler: CellSetSampler | StreamedSampler, epoch: int, step: int, rank: int, world_size: int, n_parts: int
    ) -> list[CellSetBatch]:
        """The sets of one rank in one step, shared by `n_parts` batches; some may have none."""
        sets = self.sets(sampler, epoch, step, rank, world_size)
        return [self.batch_of(sets[i::n_parts], sampler) for i in range(n_parts)]

    def sets(
        self, sampler: CellSetSampler | StreamedSampler, epoch: int, step: int, rank: int, world_size: int
    ) -> list[CellSet]:
        """The sets of one rank in one step, whose shards begin to be read."""
        if isinstance(self.cells, StreamedCells) and isinstance(sampler, StreamedSampler):
            self.cells.open(sampler.shards(epoch, step, rank, world_size))
        return sampler.batch(epoch, step, rank, world_size)

    def batch_of(self, sets: Sequence[CellSet], sampler: CellSetSampler | StreamedSampler) -> CellSetBatch:
        """A batch of some of the `sets` last taken; perhaps of none."""
        return make_batch(sets, sampler.set_size, self.cells, self.labels, self.measured, self.moves)


@dataclass(frozen=True)
class AtlasConditions:
    """The conditions of one or several atlases, as a `Labelled` with one row a condition.

    path
        Each atlas's name and sha256: what the split is of.
    """

    path: str
    obs: pd.DataFrame
    is_control: np.ndarray
    n_cells: np.ndarray
    notation: Notation


@dataclass(frozen=True)
class TrainingSet:
    """Everything training reads. `origin` is what `split` speaks of, with all genes of the file; `atlases` are those of
    the settings, in order; `tables` are what is known of perturbations besides their names; `means` are of the training
    conditions of a screen.
    """

    origin: Labelled
    split: Split
    match: ControlMatch
    vocabularies: Vocabularies
    train: IndexedCells
    validation: IndexedCells | None
    description: str
    atlases: tuple[Atlas, ...]
    tables: tuple[FeatureTable, ...] = ()
    means: TrainingMeans | None = None

    @property
    def cells(self) -> Cells:
        """The training cells with the model's genes only."""
        return self.train.cells

    @classmethod
    def from_screen(
        cls,
        screen: Screen,
        config: Config,
        known_tables: Sequence[FeatureTable] = (),
        known_genes: GeneVocab | None = None,
    ) -> TrainingSet:
        """Split a screen, choose genes on training cells, match controls, collect labels and features.

        `known_tables` are those of a checkpoint, which stand in place of new ones of their names; its genes, as far as
        the data have them, are among those that are chosen.

        Raises
        ------
        ValueError
            A selector matches nothing; a condition has no controls; a validation condition's perturbation is never
            trained on; no set is as large as data.min_set_size.
        """
        everything = ConditionIndex.build(screen, np.ones(len(screen), dtype=bool))
        match = resolve_control_match(everything, config.data.control_match)
        split = make_split(screen, config.split, config.training.seed, None, _condition(match))
        repeats = _refuse_repeats(screen, split)
        match_controls(everything, match)  # held-out conditions need controls too: say so now
        description, whole = screen.summary() + repeats, screen
        kept = kept_genes(screen.expression.genes, screen, known_genes, config.data.keep_genes)
        if config.data.n_hvg is not None and config.data.n_hvg < len(screen.expression.genes):
            moments, response = GeneMoments(len(kept)), squared_response(screen, split.train, match)
            moments.add(screen.expression.log1p(split.train))
            variance = moments.variance()
            chosen = np.union1d(best_genes(config.data.n_hvg, variance, response), np.flatnonzero(kept))
            description += left_out(chosen, {"variance": variance, "squared response": response})
            screen = screen.with_genes(chosen)
        train = ConditionIndex.build(screen, split.train)
        validation = (
            ConditionIndex.build(screen, split.validation | (screen.is_control & split.train))
            if split.validation.any()
            else None
        )
        cells = (screen.expression, screen.expression)
        made = ((SetSource(),), description, (), known_tables, None)
        return cls._indexed(config, whole, cells, split, match, train, validation, *made)

    @classmethod
    def from_atlases(
        cls, config: Config, known_tables: Sequence[FeatureTable] = (), known_genes: GeneVocab | None = None
    ) -> TrainingSet:
        """Open the atlases of config.data, split their conditions, choose genes, match controls, collect labels.

        `known_tables`, `known_genes` as in `of`.

        Raises
        ------
        FileNotFoundError, ValueError
            As `Atlas.open`; atlases differ in genes or kind of input; as `of`.
        """
        atlases = [Atlas.open(atlas.path, atlas.revision) for atlas in config.data.atlases]
        _refuse_twice(atlases, config)
        sources = tuple(
            SetSource(atlas.sets != "perturbed", atlas.weight, atlas.sets == "self_controlled")
            for atlas in config.data.atlases
        )
        preprocessing = _common_preprocessing(atlases, config)
        first_rows = np.cumsum([0, *map(len, atlases)])
        index = ConditionIndex.concat([_index(atlas) for atlas in atlases], first_rows[:-1].tolist())
        measured = _measured_genes(atlases, first_rows)
        marginal = marginal_conditions(index, sources)
        origin = _conditions(index, atlases, config.data)
        match = resolve_control_match(index.select(~marginal), config.data.control_match)
        split = make_split(origin, config.split, config.training.seed, marginal, _condition(match))
        note = _refuse_shared(atlases, index, split)
        match_controls(index, match, ~marginal)
        train = index.select(split.train)
        validation = index.select(split.validation | origin.is_control) if split.validation.any() else None
        kept = kept_genes(atlases[0].genes, origin, known_genes, config.data.keep_genes)
        cells: tuple[Cells, Cells]  # for training and validation, whose streams must not disturb each other
        if config.data.streamed:
            _refuse_choosing_genes(len(atlases[0].genes), config)
            controls = _spans(index.select(index.is_control))
            streams = (atlases, preprocessing, controls, config.data.decoding_threads)
            cells = StreamedCells(*streams), StreamedCells(*streams)
        else:
            taken, said = _cached_cells(atlases, preprocessing, train, config.data.n_hvg, kept, measured)
            cells, note = (taken, taken), note + said
        if measured is not None:
            position = {name: i for i, name in enumerate(atlases[0].genes.names)}
            measured = measured.select(np.array([position[name] for name in cells[0].genes.names]))
        if len(rules := _library_rules(atlases)) > 1:
            note += (
                f"\nnote        library sizes of sources are {' and '.join(rules)}; predictions take row sums of X, or "
                "what data.library_size_col=NAME says"
            )
        description = "\n".join(atlas.summary() for atlas in atlases) + note
        made = (sources, description, tuple(atlases), known_tables, measured)
        return cls._indexed(config, origin, cells, split, match, train, validation, *made)

    @classmethod
    def _indexed(
        cls,
        config: Config,
        origin: Labelled,
        cells: tuple[Cells, Cells],
        split: Split,
        match: ControlMatch,
        train: ConditionIndex,
        validation: ConditionIndex | None,
        sources: Sequence[SetSource],
        description: str,
        atlases: tuple[Atlas, ...],
        known_tables: Sequence[FeatureTable],
        measured: MeasuredGenes | None,
    ) -> TrainingSet:
        # Where batch and perturbation are confounded, a batch label would give the answer away.
        marginal = marginal_conditions(train, sources)
        vocabularies = vocabularies_of(train, origin.notation, match == "batch", marginal)
        description += "".join(f"\nnote        {note}" for note in split.notes)
        tables = _feature_tables(config, cells[0], train, known_tables, measured)
        if tables:
            lines = coverage(tables, vocabularies.labelled).splitlines()
            description += "".join(f"\nfeatures    {line}" for line in lines)
            vocabularies = with_tables(vocabularies, tables)
        indexed = IndexedCells.build(cells[0], train, match, vocabularies, sources, config.data.set_size, measured)
        sampler = indexed.sampler(config)
        if sampler.n_sets == 0:
            raise ValueError(
                f"no training condition has data.min_set_size ({config.data.min_set_size}) cells; lower it."
            )
        validated = None
        if validation is not None:
            only_controls = (SetSource(),) * len(sources)  # unperturbed cells are not held out, so nothing to score
            try:
                validated = IndexedCells.build(
                    cells[1], validation, match, vocabularies, only_controls, config.data.set_size, measured
                )
            except KeyError as error:
                raise ValueError(f"split.validation cannot be scored: {error.args[0]} Validate known ones.") from error
        means = None
        start, network_weight = config.diffusion.start, config.sampling.network_weight
        trained = Starts(indexed.cells, indexed.index, indexed.pools)
        # Where predictions do without, they are kept of screens as far as they are small, and not in adapters.
        kept = config.denoiser.conditioning == "labels" and config.adapt.method != "lora" and not atlases
        kept = kept and len(trained.numbers) * len(cells[0].genes) <= MOST_MEANS
        if start != "controls" or (kept and network_weight < 1):
            means = replace(trained.means(vocabularies.notation), tables=tables)
            if tables and (start == "mean" or network_weight < 1):
                description += f"\nweights     {means.feature_fit.summary()}"
            indexed = replace(indexed, moves=trained.trained_moves(means, start))
            if validated is not None:
                others = Starts(validated.cells, validated.index, validated.pools)
                validated = replace(validated, moves=others.told_moves(means, start, network_weight))
        elif kept:
            with suppress(ValueError), np.errstate(all="ignore"):  # of values that overflow the loss tells which
                means = replace(trained.means(vocabularies.notation), tables=tables)
        if sampler.left_out:
            description += f"\nleft out    {sampler.left_out:,} cells of conditions under data.min_set_size="
            description += str(config.data.min_set_size)
        return cls(origin, split, match, vocabularies, indexed, validated, description, atlases, tables, means)

    @cached_property
    def control_sums(self) -> tuple[float, ...] | None:
        """`TrainingRecord.control_sums`, of up to 2,000 controls; None of a stream, which is not read for this."""
        index = self.train.index
        if isinstance(self.cells, StreamedCells) or not index.is_control.any():
            return None
        X = subsample_log1p(self.cells, index.select(index.is_control), CELLS_OF_SUMS, 0, "control sums")
        sums = totals(np.expm1(X.data.astype(np.float64)), X.indptr)
        return tuple(np.quantile(sums, SUM_QUANTILES).tolist())

    @property
    def measured_genes(self) -> int:
        """Genes of the data, those that the model leaves out too."""
        return self.origin.expression.n_measured if isinstance(self.origin, Screen) else len(self.atlases[0].genes)

    def summary(self) -> str:
        """What will be trained on, for a person, several lines."""
        perturbed, n_cells = ~self.origin.is_control, self.origin.n_cells
        known = self.vocabularies
        n = {
            part: int(n_cells[getattr(self.split, part) & perturbed].sum()) for part in ("train", "validation", "test")
        }
        of_features = f", {known.n_by_features:,} more known by features" if known.n_by_features else ""
        lines = [
            f"genes       {len(self.cells.genes):,} in the model{_by_not_all(self.train.measured)}",
            f"split       {n['train']:,} perturbed cells to train on, {n['validation']:,} to validate, "
            f"{n['test']:,} held out",
            f"labels      {len(known.labelled)} perturbations, {len(known.cell_types)} cell types, "
            f"{len(known.batches)} batches seen in training{of_features}",
            "controls    matched by "
            + (
                "cell type and batch"
                if self.match == "batch"
                else "cell type only (asked for, or no batch holds both controls and perturbed cells); "
                "batch labels are left out"
            ),
        ]
        return "\n".join([self.description, *lines])


def _condition(match: ControlMatch) -> tuple[str, ...]:
    """The labels that a model knows a condition by: batches only where they hold controls and perturbed cells."""
    return LABELS if match == "batch" else LABELS[:2]


def marginal_conditions(index: ConditionIndex, sources: Sequence[SetSource]) -> np.ndarray:
    """(n_conditions,) True where a condition is of a marginal source."""
    return np.array([source.marginal for source in sources], dtype=bool)[index.source]


def _refuse_twice(atlases: Sequence[Atlas], config: Config) -> None:
    seen: dict[tuple[str, str], str] = {}
    for atlas, given in zip(atlases, config.data.atlases, strict=True):
        key = atlas.sha256, given.sets
        if key in seen:
            raise ValueError(
                f"data.atlases {seen[key]} and {given.path} are the same atlas (sha256 {atlas.sha256[:12]}), both with "
                f"sets={given.sets}; give it once, with a larger weight if its cells shall count more."
            )
        seen[key] = given.path


def _refuse_repeats(screen: Screen, split: Split) -> str:
    """Refuse to train on a held-out cell under another label; says how many cells of a screen come again."""
    X = screen.expression.X
    hashes, compared = content_hashes(gene_keys(X.shape[1]), X.indices, X.data, X.indptr)
    leaks = compared & split.test & np.isin(hashes, hashes[compared & split.train])
    if leaks.any():
        row = int(leaks.argmax())
        other = int(np.flatnonzero(compared & split.train & (hashes == hashes[row]))[0])
        one, two = (":".join(screen.obs.iloc[i][list(LABELS)]) for i in (row, other))
        raise ValueError(
            f"{int(leaks.sum()):,} held-out cells of {screen.path} are there again under training labels, as a cell of "
            f"{one} under {two}; leave the copies out (data.drop), or hold them out too."
        )
    n_again = int(compared.sum()) - len(np.unique(hashes[compared]))
    return f"\nnote        {n_again:,} cells equal another one, gene by gene" if n_again else ""


def _refuse_shared(atlases: Sequence[Atlas], index: ConditionIndex, split: Split) -> str:
    """Refuse to train on a held-out cell under another label; says where cells are validated that train."""
    links, first = [], 0
    for atlas in atlases:
        links.append(atlas.shared() + np.array([first, first, 0]))
        first += len(atlas.conditions)
    held, other, n = np.concatenate(links).T
    leaks = np.flatnonzero(split.test[held] & split.train[other])
    if len(leaks):
        worst = leaks[np.argmax(n[leaks])]
        (p, c, b), (p2, c2, b2) = index.labels(int(held[worst])), index.labels(int(other[worst]))
        more = f" ({len(leaks)} such pairs of conditions)" if len(leaks) > 1 else ""
        too = "" if index.is_control[other[worst]] else f"hold out {p2}:{c2}:{b2} too, or "
        raise ValueError(
            f"{n[worst]:,} cells of the held-out condition (perturbation {p!r}, cell type {c!r}, batch {b!r}) are also "
            f"in the training condition (perturbation {p2!r}, cell type {c2!r}, batch {b2!r}){more}; {too}"
            "build the atlas without the source that repeats them (source.drop, source.where)."
        )
    n_validated = len(np.unique(held[split.validation[held] & split.train[other]]))
    if n_validated == 0:
        return ""
    return f"\nnote        {n_validated:,} validation conditions hold cells that also train elsewhere: scores flatter"


def _measured_genes(atlases: Sequence[Atlas], first_rows: np.ndarray) -> MeasuredGenes | None:
    if all(atlas.measured.all() for atlas in atlases):
        return None
    panels, tables = zip(*(atlas.panels() for atlas in atlases), strict=True)
    first_panels = np.cumsum([0, *map(len, tables)])
    n_cells = np.concatenate([atlas.conditions.column("n_cells").to_numpy() for atlas in atlases])
    panel = np.concatenate([panel + first for panel, first in zip(panels, first_panels, strict=False)])
    return MeasuredGenes(np.cumsum(n_cells) - n_cells, panel, np.concatenate(tables))


def _by_not_all(measured: MeasuredGenes | None) -> str:
    if measured is None:
        return ""
    n = int((~measured.by_all).sum())
    return f", {n:,} of them not measured in every source: sets without a gene say nothing of it"


def complete_conditions(index: ConditionIndex, measured: MeasuredGenes | None) -> ConditionIndex:
    """Those of an index of atlases in whose cells all genes were measured."""
    return index if measured is None else index.select(measured.complete(index.first))


def _common_preprocessing(atlases: Sequence[Atlas], config: Config) -> Preprocessing:
    first, data = atlases[0], config.data
    if data.target_sum is None:
        raise ValueError("data.target_sum=null is for a screen, whose controls give it; give atlases a number, as 1e4.")
    for other in atlases[1:]:
        if other.info.input_kind != first.info.input_kind:
            raise ValueError(
                f"atlas {first.name} holds {first.info.input_kind}, {other.name} {other.info.input_kind}; train on "
                "atlases of one kind."
            )
        if other.genes.names != first.genes.names:
            differ = sorted(set(other.genes.names) ^ set(first.genes.names))
            raise ValueError(
                f"atlases {first.name} and {other.name} must have the same genes in the same order; {len(differ)} "
                f"differ ({', '.join(differ[:3])}{', ...' if len(differ) > 3 else ''}). Build one with "
                "--genes OTHER/genes.parquet."
            )
    target_sum: float | None = data.target_sum
    if first.info.input_kind == "log1p":
        target_sum = first.info.target_sum if len({atlas.info.target_sum for atlas in atlases}) == 1 else None
    column = _library_column(atlases)
    _refuse_unheard(data, column)
    return Preprocessing(first.info.input_kind, target_sum, data.scale, column)


def _library_column(atlases: Sequence[Atlas]) -> str | None:
    """The obs column that all sources took their library sizes from, so that later cells' are theirs; else None."""
    rules = _library_rules(atlases)
    column = re.fullmatch("column '(.*)'", rules[0]) if len(rules) == 1 else None
    return column[1] if column else None


def _library_rules(atlases: Sequence[Atlas]) -> list[str]:
    return sorted({source.library_size for atlas in atlases for source in atlas.info.sources})


def _refuse_unheard(data: DataConfig, column: str | None) -> None:
    # What was settled when the atlas was built.
    unheard = {name: getattr(data, name) for name in ("layer", "dose_col") if getattr(data, name) is not None}
    if data.input_kind != "auto":
        unheard["input_kind"] = data.input_kind
    if data.library_size_col not in (None, column):
        unheard["library_size_col"] = data.library_size_col
    if unheard:
        given = ", ".join(f"data.{name} ({value!r})" for name, value in unheard.items())
        raise ValueError(f"{given}: an atlas cannot honour it, its values are as they were built; leave it out.")


def _refuse_choosing_genes(n_genes: int, config: Config) -> None:
    if config.data.n_hvg is not None and config.data.n_hvg < n_genes:
        raise ValueError(
            f"data.n_hvg ({config.data.n_hvg}) needs a pass over all cells, which data.streamed=true does not make; "
            "set data.n_hvg=null, or build the atlas with --genes merge-then-select:N."
        )


def _cached_cells(
    atlases: Sequence[Atlas],
    preprocessing: Preprocessing,
    train: ConditionIndex,
    n_hvg: int | None,
    kept: np.ndarray,
    measured: MeasuredGenes | None,
) -> tuple[Cells, str]:
    """Cells with the genes that are chosen, and what is said of the others."""
    for atlas in atlases:
        atlas.download()
    n_cells = [len(atlas) for atlas in atlases]
    cells = ConcatenatedCells.concatenate([atlas.arrow_cells(None, preprocessing) for atlas in atlases], n_cells)
    if n_hvg is None or n_hvg >= len(cells.genes):
        return cells, ""
    variance = _variance(cells, train, measured)
    chosen = np.union1d(best_genes(n_hvg, variance), np.flatnonzero(kept))
    genes, said = cells.genes.select(chosen), left_out(chosen, {"variance": variance})
    parts = [atlas.arrow_cells(genes, preprocessing) for atlas in atlases]
    return ConcatenatedCells.concatenate(parts, n_cells), said


def _feature_tables(
    config: Config,
    cells: Cells,
    train: ConditionIndex,
    known: Sequence[FeatureTable],
    measured: MeasuredGenes | None,
) -> tuple[FeatureTable, ...]:
    tables, of_checkpoint = [], {table.name: table for table in known}
    for given in config.data.perturbation_features:
        if given == COEXPRESSION:
            # Loadings of other cells would have other axes, on which a checkpoint's weights mean nothing.
            tables.append(
                of_checkpoint.get(COEXPRESSION) or _coexpression(cells, train, config.training.seed, measured)
            )
        else:
            tables.append(read_features(given))
    if len({table.name for table in tables}) < len(tables):
        raise ValueError(
            f"data.perturbation_features {list(config.data.perturbation_features)} must have different names "
            f"({', '.join(table.name for table in tables)}); rename a file."
        )
    return tuple(tables)


def _coexpression(cells: Cells, train: ConditionIndex, seed: int, measured: MeasuredGenes | None) -> FeatureTable:
    if isinstance(cells, StreamedCells):
        raise ValueError(
            "data.perturbation_features=[coexpression] needs a pass over cells, which data.streamed=true does not "
            "make; give a table instead."
        )
    complete = complete_conditions(train, measured)
    if not len(complete):
        raise ValueError(
            "data.perturbation_features=[coexpression] needs cells in which all genes were measured, and no training "
            "condition has any; give a table, or build the atlas with --genes intersection."
        )
    X = subsample_log1p(cells, complete, CELLS_OF_LOADINGS, seed, "loadings")
    return coexpression_table(X, cells.genes.names, name=COEXPRESSION).directions()


def subsample_log1p(cells: Cells, index: ConditionIndex, most: int, seed: int, purpose: str) -> sparse.csr_matrix:
    """log1p values of at most so many cells of some conditions, drawn by (seed, purpose)."""
    ends = np.cumsum(index.n_cells)
    n = int(ends[-1])
    positions = np.sort(permuted(n, np.arange(min(n, most)), seed, purpose))
    condition = np.searchsorted(ends, positions, "right")
    rows = index.rows_at(index.first[condition] + positions - (ends - index.n_cells)[condition])
    return sparse.csr_matrix(log1p_of(cells, rows))


def _index(atlas: Atlas) -> ConditionIndex:
    column = atlas.conditions.column
    perturbation, cell_type, batch = (column(name).combine_chunks().to_pandas() for name in LABELS)
    return ConditionIndex.from_conditions(
        perturbation, cell_type, batch, column("is_control").to_numpy(), column("n_cells").to_numpy()
    )


def _conditions(index: ConditionIndex, atlases: Sequence[Atlas], data: DataConfig) -> AtlasConditions:
    obs = pd.DataFrame(
        {name: pd.Categorical.from_codes(index.codes[:, i], pd.Index(index.names[i])) for i, name in enumerate(LABELS)}
    )
    obs["source"] = pd.Categorical(np.concatenate([atlas.sources() for atlas in atlases]))
    names = ", ".join(f"{atlas.name} ({atlas.sha256})" for atlas in atlases)
    markers = {atlas.info.dose_separator for atlas in atlases} - {None}
    marker = data.dose_marker or (markers.pop() if markers else None)
    genes, controls = atlases[0].genes.names, (CONTROL_LABEL,)
    notation = Notation.learned(index.names[0], data.combination_separator, marker, controls, genes)
    unit = one_unit({atlas.info.dose_unit for atlas in atlases}, "the atlases")
    return AtlasConditions(names, obs, index.is_control, index.n_cells, replace(notation, dose_unit=unit))


def _spans(index: ConditionIndex) -> np.ndarray:
    """(n, 2) first row and end of the stretches of rows that an index covers."""
    ends = index.first + index.n_cells
    if not len(index):
        return np.zeros((0, 2), np.int64)
    begins = np.flatnonzero(np.concatenate([[True], index.first[1:] != ends[:-1]]))
    return np.stack([index.first[begins], ends[np.append(begins[1:], len(index)) - 1]], axis=1)


def _chunks(index: ConditionIndex) -> Iterator[np.ndarray]:
    for start, stop in _spans(index).tolist():
        for first in range(start, stop, ROWS_AT_ONCE):
            yield np.arange(first, min(first + ROWS_AT_ONCE, stop))


def _variance(cells: Cells, train: ConditionIndex, measured: MeasuredGenes | None) -> np.ndarray:
    moments = GeneMoments(len(cells.genes))
    with progress(int(train.n_cells.sum()), "choose genes", "cell") as bar:
        for rows in _chunks(train):
            for part, genes in [(rows, None)] if measured is None else measured.parts(rows):
                moments.add(log1p_of(cells, part), genes)
            bar.update(len(rows))
    return moments.variance()
