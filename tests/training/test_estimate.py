from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from perturbdiff.config import AtlasConfig, Config, load_config
from perturbdiff.data.batch import CellSetBatch
from perturbdiff.data.screen import Screen
from perturbdiff.diffusion.draws import training_draws
from perturbdiff.diffusion.losses import DiffusionLoss
from perturbdiff.nn.conditioning import VocabSizes
from perturbdiff.nn.denoiser import Denoiser
from perturbdiff.training.dataset import TrainingSet
from perturbdiff.training.ema import EMA
from perturbdiff.training.estimate import (
    ENGINES,
    GPUS,
    Cluster,
    DataSize,
    GpuNorms,
    _Counter,
    batch_bytes,
    data_size,
    engine_link_bytes,
    engine_memory,
    estimate,
    step_work,
)
from perturbdiff.training.optim import make_optimizer
from tests.atlases import write_atlas
from tests.simulated import tiny_config, write_screen

pytestmark = pytest.mark.slow

SIZE = DataSize("test", n_cells=1, n_genes=30, values_per_cell=6.0, with_controls=1.0, labels=VocabSizes(5, 3, 2))


def settings(*words: str) -> Config:
    small = ["out=unused", "data.screen=unused", "data.set_size=8", "denoiser.width=16", "denoiser.depth=2"]
    return load_config(None, [*small, "denoiser.n_heads=2", *words])


def recipe(*words: str, expected: dict[str, int] | None = None) -> Config:
    """Of an atlas that is nowhere."""
    sizes = {"cells": 10**6, "genes": 300, "genes_per_cell": 60, "perturbations": 9, "cell_types": 4, "batches": 3}
    atlas = {"path": "nowhere/atlas", "expected": expected or sizes}
    given = {"out": "unused", "data": {"atlases": [atlas], "n_hvg": None, "set_size": 16, "sets_per_batch": 64}}
    return load_config(None, ["denoiser.width=32", "denoiser.depth=1", "denoiser.n_heads=2", *words], given)


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    return write_screen(tmp_path_factory.mktemp("estimate"))


def real_batch(screen, *words: str) -> tuple[Config, TrainingSet, CellSetBatch]:
    config = tiny_config(screen, screen.parent / "run", *words, hold_out=())
    made = TrainingSet.from_screen(Screen.read(screen, config.data), config)
    return config, made, made.train.batch(made.train.sampler(config), 0, 0, 0, 1)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["denoiser.depth=3", "denoiser.mlp_ratio=2.5"],
        ["denoiser.conditioning=reference", "denoiser.output=direct", "denoiser.parallel_block=false"],
        ["denoiser.conditioning=reference", "denoiser.batch_encoding=none"],
    ],
)
def test_weights_gradients_moments_and_average_take_the_bytes_they_take_in_a_step(screen, words):
    config, made, batch = real_batch(screen, "diffusion.p_drop_cond=0.5", *words)
    size = replace(SIZE, n_genes=batch.n_genes, labels=VocabSizes.from_vocabularies(made.vocabularies))
    denoiser = Denoiser(config.denoiser, batch.n_genes, size.labels)
    optimizer = make_optimizer(denoiser, config.optim)
    draws = training_draws(batch, config.diffusion, 0)
    DiffusionLoss(config.diffusion)(denoiser, batch, draws).total.sum().backward()
    optimizer.step()
    ema = EMA(denoiser, 0.99)

    parameters = step_work(config, size, 1).parameters
    assert list(parameters) == [p.numel() for p in denoiser.parameters()]
    memory = engine_memory("DDP", parameters, 1, 0, 0)
    assert memory["weights"] == sum(p.nbytes for p in denoiser.parameters())
    assert memory["gradients"] == sum(p.grad.nbytes for p in denoiser.parameters())
    moments = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
    assert memory["optimizer"] == sum(t.nbytes for t in moments)
    assert memory["ema"] == sum(t.nbytes for t in ema.full().values())
    assert memory["total"] == memory["weights"] + memory["gradients"] + memory["optimizer"] + memory["ema"]


def allocated_peak(config: Config, denoiser: Denoiser, batch: CellSetBatch, seed: int) -> int:
    """Bytes that torch's profiler saw held at most in a forward and backward, besides weights and gradients."""
    for p in denoiser.parameters():  # there before, so that new ones pass
        p.grad = torch.zeros_like(p)
    loss = DiffusionLoss(config.diffusion)
    draws = training_draws(batch, config.diffusion, seed)
    all_see = replace(draws, self_cond=torch.arange(len(draws.t)))
    in_bf16 = config.training.mixed_precision == "bf16"
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler, GpuNorms():
        with torch.autocast("cpu", torch.bfloat16, in_bf16):
            output = loss(denoiser, batch, all_see)
        output.total.sum().backward()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    steps = np.array([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    # On the CPU the dense batch is numpy's memory, which the profiler does not see.
    return int(steps.cumsum().max()) + 2 * 4 * batch.mask.numel() * batch.n_genes


@pytest.mark.parametrize("precision", ["'no'", "bf16"])
@pytest.mark.parametrize("seed", range(2))
def test_activations_are_within_two_per_cent_of_what_the_allocator_held(screen, seed, precision):
    rng = np.random.default_rng(seed)
    n_sets, set_size, depth = (int(rng.integers(*span)) for span in ((2, 7), (6, 20), (3, 6)))
    config, made, batch = real_batch(
        screen, f"data.set_size={set_size}", f"data.sets_per_batch={n_sets}", f"denoiser.depth={depth}",
        f"denoiser.width={8 * rng.integers(4, 9)}", f"training.mixed_precision={precision}",
    )  # fmt: skip
    batch = replace(batch, mask=torch.ones_like(batch.mask))
    size = replace(SIZE, n_genes=batch.n_genes, labels=VocabSizes.from_vocabularies(made.vocabularies))
    denoiser = Denoiser(config.denoiser, batch.n_genes, size.labels)
    held = allocated_peak(config, denoiser, batch, seed)
    assert math.isclose(step_work(config, size, n_sets).activations, held, rel_tol=0.02)


def test_gradients_are_no_activations():
    config = settings("data.set_size=2", "denoiser.width=64", "training.mixed_precision=no")
    work = step_work(config, SIZE, 1)
    assert work.activations < 4 * sum(work.parameters) / 2


def test_activations_of_one_more_set_are_those_of_any_other():
    config = settings("training.mixed_precision=bf16")
    two, four, eight = (step_work(config, SIZE, n).activations for n in (4, 8, 16))
    assert math.isclose(eight - four, 2 * (four - two), rel_tol=0.02)


def linear(rows: float, i: int, o: int) -> float:
    return 2.0 * rows * i * o


def denoiser_flops(config: Config, n_sets: int, g: int) -> tuple[float, float, float]:
    """Forward FLOPs of a denoiser by hand, and backward: of products, and of attention (2.5 times forward)."""
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
    """Three distance matrices; the gradients of x-y and of y-y, to y."""
    return (3 + 2) * linear(n_sets * s, g, s)


@pytest.mark.parametrize(
    ("n_sets", "s", "g", "depth", "precision", "p_first"),
    [(1, 4, 7, 1, "'no'", 0.5), (3, 8, 30, 2, "bf16", 0.25), (5, 6, 50, 4, "bf16", 0)],
)
def test_flops_are_those_counted_by_hand(n_sets, s, g, depth, precision, p_first):
    words = f"data.set_size={s}", f"denoiser.depth={depth}", f"diffusion.p_self_cond={p_first}"
    config = settings(*words, f"training.mixed_precision={precision}")
    work = step_work(config, replace(SIZE, n_genes=g), n_sets)
    forward, backward, first = denoiser_flops(config, n_sets, g)
    whole = forward + backward + p_first * first
    if precision == "bf16":  # distances stay in float32
        assert work.flops == {"bfloat16": whole, "float32": mmd_flops(n_sets, s, g)}
    else:
        assert work.flops == {"float32": whole + mmd_flops(n_sets, s, g)}


def test_bytes_alive_together_and_moved_are_those_counted_by_hand():
    layer = nn.Linear(1000, 1, bias=False)
    with _Counter(layer) as counter, torch.no_grad():
        a = layer.weight + 1  # 4,000 bytes
        b = a * 2  # 8,000
        view = b[:10]
        del a
        c = torch.cat([b, b])  # 12,000 with b
        del b, view
        d = c.new_zeros(500)  # 10,000
    assert counter.peak == 12_000
    assert counter.traffic == 8_000 + 8_000 + 16_000 + (8_000 + 2_000)
    assert counter.operations == 4
    assert len(d) == 500


@pytest.mark.parametrize("gpus", [1, 2, 3, 7, 64])
def test_parts_of_an_engine_are_rounded_up_and_shared(gpus):
    sizes = [101, 7, 1]
    n, part = 109, math.ceil(109 / gpus)
    ema = 4 * sum(math.ceil(size / gpus) for size in sizes)
    found = {engine: engine_memory(engine, sizes, gpus, 11, 13) for engine in ENGINES}
    by_part = {name: [memory[name] for memory in found.values()] for name in found["DDP"]}
    assert by_part["weights"] == [4 * n, 4 * (n + part), 4 * (n + part), 4 * (n + part)]
    assert by_part["gradients"] == [4 * n, 4 * n, 4 * part, 4 * part]
    assert by_part["optimizer"] == [8 * n, 8 * part, 8 * part, 8 * part]
    assert by_part["ema"] == [ema] * 4
    assert [buffer > 0 for buffer in by_part["buffers"]] == [False, True, True, True]
    assert all(2 * memory["total"] == sum(memory.values()) for memory in found.values())


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


def test_a_batch_takes_the_bytes_of_one_of_an_atlas_of_the_same_density(tmp_path):
    config = recipe("data.set_size=1", "data.sets_per_batch=9")
    config.data.atlases = [AtlasConfig(path=str(write_atlas(tmp_path / "atlas")))]
    train = TrainingSet.from_atlases(config).train
    batch = train.batch(train.sampler(config), 0, 0, 0, 1)
    assert batch.mask.all()
    stored = (len(batch.cells.values) + len(batch.controls.values)) / (2 * batch.mask.numel())
    size = replace(SIZE, n_genes=batch.n_genes, values_per_cell=stored)
    noise = training_draws(batch, config.diffusion, 0).noise
    assert round(batch_bytes(config, size, 9)) == nbytes(batch) + noise.nbytes


def test_sizes_of_a_screen_are_those_that_train_would_find(screen):
    config, made, _ = real_batch(screen)
    size = data_size(config)
    assert size.labels == VocabSizes.from_vocabularies(made.vocabularies)
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
    assert (size.n_cells, size.labels, size.n_genes) == (26, VocabSizes(2, 2, 2), 20)
    assert size.with_controls == 1.0
    stored = np.diff(TrainingSet.from_atlases(config).cells.take(np.arange(44)).indptr)
    assert size.values_per_cell == np.maximum(stored, 1).mean()  # an empty cell counts as one value
    config.data.atlases = [AtlasConfig(path=str(atlas), sets="marginal")]
    marginal = data_size(config)
    assert (marginal.n_cells, marginal.labels.perturbations, marginal.with_controls) == (44, 0, 0.0)


def test_labels_of_marginal_atlases_are_cell_types_only():
    config = recipe()
    [first] = config.data.atlases
    config.data.atlases = [replace(first, weight=3.0), replace(first, sets="marginal", weight=1.0)]
    size = data_size(config)
    assert size.labels == VocabSizes(9, 8, 3)
    assert (size.n_cells, size.with_controls) == (2 * 10**6, 0.75)
    assert any(note.startswith("labels: counted as if") for note in estimate(config, Cluster(1, "h100")).notes)
    config.data.control_match = "cell_type"
    assert data_size(config).labels.batches == 0


def test_fewer_genes_make_a_smaller_model_and_it_notes_what_it_guessed():
    found = estimate(recipe("data.n_hvg=100"), Cluster(1, "h100"))
    assert (found.data.n_genes, found.data.values_per_cell) == (100, 20)
    assert any(note.startswith("genes:") for note in found.notes)
    whole = estimate(recipe("data.n_hvg=300"), Cluster(1, "h100"))
    assert not any(note.startswith("genes:") for note in whole.notes)


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


def test_an_estimate_adds_up():
    config = recipe("training.mixed_precision=bf16", "training.n_steps=1000")
    found = estimate(config, Cluster(16, "h100", efficiency=0.5))
    assert found.engine == "DDP"
    assert all(found.fits.values())
    assert (found.sets_per_gpu, found.cells_per_step) == (4, 64 * 16)
    work = step_work(config, found.data, 4)
    assert found.memory["DDP"]["activations"] == work.activations
    assert found.memory["DDP"]["batch"] == round(batch_bytes(config, found.data, 4) * (1 + config.data.prefetch))
    assert math.isclose(sum(found.flops_per_cell.values()), sum(work.flops.values()) / (4 * 16))
    seconds = {
        "compute": (work.flops["bfloat16"] / 989e12 + work.flops["float32"] / 67e12) / 0.5,
        "memory traffic": work.traffic / 3.35e12,
        "launches": work.operations * 5e-6,
        "optimizer": found.n_parameters * 4 * (10 + 3 / 16) / 3.35e12,
        "network": 2 * 15 / 16 * 4 * found.n_parameters / 50e9,
        "data": 4 * 16 * 2 * (0.185e-6 + 60 * 1.97e-9),
    }
    trained = seconds["launches"] + seconds["optimizer"]
    # Weights, average and two moments copied at 8 GB/s each ten minutes, in which there are more than 200 steps.
    seconds["saves"] = 4 * 4 * found.n_parameters / 8e9 / (600 / trained)
    # Two of 32 sets on each, each 50 steps: ten calls to generate, and one for the loss.
    seconds["validation"] = 11 * work.estimate.operations * 5e-6 / 50
    assert 4 * work.estimate.operations < work.operations
    assert found.seconds == pytest.approx(seconds)
    step = found.cells_per_step / found.cells_per_s
    assert math.isclose(step, trained + seconds["saves"] + seconds["validation"])
    assert found.limit == "launches"
    assert seconds["launches"] > seconds["compute"] + seconds["memory traffic"]
    assert math.isclose(found.days * 86_400, 1000 * step)
    assert math.isclose(found.epoch_days * 86_400, 10**6 / found.cells_per_s)
    assert json.loads(json.dumps(asdict(found)))["memory"]["DDP"] == found.memory["DDP"]


def test_accumulation_divides_activations_and_nothing_else():
    one = estimate(recipe(), Cluster(4, "h100")).memory["DDP"]
    four = estimate(recipe("training.accumulation_steps=4"), Cluster(4, "h100")).memory["DDP"]
    assert math.isclose(four["activations"], one["activations"] / 4, rel_tol=0.05)
    changed = one["total"] - four["total"]
    assert changed == one["activations"] - four["activations"]


@pytest.mark.parametrize("less", [0.3, 0.8])
def test_what_it_proposes_where_ddp_does_not_fit_does_fit(monkeypatch, less):
    config, cluster = recipe("training.mixed_precision=bf16"), Cluster(4, "h100")
    whole = estimate(config, cluster).memory["DDP"]
    monkeypatch.setitem(GPUS, "h100", GPUS["h100"]._replace(memory=whole["total"] - less * whole["activations"]))
    found = estimate(config, cluster)
    assert not found.fits["DDP"]
    proposed = re.search(r"^memory: does not fit under DDP.*(training\.accumulation_steps=\d+) does", found.notes[0])
    assert estimate(recipe("training.mixed_precision=bf16", proposed[1]), cluster).fits["DDP"]


@pytest.mark.parametrize(
    ("memory", "note"),
    [(80e9, "^memory: fits under DDP"), (1000, "^memory: does not fit under any engine, and even one set at a time")],
)
def test_it_tells_what_fits(monkeypatch, memory, note):
    monkeypatch.setitem(GPUS, "h100", GPUS["h100"]._replace(memory=memory))
    found = estimate(recipe(), Cluster(4, "h100"))
    assert re.search(note, found.notes[0])
    assert (found.limit == "memory") == (memory == 1000)


def test_a_large_model_does_not_fit_whole_and_fits_in_shares():
    words = "denoiser.width=6144", "denoiser.depth=2", "data.set_size=1"
    found = estimate(recipe(*words), Cluster(64, "a100-40gb"))
    assert found.fits == {"DDP": False, "ZeRO-1": True, "ZeRO-2": True, "ZeRO-3": True}
    assert found.engine == "ZeRO-1"
    assert "; ZeRO-1 does" in found.notes[0]


def test_data_that_cannot_keep_up_set_the_speed():
    slow = estimate(
        recipe("data.streamed=true", "split.validation_fraction=0"), Cluster(8, "b200", cores_per_gpu=0.005)
    )
    # 80,000 cells of 1,010 values a core and second, here of 60; saves take a little
    assert math.isclose(slow.cells_per_s, 8 * 0.005 * 80_000 * (1010 / 60) / 2, rel_tol=1e-3)
    assert slow.limit == "data"
    assert any(re.search("limit: data, .*GPUs wait 9.% of the time; data.streamed=false", n) for n in slow.notes)


@pytest.mark.parametrize(("values", "cells_per_s"), [(160, 2_000_000), (1010, 460_000)])
def test_cells_are_read_as_fast_as_was_measured_by_their_stored_values(values, cells_per_s):
    sizes = {"cells": 10**6, "genes": 3000, "genes_per_cell": values}
    found = estimate(recipe(expected=sizes), Cluster(8, "h100")).seconds["data"]
    assert found == pytest.approx(8 * 16 * 2 / cells_per_s, rel=0.01)


def test_products_and_other_operations_add_up_where_the_gpu_is_slower_than_the_host():
    words = "denoiser.width=1024", "denoiser.depth=2", "data.set_size=256", "split.validation_fraction=0"
    found = estimate(recipe(*words), Cluster(1, "h100"))
    on_gpu = found.seconds["compute"] + found.seconds["memory traffic"]
    assert on_gpu > found.seconds["launches"]
    step = found.cells_per_step / found.cells_per_s
    assert step == pytest.approx(on_gpu + found.seconds["optimizer"] + found.seconds["saves"])
    assert found.limit in ("compute", "memory traffic")


@pytest.mark.parametrize(
    ("gpus", "words", "note"),
    [
        (128, [], r"idle: 64 of 128 processes have nothing to do: a step is 64 sets \(data.sets_per_batch\); raise it"),
        (24, [], r"sets: data.sets_per_batch \(64\) is no multiple of 24 GPUs: 16 have one set more"),
        (24, ["data.streamed=true"], r"streams: 24 .*do not divide data.sets_per_batch \(64\): training will refuse"),
        (8, ["data.streamed=true", "data.n_streams=4"], r"idle: 4 of 8 .* in 4 streams \(.*, or start 4$"),
        (5, ["data.streamed=true", "data.n_streams=8"], r"streams: data.n_streams \(8\) is no multiple of 5 GPUs"),
        (8, [], r"limit: launches.*; training.compile=true makes fewer; more sets"),
        (8, ["training.compile=true"], r"limit: launches, [\d.]+ ms a step of operations; more sets"),
        (8, ["adapt.method=frozen", "adapt.init_from=x"], "adapt: counted as if all weights train"),
    ],
)
def test_it_notes_what_to_change(gpus, words, note):
    found = estimate(recipe(*words), Cluster(gpus, "h100"))
    assert any(re.match(note, text) for text in found.notes), found.notes


def test_gpus_without_a_stream_make_the_others_no_faster():
    words = ["data.streamed=true", "data.n_streams=8"]
    few, many = (estimate(recipe(*words), Cluster(n, "h100", gpus_per_node=64)) for n in (8, 64))
    assert few.sets_per_gpu == many.sets_per_gpu == 8
    assert many.cells_per_s == pytest.approx(few.cells_per_s, rel=0.05)


def test_saves_that_follow_each_other_take_their_time():
    seldom, often = (
        estimate(
            recipe("denoiser.width=256", "training.save_every=1", f"training.save_minutes={minutes}"),
            Cluster(8, "h100"),
        )
        for minutes in (10, 0)
    )
    step = sum(often.seconds[part] for part in ("launches", "optimizer"))
    copied, written = 16 * seldom.n_parameters / 8e9, 20 * seldom.n_parameters / 1e9
    assert written > step  # and the next save waits for it
    assert often.seconds["saves"] == pytest.approx(copied + written - step)
    assert seldom.seconds["saves"] < 1e-3 * copied


def test_a_recipe_without_faults_gets_no_more_notes_than_memory_and_limit():
    found = estimate(recipe(), Cluster(1, "h100"))
    assert [note.split(":")[0] for note in found.notes] == ["memory", "limit"]


def test_validation_costs_what_its_calls_of_the_denoiser_do():
    words = "denoiser.width=1024", "denoiser.depth=2", "data.set_size=256", "training.validate_sets=64"
    found = [
        estimate(recipe(*words, *more), Cluster(1, "h100")).seconds
        for more in ((), ("sampling.guidance_scale=1.0",), ("training.validate_every=100",))
    ]
    once, guided, seldom = (of["validation"] for of in found)
    # Without a gradient, a first estimate and what comes of it, a call is about a quarter of a step.
    assert 11 / 6 < 50 * once / (found[0]["compute"] + found[0]["memory traffic"]) < 11 / 3
    assert guided == pytest.approx(once * 21 / 11)
    assert seldom == pytest.approx(once / 2)
