import math

import pytest
import torch
from torch import nn

from perturbdiff.config import DenoiserConfig, OptimConfig
from perturbdiff.nn.conditioning import VocabSizes
from perturbdiff.nn.denoiser import Denoiser
from perturbdiff.nn.lora import freeze_backbone
from perturbdiff.training.optim import learning_rate, make_optimizer


def test_learning_rate_warms_up_stays_and_falls_on_a_cosine():
    config = OptimConfig(lr=2.0, warmup_steps=4, plateau_ratio=0.1, min_lr_ratio=0.1)
    rates = [learning_rate(step, 104, config) for step in range(104)]
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates[4:14] == pytest.approx([2.0] * 10)
    # Independent: midway between plateau (14.4) and last step (103) the cosine is half way between lr and floor.
    middle = learning_rate(round((14.4 + 103) / 2), 104, config)
    assert middle == pytest.approx((2.0 + 0.2) / 2, rel=0.01)
    assert rates[-1] == pytest.approx(0.2)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_a_run_shorter_than_its_warm_up_only_warms_up():
    config = OptimConfig(lr=1.0, warmup_steps=10)
    assert [learning_rate(step, 3, config) for step in range(3)] == pytest.approx([0.1, 0.2, 0.3])


def test_without_warm_up_the_first_step_has_the_peak_rate():
    assert learning_rate(0, 10, OptimConfig(lr=1.0, warmup_steps=0)) == pytest.approx(1.0)
    assert math.isfinite(learning_rate(0, 1, OptimConfig(lr=1.0, warmup_steps=0)))


def test_only_matrices_of_linear_layers_decay():
    denoiser = Denoiser(DenoiserConfig(width=16, depth=1, n_heads=2), 5, VocabSizes(2, 2, 2))
    decay, keep = make_optimizer(denoiser, OptimConfig(weight_decay=0.3)).param_groups
    assert (decay["weight_decay"], keep["weight_decay"]) == (0.3, 0.0)
    linear = {id(m.weight) for m in denoiser.modules() if isinstance(m, nn.Linear)}
    assert {id(p) for p in decay["params"]} == linear | {id(denoiser.conditioning.interaction)}
    assert len(decay["params"]) + len(keep["params"]) == len(list(denoiser.parameters()))


def test_only_what_trains_is_in_a_group_and_what_is_copied_in_groups_of_its_own_rate():
    denoiser = Denoiser(DenoiserConfig(width=16, depth=1, n_heads=2), 5, VocabSizes(2, 2, 2))
    freeze_backbone(denoiser)
    new = {"head.weight", "head.bias"}
    groups = make_optimizer(denoiser, OptimConfig(lr=0.5, weight_decay=0.3), new, lr_ratio=0.1).param_groups
    names = {id(p): name for name, p in denoiser.named_parameters()}
    found = {(g["lr_ratio"], g["weight_decay"]): {names[id(p)] for p in g["params"]} for g in groups}
    assert found[1.0, 0.3] | found[1.0, 0.0] == new
    assert found[0.1, 0.3] == {f"embed_{what}.weight" for what in ("x", "self_cond", "control")} | {
        "conditioning.interaction"
    }
    assert sum(map(len, found.values())) == sum(p.requires_grad for p in denoiser.parameters())
    assert [group["lr"] for group in groups] == pytest.approx([0.5, 0.5, 0.05, 0.05])


def test_with_one_rate_for_all_there_are_the_two_groups_of_a_run_from_scratch():
    denoiser = Denoiser(DenoiserConfig(width=16, depth=1, n_heads=2), 5, VocabSizes(2, 2, 2))
    groups = make_optimizer(denoiser, OptimConfig(), {"head.weight"}).param_groups
    assert [group["lr_ratio"] for group in groups] == [1.0, 1.0]


def test_weight_decay_shrinks_a_matrix_without_gradient_pull():
    denoiser = Denoiser(DenoiserConfig(width=16, depth=1, n_heads=2), 5, VocabSizes(2, 2, 2))
    optimizer = make_optimizer(denoiser, OptimConfig(weight_decay=0.5, lr=0.1))
    for parameter in denoiser.parameters():
        parameter.grad = torch.zeros_like(parameter)
    matrix, table = denoiser.embed_x.weight.detach().clone(), denoiser.conditioning.perturbation.weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(denoiser.embed_x.weight.detach(), matrix * (1 - 0.1 * 0.5))
    torch.testing.assert_close(denoiser.conditioning.perturbation.weight.detach(), table)
