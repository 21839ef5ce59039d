"""What a run starts from: random weights, a checkpoint adapted to the data, or its own last state."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perturbdiff.atlas.stream import StreamedCells
from perturbdiff.config import Config, PublishedEncoding, as_dict, load_config
from perturbdiff.data.conditions import encode_conditions
from perturbdiff.data.screen import Screen
from perturbdiff.data.vocab import NULL
from perturbdiff.files import few, write_json
from perturbdiff.hub.adapter import Base, save_adapter
from perturbdiff.hub.download import find_model
from perturbdiff.hub.metadata import ModelMetadata
from perturbdiff.hub.model_folder import ModelFolder
from perturbdiff.hub.records import StartRecord
from perturbdiff.hub_client import name_and_revision
from perturbdiff.model import PerturbDiff
from perturbdiff.nn.denoiser import Denoiser, build_denoiser
from perturbdiff.nn.lora import freeze_backbone, inject_lora, merged
from perturbdiff.nn.transfer import Names, Rules, adapt, check_architecture, extended, tables_of
from perturbdiff.training.dataset import (
    CELLS_OF_SUMS,
    IndexedCells,
    TrainingSet,
    complete_conditions,
    marginal_conditions,
    subsample_log1p,
)
from perturbdiff.training.state import saved_states

ADAPTATION = "adaptation.json"  # in the run folder: what a resumption must know of the checkpoint
CELLS_OF_GENES = 4096  # cells at most whose expression says which genes go together
CELLS_OF_PROFILE = 512  # control cells at most that make the profile of a cell type or batch


@dataclass(frozen=True)
class Checkpoint:
    """A model to start from: the one that is asked for, or when resuming, that of the run itself."""

    base: Base
    model: PerturbDiff
    tensor_files: dict[str, str] | None = None  # hashes, where it is not the run's own

    @property
    def names(self) -> Names:
        return Names(self.model.genes, self.model.vocabularies)


@dataclass(frozen=True)
class Start:
    """What a run trains, and on what.

    data
        With the labels of the checkpoint before its own.
    denoiser
        On the CPU; with method=lora its blocks have low-rank changes.
    new_parts
        Parameters that are not copies of a checkpoint's: all without one.
    said
        Of the checkpoint and the adaptation, as JSON values; None without.
    """

    data: TrainingSet
    denoiser: Denoiser
    new_parts: frozenset[str]
    said: dict[str, Any] | None
    summary: str
    scaling: float | None = None  # of low-rank changes

    def own_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights and frozen tables under a denoiser's own names, low-rank changes added."""
        own = dict(weights) if self.scaling is None else merged(weights, self.scaling)
        return {**own, **dict(self.denoiser.named_buffers())}

    def origin(self) -> StartRecord | None:
        """What training.json says of the checkpoint."""
        return None if self.said is None else StartRecord(**self.said["base"], method=self.said["method"])

    def save_adapter(self, out: Path, weights: Mapping[str, Tensor]) -> None:
        """Beside the merged model, what makes it of the checkpoint; nothing without low-rank changes."""
        if self.scaling is not None:
            every = {**weights, **dict(self.denoiser.named_buffers())}
            save_adapter(out / "adapter", out / "model", every, self.scaling)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take up the parameters of a state."""
        own = {name for name, _ in self.denoiser.named_parameters()}
        if own != weights.keys():
            raise ValueError(
                f"the state has other parameters ({few(sorted(own ^ weights.keys()))}); choose another --out."
            )
        self.denoiser.load_state_dict({**weights, **dict(self.denoiser.named_buffers())})


def find_checkpoint(config: Config, out: Path, resuming: bool) -> Checkpoint | None:
    """The checkpoint of config.adapt.init_from, or when resuming the run's own model; None where none is asked for.

    Raises
    ------
    FileNotFoundError, ValueError, OSError
        There is no such model, or it is damaged; it has another architecture than the settings, or reads another X; it
        is not the one that the run was started from.
    """
    if config.adapt.init_from is None:
        return None
    if resuming:
        said = json.loads((out / ADAPTATION).read_text())
        if config.adapt.init_from != started_from(out):
            refuse_another(config.adapt.init_from, out)
        return Checkpoint(Base(**said["base"]), PerturbDiff.from_pretrained(out / "model", device="cpu"))
    base, folder, metadata = checkpoint_metadata(config.adapt.init_from)
    if folder.is_adapter and config.adapt.method == "lora":
        raise ValueError(
            f"{base.name} is an adapter, and adapters are of whole models; `perturbdiff hub merge` it first."
        )
    check_architecture(metadata.config.denoiser, config.denoiser)
    name, revision = name_and_revision(config.adapt.init_from)
    model = PerturbDiff.from_pretrained(name, base.revision or revision, device="cpu")
    return Checkpoint(base, model, folder.tensor_files)


def checkpoint_metadata(init_from: str) -> tuple[Base, ModelFolder, ModelMetadata]:
    """Name and metadata of a checkpoint; its tensors are not looked at. Raises as `find_model`, `ModelSource.read`."""
    source = find_model(init_from)
    folder, metadata = source.read()
    return Base(source.name, source.commit, folder.sha256), folder, metadata


def started_from(out: Path) -> str | None:
    """What the run in a folder that can go on was started from, as it was named; None where there is no such run."""
    there = saved_states(out / "states") and (out / ADAPTATION).is_file()
    return load_config(out / "config.yaml").adapt.init_from if there else None


def settings_of(init_from: str) -> dict[str, Any]:
    """What a run takes over from its checkpoint unless it is told otherwise, as the `base` of `load_config`.

    Raises as `checkpoint_metadata`, and ValueError where training cannot go on from such a model.
    """
    *_, metadata = checkpoint_metadata(init_from)
    return _settings(init_from, metadata)


def settings_at_start(out: Path) -> dict[str, Any] | None:
    """`settings_of` the checkpoint of a run that can go on, as it was; None where an older version started it."""
    said: dict[str, Any] = json.loads((out / ADAPTATION).read_text())
    return said.get("settings")


def _settings(init_from: str, of: ModelMetadata | PerturbDiff) -> dict[str, Any]:
    model, labels = of.config, of.vocabularies
    if model.denoiser.published_encoding != PublishedEncoding():
        raise ValueError(
            f"{init_from} is a converted checkpoint that knows labels by frozen tables, which cannot be trained on; "
            "start from one with rows of labels."
        )
    data = {
        "target_sum": of.preprocessing.target_sum,
        "scale": of.preprocessing.scale,
        "set_size": model.set_size,
        "combination_separator": labels.combination_separator,
        "dose_separator": labels.dose_separator,
    }
    parts = {name: as_dict(getattr(model, name)) for name in ("denoiser", "diffusion", "sampling")}
    return {**parts, "data": data}


def refuse_another(init_from: str, out: Path) -> None:
    """Refuse a checkpoint that is not the one that the run in `out` was started from. Raises ValueError.

    The run needs it no more: a folder that is gone is not missed, and of a repo at no revision newer ones do not count.
    """
    said = json.loads((out / ADAPTATION).read_text())
    started, (name, revision) = Base(**said["base"]), name_and_revision(init_from)
    known = init_from in (said.get("init_from"), started_from(out)) or (name, revision) == (started.name, None)
    if known and not Path(name).is_dir():
        return
    base, folder, _ = checkpoint_metadata(init_from)
    # Scores and card of a model may change, its weights not.
    if base.sha256 != started.sha256 and folder.tensor_files != said.get("tensor_files"):
        raise ValueError(
            f"run folder {out} was started from {started}, and {init_from} is another model, {base}; leave init_from "
            "out (--init-from) to go on, or choose another --out to start from this one."
        )


def prepare(config: Config, screen: Screen | None, out: Path, resuming: bool) -> Start:
    """Read the data of a run and make what it trains.

    Raises as `TrainingSet.from_screen`, `find_checkpoint`, `make_start`.
    """
    checkpoint = find_checkpoint(config, out, resuming)
    known = ([], None) if checkpoint is None else (checkpoint.model.feature_tables(), checkpoint.model.genes)
    if config.data.screen is None:
        data = TrainingSet.from_atlases(config, *known)
    else:
        data = TrainingSet.from_screen(screen or Screen.read(config.data.screen, config.data), config, *known)
    return make_start(config, data, checkpoint, out / ADAPTATION if resuming else None)


def make_start(config: Config, data: TrainingSet, checkpoint: Checkpoint | None, saved: Path | None) -> Start:
    """The denoiser to train: drawn by the seed alone, or adapted from the checkpoint.

    `saved` is the adaptation.json of a run that goes on. Raises as `adapt`, `inject_lora`.
    """
    with torch.random.fork_rng():  # weights depend on the seed alone
        torch.manual_seed(config.training.seed)
        if checkpoint is None:
            denoiser = build_denoiser(config.denoiser, len(data.cells.genes), data.vocabularies)
            for embedding, table in zip(tables_of(denoiser), data.tables, strict=True):
                embedding.fill(table, data.vocabularies.perturbations.names)
            names = frozenset(name for name, _ in denoiser.named_parameters())
            return Start(data, denoiser, names, None, "")
        remarks = _check_same_input(checkpoint, data)
        data = _with_labels(data, checkpoint)
        wanted = Names(data.cells.genes, data.vocabularies)
        rules = _rules(config, data, checkpoint) if saved is None else Rules()
        denoiser, done = adapt(checkpoint.model.denoiser, checkpoint.names, wanted, rules, config.denoiser)
        scaling = None
        if config.adapt.method == "frozen":
            freeze_backbone(denoiser)
        elif config.adapt.method == "lora":
            scaling = config.adapt.lora_alpha / config.adapt.lora_rank
            inject_lora(denoiser, config.adapt.lora_rank, config.adapt.lora_alpha)
    lines = [f"init from   {_called(checkpoint.base)}, {_METHODS[config.adapt.method]}"]
    if saved is not None:
        said = json.loads(saved.read_text())
        return Start(data, denoiser, frozenset(said["new_parts"]), said, lines[0], scaling)
    lora = {name for name, _ in denoiser.named_parameters() if ".lora_" in name}
    said = {
        "base": vars(checkpoint.base),
        "init_from": config.adapt.init_from,
        "method": config.adapt.method,
        "genes_shared": done.n_shared,
        "genes_new": len(done.new_genes),
        "genes_dropped": len(done.dropped_genes),
        "genes_matched_by": done.matched_by,
        "new_labels": {kind: list(names) for kind, names in done.new_labels.items()},
        "new_parts": sorted(done.new_parts | lora),
        "tensor_files": checkpoint.tensor_files,
        "settings": _settings(checkpoint.base.name, checkpoint.model),
    }
    lines += [done.summary(), *_notes(config, checkpoint), *remarks]
    return Start(data, denoiser, done.new_parts | lora, said, "\n".join(lines), scaling)


def write_adaptation(out: Path, start: Start) -> None:
    """Keep what a resumption must know."""
    if start.said is not None:
        write_json(out / ADAPTATION, start.said)


_METHODS = {
    "full": "all weights train",
    "frozen": "the blocks stay as they are",
    "lora": "the blocks get low-rank changes",
}


def _called(base: Base) -> str:
    return base.name + (f" at {base.revision}" if base.revision else "") + f" (config.json {base.sha256[:12]})"


def _notes(config: Config, checkpoint: Checkpoint) -> list[str]:
    had = checkpoint.model.preprocessing
    now = {"target_sum": config.data.target_sum, "scale": config.data.scale}
    return [
        f"note        data.{name} is {value:g}, the checkpoint's {getattr(had, name):g}: it has learned another scale"
        for name, value in now.items()
        if None not in (value, getattr(had, name)) and value != getattr(had, name)
    ]


def _check_same_input(checkpoint: Checkpoint, data: TrainingSet) -> list[str]:
    # Lines for people where the controls of a screen sum to something else than those of the checkpoint did.
    had, has = checkpoint.model.preprocessing, data.cells.preprocessing
    if had.target_sum is None and has.input_kind == "counts":
        raise ValueError(
            f"X holds counts, and checkpoint {checkpoint.base.name} was trained on log1p values of nobody knows how "
            "many counts a cell; normalise X as its training data were, or start from a checkpoint of counts."
        )
    if not isinstance(data.origin, Screen):
        return []
    expression, rows = data.origin.expression, np.flatnonzero(data.origin.is_control)[:CELLS_OF_SUMS]
    controls = replace(expression, X=expression.X[rows], library_size=expression.library_size[rows])
    try:
        found = checkpoint.model.compare_sums(controls)
    except ValueError as error:  # training may adapt to it, predictions cannot
        found = str(error)
    return [f"note        beside the checkpoint's training, {found}"] if found else []


def _with_labels(data: TrainingSet, checkpoint: Checkpoint) -> TrainingSet:
    """The data under the labels of the checkpoint and their own."""
    vocabularies = extended(checkpoint.model.vocabularies, data.vocabularies)

    def relabelled(cells: IndexedCells) -> IndexedCells:
        labels = encode_conditions(vocabularies, cells.index, marginal_conditions(cells.index, cells.sources))
        if data.match != "batch":  # a batch that the checkpoint knows by the same name would give the answer away
            labels = replace(labels, batch=torch.full_like(labels.batch, NULL))
        return replace(cells, labels=labels)

    validation = None if data.validation is None else relabelled(data.validation)
    return replace(data, vocabularies=vocabularies, train=relabelled(data.train), validation=validation)


def _rules(config: Config, data: TrainingSet, checkpoint: Checkpoint) -> Rules:
    expression, profiles = None, dict[str, dict[str, np.ndarray]]()
    index, seed = data.train.index, config.training.seed
    # Streamed cells come shard by shard: no sample of all of them.
    if not isinstance(data.cells, StreamedCells):
        n_new = int((data.cells.genes.align(checkpoint.model.genes, 0.0).columns < 0).sum())
        complete = complete_conditions(index, data.train.measured)
        if n_new and len(complete):
            expression = subsample_log1p(data.cells, complete, CELLS_OF_GENES, seed, "adaptation").toarray()
        if config.adapt.new_labels == "nearest":
            profiles = {kind: _profiles(data.train, column, seed) for column, kind in ((1, "cell_type"), (2, "batch"))}
    return Rules(config.adapt.new_labels, expression, profiles, data.tables)


def _profiles(cells: IndexedCells, column: int, seed: int) -> dict[str, np.ndarray]:
    index, made = cells.index, dict[str, np.ndarray]()
    shared = slice(None) if cells.measured is None else cells.measured.by_all
    if cells.measured is not None and not cells.measured.by_all.any():  # nothing to compare them by
        return made
    for code in np.unique(index.codes[index.is_control, column]):
        controls = index.select(index.is_control & (index.codes[:, column] == code))
        X = subsample_log1p(cells.cells, controls, CELLS_OF_PROFILE, seed, "adaptation")
        made[index.names[column][code]] = np.asarray(X.mean(0)).ravel()[shared]
    return made
