"""CPU-seconds of a training step and of sampling one set, at the size of the published model.

The published 104M parameters (96M without those it never uses), 2,000 genes at 8 % density, 8 sets of 64 cells,
float32, one thread:
    OMP_NUM_THREADS=1 python scripts/bench/step.py
`planned_cpu_s` is what the arithmetic of `perturbdiff plan` says of the step, with this core's rates of matrix products
and of memory in place of a GPU's; bf16 is autocast. Prints JSON; `reference` are the published code's figures on one
core of such a machine (3.80 CPU-s a step, 32 CPU-s for one set of 64 cells with guidance). Medians over --repeats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from scipy import sparse
from torch import nn

from perturbdiff.config import (
    Config,
    DataConfig,
    DenoiserConfig,
    DiffusionConfig,
    OptimConfig,
    Preprocessing,
    SamplingConfig,
    reference_denoiser,
)
from perturbdiff.data.batch import CellSetBatch, make_batch
from perturbdiff.data.samplers import CellSet
from perturbdiff.data.screen import Expression
from perturbdiff.data.vocab import GeneVocab, Labels
from perturbdiff.diffusion.draws import training_draws
from perturbdiff.diffusion.losses import DiffusionLoss
from perturbdiff.diffusion.sampling import sample
from perturbdiff.diffusion.schedule import Schedule
from perturbdiff.nn.conditioning import VocabSizes
from perturbdiff.nn.denoiser import Denoiser
from perturbdiff.training.ema import EMA
from perturbdiff.training.estimate import ADAMW, AVERAGING, CLIPPING, DataSize, step_work
from perturbdiff.training.optim import make_optimizer

GENES, SETS, CELLS, DENSITY = 2000, 8, 64, 0.08
REFERENCE = {"step_cpu_s": 3.80, "cells_per_cpu_s": 135, "sampling_one_set_cpu_s": 32.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    expression = random_cells(4096)
    report: dict[str, object] = {"threads": torch.get_num_threads(), "reference": REFERENCE}
    residual = reference_denoiser()
    residual.output, residual.conditioning = "control_residual", "labels"
    rates = _rates(repeats)
    report["products_per_cpu_s"], report["bytes_per_cpu_s"] = (float(f"{rate:.3g}") for rate in rates)
    for name, config in (("reference preset", reference_denoiser()), ("control residual, labels", residual)):
        report[name] = {**_measure(config, expression, repeats), "planned_cpu_s": _planned(config, *rates)}
    print(json.dumps(report, indent=1))


def _measure(config: DenoiserConfig, expression: Expression, repeats: int) -> dict[str, float]:
    denoiser = Denoiser(config, GENES, VocabSizes(90, 18, 12))
    optimizer, ema, loss = (
        make_optimizer(denoiser, OptimConfig()),
        EMA(denoiser, 0.99),
        DiffusionLoss(DiffusionConfig()),
    )
    steps = iter(range(10**6))

    def step(in_bf16: bool = False) -> None:
        batch = random_batch(expression, next(steps))
        with torch.autocast("cpu", torch.bfloat16, in_bf16):
            output = loss(denoiser, batch, training_draws(batch, loss.config, seed=0))
        output.total.mean().backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(denoiser)

    one_set = random_batch(expression, 0, n_sets=1)
    control = one_set.dense()[1]

    def sampling(settings: SamplingConfig) -> Callable[[], object]:
        return lambda: sample(
            denoiser, torch.randn_like(control), control, one_set.labels, settings, Schedule(), lambda: control
        )

    step_s = _cpu_seconds(step, repeats)
    published = sampling(SamplingConfig(spacing="reference", start_time=100, guidance_scale=1.0))
    strided = sampling(SamplingConfig(n_steps=10, guidance_scale=1.0))
    return {
        "parameters": sum(p.numel() for p in denoiser.parameters()),
        "step_cpu_s": step_s,
        "step_bf16_cpu_s": _cpu_seconds(lambda: step(in_bf16=True), repeats),
        "cells_per_cpu_s": SETS * CELLS / step_s,
        "times_the_reference": REFERENCE["step_cpu_s"] / step_s,
        "sampling_one_set_100_steps_guided_cpu_s": _cpu_seconds(published, 1),
        "sampling_one_set_10_steps_guided_cpu_s": _cpu_seconds(strided, repeats),
    }


def _rates(repeats: int) -> tuple[float, float]:
    """FLOP of matrix products as the denoiser has them, and bytes of memory, that a CPU-second takes."""
    # Weights and values of a step, 400 MB, are in no cache when it is their turn.
    cells, hidden = torch.randn(SETS * CELLS, 512), torch.randn(SETS * CELLS, 2048)
    weights = [torch.randn(2048, 512) for _ in range(64)]
    values = torch.randn(1 << 26)
    product = torch.empty_like(values)

    def products() -> None:
        for weight in weights:
            nn.functional.linear(cells, weight), hidden @ weight, hidden.T @ cells

    def traffic() -> None:
        torch.mul(values, 2.0, out=product)

    flops, moved = len(weights) * 3 * 2 * cells.numel() * 2048, 2 * values.nbytes
    return flops / _cpu_seconds(products, repeats), moved / _cpu_seconds(traffic, repeats)


def _planned(denoiser: DenoiserConfig, products_per_s: float, bytes_per_s: float) -> float:
    config = Config(out="unused", denoiser=denoiser, data=DataConfig(set_size=CELLS, sets_per_batch=SETS))
    work = step_work(config, DataSize("", 1, GENES, DENSITY * GENES, 1.0, VocabSizes(90, 18, 12)), SETS)
    moved = work.traffic + (ADAMW + CLIPPING + AVERAGING) * sum(work.parameters)
    return round(sum(work.flops.values()) / products_per_s + moved / bytes_per_s, 3)


def _cpu_seconds(work: Callable[[], object], repeats: int) -> float:
    work()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return round(statistics.median(seconds), 3)


def random_cells(n_cells: int, n_genes: int = GENES) -> Expression:
    rng = np.random.default_rng(0)
    X = sparse.random(n_cells, n_genes, DENSITY, "csr", rng=rng)
    X.data = rng.integers(1, 20, X.nnz).astype(np.uint16)
    library = np.asarray(X.sum(1, dtype=np.float64)).ravel().astype(np.float32)
    return Expression(X, GeneVocab(tuple(map(str, range(n_genes)))), library, Preprocessing("counts", 1e4, 10.0))


def random_batch(expression: Expression, step: int, n_sets: int = SETS, set_size: int = CELLS) -> CellSetBatch:
    rng = np.random.default_rng(step)
    sets = [CellSet((0, step * n_sets + i), i, *rng.integers(0, len(expression), (2, set_size))) for i in range(n_sets)]
    ids = torch.arange(n_sets)
    return make_batch(sets, set_size, expression, Labels(ids[:, None], ids % 18, ids % 12))


if __name__ == "__main__":
    main()
