"""Checkpoints of the published implementation (DeepGraphLearning/PerturbDiff, March 2026) as models of ours."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from perturbdiff.config import (
    DenoiserConfig,
    DiffusionConfig,
    ModelConfig,
    ObsColumns,
    Preprocessing,
    SamplingConfig,
)
from perturbdiff.data.vocab import GeneVocab, LabelVocab, Vocabularies
from perturbdiff.files import sha256
from perturbdiff.hub.records import ConversionRecord, TrainingRecord
from perturbdiff.nn.conditioning import CovariateEncoder, VocabSizes
from perturbdiff.nn.denoiser import Denoiser
from perturbdiff.nn.layers import shapes_only
from perturbdiff.reference.checkpoint import TensorRef, open_checkpoint, unwrap
from perturbdiff.reference.names import denoiser_config, load, rename_denoiser, rename_encoder

SET_SIZE = 256  # of most published recipes (Replogle: 32); a checkpoint does not say
MAX_TIMESTEPS = 1 << 20

# Short names of data sets, by which the published code finds their embedders: the first that is part of the name.
_SHORT_NAMES = {"tahoe": "tahoe100m", "pbmc": "pbmc", "replogle": "replogle", "cellxgene": "cellxgene"}
# Settings under which the published code computes what this package does; one that is absent is taken as such.
_COVARIATES: dict[str, tuple[Any, ...]] = {
    "pert_encoding": ("onehot", "non"),
    "celltype_encoding": ("onehot", "llm"),
    "drug_encoding": ("onehot", "chemberta_cls"),
    "replogle_gene_encoding": ("onehot", "genept"),
    "batch_encoding": ("onehot", None),
    "gather_strategy": ("concat",),
}
_MODEL: dict[str, tuple[Any, ...]] = {
    "model_type": ("Cross_DiT",),
    "Block_type": ("MM_DiT",),
    "qk_norm": (True,),
    "output_fn": ("relu",),
    "use_orig_gene_count_as_emb": (True,),
    "class_emb_gather_strategy": ("concat",),
    "use_gene_embedding": (False,),
    "use_class_silu": (False,),
    "learn_sigma": (False,),
    "sigma_small": (False,),
    "use_kl": (False,),
    "predict_xstart": (True,),
    "rescale_timesteps": (False,),
    "rescale_learned_sigmas": (False,),
}


@dataclass(frozen=True)
class ConvertedCheckpoint:
    """The arguments of `PerturbDiff`."""

    denoiser: Denoiser
    genes: GeneVocab
    vocabularies: Vocabularies
    preprocessing: Preprocessing
    config: ModelConfig
    training: TrainingRecord


def convert_checkpoint(
    path: str | Path,
    genes: Sequence[str] | None = None,
    dataset: str | None = None,
    weights: Literal["ema", "raw"] = "ema",
) -> ConvertedCheckpoint:
    """A published Lightning checkpoint (.ckpt) as a model of ours; nothing in the file is executed.

    Parameters
    ----------
    path
        The file, or one of its final weights alone.
    genes
        Names of the genes in the order of the weights, which the file does not hold; gene_0, gene_1, ... if None.
    dataset
        Whose embedders to take where each data set has its own ("tahoe100m", or a name that contains "tahoe").
    weights
        "ema" are the averaged ones, which the published code samples with; "raw" those that were trained.

    Raises
    ------
    FileNotFoundError
        No such file.
    ValueError
        Not such a file, or a hostile one; settings that this package does not compute; tensors, vocabularies or genes
        that do not fit each other; a data set that must be given, or is not there; raw weights that are not there.

    Notes
    -----
    Preprocessing (counts, 10,000 a cell, scale 10), sampling (DDIM from t = 99, guidance 1) and the set size of 256 are
    those of the published recipes: the file does not hold them.
    """
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights ({weights!r}) must be 'ema' or 'raw'.")
    name = Path(path).name
    with open_checkpoint(path) as file:
        content = file.content if isinstance(file.content, dict) else {}
        hyper = unwrap(content.get("hyper_parameters"))
        hyper = hyper if isinstance(hyper, dict) else {}
        covariates, model = (_section(hyper, key, name) for key in ("cov_encoding_cfg", "model_cfg"))
        _check_settings("cov_encoding_cfg", covariates, _COVARIATES)
        _check_settings("model_cfg", model, _MODEL)
        refs = _state(content, weights, name)
        chosen = _choose_dataset(refs, dataset, model.get("dataset_dict"))
        tensors = file.tensors(_select(refs, chosen))
    try:
        denoiser, sizes = _build(tensors, covariates, model)
    except KeyError as error:
        raise ValueError(f"{name}: {error.args[0]}") from error
    config = ModelConfig(denoiser.config, _diffusion(hyper, model), _sampling(model), ObsColumns(), SET_SIZE)
    if genes is not None and len(genes) != denoiser.n_genes:
        raise ValueError(f"{len(genes)} genes were given, {name} has {denoiser.n_genes}; give those it was trained on.")
    names = tuple(genes) if genes is not None else tuple(f"gene_{i}" for i in range(denoiser.n_genes))
    vocabularies = Vocabularies(
        _vocabulary("perturbation", covariates.get("pert_dict"), sizes.perturbations),
        _vocabulary("cell_type", covariates.get("cell_type_dict"), sizes.cell_types),
        _vocabulary("batch", covariates.get("batch_dict"), sizes.batches),
        combination_separator=None,
    )
    conversion = ConversionRecord(
        file=name,
        sha256=sha256(Path(path)),
        weights=weights,
        global_step=_whole_number(content, "global_step"),
        epoch=_whole_number(content, "epoch"),
        dataset=chosen or dataset,
    )
    training = TrainingRecord(converted_from=conversion, settings=_publishable(hyper))
    preprocessing = Preprocessing(input_kind="counts", target_sum=1e4, scale=10.0)
    return ConvertedCheckpoint(denoiser, GeneVocab(names), vocabularies, preprocessing, config, training)


def denoiser_from_reference(state_dict: Mapping[str, Tensor], n_heads: int) -> Denoiser:
    """The published denoiser with its weights; its condition is the covariate embedding.

    Parameters
    ----------
    state_dict
        Tensors named as in the published `Cross_DiT`, with or without a leading `model.`; sizes are read from them.
    n_heads
        Attention heads; a number that does not fit the query norms is refused.

    Raises
    ------
    KeyError
        A tensor is missing, or one is not known.
    ValueError
        A tensor has a shape that does not fit the others.
    """
    published = {name.removeprefix("model."): tensor for name, tensor in state_dict.items()}
    config, n_genes = denoiser_config(published, n_heads)
    with shapes_only():
        denoiser = Denoiser(config, n_genes, sizes=None)
    load(denoiser, rename_denoiser(published, n_genes, config.depth))
    return denoiser


def covariate_encoder_from_reference(state_dict: Mapping[str, Tensor]) -> CovariateEncoder:
    """The published covariate encoder, with learned rows or frozen tables; its `batch_encoder` may be absent.

    Weights do not tell whether the model ignores perturbations (`pert_encoding: non`): set
    `perturbation_encoding = "none"` on the result for such a model. Raises as `denoiser_from_reference`.
    """
    published = {name.removeprefix("cov_encoder."): tensor for name, tensor in state_dict.items()}
    ours, config, sizes = rename_encoder(published, DenoiserConfig())
    with shapes_only():
        encoder = CovariateEncoder(sizes, config, n_genes=config.published_encoding.covariates)
    load(encoder, ours)
    return encoder


def _section(hyper: dict[Any, Any], key: str, name: str) -> dict[Any, Any]:
    if not isinstance(hyper.get(key), dict):
        raise ValueError(f"{name} has no hyper_parameters.{key}; give a checkpoint of the published implementation.")
    return hyper[key]


def _check_settings(section: str, settings: dict[Any, Any], allowed: dict[str, tuple[Any, ...]]) -> None:
    for key, values in allowed.items():
        if key in settings and settings[key] not in values:
            raise ValueError(
                f"{section}.{key} ({_short(settings[key])}) must be {' or '.join(map(repr, values))}; a model with "
                "another computes what this package does not."
            )


def _state(content: dict[Any, Any], weights: str, name: str) -> dict[str, TensorRef]:
    # The averaging callback keeps the averages in state_dict and the weights that were trained beside them.
    key = "state_dict" if weights == "ema" else "current_model_state"
    if weights == "raw" and key not in content:
        raise ValueError(f"{name} has no raw weights beside its state_dict, which is the average; use weights='ema'.")
    state = content.get(key)
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{name} has no {key}; give a checkpoint of the published implementation.")
    refs = {key: value for key, value in state.items() if isinstance(key, str) and isinstance(value, TensorRef)}
    if len(refs) != len(state):
        wrong = [_short(key) for key, value in state.items() if not isinstance(value, TensorRef)]
        raise ValueError(f"{name}: {key} holds what is no tensor: {', '.join(wrong[:5])}.")
    if foreign := [key[:100] for key in refs if not key.startswith(("model.", "cov_encoder."))]:
        raise ValueError(f"{name}: {key} has {len(foreign)} unknown tensors: {', '.join(foreign[:5])}.")
    return refs


def _choose_dataset(refs: Mapping[str, TensorRef], dataset: str | None, datasets: Any) -> str | None:
    # The name of the embedders to take; None where all data sets share them.
    own = sorted({match[1] for name in refs if (match := re.fullmatch(r"model\.x_embedder\.(.+)\.weight", name))})
    if own:
        if dataset is None:
            raise ValueError(
                f"each data set has its own embedders; give one of them as the data set: {', '.join(own[:20])}."
            )
        for name in (dataset, _short_name(dataset)):
            if name in own:
                return name
        raise ValueError(f"data set {dataset!r} has no embedders here; those that have: {', '.join(own[:20])}.")
    known = [name for name in datasets if isinstance(name, str)] if isinstance(datasets, list) else []
    if dataset is not None and dataset not in known and _short_name(dataset) not in map(_short_name, known):
        raise ValueError(
            f"data set {dataset!r} is not among those of this checkpoint ({', '.join(known[:20]) or 'not named'}), "
            "which share their embedders; give none."
        )
    return None


def _short_name(dataset: str) -> str:
    return next((short for part, short in _SHORT_NAMES.items() if part in dataset.lower()), dataset)


def _select(refs: Mapping[str, TensorRef], chosen: str | None) -> dict[str, TensorRef]:
    # Without the embedders of other data sets; those chosen under the shared name.
    found: dict[str, TensorRef] = {}
    for name, ref in refs.items():
        match = re.fullmatch(r"(model\.x_(?:control_)?embedder)\.(.+)\.(weight|bias)", name) if chosen else None
        if match is None:
            found[name] = ref
        elif match[2] == chosen:
            found[f"{match[1]}.{match[3]}"] = ref
    return found


def _build(
    tensors: Mapping[str, Tensor], covariates: dict[Any, Any], model: dict[Any, Any]
) -> tuple[Denoiser, VocabSizes]:
    network, labels = (
        {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        for prefix in ("model.", "cov_encoder.")
    )
    config, n_genes = denoiser_config(network, _number(model, "dit_num_heads", int, 1, 1 << 16))
    encoder, config, sizes = rename_encoder(labels, config)
    if covariates.get("pert_encoding") == "non" and config.perturbation_encoding == "onehot":
        # Every set reads row 0: the others say nothing, and no perturbation may seem to be known.
        config.perturbation_encoding, sizes = "none", replace(sizes, perturbations=0)
        encoder["perturbation.weight"] = encoder["perturbation.weight"][:1]
    if config.published_encoding.covariates == n_genes:
        config.published_encoding.covariates = 0
    with shapes_only():  # shapes only: no memory is taken before they were compared with the file's
        denoiser = Denoiser(config, n_genes, sizes)
    ours = rename_denoiser(network, n_genes, config.depth)
    load(denoiser, {**ours, **{f"conditioning.encoder.{name}": tensor for name, tensor in encoder.items()}})
    if wrong := [name for name, tensor in denoiser.state_dict().items() if not tensor.isfinite().all()]:
        raise ValueError(f"{len(wrong)} tensors hold NaN or infinity: {', '.join(wrong[:5])}; training had failed.")
    return denoiser.eval(), sizes


def _vocabulary(kind: str, ids: Any, n: int) -> LabelVocab:
    if n == 0:
        return LabelVocab(kind, ())
    if not isinstance(ids, dict) or not all(isinstance(name, str) for name in ids):
        raise ValueError(f"cov_encoding_cfg has no {kind} names, and the weights have {n}.")
    if not all(isinstance(i, int) for i in ids.values()) or sorted(ids.values()) != list(range(n)):
        raise ValueError(f"the {len(ids)} {kind} ids must be 0 to {n - 1}, one for each row of the weights.")
    return LabelVocab(kind, tuple(sorted(ids, key=ids.__getitem__)))


def _diffusion(hyper: dict[Any, Any], model: dict[Any, Any]) -> DiffusionConfig:
    schedule = model.get("noise_schedule", "linear")
    _check_settings("model_cfg", {"noise_schedule": schedule}, {"noise_schedule": ("linear", "cosine", "power_cosine")})
    if schedule == "power_cosine":
        _check_settings("model_cfg", model, {"noise_schedule_gamma": (0.3,)})
    optimizer = hyper.get("optimizer_cfg")
    optimizer = optimizer if isinstance(optimizer, dict) else {}
    return DiffusionConfig(
        n_timesteps=_number(model, "steps", int, 1, MAX_TIMESTEPS),
        schedule=schedule,
        mse_weight=0.0 if model.get("no_mse_loss") is True else 1.0,
        mmd_weight=_number(optimizer, "MMD_loss_factor", float, 0, 1e9, 1.0)
        if optimizer.get("MMD_loss", True)
        else 0.0,
        p_drop_cond=_number(model, "p_drop_cond", float, 0, 1, 0.5),
        p_drop_label=0.0,
    )


def _sampling(model: dict[Any, Any]) -> SamplingConfig:
    return SamplingConfig(
        sampler="ddim",
        spacing="reference",
        start_time=min(100, model["steps"]),
        guidance_scale=1.0,
        eta=0.0,
        cutoff=_number(model, "cutoff", float, 0, 1e3, 1e-4),
        whole_counts=False,
    )


def _number(settings: dict[Any, Any], key: str, kind: type, least: float, most: float, default: Any = None) -> Any:
    value = settings.get(key, default)
    number = isinstance(value, int) or (kind is float and isinstance(value, float) and math.isfinite(value))
    if isinstance(value, bool) or not number or not least <= value <= most:
        raise ValueError(f"setting {key} ({_short(value)}) must be a number between {least:g} and {most:g}.")
    return kind(value)


def _whole_number(content: dict[Any, Any], key: str) -> int | None:
    value = content.get(key)
    return value if type(value) is int and 0 <= value < 1 << 62 else None


def _publishable(value: Any) -> Any:
    # Settings as JSON values, without vocabularies (they have files of their own) and without paths: a path says where
    # its author works, and nothing about the model.
    if isinstance(value, dict):
        found = {
            str(k): _publishable(v) for k, v in value.items() if k not in ("pert_dict", "cell_type_dict", "batch_dict")
        }
        return {key: v for key, v in found.items() if v is not None and "/" not in key}
    if isinstance(value, list):
        return [v for v in map(_publishable, value) if v is not None]
    if isinstance(value, str):
        return None if "/" in value or "\\" in value else value
    if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return None


def _short(value: Any) -> str:
    return repr(value)[:100]
