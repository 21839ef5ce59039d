"""Condition vectors against sums of their rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perturbdiff.config import DenoiserConfig, PublishedEncoding, check_denoiser
from perturbdiff.data.vocab import NULL, Labels
from perturbdiff.features.tables import FeatureTable
from perturbdiff.nn.conditioning import (
    FEATURE_SPREAD,
    CovariateEncoder,
    FeatureEmbedding,
    LabelConditioning,
    ReferenceConditioning,
    VocabSizes,
)
from perturbdiff.nn.denoiser import Denoiser

SIZES = VocabSizes(perturbations=5, cell_types=3, batches=4)


def randomized(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in [*module.parameters(), *module.buffers()]:
        nn.init.normal_(parameter, generator=generator)
    return module


@pytest.fixture
def by_labels() -> LabelConditioning:
    return randomized(LabelConditioning(SIZES, 6))


def encoder(**settings: object) -> CovariateEncoder:
    return randomized(CovariateEncoder(SIZES, DenoiserConfig(covariate_dim=4, **settings), n_genes=7))


def labels(perturbation: list[list[int]], cell_type: list[int], batch: list[int], hidden: list[bool] | None = None):
    return Labels(
        torch.tensor(perturbation),
        torch.tensor(cell_type),
        torch.tensor(batch),
        None if hidden is None else torch.tensor(hidden),
    )


def rows(conditioning: LabelConditioning, perturbations: list[int], cell_type: int, batch: int) -> Tensor:
    """The sum, row by row; row 0 is null."""
    total = conditioning.cell_type.weight[cell_type + 1] + conditioning.batch.weight[batch + 1]
    for perturbation in perturbations:
        total = total + conditioning.perturbation.weight[perturbation + 1]
    return total


def test_condition_is_the_sum_of_the_rows_of_its_labels(by_labels):
    c = by_labels(labels([[0], [4]], [2, 0], [3, 1]))
    assert c.shape == (2, 1, 6)
    torch.testing.assert_close(c[0, 0], rows(by_labels, [0], 2, 3))
    torch.testing.assert_close(c[1, 0], rows(by_labels, [4], 0, 1))


def test_combination_is_the_sum_of_its_parts_and_their_interaction_in_any_order_and_padding(by_labels):
    c = by_labels(labels([[1, 3, -1], [3, 1, -1], [-1, 3, 1], [3, -1, -1]], [0] * 4, [0] * 4))
    of = by_labels.perturbation.weight
    together = rows(by_labels, [1, 3], 0, 0) + (of[2] * of[4]) @ by_labels.interaction
    for b in range(3):
        torch.testing.assert_close(c[b, 0], together)
    torch.testing.assert_close(c[3, 0], rows(by_labels, [3], 0, 0))


def test_three_perturbations_interact_by_pairs(by_labels):
    of = by_labels.perturbation.weight
    pairs = of[1] * of[3] + of[1] * of[5] + of[3] * of[5]
    c = by_labels(labels([[0, 2, 4]], [0], [0]))
    torch.testing.assert_close(c[0, 0], rows(by_labels, [0, 2, 4], 0, 0) + pairs @ by_labels.interaction)


def test_a_fresh_combination_is_the_sum_of_its_parts():
    conditioning = LabelConditioning(SIZES, 6)
    c = conditioning(labels([[1, 3]], [0], [0]))
    torch.testing.assert_close(c[0, 0], rows(conditioning, [1, 3], 0, 0))


def described(n_by_features: int = 2, doses: bool = False) -> LabelConditioning:
    """Five perturbations with rows, and more with features alone; perturbation 1 is in neither table."""
    sizes = VocabSizes(5, 3, 4, by_features=n_by_features, tables=(3, 2), doses=doses)
    conditioning = randomized(LabelConditioning(sizes, 6))
    for table in conditioning.tables:
        table.features[1] = 0
    return conditioning


def features(conditioning: LabelConditioning, perturbation: int) -> Tensor:
    return sum(table.weight @ table.features[perturbation] for table in conditioning.tables)


def test_features_of_every_table_are_added_to_the_row():
    conditioning = described()
    c = conditioning(labels([[0], [1]], [2, 2], [3, 3]))
    torch.testing.assert_close(c[0, 0], rows(conditioning, [0], 2, 3) + features(conditioning, 0))
    torch.testing.assert_close(c[1, 0], rows(conditioning, [1], 2, 3))


def test_a_perturbation_without_a_row_is_the_null_row_and_its_features():
    conditioning = described()
    c = conditioning(labels([[5], [6]], [0, 0], [0, 0]))
    for b, perturbation in enumerate((5, 6)):
        torch.testing.assert_close(c[b, 0], rows(conditioning, [NULL], 0, 0) + features(conditioning, perturbation))
    with pytest.raises(IndexError):
        conditioning(labels([[7]], [0], [0]))


def test_a_set_known_by_features_alone_keeps_them_and_a_perturbation_without_them_its_row():
    conditioning = described()
    given = labels([[0], [1], [2]], [0] * 3, [0] * 3)
    c = conditioning(replace(given, features_only=torch.tensor([True, True, False])))
    torch.testing.assert_close(c[0, 0], rows(conditioning, [NULL], 0, 0) + features(conditioning, 0))
    torch.testing.assert_close(c[1, 0], rows(conditioning, [1], 0, 0))
    torch.testing.assert_close(c[2, 0], rows(conditioning, [2], 0, 0) + features(conditioning, 2))


def test_fresh_features_and_doses_change_nothing():
    sizes = VocabSizes(5, 3, 4, tables=(3,), doses=True)
    conditioning = Denoiser(DenoiserConfig(width=6, depth=1, n_heads=1), 4, sizes).conditioning
    nn.init.normal_(conditioning.tables[0].features)
    for dose in (-2.0, 0.0, 1.5):
        c = conditioning(replace(labels([[0]], [0], [0]), dose=torch.tensor([[dose]])))
        torch.testing.assert_close(c[0, 0], rows(conditioning, [0], 0, 0))


def test_a_dose_adds_an_mlp_of_vector_and_log_dose():
    conditioning = described(doses=True)
    c = conditioning(replace(labels([[0, -1]], [1], [1]), dose=torch.tensor([[0.7, 0.0]])))
    vector = conditioning.perturbation.weight[1] + features(conditioning, 0)
    effect = conditioning.dose
    hidden = F.silu(effect.fc1.weight @ torch.cat([vector, torch.tensor([0.7])]) + effect.fc1.bias)
    change = effect.fc2.weight @ hidden + effect.fc2.bias
    torch.testing.assert_close(c[0, 0], rows(conditioning, [0], 1, 1) + features(conditioning, 0) + change)
    with pytest.raises(ValueError, match="with a dose"):
        conditioning(labels([[0]], [1], [1]))


def test_features_are_centred_and_scaled_by_their_table_and_later_ones_likewise():
    generator = np.random.default_rng(0)
    values = (5 + 3 * generator.normal(size=(7, 4))).astype(np.float32)
    table = FeatureTable("t", tuple("abcdefg"), values)
    embedding = FeatureEmbedding(3, 4, 2)
    embedding.fill(table, ["b", "nobody", "g"])
    centred = values - values.mean(0)
    expected = FEATURE_SPREAD * centred / np.sqrt((centred**2).mean())
    torch.testing.assert_close(embedding.features[[0, 2]], torch.from_numpy(expected[[1, 6]]))
    assert not embedding.features[1].any()
    later = FeatureTable("t", ("z",), values[:1] + 1)
    embedding.append(later, ["z", "y"])
    spread = np.sqrt((centred**2).mean())
    torch.testing.assert_close(
        embedding.features[3], torch.from_numpy(FEATURE_SPREAD * (values[0] + 1 - values.mean(0)) / spread)
    )
    assert not embedding.features[4].any()


def test_absent_labels_are_the_null_rows(by_labels):
    c = by_labels(labels([[-1, -1], [2, -1], [2, -1]], [1, -1, 1], [2, 2, -1]))
    torch.testing.assert_close(c[0, 0], rows(by_labels, [NULL], 1, 2))
    torch.testing.assert_close(c[1, 0], rows(by_labels, [2], NULL, 2))
    torch.testing.assert_close(c[2, 0], rows(by_labels, [2], 1, NULL))


def test_hidden_sets_are_the_null_vector_and_others_are_not_touched(by_labels):
    given = ([[0], [1], [2]], [0, 1, 2], [0, 1, 2])
    c, seen = by_labels(labels(*given, hidden=[True, False, True])), by_labels(labels(*given))
    assert torch.equal(c[[0, 2], 0], by_labels.null.expand(2, 6))
    assert torch.equal(c[1], seen[1])


def test_absent_batch_vocabulary_leaves_the_null_row():
    conditioning = randomized(LabelConditioning(VocabSizes(2, 1, 0), 6))
    c = conditioning(labels([[1]], [0], [-1]))
    torch.testing.assert_close(c[0, 0], rows(conditioning, [1], 0, NULL))


@pytest.mark.parametrize("ids", [([[5]], [0], [0]), ([[0]], [3], [0]), ([[0]], [0], [4])])
def test_a_label_outside_its_vocabulary_is_an_error(by_labels, ids):
    with pytest.raises(IndexError):
        by_labels(labels(*ids))


def test_gradients_reach_only_the_rows_of_the_given_labels(by_labels):
    by_labels(labels([[1, 3], [-1, -1]], [2, -1], [0, 0], hidden=[False, False])).sum().backward()
    reached = {name: set(p.grad.abs().sum(1).nonzero()[:, 0].tolist()) for name, p in tables(by_labels).items()}
    assert reached == {"perturbation": {0, 2, 4}, "cell_type": {0, 3}, "batch": {1}}
    assert not by_labels.null.grad.any()


def tables(conditioning: LabelConditioning) -> dict[str, Tensor]:
    return {name: getattr(conditioning, name).weight for name in ("perturbation", "cell_type", "batch")}


def by_hand(encoder: CovariateEncoder, parts: list[Tensor]) -> Tensor:
    return encoder.transform.weight @ torch.cat(parts) + encoder.transform.bias


def test_covariate_embedding_is_linear_in_the_concatenated_rows():
    e = encoder()
    cov = e(torch.tensor([4, 0]), torch.tensor([2, 1]), torch.tensor([3, 0]))
    for b, (perturbation, cell_type, batch) in enumerate([(4, 2, 3), (0, 1, 0)]):
        parts = [e.perturbation.weight[perturbation + 1], e.cell_type.weight[cell_type], e.batch.weight[batch]]
        torch.testing.assert_close(cov[b], by_hand(e, parts))


def test_covariate_embedding_without_perturbation_is_row_0():
    e = encoder()
    cov = e(torch.tensor([-1]), torch.tensor([2]), torch.tensor([3]))
    torch.testing.assert_close(cov[0], by_hand(e, [e.perturbation.weight[0], e.cell_type.weight[2], e.batch.weight[3]]))


def test_absent_cell_type_and_batch_are_the_mean_of_the_rows():
    e = encoder()
    cov = e(torch.tensor([1]), torch.tensor([-1]), torch.tensor([-1]))
    parts = [e.perturbation.weight[2], e.cell_type.weight.mean(0), e.batch.weight.mean(0)]
    torch.testing.assert_close(cov[0], by_hand(e, parts))


def test_encoder_without_perturbations_gives_all_of_them_row_0():
    e = encoder(perturbation_encoding="none")
    cov = e(torch.tensor([-1, 0, 4]), torch.tensor([2] * 3), torch.tensor([3] * 3))
    expected = by_hand(e, [e.perturbation.weight[0], e.cell_type.weight[2], e.batch.weight[3]])
    torch.testing.assert_close(cov, expected.expand(3, 7))


def test_encoder_without_batches_ignores_them():
    e = encoder(batch_encoding="none")
    cov = e(torch.tensor([1, 1]), torch.tensor([2, 2]), torch.tensor([0, 3]))
    torch.testing.assert_close(cov, by_hand(e, [e.perturbation.weight[2], e.cell_type.weight[2]]).expand(2, 7))


def test_covariate_embedding_keeps_the_shape_of_the_ids():
    e, ids = encoder(), torch.tensor([[0, 1], [-1, 2], [2, 0]])
    cov = e(ids, ids.clamp_min(0), ids)
    assert cov.shape == (3, 2, 7)
    torch.testing.assert_close(cov[2, 1], e(ids[2, 1], ids[2, 1], ids[2, 1]))


def test_reference_condition_is_linear_in_the_silu_of_the_covariates():
    conditioning = randomized(ReferenceConditioning(6, 7, encoder()))
    given = labels([[1], [-1]], [2, 0], [3, 3])
    cov = conditioning.encoder(given.perturbation[:, 0], given.cell_type, given.batch)
    expected = F.linear(cov / (1 + torch.exp(-cov)), conditioning.linear.weight, conditioning.linear.bias)
    assert conditioning(given).shape == (2, 1, 6)
    torch.testing.assert_close(conditioning(given)[:, 0], expected)
    torch.testing.assert_close(conditioning.from_covariates(cov), expected)


def test_hidden_sets_of_the_reference_are_the_null_vector():
    conditioning = randomized(ReferenceConditioning(6, 7, encoder()))
    given = ([[1], [2]], [2, 0], [3, 3])
    c = conditioning(labels(*given, hidden=[False, True]))
    assert torch.equal(c[1, 0], conditioning.null)
    assert torch.equal(c[0], conditioning(labels(*given))[0])


def test_reference_refuses_combinations_and_says_what_to_set():
    conditioning = ReferenceConditioning(6, 7, encoder())
    with pytest.raises(ValueError, match=r"one perturbation a set, got 2; set data\.combination_separator=null"):
        conditioning(labels([[1, 2]], [0], [0]))


def test_reference_without_encoder_refuses_labels():
    with pytest.raises(ValueError, match="give it `cov`"):
        ReferenceConditioning(6, 7, None)(labels([[1]], [0], [0]))


def test_onehot_batches_of_data_without_batch_labels_are_refused_when_built():
    without = VocabSizes(perturbations=5, cell_types=3, batches=0)
    with pytest.raises(ValueError, match=r"batch_encoding=onehot needs batch labels.*batch_encoding=none"):
        CovariateEncoder(without, DenoiserConfig(), n_genes=7)
    CovariateEncoder(without, DenoiserConfig(batch_encoding="none"), n_genes=7)


# Frozen tables.


def with_tables(doses: int = 0, covariates: int = 0) -> CovariateEncoder:
    published = PublishedEncoding(perturbation_features=6, doses=doses, cell_type_features=5, covariates=covariates)
    return encoder(perturbation_encoding="features", cell_type_encoding="features", published_encoding=published)


def linear(features: Tensor, layer: nn.Linear) -> Tensor:
    return layer.weight @ features + (0 if layer.bias is None else layer.bias)


@pytest.mark.parametrize("doses", [0, 3])
def test_features_are_made_linear_and_doses_are_a_part_of_their_own(doses):
    e = with_tables(doses)
    cov = e(torch.tensor([4, 0]), torch.tensor([2, 1]), torch.tensor([3, 0]))
    for b, (perturbation, cell_type, batch) in enumerate([(4, 2, 3), (0, 1, 0)]):
        parts = [linear(e.perturbation.features[perturbation], e.perturbation.linear)]
        if doses:
            parts.append(e.dose.linear.weight @ e.dose.features[perturbation])
        parts += [linear(e.cell_type.features[cell_type], e.cell_type.linear), e.batch.weight[batch]]
        torch.testing.assert_close(cov[b], by_hand(e, parts))


def test_absent_labels_with_features_are_the_mean_over_all():
    e = with_tables(doses=3)
    absent = e(torch.tensor([-1]), torch.tensor([-1]), torch.tensor([1]))
    everything = torch.stack(
        [e(torch.tensor([p]), torch.tensor([c]), torch.tensor([1]))[0] for p in range(5) for c in range(3)]
    )
    torch.testing.assert_close(absent[0], everything.mean(0))


def test_frozen_tables_are_state_without_gradients_and_are_called_features():
    e = with_tables(doses=3)
    assert {name for name, _ in e.named_buffers()} == {"perturbation.features", "dose.features", "cell_type.features"}
    assert not any(name.endswith(".features") for name, _ in e.named_parameters())
    assert {name for name in e.state_dict() if name.endswith(".features")} == {name for name, _ in e.named_buffers()}


def test_the_number_of_covariates_may_be_another_than_that_of_genes():
    e = with_tables(covariates=11)
    assert e(torch.tensor([1]), torch.tensor([1]), torch.tensor([1])).shape == (1, 11)


def test_a_label_outside_a_frozen_table_is_an_error():
    with pytest.raises(IndexError):
        with_tables()(torch.tensor([5]), torch.tensor([0]), torch.tensor([0]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"perturbation_encoding": "features"}, r"perturbation_encoding \(features\) must be features with"),
        ({"cell_type_encoding": "features"}, r"cell_type_encoding \(features\) must be features with"),
        ({"published_encoding": PublishedEncoding(cell_type_features=3)}, r"cell_type_encoding \(onehot\) must be"),
        ({"published_encoding": PublishedEncoding(doses=3)}, r"doses \(3\) must come with a table"),
        ({"published_encoding": PublishedEncoding(covariates=-1)}, r"covariates \(-1\) must be between 0 and"),
        ({"published_encoding": PublishedEncoding(covariates=10**12)}, r"covariates \(10+\) must be between 0 and"),
    ],
)
def test_encodings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        check_denoiser(DenoiserConfig(conditioning="reference", **settings))
