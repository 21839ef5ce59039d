"""What a GPU does in a training step: time, part of its peak, memory, kernels, gaps.

    python scripts/bench/gpu.py                                 # of the recipe tahoe100m, 32 sets of 256 cells
    python scripts/bench/gpu.py --genes 12626 --sets 8          # of more genes
    python scripts/bench/gpu.py --device cpu --sets 2 --genes 100 denoiser.width=32 data.set_size=8

Nothing here was measured on a GPU yet. Who has one, please send what this prints, and look at these:

- `same_loss`: loss and norm of the gradient in float32 are those of the CPU to 1e-3.
- `compiled`: `graphs` is at most 16 and no warning of a recompile limit comes; the step is shorter than `eager`.
- `waits`: how often the host waits for the GPU in a step: twice here and in training, for the loss and for the norm of
  the gradient. More means that something of a step is read on the host.
- `copies_ms`: a batch from pinned memory to the GPU; hidden beside a step if it is shorter.
- `idle`: part of the time in which no kernel runs. Over .1, launches and not the GPU limit the step.
- `planned_ms`, and `efficiency`: what `perturbdiff plan --efficiency` assumed and should be given.

Prints JSON; times are medians of --repeats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from step import random_batch, random_cells
from torch import nn
from torch._dynamo.utils import counters
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from perturbdiff.config import Config, load_config
from perturbdiff.data.batch import CellSetBatch
from perturbdiff.diffusion.draws import Draws, training_draws
from perturbdiff.diffusion.losses import DiffusionLoss
from perturbdiff.nn.conditioning import VocabSizes
from perturbdiff.nn.denoiser import Denoiser, compile_blocks
from perturbdiff.training.ema import EMA
from perturbdiff.training.estimate import GPUS, Cluster, DataSize, StepWork, seconds_on_gpu, step_work
from perturbdiff.training.optim import make_optimizer

SIZES, TOP, WARM_UP = VocabSizes(1137, 50, 14), 10, 5
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="of the recipe tahoe100m")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sets", type=int, default=32, help="of a step (default: %(default)s)")
    parser.add_argument("--genes", type=int, default=2000, help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=20, help="(default: %(default)s)")
    args = parser.parse_args()
    device, config = torch.device(args.device), load_config("pretrain/tahoe100m", args.settings)
    batches = [
        random_batch(random_cells(4096, args.genes), number, args.sets, config.data.set_size) for number in range(4)
    ]
    size = DataSize("simulated", 1, args.genes, 0.08 * args.genes, 1.0, SIZES)
    work = step_work(config, size, args.sets)
    found: dict[str, Any] = {"device": _name(device), "torch": torch.__version__, "parameters": sum(work.parameters)}
    few = random_batch(random_cells(64, args.genes), 0, 2, config.data.set_size)
    found["same_loss"] = _same_loss(config, args.genes, few, device)
    for kind in ("eager", "compiled"):
        found[kind] = _measured(config, args.genes, batches, device, args.repeats, kind == "compiled", work)
    print(json.dumps(found, indent=1))


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _denoiser(config: Config, n_genes: int) -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(config.denoiser, n_genes, SIZES)


def _same_loss(config: Config, n_genes: int, batch: CellSetBatch, device: torch.device) -> dict[str, list[float]]:
    draws = training_draws(batch, config.diffusion, 0)
    found = {}
    for place in (torch.device("cpu"), device):
        denoiser = _denoiser(config, n_genes).to(place)
        moved = Draws(
            draws.t.to(place), draws.noise.to(place), draws.self_cond.to(place), draws.labels.to(place),
            None if draws.rounding is None else draws.rounding.to(place),
        )  # fmt: skip
        total = DiffusionLoss(config.diffusion)(denoiser, batch.to(place), moved).total.mean()
        total.backward()
        norm = nn.utils.get_total_norm([p.grad for p in denoiser.parameters() if p.grad is not None])
        found[str(place)] = [total.item(), norm.item()]
    return found


def _measured(
    config: Config, n_genes: int, batches: list[CellSetBatch], device: torch.device, repeats: int, compiled: bool,
    work: StepWork,
) -> dict[str, Any]:  # fmt: skip
    denoiser = _denoiser(config, n_genes).to(device)
    counters.clear()
    if compiled:
        torch._dynamo.reset()
        compile_blocks(denoiser)
    optimizer = make_optimizer(denoiser, config.optim)
    ema, loss = EMA(denoiser, config.optim.ema_decay), DiffusionLoss(config.diffusion)
    in_bf16 = config.training.mixed_precision == "bf16"
    there = [batch.to(device) for batch in batches]

    def step(number: int) -> None:
        # As the loop does it, which reads the loss before the backward pass and the norm before the update.
        batch = there[number % len(there)]
        batch = replace(batch, keys=tuple((number, of_set) for _, of_set in batch.keys))
        draws = training_draws(batch, config.diffusion, 0)
        with torch.autocast(device.type, torch.bfloat16, in_bf16):
            total = loss(denoiser, batch, draws).total.mean()
        total.item()
        total.backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), config.optim.grad_clip).item()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(denoiser)

    for number in range(WARM_UP):
        step(number)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step_s = statistics.median(_seconds(lambda number=number: step(number), device) for number in range(repeats))
    flops = sum(work.flops.values())
    found: dict[str, Any] = {
        "step_ms": round(1e3 * step_s, 2),
        "cells_per_s": round(sum(int(batch.mask.sum()) for batch in batches) / len(batches) / step_s),
        "tflops": round(flops / step_s / 1e12, 3),
        "graphs": counters["stats"]["unique_graphs"],
    }
    copies = [_seconds(lambda batch=batch: batch.to(device), device) for batch in batches]
    found["copies_ms"] = round(1e3 * statistics.median(copies), 3)
    if device.type == "cuda":
        found["memory_gb"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 2)
        found |= _beside_the_plan(_name(device), step_s, work)
    return found | _profiled(step, device, repeats)


def _beside_the_plan(name: str, step_s: float, work: StepWork) -> dict[str, float]:
    known = [key for key in GPUS if key.split("-")[0] in name.lower().replace(" ", "")]
    if not known:
        return {}
    cluster = Cluster(1, known[0])
    planned = seconds_on_gpu(work, cluster)
    products, moving = planned["compute"] * cluster.efficiency, planned["memory traffic"]
    return {
        "mfu": round(sum(work.flops.values()) / step_s / GPUS[known[0]].bf16, 4),
        "planned_ms": round(1e3 * max(planned["compute"] + moving, planned["launches"]), 2),
        "efficiency": round(products / max(step_s - moving, 1e-9), 3),
    }


def _profiled(step: Callable[[int], None], device: torch.device, repeats: int) -> dict[str, Any]:
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        whole = _seconds(lambda: [step(number) for number in range(repeats)], device)
    events = profiler.key_averages()
    if device.type == "cuda":
        kernels = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
        seconds = {event.key: event.self_device_time_total / 1e6 for event in kernels}
    else:
        seconds = {event.key: event.self_cpu_time_total / 1e6 for event in events}
    top = sorted(seconds.items(), key=lambda item: -item[1])[:TOP]
    return {
        "idle": round(max(1 - sum(seconds.values()) / whole, 0.0), 3),
        "waits": round(sum(event.count for event in events if event.key in WAITS) / repeats, 1),
        "top_ms": {name[:80]: round(1e3 * of_kernel / repeats, 3) for name, of_kernel in top},
    }


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
