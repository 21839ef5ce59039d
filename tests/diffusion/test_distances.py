"""Distances against double loops in float64 and the published numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from perturbdiff.diffusion.distances import cell_distances, energy_distance, energy_mmd, energy_of, mse
from tests.cell_sets import cells, random_mask

ENERGY_TAGS = [
    "random", "identical", "all_zero", "S1", "dup_target", "collapsed_pred", "different_N", "large_offset",
    "dim2_single", "nan_pred_one_set",
]  # fmt: skip
# Of value and gradient, where squares cancel in float32: cells far from the origin, equal cells. It differs between
# processors, and the published value itself is 7e-3 from that in float64.
ROUNDED = {"large_offset": (1e-2, 1e-4), "collapsed_pred": (1e-4, 5e-5)}
TOLERANCE = 3e-4  # float32 leaves the distance of a cell to itself at some 1e-4


# Double loops. The floor of a distance in the loss, 1e-4, is the published one.


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return max(math.dist(a, b), 1e-4)


def mean_of_pairs(x: np.ndarray, y: np.ndarray) -> float:
    return math.fsum(distance(a, b) for a in x for b in y) / (len(x) * len(y))


def loop_mmd(x: np.ndarray, y: np.ndarray) -> float:
    return mean_of_pairs(x, y) - (mean_of_pairs(x, x) + mean_of_pairs(y, y)) / 2


def mean_of_distinct(x: np.ndarray) -> float:
    return math.fsum(math.dist(a, b) for i, a in enumerate(x) for b in x[:i]) / math.comb(len(x), 2)


def loop_energy(x: np.ndarray, y: np.ndarray) -> float:
    between = math.fsum(math.dist(a, b) for a in x for b in y) / (len(x) * len(y))
    return 2 * between - mean_of_distinct(x) - mean_of_distinct(y)


def slope_by_differences(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Central differences of `loop_mmd` in y, float64."""
    slope, step = np.zeros_like(y), 1e-6
    for index in np.ndindex(*y.shape):
        up, down = y.copy(), y.copy()
        up[index] += step
        down[index] -= step
        slope[index] = (loop_mmd(x, up) - loop_mmd(x, down)) / (2 * step)
    return slope


# MMD^2 of the loss.


@pytest.mark.parametrize("tag", ENERGY_TAGS)
def test_energy_mmd_and_its_gradient_equal_the_published_ones(golden, agree, tag):
    numbers = {k.removeprefix(f"{tag}."): v for k, v in golden("energy_tiny").items() if k.startswith(f"{tag}.")}
    y = numbers["y"].requires_grad_()
    value = energy_mmd(numbers["x"], y)
    value.nansum().backward()
    assert torch.equal(value.isnan(), numbers["value"].isnan())
    assert value.isnan().any() == (tag == "nan_pred_one_set")
    atol, atol_of_gradient = ROUNDED.get(tag, (1e-4, 1e-5))
    agree(value, numbers["value"], "value", atol=atol)
    agree(y.grad, numbers["grad_y_of_sum"], "gradient", atol=atol_of_gradient)


@pytest.mark.parametrize(("n_x", "n_y", "n_genes"), [(6, 6, 5), (9, 4, 17), (3, 8, 1), (2, 1, 30), (1, 1, 8)])
def test_energy_mmd_equals_the_double_loop_over_cells(n_x, n_y, n_genes):
    x, y = cells(3, n_x, n_genes, seed=1), cells(3, n_y, n_genes, seed=2) + 0.05
    expected = [loop_mmd(x[b].double().numpy(), y[b].double().numpy()) for b in range(3)]
    np.testing.assert_allclose(energy_mmd(x, y).numpy(), expected, atol=TOLERANCE)
    assert min(expected) > 10 * TOLERANCE
    for b in range(3):  # a set alone
        assert energy_mmd(x[b], y[b]).shape == ()
        torch.testing.assert_close(energy_mmd(x[b], y[b]), energy_mmd(x, y)[b], rtol=0, atol=TOLERANCE)


def test_masked_energy_mmd_and_its_gradient_are_those_of_the_real_cells():
    x, y = cells(4, 7, 4, seed=3), cells(4, 9, 4, seed=4) + 0.05
    x_mask, y_mask = random_mask([7, 5, 3, 2], 7), random_mask([2, 9, 6, 1], 9)
    y.requires_grad_()
    value = energy_mmd(x, y, x_mask, y_mask)
    value.sum().backward()
    for b in range(4):
        real_x, real_y = x[b, x_mask[b]].double().numpy(), y[b, y_mask[b]].detach().double().numpy()
        assert value[b].item() == pytest.approx(loop_mmd(real_x, real_y), abs=TOLERANCE)
        np.testing.assert_allclose(y.grad[b, y_mask[b]].numpy(), slope_by_differences(real_x, real_y), atol=1e-3)
        assert y.grad[b, y_mask[b]].abs().max() > 0.05
    one_mask = loop_mmd(x[1, x_mask[1]].double().numpy(), y[1].detach().double().numpy())
    assert energy_mmd(x, y, x_mask)[1].item() == pytest.approx(one_mask, abs=TOLERANCE)
    assert abs(energy_mmd(x, y)[1].item() - one_mask) > 3 * TOLERANCE


@pytest.mark.parametrize("function", [energy_mmd, mse, energy_distance])
def test_masked_cells_have_no_influence_and_no_gradient(function):
    x, y = cells(3, 6, 5, seed=7), cells(3, 6, 5, seed=8)
    mask = random_mask([4, 2, 6], 6)
    masks = (mask,) if function is mse else (mask, mask)
    junk = 1e3 * torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(9))
    values, gradients = [], []
    for other in (torch.zeros_like(junk), junk, -junk):
        one = torch.where(mask[..., None], x, other)
        two = torch.where(mask[..., None], y, other + 1)
        if function is energy_distance:  # a score
            values.append(function(one, two, *masks))
            continue
        value = function(one, two.requires_grad_(), *masks)
        value.sum().backward()
        assert not two.grad[~mask].any()
        values.append(value.detach())
        gradients.append(two.grad[mask])
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], rtol=0, atol=1e-6)
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("n_x", "n_y"), [(0, 4), (4, 0), (0, 0)])
def test_energy_mmd_to_an_empty_set_is_0_with_finite_gradients(n_x, n_y):
    x, y = cells(2, 5, 6, seed=10, scale=3), cells(2, 5, 6, seed=11, scale=3).requires_grad_()
    value = energy_mmd(x, y, random_mask([n_x, 5], 5), random_mask([n_y, 5], 5))
    value.sum().backward()
    assert value[0] == 0
    assert value[1] > 0
    assert y.grad.isfinite().all()
    assert not y.grad[0].any()
    assert y.grad[1].any()


@pytest.mark.parametrize("unbiased", [False, True])
def test_the_gradient_of_energy_mmd_is_that_of_autograd(unbiased):
    """Also of equal cells, whose distance is at its floor, and of sets whose values count differently."""
    x, y = cells(4, 6, 5, seed=12).double(), cells(4, 7, 5, seed=13).double()
    y[0, 1], y[1, 2] = y[0, 0], x[1, 3]
    x_mask, y_mask = random_mask([6, 5, 3, 1], 6), random_mask([7, 4, 1, 2], 7)
    of_sets = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    slopes = []
    for distance_in_torch in (False, True):
        own = y.clone().requires_grad_()
        if distance_in_torch:
            value = mmd_in_torch(x, own, x_mask, y_mask, unbiased)
        else:
            value = energy_mmd(x, own, x_mask, y_mask, unbiased)
        (value * of_sets).sum().backward()
        slopes.append(own.grad)
    torch.testing.assert_close(*slopes, rtol=1e-6, atol=1e-9)


def mmd_in_torch(x: Tensor, y: Tensor, x_mask: Tensor, y_mask: Tensor, unbiased: bool) -> Tensor:
    def mean(a: Tensor, b: Tensor) -> Tensor:
        return (a[:, None] - b[None]).square().sum(-1).clamp_min(1e-8).sqrt().mean()

    values = []
    for b in range(len(x)):
        one, other = x[b][x_mask[b]], y[b][y_mask[b]]
        distinct = len(other) / (len(other) - 1) if unbiased and len(other) > 1 else 1.0
        values.append(mean(one, other) - mean(one, one) / 2 - distinct * mean(other, other) / 2)
    return torch.stack(values)


def test_energy_mmd_under_bf16_autocast_is_that_in_float32():
    x = cells(3, 32, 200, seed=25)
    y = (x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(26))).requires_grad_()
    expected = energy_mmd(x, y)
    (slope,) = torch.autograd.grad(expected.sum(), y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = energy_mmd(x, y)
    (slope_there,) = torch.autograd.grad(value.sum(), y)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(slope_there, slope)


def test_without_self_pairs_energy_mmd_is_a_mean_over_distinct_cells():
    x, y = cells(4, 6, 5, seed=1), cells(4, 6, 5, seed=2)
    mask = random_mask([6, 3, 2, 1], 6)
    unbiased = energy_mmd(x, y, mask, mask, unbiased=True)
    for b in range(4):
        one, other = (values[b][mask[b]].double().numpy() for values in (x, y))
        within = mean_of_distinct(other) if len(other) > 1 else 0.0
        expected = mean_of_pairs(one, other) - mean_of_pairs(one, one) / 2 - within / 2
        assert unbiased[b].item() == pytest.approx(expected, abs=2e-4)


def test_only_without_self_pairs_is_energy_mmd_least_for_sets_as_wide_as_the_target():
    """Sets of 8 drawn with another width: with self-pairs narrower ones score best."""
    target = cells(400, 8, 3, seed=3) - 0.15
    drawn = cells(400, 8, 3, seed=4) - 0.15
    widths = torch.linspace(0.7, 1.3, 25)
    biased = [energy_mmd(target, drawn * w).mean().item() for w in widths]
    unbiased = [energy_mmd(target, drawn * w, unbiased=True).mean().item() for w in widths]
    assert widths[np.argmin(biased)] < 0.95
    assert abs(widths[np.argmin(unbiased)] - 1) < 0.05


# MSE.


def test_mse_is_the_mean_over_real_cells_and_genes():
    x, y, mask = cells(3, 6, 5, seed=14).double(), cells(3, 6, 5, seed=15).double(), random_mask([6, 3, 1], 6)
    expected = [np.mean((x[b, mask[b]].numpy() - y[b, mask[b]].numpy()) ** 2) for b in range(3)]
    np.testing.assert_allclose(mse(x, y, mask).numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(mse(x, y)[1].item(), np.mean((x[1] - y[1]).numpy() ** 2), rtol=1e-12)


def test_mse_gradient_passes_gradcheck_and_an_empty_set_has_neither():
    x, mask = cells(3, 4, 5, seed=16).double(), random_mask([4, 2, 0], 4)
    y = cells(3, 4, 5, seed=17).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda y: mse(x, y, mask), y)
    value = mse(x, y, mask)
    value.sum().backward()
    assert value[2] == 0
    assert not y.grad[2].any()


# The energy distance of the scores.


@pytest.mark.parametrize(("change", "tolerance"), [(Tensor.double, 1e-12), (Tensor.float, 3e-6)])
@pytest.mark.parametrize("shift", [0.0, 5.0])  # far from the origin squares cancel
def test_energy_distance_equals_the_double_loop_over_distinct_real_cells(
    change: Callable[[Tensor], Tensor], tolerance: float, shift: float
):
    x, y = change(cells(4, 7, 30, seed=1).double() + shift), change(cells(4, 9, 30, seed=2).double() + shift + 0.05)
    x_mask, y_mask = random_mask([7, 5, 3, 2], 7), random_mask([2, 9, 6, 3], 9)
    found = energy_distance(x, y, x_mask, y_mask)
    assert found.dtype == torch.float64
    for b in range(4):
        real_x, real_y = x[b, x_mask[b]], y[b, y_mask[b]]
        expected = loop_energy(real_x.double().numpy(), real_y.double().numpy())
        assert found[b].item() == pytest.approx(expected, abs=tolerance)
        assert energy_distance(real_x, real_y).item() == pytest.approx(expected, abs=tolerance)  # a set alone


def test_energy_distance_of_fewer_than_two_cells_is_nan():
    x, y = cells(4, 5, 6), cells(4, 5, 6, seed=1)
    found = energy_distance(x, y, random_mask([1, 5, 0, 2], 5), random_mask([5, 1, 0, 2], 5))
    assert found.isnan().tolist() == [True, True, True, False]


def test_energy_distance_of_one_distribution_is_zero_on_average_for_few_cells():
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(2000, n, 3, generator=generator, dtype=torch.float64) for n in (4, 9)]
    found = energy_distance(*drawn)
    assert abs(found.mean()) < 3 * found.std() / math.sqrt(2000)
    assert (found < 0).any()


def test_energy_distance_keeps_its_precision_far_from_the_origin():
    x, y = cells(20, 5, seed=3).double(), cells(30, 5, seed=4).double()
    assert energy_distance(x + 1e5, y + 1e5).item() == pytest.approx(energy_distance(x, y).item(), abs=1e-8)


def test_of_more_than_500_cells_500_are_taken_by_one_fixed_seed_for_each_side():
    x, y = cells(520, 3, seed=5).numpy(), cells(510, 3, seed=6).numpy()
    kept = [
        torch.from_numpy(side[np.random.default_rng(seed).choice(len(side), 500, replace=False)]).double()
        for seed, side in ((1, x), (2, y))
    ]
    distances = cell_distances(x, y)
    assert [values.shape for values in distances] == [(500, 500)] * 3
    assert energy_of(distances).item() == pytest.approx(energy_distance(*kept).item(), abs=1e-12)
