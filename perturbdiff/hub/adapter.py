"""Adapters: what a LoRA fine-tuning changed of a checkpoint, in the files of the peft library.

An adapter is a model folder (README) in which adapter_config.json and adapter_model.safetensors stand in place of
weights: the low-rank changes of the blocks, and whole (`modules_to_save`) what else was trained. The other files are
those of the model that it makes; training.json names the base. As all model folders, adapters are untrusted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from perturbdiff.cards import plain
from perturbdiff.files import few, short
from perturbdiff.hub.card import write_card
from perturbdiff.hub.download import ModelSource
from perturbdiff.hub.metadata import ModelMetadata, parse_metadata
from perturbdiff.hub.model_folder import ADAPTER_CONFIG, GOLDEN, ModelFolder, read_folder
from perturbdiff.hub.tensors import denoiser_of, max_tensor_bytes, read_tensors, write_model_folder
from perturbdiff.hub_client import REPO_ID
from perturbdiff.nn.denoiser import Denoiser
from perturbdiff.nn.lora import BACKBONE, A, B, changed_layers, low_rank, merged

MAX_RANK = 1 << 12
# Of LoraConfig (peft 0.21): what is read or changes nothing once trained; what is off without being empty.
READ = {
    "peft_type", "r", "lora_alpha", "target_modules", "modules_to_save", "auto_mapping", "base_model_name_or_path",
    "inference_mode", "lora_dropout", "peft_version", "revision", "task_type",
}  # fmt: skip
OFF = {"bias": "none", "init_lora_weights": True, "megatron_core": "megatron.core", "qalora_group_size": 16}


@dataclass(frozen=True)
class Base:
    """The checkpoint that something was trained from.

    revision
        The commit of a repo; None for a folder.
    sha256
        Of its config.json, which states every other file's: its identity.
    """

    name: str
    revision: str | None
    sha256: str

    def __str__(self) -> str:
        return self.name + (f" at {self.revision}" if self.revision else "") + f" (sha256 {self.sha256[:12]})"


@dataclass(frozen=True)
class Adapter:
    """The content of an adapter, checked.

    scaling
        Of the low-rank changes, lora_alpha / r.
    weights
        As `perturbdiff.nn.lora.merged` takes them, without the backbone.
    """

    base: Base
    scaling: float
    weights: Mapping[str, Tensor]

    @property
    def base_on_hub(self) -> str:
        """owner/name@COMMIT of the base. Raises FileNotFoundError where it was a folder."""
        if self.base.revision is None or not REPO_ID.fullmatch(self.base.name):
            raise FileNotFoundError(
                f"the base {self.base} of this adapter was a folder; say where it is (from_pretrained(..., base=), or "
                "`perturbdiff hub merge --base`)."
            )
        return f"{self.base.name}@{self.base.revision}"

    def check_base(self, source: ModelSource) -> ModelSource:
        """A model that was found, to be loaded as this one only. Raises ValueError where it is not the base."""
        files = read_folder(source.folder)
        if files.sha256 != self.base.sha256:
            found = Base(source.name, source.commit, files.sha256)
            raise ValueError(
                f"the adapter was trained on {self.base}, and {source.folder} is another model, {found}; give its own "
                "base."
            )
        if files.is_adapter:
            raise ValueError(f"the base {self.base} is an adapter itself, and adapters are of whole models.")
        return replace(source, sha256=self.base.sha256)

    def merge(self, denoiser: Denoiser, base: Mapping[str, Tensor]) -> None:
        """Fill a denoiser on the meta device: W + scaling B A. Raises ValueError where `base` does not fit."""
        backbone = {name: tensor for name, tensor in base.items() if name.startswith(BACKBONE)}
        try:
            denoiser.load_state_dict(merged({**backbone, **self.weights}, self.scaling), assign=True)
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"the adapter does not fit its base {self.base} ({short(error)}).") from error


def save_adapter(folder: str | Path, model: str | Path, weights: Mapping[str, Tensor], scaling: float) -> None:
    """Write an adapter whole or not at all; replaces an older one of that name.

    Parameters
    ----------
    model
        Folder of the merged model.
    weights
        All tensors of the denoiser, those of its blocks under peft's names (`perturbdiff.nn.lora`).
    scaling
        Of the low-rank changes: alpha / rank.

    Raises
    ------
    FileExistsError, OSError
        `folder` exists and is no adapter; it could not be written.
    """
    metadata = parse_metadata(read_folder(model))
    base = _base(Path(model), metadata)
    ranks = {layer: a.shape[0] for layer, a, _ in low_rank(weights)}
    rank = max(ranks.values())  # all are the same
    change = {n: tensor for n, tensor in weights.items() if n.endswith((A, B)) or not n.startswith(BACKBONE)}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base.name,
        "revision": base.revision,
        "r": rank,
        "lora_alpha": scaling * rank,
        "target_modules": list(ranks),
        "modules_to_save": _modules(weights),
        "inference_mode": True,
    }
    tensors = {_in_file(name): tensor for name, tensor in change.items()}
    n_parameters = sum(tensor.numel() for name, tensor in weights.items() if not name.endswith((A, B)))
    card = write_card(metadata, n_parameters, is_adapter=True)
    write_model_folder(folder, metadata, tensors, load((Path(model) / GOLDEN).read_bytes()), card, adapter=config)


def read_adapter(folder: ModelFolder, metadata: ModelMetadata, shapes: Denoiser) -> Adapter:
    """The content of an adapter; `shapes` is its denoiser on the meta device.

    Raises
    ------
    ValueError
        training.json names no base; adapter_config.json asks for anything but LoRA of layers of the blocks; tensors are
        missing, unexpected, of another shape or of another type than float.
    """
    config, state = folder.json[ADAPTER_CONFIG], shapes.state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in state.items() if not name.startswith(BACKBONE)}
    rank, alpha, layers = _checked(folder.path / ADAPTER_CONFIG, config, changed_layers(shapes), _modules(state))
    for layer in layers:
        n_out, n_in = state[f"{layer}.weight"].shape
        expected |= {layer + A: (rank, n_in), layer + B: (n_out, rank)}
    names = {_in_file(name): shape for name, shape in expected.items()}
    tensors = read_tensors(folder, names, max_tensor_bytes(shapes))
    weights = {name: tensors[_in_file(name)] for name in expected}
    return Adapter(_base(folder.path, metadata), alpha / rank, weights)


def check_adapter(folder: str | Path) -> None:
    """All of an adapter but its merging, which needs the base. Raises as `read_folder` and `read_adapter`."""
    content = read_folder(folder)
    metadata = parse_metadata(content)
    read_adapter(content, metadata, denoiser_of(metadata))


def extended_base(folder: str | Path, base: Denoiser) -> Denoiser:
    """The base for an adapter's genes and labels: what `peft.PeftModel.from_pretrained` takes with this folder.

    Its rows of genes and labels are zeros: peft puts those of the adapter there.
    """
    denoiser = denoiser_of(parse_metadata(read_folder(folder)))
    zeros = {name: torch.zeros(tensor.shape) for name, tensor in denoiser.state_dict().items()}
    backbone = {name: tensor for name, tensor in base.state_dict().items() if name.startswith(BACKBONE)}
    denoiser.load_state_dict({**zeros, **backbone}, assign=True)
    return denoiser.eval()


def _checked(path: Path, config: dict[str, Any], layers: list[str], modules: list[str]) -> tuple[int, float, list[str]]:
    # Rank, alpha and changed layers, of a LoRA that is nothing more.
    rank, alpha, targets = config.get("r"), config.get("lora_alpha"), config.get("target_modules")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {few([str(config.get('peft_type'))])}; only LORA is read.")
    more = {key: value for key, value in config.items() if value and key not in READ and value != OFF.get(key)}
    if on := [f"{key}={value}" for key, value in more.items()]:
        raise ValueError(f"{path} asks for {few(on)}; only W + lora_alpha / r B A is read.")
    if type(rank) is not int or not 0 < rank <= MAX_RANK:
        raise ValueError(f"{path}: r ({few([str(rank)])}) must be 1 to {MAX_RANK}.")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or alpha <= 0:
        raise ValueError(f"{path}: lora_alpha ({few([str(alpha)])}) must be greater than 0.")
    if not isinstance(targets, list) or not 0 < len(targets) <= len(layers):
        raise ValueError(f"{path}: target_modules must list layers of the blocks, as {few(layers)}.")
    suffixes = tuple(f".{target}" for target in targets)  # peft takes the last parts of a name for the whole
    if unknown := [suffix[1:] for suffix in suffixes if not any(f".{layer}".endswith(suffix) for layer in layers)]:
        raise ValueError(f"{path}: target_modules names {few(unknown)}; there are {few(layers)}.")
    if not isinstance(saved := config.get("modules_to_save"), list) or sorted(map(str, saved)) != modules:
        raise ValueError(f"{path}: modules_to_save must be {', '.join(modules)}.")
    return rank, alpha, [layer for layer in layers if f".{layer}".endswith(suffixes)]


def _base(folder: Path, metadata: ModelMetadata) -> Base:
    start = metadata.training.init_from
    if start is None or re.fullmatch("([0-9a-f]{40})? [0-9a-f]{64}", f"{start.revision or ''} {start.sha256}") is None:
        raise ValueError(f"{folder}: init_from in training.json must give name, revision and sha256 of the base.")
    return Base(plain(start.name, 200), start.revision or None, start.sha256)


def _modules(weights: Mapping[str, Tensor]) -> list[str]:
    return sorted({name.split(".")[0] for name in weights if not name.startswith(BACKBONE)})


def _in_file(name: str) -> str:
    """blocks.0.mlp.fc1.lora_A.default.weight -> base_model.model.blocks.0.mlp.fc1.lora_A.weight."""
    return "base_model.model." + name.replace(".default.", ".")
