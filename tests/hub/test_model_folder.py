import hashlib
import json
import math
import os
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from safetensors.torch import load_file, save_file

from perturbdiff.data.screen import control_cells
from perturbdiff.hub.model_folder import CONFIG, GOLDEN, JSON_FILES, MEANS, SHARD, WEIGHTS, WEIGHTS_INDEX, config_hash
from perturbdiff.hub.records import ConversionRecord, Coverage, TrainingRecord
from perturbdiff.model import PerturbDiff
from perturbdiff.training.loop import fit
from tests.simulated import tiny_config, write_screen
from tests.trust import attacks

HASHED_FILES = (*JSON_FILES, MEANS, WEIGHTS, GOLDEN)
FORMAT_1 = Path(__file__).parent / "format_1"  # written by the version that wrote format 1


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return fit(tiny_config(write_screen(folder), folder / "run")).folder / "model"


@pytest.fixture
def folder(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "model")


def rehash(folder, **changes):
    """Make config.json agree with changed files, as a careful forger would."""
    config = json.loads((folder / CONFIG).read_text())
    config.update(changes)
    there = [name for name in HASHED_FILES if (folder / name).exists()]
    hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in there}
    config["sha256"] = {CONFIG: config_hash(config), **hashes}
    (folder / CONFIG).write_text(json.dumps(config))


def test_saving_a_loaded_model_gives_the_same_files(folder, tmp_path):
    PerturbDiff.from_pretrained(folder).save_pretrained(tmp_path / "again")
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert names == sorted(
        str(p.relative_to(tmp_path / "again")) for p in (tmp_path / "again").rglob("*") if p.is_file()
    )
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


@pytest.mark.parametrize("name", HASHED_FILES)
def test_a_truncated_file_is_refused_by_name(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=f"{name} does not have the sha256"):
        PerturbDiff.from_pretrained(folder)


@pytest.mark.parametrize("name", HASHED_FILES)
def test_a_missing_file_is_refused_by_name(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        PerturbDiff.from_pretrained(folder)


def test_weights_of_another_training_fail_the_golden_check(folder):
    weights = load_file(folder / WEIGHTS)
    weights["head.bias"] += 0.01
    save_file(weights, folder / WEIGHTS)
    rehash(folder)
    with pytest.raises(ValueError, match="golden check"):
        PerturbDiff.from_pretrained(folder)


def test_missing_and_unexpected_tensors_are_listed(folder):
    weights = load_file(folder / WEIGHTS)
    weights["surprise"] = weights.pop("head.bias")
    save_file(weights, folder / WEIGHTS)
    rehash(folder)
    with pytest.raises(ValueError, match=r"missing head\.bias; unexpected surprise"):
        PerturbDiff.from_pretrained(folder)


def test_a_tensor_of_another_shape_is_refused_before_it_is_read(folder):
    weights = load_file(folder / WEIGHTS)
    weights["head.bias"] = torch.zeros(3)
    save_file(weights, folder / WEIGHTS)
    rehash(folder)
    with pytest.raises(ValueError, match=r"head\.bias \(3,\) \(must be \(40,\)\)"):
        PerturbDiff.from_pretrained(folder)


def test_a_config_that_asks_for_a_giant_is_refused_without_taking_memory(folder):
    config = json.loads((folder / CONFIG).read_text())
    rehash(folder, denoiser={**config["denoiser"], "width": 60_000})
    with pytest.raises(ValueError, match="does not fit"):
        PerturbDiff.from_pretrained(folder)
    for key in ("width", "depth", "covariate_dim"):
        rehash(folder, denoiser={**config["denoiser"], key: 10**9})
        with pytest.raises(ValueError, match=rf"denoiser\.{key} \(1000000000\) must be"):
            PerturbDiff.from_pretrained(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"set_size": 0}, {"set_size": 10**12}, {"set_size": "x"}, {"set_size": 1.5}, {"surprise": 1}, {"obs": {}},
        {"obs": {"perturbation": "p", "cell_type": "c", "batch": "b", "control_label": ["x"]}}, {"class": "Other"},
        {"diffusion": {"n_timesteps": 10**12}}, {"sampling": {"n_steps": 10**6}},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(folder, change):
    rehash(folder, **change)
    with pytest.raises(ValueError, match=r"."):
        PerturbDiff.from_pretrained(folder)


def test_a_changed_setting_is_noticed_without_any_other_change(folder):
    config = json.loads((folder / CONFIG).read_text())
    config["denoiser"]["out_activation"] = "none"
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json does not have the sha256"):
        PerturbDiff.from_pretrained(folder)


@pytest.mark.parametrize("version", [0, 7, 1.0, True, "1", None, [2]])
def test_another_format_version_is_refused(folder, version):
    rehash(folder, format_version=version)
    with pytest.raises(ValueError, match="format_version"):
        PerturbDiff.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("genes.json", {"names": ["a", "a"], "ensembl": []}),
        ("genes.json", {"names": "abc", "ensembl": []}),
        ("perturbations.json", {"names": ["x"]}),
        ("preprocessing.json", {"input_kind": "counts", "target_sum": "${oc.env:HOME}", "scale": 10.0}),
        ("preprocessing.json", {"input_kind": "counts", "target_sum": 1.0, "scale": 0.0}),
        ("preprocessing.json", {"input_kind": "counts", "target_sum": float("nan"), "scale": 1.0}),
        ("preprocessing.json", {"input_kind": "magic", "target_sum": 1.0, "scale": 10.0}),
        ("preprocessing.json", {"input_kind": "counts", "target_sum": 1.0, "scale": 10.0, "extra": 1}),
    ],
)
def test_json_of_the_wrong_kind_is_refused(folder, name, content):
    (folder / name).write_text(json.dumps(content))
    rehash(folder)
    with pytest.raises(ValueError, match=r"."):
        PerturbDiff.from_pretrained(folder)


@pytest.mark.parametrize("text", ["not json", "[1]", "[" * 100_000])
def test_a_broken_config_is_refused(folder, text):
    (folder / CONFIG).write_text(text)
    with pytest.raises(ValueError, match=CONFIG):
        PerturbDiff.from_pretrained(folder)


def test_a_shortened_vocabulary_does_not_fit_the_weights(folder):
    (folder / "cell_types.json").write_text(json.dumps({"names": ["type_0"]}))
    rehash(folder)
    with pytest.raises(ValueError, match="cell_type"):
        PerturbDiff.from_pretrained(folder)


def test_a_folder_that_is_no_model_is_never_overwritten(trained, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="not a model folder"):
        PerturbDiff.from_pretrained(trained).save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_failed_save_leaves_the_old_folder_and_no_rubbish(folder, monkeypatch):
    model = PerturbDiff.from_pretrained(folder)
    before = (folder / CONFIG).read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("perturbdiff.hub.tensors.save_file", full)
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(folder)
    assert (folder / CONFIG).read_bytes() == before
    assert [p.name for p in folder.parent.iterdir()] == ["model"]
    PerturbDiff.from_pretrained(folder)


def test_no_pickle_in_a_model_folder(folder):
    names = [p.name for p in folder.rglob("*") if p.is_file()]
    assert {name.rsplit(".", 1)[1] for name in names} == {"json", "safetensors", "md"}
    assert "x0_pred" in load_file(folder / GOLDEN)


def test_missing_folder_and_plain_folder_say_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^no such folder here"):
        PerturbDiff.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"not a model folder.*config\.json"):
        PerturbDiff.from_pretrained(tmp_path)


def test_large_weights_are_cut_into_files_and_read_back_bit_for_bit(folder, tmp_path):
    model = PerturbDiff.from_pretrained(folder)
    model.save_pretrained(tmp_path / "cut", max_shard_size="20KB")
    shards = sorted(p.name for p in (tmp_path / "cut").iterdir() if SHARD.fullmatch(p.name))
    assert len(shards) > 2
    assert shards[-1] == f"model-{len(shards):05}-of-{len(shards):05}.safetensors"
    assert not (tmp_path / "cut" / WEIGHTS).exists()
    index = json.loads((tmp_path / "cut" / WEIGHTS_INDEX).read_text())["weight_map"]
    assert {name: file for file in shards for name in load_file(tmp_path / "cut" / file)} == index
    again = PerturbDiff.from_pretrained(tmp_path / "cut")
    for name, tensor in model.denoiser.state_dict().items():
        assert torch.equal(again.denoiser.state_dict()[name], tensor), name
    again.save_pretrained(tmp_path / "cut")
    assert (tmp_path / "cut" / WEIGHTS).exists()
    assert not any(SHARD.fullmatch(p.name) for p in (tmp_path / "cut").iterdir())


def test_a_tensor_in_two_shards_and_a_lacking_shard_are_refused(folder, tmp_path):
    PerturbDiff.from_pretrained(folder).save_pretrained(tmp_path / "cut", max_shard_size="20KB")
    cut = tmp_path / "cut"
    config = json.loads((cut / CONFIG).read_text())
    first, second = sorted(name for name in config["sha256"] if SHARD.fullmatch(name))[:2]
    twice = load_file(cut / second) | load_file(cut / first)
    save_file(twice, cut / second)
    config["sha256"][second] = hashlib.sha256((cut / second).read_bytes()).hexdigest()
    (cut / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"is in {first} and in {second}"):
        PerturbDiff.from_pretrained(cut)
    del config["sha256"][first]
    (cut / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="must name the files"):
        PerturbDiff.from_pretrained(cut)


def test_a_folder_of_format_1_loads_and_is_saved_as_the_newest(tmp_path):
    model = PerturbDiff.from_pretrained(FORMAT_1)
    weights = load_file(FORMAT_1 / WEIGHTS)
    assert all(torch.equal(model.denoiser.state_dict()[name], tensor) for name, tensor in weights.items())
    model.save_pretrained(tmp_path / "new")
    config = json.loads((tmp_path / "new" / CONFIG).read_text())
    assert config["format_version"] == 6
    assert config["denoiser"]["cell_type_encoding"] == "onehot"
    assert config["denoiser"]["interaction"] is False
    expected = load_file(FORMAT_1 / GOLDEN)["x0_pred"]
    assert torch.allclose(load_file(tmp_path / "new" / GOLDEN)["x0_pred"], expected, atol=1e-6)


@pytest.mark.parametrize("version", [2, 3])
def test_a_folder_of_an_older_format_predicts_what_it_predicted_then(version):
    """The folder and the cells beside it were written by the versions that wrote these formats."""
    path = Path(__file__).parent / f"format_{version}"
    assert json.loads((path / CONFIG).read_text())["format_version"] == version
    model, stored = PerturbDiff.from_pretrained(path, device="cpu"), load_file(path.with_suffix(".safetensors"))
    controls = stored.pop("controls").numpy()
    obs = pd.DataFrame({"cell_type": "T", "batch": ["b1"] * 8 + ["b2"] * 8}, index=[f"c{i}" for i in range(16)])
    cells = AnnData(controls, obs=obs, var=pd.DataFrame(index=list(model.gene_names)))
    assert set(stored) == {"A", "A+B"}
    for perturbation, expected in stored.items():
        predicted = model.generate(cells, perturbation, n_populations=2, seed=3)
        torch.testing.assert_close(torch.from_numpy(predicted.X.toarray()), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(stored["A"], stored["A+B"], atol=0.1)


def as_format_3(folder, **training):
    """Its files as format 3 had them."""
    if json.loads((folder / CONFIG).read_text())["format_version"] != 3:
        attacks.as_format_3(folder)
    (folder / "training.json").write_text(json.dumps(training))
    rehash(folder)


def test_a_folder_of_format_3_loads_with_the_names_of_today(folder):
    new = PerturbDiff.from_pretrained(folder).config.diffusion.p_features_only
    as_format_3(folder)
    assert PerturbDiff.from_pretrained(folder).config.diffusion.p_features_only == new


def test_intervals_of_format_5_have_one_width_for_all_genes(folder):
    old = {"level": 0.9, "factor": 2.0, "floor": 0.3, "coverage": 0.8, "n_conditions": 4}
    training = json.loads((folder / "training.json").read_text())
    (folder / "training.json").write_text(json.dumps({**training, "calibration": old}))
    rehash(folder, format_version=5)
    found = PerturbDiff.from_pretrained(folder).training.calibration
    assert found.half_width(np.array([0.4, 0.4]), np.array([0.0, -3.0])) == pytest.approx(2 * math.hypot(0.4, 0.3))
    assert found.coverage == Coverage("validation", 4, 0.8, None)


@pytest.mark.parametrize(
    ("key", "value", "known"),
    [
        ("denoiser.attention", "joint", "paired"), ("denoiser.out_activation", "softplus", "relu and none"),
        ("diffusion.kernel", "laplace", "energy"),
    ],
)  # fmt: skip
def test_a_folder_of_format_1_with_a_value_that_was_removed_is_refused_with_the_reason(tmp_path, key, value, known):
    folder = shutil.copytree(FORMAT_1, tmp_path / "model")
    config = json.loads((folder / CONFIG).read_text())
    part, name = key.split(".")
    rehash(folder, **{part: {**config[part], name: value}})
    message = rf"{key} \({value}\) is no longer known, only {known}; .* \(0\.1\.0\)"
    with pytest.raises(ValueError, match=message) as error:
        PerturbDiff.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_a_folder_of_format_3_loads_with_all_that_it_says_of_its_training(folder):
    new = PerturbDiff.from_pretrained(folder).training
    training = json.loads((folder / "training.json").read_text())
    training = {key: value for key, value in training.items() if value is not None} | {"licence": "mit", "notes": "x"}

    def load(**training):
        as_format_3(folder, **training)
        return PerturbDiff.from_pretrained(folder).training

    new = replace(new, control_sums=None, measured_genes=None)  # came with format 5
    assert load(**training) == replace(new, license="mit")
    assert load() == TrainingRecord()
    old = {"converted_from": "x.ckpt", "sha256": "a" * 64, "weights": "ema", "global_step": 7, "epoch": None}
    conversion = ConversionRecord("x.ckpt", "a" * 64, "ema", 7, None, "pbmc")
    assert load(**old, dataset="pbmc", settings={"a": 1}) == TrainingRecord(
        converted_from=conversion, settings={"a": 1}
    )


@pytest.mark.parametrize("name", ["perturbations.json", "preprocessing.json", CONFIG])
def test_text_that_settings_would_resolve_is_refused(folder, name):
    secret = "${oc.env:HOME}"
    content = json.loads((folder / name).read_text())
    if name == CONFIG:
        rehash(folder, obs={**content["obs"], "batch": secret})
    else:
        key = "combination_separator" if name == "perturbations.json" else "library_size_col"
        (folder / name).write_text(json.dumps({**content, key: secret}))
        rehash(folder)
    with pytest.raises(ValueError, match="interpolation"):
        PerturbDiff.from_pretrained(folder)


def test_a_key_that_is_missing_is_never_a_default(folder):
    config = json.loads((folder / CONFIG).read_text())
    del config["denoiser"]["out_activation"]
    rehash(folder, denoiser=config["denoiser"])
    with pytest.raises(ValueError, match="lacks out_activation and has unknown keys nothing"):
        PerturbDiff.from_pretrained(folder)


def test_files_may_be_read_by_those_who_may_read_the_folder(folder):
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}
    assert len(set(modes.values())) == 1, modes


@pytest.mark.parametrize("name", [CONFIG, "genes.json", WEIGHTS, GOLDEN])
def test_links_out_of_the_folder_are_refused_and_links_within_are_not(folder, tmp_path, name):
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="leads out of the folder"):
        PerturbDiff.from_pretrained(folder)
    (folder / name).unlink()
    (tmp_path / "elsewhere").rename(folder / "within")
    (folder / name).symlink_to(folder / "within")
    PerturbDiff.from_pretrained(folder)


def test_a_pipe_in_place_of_a_file_does_not_hang(folder):
    (folder / "genes.json").unlink()
    os.mkfifo(folder / "genes.json")
    with pytest.raises(FileNotFoundError, match=r"lacks genes\.json"):
        PerturbDiff.from_pretrained(folder)


def test_weights_of_another_type_predict_nearly_the_same(folder, tmp_path):
    screen = write_screen(tmp_path)
    controls = control_cells(screen, PerturbDiff.from_pretrained(folder).config.obs, None, None)

    def predicted(dtype):
        model = PerturbDiff.from_pretrained(folder, device="cpu", dtype=dtype)
        model.config = replace(model.config, sampling=replace(model.config.sampling, whole_counts=False))
        return model.predict(controls, perturbation="pert_1", n_cells=30).X.toarray()

    as_float, as_bfloat, as_double = map(predicted, (None, torch.bfloat16, torch.float64))
    assert 0 < abs(as_float - as_bfloat).max() < 0.2
    assert abs(as_float - as_double).max() < 1e-3
    with pytest.raises(ValueError, match="floating point"):
        PerturbDiff.from_pretrained(folder, dtype=torch.int8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_another_type_are_saved_as_they_are(folder, tmp_path, dtype):
    model = PerturbDiff.from_pretrained(folder, device="cpu", dtype=dtype)
    model.save_pretrained(tmp_path / "other")
    saved, trained = load_file(tmp_path / "other" / WEIGHTS), model.denoiser.state_dict()
    assert {saved[name].dtype for name in trained} == {dtype}
    assert all(torch.equal(saved[name], tensor) for name, tensor in trained.items())
    again = PerturbDiff.from_pretrained(tmp_path / "other", device="cpu")  # its golden check passes
    assert all(torch.equal(tensor, trained[name].float()) for name, tensor in again.denoiser.state_dict().items())
    if dtype is torch.bfloat16:
        assert (tmp_path / "other" / WEIGHTS).stat().st_size < 0.7 * (folder / WEIGHTS).stat().st_size


def test_the_golden_check_is_an_option_and_hashes_are_not(folder):
    golden = load_file(folder / GOLDEN)
    golden["x0_pred"] += 1
    save_file(golden, folder / GOLDEN)
    with pytest.raises(ValueError, match="sha256"):
        PerturbDiff.from_pretrained(folder, golden_check=False)
    rehash(folder)
    PerturbDiff.from_pretrained(folder, golden_check=False)
    with pytest.raises(ValueError, match="golden check"):
        PerturbDiff.from_pretrained(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda golden: golden.pop("mask"),
        lambda golden: golden.update(x_t=torch.zeros(100, 100, 40)),
        lambda golden: golden.update(perturbation=torch.full((2, 1), 99)),
        lambda golden: golden.update(x_t=torch.zeros(2, 3, 39)),
        lambda golden: golden.update(x0_pred=torch.full((2, 3, 40), float("nan"))),
    ],
)
def test_a_golden_input_that_does_not_fit_is_refused(folder, change):
    golden = load_file(folder / GOLDEN)
    change(golden)
    save_file(golden, folder / GOLDEN)
    rehash(folder)
    with pytest.raises(ValueError, match=r"golden|cells in sets"):
        PerturbDiff.from_pretrained(folder)
