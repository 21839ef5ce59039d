"""Checkpoints by name: what a registry may say, and what is loaded by it."""

import shutil
import textwrap
from pathlib import Path

import pytest
import yaml

from perturbdiff.hub.download import find_model
from perturbdiff.hub.model_folder import read_folder
from perturbdiff.hub.registry import REGISTRY, RegistryEntry, entry_of, find_entry, read_registry
from perturbdiff.model import PerturbDiff
from perturbdiff.training.loop import fit
from tests.simulated import tiny_config, write_screen

DIGEST = "0123456789abcdef" * 4
ENTRY = f"repo: lab/kang\n    revision: v1\n    sha256: {DIGEST}"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    return fit(tiny_config(write_screen(folder), folder / "run")).folder / "model"


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """Writes a registry that is in use from then on."""

    def write(text: str | bytes) -> Path:
        path = tmp_path / "registry.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        monkeypatch.setenv("PERTURBDIFF_REGISTRY", str(path))
        return path

    return write


def test_the_registry_of_the_package_can_be_read(monkeypatch):
    monkeypatch.delenv("PERTURBDIFF_REGISTRY", raising=False)
    assert set(read_registry()) == set(yaml.safe_load(REGISTRY.read_text())["checkpoints"])


def test_an_entry_says_again_what_it_was_made_of(registry):
    metrics = {"pearson_delta": 0.9218, "energy_distance": -0.003}
    text = entry_of("kang-2018", "lab/kang", "v1", DIGEST, "recipes/train/kang.yaml", metrics)
    registry("checkpoints:\n" + textwrap.indent(text, "  "))
    expected = RegistryEntry("kang-2018", "lab/kang", "v1", DIGEST, "recipes/train/kang.yaml", metrics)
    assert read_registry() == {"kang-2018": expected}
    assert find_entry("kang-2018") == expected


@pytest.mark.parametrize("revision", ["1e5", "0123456", "null", "true", "2026-01-01", "1.0"])
def test_a_revision_that_looks_like_something_else_comes_back_as_text(registry, revision):
    text = entry_of("kang", "lab/kang", revision, "1" * 64, None, {})
    registry("checkpoints:\n" + textwrap.indent(text, "  "))
    assert (find_entry("kang").revision, find_entry("kang").sha256) == (revision, "1" * 64)


def test_an_unknown_name_lists_the_nearest(registry):
    registry(f"checkpoints:\n  kang-2018:\n    {ENTRY}\n  norman-2019:\n    {ENTRY}\n")
    with pytest.raises(FileNotFoundError, match=r"'kang-2017' is neither a folder nor .*kang-2018.*hub list"):
        PerturbDiff.from_pretrained("kang-2017")
    registry("checkpoints: {}")
    with pytest.raises(FileNotFoundError, match="'kang' is neither a folder nor a registered checkpoint"):
        PerturbDiff.from_pretrained("kang")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "must hold one key, checkpoints"),
        ("- a", "must hold one key, checkpoints"),
        ("checkpoints:", "must hold one key, checkpoints"),
        ("checkpoints: [a]", "must hold one key, checkpoints"),
        ("checkpoints: {}\nmore: 1", "must hold one key, checkpoints"),
        ("checkpoints: {a: [", "is not YAML"),
        ("checkpoints: !!python/object/apply:os.getcwd []", "is not YAML"),
        (b"checkpoints: {\xff: 1}", "is not YAML"),
        ("checkpoints:\n  kang: 1", "'kang' must have repo and sha256.*found int"),
        ("checkpoints:\n  kang: {repo: lab/kang}", "must have repo and sha256.*found repo"),
        (f"checkpoints:\n  kang:\n    {ENTRY}\n    token: hf_x", "must have repo and sha256.*token"),
        (f"checkpoints:\n  1:\n    {ENTRY}", "checkpoint '1': a name is letters"),
        (f"checkpoints:\n  lab/kang:\n    {ENTRY}", "checkpoint 'lab/kang': a name is letters"),
        (f'checkpoints:\n  "a\\e[31m":\n    {ENTRY}', r"checkpoint 'a\\x1b\[31m': a name is letters"),
        (f"checkpoints:\n  kang:\n    {ENTRY.replace('v1', '1.0')}", "revision must be text .write digits in quotes"),
        (f"checkpoints:\n  kang:\n    {ENTRY.replace('lab/kang', '7')}", "repo must be text"),
        (f"checkpoints:\n  kang:\n    {ENTRY.replace('lab/kang', chr(34) * 2)}", "repo must be owner/name or a folder"),
        (f"checkpoints:\n  kang:\n    {ENTRY.replace('lab/kang', 'kang')}", "repo must be owner/name or a folder"),
        (f"checkpoints:\n  kang:\n    {ENTRY.replace('lab/kang', '../x')}", "repo must be owner/name or a folder"),
        (f"checkpoints:\n  kang:\n    {ENTRY.replace('v1', chr(34) * 2)}", "revision is missing"),
        (f"checkpoints:\n  kang:\n    {ENTRY.replace('    revision: v1', '')}", "revision is missing"),
        (f"checkpoints:\n  kang:\n    {ENTRY[:-1]}", "sha256 must be the 64 hex digits"),
        (f"checkpoints:\n  kang:\n    {ENTRY[:-1]}X", "sha256 must be the 64 hex digits"),
        (f"checkpoints:\n  kang:\n    {ENTRY}\n    metrics: [1]", "metrics must be finite numbers by name"),
        (f"checkpoints:\n  kang:\n    {ENTRY}\n    metrics: {{a: good}}", "metrics must be finite numbers by name"),
        (f"checkpoints:\n  kang:\n    {ENTRY}\n    metrics: {{1: 2.0}}", "metrics must be finite numbers by name"),
    ],
)
def test_a_registry_of_another_form_is_refused_with_what_is_wrong(registry, text, problem):
    path = registry(text)
    with pytest.raises(ValueError, match=problem) as error:
        read_registry()
    assert str(path) in str(error.value)
    assert str(error.value).isprintable()


def test_a_registry_must_be_a_file_of_a_bearable_size(registry, tmp_path, monkeypatch):
    registry("#" * (1 << 22) + "\n")
    with pytest.raises(ValueError, match="has 4,194,305 bytes; at most 4,194,304 are read"):
        read_registry()
    for path in (tmp_path, tmp_path / "nothing.yaml"):
        monkeypatch.setenv("PERTURBDIFF_REGISTRY", str(path))
        with pytest.raises(FileNotFoundError, match=f"PERTURBDIFF_REGISTRY .{path}. is not a file"):
            read_registry()


def test_a_name_is_a_folder_beside_the_registry(registry, model, tmp_path, monkeypatch):
    shutil.copytree(model, tmp_path / "models/kang")
    digest = read_folder(model).sha256
    registry(f"checkpoints:\n  kang:\n    repo: models/kang\n    sha256: {digest}")
    monkeypatch.chdir("/")
    assert find_model("kang").folder == tmp_path / "models/kang"
    assert PerturbDiff.from_pretrained("kang", device="cpu").genes.names[0] == "gene_00"
    with pytest.raises(ValueError, match="is a folder and has no revision 'v2'"):
        PerturbDiff.from_pretrained("kang", revision="v2")


def test_a_folder_that_is_not_the_registered_model_is_refused(registry, model, tmp_path):
    shutil.copytree(model, tmp_path / "kang")
    registry(f"checkpoints:\n  kang-2018:\n    repo: kang\n    sha256: {DIGEST}")
    with pytest.raises(ValueError, match=f"kang: config.json has sha256 .*, not {DIGEST} as the registry states"):
        PerturbDiff.from_pretrained("kang-2018")
    assert PerturbDiff.from_pretrained(tmp_path / "kang", device="cpu").name == "kang"  # which is what it says it is


def test_a_folder_here_comes_before_a_name(registry, model, tmp_path, monkeypatch):
    shutil.copytree(model, tmp_path / "kang")
    registry(f"checkpoints:\n  kang:\n    {ENTRY}")
    monkeypatch.chdir(tmp_path)
    assert find_model("kang").repo is None
