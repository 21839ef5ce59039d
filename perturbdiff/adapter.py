"""Adapters: what a LoRA fine-tuning changed of a checkpoint, in a folder of its own; saved, pushed, loaded, merged.

A folder holds the JSON files of the model it makes (README, "Model folder"), whose config.json also names the base by
the sha256 of its config.json, and adapter.safetensors: the low-rank changes of the blocks, and whole what else was
trained. As model folders, adapters are untrusted: JSON and safetensors only, every size and hash checked first.
"""

from __future__ import annotations

import math
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from perturbdiff.cards import front_text, plain
from perturbdiff.files import few, inside, read_json, sha256, short, write_json
from perturbdiff.hub.download import ModelSource, find_model, max_tensor_bytes
from perturbdiff.hub.model_folder import (
    CARD,
    CONFIG,
    FLOATS,
    FORMAT_VERSION,
    GOLDEN,
    JSON_FILES,
    MAX_JSON_BYTES,
    Settings,
    check_golden,
    check_hash,
    check_tensor_files,
    config_hash,
    read_settings,
    replace_folder,
    tensor_header,
)
from perturbdiff.hub.push import Publication, publish
from perturbdiff.hub.settings import CLASS, ModelSettings, parse_settings
from perturbdiff.hub_client import REPO_ID, name_and_revision
from perturbdiff.model import PerturbDiff
from perturbdiff.nn.denoiser import Denoiser
from perturbdiff.nn.lora import BACKBONE, changed_layers, low_rank

ADAPTER_CLASS = "PerturbDiffAdapter"
WEIGHTS = "adapter.safetensors"
OWN_FILES = re.compile(r"adapter\.safetensors|model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|evaluation\.json")
MAX_RANK = 1 << 12


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
class AdapterSettings:
    """The JSON files of an adapter, checked: the model that it makes, of which base, and how."""

    model: ModelSettings
    base: Base
    rank: int
    scaling: float
    files: Settings  # hashes of the files of tensors

    def expected(self, shapes: Denoiser) -> dict[str, tuple[int, ...]]:
        """Names and shapes of its tensors; `shapes` is the model on the meta device."""
        state = shapes.state_dict()
        whole = {name: tuple(t.shape) for name, t in state.items() if not name.startswith(BACKBONE)}
        changes: dict[str, tuple[int, ...]] = {}
        for layer in changed_layers(shapes):
            n_out, n_in = state[f"{layer}.weight"].shape
            changes |= {f"lora.{layer}.A": (self.rank, n_in), f"lora.{layer}.B": (n_out, self.rank)}
        return {**whole, **changes}


def save_adapter(
    folder: str | Path, model: str | Path, weights: Mapping[str, Tensor], base: Base, scaling: float
) -> None:
    """Write an adapter whole or not at all; replaces an older one of that name.

    Parameters
    ----------
    model
        Folder of the merged model.
    weights
        All tensors of the denoiser, those of its blocks under peft's names (`model.lora`).
    scaling
        Of the low-rank changes: alpha / rank.

    Raises
    ------
    FileExistsError, OSError
        `folder` exists and is no adapter; it could not be written.
    """
    folder = Path(folder)
    if folder.exists() and not is_adapter(folder):
        raise FileExistsError(f"{folder} exists and is not an adapter; choose another name or remove it.")
    changes = {layer: (a, b) for layer, a, b in low_rank(weights)}
    tensors = {f"lora.{layer}.{part}": t for layer, pair in changes.items() for part, t in zip("AB", pair, strict=True)}
    tensors |= {name: t for name, t in weights.items() if not name.startswith(BACKBONE)}
    rank = next(iter(changes.values()))[0].shape[0]
    merged = read_settings(model)
    config = {**merged.config, "class": ADAPTER_CLASS, "base": asdict(base), "lora": {"rank": rank, "scaling": scaling}}
    del config["sha256"]
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name in JSON_FILES:
            write_json(temporary / name, merged.json[name])
        (temporary / GOLDEN).parent.mkdir()
        shutil.copy(Path(model) / GOLDEN, temporary / GOLDEN)
        save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, temporary / WEIGHTS)
        (temporary / WEIGHTS).chmod((temporary / JSON_FILES[0]).stat().st_mode)  # it comes private to its writer
        hashes = {name: sha256(temporary / name) for name in (*JSON_FILES, WEIGHTS, GOLDEN)}
        write_json(temporary / CONFIG, {**config, "sha256": {CONFIG: config_hash(config), **hashes}})
        (temporary / CARD).write_text(_card(base), encoding="utf-8")
        temporary.chmod(0o755)
        replace_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder says that it is one."""
    path = Path(folder) / CONFIG
    return path.is_file() and read_json(inside(Path(folder), CONFIG), MAX_JSON_BYTES).get("class") == ADAPTER_CLASS


def load_adapter(path_or_repo_id: str | Path, base: str | Path | None = None, device: str = "cpu") -> PerturbDiff:
    """The model that an adapter makes of its base: low-rank changes added, the rest replaced; golden output checked.

    Parameters
    ----------
    path_or_repo_id
        A folder, or owner/name[@REVISION] on the Hub.
    base
        Where the base is: a folder, a name or owner/name[@REVISION]. By default where the adapter says, on the Hub.

    Raises
    ------
    FileNotFoundError, OSError
        There is no such adapter or base.
    ValueError
        A file was truncated or changed or does not fit; the base is another model than the adapter was trained on.
    """
    source = find_model(path_or_repo_id)
    said = read_adapter(source.folder)
    tensors = _tensors(source, said)
    where = str(base) if base is not None else _where(said.base)
    found = find_model(where)
    files = read_settings(found.folder)
    if files.sha256 != said.base.sha256:
        raise ValueError(
            f"adapter {source.name} was trained on {said.base}, and {where} is another model, "
            f"{Base(found.name, found.commit, files.sha256)}; give its own base."
        )
    name, revision = name_and_revision(where)
    backbone = PerturbDiff.from_pretrained(name, found.commit or revision, device="cpu").denoiser.state_dict()
    denoiser = said.model.shapes()
    merged = {name: backbone[name] for name in denoiser.state_dict() if name.startswith(BACKBONE) and name in backbone}
    for layer in changed_layers(denoiser):
        change = said.scaling * (tensors.pop(f"lora.{layer}.B") @ tensors.pop(f"lora.{layer}.A"))
        merged[f"{layer}.weight"] = merged[f"{layer}.weight"] + change
    try:
        denoiser.load_state_dict({**merged, **tensors}, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(f"adapter {source.name} does not fit its base {said.base} ({short(error)}).") from error
    check_golden(source.folder, denoiser.eval())
    denoiser.to(device)
    return PerturbDiff(denoiser, **vars(said.model), name=source.name)


def push_adapter(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    commit_message: str | None = None,
    token: str | bool | None = None,
) -> Publication:
    """Push an adapter as one commit, pull that back, verify every hash, tag last. Raises as `publish`."""
    folder = Path(folder)
    said = read_adapter(folder)
    return publish(
        folder,
        [CONFIG, *JSON_FILES, WEIGHTS, GOLDEN, CARD],
        repo_id,
        "model",
        own_files=OWN_FILES,
        check=lambda back: _tensors(ModelSource(repo_id, back), said),
        pull_back=lambda path: True,
        private=private,
        revision=revision,
        tag=tag,
        commit_message=commit_message,
        token=token,
    )


def read_adapter(folder: str | Path) -> AdapterSettings:
    """The JSON files of an adapter; its tensors are not looked at.

    Raises
    ------
    FileNotFoundError, ValueError
        No adapter; a file is missing, leads out of the folder or does not have the hash that config.json states; a key
        is missing or unknown, a value cannot be.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} is not an adapter: it has no {CONFIG}.")
    config = read_json(inside(folder, CONFIG), MAX_JSON_BYTES)
    if config.get("class") != ADAPTER_CLASS:
        raise ValueError(
            f"{folder} is of class {few([str(config.get('class'))])}, not an adapter ({ADAPTER_CLASS}); model folders "
            "are opened by PerturbDiff.from_pretrained."
        )
    if config.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{folder} has format_version {few([str(config.get('format_version'))])}; this version of perturbdiff "
            f"reads adapters of {FORMAT_VERSION}."
        )
    stated, needed = config.get("sha256"), {CONFIG, *JSON_FILES, WEIGHTS, GOLDEN}
    if not isinstance(stated, dict) or stated.keys() != needed:
        raise ValueError(f"{folder / CONFIG}: sha256 must name the files of an adapter, {few(sorted(needed))}.")
    if not all(re.fullmatch("[0-9a-f]{64}", str(digest)) for digest in stated.values()):
        raise ValueError(f"{folder / CONFIG}: sha256 must give the sha256 of every file.")
    if config_hash(config) != stated[CONFIG]:
        raise ValueError(f"{folder / CONFIG} does not have the sha256 that it states: it was changed. Get it again.")
    for name in JSON_FILES:
        check_hash(folder, name, stated[name], MAX_JSON_BYTES)
    base, rank, scaling = _base(folder, config.pop("base", None)), *_lora(folder, config.pop("lora", None))
    json_files = {name: read_json(folder / name, MAX_JSON_BYTES) for name in JSON_FILES}
    tensor_files = {name: stated[name] for name in (WEIGHTS, GOLDEN)}
    files = Settings({**config, "class": CLASS}, json_files, tensor_files, sha256(folder / CONFIG))
    return AdapterSettings(parse_settings(folder, files), base, rank, scaling, files)


def _tensors(source: ModelSource, said: AdapterSettings) -> dict[str, Tensor]:
    """Its tensors, float32; names, shapes and sizes are compared before anything is read."""
    folder, shapes = source.folder, said.model.shapes()
    expected = said.expected(shapes)
    max_bytes = max_tensor_bytes(shapes) + 8 * sum(map(math.prod, expected.values()))
    source.fetch_tensors(said.files, max_bytes)
    check_tensor_files(folder, said.files, max_bytes)
    found = tensor_header(folder / WEIGHTS)
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    wrong = [f"{name} {found[name]}" for name in expected.keys() & found.keys() if found[name][0] != expected[name]]
    wrong += [f"{name} of type {dtype}" for name, (_, dtype) in found.items() if dtype not in FLOATS]
    if missing or unexpected or wrong:
        raise ValueError(
            f"{folder / WEIGHTS} does not fit its {CONFIG}: missing {few(missing)}; unexpected {few(unexpected)}; of "
            f"another shape or type {few(wrong)}."
        )
    return {name: tensor.to(torch.float32) for name, tensor in load_file(folder / WEIGHTS).items()}


def _base(folder: Path, said: Any) -> Base:
    texts = isinstance(said, dict) and said.keys() == {"name", "revision", "sha256"}
    if (
        not texts
        or not isinstance(said["name"], str)
        or not isinstance(said["revision"], str | None)
        or re.fullmatch("[0-9a-f]{64}", str(said["sha256"])) is None
    ):
        raise ValueError(f"{folder / CONFIG}: base must give name, revision and sha256 of the model it was trained on.")
    return Base(plain(said["name"]), said["revision"], said["sha256"])


def _lora(folder: Path, said: Any) -> tuple[int, float]:
    if isinstance(said, dict) and said.keys() == {"rank", "scaling"}:
        rank, scaling = said["rank"], said["scaling"]
        if type(rank) is int and 0 < rank <= MAX_RANK and type(scaling) in (int, float) and 0 < scaling < math.inf:
            return rank, float(scaling)
    raise ValueError(f"{folder / CONFIG}: lora must give a rank of 1 to {MAX_RANK} and a scaling greater than 0.")


def _where(base: Base) -> str:
    if base.revision is None or not REPO_ID.fullmatch(base.name):
        raise FileNotFoundError(f"the base {base} of this adapter was a folder; say where it is (base=, --base).")
    return f"{base.name}@{base.revision}"


def _card(base: Base) -> str:
    on_hub = base.revision is not None and REPO_ID.fullmatch(base.name) is not None
    named = [f"base_model: {front_text(base.name)}", "base_model_relation: adapter"] if on_hub else []
    front = "\n".join(["---", "library_name: perturbdiff", *named, "tags: [perturbdiff, lora]", "---"])
    return (
        f"{front}\n\n# Adapter\n\nLow-rank changes (LoRA) and newly trained layers of a PerturbDiff model; of no use "
        f"without its base, {plain(base.name)} with config.json of sha256 {base.sha256}.\n\n"
        "```bash\nperturbdiff hub merge ADAPTER --base BASE --out MODEL\n```\n"
    )
