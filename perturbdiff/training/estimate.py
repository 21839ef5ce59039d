"""What a recipe takes on so many GPUs: memory on each, cells/s, days, and what limits it (`perturbdiff plan`).

Parameters are exact, and bytes and FLOPs of a step are counted by running it without data (`step_work`). All else is
an estimate under these assumptions:

- Every set is full, and nothing is compiled. Memory is what tensors take: fragments, CUDA and NCCL come on top.
- A GPU's matrix products and attention run at a given part of its peak, every other operation moves its bytes at full
  bandwidth, one after the other; the host launches one each LAUNCH seconds beside them, and the slower of the two hides
  the other. The optimizer comes after them.
- Gradients travel and batches are made, with their noise, beside all that, and cost only what they take longer.
"""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from perturbdiff.atlas.format import columns_of, read_footer
from perturbdiff.atlas.store import Atlas
from perturbdiff.config import Config
from perturbdiff.data.screen import Screen
from perturbdiff.data.vocab import Labels
from perturbdiff.diffusion.draws import Draws
from perturbdiff.diffusion.losses import DiffusionLoss
from perturbdiff.files import hanging
from perturbdiff.nn.conditioning import VocabSizes
from perturbdiff.nn.denoiser import Denoiser
from perturbdiff.training.dataset import TrainingSet, marginal_conditions
from perturbdiff.training.distributed import ZERO_BUCKET, idle_note, shares

ENGINES = ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3")
FLOAT32 = 4  # bytes
VALUE = 4  # bytes of a stored value with its gene, as an atlas has them
# Elements of weights that ZeRO-3 keeps gathered at most: DeepSpeed's default (stage3_max_live_parameters).
LIVE_WEIGHTS = 1_000_000_000
# s of one core to read a cell, controls counted too, into a sparse batch, and for each of its stored values: 460,000
# cells of 1,010 values a second, and 2,000,000 of 160; streamed, 80,000 of 1,010, half of it decoding
# (scripts/bench/loader.py). One thread of a process makes its batches.
READ_CELL, READ_VALUE, DECODED_VALUE = 0.185e-6, 1.97e-9, 12.38e-9
# Of each weight, AdamW reads weight, gradient and two moments and writes three; clipping reads the gradient, and reads
# and writes it; the average reads two and writes one. Each is float32.
ADAMW, CLIPPING, AVERAGING = 7 * FLOAT32, 3 * FLOAT32, 3 * FLOAT32
LAUNCH = 5e-6  # s of the host for each operation
# Of each weight a save copies weight, average and two moments into the memory of one process, the others waiting, at so
# many bytes/s of one core. State and model are then written beside the training, with hashes and the way to disk; a
# save that comes before the end of that waits for it.
COPIED, COPYING = 4 * FLOAT32, 8e9
SAVED, SAVING = 5 * FLOAT32, 1e9
SAMPLE = 4096  # cells of a screen whose values are counted


class Gpu(NamedTuple):
    """Figures of the vendor's data sheet, without sparsity."""

    memory: float  # bytes, a GB as 10^9: the driver finds a few per cent more, which CUDA, NCCL and fragments take
    bf16: float  # FLOP/s of tensor cores
    float32: float  # FLOP/s without TF32: torch's default, and what the distances of the MMD need
    bandwidth: float  # bytes/s of its memory
    link: float  # bytes/s, one way, to the other GPUs of a node (NVLink, else PCIe)


GPUS: dict[str, Gpu] = {
    "a100": Gpu(80e9, 312e12, 19.5e12, 2.039e12, 300e9),  # SXM, 80 GB
    "a100-40gb": Gpu(40e9, 312e12, 19.5e12, 1.555e12, 300e9),
    "h100": Gpu(80e9, 989e12, 67e12, 3.35e12, 450e9),  # SXM
    "h200": Gpu(141e9, 989e12, 67e12, 4.8e12, 450e9),  # SXM
    "b200": Gpu(180e9, 2250e12, 75e12, 7.7e12, 900e9),  # HGX
    "l40s": Gpu(48e9, 362e12, 91.6e12, 0.864e12, 32e9),
    "rtx4090": Gpu(24e9, 165e12, 82.6e12, 1.008e12, 32e9),
}


@dataclass(frozen=True)
class Cluster:
    """What an estimate is for."""

    gpus: int
    gpu: str
    gpus_per_node: int = 8
    network: float = 50e9  # bytes/s, one way, for each GPU between nodes
    efficiency: float = 0.35  # assumed part of the peak FLOP/s that matrix products reach
    cores_per_gpu: float = 1.0

    def __post_init__(self) -> None:
        if self.gpu not in GPUS:
            raise ValueError(f"--gpu {self.gpu!r} is not known; known are {', '.join(GPUS)}.")
        for name in ("gpus", "gpus_per_node", "network", "efficiency", "cores_per_gpu"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} ({getattr(self, name)}) must be greater than 0.")
        if self.efficiency > 1:
            raise ValueError(f"--efficiency ({self.efficiency}) is a part of the peak; it must be at most 1.")

    @property
    def link(self) -> float:
        """Bytes/s of the slowest link that gradients pass."""
        return GPUS[self.gpu].link if self.gpus <= self.gpus_per_node else self.network


@dataclass(frozen=True)
class DataSize:
    """What of the data the costs depend on."""

    source: str
    n_cells: int  # of an epoch, controls not counted
    n_genes: int
    values_per_cell: float  # stored ones, on average
    with_controls: float  # share of the sets that have controls; marginal ones have none
    labels: VocabSizes
    chosen: bool = False  # n_genes of more in an atlas, and values_per_cell in proportion


def data_size(config: Config) -> DataSize:
    """From the screen, from atlases that are folders here, or from what the recipe expects.

    Raises
    ------
    ValueError
        An atlas is no folder and `expected` is not given; atlases expect different numbers of genes; as `TrainingSet`.
    """
    data = config.data
    here = data.screen is not None or all(Path(atlas.path).is_dir() for atlas in data.atlases)
    size = _counted(config) if here else _expected(config)
    n_genes = min(data.n_hvg or size.n_genes, size.n_genes)  # those of a screen are chosen by now
    per_cell = size.values_per_cell * n_genes / size.n_genes
    return replace(size, n_genes=n_genes, values_per_cell=per_cell, chosen=n_genes < size.n_genes)


def _counted(config: Config) -> DataSize:
    data = config.data
    if data.screen is not None:
        screen = Screen.read(data.screen, data)
        made = TrainingSet.from_screen(screen, config)
        taken = made.cells.take(np.linspace(0, len(screen) - 1, min(len(screen), SAMPLE)).astype(np.int64))
        per_cell = len(taken.values) / (len(taken.indptr) - 1)
    else:  # streamed, nothing is read but the manifests; genes are then not chosen, and weights not possible
        unweighted = [replace(atlas, weight=None) for atlas in data.atlases]
        data = replace(data, streamed=True, n_hvg=None, n_streams=None, atlases=unweighted)
        made = TrainingSet.from_atlases(replace(config, data=data))
        per_cell = sum(map(_stored_values, made.atlases)) / sum(map(len, made.atlases))
    index = made.train.index
    marginal = marginal_conditions(index, made.train.sources)
    trained = marginal | ~index.is_control
    n_cells = int(index.n_cells[trained].sum())
    without = np.array([source.marginal and not source.self_controlled for source in made.train.sources])[index.source]
    with_controls = float(index.n_cells[trained & ~without].sum() / n_cells)
    source, n_genes = f"counted in {data.screen or 'the atlas'}", len(made.cells.genes)
    return DataSize(source, n_cells, n_genes, per_cell, with_controls, VocabSizes.from_vocabularies(made.vocabularies))


def _stored_values(atlas: Atlas) -> int:
    # By the footers of its shards; a cell without any counts as one.
    assert atlas.folder is not None, "only folders are counted"
    footers = [read_footer(atlas.folder / of.file, atlas.info.schema, of.n_cells) for of in atlas.info.shards]
    columns = [column for footer in footers for column in columns_of(footer)]
    return sum(column.num_values for column in columns if column.path_in_schema.startswith("genes."))


def _expected(config: Config) -> DataSize:
    atlases, sizes = config.data.atlases, []
    for i, atlas in enumerate(atlases):
        if atlas.expected is None:
            raise ValueError(
                f"data.atlases[{i}] ({atlas.path}) is no folder here, and data.atlases[{i}].expected does not say how "
                "large it is; give {cells, genes, genes_per_cell, perturbations, cell_types, batches}."
            )
        sizes.append(atlas.expected)
    genes = {size.genes for size in sizes}
    if len(genes) > 1:
        raise ValueError(f"data.atlases[].expected.genes {sorted(genes)} must be the same: atlases share their genes.")
    share = np.array([atlas.weight or size.cells for atlas, size in zip(atlases, sizes, strict=True)], dtype=float)
    share /= share.sum()
    # Marginal sets have no perturbation and are pooled over batches.
    perturbed = np.array([atlas.sets == "perturbed" for atlas in atlases])
    with_batches = config.data.control_match != "cell_type"
    n_labels = np.array([(size.perturbations, size.cell_types, size.batches) for size in sizes])
    n_labels[:, [0, 2]] *= perturbed[:, None] * [True, with_batches]
    n_cells, per_cell = sum(size.cells for size in sizes), float(share @ [size.genes_per_cell for size in sizes])
    labels = VocabSizes(*n_labels.sum(0).tolist())
    return DataSize("expected by the recipe", n_cells, genes.pop(), per_cell, float(share @ perturbed), labels)


@dataclass(frozen=True)
class Work:
    """What some sets take of one GPU."""

    flops: Mapping[str, float]  # of matrix products and attention, by the type they run in ("bfloat16", "float32")
    traffic: float  # bytes that operations read and write, each by itself; those of products are in their FLOPs
    operations: int  # those that move any


@dataclass(frozen=True)
class StepWork(Work):
    """Of a forward and backward of some sets on one GPU, with a first estimate for diffusion.p_self_cond of them."""

    parameters: tuple[int, ...]  # elements of each
    # Bytes at the fullest moment besides weights and gradients, all sets with a first estimate: the dense batch,
    # what is saved for backward, autocast's copies of the weights, what is passing through.
    activations: int
    estimate: Work  # one call of the denoiser without gradient


def step_work(config: Config, data: DataSize, n_sets: int) -> StepWork:
    """Work of `n_sets` sets: the real loss, run on tensors that have shapes and no storage (FakeTensorMode)."""
    shape = n_sets, config.data.set_size, data.n_genes
    p_first = config.diffusion.p_self_cond
    in_bf16 = config.training.mixed_precision == "bf16"
    with FakeTensorMode(), GpuNorms():
        denoiser, loss = Denoiser(config.denoiser, data.n_genes, data.labels), DiffusionLoss(config.diffusion, True)
        for p in denoiser.parameters():
            p.register_post_accumulate_grad_hook(_forget)  # gradients are counted with the weights
        ids, mask = torch.zeros(n_sets, dtype=torch.int64), torch.ones(shape[:2], dtype=torch.bool)
        labels = Labels(ids[:, None], ids, ids, ids.bool())
        # What the loss reads of a batch. A real one is sparse, and where its values go depends on them.
        batch: Any = SimpleNamespace(
            mask=mask, dense=lambda: (torch.empty(shape), torch.empty(shape)), one_count=lambda: torch.empty(shape[:2]),
            measured=None, of_measured=lambda x: x,
        )  # fmt: skip
        with _Counter(denoiser) as first, torch.no_grad(), torch.autocast("cpu", torch.bfloat16, in_bf16):
            denoiser(torch.empty(shape), ids, torch.empty(shape), labels, None, mask)
        rounding = torch.empty(shape) if config.diffusion.whole_counts else None
        draws = Draws(ids, torch.empty(shape), torch.arange(n_sets), labels, rounding)  # all see a first estimate
        with _Counter(denoiser) as step:
            with torch.autocast("cpu", torch.bfloat16, in_bf16):
                total = loss(denoiser, batch, draws).total
            total.sum().backward()
        parameters = tuple(p.numel() for p in denoiser.parameters())
    too_many = 1 - p_first if p_first else 0.0  # share of the sets whose first estimate was counted and is not made
    flops = {kind: count - too_many * first.flops[kind] for kind, count in step.flops.items()}
    traffic, once = step.traffic - too_many * first.traffic, Work(first.flops, first.traffic, first.operations)
    return StepWork(flops, traffic, step.operations, parameters, step.peak, once)


def _forget(p: Tensor) -> None:
    p.grad = None


class GpuNorms(TorchFunctionMode):
    """Norms as on a GPU: one kernel, in float32, that saves its input and a number or two a row."""

    # CPU autocast leaves them in bf16, and an RMS norm is many steps there.
    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (F.layer_norm, F.rms_norm):
            return func(*args, **(kwargs or {}))
        x, shape, *weight = args
        return F.layer_norm(x.float(), shape, weight[0].float() if weight else None)


class _Counter(TorchDispatchMode):
    """Sees every operation: FLOPs by the result's type, bytes read and written, bytes alive together at most."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.flops: dict[str, float] = defaultdict(float)
        self.traffic = self.operations = self.peak = 0
        self._alive = {p.untyped_storage()._cdata: 0 for p in denoiser.parameters()}  # bytes by address, weights apart

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        outputs = [tensor for tensor in tree_leaves(result) if isinstance(tensor, Tensor)]
        for storage in (tensor.untyped_storage() for tensor in outputs):
            if storage._cdata not in self._alive:
                self._alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self._alive.pop, storage._cdata)
        self.peak = max(self.peak, sum(self._alive.values()))
        if outputs and not func.is_view:
            tensors = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)] + outputs
            self.operations += 1
            if func._overloadpacket not in FLOPS:  # what is broadcast is read once
                self.traffic += sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors)
        if count := FLOPS.get(func._overloadpacket):
            self.flops[str(outputs[0].dtype).removeprefix("torch.")] += count(*args, **kwargs, out_val=result)
        return result


# What torch.utils.flop_counter counts by: every product, and every attention but that of CPUs.
ATTENTION = "_scaled_dot_product_flash_attention"
FLOPS: dict[Any, Callable[..., int]] = flop_registry | {
    getattr(torch.ops.aten, f"{ATTENTION}_for_cpu{end}"): flop_registry[getattr(torch.ops.aten, ATTENTION + end)]
    for end in ("", "_backward")
}


def engine_memory(engine: str, parameters: Sequence[int], gpus: int, activations: int, batch: int) -> dict[str, int]:
    """Bytes on the fullest GPU by part and in total, of `parameters` elements each. `buffers`: of DeepSpeed.

    Everything is float32. Every engine averages a slice of each parameter; ZeRO-1 and 2 have the whole weights and a
    master copy of the part they update; ZeRO-3 has a part and what is gathered.
    """
    n = sum(parameters)
    part = -(-n // gpus)
    zero = 0 if engine == "DDP" else int(engine[-1])
    memory = {
        "weights": FLOAT32 * (n, n + part, n + part, part + min(n, LIVE_WEIGHTS))[zero],
        "gradients": FLOAT32 * (part if zero >= 2 else n),
        "optimizer": 2 * FLOAT32 * (part if zero else n),
        "ema": FLOAT32 * sum(-(-size // gpus) for size in parameters),
        "buffers": FLOAT32 * ZERO_BUCKET if zero else 0,
        "activations": activations,
        "batch": batch,
    }
    return {**memory, "total": sum(memory.values())}


def engine_link_bytes(engine: str, n_parameters: int, gpus: int, parts: int, self_cond: bool) -> float:
    """Bytes that each GPU sends in a step of `parts` accumulated parts, by ring algorithms.

    DDP adds up all gradients once. ZeRO-1 adds up to each its part, then gathers the new weights; ZeRO-2 adds up after
    each part of the batch; ZeRO-3 also gathers the weights for each forward, and keeps them for its backward.
    """
    once = FLOAT32 * n_parameters * (gpus - 1) / gpus  # of a reduce-scatter, or of an all-gather
    return once * {"DDP": 2, "ZeRO-1": 2, "ZeRO-2": parts + 1, "ZeRO-3": parts * (2 + self_cond)}[engine]


def batch_bytes(config: Config, data: DataSize, n_sets: int) -> float:
    """Bytes of a `CellSetBatch` of full sets: values, positions, library sizes of cells and controls, labels, mask; and
    of the noise that is drawn when it is made."""
    cells = n_sets * config.data.set_size
    read = cells * (1 + data.with_controls)
    noise = cells * data.n_genes * FLOAT32 * (2 if config.diffusion.whole_counts else 1)
    return read * (VALUE * data.values_per_cell + 8 + 8 + 4) + 2 * 8 + cells + n_sets * 3 * 8 + noise


@dataclass(frozen=True)
class Estimate:
    """What `estimate` found; bytes, seconds, days."""

    cluster: Cluster
    data: DataSize
    n_parameters: int
    cells_per_step: int
    sets_per_gpu: int
    parts: int  # into which accumulation cuts them
    memory: Mapping[str, Mapping[str, int]]  # of the fullest GPU, by engine and part
    fits: Mapping[str, bool]
    engine: str  # the first that fits, else DDP: the times are of this one
    flops_per_cell: Mapping[str, float]  # of a perturbed cell, by type
    # Of a step: matrix products, bytes of operations in GPU memory, their launches, AdamW and average, bytes between
    # GPUs, batches, and its part of the next save and of the next validation.
    seconds: Mapping[str, float]
    limit: str  # "memory" where nothing fits, else the one of `seconds` that the others wait for
    cells_per_s: float
    days: float
    epoch_days: float
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """For a person, several lines."""
        cluster, data, labels, gpu = self.cluster, self.data, self.data.labels, GPUS[self.cluster.gpu]
        rows = [
            f"{part:<12}" + "".join(f"{memory[part] / 1e9:10.2f}" for memory in self.memory.values())
            for part in self.memory["DDP"]
        ]
        lines = [
            f"data        {data.n_cells:,} cells, {data.n_genes:,} genes, {data.values_per_cell:,.0f} values a cell "
            f"({data.source})",
            f"labels      {labels.perturbations:,} perturbations, {labels.cell_types:,} cell types, "
            f"{labels.batches:,} batches",
            f"parameters  {self.n_parameters:,}",
            f"step        {self.cells_per_step:,} cells; at most {self.sets_per_gpu} sets on a GPU"
            + (f", in {self.parts} parts" if self.parts > 1 else ""),
            f"\nmemory per GPU, GB ({cluster.gpu} has {gpu.memory / 1e9:.0f})",
            " " * 12 + "".join(f"{engine:>10}" for engine in self.memory),
            *rows,
            f"{'fits':<12}" + "".join(f"{'yes' if self.fits[engine] else 'no':>10}" for engine in self.memory),
            f"at a save   {FLOAT32 * self.n_parameters / 1e9:.2f} more for a moment: the averaged weights, whole",
            f"\nMFLOPs      {sum(self.flops_per_cell.values()) / 1e6:,.1f} a perturbed cell: "
            + ", ".join(f"{kind} {count / 1e6:,.1f}" for kind, count in self.flops_per_cell.items()),
            f"step        {self.engine}: " + ", ".join(f"{part} {1e3 * s:,.1f} ms" for part, s in self.seconds.items()),
            f"speed       {self.cells_per_s:,.0f} cells/s; {self.days:.2g} days ({24 * self.days:.2g} hours) for all "
            f"steps, {self.epoch_days:.2g} days for each cell once",
            f"assumed     {cluster.efficiency:.0%} of the peak ({gpu.bf16 / 1e12:,.0f} TFLOP/s bf16, "
            f"{gpu.float32 / 1e12:,.1f} float32 without TF32): measure yours and give --efficiency; links of "
            f"{cluster.link / 1e9:,.0f} GB/s a GPU; {1e6 * LAUNCH:g} us an operation; full sets; nothing compiled",
            "",
        ]
        return "\n".join([*(hanging(line, 12) for line in lines), *(hanging(note, 2) for note in self.notes)])


def estimate(config: Config, cluster: Cluster) -> Estimate:
    """Count and estimate. Raises ValueError where nothing says how large the data are (`data_size`)."""
    data, gpu = data_size(config), GPUS[cluster.gpu]
    set_size, (_, sets) = config.data.set_size, shares(config.data, cluster.gpus)
    parts = min(config.training.accumulation_steps, sets)
    part = -(-sets // parts)
    work = step_work(config, data, part)
    n, ahead = sum(work.parameters), 1 + config.data.prefetch
    batch = round(batch_bytes(config, data, sets) * ahead)
    memory = {e: engine_memory(e, work.parameters, cluster.gpus, work.activations, batch) for e in ENGINES}
    fits = {engine: memory[engine]["total"] <= gpu.memory for engine in ENGINES}
    engine = next((engine for engine in ENGINES if fits[engine]), "DDP")

    updated = n if engine == "DDP" else -(-n // cluster.gpus)
    optimizer_bytes = updated * (ADAMW + CLIPPING) + n / cluster.gpus * AVERAGING / config.optim.ema_every
    cell, value = (0.0, DECODED_VALUE) if config.data.streamed else (READ_CELL, READ_VALUE)
    read = (cell + value * max(data.values_per_cell, 1)) / min(cluster.cores_per_gpu, 1.0)
    sent = engine_link_bytes(engine, n, cluster.gpus, parts, config.diffusion.p_self_cond > 0)
    seconds = {
        **seconds_on_gpu(work, cluster, sets / part, parts),
        "optimizer": optimizer_bytes / gpu.bandwidth,
        "network": sent / cluster.link,
        "data": sets * set_size * (1 + data.with_controls) * read,
    }
    on_gpu = seconds["compute"] + seconds["memory traffic"]
    kinds = ("launches",) if seconds["launches"] > on_gpu else ("compute", "memory traffic")
    slowest = max(kinds, key=lambda name: seconds[name])
    busy = max(on_gpu, seconds["launches"]) + seconds["optimizer"]
    step = max(busy, seconds["network"], seconds["data"])
    limit = next((name for name in ("data", "network") if seconds[name] == step), slowest)
    between = max(config.training.save_every * step, 60 * config.training.save_minutes)  # s from save to save
    waits = n * COPIED / COPYING + max(n * SAVED / SAVING - between, 0.0)
    seconds["saves"] = step * waits / between
    seconds["validation"] = _validation(config, cluster, work, part) / config.training.validate_every
    step += seconds["saves"] + seconds["validation"]
    cells = config.data.sets_per_batch * set_size
    result = Estimate(
        cluster, data, n, cells, sets, parts, memory, fits, engine,
        {kind: count / (part * set_size) for kind, count in work.flops.items()}, seconds,
        limit if fits[engine] else "memory", cells / step,
        config.training.n_steps * step / 86_400, data.n_cells / cells * step / 86_400,
    )  # fmt: skip
    return replace(result, notes=(_memory_note(result, config), *_speed_notes(result, config, busy)))


def seconds_on_gpu(work: Work, cluster: Cluster, times: float = 1.0, launched: float = 1.0) -> dict[str, float]:
    """Of matrix products, other operations and their launches; `work` is of a part that comes so many `times`, cut into
    calls that are `launched`."""
    gpu = GPUS[cluster.gpu]
    peak = {"bfloat16": gpu.bf16, "float32": gpu.float32}
    return {
        "compute": sum(count / peak[kind] for kind, count in work.flops.items()) / cluster.efficiency * times,
        "memory traffic": work.traffic / gpu.bandwidth * times,
        "launches": work.operations * LAUNCH * launched,
    }


def _validation(config: Config, cluster: Cluster, work: StepWork, part: int) -> float:
    """Seconds of one: every call of the denoiser, of cells that are generated and for the loss; `work` is of `part`
    sets. There may be fewer sets than training.validate_sets, which only the data say."""
    split, sampling = config.split, config.sampling
    if not (split.validation or split.validation_fraction or split.validation_cells):
        return 0.0
    sets = -(-config.training.validate_sets // cluster.gpus)
    calls = sampling.n_calls * (2 if sampling.guidance_scale > 0 else 1) + 1
    once = seconds_on_gpu(work.estimate, cluster, sets / part, math.ceil(sets / part))
    return calls * max(once["compute"] + once["memory traffic"], once["launches"])


def _memory_note(found: Estimate, config: Config) -> str:
    memory, limit = found.memory, GPUS[found.cluster.gpu].memory
    total = {engine: f"{memory[engine]['total'] / 1e9:.1f} GB" for engine in ENGINES}
    if found.fits["DDP"]:
        return f"memory: fits under DDP ({total['DDP']} of {limit / 1e9:.0f})"
    ways = [f"{engine} does ({total[engine]})" for engine in ENGINES if found.fits[engine]][:1]
    part, one = -(-found.sets_per_gpu // found.parts), step_work(config, found.data, 1).activations
    rest = {engine: m["total"] - m["activations"] + one for engine, m in memory.items()}  # with one set at a time
    each = (memory["DDP"]["activations"] - one) / max(part - 1, 1)  # of every other set: they are alike
    for engine in ENGINES if not ways else ("DDP",):
        if rest[engine] <= limit and part > 1:
            parts = math.ceil(found.sets_per_gpu / (1 + (limit - rest[engine]) // each))
            ways.append(f"training.accumulation_steps={parts} does under {engine}")
            break
    if ways:
        return f"memory: does not fit under DDP ({total['DDP']} of {limit / 1e9:.0f}); {'; or '.join(ways)}"
    need = f"even one set at a time needs {min(rest.values()) / 1e9:.1f} GB"
    return f"memory: does not fit under any engine, and {need}; lower data.set_size, genes or denoiser.width"


def _speed_notes(found: Estimate, config: Config, busy: float) -> list[str]:
    data, gpus, limit = config.data, found.cluster.gpus, found.limit
    notes = []
    if limit != "memory":
        waits = f": the GPUs wait {1 - busy / max(busy, found.seconds[limit]):.0%} of the time"
        compiled = "" if config.training.compile else "; training.compile=true makes fewer"
        advice = {
            "compute": f" of matrix products at {found.cluster.efficiency:.0%} of the peak",
            "memory traffic": f" of bytes read and written{compiled}",
            "launches": f" of operations{compiled}; more sets a GPU share them",
            "network": f"{waits}; more sets a GPU hide it",
            "data": waits + ("; data.streamed=false reads faster" if data.streamed else ""),
        }
        notes.append(f"limit: {limit}, {1e3 * found.seconds[limit]:.1f} ms a step{advice[limit]}")
    if idle := idle_note(data, gpus):
        notes.append(f"idle: {idle}")
    elif rest := data.sets_per_batch % gpus:
        notes.append(
            f"sets: data.sets_per_batch ({data.sets_per_batch}) is no multiple of {gpus} GPUs: {rest} have one set "
            "more, and the others wait for them"
        )
    streams = data.n_streams or gpus
    if data.streamed and data.sets_per_batch % streams:
        notes.append(
            f"streams: {streams} (data.n_streams, else one a GPU) do not divide data.sets_per_batch "
            f"({data.sets_per_batch}): training will refuse this"
        )
    elif data.streamed and streams > gpus and streams % gpus:
        notes.append(f"streams: data.n_streams ({streams}) is no multiple of {gpus} GPUs: some read more shards")
    if config.adapt.method != "full":
        notes.append(f"adapt: counted as if all weights train; adapt.method={config.adapt.method} takes less")
    if config.training.compile:
        notes.append("compile: counted without it; it saves launches and memory traffic, not matrix products")
    if found.data.chosen:
        notes.append("genes: values a cell are scaled by the part that is chosen, but variable genes have more")
    if found.data.source.startswith("expected") and len(data.atlases) > 1:
        notes.append("labels: counted as if no two atlases shared one")
    return notes
