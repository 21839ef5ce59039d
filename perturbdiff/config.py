"""Every setting of PerturbDiff, and `load_config`: defaults <- yaml <- key=value.

Settings are dataclasses resolved by OmegaConf, so a typo or a wrong type is an error that names the key.
Sizes that come from data (genes, labels) are not settings: they are passed to what needs them.
"""

# No `from __future__ import annotations` here: OmegaConf resolves these annotations at run time.
import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING as REQUIRED
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, Optional, TypeVar, get_args, get_origin

import yaml  # type: ignore[import-untyped]
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from perturbdiff.files import short, write_text

T = TypeVar("T")
# Within the package where it was installed from a wheel, beside it in a checkout.
_SHIPPED = (Path(__file__).parent / "recipes", Path(__file__).parents[1] / "recipes")
RECIPES = next((folder for folder in _SHIPPED if folder.is_dir()), _SHIPPED[0])
COEXPRESSION = "coexpression"  # in place of a table: features from the training cells themselves
MAX_FEATURES = 1 << 20  # columns of a frozen table, or covariates: more is a mistake or an attack


@dataclass(frozen=True)
class Bounds:
    """What a number must be: above one or at least one, below one or at most one."""

    above: float = -math.inf
    least: float = -math.inf
    below: float = math.inf
    most: float = math.inf

    def allow(self, value: float) -> bool:
        return self.above < value < self.below and self.least <= value <= self.most

    def __str__(self) -> str:
        if self == Bounds(least=0):
            return "not be negative"
        if math.isfinite(self.least + self.most):
            return f"be between {self.least} and {self.most}"
        rules = {"greater than": self.above, "at least": self.least, "less than": self.below, "at most": self.most}
        return "be " + " and ".join(f"{rule} {limit}" for rule, limit in rules.items() if math.isfinite(limit))


def bounded(default: Any, **bounds: float) -> Any:
    """A setting with the `Bounds` that `check_bounds` holds it to."""
    return field(default=default, metadata={"bounds": Bounds(**bounds)})


@dataclass
class AtlasSize:
    """What `plan` reckons with where an atlas is not at hand; one that is counts itself."""

    cells: int = MISSING  # those a training run sees: without controls, unless sets=marginal
    genes: int = MISSING
    genes_per_cell: int = MISSING  # stored values, on average
    perturbations: int = 0
    cell_types: int = 0
    batches: int = 0


@dataclass
class AtlasConfig:
    path: str = MISSING  # folder, or repo id of a data set on the Hub
    revision: Optional[str] = None  # branch, tag or commit of a repo
    weight: Optional[float] = bounded(None, above=0)  # share of the sets beside the others'; null: by their number
    # marginal: all cells, no label of perturbation, no controls; self_controlled: the same with cells of their own
    # condition as controls, from which nothing changes.
    sets: Literal["perturbed", "marginal", "self_controlled"] = "perturbed"
    expected: Optional[AtlasSize] = None


@dataclass
class DataConfig:
    screen: Optional[str] = None  # path of the .h5ad; or
    atlases: list[AtlasConfig] = field(default_factory=list)  # with one gene space, mixed by weight
    streamed: bool = False  # atlases: read whole shards as they come instead of a memory-mapped cache on disk
    n_streams: Optional[int] = bounded(None, least=1)  # shards open at once over all processes; null: one a process
    # Of a process, for shards; no number depends on them. null: its share of the machine's cores, at most 4.
    decoding_threads: Optional[int] = bounded(None, least=1)
    perturbation_col: str = "perturbation"  # obs columns
    cell_type_col: Optional[str] = "cell_type"  # null: all cells are of one type, called "all"
    batch_col: Optional[str] = "batch"  # null: all cells are of one batch, called "all"
    control_label: str = "control"  # value of perturbation_col that marks control cells
    other_control_labels: list[str] = field(default_factory=list)  # more such values
    drop: list[str] = field(default_factory=list)  # cells of a screen to leave out: nan, "", doublet:T1, batch=b3, ...
    # "A+B" is A and B together where each stands alone elsewhere or is a gene or a control; null: never.
    combination_separator: Optional[str] = "+"
    dose_col: Optional[str] = None  # obs column of doses, which labels then get: "A@0.5"
    dose_separator: Optional[str] = None  # "A@0.5" is A at dose 0.5; null: "@" with dose_col, otherwise no doses
    # Tables of perturbations: files of name -> vector or of name, smiles; or "coexpression", loadings of the model's
    # genes in the training cells.
    perturbation_features: list[str] = field(default_factory=list)
    layer: Optional[str] = None  # values to read in place of X: a layer, or "raw" for .raw
    input_kind: Literal["auto", "counts", "log1p"] = "auto"  # what X holds
    library_size_col: Optional[str] = None  # obs column of total counts when X is a panel; null: row sums of X
    # Counts per cell after normalisation; null: the median of a screen's controls.
    target_sum: Optional[float] = bounded(1e4, above=0)
    scale: float = bounded(10.0, above=0)  # model space is log1p / scale
    # At most so many genes: those that vary and respond most, by training cells; null: all. A checkpoint's stay too.
    n_hvg: Optional[int] = bounded(6000, least=1)
    keep_genes: list[str] = field(default_factory=list)  # that stay whatever they do; so do genes that are perturbed
    control_match: Literal["auto", "batch", "cell_type"] = "auto"  # whose controls a set gets (README, "Controls")
    set_size: int = bounded(32, above=0)  # S, cells per set
    min_set_size: int = bounded(1, least=1)  # sets are never smaller; conditions with fewer cells are left out
    sets_per_batch: int = bounded(12, above=0)  # B, sets per step over all processes
    prefetch: int = bounded(2, least=0)  # batches made ahead

    @property
    def dose_marker(self) -> Optional[str]:
        """What stands between a perturbation and its dose; None where labels have none."""
        return self.dose_separator or ("@" if self.dose_col else None)


@dataclass
class SourceConfig:
    """One input of an atlas."""

    path: str = MISSING  # .h5ad; folder or repo id of Tahoe-100M-schema Parquet; folder or repo id of an atlas
    kind: Literal["auto", "h5ad", "tahoe", "atlas"] = "auto"
    name: Optional[str] = None  # null: the file's or folder's
    license: Optional[str] = None
    perturbation_col: Optional[str] = "perturbation"  # obs columns; null: all cells are unperturbed
    cell_type_col: Optional[str] = "cell_type"  # null: one cell type, named as the source
    batch_col: Optional[str] = "batch"  # null: one batch, named as the source
    control_label: str = "control"  # becomes "control" in the atlas
    other_control_labels: list[str] = field(default_factory=list)  # so do these
    combination_separator: Optional[str] = "+"  # becomes "+" where it joins perturbations; null: labels are never split
    dose_col: Optional[str] = None  # column of doses, which labels then get: "A@0.5"
    dose_separator: Optional[str] = None  # what stands before the dose in a label; null: labels have none
    layer: Optional[str] = None  # of an .h5ad, values to read in place of X: a layer, or "raw" for .raw
    input_kind: Literal["auto", "counts", "log1p"] = "auto"  # what X holds
    library_size_col: Optional[str] = None  # obs column of total counts when X is a panel; null: row sums of X
    cells: Literal["all", "unperturbed", "perturbed"] = "all"
    keep: list[str] = field(default_factory=list)  # PERTURBATION[:CELL_TYPE[:BATCH]], * is any; none: everything
    drop: list[str] = field(default_factory=list)
    where: list[str] = field(default_factory=list)  # COLUMN=VALUE of obs, which all must hold: is_primary_data=True


@dataclass
class BuildConfig:
    """How an atlas is built; everything here moves its bytes, and nothing else does."""

    out: str = MISSING  # the folder
    sources: list[SourceConfig] = field(default_factory=list)
    genes: str = "union"  # union, intersection, merge-then-select:N, or a file: names, one a line, or a genes.parquet
    gene_table: Optional[str] = None  # .csv of two columns, name in a source and name in the atlas
    count_type: Literal["uint16", "uint32"] = "uint16"
    license: Optional[str] = None  # of the whole
    seed: int = bounded(0, least=0, below=10**16)  # of the order of cells within a condition: 16 bytes


@dataclass
class SplitConfig:
    hold_out: list[str] = field(default_factory=list)  # never trained on: "IFN-beta:CD4T", "batch=rep_3", ...
    validation: list[str] = field(default_factory=list)  # the same words; scored during training
    # Of training conditions, when `validation` is empty and there are >= 10.
    validation_fraction: float = bounded(0.1, least=0, most=1)
    validation_cells: float = bounded(0.0, least=0, below=1)  # of each training condition of a screen, beside the above
    train: list[str] = field(default_factory=list)  # trained on, though hold_out or validation names them
    # More to hold out and to validate on: a .toml of cell-load, a .yaml of the reference, or a split.json.
    file: Optional[str] = None


@dataclass
class PublishedEncoding:
    """What the covariate encoder of a converted published checkpoint has besides rows of labels; 0: it has none."""

    perturbation_features: int = bounded(0, least=0, most=MAX_FEATURES)  # columns of the frozen table of perturbations
    doses: int = bounded(0, least=0, most=MAX_FEATURES)  # doses that these perturbations have among them
    cell_type_features: int = bounded(0, least=0, most=MAX_FEATURES)  # columns of the frozen table of cell types
    covariates: int = bounded(0, least=0, most=MAX_FEATURES)  # outputs of the encoder; 0: one for each gene


@dataclass
class DenoiserConfig:
    width: int = bounded(192, above=0)  # D
    depth: int = bounded(4, above=0)
    n_heads: int = bounded(6, above=0)
    mlp_ratio: float = bounded(4.0, above=0)
    parallel_block: bool = True  # the MLP reads the block's input, not the attention's result
    output: Literal["direct", "control_residual"] = "control_residual"
    # Of output=control_residual: what part of a context's own expression its treated cells start from. 1: an effect is
    # added to the controls; less where contexts become alike under a perturbation, as tumours under a drug.
    control_weight: float = bounded(1.0, least=0, most=1)
    mean_effect: bool = False  # of control_residual: a shift of each gene by the perturbation, learned before the rest
    out_activation: Literal["relu", "none"] = "relu"
    conditioning: Literal["labels", "reference"] = "labels"
    interaction: bool = True  # conditioning=labels: what "A+B" does beyond the sum of A and B, zero at start
    covariate_dim: int = bounded(128, above=0)  # width of each embedding of conditioning=reference
    # Of conditioning=reference only; features (frozen tables) are of converted models, which cannot be trained.
    perturbation_encoding: Literal["onehot", "none", "features"] = "onehot"
    cell_type_encoding: Literal["onehot", "features"] = "onehot"
    batch_encoding: Literal["onehot", "none"] = "onehot"
    published_encoding: PublishedEncoding = field(default_factory=PublishedEncoding)


@dataclass
class DiffusionConfig:
    n_timesteps: int = bounded(1000, above=0)  # T
    schedule: Literal["linear", "cosine", "power_cosine"] = "linear"
    mse_weight: float = bounded(1.0, least=0)
    mmd_weight: float = bounded(1.0, least=0)
    unbiased: bool = False  # only distinct cells count within the estimate, which need not be narrower
    whole_counts: bool = False  # the MMD sees estimates as sampling.whole_counts leaves them
    # What sets start from: controls; these with the genes that are perturbed moved as knock-downs move their own
    # (target); or moved to the mean of simple methods (mean).
    start: Literal["controls", "target", "mean"] = "controls"
    p_self_cond: float = bounded(0.5, least=0, most=1)  # sets that see their own first estimate
    p_drop_cond: float = bounded(0.1, least=0, most=1)  # sets whose whole condition is hidden
    p_drop_label: float = bounded(0.2, least=0, most=1)  # each label of a set, hidden on its own
    p_drop_perturbation: Optional[float] = bounded(None, least=0, most=1)  # of the perturbation; null: p_drop_label
    p_features_only: float = bounded(0.5, least=0, most=1)  # sets that see features of a perturbation alone, if any


@dataclass
class SamplingConfig:
    sampler: Literal["ddim", "ddpm"] = "ddim"
    spacing: Literal["strided", "reference"] = "strided"
    n_steps: int = bounded(10, above=0)  # denoiser calls; spacing=reference always takes start_time of them
    start_time: int = bounded(100, above=0)  # spacing=reference only: unit noise enters at t = start_time - 1
    guidance_scale: float = bounded(0.0, least=0)  # w of (1 + w) cond - w uncond
    eta: float = bounded(0.0, least=0, most=1)  # DDIM: 0 is deterministic given the first noise, 1 is ancestral
    cutoff: float = bounded(1e-4, least=0)  # smaller outputs become 0 (model units)
    whole_counts: bool = True  # values under one count of the control cell become one count or none, the mean kept
    # With whole_counts, of predictions: all values are whole counts at the depth of the control, and genes that respond
    # are drawn anew from the model's means of training conditions (gamma-Poisson).
    draw_counts: bool = True
    # Of the network's cells in what is predicted. The rest is their controls at the mean that simple methods tell, or
    # where the model has no means of training conditions, what they started from. 0 asks no network.
    network_weight: float = bounded(1.0, least=0, most=1)

    @property
    def n_calls(self) -> int:
        """Denoiser calls of a trajectory, without those of guidance."""
        return self.n_steps if self.spacing == "strided" else self.start_time


@dataclass
class OptimConfig:
    lr: float = bounded(5e-4, above=0)  # peak learning rate
    beta1: float = bounded(0.9, least=0, below=1)
    beta2: float = bounded(0.98, least=0, below=1)
    eps: float = bounded(1e-8, above=0)
    weight_decay: float = bounded(0.01, least=0)  # matrices only: norms, biases and embeddings are exempt
    warmup_steps: int = bounded(50, least=0)
    min_lr_ratio: float = bounded(0.1, least=0, most=1)  # the cosine ends at this part of lr
    plateau_ratio: float = bounded(0.0, least=0, most=1)  # part of the steps that stay at lr after the warm-up
    # Steps after which lr has fallen to min_lr_ratio and stays there; null: training.n_steps.
    schedule_steps: Optional[int] = bounded(None, least=1)
    grad_clip: float = bounded(1.0, above=0)  # global L2 norm
    ema_decay: float = bounded(0.99, least=0, most=1)
    ema_every: int = bounded(1, above=0)  # optimizer steps between EMA updates


@dataclass
class TrainingConfig:
    n_steps: int = bounded(300, least=0)  # 0: a checkpoint as it is, with the genes and labels of the data
    seed: int = bounded(0, least=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda if there is one, else cpu
    mixed_precision: Literal["no", "bf16"] = "no"  # bf16: autocast; weights, gradients and optimizer stay float32
    accumulation_steps: int = bounded(1, above=0)  # parts into which a process cuts its share of a step, to save memory
    compile: bool = False  # torch.compile of each block
    timeout: float = bounded(1800.0, above=0)  # s without progress, after which processes stop and name the one behind
    # Besides metrics.jsonl.
    trackers: list[Literal["tensorboard", "wandb"]] = field(default_factory=lambda: ["tensorboard"])
    profile_steps: int = bounded(0, least=0)  # steps traced into profile/, after three to warm up
    log_every: int = bounded(10, above=0)  # steps
    validate_every: int = bounded(50, above=0)
    validate_sets: int = bounded(32, above=0)  # sets validated at most, always the same
    # Validations without a lower energy distance before the end; null: never. The best weights are kept, which may be
    # those of the checkpoint as it is.
    early_stop_patience: Optional[int] = bounded(None, least=1)
    save_every: int = bounded(200, above=0)  # steps; a state and the model, where save_minutes have passed
    save_minutes: float = bounded(10.0, least=0)  # from one save to the next at least; 0: each save_every steps
    keep_states: int = bounded(2, above=0)
    keep_last_state: bool = False  # when training is done, too, so that more steps can follow


@dataclass
class AdaptConfig:
    """How training starts from a checkpoint (README, "Fine-tuning")."""

    init_from: Optional[str] = None  # model folder, name or owner/name[@REVISION] to start from; null: random weights
    # frozen: blocks stay as they are, gene layers and conditioning train; lora: low-rank changes of the blocks besides.
    method: Literal["full", "frozen", "lora"] = "full"
    new_labels: Literal["mean", "nearest"] = "mean"  # nearest: cell types and batches, by their control cells
    # Learning rate of what is copied as it is, as a part of optim.lr; tensors with anything new get optim.lr itself.
    lr_ratio: float = bounded(1.0, above=0)
    lora_rank: int = bounded(8, above=0)
    lora_alpha: float = bounded(16.0, above=0)  # low-rank changes are scaled by lora_alpha / lora_rank


@dataclass
class Config:
    out: str = MISSING  # the run folder
    data: DataConfig = field(default_factory=DataConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    adapt: AdaptConfig = field(default_factory=AdaptConfig)


@dataclass
class Preprocessing:
    """How X becomes model input, log1p(count * target_sum / library_size) / scale; stored with the model."""

    input_kind: Literal["counts", "log1p"]
    target_sum: Optional[float] = bounded(REQUIRED, above=0)  # null: log1p values of nobody knows how many counts
    scale: float = bounded(REQUIRED, above=0)
    library_size_col: Optional[str] = None


@dataclass
class ObsColumns:
    """Names of the obs columns of the training data; predict reads cell type and batch of controls under them."""

    perturbation: str = "perturbation"
    cell_type: Optional[str] = "cell_type"  # null: training cells were of one type, "all"
    batch: Optional[str] = "batch"
    control_label: str = "control"
    other_control_labels: tuple[str, ...] = ()
    dose: Optional[str] = None
    drop: tuple[str, ...] = ()  # selectors of cells that training left out: they are no controls either


@dataclass
class ModelConfig:
    """What a model folder's config.json holds besides format and hashes."""

    denoiser: DenoiserConfig
    diffusion: DiffusionConfig
    sampling: SamplingConfig
    obs: ObsColumns
    set_size: int


def reference_denoiser() -> DenoiserConfig:
    """The published architecture (Yuan et al. 2026), without the weights it never uses: 96M of 104M at 2,000 genes."""
    return DenoiserConfig(
        width=512,
        depth=8,
        n_heads=8,
        parallel_block=True,
        output="direct",
        out_activation="relu",
        conditioning="reference",
    )


def load_config(
    recipe: str | Path | None = None,
    overrides: Sequence[str] = (),
    given: Mapping[str, Any] | None = None,
    base: Mapping[str, Any] | None = None,
) -> Config:
    """All settings of a run; `perturbdiff settings` prints every one with its default.

    Parameters
    ----------
    recipe
        Path of a yaml file, or name of one that ships (`perturbdiff recipes`).
    overrides
        Words of the command line, as "training.n_steps=1000".
    given
        Sections, as {"out": "runs/a", "data": {"screen": "a.h5ad"}}; a run needs `out`, and a screen or atlases.
    base
        A checkpoint's settings. Defaults come first, then `base`, recipe, `given` and `overrides`; later ones win.

    Raises
    ------
    FileNotFoundError
        The recipe does not exist.
    ValueError
        An unknown key, a value of the wrong type or outside its set, a size that cannot be.
    """
    config = _resolved(Config, None if recipe is None else find_recipe(recipe, "train"), overrides, given, base)
    check_config(config)
    return config


OF_CONTROLS = {
    "perturbation_col": "perturbation", "cell_type_col": "cell_type", "batch_col": "batch",
    "control_label": "control_label", "other_control_labels": "other_control_labels", "drop": "drop",
}  # fmt: skip
"""Settings of data.* that say how a file of control cells calls what a model needs, and their names in `ObsColumns`."""


def given_columns(obs: ObsColumns, how: Preprocessing, overrides: Sequence[str]) -> tuple[ObsColumns, Preprocessing]:
    """Those of a file whose columns are not those of the training data: words as "data.cell_type_col=NAME".

    Raises ValueError on words that set anything but OF_CONTROLS and data.library_size_col, or null.
    """
    changed: dict[str, Any] = {}
    for word in overrides:
        key = word.partition("=")[0].removeprefix("data.")
        if key not in (*OF_CONTROLS, "library_size_col") or not word.startswith("data.") or "=" not in word:
            raise ValueError(
                f"setting {word!r}: what a file of control cells can be told is data.{', data.'.join(OF_CONTROLS)} and "
                "data.library_size_col, each as data.cell_type_col=NAME."
            )
        value = getattr(_resolved(Config, None, [word], {"out": ""}).data, key)
        if not value and not isinstance(value, list):
            raise ValueError(f"setting {word!r} must name one; leave it out where the file has none.")
        changed[key] = tuple(value) if isinstance(value, list) else value
    how = replace(how, library_size_col=changed.pop("library_size_col", how.library_size_col))
    return replace(obs, **{OF_CONTROLS[key]: value for key, value in changed.items()}), how


def sections(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments as `load_config` takes them: training={"n_steps": 9}, or **{"training.n_steps": 9}."""
    given: dict[str, Any] = {}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        if name or isinstance(value, Mapping):
            given.setdefault(section, {}).update({name: value} if name else value)
        else:
            given[section] = value
    return given


def load_build_config(
    inputs: Sequence[str],
    recipe: str | Path | None = None,
    overrides: Sequence[str] = (),
    given: Mapping[str, Any] | None = None,
) -> BuildConfig:
    """Settings of an atlas build, found as `load_config` does; words `source.KEY=value` are of each of the `inputs`.

    The inputs come after the recipe's sources. Raises as `load_config`.
    """
    of_inputs = [word.removeprefix("source.") for word in overrides if word.startswith("source.")]
    own = [word for word in overrides if not word.startswith("source.")]
    config = _resolved(BuildConfig, None if recipe is None else find_recipe(recipe, "atlas"), own, given)
    if of_inputs and not inputs:
        raise ValueError(
            f"source.{of_inputs[0]} is of inputs on the command line, and there are none; set the recipe's."
        )
    config.sources += [_resolved(SourceConfig, None, of_inputs, {"path": path}) for path in inputs]
    if not config.sources:
        raise ValueError("nothing to build from: give inputs, or a recipe with sources.")
    check_bounds(config)
    return config


def _resolved(
    schema: type[T],
    recipe: Path | None,
    overrides: Sequence[str],
    given: Mapping[str, Any] | None,
    base: Mapping[str, Any] | None = None,
) -> T:
    parts: list[Any] = [dict(base or {}), {} if recipe is None else _read_yaml(recipe, schema), dict(given or {})]
    for word in overrides:
        if "=" not in word:
            raise ValueError(f"override {word!r} is not key=value; for example training.n_steps=500.")
        parts.append(_read_word(word, schema))
    for part in parts:
        _refuse_interpolations(part)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), *parts)
        config = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, TypeError) as error:
        raise ValueError(_one_line(error, schema)) from error
    assert isinstance(config, schema), "OmegaConf.to_object returns the schema's class"
    return config


def list_recipes() -> list[tuple[str, str, Path]]:
    """(name, first line, path) of every file that ships; a name is FOLDER/STEM, as train/cross_cell_type."""
    files = sorted(path for path in RECIPES.glob("*/*") if path.suffix in (".yaml", ".sbatch"))
    return [(f"{path.parent.name}/{path.stem}", _first_comment(path), path) for path in files]


def _first_comment(path: Path) -> str:
    lines = (line.removeprefix("#").strip() for line in path.read_text().splitlines() if not line.startswith("#!"))
    return next(lines, "")


def find_recipe(recipe: str | Path, folder: str | None = None) -> Path:
    """The file of a recipe, given by its path or by the name of one that ships: train/cross_cell_type.

    The folder may be left out where one file alone has the name, or for those of `folder`, which is looked at first.

    Raises
    ------
    FileNotFoundError
        No such file and no such name, or a name that several have.
    """
    if Path(recipe).is_file():
        return Path(recipe)
    shipped = {name: path for name, _, path in list_recipes()}
    for name in (str(recipe), f"{folder}/{recipe}"):
        if name in shipped:
            return shipped[name]
    same = [name for name in shipped if name.split("/")[1] == str(recipe)]
    if len(same) == 1:
        return shipped[same[0]]
    if same:
        raise FileNotFoundError(f"recipe {str(recipe)!r} is one of {', '.join(same)}; give the whole name.")
    stems = {name.split("/")[1] for name in shipped}
    near = difflib.get_close_matches(Path(recipe).stem, stems, 2)
    likely = ", ".join(name for name in shipped if name.split("/")[1] in near)
    raise FileNotFoundError(
        f"recipe {str(recipe)!r} is neither a file nor a name that `perturbdiff recipes` lists"
        f"{f' (nearest: {likely})' if likely else ''}; give the path of a .yaml file, or a name."
    )


def save_config(config: Config, path: Path) -> None:
    """Write the resolved settings as yaml; `load_config(path)` gives them back."""
    write_text(path, OmegaConf.to_yaml(OmegaConf.structured(config)))


def as_dict(settings: Any) -> dict[str, Any]:
    """A settings dataclass as JSON values."""
    values = OmegaConf.to_container(OmegaConf.structured(settings))
    assert isinstance(values, dict), "a dataclass becomes a dict"
    return {str(key): value for key, value in values.items()}


def from_dict(schema: type[T], values: dict[str, Any]) -> T:
    """The dataclass `schema` from JSON values (a model folder's json); unknown keys are refused."""
    _refuse_interpolations(values)
    try:
        settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.create(values)))
    except OmegaConfBaseException as error:
        raise ValueError(_one_line(error)) from error
    assert isinstance(settings, schema), "OmegaConf.to_object returns the schema's class"
    return settings


def check_bounds(settings: Any, prefix: str = "") -> None:
    """Refuse numbers that are not finite or out of the bounds beside their fields; `prefix` is of the keys it names.

    Raises ValueError.
    """
    for setting in fields(settings):
        key, value = prefix + setting.name, getattr(settings, setting.name)
        if is_dataclass(value):
            check_bounds(value, f"{key}.")
        elif isinstance(value, list):
            for i, part in enumerate(value):
                if is_dataclass(part):
                    check_bounds(part, f"{key}[{i}].")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key} ({value}) must be a finite number.")
        elif value is not None and "bounds" in setting.metadata and not setting.metadata["bounds"].allow(value):
            or_null = ", or null" if type(None) in get_args(setting.type) else ""
            raise ValueError(f"{key} ({value}) must {setting.metadata['bounds']}{or_null}.")


def check_config(config: Config) -> None:
    """Refuse values that no data could make sensible. Raises ValueError."""
    check_bounds(config)
    if not config.out:  # "$OUT" of a script that has none: it would be the folder that one is in
        raise ValueError("out is empty; name a run folder (--out).")
    _check_data(config.data)
    if config.denoiser.conditioning == "reference" and (config.data.perturbation_features or config.data.dose_marker):
        raise ValueError(
            "denoiser.conditioning=reference knows neither features nor doses of perturbations; set it to labels, or "
            "leave data.perturbation_features, data.dose_col and data.dose_separator out."
        )
    if config.adapt.method != "full" and config.adapt.init_from is None:
        raise ValueError(f"adapt.method={config.adapt.method} needs a checkpoint to start from; set adapt.init_from.")
    if config.optim.min_lr_ratio == 0 and (config.optim.schedule_steps or math.inf) < config.training.n_steps:
        raise ValueError(
            f"optim.schedule_steps ({config.optim.schedule_steps}) under training.n_steps ({config.training.n_steps}) "
            "must come with optim.min_lr_ratio over 0: nothing is learned at a rate of 0."
        )
    check_denoiser(config.denoiser)
    if config.denoiser.published_encoding != PublishedEncoding():
        raise ValueError(
            "denoiser.published_encoding is of converted checkpoints, whose frozen tables training lacks; leave it out."
        )
    if config.denoiser.mean_effect and (config.denoiser.output, config.denoiser.conditioning) != (
        "control_residual",
        "labels",
    ):
        raise ValueError("denoiser.mean_effect is of output=control_residual with conditioning=labels; leave it out.")
    start = config.diffusion.start
    if start != "controls" and (config.data.screen is None or config.adapt.method == "lora"):
        raise ValueError(f"diffusion.start={start} is of screens, and not of low-rank changes; set it to controls.")
    check_sampling(config.sampling, config.diffusion)


def _check_data(data: DataConfig) -> None:
    if (data.screen is None) == (not data.atlases):
        raise ValueError(
            f"data.screen ({data.screen}), data.atlases ({[atlas.path for atlas in data.atlases]}): give one of them "
            "(--screen, --atlas)."
        )
    if data.min_set_size > (data.set_size + 1) // 2:
        raise ValueError(
            f"data.min_set_size ({data.min_set_size}) must be at most half of data.set_size ({data.set_size}): a rest "
            "under it shares the cells of the set before."
        )
    weights = [atlas.weight for atlas in data.atlases]
    if None in weights and weights != [None] * len(weights):
        raise ValueError(f"data.atlases weights {weights} must be given to all atlases or to none.")
    if data.n_streams is not None and data.sets_per_batch % data.n_streams:
        raise ValueError(
            f"data.n_streams ({data.n_streams}) must divide data.sets_per_batch ({data.sets_per_batch}): each "
            "stream gives as many sets a step."
        )
    if data.combination_separator == "":
        raise ValueError("data.combination_separator ('') must not be empty; null never splits labels.")
    if data.dose_separator == "":
        raise ValueError("data.dose_separator ('') must not be empty; null: labels have no doses.")


def check_denoiser(config: DenoiserConfig) -> None:
    """Refuse sizes out of bounds and shapes that do not divide. Raises ValueError."""
    check_bounds(config, "denoiser.")
    if 2 * config.width % config.n_heads:
        raise ValueError(
            f"denoiser.n_heads ({config.n_heads}) must divide twice denoiser.width ({config.width}): a token is a cell "
            "beside its control."
        )
    published = config.published_encoding
    tables = {
        "perturbation": (config.perturbation_encoding, published.perturbation_features),
        "cell_type": (config.cell_type_encoding, published.cell_type_features),
    }
    for name, (encoding, n) in tables.items():
        if (encoding == "features") != (n > 0):
            raise ValueError(
                f"denoiser.{name}_encoding ({encoding}) must be features with a frozen table, which has {n} columns "
                "here, and only then; none but converted checkpoints have one: use onehot."
            )
    if published.doses and not published.perturbation_features:
        raise ValueError(f"denoiser.published_encoding.doses ({published.doses}) must come with a table of drugs.")


def check_sampling(sampling: SamplingConfig, diffusion: DiffusionConfig) -> None:
    """Refuse trajectories that leave the schedule. Raises ValueError."""
    check_bounds(sampling, "sampling.")
    if sampling.n_calls > diffusion.n_timesteps:
        key = "n_steps" if sampling.spacing == "strided" else "start_time"
        raise ValueError(
            f"sampling.{key} ({sampling.n_calls}) must be between 1 and diffusion.n_timesteps "
            f"({diffusion.n_timesteps})."
        )


def _refuse_interpolations(values: Any) -> None:
    # OmegaConf would put the reader's environment in their place, and a run writes its settings where others read them.
    before, found, after = str(values).partition("${")
    if found:
        text = re.split(r"[\s'\"]", before[-40:])[-1] + found + re.split(r"['\"]", after[:40])[0]
        raise ValueError(
            f"settings hold {text!r}; nothing in them is filled in: write the value, or give it on the "
            "command line, where the shell does (data.screen=$FOLDER/screen.h5ad)."
        )


class _Texts(yaml.SafeLoader):
    """YAML whose values are all texts."""


_Texts.yaml_implicit_resolvers = {}


def yaml_texts(text: str) -> Any:
    """What a YAML document holds, values as they are written: `no` is no truth, 0.10 no number. Raises YAMLError."""
    loader = _Texts(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _read_yaml(recipe: Path, schema: type) -> DictConfig:
    try:
        settings, texts = OmegaConf.load(recipe), yaml_texts(recipe.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, RecursionError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {str(recipe)!r} is not yaml ({' '.join(str(error).split())}).") from error
    if not isinstance(settings, DictConfig):
        raise ValueError(
            f"recipe {str(recipe)!r} is a list; it must hold keys and values, as training: {{n_steps: 9}}."
        )
    try:
        return OmegaConf.create(_verbatim(OmegaConf.to_container(settings), texts, schema))
    except (KeyError, RecursionError, TypeError) as error:  # what the two readers of yaml do not read alike
        raise ValueError(
            f"recipe {str(recipe)!r} holds what is no setting ({short(error)}); see what it holds."
        ) from error


def _verbatim(values: Any, texts: Any, kind: Any) -> Any:
    # The values of settings that are texts, as they are written.
    if isinstance(kind, type) and is_dataclass(kind) and isinstance(values, dict):
        return {key: _verbatim(value, texts[key], _kind_of(kind, [key])) for key, value in values.items()}
    if get_origin(kind) is list and isinstance(values, list):
        return [_verbatim(value, text, get_args(kind)[0]) for value, text in zip(values, texts, strict=True)]
    is_text = kind is str or get_origin(kind) is Literal or (kind == Optional[str] and values is not None)
    return texts if is_text else values


def _read_word(word: str, schema: type) -> DictConfig:
    key, text = word.split("=", 1)
    kind = _kind_of(schema, key.split("."))
    if get_origin(kind) is Literal:  # words that need no quotes, which yaml would make true or false of
        kind, text = str, text.strip("'\"")
    try:
        if kind is str or (kind == Optional[str] and text != "null") or kind == list[str]:
            # A text is what it says: yaml would make no a truth, 0.10 a number and # a comment of it.
            nested: Any = text if kind != list[str] else yaml_texts(text)
            if kind == list[str] and isinstance(nested, str):  # one name alone, or none
                nested = [] if nested == "null" else [nested]
            for name in reversed(key.split(".")):
                nested = {name: nested}
            return OmegaConf.create(nested)
        return OmegaConf.from_dotlist([word])
    except yaml.YAMLError as error:
        raise ValueError(f"override {word!r}: {text!r} is not yaml; quote it: {key}=\"'{text}'\".") from error


def _kind_of(schema: type, names: list[str]) -> Any:
    """Type of a setting; None where there is no such setting."""
    for part in fields(schema) if is_dataclass(schema) else ():
        if part.name == names[0]:
            return part.type if len(names) == 1 else _kind_of(part.type, names[1:])  # type: ignore[arg-type]
    return None


def _one_line(error: Exception, schema: type | None = None) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    where = next((line.removeprefix("full_key:").strip() for line in lines if line.startswith("full_key:")), "")[:200]
    if schema is not None and "missing mandatory value" in lines[0] and (name := lines[0].rsplit(" ", 1)[-1]):
        return f"{name} is not set; give it ({name}=..., --{name})."
    sections = fields(schema) if schema is not None else ()
    near = [f"{part.name}.{where}" for part in sections if where in _names_in(part.default_factory)]
    near += ["source." + where] if schema is BuildConfig and where in _names_in(SourceConfig) else []
    return (
        f"config: {lines[0][:300]}"
        + (f" (key {where})" if where and where not in lines[0] else "")
        + (f"; did you mean {' or '.join(near)}?" if near and "not in" in lines[0] else "")
    )


def _names_in(section: Any) -> set[str]:
    return {field.name for field in fields(section)} if is_dataclass(section) else set()
