"""A model folder: which files it has, how they are written, checked and read (README, "Model folder").

Everything read here is untrusted: JSON and safetensors only, names, sizes and hashes checked before memory is taken.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from perturbdiff.data.vocab import Labels
from perturbdiff.files import few, inside, json_sha256, read_json, sha256, short, write_json

FORMAT_VERSION = 4
CONFIG = "config.json"
CARD = "README.md"
EVALUATION = "evaluation.json"
JSON_FILES = (
    "genes.json",
    "perturbations.json",
    "cell_types.json",
    "batches.json",
    "preprocessing.json",
    "training.json",
)
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"  # which shard has which tensor, for readers other than this one
SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
FEATURES = "features.safetensors"  # frozen tables: the tensors whose name ends in .features
GOLDEN = "checks/golden.safetensors"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # names of the peft library
# What in a repo belongs to a model: of these, what a push does not bring is deleted.
OWN_FILES = re.compile(
    r"adapter_config\.json|adapter_model\.safetensors|"
    r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|features\.safetensors|evaluation\.json|"
    r"\.eval_results/.+"
)
MAX_JSON_BYTES = 1 << 24  # takes up to twenty times as much memory
MAX_CARD_BYTES = 1 << 22
MAX_SHARDS = 1000
MAX_HEADER_BYTES = 1 << 23  # of a file of tensors: some 50,000 of them
GOLDEN_TOLERANCE = 1e-4
GOLDEN_NAMES = {"x_t", "t", "control", "self_cond", "mask", "perturbation", "cell_type", "batch", "x0_pred"}
MAX_GOLDEN_CELLS = 64
FLOATS = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class ModelFiles:
    """The content of a model folder.

    config, json
        Settings as JSON values: config.json, and the other JSON files by name.
    weights
        All tensors of the denoiser by name.
    golden
        An input and the output it must give.
    card
        The text of README.md.
    """

    config: dict[str, Any]
    json: dict[str, dict[str, Any]]
    weights: dict[str, Tensor]
    golden: dict[str, Tensor]
    card: str


@dataclass(frozen=True)
class Settings:
    """What a model folder says of itself: its JSON files, checked, and the hashes of its tensors' files."""

    config: dict[str, Any]  # of the newest format version
    json: dict[str, dict[str, Any]]
    tensor_files: dict[str, str]  # name -> sha256
    sha256: str  # of config.json, which states every other file's: the identity of the model

    @property
    def files(self) -> list[str]:
        """Every file that belongs to the model, but the card."""
        index = [WEIGHTS_INDEX] if WEIGHTS_INDEX in self.config["sha256"] else []
        return [CONFIG, *self.json, *index, *self.tensor_files]

    @property
    def is_adapter(self) -> bool:
        """Whether the weights are a change of another model's (`perturbdiff.hub.adapter`)."""
        return ADAPTER_CONFIG in self.json


def write_model_folder(folder: str | Path, files: ModelFiles, max_shard_size: int | str = "5GB") -> None:
    """Write a model folder whole or not at all; an older model folder of that name is replaced.

    Raises
    ------
    FileExistsError
        `folder` exists and is not a model folder.
    OSError
        It could not be written; an older one is as it was.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / CONFIG).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not a model folder; choose another name or remove it.")
    is_adapter = ADAPTER_CONFIG in files.json
    if (folder / CONFIG).is_file() and (folder / ADAPTER_CONFIG).is_file() != is_adapter:
        old, new = ("a model", "an adapter") if is_adapter else ("an adapter", "a model")
        raise FileExistsError(f"{folder} is {old}, which {new} must not replace; choose another name or remove it.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, content in files.json.items():
            write_json(temporary / name, content)
        (temporary / CARD).write_text(files.card, encoding="utf-8")
        (temporary / GOLDEN).parent.mkdir()
        if is_adapter:
            tensor_files = {ADAPTER_WEIGHTS: files.weights}
        else:
            tensor_files = _in_shards(files.weights, max_shard_size, temporary)
        tensor_files[GOLDEN] = files.golden
        try:
            for name, tensors in tensor_files.items():
                save_file(_contiguous(tensors), temporary / name, metadata={"format": "pt"})
                (temporary / name).chmod((temporary / JSON_FILES[0]).stat().st_mode)  # it comes private to its writer
        except SafetensorError as error:  # the disk is full
            raise OSError(f"{folder} could not be written ({error}).") from error
        config = {"format_version": FORMAT_VERSION, **files.config}
        index = [WEIGHTS_INDEX] if (temporary / WEIGHTS_INDEX).exists() else []
        hashes = {name: sha256(temporary / name) for name in (*files.json, *index, *tensor_files)}
        write_json(temporary / CONFIG, {**config, "sha256": {CONFIG: config_hash(config), **hashes}})
        temporary.chmod(0o755)
        replace_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def replace_folder(new: Path, final: Path) -> None:
    """Move `new` to `final`; what stood there is removed last."""
    if not final.exists():
        new.rename(final)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{final.name}-old-", dir=final.parent))
    final.rename(old / "folder")
    new.rename(final)
    shutil.rmtree(old)


def folder_identity(folder: str | Path) -> tuple[int, int] | None:
    """What changes when a folder is replaced by another of that name; None where there is none."""
    try:
        stat = os.stat(folder)
    except OSError:
        return None
    return stat.st_ino, stat.st_ctime_ns  # numbers of removed folders are given again


def is_replaced_now(folder: str | Path) -> bool:
    """True in the moment between two renames, when the old folder is gone and the new one not there yet."""
    folder = Path(folder)
    return not folder.exists() and any(folder.parent.glob(f".{folder.name}-*"))


def read_settings(folder: str | Path) -> Settings:
    """The JSON files of a model folder; its tensors are not looked at.

    Raises
    ------
    FileNotFoundError, ValueError
        No such folder; not a model folder; a file is missing, leads out of the folder or does not have the hash that
        config.json states; a format version that this version does not read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"model folder {str(folder)!r} does not exist; give a folder made by save_pretrained.")
    if not (folder / CONFIG).is_file():
        found = sorted(p.name for p in folder.iterdir())[:8]
        raise FileNotFoundError(f"{folder} is not a model folder: it has no {CONFIG}; found {found or 'nothing'}.")
    config = read_json(inside(folder, CONFIG), MAX_JSON_BYTES)
    version = config.get("format_version")
    if type(version) is not int or version not in (*_MIGRATIONS, FORMAT_VERSION):
        raise ValueError(
            f"{folder} has format_version {few([str(version)])}; this version of perturbdiff reads 1 to "
            f"{FORMAT_VERSION}. Update perturbdiff, or get the folder again."
        )
    stated = _stated_hashes(folder, config)
    if config_hash(config) != stated.pop(CONFIG):
        raise ValueError(f"{folder / CONFIG} does not have the sha256 that it states: it was changed. Get it again.")
    tensor_files = {name: digest for name, digest in stated.items() if name.endswith(".safetensors")}
    for name in stated.keys() - tensor_files.keys():
        check_hash(folder, name, stated[name], MAX_JSON_BYTES)
    json_files = {
        name: read_json(folder / name, MAX_JSON_BYTES)
        for name in (*JSON_FILES, EVALUATION, ADAPTER_CONFIG)
        if name in stated
    }
    try:
        while config["format_version"] < FORMAT_VERSION:
            config, json_files = _MIGRATIONS[config["format_version"]](config, json_files)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG} is not of format_version {version} ({short(error)}).") from error
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    return Settings(config, json_files, tensor_files, sha256(folder / CONFIG))


def read_card(folder: str | Path) -> str | None:
    """The text of the card, which people edit and no hash covers; None where there is none.

    Raises ValueError where it is too large or not UTF-8.
    """
    path = inside(Path(folder), CARD)
    if not path.is_file():
        return None
    if (size := path.stat().st_size) > MAX_CARD_BYTES:
        raise ValueError(f"{path} has {size:,} bytes; at most {MAX_CARD_BYTES:,} are read.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({short(error)}); save it as such.") from error


def check_tensor_files(folder: str | Path, settings: Settings, max_bytes: int | None = None) -> None:
    """Compare the hashes of weights, features and golden check.

    Raises
    ------
    FileNotFoundError, ValueError
        A file is missing, leads out of the folder, is larger than `max_bytes` or no safetensors file, or does not have
        the hash that config.json states.
    """
    for name, digest in settings.tensor_files.items():
        check_hash(Path(folder), name, digest, max_bytes)


def load_weights(folder: str | Path, settings: Settings, denoiser: nn.Module) -> None:
    """Fill a denoiser that was built on the meta device; strict. Raises as `read_tensors`."""
    shapes = {name: tuple(tensor.shape) for name, tensor in denoiser.state_dict().items()}
    denoiser.load_state_dict(read_tensors(folder, settings, shapes), strict=True, assign=True)


def read_tensors(folder: str | Path, settings: Settings, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The weights, float32. Shapes are compared before anything is read.

    Raises
    ------
    ValueError
        Missing or unexpected tensors, other shapes, other types than float; all listed.
    """
    folder = Path(folder)
    files = [name for name in settings.tensor_files if name != GOLDEN]
    found: dict[str, tuple[str, tuple[int, ...], str]] = {}  # tensor -> file, shape, type
    for file in files:
        for name, (shape, dtype) in tensor_header(folder / file).items():
            if name in found:
                raise ValueError(f"{folder}: tensor {few([name])} is in {found[name][0]} and in {file}; get it again.")
            found[name] = file, shape, dtype
    missing, unexpected = sorted(shapes.keys() - found.keys()), sorted(found.keys() - shapes.keys())
    if missing or unexpected:
        raise ValueError(f"{folder} does not fit its {CONFIG}: missing {few(missing)}; unexpected {few(unexpected)}.")
    wrong = [f"{n} {found[n][1]} (must be {shape})" for n, shape in shapes.items() if found[n][1] != shape]
    wrong += [
        f"{n} of type {dtype} (must be floating point)" for n, (_, _, dtype) in found.items() if dtype not in FLOATS
    ]
    if wrong:
        raise ValueError(f"{folder} does not fit its {CONFIG}: {few(wrong)}.")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= {name: values.float() for name, values in load_file(folder / file).items()}
    return tensors


def config_hash(config: dict[str, Any]) -> str:
    """Hash of all of config.json but its `sha256` entry."""
    return json_sha256({key: value for key, value in config.items() if key != "sha256"})


def make_golden(denoiser: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A tiny input and the output it must give; `inputs` are the denoiser's arguments by name."""
    return {**inputs, "x0_pred": _golden_forward(denoiser, inputs)}


def check_golden(folder: str | Path, denoiser: nn.Module) -> float:
    """Run the golden input; returns the largest difference.

    Raises
    ------
    ValueError
        Inputs are missing, too large or of another type, or the output differs by more than 1e-4 (relative to its
        largest value).
    """
    path = Path(folder) / GOLDEN
    found = tensor_header(path)
    if set(found) != GOLDEN_NAMES:
        raise ValueError(f"{path} must hold {', '.join(sorted(GOLDEN_NAMES))}; get the model folder again.")
    cells = found["x_t"][0]
    if len(cells) != 3 or not 0 < cells[0] * cells[1] <= MAX_GOLDEN_CELLS:
        raise ValueError(f"{path}: x_t of shape {cells} must be 1 to {MAX_GOLDEN_CELLS} cells in sets.")
    labels, n_parts = ((cells[0],), "I64"), found["perturbation"][0][-1:]
    expected_kinds = {
        **dict.fromkeys(("x_t", "control", "self_cond", "x0_pred"), (cells, "F32")),
        **dict.fromkeys(("t", "cell_type", "batch"), labels),
        "perturbation": ((cells[0], *n_parts), "I64"),
        "mask": (cells[:2], "BOOL"),
    }
    wrong = [f"{name} {found[name]} (must be {kind})" for name, kind in expected_kinds.items() if found[name] != kind]
    if wrong or n_parts > (MAX_GOLDEN_CELLS,):
        raise ValueError(f"{path}: {few(wrong or ['perturbation'])} does not fit x_t; get the model folder again.")
    golden = load_file(path)
    expected = golden.pop("x0_pred")
    try:
        got = _golden_forward(denoiser, golden)
    except (IndexError, RuntimeError, ValueError) as error:
        raise ValueError(f"{folder}: its golden input does not fit the model ({short(error)}).") from error
    difference = float((got - expected).abs().max()) if got.shape == expected.shape else float("inf")
    if not (math.isfinite(difference) and difference <= GOLDEN_TOLERANCE * max(1.0, float(expected.abs().max()))):
        raise ValueError(
            f"{folder} fails its golden check: the stored input gives outputs that differ by {difference:.2g} from the "
            f"stored ones (allowed {GOLDEN_TOLERANCE:g}); weights and code do not belong together."
        )
    return difference


def _stated_hashes(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    # Only the names of a model folder's files, whole sets of shards, and hashes that are hashes.
    stated = config.get("sha256")
    if not isinstance(stated, dict) or not all(re.fullmatch("[0-9a-f]{64}", str(digest)) for digest in stated.values()):
        raise ValueError(f"{folder / CONFIG}: sha256 must give the sha256 of every file.")
    shards = [name for name in stated if SHARD.fullmatch(name)]
    weights = {f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)} or {WEIGHTS}
    if ADAPTER_CONFIG in stated:
        weights = {ADAPTER_CONFIG, ADAPTER_WEIGHTS}
    needed = {CONFIG, *JSON_FILES, GOLDEN, *weights}
    allowed = needed | {EVALUATION, FEATURES} | ({WEIGHTS_INDEX} if shards else set())
    missing, unexpected = sorted(needed - stated.keys()), sorted(stated.keys() - allowed)
    if missing or unexpected or len(shards) > MAX_SHARDS:
        raise ValueError(
            f"{folder / CONFIG}: sha256 must name the files of a model folder; missing {few(missing)}, unexpected "
            f"{few(unexpected)}. Get the model folder again."
        )
    return dict(stated)


def check_hash(folder: Path, name: str, digest: str, max_bytes: int | None) -> None:
    """Refuse a file that is missing, leads out, is over `max_bytes` or was changed. Raises as `read_settings`."""
    path = inside(folder, name)
    if not path.is_file():
        raise FileNotFoundError(f"{folder} lacks {name}; the model folder is incomplete: get it again.")
    if max_bytes is not None and (size := path.stat().st_size) > max_bytes:  # to hash it would take hours
        raise ValueError(
            f"{path} has {size:,} bytes, and such a file of this model at most {max_bytes:,}; they do not belong "
            "together: get the model folder again."
        )
    if sha256(path) != digest:
        raise ValueError(
            f"{path} does not have the sha256 stated in {CONFIG}: the file is truncated or was changed. "
            "Get the model folder again."
        )


def tensor_header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of each tensor; the library refuses ranges that overlap, leave gaps or lead out of the file."""
    with open(path, "rb") as start:
        if (length := int.from_bytes(start.read(8), "little")) > MAX_HEADER_BYTES:
            raise ValueError(f"{path} has a header of {length:,} bytes; at most {MAX_HEADER_BYTES:,} are read.")
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({short(error)}).") from error


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


def _from_version_1(config: dict[str, Any], files: JsonFiles) -> tuple[dict[str, Any], JsonFiles]:
    # Labels of its conditioning=reference were learned rows.
    none = {"perturbation_features": 0, "doses": 0, "cell_type_features": 0, "covariates": 0}
    denoiser = _with_new(config["denoiser"], {"cell_type_encoding": "onehot", "published_encoding": none})
    return {**config, "format_version": 2, "denoiser": denoiser}, files


def _from_version_2(config: dict[str, Any], files: JsonFiles) -> tuple[dict[str, Any], JsonFiles]:
    # Perturbations had rows only, and a combination was the sum of its parts.
    new: JsonFiles = {
        "denoiser": {"interaction": False, "control_weight": 1.0, "mean_effect": False},
        "diffusion": {
            "unbiased": False, "mean_weight": 0.0, "whole_counts": False, "p_drop_perturbation": None,
            "p_unlabelled": 0.0,
        },
        "sampling": {"whole_counts": False},
    }  # fmt: skip
    config = {**config, "format_version": 3, **{name: _with_new(config[name], keys) for name, keys in new.items()}}
    tables: dict[str, Any] = {"dose_separator": None, "n_described": 0, "tables": []}
    return config, {**files, "perturbations.json": _with_new(files["perturbations.json"], tables)}


def _from_version_3(config: dict[str, Any], files: JsonFiles) -> tuple[dict[str, Any], JsonFiles]:
    # Values that no recipe used went, and with them the settings that had no other left.
    denoiser, diffusion = {**config["denoiser"]}, {**config["diffusion"]}
    for key, value, known in (
        ("denoiser.attention", denoiser.pop("attention"), ("paired",)),
        ("denoiser.out_activation", denoiser["out_activation"], ("relu", "none")),
        ("diffusion.kernel", diffusion.pop("kernel"), ("energy",)),
        ("diffusion.mean_weight", diffusion.pop("mean_weight"), (0.0,)),
    ):
        if value not in known:
            raise ValueError(
                f"{key} ({few([str(value)])}) is no longer known, only {' and '.join(map(str, known))}; train the "
                f"model anew, or use the perturbdiff that wrote it ({few([str(config['library_version'])])})."
            )
    diffusion = _with_new(diffusion, {"p_features_only": diffusion.pop("p_unlabelled")})
    return {**config, "format_version": 4, "denoiser": denoiser, "diffusion": diffusion}, files


def _with_new(content: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    if there := sorted(content.keys() & new.keys()):
        raise KeyError(f"{few(there)} came later")
    return {**content, **new}


JsonFiles = dict[str, dict[str, Any]]
_MIGRATIONS: dict[int, Callable[[dict[str, Any], JsonFiles], tuple[dict[str, Any], JsonFiles]]] = {
    1: _from_version_1,
    2: _from_version_2,
    3: _from_version_3,
}


def _golden_forward(denoiser: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    doses = torch.zeros(inputs["perturbation"].shape)  # 1, of whatever unit
    labels = Labels(inputs["perturbation"], inputs["cell_type"], inputs["batch"], dose=doses)
    with torch.inference_mode():
        return denoiser(inputs["x_t"], inputs["t"], inputs["control"], labels, inputs["self_cond"], inputs["mask"])


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
