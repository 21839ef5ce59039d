import inspect
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

import perturbdiff.config
from perturbdiff.cli.main import main
from perturbdiff.cli.settings import settings_lines
from perturbdiff.config import BuildConfig, Config, load_config

RECIPES = Path(__file__).parents[2] / "recipes"


def printed(capsys, *argv):
    main(list(argv))
    return capsys.readouterr().out


def defaults(schema):
    return OmegaConf.to_container(OmegaConf.structured(schema))


@pytest.mark.parametrize(("words", "schema"), [([], Config), (["atlas"], BuildConfig)], ids=["all", "atlas"])
def test_the_settings_that_are_printed_are_the_defaults(capsys, words, schema):
    assert yaml.safe_load(printed(capsys, "settings", *words)) == defaults(schema)


def test_a_section_of_the_settings_is_that_section_alone(capsys):
    assert yaml.safe_load(printed(capsys, "settings", "optim")) == {"optim": defaults(Config)["optim"]}


def test_the_printed_settings_are_a_recipe_that_changes_nothing(capsys, tmp_path):
    text = printed(capsys, "settings").replace("out: ???", "out: run").replace("screen: null", "screen: s.h5ad")
    (tmp_path / "recipe.yaml").write_text(text)
    assert load_config(tmp_path / "recipe.yaml") == load_config(given={"out": "run", "data": {"screen": "s.h5ad"}})


@pytest.mark.parametrize("name", ["AtlasConfig", "AtlasSize", "DataConfig", "DenoiserConfig", "TrainingConfig"])
def test_every_comment_on_a_setting_is_printed(name):
    schema = getattr(perturbdiff.config, name)
    fields, _, _ = inspect.getsource(schema).partition("@property")
    tokens = tokenize.generate_tokens(io.StringIO(fields).readline)
    comments = [token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT]
    text = "\n".join(settings_lines(Config))
    assert comments
    assert [comment for comment in comments if comment not in text] == []


def test_the_values_that_a_setting_may_have_are_printed(capsys):
    lines = printed(capsys, "settings").splitlines()
    assert "  sampler: ddim  # ddim | ddpm" in lines
    assert "  trackers: [tensorboard]  # tensorboard | wandb" in lines


def test_an_unknown_section_is_an_error_that_names_the_nearest(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["settings", "trainin"])
    assert "did you mean training?" in capsys.readouterr().err


def test_the_list_of_recipes_has_each_with_its_first_line_in_80_columns(capsys):
    text = printed(capsys, "recipes")
    files = [path for path in RECIPES.rglob("*") if path.is_file()]
    assert len(files) > 30
    for path in files:
        first = next(line for line in path.read_text().splitlines() if not line.startswith("#!"))
        [entry] = re.findall(rf"^{path.parent.name}/{path.stem}\n((?:    .+\n)+)", text, re.MULTILINE)
        assert " ".join(entry.split()) == first.removeprefix("# ")
    assert max(len(line) for line in text.splitlines() if line != str(RECIPES)) <= 80
    assert str(RECIPES) in text


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("train/cross_cell_type", "train/cross_cell_type.yaml"), ("lora", "finetune/lora.yaml"),
        ("cpu_ddp", "accelerate/cpu_ddp.yaml"), ("slurm/pretrain", "slurm/pretrain.sbatch"),
    ],
)  # fmt: skip
def test_a_recipe_is_printed_as_it_is(capsys, name, file):
    assert printed(capsys, "recipes", name) == (RECIPES / file).read_text()


@pytest.mark.parametrize("argv", [["recipes"], ["recipes", "lora"], ["settings"]])
def test_reading_what_ships_does_not_wait_for_torch(argv):
    code = f"import sys\nfrom perturbdiff.cli.main import main\nmain({argv})\nassert 'torch' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
