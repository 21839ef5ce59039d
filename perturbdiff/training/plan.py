"""What a recipe will take on so many GPUs: memory, FLOPs, bytes, days; and where it would not keep up.

Parameters are exact. Memory is counted by running a step without data (`step_cost`). Times are estimates: counts
divided by rates that are a vendor's figures, measured ones of this project, or assumptions, and `Plan.text` says which.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from perturbdiff.config import Config
from perturbdiff.training.data_size import DataSize, data_size
from perturbdiff.training.distributed import ZERO_BUCKET
from perturbdiff.training.step_cost import StepCost, measure_step, parameter_sizes

ENGINES = ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3")
FLOAT32 = 4  # bytes
# Elements of weights that ZeRO-3 keeps gathered at most: DeepSpeed's default (stage3_max_live_parameters).
LIVE_WEIGHTS = 1_000_000_000
# Cells, controls counted too, that one core reads into sparse batches in a second, of 1,010 stored values each
# (scripts/bench/loader.py; README, "Atlases"). One thread of a process makes its batches.
READ_MAPPED, READ_STREAMED, READ_VALUES = 460_000, 40_000, 1_010
# Of each weight, AdamW reads weight, gradient and two moments and writes three; clipping reads the gradient, and reads
# and writes it; the average reads two and writes one. Each is float32.
ADAMW, CLIPPING, AVERAGING = 7 * FLOAT32, 3 * FLOAT32, 3 * FLOAT32
LAUNCH = 5e-6  # s of the host for each operation, an assumption: below it, a GPU waits for its next kernel


@dataclass(frozen=True)
class Gpu:
    """Figures of the vendor's data sheet, without sparsity.

    memory
        Bytes, a GB as 10^9: the driver finds a few per cent more, which CUDA, NCCL and fragments take.
    bf16, float32
        FLOP/s of tensor cores, and of float32 without TF32: torch's default, and what the distances of the MMD need.
    bandwidth
        Bytes/s of its memory.
    link
        Bytes/s, one way, to the other GPUs of a node (NVLink, else PCIe).
    """

    memory: float
    bf16: float
    float32: float
    bandwidth: float
    link: float


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
    """What a plan is made for.

    network
        Bytes/s, one way, for each GPU between nodes.
    efficiency
        Assumed part of the peak FLOP/s that a step reaches, everything that is no matrix product included.
    """

    gpus: int
    gpu: str
    gpus_per_node: int = 8
    network: float = 50e9
    efficiency: float = 0.35
    cores_per_gpu: float = 1.0

    def __post_init__(self) -> None:
        if self.gpu not in GPUS:
            raise ValueError(f"--gpu {self.gpu!r} is not known; known are {', '.join(GPUS)}.")
        for name in ("gpus", "gpus_per_node", "network", "efficiency", "cores_per_gpu"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} ({getattr(self, name)}) must be greater than 0.")
        if self.efficiency > 1:
            raise ValueError(f"--efficiency ({self.efficiency}) is a part of the peak; it must be at most 1.")


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest GPU under one engine. `buffers`: of DeepSpeed. At a save, `at_save` comes to `total`."""

    weights: int
    gradients: int
    optimizer: int
    ema: int
    buffers: int
    activations: int
    batch: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Plan:
    """Counts and estimates; `flops_per_cell` of a perturbed cell by part, `host_bytes_per_cell` with its control."""

    cluster: Cluster
    data: DataSize
    n_parameters: int
    cells_per_step: int
    sets_per_gpu: int
    parts: int  # into which accumulation cuts them
    memory: Mapping[str, Memory]
    at_save: int  # bytes: the averaged weights, whole
    fits: Mapping[str, bool]
    engine: str  # the first that fits, else DDP: the times are of this one
    flops_per_cell: Mapping[str, float]
    host_bytes_per_cell: float
    # Of a step: matrix products, bytes of its operations in GPU memory, their launches, AdamW and average, bytes
    # between GPUs, batches.
    seconds: Mapping[str, float]
    link_bytes: Mapping[str, float]  # sent by each GPU in a step, by engine
    cells_per_s: float
    read_needed: float  # cells/s of a node, controls counted too, for the GPUs not to wait
    read_possible: float
    days: float
    epoch_days: float
    verdicts: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        memory = {engine: {**asdict(m), "total": m.total} for engine, m in self.memory.items()}
        return {**asdict(self), "memory": memory}

    def text(self) -> str:
        """For a person, several lines."""
        cluster, data, gpu = self.cluster, self.data, GPUS[self.cluster.gpu]
        nodes = -(-cluster.gpus // cluster.gpus_per_node)
        known = data.vocabularies
        names = [*(field.name for field in fields(Memory)), "total"]
        lines = [
            f"data        {data.n_cells:,} cells, {data.n_genes:,} genes, {data.values_per_cell:,.0f} values a cell "
            f"({data.source})",
            f"labels      {known.perturbations:,} perturbations, {known.cell_types:,} cell types, "
            f"{known.batches:,} batches",
            f"parameters  {self.n_parameters:,}",
            f"step        {self.cells_per_step:,} cells; at most {self.sets_per_gpu} sets on a GPU"
            + (f", in {self.parts} parts" if self.parts > 1 else ""),
            f"\nmemory per GPU, GB ({cluster.gpu} has {gpu.memory / 1e9:.0f})",
            "            " + "".join(f"{name:>12}" for name in names),
        ]
        for engine, memory in self.memory.items():
            values = "".join(f"{getattr(memory, name) / 1e9:12.2f}" for name in names)
            lines.append(f"{engine:<12}{values}  {'fits' if self.fits[engine] else 'does not fit'}")
        lines.append(f"at a save   {self.at_save / 1e9:.2f} more for a moment: the averaged weights, whole")
        flops, seconds = self.flops_per_cell, self.seconds
        lines += [
            f"\nMFLOPs      {sum(flops.values()) / 1e6:,.1f} a perturbed cell: "
            + ", ".join(f"{name} {value / 1e6:,.1f}" for name, value in flops.items() if value),
            f"host        {self.host_bytes_per_cell:,.0f} bytes a cell with its control: "
            f"{self.cells_per_s / cluster.gpus * self.host_bytes_per_cell / 1e6:,.1f} MB/s a GPU, "
            f"{self.cells_per_s / nodes * self.host_bytes_per_cell / 1e6:,.1f} MB/s a node",
            f"step        {self.engine}: "
            + ", ".join(f"{name} {1000 * value:,.1f} ms" for name, value in seconds.items()),
            f"speed       {self.cells_per_s:,.0f} cells/s, {duration(self.days)} for all steps, "
            f"{duration(self.epoch_days)} for each cell once",
            f"assumed     {cluster.efficiency:.0%} of the peak ({gpu.bf16 / 1e12:,.0f} TFLOP/s bf16, "
            f"{gpu.float32 / 1e12:,.1f} float32 without TF32): measure yours and give --efficiency; links of "
            f"{_link(cluster) / 1e9:,.0f} GB/s a GPU; {1e6 * LAUNCH:g} us of the host an "
            "operation; full sets; the parts of a step but the optimizer overlap",
            "",
        ]
        return "\n".join([*lines, *self.verdicts, *(f"note: {note}" for note in data.notes)])


def make_plan(config: Config, cluster: Cluster) -> Plan:
    """Count and estimate. Raises ValueError where nothing says how large the data are (`data_size`)."""
    data = data_size(config)
    sizes = parameter_sizes(config, data.n_genes, data.vocabularies)
    sets = -(-config.data.sets_per_batch // cluster.gpus)
    parts = min(config.training.accumulation_steps, sets)
    part = -(-sets // parts)
    cost = measure_step(config, data.n_genes, data.vocabularies, part)
    batch = round(batch_bytes(config, data, sets) * (1 + config.data.prefetch))
    memory = {engine: engine_memory(engine, sizes, cluster.gpus, cost.activations, batch) for engine in ENGINES}
    gpu = GPUS[cluster.gpu]
    fits = {engine: m.total <= gpu.memory for engine, m in memory.items()}
    engine = next((engine for engine in ENGINES if fits[engine]), "DDP")

    set_size = config.data.set_size
    bytes_per_cell = batch_bytes(config, data, sets) / (sets * set_size)
    flops = _flops_per_cell(cost, config.diffusion.p_self_cond, part * set_size)
    link_bytes = {
        e: engine_link_bytes(e, sum(sizes), cluster.gpus, parts, config.diffusion.p_self_cond > 0) for e in ENGINES
    }
    read_per_cell = 1 + data.with_controls
    rate = float(READ_STREAMED if config.data.streamed else READ_MAPPED)
    rate *= min(READ_VALUES / max(data.values_per_cell, 1), 1.0) * min(cluster.cores_per_gpu, 1.0)
    peak = {"bfloat16": gpu.bf16, "float32": gpu.float32}
    at_peak = sum(
        (count + config.diffusion.p_self_cond * cost.self_cond_flops.get(kind, 0)) / peak[kind]
        for kind, count in cost.flops.items()
    )  # s for the sets of a part
    own = sum(sizes) if engine == "DDP" else -(-sum(sizes) // cluster.gpus)
    passed = own * (ADAMW + CLIPPING) + sum(sizes) / cluster.gpus * AVERAGING / config.optim.ema_every
    seconds = {
        "compute": at_peak / cluster.efficiency * sets / part,
        "memory traffic": cost.traffic / gpu.bandwidth * sets / part,
        "launches": cost.kernels * LAUNCH * parts,
        "optimizer": passed / gpu.bandwidth,
        "gradients": link_bytes[engine] / _link(cluster),
        "data": sets * set_size * read_per_cell / rate,
    }
    busy = _busy(seconds)
    step = max(busy, seconds["gradients"], seconds["data"])
    cells_per_step = config.data.sets_per_batch * set_size
    on_node = min(cluster.gpus, cluster.gpus_per_node)
    plan = Plan(
        cluster, data, sum(sizes), cells_per_step, sets, parts, memory, FLOAT32 * sum(sizes), fits, engine, flops,
        bytes_per_cell, seconds, link_bytes, cells_per_step / step,
        read_needed=on_node * sets * set_size * read_per_cell / max(busy, seconds["gradients"]),
        read_possible=on_node * rate,
        days=config.training.n_steps * step / 86_400,
        epoch_days=data.n_cells / cells_per_step * step / 86_400,
        verdicts=(),
    )  # fmt: skip

    def activations(parts: int) -> int:
        return measure_step(config, data.n_genes, data.vocabularies, -(-sets // parts)).activations

    return replace(plan, verdicts=(_of_memory(plan, activations), *_of_speed(plan, config)))


def duration(days: float) -> str:
    """For a person, in the largest unit of which there is one."""
    for unit, n in (("days", 1), ("hours", 24), ("minutes", 1440)):
        if days * n >= 1:
            return f"{days * n:.2g} {unit}"
    return f"{days * 86_400:.2g} seconds"


def engine_memory(engine: str, parameters: Sequence[int], gpus: int, activations: int, batch: int) -> Memory:
    """Bytes on a GPU, of `parameters` elements each.

    Everything is float32. Every engine averages a slice of each parameter; ZeRO-1 and 2 have the whole weights and a
    master copy of the part they update; ZeRO-3 has a part and what is gathered.
    """
    n = sum(parameters)
    part = -(-n // gpus)
    zero = 0 if engine == "DDP" else int(engine[-1])
    weights = {0: n, 1: n + part, 2: n + part, 3: part + min(n, LIVE_WEIGHTS)}[zero]
    return Memory(
        weights=FLOAT32 * weights,
        gradients=FLOAT32 * (part if zero >= 2 else n),
        optimizer=2 * FLOAT32 * (part if zero else n),
        ema=FLOAT32 * sum(-(-size // gpus) for size in parameters),
        buffers=FLOAT32 * ZERO_BUCKET if zero else 0,
        activations=activations,
        batch=batch,
    )


def engine_link_bytes(engine: str, n_parameters: int, gpus: int, parts: int, self_cond: bool) -> float:
    """Bytes that each GPU sends in a step of `parts` accumulated parts, by ring algorithms.

    DDP adds up all gradients once. ZeRO-1 adds up to each its part, then gathers the new weights; ZeRO-2 adds up after
    each part of the batch; ZeRO-3 also gathers the weights for each forward, and keeps them for its backward.
    """
    once = FLOAT32 * n_parameters * (gpus - 1) / gpus  # of a reduce-scatter, or of an all-gather
    return {
        "DDP": 2 * once, "ZeRO-1": 2 * once, "ZeRO-2": (parts + 1) * once,
        "ZeRO-3": parts * (2 + self_cond) * once,
    }[engine]  # fmt: skip


def batch_bytes(config: Config, data: DataSize, n_sets: int) -> float:
    """Bytes of a `CellSetBatch` of full sets: values, positions, library sizes of cells and controls, labels, mask."""
    cells = n_sets * config.data.set_size
    read = cells * (1 + data.with_controls)
    of_cells = read * (data.values_per_cell * data.value_bytes + 8 + 8 + 4) + 2 * 8
    return of_cells + cells + n_sets * 3 * 8


def _flops_per_cell(cost: StepCost, p_self_cond: float, n_cells: int) -> dict[str, float]:
    flops = {f"{kind} forward and backward": count / n_cells for kind, count in sorted(cost.flops.items())}
    first = p_self_cond * sum(cost.self_cond_flops.values()) / n_cells
    return {**flops, f"first estimate of {p_self_cond:.0%} of the sets": first}


def _busy(seconds: Mapping[str, float]) -> float:
    # Of a GPU with its own work: whichever of the three is slowest hides the other two.
    return max(seconds["compute"], seconds["memory traffic"], seconds["launches"]) + seconds["optimizer"]


def _link(cluster: Cluster) -> float:
    return GPUS[cluster.gpu].link if cluster.gpus <= cluster.gpus_per_node else cluster.network


def _of_memory(plan: Plan, activations: Callable[[int], int]) -> str:
    limit = GPUS[plan.cluster.gpu].memory
    total = {engine: f"{memory.total / 1e9:.1f} GB" for engine, memory in plan.memory.items()}
    if plan.fits["DDP"]:
        return f"memory: fits under DDP ({total['DDP']} of {limit / 1e9:.0f})"
    ways = [f"{engine} does ({total[engine]})" for engine in ENGINES if plan.fits[engine]][:1]
    rest = {engine: memory.total - memory.activations for engine, memory in plan.memory.items()}
    parts, least = plan.parts, plan.memory["DDP"].activations
    while parts < plan.sets_per_gpu and not ways[1:]:
        parts = min(2 * parts, plan.sets_per_gpu)
        least = activations(parts)
        able = [engine for engine in ENGINES if rest[engine] + least <= limit]
        if able and (able[0] == "DDP" or not ways):
            ways.append(f"training.accumulation_steps={parts} does under {able[0]}")
            break
    if not ways:
        need = f"even one set at a time needs {(min(rest.values()) + least) / 1e9:.1f} GB"
        return f"memory: does not fit under any engine, and {need}; lower data.set_size, genes or denoiser.width"
    return f"memory: does not fit under DDP ({total['DDP']} of {limit / 1e9:.0f}); {'; or '.join(ways)}"


def _of_speed(plan: Plan, config: Config) -> list[str]:
    cluster, data = plan.cluster, config.data
    seconds = plan.seconds
    said = []
    kind = "the streamed atlas" if data.streamed else "the memory-mapped atlas" if data.atlases else "the screen"
    cores = min(cluster.gpus, cluster.gpus_per_node) * min(cluster.cores_per_gpu, 1.0)
    slow = max(("compute", "memory traffic", "launches"), key=lambda part: seconds[part])
    if slow != "compute":
        said.append(
            f"{slow}: {1000 * seconds[slow]:.1f} ms a step, more than the {1000 * seconds['compute']:.1f} ms of matrix "
            f"products at {cluster.efficiency:.0%} of the peak"
            + ("" if config.training.compile else "; training.compile=true makes fewer")
            + ("; more sets a GPU share them" if slow == "launches" else "")
        )
    path = (
        f"data path: needs {plan.read_needed:,.0f} cells/s a node, controls counted; {kind} gives "
        f"{plan.read_possible:,.0f} on {cores:g} cores, one thread a GPU"
    )
    if plan.read_possible < plan.read_needed:
        path += f": the GPUs wait {1 - plan.read_possible / plan.read_needed:.0%} of the time"
        path += "; data.streamed=false reads faster" if data.streamed else ""
    said.append(path)
    if cluster.gpus > 1:
        busy = _busy(seconds)
        hidden = "behind" if seconds["gradients"] <= busy else "they dominate: more sets a GPU, against"
        said.append(
            f"gradients: {plan.link_bytes[plan.engine] / 1e9:.2f} GB a step and GPU take "
            f"{1000 * seconds['gradients']:.1f} ms at {_link(cluster) / 1e9:.0f} GB/s; {hidden} "
            f"{1000 * busy:.1f} ms of computing"
        )
    if data.sets_per_batch < cluster.gpus:
        idle = cluster.gpus - data.sets_per_batch
        said.append(
            f"sets: data.sets_per_batch ({data.sets_per_batch}) is less than the GPUs: {idle} of {cluster.gpus} idle"
        )
    elif rest := data.sets_per_batch % cluster.gpus:
        said.append(
            f"sets: data.sets_per_batch ({data.sets_per_batch}) is no multiple of {cluster.gpus} GPUs: {rest} have one "
            "set more, and the others wait for them"
        )
    streams = data.n_streams or cluster.gpus
    if data.streamed and data.sets_per_batch % streams:
        said.append(
            f"streams: {streams} (data.n_streams, else one a GPU) do not divide data.sets_per_batch "
            f"({data.sets_per_batch}): training will refuse this"
        )
    elif data.streamed and streams % cluster.gpus:
        said.append(f"streams: data.n_streams ({streams}) is no multiple of {cluster.gpus} GPUs: some read more shards")
    if config.adapt.method != "full":
        said.append(f"adapt: counted as if all weights train; adapt.method={config.adapt.method} takes less")
    if config.training.compile:
        said.append("compile: times are counted without it; it saves launches and memory traffic, not matrix products")
    return said
