"""The atlas commands as they are typed: what they print, and one line where something is wrong."""

import json
import subprocess
import sys

import datasets
import numpy as np
import pytest

from perturbdiff.atlas.store import Atlas
from perturbdiff.cli.main import main
from perturbdiff.config import Preprocessing
from tests.cli.test_main import TINY, assert_says, contents, here, only_line, refused  # noqa: F401 (fixtures)
from tests.screens import counts_screen, log1p_cp10k, written
from tests.simulated import DEFAULTS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def screens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("screens")
    return [written(counts_screen(n_genes=30, n=8, seed=seed), folder / f"screen_{seed}.h5ad") for seed in (0, 1)]


@pytest.fixture(scope="module")
def atlas(screens, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "atlas"
    main(["atlas", "build", *map(str, screens), "--out", str(folder), "--workers", "1", "license=cc-by-4.0"])
    return folder


def test_build_info_verify_load_and_train_follow_one_another(atlas, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    main(["atlas", "info", str(atlas)])
    said = capsys.readouterr().out
    for piece in ("280: 192 perturbed, 88 'control'", "genes       30", "license     cc-by-4.0", "screen_1.h5ad"):
        assert piece in said
    main(["atlas", "verify", str(atlas)])
    assert "1 shards, 280 cells" in capsys.readouterr().out
    cells = datasets.load_dataset(str(atlas), split="train", cache_dir=str(tmp_path / "plain"))
    assert len(cells) == 280
    main(
        [
            "train",
            "--atlas",
            str(atlas),
            "--hold-out",
            "A:NK",
            "--out",
            str(tmp_path / "run"),
            "--recipe",
            DEFAULTS,
            *TINY,
        ]
    )
    assert (tmp_path / "run" / "model" / "config.json").is_file()
    assert "192 perturbed" in capsys.readouterr().out


def test_a_cache_that_was_made_before_is_what_training_reads(atlas, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    main(["atlas", "cache", str(atlas)])
    assert "280 cells, 0.00 GB in " in capsys.readouterr().out
    made = sorted(tmp_path.rglob("*.arrow"))
    assert made
    stated = [path.stat().st_mtime_ns for path in made]
    monkeypatch.setattr(Atlas, "check_shard", lambda *given: pytest.fail("it is hashed again"))
    Atlas.open(atlas).arrow_cells(None, Preprocessing("counts", 1e4, 10.0))
    assert sorted(tmp_path.rglob("*.arrow")) == made
    assert [path.stat().st_mtime_ns for path in made] == stated


def test_settings_of_every_input_and_of_the_atlas_may_stand_anywhere(screens, tmp_path):
    words = ["--out", str(tmp_path / "atlas"), "source.cells=unperturbed", "--genes", "intersection", "seed=3"]
    main(["atlas", "build", "source.license=mit", str(screens[0]), *words, str(screens[1]), "--workers", "1"])
    manifest = json.loads((tmp_path / "atlas" / "atlas.json").read_text())
    assert (manifest["n_cells"], manifest["seed"], manifest["genes_rule"]) == (88, 3, "intersection")
    assert [source["license"] for source in manifest["sources"]] == ["mit", "mit"]


def test_tasks_share_the_reading_and_the_command_without_one_ends_it(screens, atlas, tmp_path):
    out = tmp_path / "atlas"
    command = ["atlas", "build", *map(str, screens), "--out", str(out), "--workers", "1", "license=cc-by-4.0"]
    for i in (2, 1):
        main([*command, "--task", f"{i}/2"])
        assert not out.exists()
    main(command)
    assert contents_by_name(out) == contents_by_name(atlas)


def contents_by_name(folder):
    return {path.relative_to(folder): content for path, content in contents(folder).items()}


def test_help_teaches_the_rules_of_genes_and_tasks(capsys):
    with pytest.raises(SystemExit):
        main(["atlas", "build", "--help"])
    assert_says(capsys.readouterr().out, "merge-then-select:N", "intersection", "--task I/N", "source.KEY=value")


@pytest.mark.parametrize(
    ("words", "pieces"),
    [
        ([], ["nothing to build from", "give inputs"]),
        (["none.h5ad"], ["none.h5ad"]),
        (["SCREEN", "source.perturbation_cl=x"], ["'perturbation_cl'", "Did you mean: 'perturbation_col'"]),
        (["SCREEN", "source.perturbation_col=x"], ["'x'", "perturbation"]),
        (["SCREEN", "source.control_label=ctrl"], ["'ctrl'", "control"]),
        (["SCREEN", "source.keep=[C]"], ["'C'"]),
        (["SCREEN", "--genes", "unoin"], ["unoin", "union"]),
        (["SCREEN", "--genes", "merge-then-select:0"], ["merge-then-select"]),
        (["SCREEN", "SCREEN"], ["screen_0", "name"]),
        (["SCREEN", "LOGGED"], ["log1p", "counts"]),
        (["SCREEN", "seed=-1"], ["seed (-1)"]),
        (["SCREEN", "--max-memory", "50MB"], ["50", "memory"]),
        (["SCREEN", "--workers", "0"], ["workers (0)"]),
        (["source.cells=all"], ["no"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.usefixtures("here")
def test_a_build_that_cannot_be_is_refused_in_one_line_and_leaves_no_atlas(screens, tmp_path, capsys, words, pieces):
    logged = counts_screen(n_genes=30, n=8, seed=3)
    logged.X = log1p_cp10k(logged.X).astype(np.float32)
    known = {"SCREEN": str(screens[0]), "LOGGED": str(written(logged, tmp_path / "logged.h5ad"))}
    with pytest.raises(SystemExit) as stop:
        main(["atlas", "build", *(known.get(word, word) for word in words), "--out", str(tmp_path / "atlas")])
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("perturbdiff: error: ")]
    assert len(lines) == 1
    assert_says(lines[0], *pieces)
    assert not (tmp_path / "atlas").exists()


@pytest.mark.parametrize("option", [["--task", "0/2"], ["--task", "3/2"], ["--task", "x"], ["--max-memory", "much"]])
def test_options_of_a_wrong_form_are_refused(option, screens, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["atlas", "build", str(screens[0]), "--out", "unused", *option])
    assert stop.value.code == 2
    assert option[1] in capsys.readouterr().err


@pytest.mark.parametrize("command", ["info", "verify"])
def test_a_folder_that_is_no_atlas_is_refused(refused, here, command):  # noqa: F811
    (here / "empty").mkdir()
    assert_says(refused("atlas", command, here / "empty"), "empty")


def test_an_existing_folder_is_never_built_over(refused, atlas, screens):  # noqa: F811
    assert_says(refused("atlas", "build", screens[0], "--out", atlas), "exists")


def test_a_screen_and_an_atlas_together_are_refused(screens, atlas, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--screen", str(screens[0]), "--atlas", str(atlas), "--out", "unused"])
    assert stop.value.code == 2
    assert "not allowed with argument" in capsys.readouterr().err


def test_training_on_nothing_is_refused_with_what_to_give(refused):  # noqa: F811
    assert_says(refused("train", "--out", "unused"), "data.screen", "data.atlases", "give one of them")


def test_a_damaged_atlas_is_refused_by_the_command_in_one_line(atlas, tmp_path):
    import shutil

    shutil.copytree(atlas, tmp_path / "atlas")
    shard = tmp_path / "atlas" / "data" / "cells-00000.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 1
    shard.write_bytes(content)
    command = [sys.executable, "-m", "perturbdiff", "atlas", "verify", str(tmp_path / "atlas")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    line = only_line(done.stderr[done.stderr.index("perturbdiff: error") :])
    assert_says(line, "cells-00000.parquet", "sha256")
