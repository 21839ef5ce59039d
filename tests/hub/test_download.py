"""Models come from the Hub at one commit, whole, checked, and from the cache where there is no Hub."""

import json
import os
import shutil
import signal
import subprocess
import textwrap
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from perturbdiff.cli.main import main
from perturbdiff.hub.download import SMALL_FILES, find_model, list_models, pull_model
from perturbdiff.hub.model_folder import CARD, CONFIG, MAX_JSON_BYTES, WEIGHTS, WEIGHTS_INDEX, read_folder
from perturbdiff.hub.registry import entry_of
from perturbdiff.model import PerturbDiff
from perturbdiff.training.loop import fit
from tests.localhub.client import TOKEN, finish, led_to, no_secrets_in, refused, start
from tests.localhub.repos import Refused
from tests.localhub.server import Fault, LocalHub, Repo
from tests.simulated import tiny_config, write_screen

pytestmark = pytest.mark.slow

NAME = "lab/kang"
CHANGED = "genes.json"  # of which other content is of the same size


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    return fit(tiny_config(write_screen(folder), folder / "run")).folder / "model"


@pytest.fixture(scope="module")
def other(model, tmp_path_factory) -> Path:
    """Another model of the same settings."""
    folder = tmp_path_factory.mktemp("other") / "model"
    again = PerturbDiff.from_pretrained(model, device="cpu")
    with torch.no_grad():
        again.denoiser.get_parameter("head.bias").add_(0.5)
    again.save_pretrained(folder, max_shard_size="60KB")
    return folder


@pytest.fixture
def hub(tmp_path, model):
    with LocalHub(write_token=TOKEN, redirects=True) as hub, led_to(hub, tmp_path / "home"):
        hub.models[NAME] = Repo()
        hub.models[NAME].commit(model)
        yield hub


def load(where=NAME, **how) -> PerturbDiff:
    return PerturbDiff.from_pretrained(where, device="cpu", **how)


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def same_weights(a: PerturbDiff, b: PerturbDiff) -> bool:
    return all(torch.equal(x, y) for x, y in zip(*(m.denoiser.state_dict().values() for m in (a, b)), strict=True))


# ---------------------------------------------------------------- which commit


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub, model, other):
    repo = hub.models[NAME]
    first = repo.branches["main"]
    repo.tags["v1"] = first
    second = repo.commit(other)
    repo.branches["trial"] = first
    old, new = load(model), load(other)
    assert not same_weights(old, new)
    for revision, commit in {"v1": first, "trial": first, first: first, None: second, "main": second}.items():
        assert find_model(NAME, revision).commit == commit
        assert same_weights(load(revision=revision), new if commit == second else old)
        assert same_weights(load(revision=revision), new if commit == second else old)  # from the cache
    assert load().name == NAME


def test_all_files_are_of_one_commit_also_where_the_branch_moves_between_them(hub, model, other):
    repo = hub.models[NAME]
    source = find_model(NAME)
    first, second = source.commit, repo.commit(other)
    assert first != second
    loaded = PerturbDiff._read(source, golden_check=True, base=None)
    assert same_weights(loaded, load(model))
    assert same_weights(load(), load(other))


def test_sizes_are_those_of_the_commit_that_is_read(hub, model, other, monkeypatch):
    # The branch moves between the listing and the first file.
    repo = hub.models[NAME]
    small, grown = Repo(), other

    class Moving(Repo):
        asked = 0

        def resolve(self, revision: str) -> str:
            self.asked += revision == "main"
            return small.branches["main"] if self.asked == 1 and revision == "main" else super().resolve(revision)

    small.commits, small.branches = repo.commits, dict(repo.branches)
    moving = hub.models[NAME] = Moving(commits=repo.commits, branches=repo.branches, stored=repo.stored)
    moving.commit(grown)
    source = find_model(NAME)
    assert source.commit == small.branches["main"]
    assert source.sizes == {path: len(content) for path, content in repo.commits[source.commit].items()}


def test_a_model_in_a_subfolder(hub, model, other, tmp_path):
    repo = hub.models[NAME]
    both = {f"runs/{name}/{path}": content for name, folder in (("a", model), ("b", other)) for path, content in
            files(folder).items()}  # fmt: skip
    repo.add(both)
    assert same_weights(load(subfolder="runs/a"), load(model))
    assert same_weights(load(subfolder="runs/b/"), load(other))
    with pytest.raises(FileNotFoundError, match=r"has no runs/config\.json: it holds no model"):
        load(subfolder="runs")
    for odd in ("../x", "/etc", "runs/*", "a/../../b", "runs/[ab]", "a\\b"):
        with pytest.raises(ValueError, match="must be a plain path inside of the repo"):
            load(subfolder=odd)
    pull_model(find_model(NAME, subfolder="runs/b"), tmp_path / "out", load)
    assert files(tmp_path / "out") == files(other)


# ---------------------------------------------------------------- where it is kept


def test_files_are_kept_where_one_says_and_asked_for_once(hub, tmp_path):
    load(cache_dir=tmp_path / "cache")
    assert not (tmp_path / "home/hub").exists()
    assert (tmp_path / "cache/models--lab--kang").is_dir()
    n_gets = len(hub.gets(WEIGHTS))
    load(cache_dir=tmp_path / "cache")
    assert len(hub.gets(WEIGHTS)) == n_gets == 1
    hub.stop()
    assert load(cache_dir=tmp_path / "cache", local_files_only=True).name == NAME
    with pytest.raises(FileNotFoundError, match="is not, or not whole, in the cache"):
        load(local_files_only=True)


def test_local_files_only_asks_nothing(hub):
    load()
    hub.log.clear()
    load(local_files_only=True)
    assert hub.log == []


def test_small_files_alone_are_not_a_model(hub):
    find_model(NAME)
    with pytest.raises(FileNotFoundError, match="is not, or not whole, in the cache of the Hub"):
        load(local_files_only=True)
    hub.stop()
    with pytest.raises(FileNotFoundError, match="is not, or not whole, in the cache of the Hub"):
        load()


def test_weights_of_unknown_size_are_not_downloaded(hub):
    find_model(NAME)
    hub.faults["info", NAME] = Fault(status=500)  # and nothing else
    with pytest.raises(FileNotFoundError, match="is not, or not whole, in the cache of the Hub"):
        load()
    assert hub.gets(WEIGHTS) == []


@pytest.mark.parametrize("content", [{}, {"README.md": b"# Mine"}, {"model.safetensors": b"1"}])
def test_a_repo_without_a_model_is_said_to_be_none(hub, content):
    hub.models["lab/other"] = Repo()
    hub.models["lab/other"].add(content)
    with pytest.raises(FileNotFoundError, match=r"model 'lab/other' has no config\.json: it holds no model folder"):
        load("lab/other")


@pytest.mark.parametrize("gone", ["stopped", "broken", "hidden"])
def test_without_the_hub_the_cache_is_loaded(hub, model, gone):
    load()
    if gone == "stopped":
        hub.stop()
    elif gone == "broken":
        hub.faults["info", "*"] = hub.faults["tree", "*"] = Fault(status=502)
    else:
        del hub.models[NAME]
    assert same_weights(load(), load(model))


def test_offline_asks_nothing_and_says_what_is_missing(hub, tmp_path, monkeypatch):
    warm, partly, cold = (tmp_path / name for name in ("warm", "partly", "cold"))
    load(cache_dir=warm)
    find_model(NAME, cache_dir=partly)
    hub.log.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load(cache_dir=warm).name == NAME
    for cache in (partly, cold):
        with pytest.raises(FileNotFoundError, match="is not, or not whole, in the cache of the Hub"):
            load(cache_dir=cache)
    with pytest.raises(FileNotFoundError, match="is not, or not whole, in the cache of the Hub"):
        load(revision="v9", cache_dir=warm)
    assert hub.log == []


def test_fresh_processes_load_from_a_mirror_and_then_offline_from_the_cache(hub, tmp_path):
    # Their HF_ENDPOINT and HF_HUB_OFFLINE are of the environment; those of this process are patched.
    out, _ = finish(start(hub.url + "/", tmp_path / "fresh", "hub", "verify", NAME))
    assert out.startswith("verified    lab/kang")
    hub.log.clear()
    warm, cold = (
        start("http://127.0.0.1:9", tmp_path / home, "hub", "verify", NAME, HF_HUB_OFFLINE="1")
        for home in ("fresh", "cold")
    )
    assert finish(warm)[0].startswith("verified    lab/kang")
    err = finish(cold, code=2)[1]
    assert err.startswith(
        "perturbdiff: error: no such folder here (lab/kang), and model 'lab/kang' is not, or not whole,"
    )
    assert err.count("\n") == 1


# ---------------------------------------------------------------- by name


@pytest.fixture
def registered(hub, tmp_path, monkeypatch, model):
    """Writes a registry with one entry."""

    def write(revision="v1", sha256=None) -> None:
        entry = entry_of("kang-2018", NAME, revision, sha256 or read_folder(model).sha256, None, {})
        (tmp_path / "registry.yaml").write_text("checkpoints:\n" + textwrap.indent(entry, "  "))
        monkeypatch.setenv("PERTURBDIFF_REGISTRY", str(tmp_path / "registry.yaml"))

    hub.models[NAME].tags["v1"] = hub.models[NAME].branches["main"]
    write()
    return write


def test_a_registered_name_loads_the_revision_that_is_meant(hub, registered, model, other):
    hub.models[NAME].commit(other)
    assert same_weights(load("kang-2018"), load(model))
    assert load("kang-2018").name == NAME
    assert same_weights(load("kang-2018", revision="main"), load(other))  # by the user's own choice


def test_what_is_not_the_registered_model_is_refused_before_its_weights_come(hub, registered, other):
    registered(sha256="0" * 64)
    with pytest.raises(ValueError, match=r"lab/kang: config\.json has sha256 .* not 0{64} as the registry states"):
        load("kang-2018")
    registered()
    hub.models[NAME].tags["v1"] = hub.models[NAME].commit(other)  # the tag was moved
    with pytest.raises(ValueError, match="it is another model than the registered one"):
        load("kang-2018")
    assert hub.gets(WEIGHTS) == []


def test_a_pull_of_what_is_not_the_registered_model_is_refused_before_its_weights_come(
    hub, registered, tmp_path, capsys
):
    registered(sha256="0" * 64)
    assert "as the registry states" in refused(capsys, "hub", "pull", "kang-2018", "--out", tmp_path / "out")
    assert hub.gets(WEIGHTS) == []
    assert not (tmp_path / "out").exists()


def test_a_registered_revision_that_is_gone(hub, registered):
    del hub.models[NAME].tags["v1"]
    with pytest.raises(FileNotFoundError, match="at revision 'v1' has no such revision"):
        load("kang-2018")


@pytest.mark.parametrize("text", ["./kang", "~/kang", "a/b/c", "/x/kang", "a\\b", "lab/", "../kang"])
def test_what_is_no_name_and_no_folder(hub, text):
    with pytest.raises(FileNotFoundError, match=r"^no such folder here .*; give a folder"):
        load(text)
    assert hub.log == []


# ---------------------------------------------------------------- broken connections


def test_a_download_that_breaks_goes_on_where_it_was(hub, model, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # bytes; what is less is asked for again
    hub.faults[WEIGHTS] = Fault(times=2, cut_after=50_000)
    assert same_weights(load(), load(model))
    assert [request.range for request in hub.gets(WEIGHTS)] == [None, "bytes=50000-", "bytes=100000-"]


def test_other_content_of_the_same_size_is_refused_and_no_model(hub, model):
    good = (model / WEIGHTS).read_bytes()
    hub.faults[WEIGHTS] = Fault(content=bytes(len(good)))
    with pytest.raises(ValueError, match=f"{WEIGHTS} does not have the sha256 stated"):
        load()
    hub.faults.clear()
    hub.faults[CHANGED] = Fault(content=(model / CHANGED).read_bytes().replace(b"gene_00", b"gene_99"))
    with pytest.raises(ValueError, match=f"{CHANGED} does not have the sha256 stated"):
        load(cache_dir=model.parent / "another_cache")
    shutil.rmtree(model.parent / "another_cache")


def test_weights_that_the_settings_cannot_need_are_not_downloaded(hub, model, tmp_path, capsys):
    repo = hub.models[NAME]
    repo.sizes[WEIGHTS] = 10**12
    with pytest.raises(ValueError, match=r"have 1,000,000,\d+,\d+ bytes; .* nothing was downloaded"):
        load()
    assert "nothing was downloaded" in refused(capsys, "hub", "pull", NAME, "--out", tmp_path / "out")
    before = hub.gets(CHANGED)
    repo.sizes = {CHANGED: MAX_JSON_BYTES + 1}
    with pytest.raises(ValueError, match=f"{CHANGED} of lab/kang has .* bytes; at most {MAX_JSON_BYTES:,} are read"):
        load()
    assert hub.gets(WEIGHTS) == []
    assert hub.gets(CHANGED) == before


def test_a_server_that_falls_silent_is_given_up(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 3)
    hub.faults[WEIGHTS] = Fault(stalls=True, cut_after=0)
    with pytest.raises(ConnectionError, match=r"model 'lab/kang' at revision .* did not answer as it should"):
        load()
    assert len(hub.gets(WEIGHTS)) == 6  # the client's retries
    hub.faults.clear()
    assert load().name == NAME


@pytest.mark.parametrize("status", [429, 503])
def test_a_hub_that_is_busy_is_asked_again(hub, model, monkeypatch, status):
    hub.faults["info", NAME] = Fault(times=2, status=status)
    monkeypatch.setattr("perturbdiff.hub_client.WAITS", (0, 0))
    assert same_weights(load(), load(model))
    assert [request.status for request in hub.log[:3]] == [status, status, 200]
    hub.faults["info", NAME] = Fault(times=3, status=status)
    assert same_weights(load(), load(model))  # from the cache


def test_what_is_not_there_may_have_been_a_folder(hub, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^no such folder here \(runs/kang\), and model 'runs/kang' is not"):
        load("runs/kang")
    with pytest.raises(FileNotFoundError, match=r"^model 'runs/kang' at revision 'v1' is not on the Hub"):
        load("runs/kang@v1")
    hub.stop()
    with pytest.raises(
        ConnectionError, match=r"^no such folder here \(runs/kang\), and model 'runs/kang': the Hub did"
    ):
        load("runs/kang")


def test_a_server_that_lists_nothing_is_given_up(hub, monkeypatch, tmp_path):
    load()
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
    hub.faults["info", NAME] = Fault(stalls=True)
    assert load().name == NAME
    with pytest.raises(ConnectionError, match=r"timed out.* It is not whole in the cache either: connect, or copy"):
        load(cache_dir=tmp_path / "cold")


# ---------------------------------------------------------------- pull


def pull(name, out) -> None:
    main(["hub", "pull", str(name), "--out", str(out)])


def test_a_pulled_folder_is_the_one_that_was_published(hub, model, tmp_path, capsys):
    hub.models[NAME].add({**files(model), "notes.txt": b"not of the model", "pytorch_model.bin": b"pickle"})
    pull(NAME, tmp_path / "deep/er/out")
    assert files(tmp_path / "deep/er/out") == files(model)
    assert list((tmp_path / "deep/er").iterdir()) == [tmp_path / "deep/er/out"]
    assert hub.gets("pytorch_model.bin") == []
    before = files(tmp_path)
    assert "exists; choose another name" in refused(capsys, "hub", "pull", NAME, "--out", tmp_path / "deep/er/out")
    assert "is a folder already" in refused(capsys, "hub", "pull", tmp_path / "deep/er/out", "--out", tmp_path / "b")
    assert files(tmp_path) == before


def test_a_sharded_model_is_pulled_with_its_index(hub, other, tmp_path):
    hub.models[NAME].commit(other)
    pull(NAME, tmp_path / "out")
    assert files(tmp_path / "out") == files(other)
    assert WEIGHTS_INDEX in files(other)
    assert len([path for path in files(other) if path.startswith("model-")]) > 1


def test_what_does_not_match_leaves_no_folder(hub, model, tmp_path, capsys):
    weights = (model / WEIGHTS).read_bytes()
    hub.faults[WEIGHTS] = Fault(times=1, content=bytes(len(weights)))
    line = refused(capsys, "hub", "pull", NAME, "--out", tmp_path / "out/kang")
    assert f"{WEIGHTS} does not have the sha256 stated" in line
    assert list((tmp_path / "out").iterdir()) == []
    pull(NAME, tmp_path / "out/kang")
    assert files(tmp_path / "out/kang") == files(model)


def test_weights_of_another_model_fail_the_golden_check_of_a_pull(hub, model, tmp_path, capsys):
    # Hashes agree, as one would make them agree on purpose.
    forged = shutil.copytree(model, tmp_path / "forged")
    content = load(model)
    with torch.no_grad():
        content.denoiser.get_parameter("head.bias").add_(0.5)
    golden = (model / "checks/golden.safetensors").read_bytes()
    content.save_pretrained(forged)
    config = json.loads((forged / CONFIG).read_text())
    config["sha256"]["checks/golden.safetensors"] = read_folder(model).tensor_files["checks/golden.safetensors"]
    (forged / CONFIG).write_text(json.dumps(config))
    (forged / "checks/golden.safetensors").write_bytes(golden)
    hub.models[NAME].commit(forged)
    assert "fails its golden check" in refused(capsys, "hub", "pull", NAME, "--out", tmp_path / "out/kang")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_pull_that_is_killed_goes_on_with_the_same_command(hub, model, tmp_path):
    out = tmp_path / "out/kang"
    hub.faults[WEIGHTS] = Fault(times=1, cut_after=50_000, stalls=True)
    process = start(hub.url, tmp_path / "fresh", "hub", "pull", NAME, "--out", out)
    assert process.stderr is not None
    while not hub.gets(WEIGHTS):
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".kang.partial"]
    no_secrets_in(tmp_path / "out")
    hub.log.clear()
    pull(NAME, out)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["kang"]
    assert files(out) == files(model)
    assert len(hub.gets(WEIGHTS)) == 1


def test_a_pull_goes_on_with_the_files_that_came_and_not_with_those_of_another_commit(hub, model, other, tmp_path):
    out = tmp_path / "out"
    source = find_model(NAME)

    def interrupted(folder: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull_model(source, out, interrupted)
    assert not out.exists()
    n_gets = len(hub.gets(WEIGHTS))
    pull_model(source, out, load)
    assert len(hub.gets(WEIGHTS)) == n_gets
    assert files(out) == files(model)
    shutil.rmtree(out)
    with pytest.raises(KeyboardInterrupt):
        pull_model(source, out, interrupted)
    hub.models[NAME].commit(other)
    pull_model(find_model(NAME), out, load)
    assert files(out) == files(other)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
def test_a_full_disk_is_one_line(hub, tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("may not mount here")
    try:
        line = refused(capsys, "hub", "pull", NAME, "--out", disk / "kang")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    assert "Not enough free disk space" in line or "No space left on device" in line  # whichever file comes first


def test_a_folder_that_may_not_be_written_is_one_line(hub, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "file" in refused(capsys, "hub", "pull", NAME, "--out", tmp_path / "file/kang")


# ---------------------------------------------------------------- list


def test_the_list_is_of_models_that_say_they_are_ours_and_of_harmless_names(hub, model):
    card = (model / CARD).read_bytes()
    for name in ("lab/one", "lab/two", "other/three", "lab/\x1b[31mred"):
        hub.models[name] = Repo(private=name == "lab/two")
        hub.models[name].add({CARD: card if name != "lab/one" else b"---\ntags: [rna]\n---\n"})
    assert set(list_models()) == {NAME, "lab/two (private)", "other/three", r"lab/\x1b[31mred"}
    assert set(list_models(owner="other")) == {"other/three"}
    assert set(list_models(search="two")) == {"lab/two (private)"}


def test_the_small_files_are_all_that_info_needs(hub):
    find_model(NAME)
    assert {request.path for request in hub.log if request.operation == "get"} == {*SMALL_FILES} & {
        *hub.models[NAME].commits[hub.models[NAME].branches["main"]]
    }


def test_a_revision_may_be_odd(hub):
    class Strict(Repo):
        def resolve(self, revision: str) -> str:
            if "\x1b" in revision:
                raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return super().resolve(revision)

    hub.models[NAME] = Strict(**vars(hub.models[NAME]))
    for revision in ("a\x1b[31m", "v 1", "refs/pr/1", "../main", "no/such"):
        with pytest.raises(FileNotFoundError, match="no such revision") as error:
            load(revision=revision)
        assert str(error.value).isprintable()
