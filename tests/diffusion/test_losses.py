"""Distances against double loops in float64 and the published numbers; the loss against both."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from perturbdiff.config import DiffusionConfig, Preprocessing
from perturbdiff.data.batch import CellSetBatch, SparseCells
from perturbdiff.data.vocab import NULL, Labels
from perturbdiff.diffusion.distances import (
    MMD,
    energy_distance,
    laplace_mmd,
    mse,
    pairwise_distance,
    rbf_mmd,
    self_pairs,
    squared_mean_distance,
)
from perturbdiff.diffusion.draws import Draws, training_draws, validation_draws
from perturbdiff.diffusion.losses import DiffusionLoss
from perturbdiff.reference.convert import denoiser_from_reference

DISTANCES = [energy_distance, rbf_mmd, laplace_mmd]
CASES = ["selfcond_off", "selfcond_on", "dropcond", "dropctrl_selfcond_on"]
ENERGY_TAGS = [
    "random", "identical", "all_zero", "S1", "dup_target", "collapsed_pred", "different_N", "large_offset",
    "dim2_single", "nan_pred_one_set",
]  # fmt: skip


def cells(*shape: int, seed: int = 0, scale: float = 0.3) -> Tensor:
    return scale * torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def random_mask(sizes: list[int], places: int, seed: int = 0) -> Tensor:
    """Real cells at random places."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.rand(places, generator=generator).argsort() < n for n in sizes])


# Double loops. The floor of a distance, 1e-4, is the published one.


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return max(math.dist(a, b), 1e-4)


def mean_of_pairs(f: Callable[[np.ndarray, np.ndarray], float], x: np.ndarray, y: np.ndarray) -> float:
    return math.fsum(f(a, b) for a in x for b in y) / (len(x) * len(y))


def loop_energy_distance(x: np.ndarray, y: np.ndarray) -> float:
    within = mean_of_pairs(distance, x, x) + mean_of_pairs(distance, y, y)
    return mean_of_pairs(distance, x, y) - within / 2


def loop_mmd(kernel: Callable[[np.ndarray, np.ndarray], float], x: np.ndarray, y: np.ndarray) -> float:
    return mean_of_pairs(kernel, x, x) + mean_of_pairs(kernel, y, y) - 2 * mean_of_pairs(kernel, x, y)


def loop_rbf_mmd(x: np.ndarray, y: np.ndarray) -> float:
    scale = mean_of_pairs(lambda a, b: math.dist(a, b) ** 2, x, x)
    return loop_mmd(lambda a, b: sum(math.exp(-(math.dist(a, b) ** 2) / scale / m) for m in (0.5, 1, 2)) / 3, x, y)


def loop_laplace_mmd(x: np.ndarray, y: np.ndarray) -> float:
    scale = mean_of_pairs(distance, x, x)
    return loop_mmd(lambda a, b: sum(math.exp(-distance(a, b) / scale / m) for m in (0.5, 1, 2)) / 3, x, y)


# float32 leaves the distance of a cell to itself at some 1e-4; the Laplace kernel divides it by the spread.
TOLERANCE = {energy_distance: 3e-4, rbf_mmd: 3e-4, laplace_mmd: 2e-3}
LOOPS = {energy_distance: loop_energy_distance, rbf_mmd: loop_rbf_mmd, laplace_mmd: loop_laplace_mmd}


def slope_by_differences(f: Callable[[np.ndarray, np.ndarray], float], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Central differences of f in y, float64."""
    slope, step = np.zeros_like(y), 1e-6
    for place in np.ndindex(*y.shape):
        up, down = y.copy(), y.copy()
        up[place] += step
        down[place] -= step
        slope[place] = (f(x, up) - f(x, down)) / (2 * step)
    return slope


# Distances.


@pytest.mark.parametrize("tag", ENERGY_TAGS)
def test_energy_distance_and_its_gradient_equal_the_published_ones(golden, agree, tag):
    numbers = {k.removeprefix(f"{tag}."): v for k, v in golden("energy_tiny").items() if k.startswith(f"{tag}.")}
    y = numbers["y"].requires_grad_()
    value = energy_distance(numbers["x"], y)
    value.nansum().backward()
    assert torch.equal(value.isnan(), numbers["value"].isnan())
    assert value.isnan().any() == (tag == "nan_pred_one_set")
    agree(value, numbers["value"], "value")
    agree(y.grad, numbers["grad_y_of_sum"], "gradient", atol=1e-5)


@pytest.mark.parametrize("function", DISTANCES)
@pytest.mark.parametrize(("n_x", "n_y", "n_genes"), [(6, 6, 5), (9, 4, 17), (3, 8, 1), (2, 1, 30)])
def test_distance_equals_the_double_loop_over_cells(function, n_x, n_y, n_genes):
    x, y = cells(3, n_x, n_genes, seed=1), cells(3, n_y, n_genes, seed=2) + 0.05
    expected = [LOOPS[function](x[b].double().numpy(), y[b].double().numpy()) for b in range(3)]
    np.testing.assert_allclose(function(x, y).numpy(), expected, atol=TOLERANCE[function])
    assert min(expected) > 10 * TOLERANCE[function]


@pytest.mark.parametrize("function", DISTANCES)
def test_masked_distance_equals_the_double_loop_over_real_cells(function):
    x, y = cells(4, 7, 11, seed=3), cells(4, 9, 11, seed=4) + 0.05
    x_mask, y_mask = random_mask([7, 5, 3, 2], 7), random_mask([2, 9, 6, 1], 9)
    expected = [
        LOOPS[function](x[b, x_mask[b]].double().numpy(), y[b, y_mask[b]].double().numpy()) for b in range(len(x))
    ]
    np.testing.assert_allclose(function(x, y, x_mask, y_mask).numpy(), expected, atol=TOLERANCE[function])
    one_mask = LOOPS[function](x[1, x_mask[1]].double().numpy(), y[1].double().numpy())
    assert function(x, y, x_mask)[1].item() == pytest.approx(one_mask, abs=TOLERANCE[function])
    assert abs(function(x, y)[1].item() - one_mask) > 3 * TOLERANCE[function]


@pytest.mark.parametrize("function", DISTANCES)
@pytest.mark.parametrize(("n_x", "n_y"), [(5, 5), (6, 3)])
def test_gradient_equals_differences_of_the_double_loop(function, n_x, n_y):
    x, y = cells(2, n_x + 2, 4, seed=5), cells(2, n_y + 1, 4, seed=6) + 0.05
    x_mask, y_mask = random_mask([n_x, n_x], n_x + 2), random_mask([n_y, n_y], n_y + 1)
    y.requires_grad_()
    function(x, y, x_mask, y_mask).sum().backward()
    for b in range(2):
        real_x, real_y = x[b, x_mask[b]].double().numpy(), y[b, y_mask[b]].detach().double().numpy()
        expected = slope_by_differences(LOOPS[function], real_x, real_y)
        assert abs(expected).max() > 0.05
        np.testing.assert_allclose(y.grad[b, y_mask[b]].numpy(), expected, atol=1e-3)


@pytest.mark.parametrize("function", [*DISTANCES, mse])
def test_masked_cells_have_no_influence_and_no_gradient(function):
    x, y = cells(3, 6, 5, seed=7), cells(3, 6, 5, seed=8)
    mask = random_mask([4, 1, 6], 6)
    masks = (mask,) if function is mse else (mask, mask)
    junk = 1e3 * torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(9))
    values, gradients = [], []
    for other in (torch.zeros_like(junk), junk, -junk):
        one = torch.where(mask[..., None], x, other).requires_grad_()
        two = torch.where(mask[..., None], y, other + 1).requires_grad_()
        value = function(one, two, *masks)
        value.sum().backward()
        assert not one.grad[~mask].any()
        assert not two.grad[~mask].any()
        values.append(value.detach())
        gradients.append(two.grad[mask])
    for value, gradient in zip(values[1:], gradients[1:], strict=True):
        torch.testing.assert_close(value, values[0], rtol=0, atol=1e-7)
        torch.testing.assert_close(gradient, gradients[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("function", DISTANCES)
@pytest.mark.parametrize(("n_x", "n_y"), [(0, 4), (4, 0), (0, 0)])
def test_distance_to_an_empty_set_is_0_with_finite_gradients(function, n_x, n_y):
    x, y = cells(2, 5, 6, seed=10, scale=3).requires_grad_(), cells(2, 5, 6, seed=11, scale=3).requires_grad_()
    value = function(x, y, random_mask([n_x, 5], 5), random_mask([n_y, 5], 5))
    value.sum().backward()
    assert value[0] == 0
    assert value[1] > 0
    for gradient in (x.grad, y.grad):
        assert gradient.isfinite().all()
        assert not gradient[0].any()
        assert gradient[1].any()


def test_mse_of_an_empty_set_is_0_with_no_gradient():
    x, y = cells(2, 4, 3, seed=12), cells(2, 4, 3, seed=13).requires_grad_()
    value = mse(x, y, random_mask([0, 4], 4))
    value.sum().backward()
    assert value[0] == 0
    assert value[1] > 0
    assert not y.grad[0].any()


def test_mse_is_the_mean_over_real_cells_and_genes():
    x, y, mask = cells(3, 6, 5, seed=14).double(), cells(3, 6, 5, seed=15).double(), random_mask([6, 3, 1], 6)
    expected = [np.mean((x[b, mask[b]].numpy() - y[b, mask[b]].numpy()) ** 2) for b in range(3)]
    np.testing.assert_allclose(mse(x, y, mask).numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(mse(x, y)[1].item(), np.mean((x[1] - y[1]).numpy() ** 2), rtol=1e-12)


def test_mse_gradient_passes_gradcheck():
    x, mask = cells(3, 4, 5, seed=16).double(), random_mask([4, 2, 0], 4)
    y = cells(3, 4, 5, seed=17).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda y: mse(x, y, mask), y)


@pytest.mark.parametrize("function", DISTANCES)
@pytest.mark.parametrize("n_cells", [1, 2, 7])
def test_identical_sets_are_at_distance_0_with_no_gradient(function, n_cells):
    x = cells(3, n_cells, 20, seed=18)
    y = x.clone().requires_grad_()
    value = function(x, y)
    value.sum().backward()
    torch.testing.assert_close(value, torch.zeros(3), rtol=0, atol=1e-4)
    assert y.grad.abs().max() < 1e-2 * cells_gradient_scale(function, x)


def cells_gradient_scale(function: Callable[..., Tensor], x: Tensor) -> Tensor:
    """Largest slope of the distance a little way off."""
    y = (x + 0.1).requires_grad_()
    function(x, y).sum().backward()
    return y.grad.abs().max().clamp_min(1e-3)


@pytest.mark.parametrize("function", DISTANCES)
def test_sets_of_zeros_are_at_distance_0_with_finite_gradients(function):
    x, y = torch.zeros(2, 5, 7), torch.zeros(2, 5, 7, requires_grad=True)
    value = function(x, y)
    value.sum().backward()
    torch.testing.assert_close(value, torch.zeros(2), rtol=0, atol=1e-6)
    assert y.grad.isfinite().all()


@pytest.mark.parametrize("n_genes", [1, 8, 300])
def test_energy_distance_of_single_cells_is_their_distance(n_genes):
    x, y = cells(6, 1, n_genes, seed=19), cells(6, 1, n_genes, seed=20) + 1
    expected = [math.dist(x[b, 0].tolist(), y[b, 0].tolist()) for b in range(6)]
    np.testing.assert_allclose(energy_distance(x, y).numpy(), expected, atol=1e-2)


@pytest.mark.parametrize("function", [rbf_mmd, laplace_mmd])
@pytest.mark.parametrize("scale", [0.3, 30.0])
def test_kernel_mmd_to_a_single_cell_is_bounded_with_finite_gradients(function, scale):
    # One cell has no spread, so the bandwidth is that of rounding; a kernel still lies between 0 and 1.
    x, y = cells(40, 1, 50, seed=21, scale=scale), cells(40, 6, 50, seed=22, scale=scale).requires_grad_()
    value = function(x, y)
    value.sum().backward()
    assert value.isfinite().all()
    assert (value >= -1e-6).all()
    assert (value <= 2).all()
    assert y.grad.isfinite().all()


@pytest.mark.parametrize("function", DISTANCES)
def test_distance_is_that_of_the_set_alone(function):
    x, y = cells(4, 5, 6, seed=23), cells(4, 3, 6, seed=24) + 0.05
    together = function(x, y)
    for b in range(4):
        alone = function(x[b], y[b])
        assert alone.shape == ()
        torch.testing.assert_close(alone, together[b], rtol=0, atol=TOLERANCE[function])


@pytest.mark.parametrize("function", DISTANCES)
def test_distance_under_bf16_autocast_is_that_in_float32(function):
    x = cells(3, 32, 200, seed=25)
    y = (x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(26))).requires_grad_()
    expected = function(x, y)
    (slope,) = torch.autograd.grad(expected.sum(), y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = function(x, y)
    (slope_there,) = torch.autograd.grad(value.sum(), y)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(slope_there, slope)


@pytest.mark.parametrize("function", DISTANCES)
def test_distance_takes_float64_cells(function):
    x, y = cells(2, 5, 6, seed=27), cells(2, 5, 6, seed=28) + 0.05
    torch.testing.assert_close(function(x.double(), y.double()).float(), function(x, y))


def test_pairwise_distance_equals_the_double_loop():
    x, y = cells(2, 4, 9, seed=29), cells(2, 6, 9, seed=30)
    expected = [[[math.dist(a, b) for b in y[s].tolist()] for a in x[s].tolist()] for s in range(2)]
    np.testing.assert_allclose(pairwise_distance(x, y).numpy(), expected, atol=1e-5)


# The loss.


def batch_of(x0: Tensor, control: Tensor, labels: Labels, mask: Tensor | None = None) -> CellSetBatch:
    """A batch that gives exactly these cells where they are real."""
    n_sets, set_size, n_genes = x0.shape
    mask = torch.ones(n_sets, set_size, dtype=torch.bool) if mask is None else mask
    place = mask.flatten().nonzero()[:, 0]

    def sparse(dense: Tensor) -> SparseCells:
        return SparseCells(
            position=place,
            indptr=torch.arange(len(place) + 1) * n_genes,
            genes=torch.arange(n_genes).repeat(len(place)),
            values=dense[mask].flatten(),
            library_size=torch.ones(len(place)),
        )

    return CellSetBatch(
        cells=sparse(x0),
        controls=sparse(control),
        mask=mask,
        labels=labels,
        n_genes=n_genes,
        preprocessing=Preprocessing("log1p", target_sum=1e4, scale=1.0),
        keys=tuple((0, b) for b in range(n_sets)),
        conditions=tuple(range(n_sets)),
    )


def numbered_labels(n_sets: int) -> Labels:
    number = torch.arange(n_sets)
    return Labels(number[:, None], number, number)


class PublishedDenoiser(nn.Module):
    """The published denoiser behind the loss: set b's label is b, which picks its covariate embedding."""

    def __init__(self, numbers: dict[str, Tensor], hide_condition: bool) -> None:
        super().__init__()
        weights = {name: tensor for name, tensor in numbers.items() if name.startswith("model.")}
        self.denoiser = denoiser_from_reference(weights, n_heads=4)
        self.cov = None if hide_condition else numbers["in.batch_emb"]
        self.outputs: list[Tensor] = []

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        control: Tensor,
        labels: Labels,
        self_cond: Tensor | None,
        mask: Tensor,
        control_mask: Tensor,
    ) -> Tensor:
        cov = None if self.cov is None else self.cov[labels.perturbation[:, 0]]
        self.outputs.append(self.denoiser(x_t, t, control, cov, self_cond, mask, control_mask))
        return self.outputs[-1]


def published_case(numbers: dict[str, Tensor], case: str) -> tuple[PublishedDenoiser, CellSetBatch, Draws]:
    denoiser = PublishedDenoiser(numbers, hide_condition=case == "dropcond")
    control = numbers["in.cont_emb"] * (0 if case.startswith("dropctrl") else 1)
    labels = numbered_labels(3)
    batch = batch_of(numbers["in.x_start"], control, labels)
    self_cond = torch.full((3,), case.endswith("selfcond_on"))
    return denoiser, batch, Draws(numbers["in.t"], numbers["in.noise"].float(), self_cond, labels)


@pytest.mark.parametrize("case", CASES)
def test_loss_equals_the_published_one(golden, agree, case):
    numbers = golden("loss_tiny")
    denoiser, batch, draws = published_case(numbers, case)
    loss = DiffusionLoss(DiffusionConfig())(denoiser, batch, draws)
    agree(loss.mse, numbers[f"{case}.mse1"], "mse")
    agree(loss.mmd, numbers[f"{case}.mmd1_list"], "mmd of each set")
    agree(loss.mmd.mean(), numbers[f"{case}.mmd1"], "mmd")
    agree(loss.total.mean(), numbers[f"{case}.total"], "total")
    agree(denoiser.outputs[-1], numbers[f"{case}.model_out_x"], "denoiser")
    assert len(denoiser.outputs) == 1 + case.endswith("selfcond_on")
    if case.endswith("selfcond_on"):
        agree(denoiser.outputs[0], numbers[f"{case}.selfcond_x0"], "first estimate")


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_the_loss_equal_the_published_ones(golden, agree, case):
    numbers = golden("loss_tiny")
    denoiser, batch, draws = published_case(numbers, case)
    DiffusionLoss(DiffusionConfig())(denoiser, batch, draws).total.mean().backward()
    gradient = {
        name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in denoiser.denoiser.named_parameters()
    }
    # One published vector is added to both embedded streams; here it is part of both biases.
    shared = gradient["embed_x.bias"] + gradient["embed_control.bias"]
    control = gradient["embed_control.weight"]
    published = {
        "x_embedder.weight": torch.cat([gradient["embed_x.weight"], gradient["embed_self_cond.weight"]], dim=1),
        "x_control_embedder.weight": torch.cat([control, torch.zeros_like(control)], dim=1),
        "gene_embedding.null_emb.weight": shared[None],
        "t_embedder.mlp.0.weight": gradient["embed_t.mlp.0.weight"],
        "class_embedding.emb.weight": gradient["conditioning.linear.weight"],
        "class_embedding.null_emb.weight": gradient["conditioning.null"][None],
        "blocks.0.block.attn.qkv.weight": gradient["blocks.0.attention.attention.qkv.weight"],
        "final_layer.linear.weight": gradient["head.weight"],
    }
    stored = {k.removeprefix(f"{case}.grad."): v for k, v in numbers.items() if k.startswith(f"{case}.grad.")}
    assert len(stored) == 7
    for name, tensor in stored.items():
        agree(published[name], tensor, name)
    # Published weights that are not here have no gradient, but for the shared vector.
    squares = [g.double().square().sum() for g in (*gradient.values(), shared)]
    agree(torch.stack(squares).sum().sqrt(), numbers[f"{case}.grad_norm_total"], "norm of all gradients")


class Recorded(nn.Module):
    """A denoiser with one weight that keeps its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7))
        self.calls: list[dict[str, object]] = []

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        control: Tensor,
        labels: Labels,
        self_cond: Tensor | None,
        mask: Tensor,
        control_mask: Tensor,
    ) -> Tensor:
        names = ("x_t", "t", "control", "labels", "self_cond", "mask", "control_mask", "gradient")
        values = (x_t, t, control, labels, self_cond, mask, control_mask, torch.is_grad_enabled())
        self.calls.append(dict(zip(names, values, strict=True)))
        estimate = self.weight * x_t + 0.1 * control + 0.001 * t[:, None, None]
        return estimate if self_cond is None else estimate + 0.5 * self_cond


def fresh_case(n_sets: int = 4, sizes: list[int] | None = None, seed: int = 0) -> tuple[CellSetBatch, Draws]:
    x0, control = cells(n_sets, 6, 5, seed=seed), cells(n_sets, 6, 5, seed=seed + 1)
    labels = numbered_labels(n_sets)
    mask = torch.arange(6)[None] < torch.tensor(sizes or [6] * n_sets)[:, None]
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed + 2))
    t = torch.arange(n_sets) * 200
    return batch_of(x0, control, labels, mask), Draws(t, noise, torch.zeros(n_sets, dtype=torch.bool), labels)


@pytest.mark.parametrize("kernel", ["energy", "rbf", "laplace"])
def test_loss_is_the_weighted_sum_of_mse_and_the_chosen_mmd(kernel):
    batch, draws = fresh_case()
    config = DiffusionConfig(mse_weight=0.3, mmd_weight=2.0, kernel=kernel)
    denoiser = Recorded()
    loss = DiffusionLoss(config)(denoiser, batch, draws)
    x0, _ = batch.dense()
    x0_pred = denoiser(denoiser.calls[0]["x_t"], draws.t, denoiser.calls[0]["control"], None, None, None, None).detach()
    for b in range(4):
        one, other = x0[b].double().numpy(), x0_pred[b].double().numpy()
        assert loss.mse[b].item() == pytest.approx(np.mean((one - other) ** 2), abs=1e-5)
        assert loss.mmd[b].item() == pytest.approx(LOOPS[MMD[kernel]](one, other), abs=TOLERANCE[MMD[kernel]])
    torch.testing.assert_close(loss.total, 0.3 * loss.mse + 2.0 * loss.mmd)


def test_without_self_pairs_the_energy_distance_is_a_mean_over_distinct_cells():
    x, y = cells(4, 6, 5, seed=1), cells(4, 6, 5, seed=2)
    mask = random_mask([6, 3, 2, 1], 6)
    unbiased = energy_distance(x, y, mask, mask) - self_pairs(y, mask)
    for b in range(4):
        one, other = (of[b][mask[b]].double().numpy() for of in (x, y))
        n = len(other)
        distinct = [distance(other[i], other[j]) for i in range(n) for j in range(n) if i != j]
        within = math.fsum(distinct) / (n * (n - 1)) if n > 1 else 0.0
        expected = mean_of_pairs(distance, one, other) - mean_of_pairs(distance, one, one) / 2 - within / 2
        assert unbiased[b].item() == pytest.approx(expected, abs=2e-4)


def test_only_the_unbiased_energy_is_least_for_sets_as_wide_as_the_target():
    """Sets of 8 drawn with another width: with self-pairs narrower ones score best."""
    target = cells(400, 8, 3, seed=3) - 0.15
    drawn = cells(400, 8, 3, seed=4) - 0.15
    widths = torch.linspace(0.7, 1.3, 25)
    biased = [energy_distance(target, drawn * w).mean().item() for w in widths]
    unbiased = [(energy_distance(target, drawn * w) - self_pairs(drawn * w)).mean().item() for w in widths]
    assert widths[np.argmin(biased)] < 0.95
    assert abs(widths[np.argmin(unbiased)] - 1) < 0.05


def test_mean_distance_is_that_of_the_means_of_real_cells():
    x, y = cells(3, 5, 4, seed=1), cells(3, 5, 4, seed=2)
    mask = random_mask([5, 2, 0], 5)
    distances = squared_mean_distance(x, y, mask)
    for b in range(2):
        one, other = (of[b][mask[b]].double().numpy().mean(0) for of in (x, y))
        assert distances[b].item() == pytest.approx(math.dist(one, other) ** 2, rel=1e-4)
    assert distances[2] == 0


def test_the_loss_with_all_its_parts_is_their_sum():
    batch, draws = fresh_case(sizes=[6, 3, 4, 2])
    denoiser = Recorded()
    plain = DiffusionLoss(DiffusionConfig())(denoiser, batch, draws)
    x0, _ = batch.dense()
    x0_pred = denoiser(*list(denoiser.calls[0].values())[:7]).detach()
    config = DiffusionConfig(unbiased=True, mean_weight=3.0)
    full = DiffusionLoss(config)(Recorded(), batch, draws)
    torch.testing.assert_close(full.mmd, plain.mmd - self_pairs(x0_pred, batch.mask))
    torch.testing.assert_close(full.total, full.mse + full.mmd + 3 * squared_mean_distance(x0, x0_pred, batch.mask))


def test_with_whole_counts_the_mmd_sees_rounded_estimates_and_the_gradient_their_mean():
    batch, draws = fresh_case(sizes=[6, 3, 4, 2])
    config = DiffusionConfig(whole_counts=True, mse_weight=0.0)
    drawn = training_draws(batch, config, 3).rounding
    assert drawn.shape == (*batch.mask.shape, batch.n_genes)
    assert training_draws(batch, DiffusionConfig(), 3).rounding is None

    class Estimate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x0_pred = nn.Parameter(cells(4, 6, batch.n_genes, seed=9, scale=0.05))

        def forward(self, *args: object) -> Tensor:
            return self.x0_pred

    estimate = Estimate()
    loss = DiffusionLoss(config)(estimate, batch, replace(draws, rounding=drawn))
    x0, _ = batch.dense()
    one = batch.one_count()[..., None]
    x0_pred = estimate.x0_pred.detach()
    rounded = torch.where(x0_pred < one, torch.where(drawn * one < x0_pred, one, 0.0), x0_pred).requires_grad_()
    expected = energy_distance(x0, rounded, batch.mask, batch.mask)
    torch.testing.assert_close(loss.mmd, expected)
    loss.total.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(estimate.x0_pred.grad, rounded.grad)
    assert (rounded != x0_pred).any()


def test_loss_of_the_true_set_is_0():
    batch, draws = fresh_case(sizes=[6, 3, 1, 0])

    class Oracle(Recorded):
        def forward(self, *args: object) -> Tensor:
            return batch.dense()[0]

    loss = DiffusionLoss(DiffusionConfig())(Oracle(), batch, draws)
    torch.testing.assert_close(loss.mse, torch.zeros(4), rtol=0, atol=0)
    torch.testing.assert_close(loss.mmd, torch.zeros(4), rtol=0, atol=1e-5)


def test_only_chosen_sets_see_their_own_first_estimate():
    batch, draws = fresh_case(sizes=[6, 4, 6, 2])
    chosen = torch.tensor([True, False, False, True])
    denoiser = Recorded()
    loss = DiffusionLoss(DiffusionConfig())(denoiser, batch, Draws(draws.t, draws.noise, chosen, draws.labels))
    loss.total.sum().backward()
    first, second = denoiser.calls
    assert not first["gradient"]
    assert second["gradient"]
    assert first["self_cond"] is None
    assert first["t"].tolist() == [0, 600]
    assert first["labels"].perturbation[:, 0].tolist() == [0, 3]
    assert first["mask"].sum(1).tolist() == [6, 2]
    estimate = denoiser(*list(first.values())[:7]).detach()
    torch.testing.assert_close(second["self_cond"][chosen], estimate)
    assert not second["self_cond"][~chosen].any()
    assert not second["self_cond"].requires_grad


def test_without_self_conditioning_the_denoiser_is_called_once():
    batch, draws = fresh_case()
    denoiser = Recorded()
    DiffusionLoss(DiffusionConfig())(denoiser, batch, draws)
    assert len(denoiser.calls) == 1
    assert not denoiser.calls[0]["self_cond"].any()


def test_denoiser_is_given_the_drawn_labels_and_both_masks():
    batch, draws = fresh_case(sizes=[6, 4, 1, 0])
    hidden = Labels(torch.full((4, 1), NULL), torch.full((4,), NULL), torch.full((4,), NULL))
    denoiser = Recorded()
    DiffusionLoss(DiffusionConfig())(denoiser, batch, Draws(draws.t, draws.noise, draws.self_cond, hidden))
    assert denoiser.calls[0]["labels"] is hidden
    for name in ("mask", "control_mask"):
        assert torch.equal(denoiser.calls[0][name], batch.mask)
    x0, control = batch.dense()
    assert torch.equal(denoiser.calls[0]["control"], control)
    signal = torch.from_numpy(np.sqrt(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))[draws.t])[:, None, None]
    expected = signal * x0 + (1 - signal**2).sqrt() * draws.noise
    torch.testing.assert_close(denoiser.calls[0]["x_t"], expected.float())


@pytest.mark.parametrize("kernel", ["energy", "rbf", "laplace"])
def test_estimates_at_padded_places_do_not_reach_the_loss(kernel):
    batch, draws = fresh_case(sizes=[6, 4, 1, 0])

    class Littering(Recorded):
        def forward(self, x_t: Tensor, *args: Tensor) -> Tensor:
            junk = self.litter * torch.randn(x_t.shape, generator=torch.Generator().manual_seed(5))
            return self.weight * torch.where(batch.mask[..., None], x_t, junk)

    results = []
    for litter in (0.0, 1.0, 100.0):
        denoiser = Littering()
        denoiser.litter = litter
        loss = DiffusionLoss(DiffusionConfig(kernel=kernel))(denoiser, batch, draws)
        loss.total.sum().backward()
        assert loss.total[3] == 0
        results.append(torch.cat([loss.total.detach(), denoiser.weight.grad[None]]))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def test_loss_of_a_set_does_not_depend_on_the_other_sets():
    batch, draws = fresh_case(sizes=[6, 4, 5, 2])
    self_cond = torch.tensor([True, False, True, False])
    loss = DiffusionLoss(DiffusionConfig())(Recorded(), batch, Draws(draws.t, draws.noise, self_cond, draws.labels))
    x0, control = batch.dense()
    for b in range(4):
        one = slice(b, b + 1)
        alone = DiffusionLoss(DiffusionConfig())(
            Recorded(),
            batch_of(x0[one], control[one], batch.labels.select(one), batch.mask[one]),
            Draws(draws.t[one], draws.noise[one], self_cond[one], draws.labels.select(one)),
        )
        torch.testing.assert_close(alone.total, loss.total[one])


# Draws.


def keyed_batch(keys: list[tuple[int, int]]) -> CellSetBatch:
    labels = Labels(
        torch.tensor([[number, number + 1] for _, number in keys]),
        torch.tensor([number for _, number in keys]),
        torch.tensor([number for _, number in keys]),
    )
    return replace(batch_of(torch.zeros(len(keys), 2, 3), torch.zeros(len(keys), 2, 3), labels), keys=tuple(keys))


@pytest.mark.parametrize("draw", [training_draws, validation_draws])
def test_draws_of_a_set_depend_on_its_key_alone(draw):
    keys = [(1, n) for n in range(40)]
    together = draw(keyed_batch(keys), DiffusionConfig(), 7)
    for b in (0, 17, 39):
        alone = draw(keyed_batch([keys[b]]), DiffusionConfig(), 7)
        assert torch.equal(alone.t, together.t[b : b + 1])
        assert torch.equal(alone.noise, together.noise[b : b + 1])
        assert torch.equal(alone.self_cond, together.self_cond[b : b + 1])
        for name in ("perturbation", "cell_type", "batch"):
            assert torch.equal(getattr(alone.labels, name), getattr(together.labels, name)[b : b + 1])
    assert together.noise.unique().numel() == together.noise.numel()


def test_draws_change_with_seed_and_epoch():
    reference = training_draws(keyed_batch([(1, 5)]), DiffusionConfig(), 7).noise
    assert not torch.equal(reference, training_draws(keyed_batch([(2, 5)]), DiffusionConfig(), 7).noise)
    assert not torch.equal(reference, training_draws(keyed_batch([(1, 5)]), DiffusionConfig(), 8).noise)


def test_training_draws_have_the_configured_frequencies():
    config = DiffusionConfig(
        n_timesteps=10, p_self_cond=0.7, p_drop_cond=0.3, p_drop_label=0.1, p_drop_perturbation=0.2
    )
    n = 4000
    draws = training_draws(keyed_batch([(0, number) for number in range(n)]), config, 3)
    labels = draws.labels
    hidden_labels = {
        "perturbation": (labels.perturbation == NULL).all(1),
        "cell_type": labels.cell_type == NULL,
        "batch": labels.batch == NULL,
    }
    p_drop = {"perturbation": 0.2, "cell_type": 0.1, "batch": 0.1}
    events = [(draws.self_cond, 0.7), (labels.hidden, 0.3), *((hidden_labels[kind], p_drop[kind]) for kind in p_drop)]
    for event, p in events:
        assert event.float().mean().item() == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / n))
    for (one, p), (other, q) in combinations(events, 2):  # independent: both as often as the product says
        both = (one & other).float().mean().item()
        assert both == pytest.approx(p * q, abs=5 * math.sqrt(p * q * (1 - p * q) / n))
    counts = torch.bincount(draws.t, minlength=10)
    assert len(counts) == 10
    assert (counts - n / 10).abs().max() < 5 * math.sqrt(n * 0.1 * 0.9)
    assert draws.noise.mean().item() == pytest.approx(0, abs=5 / math.sqrt(draws.noise.numel()))
    assert draws.noise.var().item() == pytest.approx(1, abs=5 * math.sqrt(2 / draws.noise.numel()))


def test_unlabelled_sets_are_drawn_by_themselves_and_move_no_other_draw():
    n, config = 2000, DiffusionConfig(p_unlabelled=0.3)
    batch = keyed_batch([(0, number) for number in range(n)])
    plain, described = training_draws(batch, config, 3), training_draws(batch, config, 3, with_features=True)
    assert plain.labels.unlabelled is None
    unlabelled = described.labels.unlabelled
    assert unlabelled.float().mean().item() == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / n))
    for name in ("t", "noise", "self_cond"):
        assert torch.equal(getattr(plain, name), getattr(described, name))
    assert torch.equal(plain.labels.perturbation, described.labels.perturbation)
    alone = training_draws(keyed_batch([(0, 7)]), config, 3, with_features=True)
    assert alone.labels.unlabelled.tolist() == [bool(unlabelled[7])]


def test_a_hidden_perturbation_hides_all_its_parts_and_a_kept_one_none():
    labels = training_draws(keyed_batch([(0, n) for n in range(50)]), DiffusionConfig(p_drop_label=0.5), 3).labels
    hidden = labels.perturbation == NULL
    assert torch.equal(hidden[:, 0], hidden[:, 1])
    assert 0 < hidden[:, 0].sum() < 50
    kept = ~hidden[:, 0]
    assert torch.equal(labels.perturbation[kept, 0], torch.arange(50)[kept])


def test_validation_draws_hide_nothing_and_spread_t_over_the_schedule():
    batch = keyed_batch([(0, n) for n in range(24)])
    draws = validation_draws(batch, DiffusionConfig(n_timesteps=1000), 3, n_t=8)
    assert draws.labels is batch.labels
    assert not draws.self_cond.any()
    values, counts = draws.t.unique(return_counts=True)
    assert counts.tolist() == [3] * 8
    assert values.diff().tolist() == [125] * 7
    assert values[0] == 999 - values[-1]
