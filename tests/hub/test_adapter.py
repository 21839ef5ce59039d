"""An adapter is one of peft's too; from strangers, it is checked before memory is taken, each defect in one line."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from perturbdiff.config import DenoiserConfig
from perturbdiff.data.vocab import Labels
from perturbdiff.files import sha256
from perturbdiff.hub.adapter import extended_base, save_adapter
from perturbdiff.hub.card import check_card
from perturbdiff.hub.model_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CARD, CONFIG, GOLDEN, config_hash
from perturbdiff.hub.records import StartRecord, TrainingRecord
from perturbdiff.model import PerturbDiff, push_folder
from perturbdiff.nn.denoiser import build_denoiser
from perturbdiff.nn.lora import BACKBONE, changed_layers, inject_lora, merged
from tests.untrained import untrained

pytestmark = pytest.mark.slow

PEFT = "base_model.model."
BIAS = f"{PEFT}head.bias"
LABELS = DenoiserConfig(width=8, depth=3, n_heads=2, mean_effect=True)  # more layers than peft lists by full name
REFERENCE = DenoiserConfig(width=8, depth=1, n_heads=2, output="direct", conditioning="reference", covariate_dim=4)
MORE = {"dose_separator": "@", "n_by_features": 1, "tables": (("go", 5),)}


def random_model(config: DenoiserConfig, n_genes: int, perturbations: tuple[str, ...], **labels) -> PerturbDiff:
    model = untrained(n_genes, perturbations)
    model.config = replace(model.config, denoiser=config)
    model.vocabularies = replace(model.vocabularies, **labels)
    model.denoiser = build_denoiser(config, n_genes, model.vocabularies).eval()
    for tensor in model.denoiser.state_dict().values():
        tensor.normal_(std=0.3, generator=torch.Generator().manual_seed(tensor.numel()))
    return model


def write(folder: Path, config: DenoiserConfig, **labels) -> Path:
    """base/, and model/ and adapter/ of more genes and labels, of random weights and changes."""
    base, model = random_model(config, 12, ("A", "B")), random_model(config, 14, ("A", "B", "C"), **labels)
    base.save_pretrained(folder / "base")
    start = {"name": "base", "revision": None, "sha256": sha256(folder / "base" / CONFIG), "method": "lora"}
    model.training = TrainingRecord(steps=2, init_from=StartRecord(**start))
    backbone = {name: t for name, t in base.denoiser.state_dict().items() if name.startswith(BACKBONE)}
    model.denoiser.load_state_dict(backbone, strict=False)
    inject_lora(model.denoiser, 3, 12.0)
    weights = model.denoiser.state_dict()
    for name, tensor in weights.items():
        if "lora_" in name:
            tensor.normal_(std=0.3)
    model.denoiser = build_denoiser(config, 14, model.vocabularies).eval()
    model.denoiser.load_state_dict(merged(weights, 4.0))
    model.save_pretrained(folder / "model")
    save_adapter(folder / "adapter", folder / "model", weights, 4.0)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("adapter"), LABELS, **MORE)


@pytest.fixture
def adapter(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder / "adapter", tmp_path / "adapter"))


def rewritten(adapter: Path, name: str, change=None) -> None:
    """A file that was changed by someone who can compute hashes."""
    if change is not None:
        content = json.loads((adapter / name).read_text())
        change(content)
        (adapter / name).write_text(json.dumps(content))
    config = json.loads((adapter / CONFIG).read_text())
    if name != CONFIG:
        config["sha256"][name] = sha256(adapter / name)
    config["sha256"][CONFIG] = config_hash(config)
    (adapter / CONFIG).write_text(json.dumps(config))


def setting(**changes):
    return lambda content: content.update(changes)


def base(**changes):
    return lambda training: training["init_from"].update(changes)


def part(name, **changes):
    return lambda config: config[name].update(changes)


def refused(adapter: Path, folder: Path, words: str, kind: type[Exception] = ValueError) -> None:
    with pytest.raises(kind, match=words) as error:
        PerturbDiff.from_pretrained(adapter, base=folder / "base", device="cpu")
    assert "\n" not in str(error.value)


def outputs(*denoisers: torch.nn.Module) -> list[torch.Tensor]:
    """Of the same random input, with known and null labels."""
    x, control, t = torch.randn(3, 4, 14), torch.rand(3, 4, 14), torch.tensor([0, 5, 900])
    ids = [torch.tensor([[2], [0], [-1]]), torch.tensor([1, -1, 0]), torch.tensor([-1, 1, 0])]
    labels = Labels(*ids, dose=torch.tensor([[0.3], [-1.0], [0.0]]))
    with torch.no_grad():
        return [denoiser(x, t, control, labels, x.relu()) for denoiser in denoisers]


# ---------------------------------------------------------------- peft


@pytest.mark.parametrize(("config", "labels"), [(LABELS, MORE), (REFERENCE, {})], ids=["labels", "reference"])
@pytest.mark.filterwarnings("error")
def test_peft_loads_an_adapter_to_the_outputs_of_the_merged_model(config, labels, tmp_path):
    from peft import PeftModel

    folder = write(tmp_path, config, **labels)
    start = extended_base(folder / "adapter", PerturbDiff.from_pretrained(folder / "base", device="cpu").denoiser)
    by_peft = PeftModel.from_pretrained(start, folder / "adapter")
    ours = PerturbDiff.from_pretrained(folder / "adapter", base=folder / "base", device="cpu").denoiser
    expected, got, saved = outputs(by_peft, ours, PerturbDiff.from_pretrained(folder / "model", device="cpu").denoiser)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(saved, expected, atol=1e-5, rtol=0)
    with by_peft.disable_adapter():
        assert (outputs(by_peft)[0] - expected).abs().max() > 0.1


def test_what_peft_trains_and_saves_is_merged_to_its_outputs(folder, adapter, tmp_path):
    """Other layers, rank and scaling than ours, named as peft names them."""
    from peft import LoraConfig, get_peft_model

    start = extended_base(adapter, PerturbDiff.from_pretrained(folder / "base", device="cpu").denoiser)
    whole = json.loads((adapter / ADAPTER_CONFIG).read_text())["modules_to_save"]
    asked = LoraConfig(r=2, lora_alpha=5, target_modules=["qkv", "mlp.fc1"], modules_to_save=whole, lora_dropout=0.1)
    by_peft = get_peft_model(start, asked).eval()
    for parameter in by_peft.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    by_peft.save_pretrained(tmp_path / "peft")
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        shutil.copy(tmp_path / "peft" / name, adapter / name)
        rewritten(adapter, name)
    ours = PerturbDiff.from_pretrained(adapter, base=folder / "base", device="cpu", golden_check=False).denoiser
    got, expected = outputs(ours, by_peft)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


# ---------------------------------------------------------------- ours


def test_the_merged_weights_are_the_base_plus_scaled_products(folder, adapter):
    before = PerturbDiff.from_pretrained(folder / "base", device="cpu").denoiser.state_dict()
    tensors = {name.removeprefix(PEFT): t for name, t in load_file(adapter / ADAPTER_WEIGHTS).items()}
    model = PerturbDiff.from_pretrained(adapter, base=folder / "base", device="cpu")
    layers = changed_layers(model.denoiser)
    assert len(layers) == 22
    for name, tensor in model.denoiser.state_dict().items():
        layer = name.removesuffix(".weight")
        if layer in layers:
            a, b = tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"]
            assert a.shape[0] == b.shape[1] == 3
            torch.testing.assert_close(tensor, before[name] + 4.0 * b @ a)  # 12 / 3
        else:
            assert torch.equal(tensor, before[name] if name.startswith(BACKBONE) else tensors[name])
    own = PerturbDiff.from_pretrained(folder / "model")
    assert (model.genes, model.vocabularies, model.training) == (own.genes, own.vocabularies, own.training)


def test_its_card_is_one_that_is_safe_to_show_and_names_the_base(folder, adapter):
    text = (adapter / CARD).read_text()
    check_card(text)
    assert f"its base, base with config.json of sha256 {sha256(folder / 'base' / CONFIG)}" in text


def test_adapters_and_models_do_not_replace_each_other(folder, adapter):
    denoiser = untrained().denoiser
    inject_lora(denoiser, 1, 1.0)
    with pytest.raises(FileExistsError, match="is a model, which an adapter must not replace"):
        save_adapter(folder / "base", folder / "model", denoiser.state_dict(), 1.0)
    with pytest.raises(FileExistsError, match="is an adapter, which a model must not replace"):
        PerturbDiff.from_pretrained(folder / "base").save_pretrained(adapter)


def test_an_adapter_is_of_a_whole_model(folder, adapter):
    rewritten(adapter, "training.json", base(sha256=sha256(folder / "adapter" / CONFIG)))
    with pytest.raises(ValueError, match="is an adapter itself, and adapters are of whole models"):
        PerturbDiff.from_pretrained(adapter, base=folder / "adapter")
    with pytest.raises(ValueError, match="base is a whole model, not an adapter: it has no base"):
        PerturbDiff.from_pretrained(folder / "base", base=folder / "base")


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize("name", [ADAPTER_WEIGHTS, ADAPTER_CONFIG, "genes.json", "training.json", GOLDEN])
def test_a_changed_or_missing_file_is_named(folder, adapter, name):
    content = (adapter / name).read_bytes()
    (adapter / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(adapter, folder, f"{name} does not have the sha256")
    (adapter / name).unlink()
    refused(adapter, folder, f"lacks {name}", FileNotFoundError)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (ADAPTER_CONFIG, setting(peft_type="LOHA"), "peft_type is LOHA; only LORA is read"),
        (ADAPTER_CONFIG, setting(use_rslora=True), "asks for use_rslora=True"),
        (ADAPTER_CONFIG, setting(use_dora=True, bias="all"), "asks for use_dora=True, bias=all"),
        (ADAPTER_CONFIG, setting(rank_pattern={"fc1": 1}), "asks for rank_pattern="),
        (ADAPTER_CONFIG, setting(init_lora_weights="pissa"), "asks for init_lora_weights=pissa"),
        (ADAPTER_CONFIG, setting(auto_map={"AutoModel": "x.Model"}), "asks for auto_map="),
        (ADAPTER_CONFIG, setting(r=1 << 40), "must be 1 to 4096"),
        (ADAPTER_CONFIG, setting(r=True), "must be 1 to 4096"),
        (ADAPTER_CONFIG, setting(r=4), r"lora_A\.weight \(3, 16\) \(must be"),
        (ADAPTER_CONFIG, setting(lora_alpha=0), "lora_alpha .0. must be greater than 0"),
        (ADAPTER_CONFIG, setting(lora_alpha="1"), "lora_alpha .1. must be"),
        (ADAPTER_CONFIG, setting(lora_alpha=1e30), "golden check"),
        (ADAPTER_CONFIG, setting(target_modules="all-linear"), "target_modules must list layers"),
        (ADAPTER_CONFIG, setting(target_modules=["qkv"] * (1 << 18)), "target_modules must list layers"),
        (ADAPTER_CONFIG, setting(target_modules=["qkv", "head"]), "target_modules names head; there are blocks"),
        (ADAPTER_CONFIG, setting(target_modules=["qkv"]), r"missing nothing; unexpected base_model\.model\.blocks"),
        (ADAPTER_CONFIG, setting(modules_to_save=["head"]), "modules_to_save must be conditioning, effect"),
        ("training.json", setting(init_from=None), "init_from in training.json must give"),
        ("training.json", base(sha256="0" * 63), "init_from in training.json must give"),
        ("training.json", base(name=7), r"init_from.name \(7\) must be a text"),
        ("training.json", base(revision="main"), "init_from in training.json must give"),
        ("training.json", base(sha256="0" * 64), r"trained on base \(sha256 0{12}\), and .* is another model, base \("),
        (CONFIG, part("denoiser", depth=2), "target_modules must list layers"),
        (CONFIG, part("denoiser", control_weight=0.5), "golden check"),
        (CONFIG, part("sha256", **{"adapter_model.bin": "0" * 64}), "unexpected adapter_model.bin"),
        (CONFIG, part("sha256", **{"model.safetensors": "0" * 64}), "unexpected model.safetensors"),
    ],
)
def test_files_that_lie_are_refused(folder, adapter, name, change, words):
    rewritten(adapter, name, change)
    refused(adapter, folder, words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(BIAS), f"missing {BIAS}"),
        (lambda t: t.update({BIAS: t[BIAS][:-1]}), r"head\.bias \(13,\) \(must be \(14,\)\)"),
        (lambda t: t.update({BIAS: t[BIAS].int()}), r"head\.bias of type torch.int32"),
        (lambda t: t[BIAS].fill_(math.nan), "golden check"),
        (lambda t: t.update({f"{PEFT}blocks.0.mlp.fc1.weight": torch.zeros(1)}), r"unexpected .*\.mlp\.fc1\.weight"),
        (lambda t: t.update(extra=torch.zeros(1 << 25)), "bytes, and such a file of this model at most"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(folder, adapter, change, words):
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    change(tensors)
    save_file(tensors, adapter / ADAPTER_WEIGHTS)
    rewritten(adapter, ADAPTER_WEIGHTS)
    refused(adapter, folder, words)


def test_a_base_of_another_architecture_is_refused(folder, adapter, tmp_path):
    random_model(REFERENCE, 12, ("A", "B")).save_pretrained(tmp_path / "base")
    rewritten(adapter, "training.json", base(sha256=sha256(tmp_path / "base" / CONFIG)))
    refused(adapter, tmp_path, r"does not fit its base base \(sha256")


def test_a_link_out_of_the_folder_is_refused(folder, adapter):
    (adapter / ADAPTER_WEIGHTS).rename(adapter.parent / "elsewhere")
    (adapter / ADAPTER_WEIGHTS).symlink_to(adapter.parent / "elsewhere")
    refused(adapter, folder, ADAPTER_WEIGHTS)


def test_a_damaged_adapter_is_not_pushed(adapter):
    (adapter / ADAPTER_WEIGHTS).write_bytes(b"")
    with pytest.raises(ValueError, match=f"{ADAPTER_WEIGHTS} does not have the sha256"):
        push_folder(adapter, "lab/lora")


def test_a_folder_of_peft_alone_or_of_our_old_format_is_refused(folder, adapter):
    def old(config):
        config["sha256"]["adapter.safetensors"] = config["sha256"].pop(ADAPTER_WEIGHTS)
        del config["sha256"][ADAPTER_CONFIG]

    rewritten(adapter, CONFIG, old)
    refused(adapter, folder, r"missing model\.safetensors, unexpected adapter\.safetensors")
    (adapter / CONFIG).unlink()
    refused(adapter, folder, "is not a model folder: it has no config.json", FileNotFoundError)
