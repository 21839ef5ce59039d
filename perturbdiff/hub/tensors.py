"""The tensors of a model folder: the whole folder written; weights loaded and the golden output checked.

Everything read here is untrusted: names, shapes and types are compared before memory is taken.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from perturbdiff.cards import read_card, renewed
from perturbdiff.data.vocab import Labels
from perturbdiff.files import few, replace_folder, sha256, short, write_json, write_text
from perturbdiff.hub.metadata import ModelMetadata
from perturbdiff.hub.model_folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CARD,
    CONFIG,
    FEATURES,
    FORMAT_VERSION,
    GOLDEN,
    JSON_FILES,
    MAX_HEADER_BYTES,
    MEANS_TENSORS,
    NOISE_TENSORS,
    OVERDISPERSION,
    WEIGHTS_INDEX,
    ModelFolder,
    config_hash,
    read_verified,
)
from perturbdiff.hub.records import MeansRecord
from perturbdiff.means.training import TrainingMeans
from perturbdiff.nn.denoiser import Denoiser, build_denoiser
from perturbdiff.nn.layers import shapes_only

MAX_OVERHEAD = 1 << 26  # bytes of tensor files beyond eight a value: headers, and the golden check
GOLDEN_TOLERANCE = 1e-4
GOLDEN_NAMES = {"x_t", "t", "control", "self_cond", "mask", "perturbation", "cell_type", "batch", "x0_pred"}
MAX_GOLDEN_CELLS = 64
FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}


def write_model_folder(
    path: str | Path,
    metadata: ModelMetadata,
    weights: dict[str, Tensor],
    golden: dict[str, Tensor],
    card: str,
    max_shard_size: int | str = "5GB",
    adapter: dict[str, Any] | None = None,
) -> None:
    """Write a model folder whole or not at all; an older model folder of that name is replaced.

    Parameters
    ----------
    weights
        All tensors of the denoiser by name.
    golden
        An input and the output it must give, as `make_golden` gives them.
    card
        The text of README.md; what an owner wrote into that of the older folder stays.
    adapter
        adapter_config.json, of an adapter; `weights` are then those of adapter_model.safetensors.

    Raises
    ------
    FileExistsError
        `path` exists and is not a model folder.
    OSError
        It could not be written; an older one is as it was.
    """
    path = Path(path)
    if path.exists() and not (path / CONFIG).is_file() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not a model folder; choose another name or remove it.")
    if (path / CONFIG).is_file() and (path / ADAPTER_CONFIG).is_file() != (adapter is not None):
        old, new = ("an adapter", "a model") if adapter is None else ("a model", "an adapter")
        raise FileExistsError(f"{path} is {old}, which {new} must not replace; choose another name or remove it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        settings, json_files = metadata.as_json()
        if adapter is not None:
            json_files = {**json_files, ADAPTER_CONFIG: adapter}
        for name, content in json_files.items():
            write_json(temporary / name, content)
        write_text(temporary / CARD, renewed(card, read_card(path / CARD), str(path)))
        (temporary / GOLDEN).parent.mkdir()
        tensor_files = {ADAPTER_WEIGHTS: weights}
        if adapter is None:
            tensor_files = _in_shards(weights, max_shard_size, temporary)
        tensor_files[GOLDEN] = golden
        try:
            for name, tensors in tensor_files.items():
                save_file(_contiguous(tensors), temporary / name, metadata={"format": "pt"})
                (temporary / name).chmod((temporary / JSON_FILES[0]).stat().st_mode)  # it comes private to its writer
        except SafetensorError as error:  # the disk is full
            raise OSError(f"{path} could not be written ({error}).") from error
        config = {"format_version": FORMAT_VERSION, **settings}
        index = [WEIGHTS_INDEX] if (temporary / WEIGHTS_INDEX).exists() else []
        hashes = {name: sha256(temporary / name) for name in (*json_files, *index, *tensor_files)}
        write_json(temporary / CONFIG, {**config, "sha256": {CONFIG: config_hash(config), **hashes}})
        temporary.chmod(0o755)
        replace_folder(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def denoiser_of(metadata: ModelMetadata) -> Denoiser:
    """The denoiser on the meta device: its names and shapes, before memory is taken."""
    with shapes_only():
        denoiser = build_denoiser(metadata.config.denoiser, len(metadata.genes), metadata.vocabularies)
        if metadata.trained is not None:
            for name in _names_of(metadata.trained):
                denoiser.register_buffer(name, torch.empty(len(metadata.trained.n_cells), len(metadata.genes)))
            denoiser.register_buffer(OVERDISPERSION, torch.empty(len(metadata.genes)))
    return denoiser


def take_means(denoiser: Denoiser, metadata: ModelMetadata) -> TrainingMeans | None:
    """The means that lie among the weights, out of them. Raises ValueError where they are not finite."""
    if metadata.trained is None:
        return None
    known = metadata.trained
    arrays = {name: denoiser.get_buffer(name).double().numpy() for name in (*_names_of(known), OVERDISPERSION)}
    for name in arrays:
        delattr(denoiser, name)
    control, perturbed = (arrays[name] for name in MEANS_TENSORS)
    control_noise, perturbed_noise = (arrays.get(name) for name in NOISE_TENSORS)
    return TrainingMeans(
        list(known.perturbation),
        list(known.cell_type),
        list(known.batch),
        control,
        perturbed,
        np.array(known.n_cells),
        metadata.vocabularies.notation,
        metadata.genes,
        overdispersion=arrays[OVERDISPERSION],
        control_noise=control_noise,
        perturbed_noise=perturbed_noise,
    )


def _names_of(means: MeansRecord) -> tuple[str, ...]:
    return (*MEANS_TENSORS, *NOISE_TENSORS) if means.noise else MEANS_TENSORS


def with_means(weights: dict[str, Tensor], means: TrainingMeans | None) -> dict[str, Tensor]:
    """Weights as they are saved: the means among them."""
    if means is None:
        return weights
    assert means.overdispersion is not None, "the means of a model have it"
    values = means.control_mean, means.perturbed_mean, means.control_noise, means.perturbed_noise
    arrays = dict(zip((*MEANS_TENSORS, *NOISE_TENSORS), values, strict=True)) | {OVERDISPERSION: means.overdispersion}
    names = (*_names_of(MeansRecord.of(means)), OVERDISPERSION)
    return {**weights, **{name: torch.from_numpy(np.asarray(arrays[name])).float() for name in names}}


def max_tensor_bytes(denoiser: nn.Module) -> int:
    """What weights, features and golden check of a model of these shapes can take."""
    return 8 * sum(tensor.numel() for tensor in denoiser.state_dict().values()) + MAX_OVERHEAD


def load_weights(folder: ModelFolder, denoiser: nn.Module) -> None:
    """Fill a denoiser that was built on the meta device; strict. Raises as `read_tensors`."""
    shapes = {name: tuple(tensor.shape) for name, tensor in denoiser.state_dict().items()}
    denoiser.load_state_dict(read_tensors(folder, shapes, max_tensor_bytes(denoiser)), strict=True, assign=True)


def read_tensors(folder: ModelFolder, shapes: dict[str, tuple[int, ...]], max_bytes: int) -> dict[str, Tensor]:
    """The weights, float32, one file after the other; nothing of them stays mapped.

    Raises
    ------
    FileNotFoundError, ValueError
        As `read_verified`, where `max_bytes` is what all files may have; not a safetensors file; missing or unexpected
        tensors, other shapes, other types than float; all listed.
    """
    path = folder.path
    tensors: dict[str, Tensor] = {}
    came_in: dict[str, str] = {}
    wrong: dict[str, str] = {}
    for file, digest in folder.tensor_files.items():
        content = read_verified(path, file, digest, max_bytes)
        max_bytes -= len(content)
        if file == GOLDEN:  # whether it is run or not
            continue
        for name, tensor in _tensors(content, path / file).items():
            if name in came_in:
                raise ValueError(f"{path}: tensor {few([name])} is in {came_in[name]} and in {file}; get it again.")
            came_in[name] = file
            if name not in shapes or tuple(tensor.shape) != shapes[name]:
                wrong[name] = f"{name} {tuple(tensor.shape)} (must be {shapes.get(name)})"
            elif tensor.dtype not in FLOATS:
                wrong[name] = f"{name} of type {tensor.dtype} (must be floating point)"
            else:
                tensors[name] = tensor.float()
    missing, unexpected = sorted(shapes.keys() - came_in.keys()), sorted(came_in.keys() - shapes.keys())
    if missing or unexpected:
        raise ValueError(f"{path} does not fit its {CONFIG}: missing {few(missing)}; unexpected {few(unexpected)}.")
    if wrong:
        raise ValueError(f"{path} does not fit its {CONFIG}: {few([wrong[n] for n in shapes if n in wrong])}.")
    return tensors


def _tensors(content: bytes, path: Path) -> dict[str, Tensor]:
    # Copies; the library refuses ranges that overlap, leave gaps or lead out of the file.
    if (length := int.from_bytes(content[:8], "little")) > MAX_HEADER_BYTES:
        raise ValueError(f"{path} has a header of {length:,} bytes; at most {MAX_HEADER_BYTES:,} are read.")
    try:
        return load(content)
    except (SafetensorError, AssertionError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({short(error)}).") from error


def make_golden(denoiser: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A tiny input and the output it must give; `inputs` are the denoiser's arguments by name."""
    return {**inputs, "x0_pred": _golden_forward(denoiser, inputs)}


def check_golden(folder: ModelFolder, denoiser: nn.Module) -> float:
    """Run the golden input; returns the largest difference.

    Raises
    ------
    FileNotFoundError, ValueError
        As `read_verified`; inputs are missing, too large or of another type, or the output differs by more than 1e-4
        (relative to its largest value).
    """
    path = folder.path / GOLDEN
    content = read_verified(folder.path, GOLDEN, folder.tensor_files[GOLDEN], max_tensor_bytes(denoiser))
    golden = _tensors(content, path)
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in golden.items()}
    if set(found) != GOLDEN_NAMES:
        raise ValueError(f"{path} must hold {', '.join(sorted(GOLDEN_NAMES))}; get the model folder again.")
    cells = found["x_t"][0]
    if len(cells) != 3 or not 0 < cells[0] * cells[1] <= MAX_GOLDEN_CELLS:
        raise ValueError(f"{path}: x_t of shape {cells} must be 1 to {MAX_GOLDEN_CELLS} cells in sets.")
    labels, n_parts = ((cells[0],), torch.int64), found["perturbation"][0][-1:]
    expected_kinds = {
        **dict.fromkeys(("x_t", "control", "self_cond", "x0_pred"), (cells, torch.float32)),
        **dict.fromkeys(("t", "cell_type", "batch"), labels),
        "perturbation": ((cells[0], *n_parts), torch.int64),
        "mask": (cells[:2], torch.bool),
    }
    wrong = [f"{name} {found[name]} (must be {kind})" for name, kind in expected_kinds.items() if found[name] != kind]
    if wrong or n_parts > (MAX_GOLDEN_CELLS,):
        raise ValueError(f"{path}: {few(wrong or ['perturbation'])} does not fit x_t; get the model folder again.")
    expected = golden.pop("x0_pred")
    try:
        got = _golden_forward(denoiser, golden)
    except (IndexError, RuntimeError, ValueError) as error:
        raise ValueError(f"{folder.path}: its golden input does not fit the model ({short(error)}).") from error
    difference = float((got - expected).abs().max()) if got.shape == expected.shape else float("inf")
    if not (math.isfinite(difference) and difference <= GOLDEN_TOLERANCE * max(1.0, float(expected.abs().max()))):
        raise ValueError(
            f"{folder.path} fails its golden check: the stored input gives outputs that differ by {difference:.2g} "
            f"from the stored ones (allowed {GOLDEN_TOLERANCE:g}); weights and code do not belong together."
        )
    return difference


def _in_shards(weights: dict[str, Tensor], max_shard_size: int | str, folder: Path) -> dict[str, dict[str, Tensor]]:
    # Tensors by file, as the Hub's own tools cut them; writes the index of several shards.
    from huggingface_hub import split_torch_state_dict_into_shards

    frozen = {name: tensor for name, tensor in weights.items() if name.endswith(".features")}
    trained = {name: tensor for name, tensor in weights.items() if name not in frozen}
    split = split_torch_state_dict_into_shards(trained, max_shard_size=max_shard_size)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / WEIGHTS_INDEX, index)
    files = {file: {name: weights[name] for name in names} for file, names in split.filename_to_tensors.items()}
    return {**files, FEATURES: frozen} if frozen else files


def _golden_forward(denoiser: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    doses = torch.zeros(inputs["perturbation"].shape)  # 1, of whatever unit
    labels = Labels(inputs["perturbation"], inputs["cell_type"], inputs["batch"], dose=doses)
    with torch.inference_mode():
        return denoiser(inputs["x_t"], inputs["t"], inputs["control"], labels, inputs["self_cond"], inputs["mask"])


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
