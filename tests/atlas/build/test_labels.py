"""What an atlas calls its conditions: labels of sources parsed once, in one way, whatever each source wrote."""

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from perturbdiff.atlas.build.run import build
from perturbdiff.config import AtlasConfig, BuildConfig, SourceConfig, SplitConfig
from perturbdiff.data.splits import make_split
from perturbdiff.training.dataset import TrainingSet
from tests.screens import config_for


def write(path, obs, n_genes=40, seed=0):
    rng = np.random.default_rng([seed, len(obs)])
    obs = pd.DataFrame(obs)
    obs.index = [f"{path.stem}{i}" for i in range(len(obs))]
    var = pd.DataFrame(index=[f"gene_{g}" for g in range(n_genes)])
    AnnData(rng.poisson(3.0, (len(obs), n_genes)).astype(np.float32), obs=obs, var=var).write_h5ad(path)
    return path


def built(tmp_path, *sources):
    return build(BuildConfig(out=str(tmp_path / "atlas"), sources=list(sources)), workers=1)


def cells_of(atlas):
    """Number of cells of each perturbation."""
    table = atlas.conditions.to_pandas()
    return {str(name): int(n) for name, n in table.groupby("perturbation", observed=True)["n_cells"].sum().items()}


def labels(*perturbations, n=2, cell_type="T", batch="b"):
    return {"perturbation": [p for p in perturbations for _ in range(n)], "cell_type": cell_type, "batch": batch}


def test_parts_have_no_order_and_controls_are_none(tmp_path):
    obs = labels("ctrl", "NT", "A+ctrl", "NT+A", "A+B", "B+A", "B", "(+)-JQ1", "JQ1+(+)", "A+A")
    path = write(tmp_path / "a.h5ad", obs)
    atlas = built(tmp_path, SourceConfig(str(path), control_label="ctrl", other_control_labels=["NT"]))
    assert cells_of(atlas) == {"control": 4, "A": 6, "A+B": 4, "B": 2, "(+)-JQ1": 2, "JQ1+(+)": 2}
    assert atlas.info.dose_separator is None


def test_what_stands_alone_in_one_source_may_be_a_part_in_another(tmp_path):
    one = write(tmp_path / "one.h5ad", labels("control", "A", "B"))
    two = write(tmp_path / "two.h5ad", labels("control", "B_A", "B_X", batch="c"))
    atlas = built(tmp_path, SourceConfig(str(one)), SourceConfig(str(two), combination_separator="_"))
    assert cells_of(atlas) == {"control": 4, "A": 2, "B": 2, "A+B": 2, "B_X": 2}


def test_doses_of_a_column_or_in_labels_are_a_part_of_the_condition(tmp_path):
    obs = labels("DMSO", "A", "A", "B", n=2) | {"dose": np.repeat([0.0, 0.1, 10.0, 1e6], 2).astype(np.float32)}
    one = write(tmp_path / "one.h5ad", obs)
    tahoe = [repr([("DMSO_TF", 0.0, "uM")]), repr([("A", 0.1, "uM")])]
    two = write(tmp_path / "two.h5ad", labels(*tahoe, batch="c"))
    atlas = built(
        tmp_path,
        SourceConfig(str(one), control_label="DMSO", dose_col="dose"),
        SourceConfig(str(two), control_label=tahoe[0]),
    )
    assert cells_of(atlas) == {"control": 4, "A@0.1": 4, "A@10": 2, "B@1000000": 2}
    assert atlas.info.dose_separator == "@"
    config = config_for(str(tmp_path), "unused", "data.n_hvg=null", split=SplitConfig(validation_fraction=0.0))
    config.data.screen, config.data.atlases = None, [AtlasConfig(str(tmp_path / "atlas"))]
    known = TrainingSet.from_atlases(config).vocabularies
    assert known.perturbations.names == ("A", "B")
    assert known.doses == {"A": (0.1, 10.0), "B": (1e6,)}
    again = build(BuildConfig(out=str(tmp_path / "again"), sources=[SourceConfig(str(tmp_path / "atlas"))]), workers=1)
    assert cells_of(again) == cells_of(atlas)
    assert again.info.dose_separator == "@"


def test_labels_that_are_hardly_perturbations_are_said(tmp_path, capsys):
    path = write(tmp_path / "a.h5ad", labels("control", "A", "ctrl", "unassigned"))
    built(tmp_path, SourceConfig(str(path)))
    said = capsys.readouterr().out
    assert "'unassigned' are taken for perturbations; 'source.drop=[\"unassigned\"]' leaves such cells out" in said
    assert "'source.other_control_labels=[\"ctrl\"]' makes controls of them" in said


def test_units_of_doses_are_kept_and_no_two_are_mixed(tmp_path):
    one = write(tmp_path / "one.h5ad", labels("control", "A") | {"dose": ["0", "0", "0.1 uM", "0.1 uM"]})
    two = write(tmp_path / "two.h5ad", labels("control", "A", batch="c") | {"dose": 5.0, "dose_unit": "nM"})
    assert built(tmp_path, SourceConfig(str(one), dose_col="dose")).info.dose_unit == "uM"
    both = SourceConfig(str(one), dose_col="dose"), SourceConfig(str(two), dose_col="dose")
    with pytest.raises(ValueError, match="the sources of an atlas: doses are in nM, uM; write them in one unit"):
        build(BuildConfig(out=str(tmp_path / "both"), sources=list(both)), workers=1)
    mixed = write(tmp_path / "mixed.h5ad", labels("control", "A") | {"dose": ["0", "0", "0.1 uM", "5 nM"]})
    with pytest.raises(ValueError, match="doses are in nM, uM"):
        build(BuildConfig(out=str(tmp_path / "m"), sources=[SourceConfig(str(mixed), dose_col="dose")]), workers=1)


def test_a_dose_that_is_none_is_an_error_that_names_the_cell(tmp_path):
    path = write(tmp_path / "a.h5ad", labels("control", "A") | {"dose": [0.0, 0.0, 1.0, np.nan]})
    with pytest.raises(ValueError, match="cell 'a3' received 'A' at dose nan; doses must be finite"):
        built(tmp_path, SourceConfig(str(path), dose_col="dose"))


def test_cells_are_chosen_by_obs_columns(tmp_path):
    obs = labels("control", "A", "B") | {"primary": [True, False] * 3, "tissue": ["lung"] * 4 + ["gut"] * 2}
    path = write(tmp_path / "a.h5ad", obs)
    atlas = built(tmp_path, SourceConfig(str(path), where=["primary=True", "tissue=lung"]))
    assert cells_of(atlas) == {"control": 1, "A": 1}
    with pytest.raises(
        KeyError, match=r"obs columns '(sex|ploidy)', '(sex|ploidy)' not in .*; found .* Set source.where="
    ):
        built(tmp_path / "b", SourceConfig(str(path), where=["sex=f", "ploidy=2"]))
    with pytest.raises(ValueError, match="where 'primary' must be COLUMN=VALUE"):
        built(tmp_path / "b", SourceConfig(str(path), where=["primary"]))


def test_two_studies_that_share_a_context_are_named_and_told_apart_by_source(tmp_path):
    one = write(tmp_path / "one.h5ad", labels("control", "A"))
    two = write(tmp_path / "two.h5ad", labels("control", "B", "A:x") | {"batch": ["b"] * 4 + ["c"] * 2})
    atlas = built(tmp_path, SourceConfig(str(one)), SourceConfig(str(two)))
    assert "their controls stand for each other: T:b (one, two)" in " ".join(atlas.summary().split())
    config = config_for("x", "unused", "data.n_hvg=null", split=SplitConfig(validation_fraction=0.0))
    config.data.screen, config.data.atlases = None, [AtlasConfig(str(tmp_path / "atlas"))]
    config.data.control_match = "cell_type"
    origin = TrainingSet.from_atlases(config).origin
    held_out = make_split(origin, SplitConfig(["*:T:source=two"], [], 0.0), 0).test
    assert origin.obs["perturbation"][held_out].tolist() == ["B", "A:x"]
    assert make_split(origin, SplitConfig(["A:x"], [], 0.0), 0).test.sum() == 1


def test_inputs_of_a_known_kind_are_read_by_their_own_columns_and_that_is_said(tmp_path, capsys):
    obs = {"gene": ["non-targeting", "A"] * 2, "gem_group": ["1", "1", "2", "2"]}
    atlas = built(tmp_path, SourceConfig(str(write(tmp_path / "k562.h5ad", obs))))
    assert cells_of(atlas) == {"control": 2, "A": 2}
    table = atlas.conditions.to_pandas()
    assert set(table["cell_type"]) == {"k562"}
    assert set(table["batch"]) == {"1", "2"}
    said = capsys.readouterr()
    assert "columns as of Replogle: source.perturbation_col=gene source.cell_type_col=null" in said.out + said.err


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({"drop": ["FOSB+CEBPE"]}, {"control": 6, "FOSB": 4, "CEBPE": 2}),
        ({"drop": ["FOSB"]}, {"control": 6, "CEBPE": 2, "CEBPE+FOSB": 2}),
        ({"drop": ["FOSB+*"]}, {"control": 6, "CEBPE": 2}),
        ({"keep": ["ctrl", "FOSB+ctrl"]}, {"control": 6, "FOSB": 4}),
        ({"cells": "perturbed"}, {"FOSB": 4, "CEBPE": 2, "CEBPE+FOSB": 2}),
        ({"cells": "unperturbed"}, {"control": 6}),
    ],
)
def test_cells_of_a_source_are_chosen_by_what_their_labels_mean(tmp_path, settings, left):
    obs = labels("ctrl", "ctrl+ctrl", "NT+ctrl", "FOSB+ctrl", "ctrl+FOSB", "CEBPE", "CEBPE+FOSB")
    path = write(tmp_path / "a.h5ad", obs)
    words = {"control_label": "ctrl", "other_control_labels": ["NT"], **settings}
    assert cells_of(built(tmp_path, SourceConfig(str(path), **words))) == left


def test_cells_without_a_label_are_left_out_by_nan_or_are_an_error(tmp_path):
    obs = labels("control", "A", "A") | {"ok": [True] * 4 + [False] * 2}
    obs["perturbation"] = [*obs["perturbation"][:4], None, None]
    path = write(tmp_path / "a.h5ad", obs)
    with pytest.raises(ValueError, match=r"2 missing values .* first in cell 'a4'.*source\.drop=\['nan'\]"):
        built(tmp_path / "x", SourceConfig(str(path)))
    for i, settings in enumerate(({"drop": ["nan"]}, {"where": ["ok=True"]})):
        assert cells_of(built(tmp_path / str(i), SourceConfig(str(path), **settings))) == {"control": 2, "A": 2}
