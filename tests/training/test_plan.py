from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from perturbdiff.config import AtlasConfig, Config, load_config
from perturbdiff.data.batch import CellSetBatch
from perturbdiff.data.screen import Screen
from perturbdiff.diffusion.draws import training_draws
from perturbdiff.diffusion.losses import DiffusionLoss
from perturbdiff.nn.conditioning import VocabSizes
from perturbdiff.nn.denoiser import Denoiser
from perturbdiff.training.data_size import data_size
from perturbdiff.training.dataset import TrainingSet
from perturbdiff.training.ema import EMA
from perturbdiff.training.optim import make_optimizer
from perturbdiff.training.plan import (
    ENGINES,
    GPUS,
    Cluster,
    DataSize,
    batch_bytes,
    duration,
    engine_link_bytes,
    engine_memory,
    make_plan,
)
from perturbdiff.training.step_cost import StepRecorder, autocast_of_a_gpu, measure_step, parameter_sizes
from tests.atlases import write_atlas
from tests.simulated import tiny_config, write_screen

GENES, SIZES = 30, VocabSizes(5, 3, 2)
VARIANTS = [
    [],
    ["denoiser.attention=joint", "denoiser.depth=3", "denoiser.out_activation=softplus"],
    ["denoiser.conditioning=reference", "denoiser.output=direct", "denoiser.parallel_block=false"],
    ["denoiser.conditioning=reference", "denoiser.batch_encoding=none", "denoiser.mlp_ratio=2.5"],
]


def settings(*words: str) -> Config:
    small = ["out=unused", "data.screen=unused", "data.set_size=8", "denoiser.width=16", "denoiser.depth=2"]
    return load_config(None, [*small, "denoiser.n_heads=2", *words])


def recipe(*words: str, expected: dict[str, int] | None = None) -> Config:
    """Of an atlas that is nowhere."""
    sizes = {"cells": 10**6, "genes": 300, "genes_per_cell": 60, "perturbations": 9, "cell_types": 4, "batches": 3}
    atlas = {"path": "nowhere/atlas", "expected": expected or sizes}
    given = {"out": "unused", "data": {"atlases": [atlas], "n_hvg": None, "set_size": 16, "sets_per_batch": 64}}
    return load_config(None, ["denoiser.width=32", "denoiser.depth=2", "denoiser.n_heads=2", *words], given)


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    return write_screen(tmp_path_factory.mktemp("plan"))


def real_batch(screen, *words: str) -> tuple[Config, TrainingSet, CellSetBatch]:
    config = tiny_config(screen, screen.parent / "run", *words, hold_out=())
    made = TrainingSet.of(Screen.read(screen, config.data), config)
    return config, made, made.train.batch(made.train.sampler(config), 0, 0, 0, 1)


@pytest.mark.parametrize("words", VARIANTS)
def test_parameters_are_those_of_a_denoiser_that_is_built(words):
    config = settings(*words)
    built = Denoiser(config.denoiser, GENES, SIZES)
    assert parameter_sizes(config, GENES, SIZES) == [p.numel() for p in built.parameters()]


@pytest.mark.parametrize("words", VARIANTS)
def test_weights_gradients_moments_and_average_take_the_bytes_they_take_in_a_step(screen, words):
    config, made, batch = real_batch(screen, "diffusion.p_drop_cond=0.5", *words)
    known = made.vocabularies
    sizes = VocabSizes(len(known.perturbations), len(known.cell_types), len(known.batches))
    denoiser = Denoiser(config.denoiser, batch.n_genes, sizes)
    optimizer = make_optimizer(denoiser, config.optim)
    draws = training_draws(batch, config.diffusion, 0)
    DiffusionLoss(config.diffusion)(denoiser, batch, draws).total.sum().backward()
    optimizer.step()
    ema = EMA(denoiser, 0.99)

    memory = engine_memory("DDP", parameter_sizes(config, batch.n_genes, sizes), 1, 0, 0)
    weights = sum(p.nbytes for p in denoiser.parameters())
    assert memory.weights == weights
    assert memory.gradients == sum(p.grad.nbytes for p in denoiser.parameters())
    moments = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
    assert memory.optimizer == sum(t.nbytes for t in moments)
    assert memory.ema == sum(t.nbytes for t in ema.full().values())
    assert memory.total == memory.weights + memory.gradients + memory.optimizer + memory.ema


def allocated_peak(config: Config, denoiser: Denoiser, batch: CellSetBatch, seed: int) -> int:
    """Bytes that torch's profiler saw held at most in a forward and backward, besides weights and gradients."""
    for p in denoiser.parameters():  # there before, so that new ones pass
        p.grad = torch.zeros_like(p)
    loss = DiffusionLoss(config.diffusion)
    draws = training_draws(batch, config.diffusion, seed)
    all_see = replace(draws, self_cond=torch.ones_like(draws.self_cond))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with autocast_of_a_gpu(config.training.mixed_precision == "bf16"):
            output = loss(denoiser, batch, all_see)
        output.total.sum().backward()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    steps = np.array([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    # On the CPU the dense batch is numpy's memory, which the profiler does not see; the noise was there before.
    return int(steps.cumsum().max()) + 3 * 4 * batch.mask.numel() * batch.n_genes


@pytest.mark.parametrize("precision", ["'no'", "bf16"])
@pytest.mark.parametrize("seed", range(4))
def test_activations_are_within_two_per_cent_of_what_the_allocator_held(screen, seed, precision):
    rng = np.random.default_rng(seed)
    n_sets, set_size, depth = (int(rng.integers(*span)) for span in ((2, 7), (6, 20), (3, 6)))
    attention = rng.choice(["paired", "joint"])
    config, _, batch = real_batch(
        screen, f"data.set_size={set_size}", f"data.sets_per_batch={n_sets}", f"denoiser.depth={depth}",
        f"denoiser.width={8 * rng.integers(4, 9)}", f"denoiser.attention={attention}",
        f"training.mixed_precision={precision}",
    )  # fmt: skip
    batch = replace(batch, mask=torch.ones_like(batch.mask))
    denoiser = Denoiser(config.denoiser, batch.n_genes, SIZES)
    held = allocated_peak(config, denoiser, batch, seed)
    planned = measure_step(config, batch.n_genes, SIZES, n_sets).activations
    assert math.isclose(planned, held, rel_tol=0.02)


def test_gradients_are_no_activations():
    config = settings("data.set_size=2", "denoiser.width=64", "training.mixed_precision='no'")
    weights = 4 * sum(parameter_sizes(config, GENES, SIZES))
    assert measure_step(config, GENES, SIZES, 1).activations < weights / 2


def test_norms_run_in_float32_as_under_autocast_on_a_gpu_and_save_their_input_and_a_number_a_row():
    x, weight = torch.randn(6, 4, dtype=torch.bfloat16, requires_grad=True), torch.ones(4, requires_grad=True)
    for normalise, saved_numbers in (
        (lambda: F.layer_norm(x, (4,)), {(24, torch.float32): 1, (6, torch.float32): 2}),
        (
            lambda: F.rms_norm(x, (4,), weight, 1e-6),
            {(24, torch.float32): 1, (6, torch.float32): 1, (4, weight.dtype): 1},
        ),
    ):
        saved: list[torch.Tensor] = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)  # noqa: B023
        with autocast_of_a_gpu(), hooks:
            out = normalise()
        assert out.dtype == torch.float32
        assert Counter((t.numel(), t.dtype) for t in saved) == saved_numbers
        with autocast_of_a_gpu():
            assert F.linear(out, torch.randn(3, 4)).dtype == torch.bfloat16


def linear(rows: float, i: int, o: int) -> float:
    return 2.0 * rows * i * o


def denoiser_flops(config: Config, n_sets: int, g: int) -> tuple[float, float, float]:
    """Forward FLOPs of a paired denoiser by hand, and backward: of products, and of attention (2.5 times forward)."""
    c, s = config.denoiser, config.data.set_size
    d, hidden, rows = c.width, round(c.width * c.mlp_ratio), n_sets * s
    inputs = 3 * linear(rows, g, d)
    on_sets = linear(n_sets, 256, d) + linear(n_sets, d, d) + linear(n_sets, d, 2 * d)
    on_sets += linear(n_sets, d, d)  # the interaction of perturbations
    products = linear(rows, d, g)
    for i in range(c.depth):
        last = i == c.depth - 1
        streams = 1 if last else 2
        on_sets += linear(n_sets, d, (6 + (2 if last else 6)) * d)
        products += linear(rows, 2 * d, 6 * d) + linear(rows, 2 * d, 2 * d)
        products += streams * (linear(rows, d, hidden) + linear(rows, hidden, d))
    attention = c.depth * 2 * linear(rows, 2 * d, s)
    forward = inputs + on_sets + products + attention
    # Of each product, the gradients of both factors; of what enters the network and of the cosines of t, of weights.
    backward = inputs + 2 * (on_sets + products) - linear(n_sets, 256, d) + 2.5 * attention
    first = forward - linear(rows, g, d)  # without an estimate to see
    return forward, backward, first


def mmd_flops(n_sets: int, s: int, g: int) -> float:
    """Three distance matrices; the gradient of x-y to one side, of y-y to both."""
    return (3 + 1 + 2) * linear(n_sets * s, g, s)


@pytest.mark.parametrize(("n_sets", "s", "g", "depth"), [(1, 4, 7, 1), (3, 8, 30, 2), (5, 6, 50, 4)])
@pytest.mark.parametrize("precision", ["'no'", "bf16"])
def test_flops_are_those_counted_by_hand(n_sets, s, g, depth, precision):
    config = settings(f"data.set_size={s}", f"denoiser.depth={depth}", f"training.mixed_precision={precision}")
    cost = measure_step(config, g, SIZES, n_sets)
    forward, backward, first = denoiser_flops(config, n_sets, g)
    assert sum(cost.self_cond_flops.values()) == first
    if precision == "bf16":  # distances stay in float32
        assert cost.flops == {"bfloat16": forward + backward, "float32": mmd_flops(n_sets, s, g)}
    else:
        assert cost.flops == {"float32": forward + backward + mmd_flops(n_sets, s, g)}


def test_without_self_conditioning_the_step_has_no_first_estimate():
    with_it, without = (measure_step(settings(f"diffusion.p_self_cond={p}"), GENES, SIZES, 4) for p in (0.5, 0.0))
    assert with_it.flops == without.flops
    assert with_it.kernels > without.kernels


def test_activations_and_flops_are_proportional_to_the_sets_but_for_copies_of_the_weights():
    config = settings("training.mixed_precision=bf16")
    one, two, four = (measure_step(config, GENES, SIZES, n) for n in (8, 16, 32))
    assert 2 * sum(one.flops.values()) == sum(two.flops.values())
    assert math.isclose(four.activations - two.activations, 2 * (two.activations - one.activations), rel_tol=0.02)


def test_activations_grow_by_what_saves_each_gene_of_each_cell():
    config = settings("training.mixed_precision='no'")
    n = [measure_step(config, g, SIZES, 4).activations for g in (1000, 2000, 3000)]
    per_value = (n[1] - n[0]) / (1000 * 4 * 8)
    assert math.isclose(n[2] - n[1], n[1] - n[0], rel_tol=0.02)
    assert 6 * 4 <= per_value <= 12 * 4  # x0, control, noise, x_t, estimate, x0_pred at least, each float32


def test_a_recorder_sees_what_is_alive_together_and_leaves_out_what_it_is_told():
    known = torch.zeros(1000)
    with StepRecorder([known]) as recorder:
        a = known + 1  # 4,000 bytes
        b = a * 2  # 8,000
        view = b[:10]
        del a
        c = torch.cat([b, b])  # 12,000 with b
        del b, view
        d = torch.zeros(500)
    assert recorder.peak() == 12_000
    assert recorder.peak(besides=[c]) == 8_000
    assert recorder.peak(besides=[d]) == 12_000
    assert recorder.traffic == 8_000 + 8_000 + 16_000 + 2_000
    assert recorder.kernels == 4


@pytest.mark.parametrize("gpus", [1, 2, 3, 7, 64])
def test_parts_of_an_engine_are_rounded_up_and_shared(gpus):
    sizes = [101, 7, 1]
    n, part = 109, math.ceil(109 / gpus)
    ema = 4 * sum(math.ceil(size / gpus) for size in sizes)
    of = {engine: engine_memory(engine, sizes, gpus, 11, 13) for engine in ENGINES}
    assert [m.weights for m in of.values()] == [4 * n, 4 * (n + part), 4 * (n + part), 4 * (n + part)]
    assert [m.gradients for m in of.values()] == [4 * n, 4 * n, 4 * part, 4 * part]
    assert [m.optimizer for m in of.values()] == [8 * n, 8 * part, 8 * part, 8 * part]
    assert {m.ema for m in of.values()} == {ema}
    assert [m.buffers > 0 for m in of.values()] == [False, True, True, True]
    assert all(m.total == m.weights + m.gradients + m.optimizer + m.ema + m.buffers + 24 for m in of.values())


def test_one_gpu_sends_nothing_and_accumulation_makes_zero_2_and_3_send_more():
    assert {engine_link_bytes(engine, 1000, 1, 4, True) for engine in ENGINES} == {0}
    sent = {engine: [engine_link_bytes(engine, 1000, 4, parts, True) for parts in (1, 2)] for engine in ENGINES}
    once = 4 * 1000 * 3 / 4
    assert sent["DDP"] == sent["ZeRO-1"] == [2 * once, 2 * once]
    assert sent["ZeRO-2"] == [2 * once, 3 * once]
    assert sent["ZeRO-3"] == [3 * once, 6 * once]


def nbytes(batch: CellSetBatch) -> int:
    tensors = [getattr(cells, name) for cells in (batch.cells, batch.controls) for name in cells.__dataclass_fields__]
    labels = (batch.labels.perturbation, batch.labels.cell_type, batch.labels.batch)
    return sum(t.nbytes for t in (*tensors, batch.mask, *labels))


def test_host_bytes_are_those_of_a_batch_of_the_same_density(screen):
    config, _, batch = real_batch(screen, "data.set_size=5")
    assert batch.mask.all()
    n_sets = len(batch.mask)
    stored = (len(batch.cells.values) + len(batch.controls.values)) / (2 * batch.mask.numel())
    value_bytes = batch.cells.values.itemsize + batch.cells.genes.itemsize
    size = DataSize("test", 1, batch.n_genes, stored, value_bytes, 1.0, SIZES)
    assert round(batch_bytes(config, size, n_sets)) == nbytes(batch)


def test_sizes_of_a_screen_are_those_that_train_would_find(screen):
    config, made, _ = real_batch(screen)
    size = data_size(config)
    known = made.vocabularies
    assert size.vocabularies == VocabSizes(len(known.perturbations), len(known.cell_types), len(known.batches))
    assert size.n_genes == len(made.cells.genes)
    assert size.n_cells == made.train.index.n_cells[~made.train.index.is_control].sum()
    X = made.cells.X
    assert math.isclose(size.values_per_cell, X.nnz / X.shape[0], rel_tol=1e-6)


def test_sizes_of_atlases_are_counted_where_they_are_folders(tmp_path):
    atlas = write_atlas(tmp_path / "atlas")
    config = recipe("data.set_size=4", "data.control_match=batch")
    config.data.atlases = [AtlasConfig(path=str(atlas))]
    size = data_size(config)
    # 9 + 1 + 12 + 4 perturbed cells, A and B, NK and T, b1 and b2
    assert (size.n_cells, size.vocabularies, size.n_genes) == (26, VocabSizes(2, 2, 2), 20)
    assert size.with_controls == 1.0
    config.data.atlases = [AtlasConfig(path=str(atlas), sets="marginal")]
    marginal = data_size(config)
    assert (marginal.n_cells, marginal.vocabularies.perturbations, marginal.with_controls) == (44, 0, 0.0)


def test_labels_of_marginal_atlases_are_cell_types_only():
    config = recipe()
    [first] = config.data.atlases
    config.data.atlases = [replace(first, weight=3.0), replace(first, sets="marginal", weight=1.0)]
    size = data_size(config)
    assert size.vocabularies == VocabSizes(9, 8, 3)
    assert (size.n_cells, size.with_controls) == (2 * 10**6, 0.75)
    config.data.control_match = "cell_type"
    assert data_size(config).vocabularies.batches == 0


def test_fewer_genes_make_a_smaller_model_and_are_said_to_be_a_guess():
    size = data_size(recipe("data.n_hvg=100"))
    assert (size.n_genes, size.values_per_cell) == (100, 20)
    assert "100 of 300 genes" in size.notes[0]


def test_an_atlas_of_unknown_size_is_an_error_that_names_the_key():
    config = recipe()
    config.data.atlases = [config.data.atlases[0], AtlasConfig(path="nowhere/else")]
    with pytest.raises(ValueError, match=r"nowhere/else.*data\.atlases\[1\]\.expected"):
        data_size(config)


def test_atlases_must_share_their_genes():
    config = recipe()
    [first] = config.data.atlases
    config.data.atlases = [first, replace(first, expected=replace(first.expected, genes=301))]
    with pytest.raises(ValueError, match=r"genes \[300, 301\] must be the same"):
        data_size(config)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"gpu": "h1000"}, "'h1000' is not known; known are a100, .*h200"),
        ({"gpus": 0}, r"--gpus \(0\) must be greater than 0"),
        ({"efficiency": 1.5}, "at most 1"),
        ({"gpus_per_node": -1}, "--gpus-per-node"),
    ],
)
def test_a_cluster_that_cannot_be_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        Cluster(**{"gpus": 8, "gpu": "h100", **words})


def test_a_plan_adds_up():
    cluster = Cluster(16, "h100", efficiency=0.5)
    config = recipe("training.mixed_precision=bf16", "training.n_steps=1000")
    plan = make_plan(config, cluster)
    assert plan.engine == "DDP"
    assert all(plan.fits.values())
    assert (plan.sets_per_gpu, plan.cells_per_step) == (4, 64 * 16)
    cost = measure_step(config, 300, VocabSizes(9, 4, 3), 4)
    p = config.diffusion.p_self_cond
    flops = {kind: n + p * cost.self_cond_flops.get(kind, 0) for kind, n in cost.flops.items()}
    assert math.isclose(sum(plan.flops_per_cell.values()), sum(flops.values()) / (4 * 16))
    by_hand = (flops["bfloat16"] / 989e12 + flops["float32"] / 67e12) / 0.5
    assert math.isclose(plan.seconds["compute"], by_hand)
    assert math.isclose(plan.seconds["data"], 4 * 16 * 2 / 460_000)
    assert math.isclose(plan.seconds["gradients"], 2 * 15 / 16 * 4 * plan.n_parameters / 50e9)
    step = plan.cells_per_step / plan.cells_per_s
    assert step >= max(plan.seconds.values())
    assert math.isclose(plan.days * 86_400, 1000 * step)
    assert math.isclose(plan.epoch_days * 86_400, 10**6 / plan.cells_per_s)
    assert json.loads(json.dumps(plan.as_json()))["memory"]["DDP"]["total"] == plan.memory["DDP"].total


def test_accumulation_divides_activations_and_nothing_else():
    one = make_plan(recipe(), Cluster(4, "h100")).memory["DDP"]
    four = make_plan(recipe("training.accumulation_steps=4"), Cluster(4, "h100")).memory["DDP"]
    assert math.isclose(four.activations, one.activations / 4, rel_tol=0.05)
    assert replace(four, activations=one.activations) == one


def test_it_says_what_would_fit_where_ddp_does_not(monkeypatch):
    config = recipe("training.mixed_precision=bf16")
    whole = make_plan(config, Cluster(4, "h100")).memory
    cases = [(whole["DDP"].total, "memory: fits under DDP")]
    half = whole["DDP"].total - whole["DDP"].activations // 2 + 1_000_000
    cases.append((half, r"does not fit under DDP.*training\.accumulation_steps=\d+ does under DDP"))
    cases.append((1000, "does not fit under any engine"))
    for memory, said in cases:
        monkeypatch.setitem(GPUS, "h100", replace(GPUS["h100"], memory=memory))
        plan = make_plan(config, Cluster(4, "h100"))
        assert plan.fits["DDP"] == (memory == whole["DDP"].total)
        assert plan.verdicts[0] == next(v for v in plan.verdicts if v.startswith("memory:"))
        assert re.search(said, plan.verdicts[0])


def test_a_data_path_that_cannot_keep_up_sets_the_speed():
    slow = make_plan(recipe("data.streamed=true"), Cluster(8, "b200", cores_per_gpu=0.01))
    assert math.isclose(slow.cells_per_s, 8 * 0.01 * 40_000 / 2)
    assert any("the streamed atlas gives 3,200 on 0.08 cores" in v and "the GPUs wait" in v for v in slow.verdicts)
    fast = make_plan(recipe(), Cluster(8, "b200"))
    assert fast.read_possible == 8 * 460_000


def test_values_beyond_those_measured_slow_the_reading():
    sizes = {"cells": 10**6, "genes": 3000, "genes_per_cell": 2020}
    assert make_plan(recipe(expected=sizes), Cluster(8, "h100")).read_possible == 8 * 230_000


@pytest.mark.parametrize(
    ("gpus", "words", "said"),
    [
        (128, [], r"sets: data.sets_per_batch \(64\) is less than the GPUs: 64 of 128 idle"),
        (24, [], r"sets: data.sets_per_batch \(64\) is no multiple of 24 GPUs: 16 have one set more"),
        (24, ["data.streamed=true"], r"streams: 24 .*do not divide data.sets_per_batch \(64\): training will refuse"),
        (8, ["data.streamed=true", "data.n_streams=4"], r"streams: data.n_streams \(4\) is no multiple of 8"),
        (64, [], "gradients: .* at 50 GB/s"),
        (8, [], "gradients: .* at 450 GB/s"),
    ],
)
def test_it_warns_of_what_does_not_divide(gpus, words, said):
    plan = make_plan(recipe(*words), Cluster(gpus, "h100"))
    assert any(re.search(said, verdict) for verdict in plan.verdicts), plan.verdicts


@pytest.mark.parametrize(
    ("days", "text"), [(3.456, "3.5 days"), (0.5, "12 hours"), (1 / 24 / 60 * 7, "7 minutes"), (1e-5, "0.86 seconds")]
)
def test_durations_are_told_in_their_unit(days, text):
    assert duration(days) == text


def test_compiled_runs_are_not_told_to_compile():
    slow = [
        next(v for v in make_plan(recipe(*words), Cluster(1, "h100")).verdicts if v.startswith("launches"))
        for words in ([], ["training.compile=true"])
    ]
    assert ["training.compile=true" in verdict for verdict in slow] == [True, False]


def test_a_step_without_warnings_says_no_more_than_memory_data_and_gradients():
    plan = make_plan(recipe(), Cluster(1, "h100"))
    assert not any(verdict.startswith(("sets:", "streams:", "gradients:")) for verdict in plan.verdicts)
