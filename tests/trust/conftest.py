"""A tiny model, a server, and a reader with limits."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from perturbdiff.config import DenoiserConfig, DiffusionConfig, ModelConfig, ObsColumns, Preprocessing, SamplingConfig
from perturbdiff.data.vocab import GeneVocab, LabelVocab, Vocabularies
from perturbdiff.hub.records import TrainingRecord
from perturbdiff.model import PerturbDiff
from perturbdiff.nn.denoiser import build_denoiser
from tests.localhub.server import LocalHub
from tests.trust.attacks import Reader


@pytest.fixture(scope="module")
def server() -> Iterator[LocalHub]:
    with LocalHub() as hub:
        yield hub


@pytest.fixture
def hub(server: LocalHub) -> LocalHub:
    server.log.clear()
    server.faults.clear()
    server.models.clear()
    return server


@pytest.fixture(scope="module")
def reader(server: LocalHub, saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    reader = Reader(server.url, tmp_path_factory.mktemp("home"), saved)
    yield reader
    reader.close()


@pytest.fixture(scope="module")
def model() -> PerturbDiff:
    genes = GeneVocab(tuple(f"GENE{i}" for i in range(12)))
    labels = {"perturbation": ("A", "B", "C"), "cell_type": ("T", "B"), "batch": ("x", "y")}
    vocabularies = Vocabularies(*(LabelVocab(kind, names) for kind, names in labels.items()), "+")
    denoiser = DenoiserConfig(width=8, depth=2, n_heads=2)
    config = ModelConfig(denoiser, DiffusionConfig(), SamplingConfig(n_steps=2), ObsColumns(), set_size=4)
    preprocessing = Preprocessing("counts", 1e4, 10.0)
    torch.manual_seed(0)
    network = build_denoiser(denoiser, len(genes), vocabularies)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return PerturbDiff(network, genes, vocabularies, preprocessing, config, TrainingRecord(steps=1))


@pytest.fixture(scope="module")
def saved(model: PerturbDiff, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def cut(model: PerturbDiff, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cut") / "model"
    model.save_pretrained(path, max_shard_size="10KB")
    return path


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "model")


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not to wait, after each of many refusals, for a folder that may be in the middle of being replaced."""
    monkeypatch.setattr("perturbdiff.model.READ_AGAIN", 1)
    monkeypatch.setattr("perturbdiff.hub.download.READ_AGAIN", 1)
    monkeypatch.setattr("perturbdiff.hub.download.time.sleep", lambda seconds: None)
