import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perturbdiff.config import DataConfig, Preprocessing
from perturbdiff.data.batch import make_batch
from perturbdiff.data.conditions import ConditionIndex, encode_conditions, vocabularies_of
from perturbdiff.data.notation import Notation
from perturbdiff.data.samplers import CellSet
from perturbdiff.data.screen import Screen
from perturbdiff.data.vocab import NULL, Labels, LabelVocab, Vocabularies
from tests.screens import counts_screen, log1p_cp10k, read, screen_with_cells

NO_LABELS = Labels(torch.full((3, 1), NULL), torch.full((3,), NULL), torch.full((3,), NULL))


def sets_of(rng, n_cells, sizes):
    """Cell sets of random rows, the conditions numbered 0, 1, 2, 0, ..."""
    return [
        CellSet((0, i), i % 3, rng.choice(n_cells, n, replace=False), rng.choice(n_cells, n, replace=False))
        for i, n in enumerate(sizes)
    ]


def expected_dense(values, rows_of_sets, set_size):
    """(B, S, G) by a double loop."""
    dense = np.zeros((len(rows_of_sets), set_size, values.shape[1]))
    for b, rows in enumerate(rows_of_sets):
        for s, row in enumerate(rows):
            dense[b, s] = values[row]
    return dense


@pytest.mark.parametrize("set_size", [5, 9])
@pytest.mark.parametrize("kind", ["counts", "log1p"])
def test_the_dense_batch_equals_a_numpy_computation(kind, set_size):
    adata = counts_screen(n_genes=20)
    X = adata.X.toarray()
    X[[3, 4, 40]] = 0  # cells without any count
    logged = log1p_cp10k(X)
    adata.X = X if kind == "counts" else logged
    screen = read(adata, scale=4.0)
    of_cell = dict(zip(adata.obs_names, logged, strict=True))
    values = np.stack([of_cell[name] for name in screen.obs.index]) / 4.0
    sets = sets_of(np.random.default_rng(0), len(screen), [5, 1, 3, 5])
    batch = make_batch(sets, set_size, screen.expression, NO_LABELS)
    x0, control = batch.dense()
    assert x0.shape == control.shape == (4, set_size, 20)
    assert x0.dtype == torch.float32
    np.testing.assert_allclose(x0, expected_dense(values, [s.rows for s in sets], set_size), rtol=2e-6)
    np.testing.assert_allclose(control, expected_dense(values, [s.control_rows for s in sets], set_size), rtol=2e-6)


def test_the_batch_of_another_device_is_filled_alike():
    screen = read(counts_screen(n_genes=20))
    cells = make_batch(sets_of(np.random.default_rng(0), len(screen), [5, 1, 3]), 6, screen.expression, NO_LABELS).cells
    values = torch.rand(len(cells.values))
    expected = cells._filled_by_scipy(values, 18, 20)
    assert expected.count_nonzero() == len(values)
    assert torch.equal(cells._filled(values, 18, 20).view(18, 20), expected)


def test_library_size_and_target_sum_enter_the_dense_values():
    adata = counts_screen(n_genes=20)
    X = adata.X.toarray()
    X[0] = 0
    adata.X = X
    adata.obs["total"] = np.arange(adata.n_obs) * 1000.0  # the first cell has a library size of 0
    screen = read(adata, library_size_col="total", target_sum=300.0)
    sets = [CellSet((0, 0), 0, np.arange(len(screen)), np.arange(len(screen)))]
    x0, _ = make_batch(sets, len(screen), screen.expression, NO_LABELS).dense()
    total = screen.obs["total"].to_numpy()[:, None]
    counts = screen.expression.X.toarray()
    expected = np.log1p(np.divide(counts * 300.0, total, out=np.zeros(counts.shape), where=total > 0)) / 10
    np.testing.assert_allclose(x0[0], expected, rtol=2e-6)


def test_counts_over_65535_pass_unharmed():
    adata = counts_screen(n_genes=4)
    X = adata.X.astype(np.float64).toarray()
    X[:, 2] = 3_000_000_000
    adata.X = X
    screen = read(adata)
    assert screen.expression.X.dtype == np.uint32
    x0, _ = make_batch(
        [CellSet((0, 0), 0, np.array([1, 2]), np.array([0, 3]))], 2, screen.expression, NO_LABELS
    ).dense()
    np.testing.assert_allclose(x0[0], log1p_cp10k(screen.expression.X[[1, 2]]) / 10, rtol=2e-6)


def test_a_batch_without_sets_is_empty_and_dense():
    screen = read(counts_screen(n_genes=5))
    batch = make_batch([], 4, screen.expression, NO_LABELS)
    x0, control = batch.dense()
    assert x0.shape == control.shape == (0, 4, 5)
    assert batch.mask.shape == (0, 4)
    assert batch.labels.perturbation.shape == (0, 1)
    assert batch.keys == batch.conditions == ()


def test_the_mask_marks_the_places_that_hold_cells_and_empty_places_are_zero():
    screen = read(counts_screen())
    sets = sets_of(np.random.default_rng(0), len(screen), [2, 4, 1])
    batch = make_batch(sets, 4, screen.expression, NO_LABELS)
    assert batch.mask.tolist() == [[s < n for s in range(4)] for n in (2, 4, 1)]
    for dense in batch.dense():
        assert not dense[~batch.mask].any()
        assert dense[batch.mask].any(1).all()
    for cells in (batch.cells, batch.controls):
        np.testing.assert_array_equal(cells.position, np.flatnonzero(batch.mask.flatten()))


@pytest.mark.parametrize("marginal", [(1,), (0, 3), (0, 1, 2, 3)])
def test_a_marginal_set_has_cells_and_no_controls(marginal):
    screen = read(counts_screen(n_genes=8))
    sets = [
        replace(s, control_rows=s.control_rows[:0]) if i in marginal else s
        for i, s in enumerate(sets_of(np.random.default_rng(0), len(screen), [2, 4, 1, 3]))
    ]
    batch = make_batch(sets, 4, screen.expression, NO_LABELS)
    logged = log1p_cp10k(screen.expression.X) / 10
    x0, control = batch.dense()
    np.testing.assert_allclose(x0, expected_dense(logged, [s.rows for s in sets], 4), rtol=2e-6)
    np.testing.assert_allclose(control, expected_dense(logged, [s.control_rows for s in sets], 4), rtol=2e-6)
    assert batch.mask.tolist() == [[s < n for s in range(4)] for n in (2, 4, 1, 3)]
    assert len(batch.controls.position) == sum(n for i, n in enumerate((2, 4, 1, 3)) if i not in marginal)
    assert not control[list(marginal)].any()


def test_each_set_carries_the_labels_and_key_of_its_condition():
    labels = Labels(torch.tensor([[4, NULL], [5, 6], [7, NULL]]), torch.tensor([1, 2, 3]), torch.tensor([NULL, 8, 9]))
    screen = read(counts_screen())
    sets = sets_of(np.random.default_rng(0), len(screen), [1, 1, 1, 1])[::-1]
    batch = make_batch(sets, 2, screen.expression, labels)
    assert batch.conditions == (0, 2, 1, 0)
    assert batch.keys == ((0, 3), (0, 2), (0, 1), (0, 0))
    assert batch.labels.perturbation.tolist() == [[4, NULL], [7, NULL], [5, 6], [4, NULL]]
    assert batch.labels.cell_type.tolist() == [1, 3, 2, 1]
    assert batch.labels.batch.tolist() == [NULL, 9, 8, NULL]


def test_moving_a_batch_to_a_device_changes_no_value():
    screen = read(counts_screen())
    batch = make_batch(sets_of(np.random.default_rng(0), len(screen), [2, 3]), 3, screen.expression, NO_LABELS)
    moved = batch.to("cpu")
    for a, b in zip(batch.dense(), moved.dense(), strict=True):
        assert torch.equal(a, b)
    hidden = Labels(NO_LABELS.perturbation, NO_LABELS.cell_type, NO_LABELS.batch, torch.tensor([True, False, True]))
    assert hidden.to("cpu").select(slice(1, 3)).hidden.tolist() == [False, True]


# ---------------------------------------------------------------- labels


@pytest.fixture
def known():
    return Vocabularies(
        LabelVocab("perturbation", ("A", "B", "JAK2", "X+Y")),
        LabelVocab("cell_type", ("NK", "T")),
        LabelVocab("batch", ("b1",)),
        "+",
    )


def test_names_become_ids_and_combinations_become_several(known):
    labels = known.encode([("A", "T", "b1"), ("JAK2+B+A", "NK", None), ("X+Y", None, "b1"), (None, "T", "b1")])
    assert labels.perturbation.tolist() == [[0, NULL, NULL], [0, 1, 2], [3, NULL, NULL], [NULL] * 3]
    assert labels.cell_type.tolist() == [1, 0, NULL, 1]
    assert labels.batch.tolist() == [0, NULL, 0, 0]


def test_unknown_cell_types_and_batches_are_null(known):
    labels = known.encode([("A", "B cell", "b9"), ("A", "", "")])
    assert labels.cell_type.tolist() == labels.batch.tolist() == [NULL, NULL]


def test_labels_of_nothing_have_shapes(known):
    labels = known.encode([])
    assert (labels.perturbation.shape, labels.cell_type.shape) == ((0, 1), (0,))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("jak1", "did you mean JAK2"),
        ("A+jak2", "'jak2' is not known.*did you mean JAK2"),
        ("A:B", "'A:B' is not known"),
    ],
)
def test_an_unknown_perturbation_is_an_error_with_the_nearest_and_never_null(known, name, text):
    with pytest.raises(KeyError, match=text):
        known.encode([(name, "T", "b1")])


@pytest.mark.parametrize("name", ["", "+", " "])
def test_a_perturbation_without_a_name_is_unknown_and_not_null(known, name):
    with pytest.raises(KeyError, match="is not known"):
        known.encode([(name, "T", "b1")])


def test_known_labels_are_those_of_perturbed_conditions_in_order():
    found = [("control", "T", "b1", 2), ("control", "B", "b2", 2), ("D+C", "T", "b3", 2), ("A", "NK", "b1", 2)]
    screen = read(screen_with_cells(found))
    index = ConditionIndex.build(screen, np.ones(len(screen), bool))
    notation = Notation({"A", "C", "D"})
    vocabularies = vocabularies_of(index, notation, with_batches=True)
    assert vocabularies.perturbations.names == ("A", "C", "D")
    assert vocabularies.cell_types.names == ("NK", "T")
    assert vocabularies.batches.names == ("b1", "b3")
    assert vocabularies_of(index, notation, with_batches=False).batches.names == ()
    assert vocabularies_of(index, screen.notation, with_batches=True).perturbations.names == ("A", "D+C")


@pytest.fixture
def dosed(known):
    return replace(known, dose_separator="@")


def test_doses_become_their_logarithms_beside_the_ids(dosed):
    labels = dosed.encode([("A@0.5", "T", "b1"), ("JAK2@10+B@1e-3", None, None), (None, "T", "b1")])
    assert labels.perturbation.tolist() == [[0, NULL], [1, 2], [NULL, NULL]]
    expected = [[math.log10(0.5), 0.0], [-3.0, 1.0], [0.0, 0.0]]
    torch.testing.assert_close(labels.dose, torch.tensor(expected))


def test_labels_without_doses_have_none(known):
    assert known.encode([("A", "T", "b1")]).dose is None
    with pytest.raises(KeyError, match=r"'A@0\.5' is not known"):
        known.encode([("A@0.5", "T", "b1")])


def test_a_perturbation_without_the_dose_its_model_needs_is_an_error(dosed):
    with pytest.raises(ValueError, match=r"'B' has no dose.*'B@0\.5'"):
        dosed.encode([("A@1+B", "T", "b1")])
    with pytest.raises(KeyError, match="is not known"):
        dosed.encode([("C", "T", "b1")])


@pytest.mark.parametrize("dose", ["0", "-1", "inf", "nan", "1e400"])
def test_a_dose_that_is_none_is_an_error(dosed, dose):
    with pytest.raises(ValueError, match="finite and greater than 0"):
        dosed.encode([(f"A@{dose}", "T", "b1")])


def test_doses_of_conditions_are_those_of_their_labels():
    found = [("control", "T", "b1", 2), ("A@0.1", "T", "b1", 2), ("A@10", "T", "b1", 2), ("A@0.1+B@1", "T", "b1", 2)]
    screen = Screen.read(screen_with_cells(found), DataConfig(dose_separator="@"))
    index = ConditionIndex.build(screen, np.ones(len(screen), bool))
    vocabularies = vocabularies_of(index, screen.notation, with_batches=True)
    assert vocabularies.perturbations.names == ("A", "B")
    assert vocabularies.doses == {"A": (0.1, 10.0), "B": (1.0,)}
    assert vocabularies.trained == ("A@0.1", "A@10", "B@1")
    labels = encode_conditions(vocabularies, index, np.zeros(len(index), bool))
    by_name = {index.labels(i)[0]: i for i in range(len(index))}
    assert labels.perturbation[by_name["A@10"]].tolist() == [0, NULL]
    assert labels.dose[by_name["A@10"]].tolist() == [1.0, 0.0]
    torch.testing.assert_close(labels.dose[by_name["A@0.1+B@1"]], torch.tensor([-1.0, 0.0]))
    assert labels.perturbation[by_name["control"]].tolist() == [NULL, NULL]


def test_doses_outside_of_training_and_perturbations_never_trained_are_extrapolated(known):
    doses = {"A": (0.1, 10.0), "B": (), "JAK2": (1.0,)}
    model = replace(known, dose_separator="@", doses=doses, n_by_features=1)  # X+Y by features alone
    assert model.trained == ("A@0.1", "A@10", "B", "JAK2@1")
    assert model.extrapolated("A@3+B") == model.extrapolated("A@0.1") == []
    assert model.extrapolated("A@30+JAK2@1") == ["dose 30 of A (0.1 to 10)"]
    assert model.extrapolated("X+Y") == ["perturbation X+Y"]
    assert model.encode([("B", None, None)]).dose.tolist() == [[0.0]]  # it never had a dose
    with pytest.raises(ValueError, match=r"'A' has no dose.*'A@0\.1'"):
        model.encode([("A", None, None)])


def test_a_control_label_is_no_part_and_no_perturbation(known):
    model = replace(known, control_labels=("ctrl", "NT"))
    assert model.encode([("A+ctrl", None, None), ("NT+B+A", None, None)]).perturbation.tolist() == [[0, NULL], [0, 1]]
    with pytest.raises(ValueError, match="'ctrl' is a control label"):
        model.encode([("ctrl", None, None)])
    assert not model.knows("NT")
    assert model.knows("B+A")
    assert not model.knows("B+C")


def test_every_part_of_labels_is_selected_and_moved(dosed):
    labels = dosed.encode([("A@1", "T", "b1"), ("B@10", "NK", None)])
    labels = replace(labels, hidden=torch.tensor([True, False]), features_only=torch.tensor([False, True]))
    one = labels.select(torch.tensor([False, True])).to("cpu")
    assert (one.perturbation.tolist(), one.dose.tolist()) == ([[1]], [[1.0]])
    assert (one.hidden.tolist(), one.features_only.tolist()) == ([False], [True])


CONDITIONS = st.lists(
    st.tuples(
        st.sampled_from(["A", "B", "A+B", "C+A", "D", "control"]),
        st.sampled_from(["T", "NK", "B cell"]),
        st.sampled_from(["b1", "b2", "b3"]),
        st.booleans(),
    ),
    max_size=10,
    unique=True,
)


def labelled(found):
    """Index of (perturbation, cell_type, batch, marginal) conditions of two cells each, and which are marginal."""
    columns = [[c[i] for c in found] for i in range(3)]
    is_control = np.array([c[0] == "control" for c in found], bool)
    index = ConditionIndex.from_conditions(*columns, is_control, np.full(len(found), 2))
    return index, np.array([c[3] for c in found], bool)


@settings(derandomize=True)
@given(CONDITIONS, st.sampled_from(["+", None]), st.booleans())
def test_known_labels_are_those_that_some_set_is_trained_with(found, separator, with_batches):
    index, marginal = labelled(found)
    seen = [set(), set(), set()]
    for perturbation, cell_type, batch, is_marginal in found:
        if perturbation != "control" and not is_marginal:
            seen[0].update([perturbation] if separator is None else perturbation.split(separator))
        if perturbation != "control" or is_marginal:
            seen[1].add(cell_type)
        if perturbation != "control" and with_batches:
            seen[2].add(batch)
    notation = Notation(frozenset("ABCD"), separator)
    known = vocabularies_of(index, notation, with_batches, marginal)
    names = (known.perturbations.names, known.cell_types.names, known.batches.names)
    assert names == tuple(tuple(sorted(of)) for of in seen)
    if not marginal.any():
        assert vocabularies_of(index, notation, with_batches) == known


@settings(derandomize=True)
@given(CONDITIONS, CONDITIONS, st.booleans(), st.sampled_from(["+", None]), st.booleans())
def test_the_labels_of_an_index_are_those_of_its_conditions_one_by_one(found, others, trained, separator, with_batches):
    index, marginal = labelled(found)
    everything, of_everything = labelled([*found, *others] if trained else others)
    known = vocabularies_of(everything, Notation(frozenset("ABCD"), separator), with_batches, of_everything)
    names = [
        (
            None if perturbation == "control" or is_marginal else perturbation,
            cell_type,
            None if perturbation == "control" and is_marginal else batch,
        )
        for perturbation, cell_type, batch, is_marginal in found
    ]
    parts = {part for name, _, _ in names if name for part in ([name] if separator is None else name.split(separator))}
    if not parts <= set(known.perturbations.names):
        assert not trained
        with pytest.raises(KeyError, match="is not known to this model"):
            encode_conditions(known, index, marginal)
        return
    labels, expected = encode_conditions(known, index, marginal), known.encode(names)
    assert labels.hidden is None
    for column in ("perturbation", "cell_type", "batch"):
        assert getattr(labels, column).dtype == torch.int64
        assert torch.equal(getattr(labels, column), getattr(expected, column))


def test_unknown_perturbations_of_marginal_conditions_are_no_error(known):
    index, marginal = labelled([("never seen", "T", "b1", True), ("control", "T", "b1", True), ("A", "T", "b1", False)])
    labels = encode_conditions(known, index, marginal)
    assert labels.perturbation.tolist() == [[NULL], [NULL], [0]]
    assert labels.cell_type.tolist() == [1, 1, 1]
    assert labels.batch.tolist() == [0, NULL, 0]


def test_scale_and_kind_are_those_of_the_preprocessing_and_not_of_the_cells():
    screen = read(counts_screen())
    batch = make_batch(sets_of(np.random.default_rng(0), len(screen), [3]), 3, screen.expression, NO_LABELS)
    ten, five = (batch.cells.dense(1, 3, 12, Preprocessing("counts", 1e4, scale))[0] for scale in (10.0, 5.0))
    torch.testing.assert_close(ten * 2, five)
    raw = batch.cells.dense(1, 3, 12, Preprocessing("log1p", 1e4, 1.0))[0]
    np.testing.assert_array_equal(
        raw, screen.expression.X[sets_of(np.random.default_rng(0), len(screen), [3])[0].rows].toarray()
    )
