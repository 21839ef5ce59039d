"""Training on atlases: the same numbers as on a screen, streamed or not, stopped or not."""

import json
import re
import shutil

import pytest

from perturbdiff import PerturbDiff
from perturbdiff.atlas.build.run import build
from perturbdiff.config import BuildConfig, DataConfig, SourceConfig, load_config
from perturbdiff.data.screen import Screen
from perturbdiff.training.loop import fit
from perturbdiff.training.run_folder import with_streams
from tests.atlases import atlas_of_screen, write_atlas
from tests.screens import real_screen
from tests.simulated import TINY, tiny_config, write_screen

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        import datasets

        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    return write_screen(tmp_path_factory.mktemp("screen"))


@pytest.fixture(scope="module")
def atlas(screen, tmp_path_factory):
    read = Screen.read(screen, DataConfig(screen=str(screen)))
    return atlas_of_screen(tmp_path_factory.mktemp("atlas") / "of_screen", read, rows_per_shard=97)


def run_of(out, data, *words, hold_out=("pert_0:type_0",), stop_at=None):
    given = {"out": str(out), "data": data, "split": {"hold_out": list(hold_out)}}
    return fit(load_config(None, [*TINY, *words], given), stop_at=stop_at)


def losses(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("cells_per_s", "data_wait")} for line in lines]


def on(*atlases, **settings):
    return {"atlases": [a if isinstance(a, dict) else {"path": str(a)} for a in atlases], **settings}


# Where conditions are held out, half of the controls of their contexts do not train on a screen: it is scored on them.
def test_losses_on_an_atlas_equal_those_on_the_screen_it_holds(screen, atlas, tmp_path):
    words = ["split.validation=[pert_0:type_0]"]
    fit(tiny_config(screen, tmp_path / "screen", *words, hold_out=()))
    result = run_of(tmp_path / "atlas", on(atlas), *words, hold_out=())
    assert losses(tmp_path / "atlas") == losses(tmp_path / "screen")
    splits = [json.loads((tmp_path / name / "split.json").read_text()) for name in ("screen", "atlas")]
    assert splits[0]["conditions"] == splits[1]["conditions"]
    assert "cells" not in splits[1]
    genes = PerturbDiff.from_pretrained(tmp_path / "screen" / "model").genes
    assert result.model.genes == genes


def test_losses_on_a_real_screen_equal_those_on_the_atlas_built_from_it(tmp_path):
    path = real_screen("kang2018_pbmc_ifnb.h5ad")
    build(BuildConfig(str(tmp_path / "kang"), [SourceConfig(str(path))]), workers=1)
    words = ["training.n_steps=4", "split.validation=[IFN-beta:CD4T]"]
    run_of(tmp_path / "on_screen", {"screen": str(path)}, *words, hold_out=[])
    run_of(tmp_path / "on_atlas", on(tmp_path / "kang"), *words, hold_out=[])
    assert losses(tmp_path / "on_atlas") == losses(tmp_path / "on_screen")


STREAMED = {"streamed": True, "n_streams": 2}


@pytest.mark.parametrize("data", [{}, STREAMED], ids=["cached", "streamed"])
def test_a_run_that_was_stopped_goes_on_with_the_same_losses(atlas, tmp_path, data):
    words = ["data.n_hvg=null", "training.n_steps=13"]  # into the second epoch
    run_of(tmp_path / "whole", on(atlas, **data), *words)
    for stop_at in (2, 9, None):
        run_of(tmp_path / "parts", on(atlas, **data), *words, stop_at=stop_at)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@pytest.mark.parametrize("ahead", [0, 5])
def test_batches_made_ahead_change_nothing(atlas, tmp_path, ahead):
    run_of(tmp_path / "two", on(atlas, **STREAMED), "data.n_hvg=null")
    run_of(tmp_path / "other", on(atlas, **STREAMED), "data.n_hvg=null", f"data.prefetch={ahead}")
    assert losses(tmp_path / "other") == losses(tmp_path / "two")


def test_threads_that_decode_change_nothing_also_where_a_run_goes_on_with_others(atlas, tmp_path):
    words = ["data.n_hvg=null", "training.n_steps=13"]  # into the second epoch
    run_of(tmp_path / "one", on(atlas, **STREAMED, decoding_threads=1), *words)
    run_of(tmp_path / "three", on(atlas, **STREAMED, decoding_threads=3), *words, stop_at=5)
    run_of(tmp_path / "three", on(atlas, **STREAMED, decoding_threads=1), *words, stop_at=9)
    run_of(tmp_path / "three", on(atlas, **STREAMED, decoding_threads=3), *words)
    assert losses(tmp_path / "three") == losses(tmp_path / "one")


def test_a_run_does_not_go_on_with_an_atlas_that_changed(screen, atlas, tmp_path):
    shutil.copytree(atlas, tmp_path / "atlas")
    run_of(tmp_path / "run", on(tmp_path / "atlas"), "data.n_hvg=null", stop_at=2)
    shutil.rmtree(tmp_path / "atlas")
    read = Screen.read(screen, DataConfig(screen=str(screen)))
    atlas_of_screen(tmp_path / "atlas", read, rows_per_shard=50)
    with pytest.raises(ValueError, match=r"not those it was started with \(data\.atlases\[0\] is .* was "):
        run_of(tmp_path / "run", on(tmp_path / "atlas"), "data.n_hvg=null")


def test_a_streamed_run_keeps_the_streams_it_was_started_with(atlas, tmp_path, monkeypatch):
    words, out = ["data.n_hvg=null"], tmp_path / "run"

    def n_streams(world_size, **settings):
        given = {"out": str(out), "data": on(atlas, **settings), "split": {"hold_out": ["pert_0:type_0"]}}
        with monkeypatch.context() as patch:
            patch.setenv("WORLD_SIZE", str(world_size))
            return with_streams(load_config(None, [*TINY, *words], given), out).data.n_streams

    assert n_streams(2, streamed=True) == 2  # one a process, at the start
    assert n_streams(2, streamed=True, n_streams=4) == 4
    assert n_streams(2) is None
    run_of(out, on(atlas, **STREAMED), *words, stop_at=2)
    assert n_streams(4, streamed=True) == 2  # those of the start, on any number of processes
    assert n_streams(1, streamed=True) == 2
    assert n_streams(2, streamed=True, n_streams=4) == 4  # what is given stands, and is refused later
    with pytest.raises(ValueError, match=r"data\.n_streams was 2, is 4"):
        run_of(out, on(atlas, streamed=True, n_streams=4), *words)
    run_of(out, on(atlas, streamed=True), *words)  # streams are not given: those of the start
    run_of(tmp_path / "whole", on(atlas, **STREAMED), *words)
    assert losses(out) == losses(tmp_path / "whole")


def test_marginal_sets_train_without_perturbations_and_controls(atlas, tmp_path):
    result = run_of(tmp_path / "run", on({"path": str(atlas), "sets": "marginal"}), "data.n_hvg=null", hold_out=[])
    model = PerturbDiff.from_pretrained(result.folder / "model")
    assert model.vocabularies.perturbations.names == ()
    assert model.vocabularies.cell_types.names == ("type_0", "type_1")
    card = (result.folder / "model" / "README.md").read_text()
    assert "it predicts no response" in card


def test_unperturbed_cells_alone_can_be_trained_on_as_marginal_sets_only(tmp_path):
    folder = write_atlas(tmp_path / "atlas", [("control", "T", "b1", 30), ("control", "NK", "b2", 9)])
    run_of(tmp_path / "run", on({"path": str(folder), "sets": "marginal"}), hold_out=[])
    with pytest.raises(ValueError, match="no perturbed cell to train on"):
        run_of(tmp_path / "other", on(folder), hold_out=[])


def test_atlases_mix_by_weight(atlas, tmp_path):
    both = on({"path": str(atlas), "sets": "marginal", "weight": 1.0}, {"path": str(atlas), "weight": 3.0})
    result = run_of(tmp_path / "run", both, "data.n_hvg=20")
    assert result.model.vocabularies.perturbations.names == ("pert_0", "pert_1", "pert_2")
    training = json.loads((tmp_path / "run" / "model" / "training.json").read_text())
    assert [a["name"] for a in training["atlases"]] == ["of_screen", "of_screen"]
    assert str(tmp_path) not in json.dumps(training)


def test_one_atlas_twice_is_refused(atlas, tmp_path):
    with pytest.raises(ValueError, match="are the same atlas"):
        run_of(tmp_path / "run", on(atlas, atlas), "data.n_hvg=null", "training.n_steps=2")


@pytest.mark.parametrize(
    ("change", "words", "said"),
    [
        ({"streamed": True}, ["data.n_hvg=20"], "needs a pass over all cells"),
        ({"streamed": True, "n_streams": 3}, [], "must divide data.sets_per_batch"),
        ({"screen": "x.h5ad"}, [], "give one of them"),
        ({}, ["data.min_set_size=5"], "half of data.set_size"),
        ({}, ["data.min_set_size=2", "data.set_size=1000", "data.min_set_size=400"], "no training condition has"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_written(atlas, tmp_path, change, words, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        run_of(tmp_path / "run", {**on(atlas), **change}, *words)
    assert not (tmp_path / "run").exists()


def test_atlases_of_other_genes_are_refused_with_an_example(atlas, tmp_path):
    other = write_atlas(tmp_path / "other")
    with pytest.raises(ValueError, match=r"must have the same genes in the same order; \d+ differ"):
        run_of(tmp_path / "run", on(atlas, other))


def test_a_weight_for_one_atlas_only_is_refused(atlas, tmp_path):
    with pytest.raises(ValueError, match="to all atlases"):
        run_of(tmp_path / "run", on(atlas, {"path": str(atlas), "weight": 2.0}))
