"""An adapter from strangers: every file is checked before memory is taken, and each defect is one clear error."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from perturbdiff.adapter import CARD, WEIGHTS, is_adapter, load_adapter, push_adapter, read_adapter, save_adapter
from perturbdiff.config import load_config
from perturbdiff.files import sha256
from perturbdiff.hub.card_check import check_card
from perturbdiff.hub.model_folder import CONFIG, config_hash
from perturbdiff.model import PerturbDiff
from perturbdiff.nn.denoiser import build_denoiser
from perturbdiff.nn.lora import changed_layers, inject_lora, merged
from perturbdiff.training.loop import train
from perturbdiff.training.start import settings_of
from tests.simulated import tiny_config, write_screen


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """base/ and an adapter of it, tuned/adapter."""
    folder = tmp_path_factory.mktemp("adapter")
    config = tiny_config(write_screen(folder), folder / "run", "training.n_steps=4", "optim.lr=0.01", hold_out=())
    train(config).model.save_pretrained(folder / "base")
    given = {"out": str(folder / "tuned"), "data": {"screen": str(folder / "screen.h5ad"), "sets_per_batch": 4}}
    given["adapt"] = {"init_from": str(folder / "base"), "method": "lora", "lora_rank": 3, "lora_alpha": 12.0}
    words = ["training.n_steps=2", "training.device=cpu", "optim.lr=0.01"]
    train(load_config(None, words, given, base=settings_of(str(folder / "base"))))
    return folder


@pytest.fixture
def adapter(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder / "tuned" / "adapter", tmp_path / "adapter"))


def rewritten(adapter: Path, change=lambda config: None, files=()) -> None:
    """A config.json that was changed by someone who can compute hashes."""
    config = json.loads((adapter / CONFIG).read_text())
    change(config)
    for name in files:
        config["sha256"][name] = sha256(adapter / name)
    config["sha256"][CONFIG] = config_hash(config)
    (adapter / CONFIG).write_text(json.dumps(config))


def refused(adapter: Path, folder: Path, words: str, kind: type[Exception] = ValueError) -> None:
    with pytest.raises(kind, match=words) as error:
        load_adapter(adapter, base=folder / "base")
    assert "\n" not in str(error.value)


def test_the_merged_weights_are_the_base_plus_scaled_products(folder, adapter):
    base = PerturbDiff.from_pretrained(folder / "base", device="cpu").denoiser.state_dict()
    tensors, model = load_file(adapter / WEIGHTS), load_adapter(adapter, base=folder / "base")
    after = model.denoiser.state_dict()
    layers = changed_layers(model.denoiser)
    assert len(layers) == 14
    for name, tensor in after.items():
        layer = name.removesuffix(".weight")
        if layer in layers:
            a, b = tensors[f"lora.{layer}.A"], tensors[f"lora.{layer}.B"]
            assert a.shape[0] == b.shape[1] == 3
            torch.testing.assert_close(tensor, base[name] + 4.0 * b @ a)  # 12 / 3
            assert not torch.equal(tensor, base[name])
        else:
            assert torch.equal(tensor, tensors.get(name, base[name]))


def test_injection_changes_no_output_and_merging_is_what_the_layers_compute(folder):
    model = PerturbDiff.from_pretrained(folder / "base", device="cpu")
    denoiser, plain = model.denoiser, build_denoiser(model.config.denoiser, 40, model.vocabularies).eval()
    x, t, control = torch.randn(2, 3, 40), torch.tensor([1, 5]), torch.rand(2, 3, 40)
    with torch.no_grad():
        for p in denoiser.parameters():
            p.normal_(std=0.3)
        before = denoiser(x, t, control)
        inject_lora(denoiser, 2, 8.0)
        torch.testing.assert_close(denoiser(x, t, control), before, rtol=0, atol=0)
        for name, p in denoiser.named_parameters():
            if "lora_" in name:
                p.normal_()
        plain.load_state_dict(merged(denoiser.state_dict(), 4.0))
        torch.testing.assert_close(plain(x, t, control), denoiser(x, t, control), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(plain(x, t, control), before, atol=1e-3)


def test_its_card_is_one_that_is_safe_to_show(adapter):
    check_card((adapter / CARD).read_text())


def test_an_adapter_is_known_by_its_class_and_replaces_only_adapters(folder, adapter, tmp_path):
    assert is_adapter(adapter)
    assert not is_adapter(folder / "base")
    assert not is_adapter(tmp_path / "nothing")
    said = read_adapter(adapter)
    with pytest.raises(FileExistsError, match="is not an adapter"):
        save_adapter(folder / "base", folder / "base", {}, said.base, 1.0)
    assert said.rank == 3
    assert said.scaling == 4.0


@pytest.mark.parametrize("name", [WEIGHTS, "genes.json", "training.json", "checks/golden.safetensors"])
def test_a_changed_or_missing_file_is_named(folder, adapter, name):
    content = (adapter / name).read_bytes()
    (adapter / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(adapter, folder, f"{name} does not have the sha256")
    (adapter / name).unlink()
    refused(adapter, folder, f"lacks {name}", FileNotFoundError)


def test_a_config_that_was_changed_by_hand_is_refused(folder, adapter):
    text = (adapter / CONFIG).read_text()
    (adapter / CONFIG).write_text(text.replace('"scaling": 4.0', '"scaling": 4.5'))
    assert text != (adapter / CONFIG).read_text()
    refused(adapter, folder, "does not have the sha256 that it states")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(format_version=99), "format_version 99"),
        (lambda c: c.update({"class": "Other"}), "of class Other, not an adapter"),
        (lambda c: c.update(surprise=1), "unknown keys surprise"),
        (lambda c: c.pop("base"), "base must give name, revision and sha256"),
        (lambda c: c["base"].update(sha256="0" * 63), "base must give"),
        (lambda c: c["base"].update(name=7), "base must give"),
        (lambda c: c["base"].update(path="/etc"), "base must give"),
        (lambda c: c["base"].update(sha256="0" * 64), r"trained on base \(sha256 000000000000\), and .* another model"),
        (lambda c: c["lora"].update(rank=1 << 40), "rank of 1 to 4096"),
        (lambda c: c["lora"].update(rank=True), "rank of 1 to 4096"),
        (lambda c: c["lora"].update(rank=4), "another shape or type lora"),
        (lambda c: c["lora"].update(scaling=0), "scaling greater than 0"),
        (lambda c: c["lora"].update(scaling=1e30), "golden check"),
        (lambda c: c["lora"].update(scaling="1"), "scaling greater than 0"),
        (lambda c: c["denoiser"].update(depth=3), "missing lora.blocks"),
        (lambda c: c["denoiser"].update(width=1 << 40), "denoiser.width"),
        (lambda c: c["sha256"].update({"../x.safetensors": "0" * 64}), "must name the files of an adapter"),
        (lambda c: c["sha256"].update({WEIGHTS: "x"}), "must give the sha256 of every file"),
    ],
)
def test_a_config_that_lies_is_refused(folder, adapter, change, words):
    rewritten(adapter, change)
    refused(adapter, folder, words)


def other_shape(tensors):
    tensors["head.weight"] = tensors["head.weight"][:-1]


def integers(tensors):
    tensors["head.bias"] = tensors["head.bias"].int()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("head.bias"), "missing head.bias"),
        (lambda t: t.update(extra=torch.zeros(1)), "unexpected extra"),
        (lambda t: t.update({"blocks.0.mlp.fc1.weight": torch.zeros(1)}), "unexpected blocks.0.mlp.fc1.weight"),
        (other_shape, "another shape or type head.weight"),
        (integers, "head.bias of type I32"),
        (lambda t: t["head.bias"].fill_(math.nan), "golden check"),
        (lambda t: t.update(extra=torch.zeros(1 << 25)), "bytes, and such a file of this model at most"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(folder, adapter, change, words):
    tensors = load_file(adapter / WEIGHTS)
    change(tensors)
    save_file(tensors, adapter / WEIGHTS)
    rewritten(adapter, files=[WEIGHTS])
    refused(adapter, folder, words)


def test_a_link_out_of_the_folder_is_refused(folder, adapter):
    (adapter / WEIGHTS).rename(adapter.parent / "elsewhere")
    (adapter / WEIGHTS).symlink_to(adapter.parent / "elsewhere")
    refused(adapter, folder, "adapter.safetensors")


def test_a_damaged_adapter_is_not_pushed(adapter):
    (adapter / "genes.json").write_text("{}")
    with pytest.raises(ValueError, match=r"genes\.json does not have the sha256"):
        push_adapter(adapter, "lab/lora")
