"""Every setting of PerturbDiff, and `load_config`: defaults <- yaml <- key=value.

Settings are dataclasses resolved by OmegaConf, so a typo or a wrong type is an error that names the key.
Sizes that come from data (genes, labels) are not settings: they are passed to what needs them.
"""

# No `from __future__ import annotations` here: OmegaConf resolves these annotations at run time.
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Optional, TypeVar

import yaml  # type: ignore[import-untyped]
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from perturbdiff.files import write_text

T = TypeVar("T")
# Within the package where it was installed from a wheel, beside it in a checkout.
_SHIPPED = (Path(__file__).parent / "recipes", Path(__file__).parents[1] / "recipes")
RECIPES = next((folder for folder in _SHIPPED if folder.is_dir()), _SHIPPED[0])
MAX_FEATURES = 1 << 20  # columns of a frozen table, or covariates: more is a mistake or an attack


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
    weight: Optional[float] = None  # share of the sets, relative to the others; null: as many as it has
    sets: Literal["perturbed", "marginal"] = "perturbed"  # marginal: all cells, no label of perturbation, no controls
    expected: Optional[AtlasSize] = None


@dataclass
class DataConfig:
    screen: Optional[str] = None  # path of the .h5ad; or
    atlases: list[AtlasConfig] = field(default_factory=list)  # with one gene space, mixed by weight
    streamed: bool = False  # atlases: read whole shards as they come instead of a memory-mapped cache on disk
    n_streams: Optional[int] = None  # shards open at once over all processes; null: one a process at the start
    perturbation_col: str = "perturbation"  # obs columns
    cell_type_col: str = "cell_type"
    batch_col: str = "batch"
    control_label: str = "control"  # value of perturbation_col that marks control cells
    combination_separator: Optional[str] = "+"  # "A+B" is A and B together; null: labels are never split
    dose_col: Optional[str] = None  # obs column of doses, which labels then get: "A@0.5"
    dose_separator: Optional[str] = None  # "A@0.5" is A at dose 0.5; null: "@" with dose_col, otherwise no doses
    # Tables of perturbations: files of name -> vector or of name, smiles; or "coexpression", loadings of the model's
    # genes in the training cells.
    perturbation_features: list[str] = field(default_factory=list)
    input_kind: Literal["auto", "counts", "log1p"] = "auto"  # what X holds
    library_size_col: Optional[str] = None  # obs column of total counts when X is a panel; null: row sums of X
    target_sum: Optional[float] = 1e4  # counts per cell after normalisation; null: median of a screen's controls
    scale: float = 10.0  # model space is log1p / scale
    n_hvg: Optional[int] = 2000  # highly variable genes, chosen on training cells; null: all. A checkpoint's stay too
    control_match: Literal["auto", "batch", "cell_type"] = "auto"  # whose controls a set gets (README, "Controls")
    set_size: int = 32  # S, cells per set
    min_set_size: int = 1  # sets are never smaller; conditions with fewer cells are left out
    sets_per_batch: int = 12  # B, sets per step over all processes
    prefetch: int = 2  # batches made ahead

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
    input_kind: Literal["auto", "counts", "log1p"] = "auto"  # what X holds
    library_size_col: Optional[str] = None  # obs column of total counts when X is a panel; null: row sums of X
    cells: Literal["all", "unperturbed", "perturbed"] = "all"
    keep: list[str] = field(default_factory=list)  # PERTURBATION[:CELL_TYPE[:BATCH]], * is any; none: everything
    drop: list[str] = field(default_factory=list)


@dataclass
class BuildConfig:
    """How an atlas is built; everything here moves its bytes, and nothing else does."""

    out: str = MISSING  # the folder
    sources: list[SourceConfig] = field(default_factory=list)
    genes: str = "union"  # union, intersection, merge-then-select:N, or a file: names, one a line, or a genes.parquet
    gene_table: Optional[str] = None  # .csv of two columns, name in a source and name in the atlas
    count_type: Literal["uint16", "uint32"] = "uint16"
    license: Optional[str] = None  # of the whole
    seed: int = 0  # of the order of cells within a condition


@dataclass
class SplitConfig:
    hold_out: list[str] = field(default_factory=list)  # never trained on: "IFN-beta:CD4T", "batch=rep_3", ...
    validation: list[str] = field(default_factory=list)  # the same words; scored during training
    validation_fraction: float = 0.1  # of training conditions, when `validation` is empty and there are >= 10


@dataclass
class PublishedEncoding:
    """What the covariate encoder of a converted published checkpoint has besides rows of labels; 0: it has none."""

    perturbation_features: int = 0  # columns of the frozen table of perturbations
    doses: int = 0  # doses that these perturbations have among them
    cell_type_features: int = 0  # columns of the frozen table of cell types
    covariates: int = 0  # outputs of the encoder; 0: one for each gene


@dataclass
class DenoiserConfig:
    width: int = 192  # D
    depth: int = 4
    n_heads: int = 6
    mlp_ratio: float = 4.0
    parallel_block: bool = True  # the MLP reads the block's input, not the attention's result
    output: Literal["direct", "control_residual"] = "control_residual"
    # Of output=control_residual: what part of a context's own expression its treated cells start from. 1: an effect is
    # added to the controls; less where contexts become alike under a perturbation, as tumours under a drug.
    control_weight: float = 1.0
    mean_effect: bool = False  # of control_residual: a shift of each gene by the perturbation, learned before the rest
    out_activation: Literal["relu", "none"] = "relu"
    conditioning: Literal["labels", "reference"] = "labels"
    interaction: bool = True  # conditioning=labels: what "A+B" does beyond the sum of A and B, zero at start
    covariate_dim: int = 128  # width of each embedding of conditioning=reference
    # Of conditioning=reference only; features (frozen tables) are of converted models, which cannot be trained.
    perturbation_encoding: Literal["onehot", "none", "features"] = "onehot"
    cell_type_encoding: Literal["onehot", "features"] = "onehot"
    batch_encoding: Literal["onehot", "none"] = "onehot"
    published_encoding: PublishedEncoding = field(default_factory=PublishedEncoding)


@dataclass
class DiffusionConfig:
    n_timesteps: int = 1000  # T
    schedule: Literal["linear", "cosine", "power_cosine"] = "linear"
    mse_weight: float = 1.0
    mmd_weight: float = 1.0
    unbiased: bool = False  # only distinct cells count within the estimate, which need not be narrower
    whole_counts: bool = False  # the MMD sees estimates as sampling.whole_counts leaves them
    p_self_cond: float = 0.5  # sets that see their own first estimate
    p_drop_cond: float = 0.1  # sets whose whole condition is hidden
    p_drop_label: float = 0.2  # each label of a set, hidden on its own
    p_drop_perturbation: Optional[float] = None  # of the perturbation; null: p_drop_label
    p_features_only: float = 0.5  # sets whose perturbation is known by its features alone, where it has some


@dataclass
class SamplingConfig:
    sampler: Literal["ddim", "ddpm"] = "ddim"
    spacing: Literal["strided", "reference"] = "strided"
    n_steps: int = 10  # denoiser calls; spacing=reference always takes start_time of them
    start_time: int = 100  # spacing=reference only: unit noise enters at t = start_time - 1
    guidance_scale: float = 0.0  # w of (1 + w) cond - w uncond
    eta: float = 0.0  # DDIM: 0 is deterministic given the first noise, 1 is ancestral
    cutoff: float = 1e-4  # smaller outputs become 0 (model units)
    whole_counts: bool = True  # values under one count of the control cell become one count or none, the mean kept

    @property
    def n_calls(self) -> int:
        """Denoiser calls of a trajectory, without those of guidance."""
        return self.n_steps if self.spacing == "strided" else self.start_time


@dataclass
class OptimConfig:
    lr: float = 5e-4  # peak learning rate
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.01  # matrices only: norms, biases and embeddings are exempt
    warmup_steps: int = 50
    min_lr_ratio: float = 0.1  # the cosine ends at this part of lr
    plateau_ratio: float = 0.0  # part of the steps that stay at lr after the warm-up
    grad_clip: float = 1.0  # global L2 norm
    ema_decay: float = 0.99
    ema_every: int = 1  # optimizer steps between EMA updates


@dataclass
class TrainingConfig:
    n_steps: int = 300
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    mixed_precision: Literal["no", "bf16"] = "no"  # bf16: autocast; weights, gradients and optimizer stay float32
    accumulation_steps: int = 1  # parts into which a process cuts its share of a step, to save memory
    compile: bool = False  # torch.compile of each block
    timeout: float = 1800.0  # s without progress after which several processes stop and name the one behind
    trackers: list[Literal["tensorboard", "wandb"]] = field(
        default_factory=lambda: ["tensorboard"]
    )  # besides metrics.jsonl
    profile_steps: int = 0  # steps traced into profile/, after three to warm up
    log_every: int = 10  # steps
    validate_every: int = 50
    validate_sets: int = 32  # sets validated at most, always the same
    early_stop_patience: Optional[int] = None  # validations without a lower energy distance before the end; null: never
    save_every: int = 200
    keep_states: int = 2


@dataclass
class AdaptConfig:
    """How training starts from a checkpoint (README, "Fine-tuning")."""

    init_from: Optional[str] = None  # model folder, name or owner/name[@REVISION] to start from; null: random weights
    # frozen: blocks stay as they are, gene layers and conditioning train; lora: low-rank changes of the blocks besides.
    method: Literal["full", "frozen", "lora"] = "full"
    new_genes: Literal["neighbours", "mean"] = "neighbours"  # start as the mean of co-expressed shared genes, or of all
    new_labels: Literal["mean", "nearest"] = "mean"  # nearest: cell types and batches, by their control cells
    lr_ratio: float = 1.0  # learning rate of what is copied as it is; tensors with anything new get optim.lr itself
    lora_rank: int = 8
    lora_alpha: float = 16.0  # low-rank changes are scaled by lora_alpha / lora_rank


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
    target_sum: float
    scale: float
    library_size_col: Optional[str] = None


@dataclass
class ObsColumns:
    """Names of the obs columns of the training data; predict reads cell type and batch of controls under them."""

    perturbation: str = "perturbation"
    cell_type: str = "cell_type"
    batch: str = "batch"
    control_label: str = "control"


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
    """Defaults, then `base` (a checkpoint's settings), the recipe (yaml), `given` values, `key=value` words.

    Later ones win. The recipe is a path or a name, as `find_recipe` takes it.

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
    if not 0 <= config.seed < 10**16:  # the key of a hash of 16 bytes
        raise ValueError(f"seed ({config.seed}) must not be negative and have at most 16 digits.")
    return config


def _resolved(
    schema: type[T],
    recipe: Path | None,
    overrides: Sequence[str],
    given: Mapping[str, Any] | None,
    base: Mapping[str, Any] | None = None,
) -> T:
    merged = OmegaConf.structured(schema)
    try:
        merged = OmegaConf.merge(merged, dict(base or {}))
        if recipe is not None:
            merged = OmegaConf.merge(merged, _read_yaml(recipe))
        merged = OmegaConf.merge(merged, dict(given or {}))
        for word in overrides:
            if "=" not in word:
                raise ValueError(f"override {word!r} is not key=value; for example training.n_steps=500.")
            merged = OmegaConf.merge(merged, _read_word(word))
        config = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, TypeError) as error:
        raise ValueError(_one_line(error)) from error
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
    """A settings dataclass as plain JSON values."""
    plain = OmegaConf.to_container(OmegaConf.structured(settings))
    assert isinstance(plain, dict), "a dataclass becomes a dict"
    return {str(key): value for key, value in plain.items()}


def from_dict(schema: type[T], values: dict[str, Any]) -> T:
    """The dataclass `schema` from plain values (a model folder's json); unknown keys are refused."""
    if "${" in str(values):  # OmegaConf would resolve it, and so read the environment of whoever opens the folder
        raise ValueError(
            f"{schema.__name__} holds an interpolation ('${{'); settings from a model folder must be plain."
        )
    try:
        settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.create(values)))
    except OmegaConfBaseException as error:
        raise ValueError(_one_line(error)) from error
    assert isinstance(settings, schema), "OmegaConf.to_object returns the schema's class"
    return settings


def check_config(config: Config) -> None:
    """Refuse values that no data could make sensible. Raises ValueError."""
    for section in fields(config):
        settings = getattr(config, section.name)
        for field_ in fields(settings) if is_dataclass(settings) else ():
            value = getattr(settings, field_.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{section.name}.{field_.name} ({value}) must be a finite number.")
    positive = {
        "data.set_size": config.data.set_size,
        "data.sets_per_batch": config.data.sets_per_batch,
        "data.target_sum": 1.0 if config.data.target_sum is None else config.data.target_sum,
        "data.scale": config.data.scale,
        "diffusion.n_timesteps": config.diffusion.n_timesteps,
        "sampling.n_steps": config.sampling.n_steps,
        "sampling.start_time": config.sampling.start_time,
        "optim.lr": config.optim.lr,
        "optim.eps": config.optim.eps,
        "optim.grad_clip": config.optim.grad_clip,
        "optim.ema_every": config.optim.ema_every,
        "training.n_steps": config.training.n_steps,
        "training.accumulation_steps": config.training.accumulation_steps,
        "training.timeout": config.training.timeout,
        "training.log_every": config.training.log_every,
        "training.validate_every": config.training.validate_every,
        "training.validate_sets": config.training.validate_sets,
        "training.save_every": config.training.save_every,
        "training.keep_states": config.training.keep_states,
        "adapt.lr_ratio": config.adapt.lr_ratio,
        "adapt.lora_rank": config.adapt.lora_rank,
        "adapt.lora_alpha": config.adapt.lora_alpha,
    }
    for key, value in positive.items():
        if not value > 0:
            raise ValueError(f"{key} ({value}) must be greater than 0.")
    not_negative = {
        "data.prefetch": config.data.prefetch,
        "diffusion.mse_weight": config.diffusion.mse_weight,
        "diffusion.mmd_weight": config.diffusion.mmd_weight,
        "sampling.cutoff": config.sampling.cutoff,
        "optim.weight_decay": config.optim.weight_decay,
        "optim.warmup_steps": config.optim.warmup_steps,
        "training.seed": config.training.seed,
        "training.profile_steps": config.training.profile_steps,
    }
    for key, value in not_negative.items():
        if value < 0:
            raise ValueError(f"{key} ({value}) must not be negative.")
    fractions = {
        "split.validation_fraction": config.split.validation_fraction,
        "diffusion.p_self_cond": config.diffusion.p_self_cond,
        "diffusion.p_drop_cond": config.diffusion.p_drop_cond,
        "diffusion.p_drop_label": config.diffusion.p_drop_label,
        "diffusion.p_drop_perturbation": config.diffusion.p_drop_perturbation or 0.0,
        "diffusion.p_features_only": config.diffusion.p_features_only,
        "optim.ema_decay": config.optim.ema_decay,
        "optim.min_lr_ratio": config.optim.min_lr_ratio,
        "optim.plateau_ratio": config.optim.plateau_ratio,
    }
    for key, value in fractions.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{key} ({value}) must be between 0 and 1.")
    _check_data(config.data)
    if config.data.n_hvg is not None and config.data.n_hvg < 1:
        raise ValueError(f"data.n_hvg ({config.data.n_hvg}) must be at least 1; null keeps all genes.")
    if config.data.combination_separator == "":
        raise ValueError("data.combination_separator ('') must not be empty; null never splits labels.")
    if config.data.dose_separator == "":
        raise ValueError("data.dose_separator ('') must not be empty; null: labels have no doses.")
    if config.denoiser.conditioning == "reference" and (config.data.perturbation_features or config.data.dose_marker):
        raise ValueError(
            "denoiser.conditioning=reference knows neither features nor doses of perturbations; set it to labels, or "
            "leave data.perturbation_features, data.dose_col and data.dose_separator out."
        )
    for key, value in (("optim.beta1", config.optim.beta1), ("optim.beta2", config.optim.beta2)):
        if not 0 <= value < 1:
            raise ValueError(f"{key} ({value}) must be at least 0 and less than 1.")
    patience = config.training.early_stop_patience
    if patience is not None and patience < 1:
        raise ValueError(f"training.early_stop_patience ({patience}) must be at least 1; null never stops early.")
    if config.adapt.method != "full" and config.adapt.init_from is None:
        raise ValueError(f"adapt.method={config.adapt.method} needs a checkpoint to start from; set adapt.init_from.")
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
    check_sampling(config.sampling, config.diffusion)


def _check_data(data: DataConfig) -> None:
    if (data.screen is None) == (not data.atlases):
        raise ValueError(
            f"data.screen ({data.screen}), data.atlases ({[atlas.path for atlas in data.atlases]}): give one of them."
        )
    if not 1 <= data.min_set_size <= (data.set_size + 1) // 2:
        raise ValueError(
            f"data.min_set_size ({data.min_set_size}) must be between 1 and half of data.set_size ({data.set_size}): "
            "a rest under it shares the cells of the set before."
        )
    weights = [atlas.weight for atlas in data.atlases]
    if any(weight is not None for weight in weights) and not all(
        weight is not None and weight > 0 for weight in weights
    ):
        raise ValueError(f"data.atlases weights {weights} must be given to all atlases, greater than 0, or to none.")
    if data.n_streams is not None and (data.n_streams < 1 or data.sets_per_batch % data.n_streams):
        raise ValueError(
            f"data.n_streams ({data.n_streams}) must divide data.sets_per_batch ({data.sets_per_batch}): each "
            "stream gives as many sets a step."
        )


def check_preprocessing(how: Preprocessing) -> None:
    """Refuse factors that would erase or invent expression. Raises ValueError."""
    for key, value in (("target_sum", how.target_sum), ("scale", how.scale)):
        if not 0 < value < math.inf:
            raise ValueError(f"preprocessing {key} ({value}) must be finite and greater than 0.")


def check_denoiser(config: DenoiserConfig) -> None:
    """Refuse sizes that are none and shapes that do not divide. Raises ValueError."""
    for name in ("width", "depth", "n_heads", "mlp_ratio", "covariate_dim"):
        if not getattr(config, name) > 0:
            raise ValueError(f"denoiser.{name} ({getattr(config, name)}) must be greater than 0.")
    if not 0 <= config.control_weight <= 1:
        raise ValueError(f"denoiser.control_weight ({config.control_weight}) must be between 0 and 1.")
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
    for name, value in vars(published).items():
        if not 0 <= value <= MAX_FEATURES:
            raise ValueError(f"denoiser.published_encoding.{name} ({value}) must be between 0 and {MAX_FEATURES}.")


def check_sampling(sampling: SamplingConfig, diffusion: DiffusionConfig) -> None:
    """Refuse trajectories that leave the schedule. Raises ValueError."""
    steps, key = (sampling.n_steps, "n_steps") if sampling.spacing == "strided" else (sampling.start_time, "start_time")
    if not 0 < steps <= diffusion.n_timesteps:
        raise ValueError(
            f"sampling.{key} ({steps}) must be between 1 and diffusion.n_timesteps ({diffusion.n_timesteps})."
        )
    if not 0 <= sampling.eta <= 1:
        raise ValueError(f"sampling.eta ({sampling.eta}) must be between 0 and 1.")
    if not 0 <= sampling.guidance_scale < math.inf:
        raise ValueError(
            f"sampling.guidance_scale ({sampling.guidance_scale}) must be finite and not negative; 0 is none."
        )


def _read_yaml(recipe: Path) -> DictConfig:
    try:
        settings = OmegaConf.load(recipe)
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {str(recipe)!r} is not yaml ({' '.join(str(error).split())}).") from error
    if not isinstance(settings, DictConfig):
        raise ValueError(
            f"recipe {str(recipe)!r} is a list; it must hold keys and values, as training: {{n_steps: 9}}."
        )
    return settings


def _read_word(word: str) -> DictConfig:
    try:
        return OmegaConf.from_dotlist([word])
    except yaml.YAMLError as error:
        key, value = word.split("=", 1)
        raise ValueError(f"override {word!r}: {value!r} is not yaml; quote it: {key}=\"'{value}'\".") from error


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    where = next((line.removeprefix("full_key:").strip() for line in lines if line.startswith("full_key:")), "")
    return f"config: {lines[0]}" + (f" (key {where})" if where and where not in lines[0] else "")
