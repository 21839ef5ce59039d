"""The commands that make a model folder to publish: convert, and evaluate --model."""

import json

import anndata
import pytest
import torch

from perturbdiff.cli.main import main
from perturbdiff.hub.records import read_evaluation
from perturbdiff.model import PerturbDiff
from perturbdiff.training.loop import fit
from tests.conftest import GOLDEN
from tests.simulated import tiny_config, write_screen

pytestmark = pytest.mark.slow

CHECKPOINT = GOLDEN / "tiny_official.ckpt"
with_golden = pytest.mark.skipif(not CHECKPOINT.exists(), reason=f"no published checkpoints at {GOLDEN}")


def run(capsys, *words: object) -> str:
    capsys.readouterr()
    main([str(word) for word in words])
    return capsys.readouterr().out


def refused(capsys, *words: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.count("\n") == 1
    return said


@with_golden
def test_a_published_checkpoint_becomes_a_folder_with_the_genes_that_are_named(capsys, tmp_path):
    names = [f"SYMBOL{i}" for i in range(48)]
    (tmp_path / "genes.txt").write_text("\n".join(names) + "\n")
    words = ("convert", CHECKPOINT, "--genes", tmp_path / "genes.txt", "--license", "mit")
    said = run(capsys, *words, "--out", tmp_path / "ema")
    assert "note" not in said
    assert f"written     {tmp_path / 'ema'}" in said
    run(capsys, *words, "--out", tmp_path / "raw", "--weights", "raw")
    ema, raw = (PerturbDiff.from_pretrained(tmp_path / name, device="cpu") for name in ("ema", "raw"))
    assert list(ema.genes.names) == names
    assert ema.training.license == "mit"
    assert "license: mit" in (tmp_path / "ema" / "README.md").read_text()
    assert not torch.equal(ema.denoiser.head.weight, raw.denoiser.head.weight)
    difference = run(capsys, "hub", "diff", tmp_path / "ema", tmp_path / "raw")
    assert "training.converted_from.weights: ema -> raw" in difference


@with_golden
def test_what_cannot_be_converted_is_one_line_and_leaves_nothing(capsys, tmp_path):
    (tmp_path / "two.txt").write_text("A\nB\n")
    out = tmp_path / "out"
    assert "2 genes were given" in refused(capsys, "convert", CHECKPOINT, "--genes", tmp_path / "two.txt", "--out", out)
    assert "'tahoe' is not among" in refused(capsys, "convert", CHECKPOINT, "--dataset", "tahoe", "--out", out)
    assert "not a zip archive" in refused(capsys, "convert", tmp_path / "two.txt", "--out", out)
    assert "nothing.ckpt" in refused(capsys, "convert", tmp_path / "nothing.ckpt", "--out", out)
    assert not out.exists()
    said = run(capsys, "convert", CHECKPOINT, "--out", out)
    assert "called gene_0" in said
    before = (out / "config.json").read_bytes()
    assert "exists" in refused(capsys, "convert", CHECKPOINT, "--weights", "raw", "--out", out)
    assert (out / "config.json").read_bytes() == before


def test_scores_of_predictions_are_put_into_the_folder_of_their_model(capsys, tmp_path):
    screen = write_screen(tmp_path)
    folder = fit(tiny_config(screen, tmp_path / "run")).folder / "model"
    predicted = tmp_path / "predicted.h5ad"
    words = ("--controls", screen, "--perturbation", "pert_0", "--cell-type", "type_0")
    run(capsys, "predict", folder, *words, "--out", predicted)
    weights = (folder / "model.safetensors").read_bytes()
    said = run(
        capsys, "evaluate", predicted, "--screen", screen, "--split", tmp_path / "run" / "split.json",
        "--out", tmp_path / "scores", "--model", folder,
    )  # fmt: skip
    assert f"scores put into {folder}" in said
    model = PerturbDiff.from_pretrained(folder, device="cpu")
    assert model.evaluation == read_evaluation(json.loads((tmp_path / "scores" / "scores.json").read_text()))
    assert model.evaluation.split.hold_out == ("pert_0:type_0",)
    assert (folder / "model.safetensors").read_bytes() == weights
    card = (folder / "README.md").read_bytes()
    others = anndata.read_h5ad(predicted)
    del others.uns["perturbdiff"]
    others.write_h5ad(tmp_path / "others.h5ad")
    with pytest.raises(SystemExit):
        run(capsys, "evaluate", tmp_path / "others.h5ad", "--screen", screen, "--model", folder)
    assert "others.h5ad does not say that a model of perturbdiff predicted it" in capsys.readouterr().err
    assert (folder / "README.md").read_bytes() == card
