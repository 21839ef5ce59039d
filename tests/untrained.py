"""A model with random weights, for what does not depend on training: it answers in milliseconds."""

from __future__ import annotations

import torch

from perturbdiff.config import DenoiserConfig, DiffusionConfig, ModelConfig, ObsColumns, Preprocessing, SamplingConfig
from perturbdiff.data.vocab import GeneVocab, LabelVocab, Vocabularies
from perturbdiff.hub.records import TrainingRecord
from perturbdiff.model import PerturbDiff
from perturbdiff.nn.denoiser import build_denoiser


def untrained(n_genes: int = 12, perturbations: tuple[str, ...] = ("A", "B"), std: float = 0.2) -> PerturbDiff:
    """Of the genes, cell types and batches of `screens.counts_screen`; sets of four cells, two sampling steps."""
    genes = GeneVocab(tuple(f"gene_{i}" for i in range(n_genes)))
    labels = {"perturbation": perturbations, "cell_type": ("NK", "T"), "batch": ("b1", "b2")}
    vocabularies = Vocabularies(*(LabelVocab(kind, names) for kind, names in labels.items()), "+")
    denoiser = DenoiserConfig(width=8, depth=1, n_heads=2)
    config = ModelConfig(denoiser, DiffusionConfig(), SamplingConfig(n_steps=2), ObsColumns(), set_size=4)
    network = build_denoiser(denoiser, n_genes, vocabularies).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=std, generator=generator)
    preprocessing = Preprocessing("counts", 1e4, 10.0)
    return PerturbDiff(network, genes, vocabularies, preprocessing, config, TrainingRecord(steps=0))
