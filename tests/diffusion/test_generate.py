"""Which controls predicted cells start from, and what the denoiser is asked."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from perturbdiff.config import DiffusionConfig, SamplingConfig
from perturbdiff.data.vocab import NULL
from perturbdiff.diffusion.generate import (
    MAX_VALUES_PER_CHUNK,
    _chunks,
    _one_count,
    changed_together,
    choose_controls,
    sample_batch,
)
from tests.cell_sets import batch_of, cells, numbered_labels
from tests.screens import counts_screen, log1p_cp10k, read


def random_pool(n_cells=120, n_genes=40, seed=0):
    generator = np.random.default_rng(seed)
    X = generator.poisson(generator.gamma(0.3, 3, size=(n_cells, 1)) * generator.gamma(1, 1, size=n_genes))
    obs = pd.DataFrame({"perturbation": "control", "cell_type": "T", "batch": "b"}, index=map(str, range(n_cells)))
    X[:, 0] += 1  # no empty cell
    return read(anndata.AnnData(sparse.csr_matrix(X.astype(np.float32)), obs)).expression


@pytest.mark.parametrize("n_cells", [7, 60, 119])
def test_a_part_of_the_controls_has_their_mean(n_cells):
    pool = random_pool()
    X = pool.log1p().toarray().astype(float)
    chosen = choose_controls(pool, n_cells, 3, 0)
    assert len(set(chosen.tolist())) == n_cells
    off = np.linalg.norm(X[chosen].mean(0) - X.mean(0))
    random = [
        np.linalg.norm(X[np.random.default_rng(k).permutation(120)[:n_cells]].mean(0) - X.mean(0)) for k in range(50)
    ]
    assert off <= min(random) + 1e-12
    assert (choose_controls(pool, n_cells, 3, 0) == chosen).all()
    if n_cells < 119:
        assert set(choose_controls(pool, n_cells, 3, 1).tolist()) != set(chosen.tolist())


def test_the_spread_of_a_part_of_the_controls_is_theirs():
    pool = random_pool(300)
    X = pool.log1p().toarray().astype(float)
    ratios = [X[choose_controls(pool, 100, seed, 0)].var(0).sum() / X.var(0).sum() for seed in range(8)]
    assert np.mean(ratios) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("n_cells", [None, 120, 240, 250])
def test_every_control_is_used_before_one_is_used_again(n_cells):
    chosen = choose_controls(random_pool(), n_cells, 0, 0)
    uses = np.bincount(chosen, minlength=120)
    assert len(chosen) == (n_cells or 120)
    assert set(uses.tolist()) <= {len(chosen) // 120, -(-len(chosen) // 120)}


@pytest.mark.parametrize("p_self_cond", [0.0, 0.5])
def test_a_denoiser_that_never_saw_its_estimate_is_not_given_it(p_self_cond):
    batch = batch_of(cells(1, 6, 5), cells(1, 6, 5, seed=1), numbered_labels(1))
    seen = []

    class Recorded(torch.nn.Module):
        def forward(self, x_t, t, control, cond, self_cond, mask):
            seen.append(self_cond is not None)
            return control

    diffusion = DiffusionConfig(p_self_cond=p_self_cond)
    sample_batch(Recorded(), batch, SamplingConfig(n_steps=3), diffusion, 0)
    assert seen == [False, p_self_cond > 0, p_self_cond > 0]


def test_what_is_predicted_lies_between_what_it_starts_from_and_the_network():
    batch = batch_of(cells(2, 6, 5), cells(2, 6, 5, seed=1), numbered_labels(2))
    _, control = batch.dense()
    calls = []

    class Doubling(torch.nn.Module):
        def forward(self, x_t, t, control, cond, self_cond, mask):
            calls.append(t)
            return 2 * control + 0.01 * x_t.abs()

    def at(weight):
        sampling = SamplingConfig(n_steps=2, network_weight=weight, whole_counts=False)
        return sample_batch(Doubling(), batch, sampling, DiffusionConfig(), 0)

    whole = at(1.0)
    assert (whole[control > 0] > 1.5 * control[control > 0]).all()
    assert torch.allclose(at(0.25), 0.75 * control + 0.25 * whole)
    calls.clear()
    assert torch.equal(at(0.0), control)
    assert not calls  # nobody waits for a network whose word does not count


@pytest.mark.parametrize("sampling", [SamplingConfig(n_steps=3, sampler="ddpm"), SamplingConfig(n_steps=3, eta=0.5)])
def test_cells_are_the_same_without_the_empty_positions_behind_them(sampling):
    x0, control, mask = cells(3, 6, 5), cells(3, 6, 5, seed=1), torch.arange(6) < torch.tensor([[4], [2], [4]])

    class Blurring(torch.nn.Module):
        def forward(self, x_t, t, control, cond, self_cond, mask):
            return 0.9 * control + 0.1 * x_t.abs()

    whole = sample_batch(Blurring(), batch_of(x0, control, numbered_labels(3), mask), sampling, DiffusionConfig(), 0)
    trimmed = batch_of(x0[:, :4], control[:, :4], numbered_labels(3), mask[:, :4])
    cut = sample_batch(Blurring(), trimmed, sampling, DiffusionConfig(), 0, set_size=6)
    assert torch.equal(cut[mask[:, :4]], whole[mask])
    other = sample_batch(Blurring(), trimmed, sampling, DiffusionConfig(), 0)
    assert not torch.equal(other[mask[:, :4]], whole[mask])


@pytest.mark.parametrize("n_genes", [10, 500])
def test_sets_are_denoised_with_those_of_their_size(n_genes):
    sizes = [3, 32, 6, 32, 1, 6]
    chunks = _chunks(sizes, n_genes)
    assert sorted(number for chunk in chunks for number in chunk) == list(range(6))
    assert [sizes[number] for chunk in chunks for number in chunk] == sorted(sizes, reverse=True)
    assert [number for chunk in _chunks([8] * 5, n_genes) for number in chunk] == list(range(5))
    huge = _chunks(sizes, MAX_VALUES_PER_CHUNK // 32)
    assert [len(chunk) for chunk in huge] == [1, 1, 4]


@pytest.mark.parametrize(("p_drop_label", "told"), [(0.9, [0, 1, 2]), (1.0, [NULL] * 3)])
def test_a_denoiser_is_not_told_contexts_that_training_always_hid(p_drop_label, told):
    batch = batch_of(cells(3, 6, 5), cells(3, 6, 5, seed=1), numbered_labels(3))
    seen = []

    class Recorded(torch.nn.Module):
        def forward(self, x_t, t, control, cond, self_cond, mask):
            seen.append(cond)
            return control

    sample_batch(Recorded(), batch, SamplingConfig(n_steps=2), DiffusionConfig(p_drop_label=p_drop_label), 0)
    for labels in seen:
        assert labels.perturbation[:, 0].tolist() == [0, 1, 2]
        assert labels.cell_type.tolist() == labels.batch.tolist() == told
    assert len(seen) == 2


@pytest.mark.parametrize("n_cells", [1, 5])
def test_cells_of_a_set_change_together(n_cells):
    rng = np.random.default_rng()
    x = torch.from_numpy(rng.gamma(1.0, size=(2, 6, 4)).astype(np.float32))
    mask = torch.arange(6)[None] < torch.tensor([[n_cells], [6]])
    x = x * mask[..., None]
    by = torch.tensor([[0.3, -0.1, 0.0, -99.0], [0.0, 0.2, -0.05, 0.0]])
    kept = torch.tensor([[1.0, 0.5, 0.5, 1.0], [1.0, 1.0, 0.2, 0.0]])
    found = changed_together(x, mask, torch.stack([kept, by], dim=1))
    for b in range(2):
        cells, new = (values[b][mask[b]].double() for values in (x, found))
        expected = (cells.mean(0) + by[b]).clamp_min(0)
        torch.testing.assert_close(new.mean(0), expected, atol=1e-5, rtol=1e-5)
        assert (new >= 0).all()
        scale = torch.where(by[b] < 0, (expected / cells.mean(0)), 1.0)
        differences = (cells - cells.mean(0)) * kept[b] * scale
        torch.testing.assert_close(new - new.mean(0), differences, atol=1e-5, rtol=1e-4)
        assert (found[b][~mask[b]] == 0).all()
    unchanged = torch.stack([torch.ones(2, 4), torch.zeros(2, 4)], dim=1)
    torch.testing.assert_close(changed_together(x, mask, unchanged), x)


def test_controls_of_a_draw_differ_in_their_mean_as_chance_has_it():
    pool = random_pool()
    X = pool.log1p().toarray()
    means = [
        np.array([X[choose_controls(pool, 20, 0, k, chosen)].mean(0) for k in range(40)]) for chosen in (True, False)
    ]
    by_mean, by_chance = (of.var(0).sum() for of in means)
    assert by_chance > 5 * by_mean
    expected = X.var(0, ddof=1).sum() / 20 * (1 - 20 / len(X))  # without replacement
    assert by_chance == pytest.approx(expected, rel=0.35)


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_log1p_values_that_are_no_counts_are_not_drawn_as_counts(noise):
    adata = counts_screen()
    X = np.asarray(log1p_cp10k(adata.X))
    adata.X = (X + noise * (X > 0) * np.random.default_rng(0).random(X.shape)).astype(np.float32)
    assert (_one_count(read(adata).expression) is None) == (noise > 0)
