"""What is attacked: the files of each reader, how one input changes them, and how they are read."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import pickle
import pickletools
import re
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import anndata
import numpy as np
import torch
import yaml
from markdown_it import MarkdownIt
from safetensors.numpy import save_file

from perturbdiff.atlas.card import atlas_card
from perturbdiff.atlas.format import CHECKSUMS, CONDITIONS, GENES, MANIFEST, AtlasInfo, read_info, shard_name
from perturbdiff.atlas.store import Atlas
from perturbdiff.config import DataConfig, ObsColumns, SplitConfig, load_config
from perturbdiff.data.h5ad import read_h5ad_parts
from perturbdiff.data.screen import Screen, control_cells
from perturbdiff.data.split_files import read_split_file
from perturbdiff.data.splits import make_split, read_split, write_split
from perturbdiff.evaluation import report
from perturbdiff.features.tables import FeatureTable, read_table, write_table
from perturbdiff.hub.adapter import check_adapter
from perturbdiff.hub.card import check_card, write_card
from perturbdiff.hub.download import find_model
from perturbdiff.hub.info import model_info, model_summary
from perturbdiff.hub.metadata import parse_metadata
from perturbdiff.hub.model_folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG,
    EVALUATION,
    GOLDEN,
    JSON_FILES,
    WEIGHTS,
    ModelFolder,
    config_hash,
    read_folder,
)
from perturbdiff.hub.records import StartRecord
from perturbdiff.hub.registry import read_registry
from perturbdiff.hub.tensors import check_golden, denoiser_of, load_weights
from perturbdiff.inference.requests import read_requests
from perturbdiff.model import PerturbDiff
from perturbdiff.nn.denoiser import Denoiser
from perturbdiff.nn.lora import BACKBONE, changed_layers
from tests.atlases import write_atlas
from tests.attack.mutate import VALUES, changed_bytes, changed_json, changed_text
from tests.reference.test_convert import write_checkpoint
from tests.simulated import write_screen
from tests.untrained import untrained

Files = dict[str, bytes]
HDF5 = rb"TREE|SNOD|HEAP|GCOL|\x89HDF|\x01\x00.\x00\x01\x00\x00\x00"
MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable("table")
MARKDOWN.validateLink = lambda url: True  # type: ignore[method-assign]


@dataclass(frozen=True)
class Reader:
    """
    write
        Makes the files of an empty folder.
    change
        The files of one input, changed; others stay.
    read
        Reads the folder, given what the changed files were before; AssertionError where something wrong was accepted.
    """

    write: Callable[[Path], object]
    change: Callable[[Path, Random], Files]
    read: Callable[[Path, Random, Files], object]


def write_seeds(folder: Path, *names: str) -> None:
    """The files of each reader in a folder of its name."""
    for name in names or READERS:
        (folder / name).mkdir()
        READERS[name].write(folder / name)


def any_bytes(random: Random, content: bytes) -> bytes:
    """Of text: as JSON where it is such, as words, or as bytes."""
    kind = random.random()
    if kind < 0.6 and content[:1] == b"{":
        return changed_json(random, content.decode()).encode(errors="surrogatepass")
    if kind < 0.8:
        return changed_text(random, content.decode()).encode(errors="surrogatepass")
    return changed_bytes(random, content)


def one_of(pattern: str) -> Callable[[Path, Random], Files]:
    """One file of those that match, changed as text."""

    def change(folder: Path, random: Random) -> Files:
        file = random.choice(sorted(folder.rglob(pattern)))
        return {str(file.relative_to(folder)): any_bytes(random, file.read_bytes())}

    return change


def assert_printable(text: str) -> None:
    assert all(line.isprintable() for line in text.split("\n")), f"not printable: {text!r}"


# Model folders


def write_model(folder: Path) -> None:
    model = untrained()
    model.training = replace(model.training, init_from=StartRecord("owner/base", "a" * 40, "b" * 64, "lora"))
    evaluation = {
        "format_version": 1, "library_version": "0.1.0", "model": "PerturbDiff", "ceiling": "ceiling", "data": "s.h5ad",
        "split": None, "n_conditions": 3, "metrics": {"pearson_delta": "higher"},
        "mean": {"PerturbDiff": {"pearson_delta": 0.9}, "ceiling": {"pearson_delta": 0.95}},
        "n_undefined": {"PerturbDiff": {"pearson_delta": 0}, "ceiling": {"pearson_delta": 1}},
    }  # fmt: skip
    model.save_pretrained(folder / "model")
    (folder / "model" / EVALUATION).write_text(json.dumps(evaluation))
    config = json.loads((folder / "model" / CONFIG).read_text())
    config["sha256"][EVALUATION] = hashlib.sha256((folder / "model" / EVALUATION).read_bytes()).hexdigest()
    config["sha256"][CONFIG] = config_hash(config)
    (folder / "model" / CONFIG).write_text(json.dumps(config))


def forged(folder: Path, random: Random, files: Files) -> Files:
    """With hashes that agree, three times in four."""
    if random.random() < 0.25:
        return files
    text = files.get(f"model/{CONFIG}", (folder / "model" / CONFIG).read_bytes())
    try:
        config = json.loads(text)
        for name, content in files.items():
            if name != f"model/{CONFIG}":
                config["sha256"][name.removeprefix("model/")] = hashlib.sha256(content).hexdigest()
        config["sha256"][CONFIG] = config_hash(config)
        return {**files, f"model/{CONFIG}": json.dumps(config).encode()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):  # no forger can, either
        return files


def change_model_json(folder: Path, random: Random) -> Files:
    name = f"model/{random.choice((CONFIG, CONFIG, *JSON_FILES, EVALUATION))}"
    return forged(folder, random, {name: any_bytes(random, (folder / name).read_bytes())})


def read_model_json(folder: Path, random: Random, before: Files) -> None:
    source = find_model(folder / "model")
    text = model_info(source)
    assert_printable(text)
    assert_printable(model_summary(source.read()[1]))
    assert_unchanged_or_forged(folder, before)


def assert_unchanged_or_forged(folder: Path, before: Files) -> None:
    if f"model/{CONFIG}" in before:  # its hash is that of what it says
        return
    assert all((folder / name).read_bytes() == content for name, content in before.items()), (
        "the hash is not the file's"
    )


def change_tensors(folder: Path, random: Random) -> Files:
    name = f"model/{random.choice((WEIGHTS, WEIGHTS, GOLDEN))}"
    return forged(folder, random, {name: changed_tensors(random, (folder / name).read_bytes())})


def changed_tensors(random: Random, content: bytes) -> bytes:
    """The header as JSON, its length, or any bytes."""
    length = int.from_bytes(content[:8], "little")
    if random.random() < 0.3:
        return changed_bytes(random, content)
    header = any_bytes(random, content[8 : 8 + length].rstrip())
    stated = len(header) if random.random() < 0.9 else random.choice((0, 1 << 23, (1 << 64) - 1, length + 1))
    return stated.to_bytes(8, "little") + header + content[8 + length :]


def read_tensors(folder: Path, random: Random, before: Files) -> None:
    if random.random() < 0.1:
        PerturbDiff._read(find_model(folder / "model"), golden_check=True)
    else:  # in half the time: only what the change is of
        denoiser = _denoiser(folder)
        content = read_folder(folder / "model")
        load_weights(content, denoiser)
        check_golden(content, denoiser.eval())
    assert_unchanged_or_forged(folder, before)


@cache
def _denoiser(folder: Path) -> Denoiser:
    return denoiser_of(parse_metadata(read_folder(folder / "model")))


def write_adapter(folder: Path) -> None:
    """A model folder made into that of an adapter: of one layer in each block."""
    write_model(folder)
    path = folder / "model"
    shapes = denoiser_of(parse_metadata(read_folder(path)))
    state = shapes.state_dict()
    tensors = {name: np.ones(of.shape, np.float32) for name, of in state.items() if not name.startswith(BACKBONE)}
    modules = sorted({name.split(".")[0] for name in tensors})
    for layer in (layer for layer in changed_layers(shapes) if layer.endswith(".mlp.fc1")):
        n_out, n_in = state[f"{layer}.weight"].shape
        tensors |= {f"{layer}.lora_A.weight": np.ones((2, n_in)), f"{layer}.lora_B.weight": np.ones((n_out, 2))}
    save_file({f"base_model.model.{name}": of for name, of in tensors.items()}, path / ADAPTER_WEIGHTS)
    config = {
        "peft_type": "LORA", "base_model_name_or_path": "owner/base", "revision": "a" * 40, "r": 2, "lora_alpha": 4,
        "target_modules": ["mlp.fc1"], "modules_to_save": modules, "inference_mode": True,
    }  # fmt: skip
    (path / ADAPTER_CONFIG).write_text(json.dumps(config))
    stated = json.loads((path / CONFIG).read_text())
    del stated["sha256"][WEIGHTS]
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        stated["sha256"][name] = hashlib.sha256((path / name).read_bytes()).hexdigest()
    stated["sha256"][CONFIG] = config_hash(stated)
    (path / CONFIG).write_text(json.dumps(stated))


def change_adapter(folder: Path, random: Random) -> Files:
    name = f"model/{random.choice((ADAPTER_CONFIG, ADAPTER_CONFIG, ADAPTER_WEIGHTS))}"
    change = changed_tensors if name.endswith(ADAPTER_WEIGHTS) else any_bytes
    return forged(folder, random, {name: change(random, (folder / name).read_bytes())})


def read_adapter(folder: Path, random: Random, before: Files) -> None:
    check_adapter(folder / "model")
    assert_unchanged_or_forged(folder, before)


# Published checkpoints: a pickle of which nothing is run, and tensors, in a zip archive


def write_published(folder: Path) -> None:
    shapes = {
        "pert_encoder.weight": (8, 16), "celltype_encoder.weight": (4, 16), "batch_encoder.weight": (3, 16),
        "transform.weight": (48, 48), "transform.bias": (48,),
    }  # fmt: skip
    write_checkpoint(folder / "published.ckpt", {name: torch.ones(shape) for name, shape in shapes.items()})


def change_published(folder: Path, random: Random) -> Files:
    content = (folder / "published.ckpt").read_bytes()
    if random.random() < 0.3:
        return {"published.ckpt": changed_bytes(random, content, near=b"PK")}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    name = random.choice(sorted(entries))
    if random.random() < 0.9:
        name = next(name for name in entries if name.endswith("data.pkl"))
        entries[name] = changed_pickle(random, entries[name])
    else:
        entries[name] = changed_bytes(random, entries[name])
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for name, entry in entries.items():
            archive.writestr(name, entry)
    return {"published.ckpt": written.getvalue()}


PICKLED = [pickle.dumps(value, 2)[2:-1] for value in VALUES]  # opcodes that put a value on the stack
PROGRAMS = (
    b"cos\nsystem\nU\x02id\x85R",
    b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R",
    b"(((" * 1000,
    b"2t" * 1000,
    *(bytes([code]) for code in b"(tRbQ.021"),
)


def changed_pickle(random: Random, program: bytes) -> bytes:
    """Opcodes removed, repeated, moved or replaced by others: most often a value by a value."""
    starts = [place for _, _, place in pickletools.genops(program)]
    codes = [program[start:end] for start, end in zip(starts, [*starts[1:], len(program)], strict=True)]
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        place = random.randrange(len(codes))
        match random.randrange(8):
            case 0:
                codes[place] = random.choice(PROGRAMS)
            case 1:
                del codes[place : place + random.choice((1, 2, 10))]
            case 2:
                codes[place:place] = codes[place : place + 10] * random.choice((1, 1, 100))
            case 3:
                codes[place] = random.choice(codes)
            case _:  # a text or a number, where one follows soon
                scalars = (i for i, code in enumerate(codes[place:], place) if code[:1] in b"XKMJG\x8a\x88\x89N")
                codes[next(scalars, place)] = random.choice(PICKLED)
    return b"".join(codes)


def read_published(folder: Path, random: Random, before: Files) -> None:
    model = PerturbDiff.from_reference(folder / "published.ckpt")
    model.save_pretrained(folder / "model")
    try:
        assert_printable(model_info(find_model(folder / "model")))
    finally:
        shutil.rmtree(folder / "model")


# Cards and reports: names of strangers in them are text


def hostile(random: Random, content: Any) -> Any:
    """JSON with each of its texts changed now and then."""
    if isinstance(content, dict):
        return {key: hostile(random, value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [hostile(random, value) for value in content]
    if isinstance(content, str) and random.random() < 0.4:
        return changed_text(random, content)[: random.choice((20, 200, 2000))]
    return content


def write_for_cards(folder: Path) -> None:
    write_model(folder)
    write_atlas(folder / "atlas")
    metadata = parse_metadata(read_folder(folder / "model"))
    settings = {"split": {"validation": ["B"]}, "training": {"seed": 7}, "features": {"esm": {"source": "a", "b": "c"}}}
    known = {"screen": "kang.h5ad", "license": "mit", "hold_out": ("A:T",), "library_version": "0.1.0"}
    training = asdict(replace(metadata.training, **known, settings=settings))  # type: ignore[arg-type]
    names = {name: json.loads((folder / "model" / name).read_text()) for name in JSON_FILES}
    (folder / "names.json").write_text(json.dumps({**names, "training.json": training}))


def change_names(folder: Path, random: Random) -> Files:
    return {"names.json": json.dumps(hostile(random, json.loads((folder / "names.json").read_text()))).encode()}


@cache
def _cards_of(folder: Path) -> tuple[ModelFolder, AtlasInfo]:
    return read_folder(folder / "model"), read_info(folder / "atlas")


def read_cards(folder: Path, random: Random, before: Files) -> None:
    names = json.loads((folder / "names.json").read_text())
    content, info = _cards_of(folder)
    metadata = parse_metadata(replace(content, json={**content.json, **names}))
    texts = hostile(random, [[source.name, source.file, source.license] for source in info.sources])
    sources = tuple(replace(s, name=n, file=f, license=of) for s, (n, f, of) in zip(info.sources, texts, strict=True))
    source = hostile(random, ["owner/name", "mit", "rule", "plain"])
    atlas = replace(info, sources=sources, license=source[1], genes_rule=source[2], normalisation=source[3])
    match random.randrange(3):
        case 0:
            card = write_card(metadata, 10, source[0])
        case 1:
            card = write_card(metadata, 10, is_adapter=True)
        case _:
            card = atlas_card(atlas)
    check_card(card)
    front, body = card[4:].split("\n---\n", 1)
    assert isinstance(yaml.safe_load(front), dict)
    assert all(line.isprintable() for line in card.splitlines()), "not printable"
    page = Page(MARKDOWN.render(body))
    assert not page.tags & {"script", "img", "svg", "iframe", "em", "blockquote", "hr", "input"}, page.tags
    assert all(link.startswith("https://") for link in page.links), page.links


class Page(HTMLParser):
    """Tags, links and attributes that a browser would find."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links |= {value or "" for name, value in attrs if name in ("href", "src")}


def write_run(folder: Path) -> None:
    run = folder / "run"
    (run / "model").mkdir(parents=True)
    (run / "config.yaml").write_text(
        "data: {screen: kang.h5ad, control_match: batch}\nsplit: {hold_out: ['A:T']}\ntraining: {seed: 1}\n"
    )
    (run / "scores.json").write_text(json.dumps({
        "format_version": 2, "model": "PerturbDiff", "ceiling": "ceiling", "n_conditions": 2, "data": "kang.h5ad",
        "metrics": {"mse": "lower", "pearson_delta": "higher"}, "verdict": "Better.", "notes": ["a note"],
        "mean": {"PerturbDiff": {"mse": 0.1, "pearson_delta": 0.9}, "ridge": {"mse": 0.2, "pearson_delta": None}},
        "n_undefined": {"PerturbDiff": {"mse": 0, "pearson_delta": 0}, "ridge": {"mse": 0, "pearson_delta": 2}},
        "interval": {"PerturbDiff": {"mse": [0.05, 0.2], "pearson_delta": None}}, "n_genes": 10, "n_left_out": 1,
        "kept_response": 0.9,
    }))  # fmt: skip
    (run / "scores.csv").write_text(
        "method,perturbation,cell_type,batch,mse,pearson_delta,n_pred,n_true\n"
        "PerturbDiff,A,T,b1,0.1,0.9,10,12\nridge,A,T,b1,0.2,,10,12\nPerturbDiff,B,T,b1,0.1,0.9,10,12\n"
    )  # fmt: skip
    (run / "split.json").write_text(json.dumps({
        "format_version": 1, "hold_out": ["A:T"], "n_cells": 3, "cells": {"validation": ["c1"], "test": ["c0"]},
        "conditions": {"test": [{"perturbation": "A", "cell_type": "T", "batch": "b1"}], "validation": [], "train": []},
    }))  # fmt: skip
    lines = [{"step": i, "loss": 1 / (i + 1), "lr": 1e-4, "val/energy_distance": 0.1} for i in range(5)]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    training = {
        "library_version": "0.1.0", "control_match": "batch", "steps": 3, "cells_seen": 100, "license": "mit",
        "screen": "kang.h5ad", "hold_out": ["A:T"], "atlases": [], "init_from": None, "settings": {"a": 1},
        "calibration": {"level": 0.9, "factor": 1.0, "floor": 0.1, "coverage": 0.9, "n_conditions": 2},
    }  # fmt: skip
    (run / "model" / "training.json").write_text(json.dumps(training))


def change_run(folder: Path, random: Random) -> Files:
    file = random.choice(sorted(path for path in (folder / "run").rglob("*") if path.is_file()))
    text = file.read_text()
    if file.suffix == ".jsonl":
        lines = text.splitlines()
        lines[random.randrange(len(lines))] = any_bytes(random, lines[0].encode()).decode(errors="replace")
        changed = "\n".join(lines).encode(errors="replace")
    else:
        changed = any_bytes(random, text.encode())
    return {str(file.relative_to(folder)): changed}


def read_run(folder: Path, random: Random, before: Files) -> None:
    out = folder / "report.html"
    with mock.patch.object(report, "find_spec", return_value=None):  # without figures, which take long
        report.write_report(folder / "run", out)
    text = out.read_text()
    out.unlink()
    page = Page(text)
    assert text.count("<script") == 1
    assert not page.tags & {"img", "svg", "iframe", "form"}, page.tags
    assert not {name for name in page.attributes if name.startswith("on")}, page.attributes
    assert page.links <= {report.PAPER, "data:,"}, page.links
    assert all(line.isprintable() for line in text.replace("\t", " ").split("\n")), "not printable"


# Registries, splits, recipes, requests


def write_registry(folder: Path) -> None:
    entry = {"repo": "owner/name", "revision": "v1", "sha256": "a" * 64, "recipe": "kang", "metrics": {"mse": 0.1}}
    (folder / "registry.yaml").write_text(
        yaml.safe_dump({"checkpoints": {"kang": entry, "other": {**entry, "metrics": {}}}})
    )


def read_a_registry(folder: Path, random: Random, before: Files) -> None:
    with mock.patch.dict(os.environ, PERTURBDIFF_REGISTRY=str(folder / "registry.yaml")):
        for entry in read_registry().values():
            assert_printable(f"{entry.name}{entry.repo}")


def write_splits(folder: Path) -> None:
    write_screen(folder)
    screen = Screen.read(folder / "screen.h5ad", DataConfig())
    write_split(make_split(screen, SplitConfig(hold_out=["pert_0:type_0"]), 0), screen, folder / "split.json")
    (folder / "split.toml").write_text(
        '[datasets]\nkang = "/data"\n[training]\nkang = "train"\n[zeroshot]\n"kang.T" = "test"\n'
        '[fewshot."kang.B"]\ntest = ["A", "B"]\nval = ["C"]\n'
    )  # fmt: skip
    (folder / "split.yaml").write_text("kang:\n  holdout_pert: {test: [A, B], val: [C]}\n  holdout_celltype: [T]\n")


def read_splits(folder: Path, random: Random, before: Files) -> None:
    for name in sorted(before):
        if name.endswith(".json") and random.random() < 0.5:
            read_split(folder / name, Screen.read(folder / "screen.h5ad", DataConfig()))
        else:
            for selectors in read_split_file(folder / name).values():
                assert all(isinstance(selector, str) for selector in selectors)


def change_split(folder: Path, random: Random) -> Files:
    files = one_of("split.*")(folder, random)
    for name in files:
        if name.endswith(".json") and random.random() < 0.7:  # with a hash that agrees
            try:
                content = json.loads(files[name])
                content.pop("sha256", None)
                digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
                files[name] = json.dumps({**content, "sha256": digest}).encode()
            except (ValueError, TypeError, AttributeError, RecursionError):
                pass
    return files


def write_recipe(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(
        "# a recipe\ndata: {screen: kang.h5ad, set_size: 16}\n"
        "denoiser: {width: 64, depth: 2, n_heads: 2}\noptim: {lr: 1e-4}\nsplit: {hold_out: ['A:T', 'batch=b1']}\n"
        "training: {n_steps: 10, trackers: []}\nout: run\n"
    )  # fmt: skip


def write_requests(folder: Path) -> None:
    with open(folder / "requests.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [["perturbation", "cell_type", "batch", "n_cells"], ["A", "T", "b1", "10"], ["B", "NK", "", "5"]]
        )


# Tables of features


def write_features(folder: Path) -> None:
    names, values = ("A", "B", "C"), np.arange(6, dtype=np.float32).reshape(3, 2)
    write_table(FeatureTable("t", names, values, {"kind": "embedding", "source": "here"}), folder / "t.parquet")
    (folder / "t.csv").write_text("name,f0,f1\nA,0,1\nB,2,3\nC,4,5\n")
    np.savez(folder / "t.npz", names=np.array(names), values=values)
    save_file({"values": values}, folder / "t.safetensors", metadata={"names": json.dumps(names)})


def change_features(folder: Path, random: Random) -> Files:
    name = random.choice(("t.csv", "t.npz", "t.safetensors", "t.parquet"))
    change = {".csv": any_bytes, ".safetensors": changed_tensors}.get(name[name.index(".") :], changed_bytes)
    return {name: change(random, (folder / name).read_bytes())}


def read_features(folder: Path, random: Random, before: Files) -> None:
    for name in before:
        table = read_table(folder / name)
        assert np.isfinite(table.values).all()


# Atlases


def change_atlas_json(folder: Path, random: Random) -> Files:
    name = f"atlas/{random.choice((MANIFEST, MANIFEST, CHECKSUMS))}"
    return sealed(folder, random, {name: any_bytes(random, (folder / name).read_bytes())})


def sealed(folder: Path, random: Random, files: Files) -> Files:
    content = json.loads((folder / "atlas" / CHECKSUMS).read_text())
    if random.random() < 0.2 or f"atlas/{CHECKSUMS}" in files:
        return files
    for name, of in files.items():
        content["files"][name.removeprefix("atlas/")] = {"sha256": hashlib.sha256(of).hexdigest(), "size": len(of)}
    return {**files, f"atlas/{CHECKSUMS}": json.dumps(content).encode()}


def change_parquet(folder: Path, random: Random) -> Files:
    name = f"atlas/{random.choice((GENES, CONDITIONS, shard_name(0)))}"
    content = (folder / name).read_bytes()
    footer = int.from_bytes(content[-8:-4], "little") + 8
    part = random.random()
    if part < 0.5:
        content = content[:-footer] + changed_bytes(random, content[-footer:])
    else:
        content = changed_bytes(random, content)
    return sealed(folder, random, {name: content})


def read_atlas(folder: Path, random: Random, before: Files) -> None:
    atlas = Atlas.open(folder / "atlas")
    atlas.verify()
    if f"atlas/{CHECKSUMS}" not in before:
        assert all((folder / name).read_bytes() == content for name, content in before.items()), (
            "the hash is not the file's"
        )


# HDF5


def write_hdf5(folder: Path) -> None:
    path = write_screen(folder)
    adata = anndata.read_h5ad(path)[:40].copy()
    adata.obs["note"] = ["a", "b"] * 20
    adata.obs["n"] = np.arange(40)
    adata.layers["log"] = adata.X.toarray()
    adata.write_h5ad(folder / "plain.h5ad")
    adata.write_h5ad(folder / "packed.h5ad", compression="gzip")
    path.unlink()


def change_hdf5(folder: Path, random: Random) -> Files:
    name = random.choice(("plain.h5ad", "packed.h5ad"))
    content = (folder / name).read_bytes()
    if random.random() < 0.3:
        return {name: changed_addresses(random, content)}
    return {name: changed_bytes(random, content, near=HDF5)}


def changed_addresses(random: Random, content: bytes) -> bytes:
    """Parts of the file that name others, or themselves: trees with circles, headers that go on in each other."""
    parts = {found.start() for found in re.finditer(HDF5, content)}
    numbers = np.lib.stride_tricks.sliding_window_view(np.frombuffer(content, np.uint8), 8) @ (256 ** np.arange(8.0))
    places = np.flatnonzero(np.isin(numbers, list(parts - {0})))
    changed = bytearray(content)
    for place in random.choices(places.tolist(), k=random.choice((1, 1, 2, 4))):
        changed[place : place + 8] = random.choice(sorted(parts)).to_bytes(8, "little")
    return bytes(changed)


def read_hdf5(folder: Path, random: Random, before: Files) -> None:
    for name in before or ("plain.h5ad", "packed.h5ad"):
        match random.randrange(3):
            case 0:
                read_h5ad_parts(folder / name, random.choice((None, "log")))
            case 1:
                control_cells(folder / name, ObsColumns(), None, None)
            case 2:
                assert_printable(Screen.read(folder / name, DataConfig()).summary().replace("\n", " "))


READERS = {
    "json": Reader(write_model, change_model_json, read_model_json),
    "tensors": Reader(write_model, change_tensors, read_tensors),
    "adapter": Reader(write_adapter, change_adapter, read_adapter),
    "published": Reader(write_published, change_published, read_published),
    "cards": Reader(write_for_cards, change_names, read_cards),
    "run": Reader(write_run, change_run, read_run),
    "registry": Reader(write_registry, one_of("registry.yaml"), read_a_registry),
    "splits": Reader(write_splits, change_split, read_splits),
    "recipe": Reader(write_recipe, one_of("recipe.yaml"), lambda f, r, b: load_config(f / "recipe.yaml")),
    "requests": Reader(write_requests, one_of("requests.csv"), lambda f, r, b: read_requests(f / "requests.csv")),
    "features": Reader(write_features, change_features, read_features),
    "atlas": Reader(lambda f: write_atlas(f / "atlas"), change_atlas_json, read_atlas),
    "parquet": Reader(lambda f: write_atlas(f / "atlas"), change_parquet, read_atlas),
    "hdf5": Reader(write_hdf5, change_hdf5, read_hdf5),
}
