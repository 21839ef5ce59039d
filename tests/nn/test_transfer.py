import dataclasses

import numpy as np
import pytest
import torch

from perturbdiff.config import DenoiserConfig
from perturbdiff.data.vocab import GeneVocab, Labels, LabelVocab, Vocabularies
from perturbdiff.features.tables import FeatureTable, with_tables
from perturbdiff.nn.conditioning import FEATURE_SPREAD
from perturbdiff.nn.denoiser import build_denoiser
from perturbdiff.nn.transfer import (
    INDEXED_BY,
    INDEXED_BY_COVARIATE,
    N_NEIGHBOURS,
    Names,
    Rules,
    adapt,
    check_architecture,
    extended,
    nearest_by_correlation,
    tables_of,
)

GENES = tuple(f"g{i}" for i in range(9))
KINDS = [
    {"conditioning": "labels", "output": "control_residual"},
    {"conditioning": "labels", "output": "control_residual", "mean_effect": True},
    {"conditioning": "reference", "output": "direct"},
]
GENE_TENSORS = {
    name: kinds.index("gene") for name, kinds in (INDEXED_BY | INDEXED_BY_COVARIATE).items() if "gene" in kinds
}


def vocabularies(perturbations=("A", "B"), cell_types=("T", "NK"), batches=("b1",), **more):
    named = zip(("perturbation", "cell_type", "batch"), (perturbations, cell_types, batches), strict=True)
    return Vocabularies(*(LabelVocab(kind, tuple(names)) for kind, names in named), "+", **more)


def names(genes=GENES, ensembl=None, **labels):
    return Names(GeneVocab(tuple(genes), ensembl), vocabularies(**labels))


def config(**settings):
    return DenoiserConfig(width=16, depth=2, n_heads=2, covariate_dim=4, **settings)


def random_denoiser(known, **settings):
    """Everything random, also what starts at zero."""
    torch.manual_seed(0)
    denoiser = build_denoiser(config(**settings), len(known.genes), known.vocabularies)
    for tensor in denoiser.state_dict().values():
        tensor.normal_(std=0.3)
    return denoiser.eval()


def labels(known, *conditions):
    return known.vocabularies.encode(conditions or [("A", "T", "b1"), ("B", "NK", None)])


def outputs(denoiser, known, order=slice(None), conditions=()):
    generator = torch.Generator().manual_seed(1)
    x, control, self_cond = (torch.rand(2, 3, 9, generator=generator)[..., order] for _ in range(3))
    with torch.no_grad():
        return denoiser(x, torch.tensor([1, 7]), control, labels(known, *conditions), self_cond)


def gene_tensors(denoiser):
    """Every tensor with a gene axis, genes first, as numpy."""
    state = denoiser.state_dict()
    return {name: state[name].movedim(axis, 0).numpy() for name, axis in GENE_TENSORS.items() if name in state}


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_with_nothing_new_no_bit_of_weights_or_outputs_changes(kind):
    known = names()
    denoiser = random_denoiser(known, **kind)
    result, done = adapt(denoiser, known, known)
    before, after = denoiser.state_dict(), result.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(outputs(denoiser, known), outputs(result.eval(), known))
    assert (done.n_shared, done.new_genes, done.dropped_genes, done.new_parts) == (9, (), (), frozenset())
    assert not any(done.new_labels.values())


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_permuted_genes_and_labels_give_permuted_outputs(kind):
    known, order = names(), [4, 2, 8, 0, 1, 3, 7, 5, 6]
    wanted = names([GENES[i] for i in order], perturbations=("B", "A"), cell_types=("NK", "T"))
    denoiser = random_denoiser(known, **kind)
    result, done = adapt(denoiser, known, wanted)
    torch.testing.assert_close(outputs(result.eval(), wanted, order), outputs(denoiser, known)[..., order])
    back, _ = adapt(result, wanted, known)
    assert all(torch.equal(t, back.state_dict()[name]) for name, t in denoiser.state_dict().items())
    assert done.new_parts == frozenset()


def test_every_tensor_with_a_gene_axis_is_in_the_table():
    """Denoisers of other numbers of genes and labels differ in the shapes of the listed tensors only."""
    for kind in KINDS:
        few, many = names(), names([*GENES, "x"], perturbations="ABC", cell_types="TUV", batches="123")
        shapes = [{n: t.shape for n, t in random_denoiser(k, **kind).state_dict().items()} for k in (few, many)]
        differ = {name for name in shapes[0] if shapes[0][name] != shapes[1][name]}
        assert differ == (INDEXED_BY | INDEXED_BY_COVARIATE).keys() & shapes[0].keys() - (
            {"conditioning.linear.weight"} if kind["conditioning"] == "labels" else set()
        )


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("with_expression", [True, False])
def test_shared_genes_are_copied_and_new_ones_are_the_mean_of_their_neighbours_or_of_all(kind, with_expression):
    known, wanted = names(), names(["n0", "g7", "g1", "g3", "constant", "g2", "g8", "g0", "n1"])
    rng = np.random.default_rng(0)
    expression = rng.normal(size=(50, 9)).cumsum(1)
    expression[:, 4] = 2.0
    denoiser = random_denoiser(known, **kind)
    result, done = adapt(denoiser, known, wanted, Rules(expression=expression if with_expression else None))
    shared = [i for i, name in enumerate(wanted.genes.names) if name in GENES]
    place = {i: GENES.index(wanted.genes.names[i]) for i in shared}
    correlation = np.corrcoef(np.delete(expression, 4, 1).T)
    columns = [0, 1, 2, 3, 5, 6, 7, 8]
    for name, before in gene_tensors(denoiser).items():
        after = gene_tensors(result)[name]
        everyone = before[[place[i] for i in shared]].mean(0)
        for i in range(9):
            if i in place:
                expected = before[place[i]]
                assert (after[i] == expected).all()
                continue
            expected = everyone
            if with_expression and i != 4:
                row = correlation[columns.index(i)]
                near = sorted(shared, key=lambda j: -row[columns.index(j)])[:N_NEIGHBOURS]
                expected = before[[place[j] for j in near]].mean(0)
            np.testing.assert_allclose(after[i], expected, rtol=1e-5, atol=1e-6)
        assert name in done.new_parts
    assert done.new_genes == ("n0", "constant", "n1")
    assert done.dropped_genes == ("g4", "g5", "g6")
    assert done.n_shared == 6
    assert done.new_parts == gene_tensors(denoiser).keys()


def test_a_zero_residual_head_gives_new_genes_no_change():
    known, wanted = names(), names([*GENES[:5], "n"])
    denoiser = random_denoiser(known)
    torch.nn.init.zeros_(denoiser.head.weight)
    torch.nn.init.zeros_(denoiser.head.bias)
    result, _ = adapt(denoiser, known, wanted, Rules(expression=np.random.default_rng(0).random((20, 6))))
    control = torch.rand(1, 3, 6)
    with torch.no_grad():
        assert torch.equal(result(torch.randn(1, 3, 6), torch.tensor([3]), control, None), control)


def test_neighbours_agree_with_numpy_where_everything_correlates():
    rng = np.random.default_rng(3)
    expression = rng.normal(size=(40, 30))
    genes, among = np.arange(0, 30, 3), np.array([i for i in range(30) if i % 3])
    found, defined = nearest_by_correlation(expression, genes, among)
    correlation = np.corrcoef(expression.T)
    assert defined.all()
    for gene, near in zip(genes, found, strict=True):
        assert near.tolist() == sorted(among, key=lambda j: -correlation[gene, j])[:N_NEIGHBOURS]


def test_fewer_shared_genes_than_neighbours_are_all_taken():
    known, wanted = names(), names(["g1", "n", "g2"])
    denoiser = random_denoiser(known)
    result, _ = adapt(denoiser, known, wanted, Rules(expression=np.random.default_rng(0).random((20, 3))))
    before, after = denoiser.head.weight.detach(), result.head.weight.detach()
    torch.testing.assert_close(after[1], (before[1] + before[2]) / 2)


def test_genes_are_matched_by_ensembl_id_where_that_finds_more():
    ids = tuple(f"ENSG{i}" for i in range(9))
    known, wanted = names(ensembl=ids), names(["ENSG3", "ENSG1"])
    denoiser = random_denoiser(known)
    result, done = adapt(denoiser, known, wanted)
    assert torch.equal(result.embed_x.weight, denoiser.embed_x.weight[:, [3, 1]])
    assert done.matched_by == "Ensembl id"


@pytest.mark.parametrize(("genes", "n"), [(["x", "y"], 0), ([*(f"x{i}" for i in range(19)), "g1"], 1)])
def test_too_few_shared_genes_are_refused_with_how_many_and_which(genes, n):
    known = names()
    with pytest.raises(ValueError, match=rf"only {n} of the {len(genes)} genes .* lacks x.* has g0, g1"):
        adapt(random_denoiser(known), known, names(genes))


# ---------------------------------------------------------------- labels


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_known_labels_keep_their_rows_and_new_ones_start_as_the_mean(kind):
    known = names(batches=("b1", "b2"))
    wanted = names(perturbations=("C", "B", "A"), cell_types=("T", "B", "NK"), batches=("b2", "b3"))
    denoiser = random_denoiser(known, **kind)
    result, done = adapt(denoiser, known, wanted)
    prefix = "conditioning." if kind["conditioning"] == "labels" else "conditioning.encoder."
    before, after = denoiser.state_dict(), result.state_dict()
    for table, rows in (("perturbation", [None, 1, 0]), ("cell_type", [0, None, 1]), ("batch", [1, None])):
        name = f"{prefix}{table}.weight"
        first = int(kind["conditioning"] == "labels" or table == "perturbation")
        assert torch.equal(after[name][:first], before[name][:first])
        for i, row in enumerate(rows):
            expected = before[name][first:].mean(0) if row is None else before[name][first + row]
            torch.testing.assert_close(after[name][first + i], expected)
        assert name in done.new_parts
    assert done.new_labels == {"perturbation": ("C",), "cell_type": ("B",), "batch": ("b3",)}


def test_nearest_takes_the_row_of_the_label_whose_controls_are_most_alike():
    known, wanted = names(cell_types=("T", "NK", "far")), names(cell_types=("T", "NK", "far", "new", "untold"))
    profiles = {"T": np.zeros(9), "NK": np.ones(9), "new": np.full(9, 0.7)}
    denoiser = random_denoiser(known)
    result, _ = adapt(denoiser, known, wanted, Rules(new_labels="nearest", profiles={"cell_type": profiles}))
    before, after = (d.conditioning.cell_type.weight.detach() for d in (denoiser, result))
    assert torch.equal(after[4], before[2])
    torch.testing.assert_close(after[5], before[1:].mean(0))


def test_labels_that_a_checkpoint_has_none_of_are_drawn():
    known, wanted = names(perturbations=(), batches=()), names(perturbations="ABC", batches=("b1",))
    denoiser = random_denoiser(known)
    torch.manual_seed(5)
    result, _ = adapt(denoiser, known, wanted)
    rows = result.conditioning.perturbation.weight.detach()
    assert torch.equal(rows[0], denoiser.conditioning.perturbation.weight[0])
    assert len(rows[1:].unique(dim=0)) == 3


def test_a_checkpoint_keeps_its_labels_before_those_of_the_data():
    known = vocabularies(("B", "A", "X"), n_by_features=1, tables=(("esm", 3),))
    data = vocabularies(("A", "C", "Y"), ("NK", "B"), ("b0",), n_by_features=1, tables=(("esm", 3), ("own", 2)))
    both = extended(known, data)
    assert (both.labelled, both.perturbations.names) == (("B", "A", "C"), ("B", "A", "C", "X", "Y"))
    assert (both.cell_types.names, both.batches.names) == (("T", "NK", "B"), ("b1", "b0"))
    assert (both.n_by_features, both.tables) == (2, (("esm", 3), ("own", 2)))
    assert extended(both, data) == both


def test_a_perturbation_that_only_had_features_gets_a_row_when_it_was_measured():
    both = extended(vocabularies(("A", "X"), n_by_features=1, tables=(("t", 2),)), vocabularies(("X",)))
    assert (both.labelled, both.n_by_features) == (("A", "X"), 0)


# ---------------------------------------------------------------- features, interaction


def table(name, rows):
    return FeatureTable(name, tuple(rows), np.array(list(rows.values()), dtype=np.float32))


def test_tables_go_on_by_name_with_the_checkpoints_centre_and_scale_and_new_rows_start_at_null():
    first = table("t", {"A": (1.0, 2.0), "B": (3.0, -1.0), "X": (0.5, 0.5)})
    known = Names(GeneVocab(GENES), with_tables(vocabularies(), [first]))
    denoiser = random_denoiser(known)
    tables_of(denoiser)[0].fill(first, known.vocabularies.perturbations.names)
    second = table("t", {"C": (9.0, 5.0), "Y": (0.0, 1.0)})
    data = with_tables(vocabularies(("A", "C", "D")), [second])
    wanted = Names(known.genes, extended(known.vocabularies, data))
    result, done = adapt(denoiser, known, wanted, Rules(tables=[second]))
    assert wanted.vocabularies.perturbations.names == ("A", "B", "C", "D", "X", "Y")
    before, after = tables_of(denoiser)[0], tables_of(result)[0]
    values = np.array([[1, 2], [3, -1], [0.5, 0.5]])
    centre, scale = values.mean(0), FEATURE_SPREAD / np.sqrt(np.square(values - values.mean(0)).mean())
    expected = np.array([[1, 2], [3, -1], [9, 5], [0, 0], [0.5, 0.5], [0, 1]], dtype=float)
    expected = (expected - centre) * scale
    expected[3] = 0
    np.testing.assert_allclose(after.features, expected, rtol=1e-5)
    assert torch.equal(before.weight, after.weight)
    assert torch.equal(before.centre, after.centre)  # for those that are described later
    assert torch.equal(before.scale, after.scale)
    rows, old = result.conditioning.perturbation.weight, denoiser.conditioning.perturbation.weight
    assert torch.equal(rows[3], old[0])  # C: known by its features
    torch.testing.assert_close(rows[4], old[1:].mean(0))  # D: by nothing
    assert done.new_parts == {"conditioning.perturbation.weight"}


def test_a_new_table_and_a_new_interaction_change_no_output():
    own = table("own", {"A": (1.0, 2.0, 0.0), "Z": (3.0, -1.0, 1.0)})
    known = names()
    wanted = Names(known.genes, extended(known.vocabularies, with_tables(vocabularies(), [own])))
    denoiser = random_denoiser(known, interaction=False)
    result, done = adapt(
        denoiser, known, wanted, Rules(tables=[own]), dataclasses.replace(denoiser.config, interaction=True)
    )
    pair = [("A+B", "T", "b1"), ("B", "NK", None)]
    assert torch.equal(outputs(result.eval(), wanted, conditions=pair), outputs(denoiser, known, conditions=pair))
    assert done.new_parts == {"conditioning.tables.0.weight", "conditioning.interaction"}
    assert tables_of(result)[0].features.any()


@pytest.mark.parametrize("mean_effect", [False, True])
def test_with_features_and_doses_permuted_names_give_permuted_outputs(mean_effect):
    features = table("t", {"A": (1.0, 2.0), "X": (3.0, -1.0), "Y": (0.5, 0.5)})
    other = table("t", {"Y": (0.5, 0.5), "A": (1.0, 2.0), "X": (3.0, -1.0)})
    order = [4, 2, 8, 0, 1, 3, 7, 5, 6]
    known = Names(GeneVocab(GENES), with_tables(vocabularies(dose_separator="@"), [features]))
    wanted = Names(
        GeneVocab(tuple(GENES[i] for i in order)),
        with_tables(vocabularies(("B", "A"), ("NK", "T"), dose_separator="@"), [other]),
    )
    assert wanted.vocabularies.perturbations.names == ("B", "A", "Y", "X")
    denoiser = random_denoiser(known, mean_effect=mean_effect)
    tables_of(denoiser)[0].fill(features, known.vocabularies.perturbations.names)
    result, done = adapt(denoiser, known, wanted, Rules(tables=[other]))
    for pair in (("A@3", "B@0.1"), ("X@2", "A@1+Y@5")):
        conditions = [(pair[0], "T", "b1"), (pair[1], "NK", None)]
        torch.testing.assert_close(
            outputs(result.eval(), wanted, order, conditions),
            outputs(denoiser, known, conditions=conditions)[..., order],
        )
    back, _ = adapt(result, wanted, known)
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in denoiser.state_dict().items())
    assert done.new_parts == frozenset()


def test_a_new_mean_effect_changes_no_output():
    known = names()
    denoiser = random_denoiser(known)
    result, done = adapt(denoiser, known, known, config=dataclasses.replace(denoiser.config, mean_effect=True))
    assert torch.equal(outputs(result.eval(), known), outputs(denoiser, known))
    assert done.new_parts == {"effect.weight"}


@pytest.mark.parametrize(
    ("name", "has", "asked"),
    [("width", 16, 32), ("output", "control_residual", "direct"), ("interaction", True, False)],
)
def test_another_architecture_is_refused_by_key_and_both_values(name, has, asked):
    with pytest.raises(ValueError, match=rf"denoiser\.{name} is {has} in the checkpoint and {asked} in the settings"):
        check_architecture(config(), dataclasses.replace(config(), **{name: asked}))


def test_doses_must_be_as_in_the_checkpoint():
    with_doses = names(dose_separator="@")
    with pytest.raises(ValueError, match=r"the checkpoint has conditioning\.dose.* data\.dose_col"):
        adapt(random_denoiser(with_doses), with_doses, names())


def test_doses_in_another_unit_are_refused():
    with pytest.raises(ValueError, match="the checkpoint and the data: doses are in nM, uM"):
        extended(vocabularies(dose_unit="uM"), vocabularies(dose_unit="nM"))


def test_a_checkpoint_without_doses_gets_them_and_says_the_same_at_first():
    known, wanted = names(), names(dose_separator="@")
    denoiser = random_denoiser(known)
    result, _ = adapt(denoiser, known, wanted)
    assert isinstance(labels(wanted, ("A@1", "T", "b1")), Labels)
    doses = [("A@3", "T", "b1"), ("B@0.1", "NK", None)]
    assert torch.equal(outputs(result.eval(), wanted, conditions=doses), outputs(denoiser, known))
