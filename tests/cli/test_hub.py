"""The commands of the Hub, from a folder to cells that are predicted elsewhere, and their one line where they fail."""

import re
import textwrap
from pathlib import Path

import anndata
import pytest
from huggingface_hub import constants

from perturbdiff.cli.main import main
from perturbdiff.hub.model_folder import WEIGHTS, read_folder
from perturbdiff.model import PerturbDiff
from perturbdiff.training.loop import fit
from tests.hub.test_card import EVALUATION
from tests.localhub.client import TOKEN, finish, led_to, no_secrets_in, refused, start
from tests.localhub.server import Fault, LocalHub, Repo
from tests.simulated import tiny_config, write_screen

# The client passes file objects in a way that its own HTTP library warns about.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")]

NAME = "lab/kang"


@pytest.fixture(scope="module")
def screen(tmp_path_factory) -> Path:
    return write_screen(tmp_path_factory.mktemp("screen"))


@pytest.fixture(scope="module")
def trained(screen, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    model = PerturbDiff.from_pretrained(fit(tiny_config(screen, folder / "run")).folder / "model", device="cpu")
    model.evaluation = EVALUATION
    model.save_pretrained(folder / "kang")
    return folder / "kang"


@pytest.fixture
def hub(tmp_path):
    with LocalHub(write_token=TOKEN, redirects=True) as hub, led_to(hub, tmp_path / "home"):
        yield hub


@pytest.fixture
def said(capsys):
    """Runs a command and gives what it printed."""

    def run(*argv) -> str:
        capsys.readouterr()
        main([str(word) for word in argv])
        return capsys.readouterr().out

    return run


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("max_shard_size", ["5GB", "60KB"])
def test_push_list_info_pull_verify_predict(hub, trained, screen, tmp_path, said, max_shard_size):
    folder = tmp_path / "model"
    PerturbDiff.from_pretrained(trained, device="cpu").save_pretrained(folder, max_shard_size=max_shard_size)
    text = said("hub", "push", folder, NAME, "--tag", "v1", "--private", "--message", "First")
    commit = hub.models[NAME].tags["v1"]
    assert f"pushed      {hub.url}/lab/kang at commit {commit}, pulled back and verified\ntag         v1\n" in text
    assert hub.models[NAME].notes[commit].title == "First"
    assert "lab/kang (private)" in said("hub", "list")

    text = said("hub", "info", f"{NAME}@v1")
    assert text.startswith(f"model         lab/kang at commit {commit}\n")
    assert f"sha256        {read_folder(folder).sha256}" in text
    assert "pearson_delta           0.920 (best baseline 0.883; higher)" in text
    assert not hub.gets(WEIGHTS)[1:]  # the first is of what the push pulled back

    out = tmp_path / "pulled"
    assert f"pulled      lab/kang at commit {commit}: every hash" in said("hub", "pull", f"{NAME}@v1", "--out", out)
    assert {path: c for path, c in files(out).items() if path != "README.md"} == {
        path: c for path, c in files(folder).items() if path != "README.md"
    }
    for where in (out, NAME, f"{NAME}@v1", f"{NAME}@{commit}"):
        assert "every hash and the golden output" in said("hub", "verify", where)
    assert said("hub", "diff", NAME, folder) == "weights: the same files\n"

    cells = []
    for where, path in ((NAME, tmp_path / "hub.h5ad"), (out, tmp_path / "here.h5ad")):
        words = ["--controls", screen, "--perturbation", "pert_1", "--cell-type", "type_0", "--out", path]
        said("predict", where, *words)
        cells.append(anndata.read_h5ad(path))
    assert cells[0].n_obs > 0
    assert (cells[0].X != cells[1].X).nnz == 0
    no_secrets_in(tmp_path / "pulled")
    no_secrets_in(tmp_path / "model")


def test_the_entry_that_a_push_prints_works_in_a_registry(hub, trained, tmp_path, said, capsys, monkeypatch):
    text = said("hub", "push", trained, NAME, "--tag", "v1")
    entry = text.split("\nfor a registry:\n")[1]
    assert "pearson_delta: 0.92" in entry
    registry = tmp_path / "registry.yaml"
    registry.write_text("checkpoints:\n" + textwrap.indent(entry, "  "))
    monkeypatch.setenv("PERTURBDIFF_REGISTRY", str(registry))
    text = said("hub", "list")
    assert re.search(r"registered  1\n  kang +lab/kang@v1  pearson_delta 0.92, energy_distance 0.25", text)
    assert "lab/kang at commit" in said("hub", "info", "kang")
    assert "verified    kang" in said("hub", "verify", "kang")
    assert PerturbDiff.from_pretrained("kang", device="cpu").name == NAME
    assert "kang" in refused(capsys, "hub", "info", "kank")
    said("hub", "pull", "kang", "--out", tmp_path / "pulled")
    assert files(tmp_path / "pulled")[WEIGHTS] == files(trained)[WEIGHTS]

    # Where there is no tag, the commit; and the list without a Hub.
    text = said("hub", "push", trained, NAME)
    assert f"  revision: {hub.models[NAME].branches['main']}\n" in text
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    text = said("hub", "list")
    assert "registered  1\n" in text
    assert "on the Hub  not reached" in text


def test_a_license_is_kept_in_the_folder_and_shown_everywhere(hub, trained, tmp_path, said):
    folder = tmp_path / "model"
    PerturbDiff.from_pretrained(trained, device="cpu").save_pretrained(folder)
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\nMine.\n")
    before = files(folder)
    with pytest.raises(SystemExit):
        said("hub", "push", folder, "no repo", "--license", "mit")
    assert files(folder) == before
    said("hub", "push", folder, NAME, "--license", "cc-by-4.0")
    for where in (folder, NAME):
        assert "license       cc-by-4.0\n" in said("hub", "info", where)
    card = hub.models[NAME].commits[hub.models[NAME].branches["main"]]["README.md"].decode()
    for text in (card, (folder / "README.md").read_text()):
        assert "license: cc-by-4.0\n" in text
        assert text.endswith("\nMine.\n")
    assert files(folder)[WEIGHTS] == files(trained)[WEIGHTS]
    assert said("hub", "diff", NAME, folder) == "weights: the same files\n"


def test_a_benchmark_gets_the_scores(hub, trained, tmp_path, said, capsys):
    said("hub", "push", trained, NAME, "--benchmark", "lab/bench")
    pushed = hub.models[NAME].commits[hub.models[NAME].branches["main"]]
    results = [path for path in pushed if path.startswith(".eval_results/")]
    assert results
    assert b"lab/bench" in pushed[results[0]]
    said("hub", "push", trained, NAME)  # without: they go
    assert not [p for p in hub.models[NAME].commits[hub.models[NAME].branches["main"]] if p.startswith(".eval")]
    assert "bench" in refused(capsys, "hub", "push", trained, NAME, "--benchmark", "bench")


def test_a_list_may_be_of_one_owner_or_word(hub, trained, said):
    for name in ("lab/kang", "lab/norman", "other/kang"):
        said("hub", "push", trained, name)
    text = said("hub", "list", "--owner", "lab", "--search", "kang")
    assert text.endswith("on the Hub  1\n  lab/kang\n")


@pytest.mark.parametrize(
    "argv",
    [
        ("hub", "info", "lab/nothing"),
        ("hub", "verify", f"{NAME}@v9"),
        ("hub", "pull", "lab/nothing", "--out", "out"),
        ("hub", "diff", NAME, "lab/nothing"),
        ("hub", "info", "a/b/c"),
        ("hub", "info", "./nothing"),
        ("hub", "info", "\x1b[31mred"),
        ("hub", "info", f"{NAME}@\x1b[31m"),
        ("predict", "lab/nothing", "--controls", "c.h5ad", "--perturbation", "A", "--out", "out.h5ad"),
        ("atlas", "info", "lab/nothing"),
        ("atlas", "pull", "lab/nothing", "--out", "out"),
        ("atlas", "pull", "a/b/c", "--out", "out"),
        ("atlas", "push", "lab/nothing", "lab/atlas"),
    ],
    ids=lambda argv: " ".join(argv[:3]).replace("\x1b", "ESC"),
)
def test_what_is_not_there_is_one_line_and_writes_nothing(hub, trained, tmp_path, capsys, monkeypatch, argv):
    hub.models[NAME] = Repo()
    hub.models[NAME].commit(trained)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    refused(capsys, *argv)
    assert list((tmp_path / "here").iterdir()) == []


OUT_OF_ORDER = {
    "error": Fault(status=500),
    "forbidden": Fault(status=403),
    "dropped": Fault(drops=True),
    "html": Fault(content=b"<html>"),
    "list": Fault(content=b"[]"),
}


@pytest.mark.parametrize(
    ("operation", "what"),
    # A tree that breaks is asked for again for 23 seconds by the client.
    [("info", what) for what in OUT_OF_ORDER] + [("tree", "forbidden"), ("tree", "html"), ("tree", "list")],
)
def test_a_hub_out_of_order_is_one_line(hub, trained, tmp_path, capsys, operation, what):
    hub.models[NAME] = Repo()
    hub.models[NAME].commit(trained)
    hub.faults[operation, "*"] = OUT_OF_ORDER[what]
    assert "lab/kang" in refused(capsys, "hub", "info", NAME)
    assert "lab/kang" in refused(capsys, "hub", "pull", NAME, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fresh_processes_push_and_pull_without_a_secret(hub, trained, tmp_path):
    # Nothing of the client is patched in them: they have their environment only.
    out, _ = finish(start(hub.url, tmp_path / "fresh", "hub", "push", trained, NAME, "--tag", "v1"))
    assert "tag         v1" in out
    hub.faults[WEIGHTS] = Fault(times=1, cut_after=1000)
    pull = start(hub.url, tmp_path / "fresh2", "hub", "pull", f"{NAME}@v1", "--out", tmp_path / "out")
    assert "Trying to resume download" in finish(pull)[1]
    assert files(tmp_path / "out")[WEIGHTS] == files(trained)[WEIGHTS]
    for folder in ("out", "fresh", "fresh2"):
        no_secrets_in(tmp_path / folder)


def test_without_a_token_public_models_are_read(hub, trained, tmp_path, said, capsys):
    for name, private in ((NAME, False), ("lab/hidden", True)):
        hub.models[name] = Repo(private=private)
        hub.models[name].commit(trained)
    with led_to(hub, tmp_path / "home", token=None):
        said("hub", "verify", NAME)
        assert {request.token for request in hub.log} == {None}
        assert "log in" in refused(capsys, "hub", "info", "lab/hidden")
        assert "lab/hidden" not in said("hub", "list")
