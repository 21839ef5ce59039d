"""A push is one commit that came back as it went, or no tag."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi

from perturbdiff.cli.main import main
from perturbdiff.config import ObsColumns
from perturbdiff.data.screen import control_cells
from perturbdiff.hub.model_folder import CARD, CONFIG, OWN_FILES, WEIGHTS, WEIGHTS_INDEX
from perturbdiff.hub.push import Publication, publish
from perturbdiff.model import PerturbDiff, push_folder
from perturbdiff.training.loop import fit
from tests.hub.test_card import EVALUATION
from tests.localhub.client import TOKEN, finish, led_to, no_secrets_in, refused, start
from tests.localhub.server import Fault, LocalHub, Repo
from tests.simulated import tiny_config, write_screen

# The client passes file objects in a way that its own HTTP library warns about.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")]

NAME = "lab/kang"
WRITING = {"batch", "put", "verify", "commit", "branch", "tag", "preupload"}
GOLDEN = "checks/golden.safetensors"


@pytest.fixture(scope="module")
def screen(tmp_path_factory) -> Path:
    return write_screen(tmp_path_factory.mktemp("screen"))


@pytest.fixture(scope="module")
def model(screen, tmp_path_factory) -> Path:
    """A model folder with an evaluation."""
    folder = tmp_path_factory.mktemp("trained")
    trained = load(fit(tiny_config(screen, folder / "run")).folder / "model")
    trained.evaluation = EVALUATION
    trained.save_pretrained(folder / "kang")
    return folder / "kang"


@pytest.fixture(scope="module")
def sharded(model) -> Path:
    load(model).save_pretrained(model.parent / "sharded", max_shard_size="60KB")
    return model.parent / "sharded"


@pytest.fixture
def hub(tmp_path):
    with LocalHub(write_token=TOKEN, redirects=True) as hub, led_to(hub, tmp_path / "home"):
        yield hub


def load(where=NAME, **how) -> PerturbDiff:
    return PerturbDiff.from_pretrained(where, device="cpu", **how)


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def at(hub, revision="main") -> dict[str, bytes]:
    repo = hub.models[NAME]
    return {path: c for path, c in repo.commits[repo.resolve(revision)].items() if path != ".gitattributes"}


def changed(model: Path, folder: Path) -> Path:
    """Another model of the same settings."""
    other = load(model)
    with torch.no_grad():
        other.denoiser.get_parameter("head.bias").add_(0.5)
    other.save_pretrained(folder)
    return folder


# ---------------------------------------------------------------- what arrives


@pytest.mark.parametrize("shards", [1, 2])
def test_a_pushed_model_predicts_the_same_from_the_hub(hub, model, sharded, screen, shards):
    folder = model if shards == 1 else sharded
    before = files(folder)
    done = push_folder(folder, NAME, tag="v1")
    assert files(folder) == before
    repo = hub.models[NAME]
    assert done == Publication(NAME, f"{hub.url}/{NAME}", repo.branches["main"], "v1")
    assert repo.tags == {"v1": repo.branches["main"]}
    assert not repo.private
    pushed = at(hub)
    assert {path: c for path, c in pushed.items() if path != CARD} == {
        path: content for path, content in before.items() if path != CARD
    }
    n_weights = len([path for path in pushed if path.startswith("model")])
    assert (n_weights == 1) if shards == 1 else (n_weights > shards)  # and an index
    large = {request.path for request in hub.log if request.operation == "put"}
    assert len(large) == len([path for path in pushed if path.endswith(".safetensors")])
    controls = control_cells(screen, ObsColumns(), None, None)
    here, there = (load(where).predict(controls, perturbation="pert_1", seed=3) for where in (folder, NAME))
    assert (here.X != there.X).nnz == 0
    assert there.uns["perturbdiff"]["model"] == NAME


def test_a_model_in_memory_is_pushed_as_it_would_be_saved(hub, model):
    done = load(model).push_to_hub(NAME, tag="v1", max_shard_size="60KB", commit_message="First")
    assert WEIGHTS_INDEX in at(hub, "v1")
    assert hub.models[NAME].notes[done.commit].title == "First"
    again = load(model)
    assert all(torch.equal(a, b) for a, b in zip(again.denoiser.state_dict().values(),
               load(NAME, revision="v1").denoiser.state_dict().values(), strict=True))  # fmt: skip


def test_the_card_names_the_repo_and_only_on_the_hub(hub, model):
    push_folder(model, NAME)
    assert NAME not in (model / CARD).read_text()
    card = at(hub)[CARD].decode()
    assert f'from_pretrained("{NAME}")' in card
    assert HfApi().model_info(NAME).library_name == "perturbdiff"


def test_what_an_owner_wrote_into_the_card_survives_the_next_push(hub, model, tmp_path):
    push_folder(model, NAME)
    card = at(hub)[CARD].decode()
    mark = "<!-- generated: Evaluation -->"
    edited = card.replace("---\n", "---\nlanguage: no\n", 1).replace(mark, f"<img src='x'> mine\n\n{mark}")
    HfApi().upload_file(path_or_fileobj=edited.encode(), path_in_repo=CARD, repo_id=NAME)
    changed = load(model)
    changed.evaluation = None
    changed.save_pretrained(tmp_path / "other")
    push_folder(tmp_path / "other", NAME, tag="v2")
    pushed = at(hub, "v2")[CARD].decode()
    assert "\nlanguage: no\n" in pushed
    assert "<img src='x'> mine\n\n" in pushed
    assert "Not evaluated." in pushed
    assert "model-index" not in pushed
    assert "0.920" in edited
    assert "0.920" not in pushed

    # The folder's own words go where the repo has none; where both have some, those of the repo stay.
    local = tmp_path / "other" / CARD
    local.write_text(local.read_text() + "\nLocal words.\n")
    push_folder(tmp_path / "other", "lab/second")
    at_second = hub.models["lab/second"]
    assert at_second.commits[at_second.branches["main"]][CARD].decode().endswith("\nLocal words.\n")
    with pytest.warns(UserWarning, match="were both edited: that of lab/kang stays"):
        push_folder(tmp_path / "other", NAME)
    assert at(hub)[CARD].decode() == pushed


def test_a_card_without_marks_is_kept_whole_and_said_to_be_old(hub, model, capsys):
    push_folder(model, NAME)
    HfApi().upload_file(path_or_fileobj=b"# Mine\r\n", path_in_repo=CARD, repo_id=NAME)
    with pytest.warns(UserWarning, match="README.md of lab/kang has no generated parts.* scores may be old"):
        push_folder(model, NAME, tag="v2")
    assert at(hub, "v2")[CARD] == b"# Mine\r\n"


def test_a_folder_that_is_saved_again_keeps_its_owners_words(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "kang")
    (folder / CARD).write_text((folder / CARD).read_text() + "\nLocal words.\n")
    again = load(folder)
    again.evaluation = None
    again.save_pretrained(folder)
    card = (folder / CARD).read_text()
    assert card.endswith("\nLocal words.\n")
    assert "Not evaluated." in card


def test_fewer_shards_replace_more_and_nothing_else_goes(hub, model, sharded):
    push_folder(sharded, NAME, tag="v1")
    api = HfApi()
    for path in ("notes/my.txt", "model.png", "figure-00001-of-00002.safetensors"):
        api.upload_file(path_or_fileobj=b"mine", path_in_repo=path, repo_id=NAME)
    push_folder(model, NAME, tag="v2")
    assert set(at(hub)) == {*files(model), "notes/my.txt", "model.png", "figure-00001-of-00002.safetensors"}
    assert set(at(hub, "v1")) == set(files(sharded))
    assert load(revision="v1").n_parameters == load(revision="v2").n_parameters
    without = load(model)
    without.evaluation = None
    without.push_to_hub(NAME)
    assert set(files(model)) - set(at(hub)) == {"evaluation.json"}


def test_a_push_of_the_same_makes_no_commit_and_may_tag_it(hub, model):
    first = push_folder(model, NAME)
    commits = set(hub.models[NAME].commits)
    second = push_folder(model, NAME, tag="v1")
    assert second.commit == first.commit
    assert set(hub.models[NAME].commits) == commits
    assert hub.models[NAME].tags == {"v1": first.commit}


def test_a_branch_is_made_and_main_left_alone(hub, model, tmp_path):
    first = push_folder(model, NAME)
    other = changed(model, tmp_path / "other")
    for _ in range(2):
        done = push_folder(other, NAME, revision="trial", tag=None)
    assert hub.models[NAME].branches == {"main": first.commit, "trial": done.commit}
    assert at(hub, "trial")[WEIGHTS] == (other / WEIGHTS).read_bytes()
    assert at(hub)[WEIGHTS] == (model / WEIGHTS).read_bytes()


def test_a_private_repo_stays_private(hub, model):
    for _ in range(2):
        push_folder(model, NAME, private=True)
        assert hub.models[NAME].private
    push_folder(model, NAME)
    assert hub.models[NAME].private


def test_what_is_not_to_be_is_refused_before_anything_is_sent(hub, model, capsys):
    hub.models[NAME] = Repo()
    hub.models[NAME].add({"a": b"1"})
    hub.models[NAME].tags["v1"] = head = hub.models[NAME].branches["main"]
    line = refused(capsys, "hub", "push", model, NAME, "--tag", "v1")
    assert "has a tag 'v1' already; choose another" in line
    line = refused(capsys, "hub", "push", model, NAME, "--private")
    assert "is public; make it private on its page" in line
    assert "may not be used so" not in line
    assert not WRITING & set(hub.operations())
    assert hub.models[NAME].branches == {"main": head}


@pytest.mark.parametrize("damage", ["weights", "settings", "missing", "nothing"])
def test_a_folder_that_is_not_whole_asks_nothing_of_the_hub(hub, model, tmp_path, capsys, damage):
    folder = shutil.copytree(model, tmp_path / "kang")
    if damage == "nothing":
        folder = tmp_path / "nowhere"
    elif damage == "missing":
        (folder / GOLDEN).unlink()
    else:
        path = folder / (WEIGHTS if damage == "weights" else "genes.json")
        path.write_bytes(path.read_bytes()[:-3])
    refused(capsys, "hub", "push", folder, NAME)
    assert hub.log == []


@pytest.mark.parametrize("name", ["kang", "../kang", "a/b/c", "lab/kang\x1b[31m", "lab/ kang", ""])
def test_what_is_no_name_of_a_repo_is_refused(hub, model, capsys, name):
    line = refused(capsys, "hub", "push", model, name)
    assert "write owner/name" in line
    assert not WRITING & set(hub.operations())
    assert hub.models == {}


def test_a_push_that_has_no_room_to_come_back_sends_nothing(hub, model, capsys, monkeypatch):
    n_bytes = sum(len(content) for path, content in files(model).items() if path != CARD)
    usage = shutil.disk_usage(model)
    monkeypatch.setattr(shutil, "disk_usage", lambda where: usage._replace(free=n_bytes - 1))
    line = refused(capsys, "hub", "push", model, NAME)
    assert f"it has {n_bytes:,} bytes" in line
    assert "make room, or set TMPDIR" in line
    assert hub.log == []
    monkeypatch.setattr(shutil, "disk_usage", lambda where: usage._replace(free=n_bytes))
    push_folder(model, NAME)


def test_only_a_folder_is_pushed(hub, model, tmp_path, capsys, monkeypatch):
    push_folder(model, NAME)
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    assert "no such folder here" in refused(capsys, "hub", "push", NAME, "lab/copy", "--license", "mit")
    assert set(tmp_path.iterdir()) == before
    assert set(hub.models) == {NAME}


# ---------------------------------------------------------------- what breaks


BREAKS = {
    "create": ("create", "*", Fault(times=1, status=500)),
    "not allowed": ("preupload", NAME, Fault(times=1, status=403)),
    "batch": ("batch", NAME, Fault(times=1, status=400)),
    "upload refused": ("put", NAME, Fault(times=1, status=403)),
    "upload not verified": ("verify", NAME, Fault(times=1, status=404)),
    "commit fails": ("commit", NAME, Fault(times=1, status=500)),
    "commit drops": ("commit", NAME, Fault(times=1, drops=True)),
    "commit answer lost": ("commit", NAME, Fault(times=1, drops=True, done=True)),
    "commit answer cut": ("commit", NAME, Fault(times=1, cut_after=3)),
    "commit answer odd": ("commit", NAME, Fault(times=1, content=b"{}")),
    "listing fails": ("paths_info", NAME, Fault(times=1, status=500)),
    "tag fails": ("tag", NAME, Fault(times=1, status=500)),
    "tag drops": ("tag", NAME, Fault(times=1, drops=True)),
}


@pytest.mark.parametrize("what", BREAKS)
def test_where_a_push_breaks_there_is_no_tag_and_the_same_command_succeeds(hub, model, tmp_path, capsys, what):
    first = push_folder(model, NAME, tag="v1").commit
    other = changed(model, tmp_path / "other")
    before = at(hub, "v1"), files(other)
    operation, key, fault = BREAKS[what]
    hub.faults[operation, key] = fault
    command = "hub", "push", other, NAME, "--tag", "v2"
    line = refused(capsys, *command)
    assert "lab/kang" in line
    assert hub.models[NAME].tags == {"v1": first}
    assert (at(hub, "v1"), files(other)) == before
    if operation not in ("paths_info", "tag") and "answer" not in what:
        assert hub.models[NAME].branches == {"main": first}
    main([str(word) for word in command])
    assert hub.models[NAME].tags == {"v1": first, "v2": hub.models[NAME].branches["main"]}
    assert at(hub, "v2")[WEIGHTS] == (other / WEIGHTS).read_bytes()
    no_secrets_in(tmp_path / "other")


def test_an_upload_whose_connection_breaks_is_sent_again(hub, model):
    hub.faults["put", NAME] = Fault(times=1, cut_after=1000)
    push_folder(model, NAME, tag="v1")
    assert sorted(r.status for r in hub.log if r.operation == "put") == [0, 200, 200]
    assert at(hub, "v1")[WEIGHTS] == (model / WEIGHTS).read_bytes()


@pytest.mark.parametrize("path", [WEIGHTS, CONFIG, "genes.json", CARD, GOLDEN])
def test_what_comes_back_changed_is_named_and_not_tagged(hub, model, capsys, path):
    other = b" " * (model / path).stat().st_size
    if path == CARD:  # that of the Hub is another than the folder's, and read before it is written anew
        push_folder(model, NAME)
        other = at(hub)[CARD].replace(b"PerturbDiff", b"perturbdiff")
    hub.faults[path] = Fault(content=other)
    line = refused(capsys, "hub", "push", model, NAME, "--tag", "v1")
    assert re.search(f"is not what was pushed: {re.escape(path)} came back different", line)
    assert hub.models[NAME].tags == {}
    hub.faults.clear()
    push_folder(model, NAME, tag="v1")
    assert list(hub.models[NAME].tags) == ["v1"]


def test_what_the_hub_lists_in_another_size_is_not_tagged(hub, model, capsys):
    push_folder(model, NAME)
    listed = hub.models[NAME].tree(hub.models[NAME].branches["main"], "", recursive=True)
    listed = [entry | {"size": 1} if entry["path"] == "genes.json" else entry for entry in listed]
    hub.faults["paths_info", NAME] = Fault(content=json.dumps(listed).encode())
    line = refused(capsys, "hub", "push", model, NAME, "--tag", "v1")
    assert "is not what was pushed: genes.json came back different" in line
    assert hub.models[NAME].tags == {}


def test_what_is_lost_on_the_way_is_named(hub, model, capsys):
    class Forgetful(Repo):
        def change(self, branch: str, body: bytes) -> str:
            sha = super().change(branch, body)
            del self.commits[sha]["batches.json"]
            return sha

    hub.models[NAME] = Forgetful()
    hub.models[NAME].add({"a": b"1"})
    line = refused(capsys, "hub", "push", model, NAME, "--tag", "v1")
    assert "batches.json came back different or not at all" in line
    assert hub.models[NAME].tags == {}


def test_what_came_back_must_pass_the_check_before_it_is_tagged(hub, model):
    seen = []

    def check(back: Path) -> None:
        seen.append(files(back))
        raise ValueError("fails its golden check")

    with pytest.raises(ValueError, match="fails its golden check"):
        publish(
            model, [CONFIG, WEIGHTS], NAME, "model", OWN_FILES, check, lambda path: path == WEIGHTS,
            card=(model / CARD).read_text(), tag="v1",
        )  # fmt: skip
    (back,) = seen
    assert {path: c for path, c in back.items() if ".cache" not in path} == {WEIGHTS: (model / WEIGHTS).read_bytes()}
    assert hub.models[NAME].tags == {}


def test_without_a_token_or_with_that_of_another(hub, model, tmp_path, capsys):
    for token in (None, "hf_AnotherSecretSecret"):
        with led_to(hub, tmp_path / "home", token):
            line = refused(capsys, "hub", "push", model, NAME)
        assert "log in" in line
    assert hub.models == {}


def test_offline_and_without_a_hub(hub, model, capsys, monkeypatch):
    hub.stop()
    assert "lab/kang" in refused(capsys, "hub", "push", model, NAME)


def test_a_process_says_no_secret_where_it_tries_again_and_fails(hub, model, tmp_path):
    # Its own log, progress bars and traceback included.
    hub.faults[WEIGHTS] = Fault(times=1, cut_after=1000)
    hub.faults["put", NAME] = Fault(times=1, status=503)
    hub.faults["tag", NAME] = Fault(times=1, status=500)
    command = "hub", "push", model, NAME, "--tag", "v1", "--debug"
    _, err = finish(start(hub.url, tmp_path / "fresh", *command), code=1)
    assert "Trying to resume download" in err
    assert "Retrying in" in err
    assert err.splitlines()[-1].startswith("ConnectionError: model 'lab/kang'")
    assert hub.models[NAME].tags == {}
