"""perturbdiff finetune, hub push and hub merge of adapters, and perturbdiff.finetune."""

import json
import shlex
import shutil
from pathlib import Path

import anndata
import pytest
import torch

import perturbdiff
from perturbdiff.cli.main import main
from perturbdiff.hub.records import read_evaluation
from perturbdiff.model import PerturbDiff
from perturbdiff.training.loop import fit
from tests.localhub.client import TOKEN, led_to, refused
from tests.localhub.server import LocalHub
from tests.simulated import tiny_config, write_screen

# The Hub's client passes file objects in a way that its own HTTP library warns about.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")]
FEW = ["training.device=cpu", "training.n_steps=2", "data.sets_per_batch=4"]


@pytest.fixture(scope="module")
def screen(tmp_path_factory) -> Path:
    return write_screen(tmp_path_factory.mktemp("screen"))


@pytest.fixture(scope="module")
def checkpoint(screen, tmp_path_factory) -> Path:
    """A model of 30 of the genes, without pert_2."""
    folder = tmp_path_factory.mktemp("checkpoint")
    adata = anndata.read_h5ad(screen)
    adata[adata.obs["perturbation"] != "pert_2", :30].copy().write_h5ad(folder / "part.h5ad")
    return fit(tiny_config(folder / "part.h5ad", folder / "run", "training.n_steps=2", hold_out=())).folder / "model"


@pytest.fixture(scope="module")
def adapter(screen, checkpoint, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("lora") / "run"
    finetune(screen, checkpoint, out, "adapt.method=lora", "optim.lr=0.01")
    return out / "adapter"


@pytest.fixture
def hub(tmp_path):
    with LocalHub(write_token=TOKEN, redirects=True) as hub, led_to(hub, tmp_path / "home"):
        yield hub


def finetune(screen, checkpoint, out, *words):
    argv = ["finetune", "--screen", screen, "--init-from", checkpoint, "--out", out, *FEW, *words]
    main([str(word) for word in argv])


def weights(model: PerturbDiff) -> dict[str, torch.Tensor]:
    return model.denoiser.state_dict()


def agree(a: PerturbDiff, b: PerturbDiff) -> bool:
    return all(torch.allclose(t, weights(b)[name], atol=1e-5, rtol=0) for name, t in weights(a).items())


# ---------------------------------------------------------------- finetune


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(screen, checkpoint, tmp_path, capsys):
    finetune(screen, checkpoint, tmp_path / "run", "--dry-run", "--hold-out", "pert_0:type_0")
    said = capsys.readouterr().out
    for words in (
        "cells       360", "40 held out", "init from   model (config.json", "30 of 40 genes matched by name; 10 new",
        "1 new perturbation labels: pert_2", "of which", "2 steps of 4 sets of 8 cells",
    ):  # fmt: skip
        assert words in said
    assert not (tmp_path / "run").exists()


def test_held_out_conditions_are_scored_beside_baselines_and_the_model_says_so(screen, checkpoint, tmp_path, capsys):
    finetune(screen, checkpoint, tmp_path / "run", "--hold-out", "pert_0:type_0")
    said = capsys.readouterr().out
    for words in ("PerturbDiff", "no change", "ridge", "ceiling", "scores.parquet"):
        assert words in said
    model = PerturbDiff.from_pretrained(tmp_path / "run" / "model")
    assert model.evaluation == read_evaluation(json.loads((tmp_path / "run" / "scores.json").read_text()))
    assert len(model.genes) == 40


def test_without_a_hold_out_there_is_a_model_and_no_score(screen, checkpoint, tmp_path, capsys):
    finetune(screen, checkpoint, tmp_path / "run")
    written, following = capsys.readouterr().out.partition("written:\n")[2].splitlines()
    assert written == f"  {tmp_path / 'run' / 'model'}"
    words = ["next", "perturbdiff", "predict", str(tmp_path / "run" / "model"), "--controls", "CONTROLS.h5ad"]
    assert shlex.split(following)[: len(words)] == words
    assert PerturbDiff.from_pretrained(tmp_path / "run" / "model").evaluation is None


def test_a_perturbation_of_the_checkpoint_may_be_held_out_everywhere(screen, checkpoint, tmp_path, capsys):
    finetune(screen, checkpoint, tmp_path / "known", "--hold-out", "pert_1")
    assert (tmp_path / "known" / "scores.parquet").exists()
    capsys.readouterr()
    said = refused(
        capsys, "finetune", "--screen", screen, "--init-from", checkpoint, "--out", tmp_path / "new", "--hold-out",
        "pert_2", *FEW,
    )  # fmt: skip
    assert "'pert_2' is held out in every context" in said
    assert not (tmp_path / "new").exists()


def test_the_same_command_goes_on(screen, checkpoint, tmp_path, capsys):
    finetune(screen, checkpoint, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    finetune(screen, checkpoint, tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_the_recipe_may_name_the_checkpoint(screen, checkpoint, tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"adapt: {{init_from: {checkpoint}}}\n")
    argv = ["finetune", "--screen", screen, "--recipe", tmp_path / "recipe.yaml", "--out", tmp_path / "run", *FEW]
    main([str(word) for word in argv])
    assert PerturbDiff.from_pretrained(tmp_path / "run" / "model").training.init_from.name == "model"


def test_an_atlas_is_tuned_on(screen, checkpoint, tmp_path, capsys):
    main(["atlas", "build", str(screen), "--out", str(tmp_path / "atlas")])
    argv = ["finetune", "--atlas", tmp_path / "atlas", "--init-from", checkpoint, "--out", tmp_path / "run", *FEW]
    main([str(word) for word in argv])
    assert "30 of 40 genes matched" in capsys.readouterr().out
    assert (tmp_path / "run" / "model").is_dir()


def test_python_gives_the_run_of_the_command_from_memory(screen, checkpoint, tmp_path):
    finetune(screen, checkpoint, tmp_path / "command", "--hold-out", "pert_0:type_0")
    adata = anndata.read_h5ad(screen)
    result = perturbdiff.finetune(adata, checkpoint, tmp_path / "call", hold_out=["pert_0:type_0"], overrides=FEW)
    of_command = PerturbDiff.from_pretrained(tmp_path / "command" / "model")
    assert all(torch.equal(t, weights(of_command)[name]) for name, t in weights(result.model).items())
    assert result.scores.n_conditions == 2
    assert result.stopped_by is None


def damaged(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    (to / "genes.json").write_text("{}")
    return to


@pytest.mark.parametrize(
    ("model", "words", "said"),
    [
        ("/no/such/model", [], "no such folder here (/no/such/model)"),
        ("nosuchmodel", [], "nosuchmodel"),
        ("HERE", [], "is not a model folder"),
        ("DAMAGED", [], "genes.json does not have the sha256"),
        ("CHECKPOINT", ["denoiser.depth=3"], "denoiser.depth is 2 in the checkpoint and 3 in the settings"),
        ("CHECKPOINT", ["adapt.lr_ratio=0"], "adapt.lr_ratio (0.0) must be greater than 0"),
        ("CHECKPOINT", ["adapt.method=half"], "adapt.method"),
        ("CHECKPOINT", ["data.control_label=vehicle"], "vehicle"),
        ("CHECKPOINT", ["--screen", "FOREIGN"], "only 0 of the 40 genes to train on are among the checkpoint's 30"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(screen, checkpoint, tmp_path, capsys, model, words, said):
    foreign = anndata.read_h5ad(screen)
    foreign.var_names = [f"FOREIGN{i}" for i in range(40)]
    if "ensembl_id" in foreign.var:
        del foreign.var["ensembl_id"]
    foreign.write_h5ad(tmp_path / "foreign.h5ad")
    places = {"HERE": tmp_path, "CHECKPOINT": checkpoint, "FOREIGN": tmp_path / "foreign.h5ad"}
    where = damaged(checkpoint, tmp_path / "damaged") if model == "DAMAGED" else places.get(model, model)
    words = [places.get(word, word) for word in words]
    line = refused(
        capsys, "finetune", "--screen", screen, "--init-from", where, "--out", tmp_path / "run", *FEW, *words
    )
    assert said in line
    assert not (tmp_path / "run").exists()


def test_without_anything_to_start_from_it_says_so(screen, tmp_path, capsys):
    said = refused(capsys, "finetune", "--screen", screen, "--out", tmp_path / "run", *FEW)
    assert said.startswith("there is nothing to start from; give --init-from MODEL")


# ---------------------------------------------------------------- adapters


def test_an_adapter_is_pushed_loaded_and_merged_to_the_model_of_its_run(hub, adapter, checkpoint, tmp_path, capsys):
    main(["hub", "push", str(checkpoint), "lab/base", "--tag", "v1"])
    main(["hub", "push", str(adapter), "lab/lora", "--tag", "v1", "--private"])
    assert "pulled back and verified" in capsys.readouterr().out
    merged = PerturbDiff.from_pretrained("lab/lora", "v1", base="lab/base@v1")
    assert agree(merged, PerturbDiff.from_pretrained(adapter.parent / "model"))
    main(["hub", "merge", "lab/lora@v1", "--base", "lab/base", "--out", str(tmp_path / "merged")])
    assert agree(merged, PerturbDiff.from_pretrained(tmp_path / "merged"))
    with pytest.raises(SystemExit):
        main(["hub", "merge", str(checkpoint), "--out", str(tmp_path / "again")])
    assert "is a whole model, not an adapter: there is nothing to merge" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()
    repo = hub.models["lab/lora"]
    card = repo.commits[repo.resolve("v1")]["README.md"].decode()
    assert "library_name: perturbdiff" in card
    assert "An adapter" in card


def test_an_adapter_of_a_base_on_the_hub_serves_wherever_a_model_does(hub, screen, checkpoint, tmp_path, capsys):
    main(["hub", "push", str(checkpoint), "lab/base", "--tag", "v1"])
    finetune(screen, "lab/base@v1", tmp_path / "run", "adapt.method=lora")
    main(["hub", "push", str(tmp_path / "run" / "adapter"), "lab/lora"])
    own = PerturbDiff.from_pretrained(tmp_path / "run" / "model")
    assert agree(PerturbDiff.from_pretrained("lab/lora"), own)
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "lab/base"
    assert config["revision"] == hub.models["lab/base"].resolve("v1")
    repo = hub.models["lab/lora"]
    card = repo.commits[repo.resolve("main")]["README.md"].decode()
    assert "base_model: lab/base\n" in card
    assert "base_model_relation: adapter\n" in card
    capsys.readouterr()
    main(["hub", "verify", "lab/lora"])
    main(["hub", "info", "lab/lora"])
    assert "an adapter: merged with its base when it is loaded" in " ".join(capsys.readouterr().out.split())
    main(["hub", "pull", "lab/lora", "--out", str(tmp_path / "pulled")])
    assert agree(PerturbDiff.from_pretrained(tmp_path / "pulled"), own)
    finetune(screen, "lab/lora", tmp_path / "on", "adapt.method=frozen")
    assert PerturbDiff.from_pretrained(tmp_path / "on" / "model").training.init_from.name == "lab/lora"


def test_the_wrong_base_is_refused_naming_both(adapter, checkpoint, tmp_path, capsys):
    other = PerturbDiff.from_pretrained(checkpoint, device="cpu")
    with torch.no_grad():
        other.denoiser.head.bias += 1
    other.save_pretrained(tmp_path / "other")
    said = refused(capsys, "hub", "merge", adapter, "--base", tmp_path / "other", "--out", tmp_path / "merged")
    assert "was trained on model (sha256" in said
    assert f"{tmp_path / 'other'} is another model, other (sha256" in said
    assert not (tmp_path / "merged").exists()


def test_a_model_folder_is_no_adapter_and_an_adapter_is_no_model_without_its_base(
    adapter, checkpoint, tmp_path, capsys
):
    said = refused(capsys, "hub", "merge", checkpoint, "--base", checkpoint, "--out", tmp_path / "merged")
    assert "not an adapter" in said
    assert "error" not in said
    assert "was a folder; say where it is" in refused(capsys, "hub", "verify", adapter)
    assert "leave --license out" in refused(capsys, "hub", "push", adapter, "lab/lora", "--license", "mit")
