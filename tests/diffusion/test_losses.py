"""The loss against the published one, and what it asks of a denoiser."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from perturbdiff.config import DenoiserConfig, DiffusionConfig
from perturbdiff.data.batch import CellSetBatch
from perturbdiff.data.vocab import NULL, Labels
from perturbdiff.diffusion.distances import energy_mmd
from perturbdiff.diffusion.draws import Draws, training_draws
from perturbdiff.diffusion.losses import DiffusionLoss
from perturbdiff.nn.conditioning import VocabSizes
from perturbdiff.nn.denoiser import Denoiser
from perturbdiff.reference.convert import denoiser_from_reference
from tests.cell_sets import batch_of, cells, numbered_labels

CASES = ["selfcond_off", "selfcond_on", "dropcond", "dropctrl_selfcond_on"]


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
    ) -> Tensor:
        cov = None if self.cov is None else self.cov[labels.perturbation[:, 0]]
        self.outputs.append(self.denoiser(x_t, t, control, cov, self_cond, mask))
        return self.outputs[-1]


def published_case(numbers: dict[str, Tensor], case: str) -> tuple[PublishedDenoiser, CellSetBatch, Draws]:
    denoiser = PublishedDenoiser(numbers, hide_condition=case == "dropcond")
    control = numbers["in.cont_emb"] * (0 if case.startswith("dropctrl") else 1)
    labels = numbered_labels(3)
    batch = batch_of(numbers["in.x_start"], control, labels)
    self_cond = torch.arange(3 if case.endswith("selfcond_on") else 0)
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
    ) -> Tensor:
        names = ("x_t", "t", "control", "labels", "self_cond", "mask", "gradient")
        values = (x_t, t, control, labels, self_cond, mask, torch.is_grad_enabled())
        self.calls.append(dict(zip(names, values, strict=True)))
        estimate = self.weight * x_t + 0.1 * control + 0.001 * t[:, None, None]
        return estimate if self_cond is None else estimate + 0.5 * self_cond


def fresh_case(n_sets: int = 4, sizes: list[int] | None = None, seed: int = 0) -> tuple[CellSetBatch, Draws]:
    x0, control = cells(n_sets, 6, 5, seed=seed), cells(n_sets, 6, 5, seed=seed + 1)
    labels = numbered_labels(n_sets)
    mask = torch.arange(6)[None] < torch.tensor(sizes or [6] * n_sets)[:, None]
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed + 2))
    t = torch.arange(n_sets) * 200
    return batch_of(x0, control, labels, mask), Draws(t, noise, torch.zeros(0, dtype=torch.int64), labels)


def estimate_of(denoiser: Recorded, call: int) -> Tensor:
    """What it answered to a call."""
    *given, _ = denoiser.calls[call].values()
    return denoiser(*given).detach()


def test_loss_is_the_weighted_sum_of_mse_and_mmd():
    batch, draws = fresh_case(sizes=[6, 3, 4, 2])
    for unbiased in (False, True):
        denoiser = Recorded()
        config = DiffusionConfig(mse_weight=0.3, mmd_weight=2.0, unbiased=unbiased)
        loss = DiffusionLoss(config)(denoiser, batch, draws)
        x0, _ = batch.dense()
        x0_pred = estimate_of(denoiser, 0)
        for b in range(4):
            real = batch.mask[b]
            assert loss.mse[b].item() == pytest.approx(float((x0 - x0_pred)[b, real].square().mean()), abs=1e-5)
        torch.testing.assert_close(loss.mmd, energy_mmd(x0, x0_pred, batch.mask, batch.mask, unbiased))
        torch.testing.assert_close(loss.total, 0.3 * loss.mse + 2.0 * loss.mmd)


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
    expected = energy_mmd(x0, rounded, batch.mask, batch.mask)
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
    loss = DiffusionLoss(DiffusionConfig())(
        denoiser, batch, Draws(draws.t, draws.noise, chosen.nonzero()[:, 0], draws.labels)
    )
    loss.total.sum().backward()
    first, second = denoiser.calls
    assert not first["gradient"]
    assert second["gradient"]
    assert first["self_cond"] is None
    assert first["t"].tolist() == [0, 600]
    assert first["labels"].perturbation[:, 0].tolist() == [0, 3]
    assert first["mask"].sum(1).tolist() == [6, 2]
    torch.testing.assert_close(second["self_cond"][chosen], estimate_of(denoiser, 0))
    assert not second["self_cond"][~chosen].any()
    assert not second["self_cond"].requires_grad


def test_without_self_conditioning_the_denoiser_is_called_once():
    batch, draws = fresh_case()
    denoiser = Recorded()
    DiffusionLoss(DiffusionConfig())(denoiser, batch, draws)
    assert len(denoiser.calls) == 1
    assert not denoiser.calls[0]["self_cond"].any()


def test_denoiser_is_given_the_drawn_labels_the_noised_cells_their_controls_and_the_mask():
    batch, draws = fresh_case(sizes=[6, 4, 1, 0])
    hidden = Labels(torch.full((4, 1), NULL), torch.full((4,), NULL), torch.full((4,), NULL))
    denoiser = Recorded()
    DiffusionLoss(DiffusionConfig())(denoiser, batch, Draws(draws.t, draws.noise, draws.self_cond, hidden))
    assert denoiser.calls[0]["labels"] is hidden
    assert torch.equal(denoiser.calls[0]["mask"], batch.mask)
    x0, control = batch.dense()
    assert torch.equal(denoiser.calls[0]["control"], control)
    signal = torch.from_numpy(np.sqrt(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))[draws.t])[:, None, None]
    expected = signal * x0 + (1 - signal**2).sqrt() * draws.noise
    torch.testing.assert_close(denoiser.calls[0]["x_t"], expected.float())


def test_estimates_at_padded_positions_do_not_reach_the_loss():
    batch, draws = fresh_case(sizes=[6, 4, 1, 0])

    class Littering(Recorded):
        def forward(self, x_t: Tensor, *args: Tensor) -> Tensor:
            junk = self.litter * torch.randn(x_t.shape, generator=torch.Generator().manual_seed(5))
            return self.weight * torch.where(batch.mask[..., None], x_t, junk)

    results = []
    for litter in (0.0, 1.0, 100.0):
        denoiser = Littering()
        denoiser.litter = litter
        loss = DiffusionLoss(DiffusionConfig())(denoiser, batch, draws)
        loss.total.sum().backward()
        assert loss.total[3] == 0
        results.append(torch.cat([loss.total.detach(), denoiser.weight.grad[None]]))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def test_loss_of_a_set_does_not_depend_on_the_other_sets():
    batch, draws = fresh_case(sizes=[6, 4, 5, 2])
    chosen = torch.tensor([True, False, True, False])
    drawn = Draws(draws.t, draws.noise, chosen.nonzero()[:, 0], draws.labels)
    loss = DiffusionLoss(DiffusionConfig())(Recorded(), batch, drawn)
    x0, control = batch.dense()
    for b in range(4):
        one = slice(b, b + 1)
        alone = DiffusionLoss(DiffusionConfig())(
            Recorded(),
            batch_of(x0[one], control[one], batch.labels.select(one), batch.mask[one]),
            Draws(draws.t[one], draws.noise[one], chosen[one].nonzero()[:, 0], draws.labels.select(one)),
        )
        torch.testing.assert_close(alone.total, loss.total[one])


OF_GENES = {  # weights and which of their axes is genes
    "embed_x.weight": 1, "embed_self_cond.weight": 1, "embed_control.weight": 1,
    "head.weight": 0, "head.bias": 0, "effect.weight": 0,
}  # fmt: skip


def of_kept(name: str, weight: Tensor, kept: Tensor) -> Tensor:
    return weight.index_select(OF_GENES[name], kept.nonzero()[:, 0]) if name in OF_GENES else weight


@pytest.mark.parametrize("seed", range(3))  # gradients of distances that are nearly 0 are far apart in float32
@pytest.mark.parametrize("words", [{}, {"p_self_cond": 1.0}, {"whole_counts": True, "unbiased": True}], ids=str)
def test_a_set_trains_a_denoiser_as_if_genes_that_it_did_not_measure_were_not_there(words, seed):
    config, n_genes = DiffusionConfig(**words), 7
    settings = DenoiserConfig(width=16, depth=2, n_heads=2, mean_effect=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        denoiser = Denoiser(settings, n_genes, VocabSizes(3, 3, 3))
        for parameter in denoiser.parameters():
            nn.init.normal_(parameter, std=0.2)
        measured = torch.rand(3, n_genes) < 0.6
    measured[0], measured[1:, 0], measured[1:, 1] = True, True, False
    x0, control = cells(3, 6, n_genes, seed=seed), cells(3, 6, n_genes, seed=seed + 1) + 0.02
    control[..., 0] = 0.01  # one count, whichever genes are looked at
    mask = torch.arange(6)[None] < torch.tensor([[6], [4], [1]])
    batch = replace(batch_of(x0, control, numbered_labels(3), mask), measured=measured)
    draws = training_draws(batch, config, seed)
    for b in range(3):
        denoiser.zero_grad()
        loss = DiffusionLoss(config)(denoiser, batch, draws)
        loss.total[b].backward()
        kept, only = measured[b], slice(b, b + 1)
        cut = Denoiser(settings, int(kept.sum()), VocabSizes(3, 3, 3))
        cut.load_state_dict({name: of_kept(name, weight, kept) for name, weight in denoiser.state_dict().items()})
        alone = DiffusionLoss(config)(
            cut,
            batch_of(x0[only][..., kept], control[only][..., kept], batch.labels.select(only), mask[only]),
            Draws(
                draws.t[only],
                draws.noise[only][..., kept],
                torch.zeros(int(b in draws.self_cond), dtype=torch.int64),
                draws.labels.select(only),
                None if draws.rounding is None else draws.rounding[only][..., kept],
            ),
        )
        alone.total.backward()
        torch.testing.assert_close(loss.mse[only], alone.mse, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(loss.mmd[only], alone.mmd, rtol=1e-4, atol=1e-4)
        expected = dict(cut.named_parameters())
        for name, parameter in denoiser.named_parameters():
            found, own = (torch.zeros_like(p) if p.grad is None else p.grad for p in (parameter, expected[name]))
            torch.testing.assert_close(of_kept(name, found, kept), own, rtol=1e-2, atol=1e-3)
            if name in OF_GENES:
                assert (of_kept(name, found, ~kept) == 0).all()
