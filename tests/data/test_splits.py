import json
import re

import numpy as np
import pytest

from perturbdiff.config import DataConfig, SplitConfig
from perturbdiff.data.batch import make_batch
from perturbdiff.data.screen import Screen
from perturbdiff.data.splits import (
    PARTS,
    control_halves,
    make_split,
    read_split,
    select_cells,
    truth_controls,
    write_split,
)
from perturbdiff.files import json_sha256
from perturbdiff.training.dataset import AtlasConditions, TrainingSet
from tests.screens import config_for, counts_screen, read, screen_with_cells

LABELS = ["perturbation", "cell_type", "batch"]
SELECTORS = {
    "A": lambda obs: obs["perturbation"] == "A",
    "A+B": lambda obs: obs["perturbation"] == "A+B",
    "A:NK": lambda obs: (obs["perturbation"] == "A") & (obs["cell_type"] == "NK"),
    "A:NK:b2": lambda obs: (obs["perturbation"] == "A") & (obs["cell_type"] == "NK") & (obs["batch"] == "b2"),
    "*:NK": lambda obs: obs["cell_type"] == "NK",
    "A:*:b1": lambda obs: (obs["perturbation"] == "A") & (obs["batch"] == "b1"),
    "*:*:b1": lambda obs: obs["batch"] == "b1",
    "batch=b2": lambda obs: obs["batch"] == "b2",
    "cell_type=T": lambda obs: obs["cell_type"] == "T",
    "donor=3": lambda obs: obs["donor"] == 3,
}


def small_screen(seed=0):
    adata = counts_screen(seed=seed)
    adata.obs["donor"] = np.arange(adata.n_obs) % 5
    return read(adata)


def many_conditions(n_perturbations=8):
    """A screen with `n_perturbations` x 2 cell types of 3 cells."""
    perturbations = ["control", *(f"P{i}" for i in range(n_perturbations))]
    return read(screen_with_cells([(p, t, "b", 3) for p in perturbations for t in ("T", "NK")], n_genes=3))


def split_of(screen, hold_out=(), validation=(), fraction=0.0, seed=0):
    return make_split(screen, SplitConfig(list(hold_out), list(validation), fraction), seed)


# ---------------------------------------------------------------- selectors


@pytest.mark.parametrize("selector", SELECTORS)
def test_a_selector_names_the_perturbed_cells_that_a_mask_does(selector):
    screen = small_screen()
    expected = SELECTORS[selector](screen.obs) & (screen.obs["perturbation"] != "control")
    np.testing.assert_array_equal(select_cells(screen, selector), expected)
    split = split_of(screen, [selector])
    np.testing.assert_array_equal(split.test, expected)
    np.testing.assert_array_equal(split.train, ~expected & ~truth_controls(screen, expected.to_numpy()))


def test_several_selectors_are_joined_and_test_wins_over_validation():
    screen = small_screen()
    split = split_of(screen, ["A:NK", "batch=b2"], ["*:NK"])
    test = SELECTORS["A:NK"](screen.obs) | SELECTORS["batch=b2"](screen.obs)
    np.testing.assert_array_equal(split.test, test & ~screen.is_control)
    np.testing.assert_array_equal(split.validation, (screen.obs["cell_type"] == "NK") & ~test & ~screen.is_control)


@pytest.mark.parametrize("hold_out", [[], ["A"], ["*:NK"], ["batch=b1", "donor=3"]])
def test_every_perturbed_cell_is_in_exactly_one_part_and_controls_in_no_held_out_one(hold_out):
    screen = small_screen()
    split = split_of(screen, hold_out, ["B:T:b2"])
    parts = sum(getattr(split, part).astype(int) for part in PARTS)
    np.testing.assert_array_equal(parts[~screen.is_control], 1)
    assert not (split.test | split.validation)[screen.is_control].any()


@pytest.mark.parametrize("known", [LABELS, LABELS[:2]])
def test_half_of_the_controls_of_a_context_with_held_out_cells_does_not_train(known):
    screen = small_screen()
    test = ((screen.obs["perturbation"] == "A") & (screen.obs["cell_type"] == "NK")).to_numpy()
    reserved = truth_controls(screen, test, known)
    assert not (reserved & ~screen.is_control).any()
    contexts = screen.obs.groupby(known[1:], observed=True).ngroup().to_numpy()
    for context in np.unique(contexts):
        controls = screen.is_control & (contexts == context)
        n = int(controls.sum())
        held_out = (test & (contexts == context)).any()
        assert (reserved & controls).sum() == (n - n // 2 if held_out and n > 1 else 0)
        if held_out and n > 1:
            start, truth = control_halves(screen, np.flatnonzero(controls))
            np.testing.assert_array_equal(np.flatnonzero(reserved & controls), truth)
            assert not np.isin(start, truth).any()


def test_one_control_cell_trains_all_the_same():
    screen = read(screen_with_cells([("control", "T", "b", 1), ("A", "T", "b", 3), ("B", "T", "b", 3)]))
    assert not truth_controls(screen, (screen.obs["perturbation"] == "A").to_numpy()).any()


def test_a_screen_with_cells_that_the_split_does_not_know_is_refused(tmp_path):
    screen = small_screen()
    split = split_of(screen, ["A:NK"])
    write_split(split, screen, tmp_path / "split.json")
    again = read_split(tmp_path / "split.json", screen)
    for part in PARTS:
        np.testing.assert_array_equal(getattr(again, part), getattr(split, part))
    part = screen.adata(np.flatnonzero(~(split.test & (np.arange(len(screen)) % 2 == 0))))
    write_split(split_of(read(part), ["A:NK"]), read(part), tmp_path / "part.json")
    with pytest.raises(ValueError, match=r"cells and .*part\.json was made of .*: of the others nobody knows"):
        read_split(tmp_path / "part.json", screen)


@pytest.mark.parametrize("perturbation", ["chr1:100-200", "dose=5", "A:B=C"])
def test_names_with_the_selectors_own_signs_are_reached_by_column_and_value(perturbation):
    screen = read(screen_with_cells([("control", "T", "b", 3), (perturbation, "T", "b", 2), ("X", "T", "b", 2)]))
    chosen = select_cells(screen, f"perturbation={perturbation}")
    np.testing.assert_array_equal(chosen, screen.obs["perturbation"] == perturbation)


@pytest.mark.parametrize(
    ("selector", "text"),
    [
        ("a", "hold-out 'a': no perturbed cell has perturbation 'a'; did you mean A"),
        ("A:nk", "no perturbed cell has cell_type 'nk'; did you mean NK?"),
        ("A:NK:b9", "no perturbed cell has batch 'b9'; did you mean b2, b1?"),
        ("batch=b9", "no perturbed cell has batch 'b9'; did you mean b2, b1?"),
        ("donor=7", "no perturbed cell has donor '7'"),
        ("btach=b1", "no perturbed cell has perturbation 'btach=b1'"),
        ("control", "no perturbed cell has perturbation 'control'"),
        ("", "no perturbed cell has perturbation ''"),
    ],
)
def test_a_selector_that_finds_nothing_is_an_error_with_the_nearest_names(selector, text):
    with pytest.raises(ValueError, match=re.escape(text)) as error:
        split_of(small_screen(), [selector])
    assert "PERTURBATION[:CELL_TYPE[:BATCH]], * is any, or COLUMN=VALUE" in str(error.value)


def test_a_combination_that_no_cell_has_is_an_error():
    screen = read(screen_with_cells([("control", "T", "b", 2), ("A", "T", "b", 2), ("B", "NK", "b", 2)]))
    with pytest.raises(ValueError, match="hold-out 'A:NK' matches no perturbed cell"):
        split_of(screen, ["A:NK"])


def test_holding_everything_out_is_an_error():
    with pytest.raises(ValueError, match="leave no perturbed cell to train on; hold out less"):
        split_of(small_screen(), ["*:T"], ["*:NK"])


# ---------------------------------------------------------------- random validation


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("fraction", [0.1, 0.34, 1.0])
def test_random_validation_takes_whole_conditions_and_keeps_every_perturbation_trained(fraction, seed):
    screen = many_conditions()
    split = split_of(screen, ["P0:T"], fraction=fraction, seed=seed)
    perturbed = screen.obs[~screen.is_control]
    of_condition = perturbed.assign(v=split.validation[~screen.is_control]).groupby(LABELS, observed=True)["v"]
    assert set(of_condition.mean()) <= {0.0, 1.0}
    n_training = perturbed.groupby(LABELS, observed=True).ngroups - 1
    # One condition of each of the seven perturbations that have two may leave, none of P0, which has one left.
    assert of_condition.any().sum() == min(int(n_training * fraction), 7)
    trained = set(screen.obs["perturbation"][split.train & ~screen.is_control])
    assert trained == {f"P{i}" for i in range(8)}
    assert not (split.validation & split.test).any()


def test_random_validation_depends_on_the_seed_alone():
    screen = many_conditions()
    chosen = [split_of(screen, fraction=0.3, seed=seed).validation for seed in (0, 0, 1, 2, 3)]
    np.testing.assert_array_equal(chosen[0], chosen[1])
    assert len({c.tobytes() for c in chosen}) > 2


@pytest.mark.parametrize("part", [0.2, 0.5, 0.99])
def test_cells_for_validation_are_a_part_of_each_condition_that_trains(part):
    screen = read(
        screen_with_cells([("control", "T", "b", 9), ("A", "T", "b", 10), ("B", "T", "b", 7), ("C", "T", "b", 1)])
    )
    config = SplitConfig(hold_out=["B"], validation_fraction=0.0, validation_cells=part)
    split = make_split(screen, config, 3)
    of = {name: (screen.obs["perturbation"] == name).to_numpy() for name in "ABC"}
    n = {name: int(split.validation[rows].sum()) for name, rows in of.items()}
    assert n == {"A": min(round(10 * part), 9), "B": 0, "C": 0}
    assert (split.train ^ split.validation)[of["A"] | of["C"]].all()
    assert not split.validation[screen.is_control].any()
    assert split.test[of["B"]].all()
    assert (make_split(screen, config, 3).validation == split.validation).all()
    assert (make_split(screen, config, 4).validation != split.validation).any()


def test_cells_of_atlases_are_not_validated():
    screen = many_conditions()
    conditions = AtlasConditions("atlas", screen.obs, screen.is_control, screen.n_cells, screen.notation)
    with pytest.raises(ValueError, match=r"split.validation_cells \(0.5\) is of a screen; validate on conditions"):
        make_split(conditions, SplitConfig(validation_cells=0.5), 0)


def test_few_conditions_or_chosen_ones_are_not_validated_at_random():
    assert not split_of(many_conditions(4), fraction=0.9).validation.any()  # 8 conditions
    assert split_of(many_conditions(5), fraction=0.9).validation.any()  # 10
    screen = many_conditions()
    chosen = split_of(screen, validation=["P1:T"], fraction=0.9).validation
    np.testing.assert_array_equal(chosen, select_cells(screen, "P1:T"))


# ---------------------------------------------------------------- split.json


@pytest.fixture
def stored(tmp_path):
    screen = many_conditions()
    split = split_of(screen, ["P0:T", "P1"], fraction=0.2)
    path = tmp_path / "split.json"
    write_split(split, screen, path)
    return screen, split, path


def test_a_written_split_is_read_back_cell_by_cell(stored):
    screen, split, path = stored
    again = read_split(path, screen)
    for part in PARTS:
        np.testing.assert_array_equal(getattr(again, part), getattr(split, part))
    assert again.config.hold_out == ["P0:T", "P1"]


def test_a_split_is_read_back_whatever_the_order_of_the_cells_in_the_file(tmp_path):
    adata = counts_screen()
    screen = read(adata)
    split = split_of(screen, ["A:NK"])
    write_split(split, screen, tmp_path / "split.json")
    shuffled = read(adata[np.random.default_rng(0).permutation(adata.n_obs)].copy())
    again = read_split(tmp_path / "split.json", shuffled)
    assert set(shuffled.obs.index[again.test]) == set(screen.obs.index[split.test])


def test_split_json_says_which_conditions_with_how_many_cells(stored):
    screen, split, path = stored
    content = json.loads(path.read_text())
    for part in PARTS:
        cells = screen.obs[getattr(split, part) & ~screen.is_control]
        expected = cells.groupby(LABELS, observed=True).size()
        found = {tuple(c[name] for name in LABELS): c["n_cells"] for c in content["conditions"][part]}
        assert found == {key: int(n) for key, n in expected.items()}
    assert content["hold_out"] == ["P0:T", "P1"]
    assert set(content["cells"]["test"]) == set(screen.obs.index[split.test])


def moved_cell(content):
    content["cells"]["test"].pop()


def other_selector(content):
    content["hold_out"][0] = "P2:T"


def other_number(content):
    content["conditions"]["train"][0]["n_cells"] += 1


def added_key(content):
    content["comment"] = "mine"


@pytest.mark.parametrize("change", [moved_cell, other_selector, other_number, added_key])
def test_any_change_of_a_split_is_noticed(stored, change):
    screen, _, path = stored
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"split\.json does not match its own sha256: it was changed"):
        read_split(path, screen)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"content": 1.5}, "does not say what its cells hold"),
        ({"content": {"n_genes": 3}}, "does not say what its cells hold"),
        ({"content": {"n_genes": "x", "target_sum": None}}, "does not say what its cells hold"),
        ({"content": {"n_genes": 3, "target_sum": []}}, "does not say what its cells hold"),
        ({"n_cells": None}, "is not a split.json"),
    ],
)
def test_a_split_of_a_hash_that_agrees_is_looked_at_too(stored, changed, match):
    screen, _, path = stored
    content = {**json.loads(path.read_text()), **changed}
    del content["sha256"]
    path.write_text(json.dumps({**content, "sha256": json_sha256(content)}))
    with pytest.raises(ValueError, match=match):
        read_split(path, screen)


def test_layout_and_order_of_the_json_do_not_matter(stored):
    screen, split, path = stored
    content = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(content.items()))))
    np.testing.assert_array_equal(read_split(path, screen).test, split.test)


@pytest.mark.parametrize("text", ["", "not json", "[1, 2]", "3", '{"format_version": 1}', "\udcff"])
def test_what_is_no_split_is_refused(stored, text):
    screen, _, path = stored
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"split.json is not a split.json"):
        read_split(path, screen)


def test_a_truncated_split_a_missing_one_and_a_newer_one_are_refused(stored, tmp_path):
    screen, _, path = stored
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match=r"is not a split\.json"):
        read_split(path, screen)
    path.write_text(text.replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(ValueError, match="format_version 2; this version reads 1"):
        read_split(path, screen)
    with pytest.raises(FileNotFoundError, match=r"none.json does not exist"):
        read_split(tmp_path / "none.json", screen)


def test_a_split_of_another_screen_is_refused_with_the_numbers(stored):
    _, split, path = stored
    with pytest.raises(
        ValueError, match=rf"names \d+ validation cells, .* lacks \d+ of them|names {split.test.sum()} test"
    ):
        read_split(path, read(screen_with_cells([("control", "T", "b", 1), ("A", "T", "b", 1)])))


# ---------------------------------------------------------------- what training sees


def marked_screen(hold_out, validation):
    """The small screen with 999 counts of the last gene in every held-out cell, and nowhere else."""
    plain = small_screen()
    split = split_of(plain, hold_out, validation)
    held_out = set(plain.obs.index[split.test | split.validation])
    adata = counts_screen()
    adata.obs["donor"] = np.arange(adata.n_obs) % 5
    X = adata.X.tolil()
    X[:, -1] = 0
    X[adata.obs_names.isin(held_out), -1] = 999
    adata.X = X.tocsr()
    return read(adata), held_out


@pytest.mark.parametrize(
    ("hold_out", "validation"),
    [
        (["A:NK"], []),
        (["A+B"], ["B:T:b1"]),
        (["batch=b2"], []),
        (["*:NK", "A"], ["B:T:b2"]),
        (["donor=2"], ["donor=3"]),
    ],
)
def test_no_held_out_cell_reaches_training(hold_out, validation):
    screen, held_out = marked_screen(hold_out, validation)
    assert held_out
    split = SplitConfig(hold_out, validation, 0.0)
    config = config_for("memory", "unused", "data.n_hvg=null", split=split)
    data = TrainingSet.from_screen(screen, config)
    assert not held_out & set(data.origin.obs.index[data.train.index.rows])
    sampler = data.train.sampler(config)
    seen = set()
    for epoch in range(2):
        for step in range(sampler.steps_per_epoch):
            sets = sampler.batch(epoch, step)
            for s in sets:
                seen |= set(data.origin.obs.index[np.concatenate([s.rows, s.control_rows])])
            batch = make_batch(sets, config.data.set_size, data.cells, data.train.labels)
            for cells in batch.dense():
                assert not cells[..., -1].any()
    assert not held_out & seen
    assert set(data.origin.obs.index[~data.origin.is_control]) - held_out <= seen


def test_no_test_cell_is_validated_on():
    screen, _ = marked_screen(["A:NK"], [])
    config = config_for(split=SplitConfig(["A:NK"], ["*:NK"], 0.0))
    data = TrainingSet.from_screen(screen, config)
    sampler = data.validation.sampler(config)
    seen = {row for step in range(sampler.steps_per_epoch) for s in sampler.batch(0, step) for row in s.rows}
    expected = (screen.obs["cell_type"] == "NK") & (screen.obs["perturbation"] != "A") & ~screen.is_control
    assert seen == set(np.flatnonzero(expected))


# ---------------------------------------------------------------- the content of held-out cells


def stored_split(adata, path, **settings):
    screen = Screen.read(adata, DataConfig(screen="unused", **settings))
    write_split(split_of(screen, ["A:NK"]), screen, path)
    return screen


def test_held_out_cells_with_other_values_are_refused_and_training_cells_may_change(tmp_path):
    path, adata = tmp_path / "split.json", counts_screen(seed=int(np.random.default_rng().integers(1 << 31)))
    screen = stored_split(adata, path)
    test = read_split(path, screen).test
    held_out = adata.obs_names.isin(screen.obs.index[test])
    other = adata.copy()
    other.X = adata.X.toarray()
    other.X[~held_out] *= 2
    np.testing.assert_array_equal(read_split(path, read(other)).test, test)
    other.X[np.flatnonzero(held_out)[:1]] *= 2
    with pytest.raises(ValueError, match=r"other values than those that .*split\.json was made of \(X differs\); give"):
        read_split(path, read(other))
    with pytest.raises(ValueError, match=rf"\({adata.n_vars - 1} genes, not {adata.n_vars}\)"):
        read_split(path, read(adata[:, 1:].copy()))


def test_a_split_of_an_older_version_without_hashes_of_values_is_read(tmp_path):
    path, adata = tmp_path / "split.json", counts_screen()
    screen = stored_split(adata, path)
    content = json.loads(path.read_text())
    del content["content"], content["sha256"]
    path.write_text(json.dumps({**content, "sha256": json_sha256(content)}))
    assert set(screen.obs.index[read_split(path, screen).test]) == set(content["cells"]["test"])


def test_logarithms_of_another_number_of_counts_are_not_compared_but_warned_of(tmp_path):
    path, adata = tmp_path / "split.json", counts_screen(n_genes=40)
    adata.X = np.asarray(np.log1p(adata.X.toarray() / adata.X.sum(axis=1) * 1e4))
    screen = stored_split(adata, path)
    other = Screen.read(adata, DataConfig(screen="unused", target_sum=5e3))
    with pytest.warns(UserWarning, match=r"log1p values of 5,000 counts a cell, and were such of 10,000"):
        again = read_split(path, other)
    np.testing.assert_array_equal(again.test, read_split(path, screen).test)


# ---------------------------------------------------------------- conditions of which no batch is known


def test_where_no_batch_is_known_all_batches_of_a_condition_are_validated_together():
    labels = [f"P{i}" for i in range(6)]
    cells = [(p, t, b, 2) for p in ("control", *labels) for t in ("T", "NK") for b in ("b1", "b2", "b3")]
    screen = read(screen_with_cells(cells, n_genes=3))
    config = SplitConfig(["P0:T"], [], 0.3)
    split = make_split(screen, config, 0, None, ("perturbation", "cell_type"))

    def conditions(cells):
        return {
            tuple(row) for row in screen.obs.loc[cells & ~screen.is_control, ["perturbation", "cell_type"]].to_numpy()
        }

    assert len(conditions(split.validation)) == 3
    assert not conditions(split.validation) & conditions(split.train)
    assert split.notes == ()
    with_batches = make_split(screen, config, 0)
    assert conditions(with_batches.validation) & conditions(with_batches.train)
    (note,) = make_split(screen, SplitConfig(["P0:T:b1"], [], 0.0), 0, None, ("perturbation", "cell_type")).notes
    assert note.startswith("P0:T: cells of some batches are held out, and cells of others train; controls match by")
    assert make_split(screen, SplitConfig(["P0:T:b1"], [], 0.0), 0).notes == ()
