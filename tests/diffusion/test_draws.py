"""The random draws of the loss: keyed by set, with the configured frequencies."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import pytest
import torch

from perturbdiff.config import DiffusionConfig
from perturbdiff.data.batch import CellSetBatch
from perturbdiff.data.vocab import NULL, Labels
from perturbdiff.diffusion.draws import training_draws, validation_draws
from tests.cell_sets import batch_of


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
        assert (len(alone.self_cond) == 1) == (b in together.self_cond)
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
    events = [
        (torch.isin(torch.arange(n), draws.self_cond), 0.7),
        (labels.hidden, 0.3),
        *((hidden_labels[kind], p_drop[kind]) for kind in p_drop),
    ]
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


def test_sets_known_by_features_alone_are_drawn_by_themselves_and_move_no_other_draw():
    n, config = 2000, DiffusionConfig(p_features_only=0.3)
    batch = keyed_batch([(0, number) for number in range(n)])
    without, described = training_draws(batch, config, 3), training_draws(batch, config, 3, with_features=True)
    assert without.labels.features_only is None
    features_only = described.labels.features_only
    assert features_only.float().mean().item() == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / n))
    for name in ("t", "noise", "self_cond"):
        assert torch.equal(getattr(without, name), getattr(described, name))
    assert torch.equal(without.labels.perturbation, described.labels.perturbation)
    alone = training_draws(keyed_batch([(0, 7)]), config, 3, with_features=True)
    assert alone.labels.features_only.tolist() == [bool(features_only[7])]


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
    assert len(draws.self_cond) == 0
    values, counts = draws.t.unique(return_counts=True)
    assert counts.tolist() == [3] * 8
    assert values.diff().tolist() == [125] * 7
    assert values[0] == 999 - values[-1]


def test_validation_shows_no_context_that_training_always_hid():
    batch = keyed_batch([(0, n) for n in range(9)])
    labels = validation_draws(batch, DiffusionConfig(p_drop_label=1.0), 3).labels
    assert labels.cell_type.tolist() == labels.batch.tolist() == [NULL] * 9
    assert torch.equal(labels.perturbation, batch.labels.perturbation)
    assert torch.equal(batch.labels.cell_type, torch.arange(9))
