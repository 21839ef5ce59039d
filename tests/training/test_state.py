import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from perturbdiff.config import DenoiserConfig, OptimConfig
from perturbdiff.nn.conditioning import VocabSizes
from perturbdiff.nn.denoiser import Denoiser
from perturbdiff.training.ema import EMA
from perturbdiff.training.optim import make_optimizer
from perturbdiff.training.partition import full_moments, full_weights, load_moments, on_host
from perturbdiff.training.state import TENSOR_FILES, Progress, latest_state, open_state, save_state, saved_states

pytestmark = pytest.mark.slow


class Run:
    """What training keeps, of the smallest denoiser."""

    def __init__(self, seed):
        torch.manual_seed(seed)
        self.denoiser = Denoiser(DenoiserConfig(width=8, depth=1, n_heads=1), 3, VocabSizes(1, 1, 1))
        self.optimizer = SimpleNamespace(optimizer=make_optimizer(self.denoiser, OptimConfig()))  # as Accelerate wraps
        self.ema = EMA(self.denoiser, 0.9)
        self.progress = Progress()

    def step(self):
        generator = torch.Generator().manual_seed(self.progress.step)
        for parameter in self.denoiser.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        self.optimizer.optimizer.step()
        self.ema.update(self.denoiser)
        self.progress.step += 1
        self.progress.ema_updates += 1

    def tensors(self):
        return {
            "denoiser.safetensors": full_weights(self.denoiser),
            "ema.safetensors": {name: on_host(weight) for name, weight in self.ema.full().items()},
            "optimizer.safetensors": full_moments(self.denoiser, self.optimizer),
            "best.safetensors": {},
        }

    def save(self, folder, keep=2):
        save_state(folder, self.progress, self.tensors(), keep)

    def resume(self, saved):
        self.denoiser.load_state_dict(saved.tensors("denoiser.safetensors"))
        self.progress = saved.progress
        self.ema.load(saved.tensors("ema.safetensors"), self.progress.ema_updates)
        load_moments(self.denoiser, self.optimizer, saved.tensors("optimizer.safetensors"))

    def everything(self):
        return {f"{file}/{name}": tensor for file, of in self.tensors().items() for name, tensor in of.items()}


def run_of(n_steps, seed=0):
    run = Run(seed)
    for _ in range(n_steps):
        run.step()
    return run


def save_each(folder, n_steps, keep=2):
    run = Run(0)
    for _ in range(n_steps):
        run.step()
        run.save(folder, keep)
    return run


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("stop_at", [0, 3])
def test_a_loaded_state_goes_on_bit_identically(tmp_path, stop_at):
    straight, stopped, resumed = run_of(5), run_of(stop_at), Run(1)
    stopped.progress.window = {"loss": 0.1 + 0.2}
    stopped.save(tmp_path)
    resumed.resume(latest_state(tmp_path))
    assert resumed.progress == Progress(step=stop_at, ema_updates=stop_at, window={"loss": 0.1 + 0.2})
    assert_equal(resumed.everything(), stopped.everything())
    for _ in range(5 - stop_at):
        resumed.step()
    everything = straight.everything()
    assert len(everything) == 4 * len(straight.denoiser.state_dict()) + 1  # weights, averages, two moments, one step
    assert_equal(resumed.everything(), everything)


def test_each_parameter_counts_its_own_steps(tmp_path):
    """One counter for all would be counted up once for every parameter."""
    run_of(3).save(tmp_path)
    resumed = Run(1)
    resumed.resume(latest_state(tmp_path))
    resumed.step()
    counters = [state["step"] for state in resumed.optimizer.optimizer.state.values()]
    assert [float(counter) for counter in counters] == [4.0] * len(list(resumed.denoiser.parameters()))
    assert len({counter.data_ptr() for counter in counters}) == len(counters)


def test_all_of_progress_comes_back(tmp_path):
    run = run_of(1)
    run.progress = Progress(7, 123_456_789_012, 5, 0.1 + 0.2, 3, {"loss": 1 / 3, "steps": 2})
    run.save(tmp_path)
    assert latest_state(tmp_path).progress == run.progress
    assert open_state(tmp_path, 7) == latest_state(tmp_path)


def test_what_is_saved_does_not_follow_the_weights(tmp_path):
    run = run_of(2)
    run.save(tmp_path)
    before = run.everything()
    run.step()
    saved = latest_state(tmp_path)
    read = {f"{file}/{name}": t for file in TENSOR_FILES for name, t in saved.tensors(file).items()}
    assert_equal(read, before)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_the_newest_states_are_kept(tmp_path, keep):
    save_each(tmp_path, 5, keep)
    names = [f"step_{step:08d}" for step in range(5, 5 - keep, -1)]
    assert [folder.name for folder in saved_states(tmp_path)] == names
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)


def edited(change):
    def edit(path):
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "empty": lambda path: path.write_bytes(b""),
    "changed": flip_a_bit,
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"}"),
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}
DAMAGED_JSON = {
    "a list": lambda path: path.write_text("[]"),
    "null": lambda path: path.write_text("null"),
    "not text": lambda path: path.write_bytes(b"\xff\xfe"),
    "unknown progress": edited(lambda content: content["progress"].update(epochs=3)),
    "other progress": edited(lambda content: content["progress"].update(cells_seen=9)),
    "of another step": edited(lambda content: content["progress"].update(step=7)),
    "progress of a list": edited(lambda content: content.update(progress=[2, 9])),
    "no progress": edited(lambda content: content.pop("progress")),
    "no hashes": edited(lambda content: content.pop("sha256")),
    "a hash missing": edited(lambda content: content["sha256"].pop("ema.safetensors")),
    "hashes of a list": edited(lambda content: content.update(sha256=[])),
}


@pytest.mark.parametrize(
    ("name", "damage"),
    [(name, kind) for name in (*TENSOR_FILES, "state.json") for kind in DAMAGE]
    + [("state.json", kind) for kind in DAMAGED_JSON],
)
def test_a_damaged_newest_state_falls_back_to_the_one_before_and_says_so(tmp_path, capsys, name, damage):
    save_each(tmp_path, 2)
    {**DAMAGE, **DAMAGED_JSON}[damage](tmp_path / "step_00000002" / name)
    saved = latest_state(tmp_path)
    assert saved.progress.step == 1
    resumed = Run(1)
    resumed.resume(saved)
    assert_equal(resumed.everything(), run_of(1).everything())
    said = capsys.readouterr().err
    assert "step_00000002 is damaged" in said
    assert "step_00000001" not in said


def test_a_state_without_files_is_damaged_too(tmp_path, capsys):
    save_each(tmp_path, 1)
    (tmp_path / "step_00000002").mkdir()
    assert latest_state(tmp_path).progress.step == 1
    assert "step_00000002 is damaged" in capsys.readouterr().err


def test_where_all_states_are_damaged_there_is_none_and_each_is_named(tmp_path, capsys):
    save_each(tmp_path, 3, keep=3)
    for saved in saved_states(tmp_path):
        flip_a_bit(saved / "ema.safetensors")
    assert latest_state(tmp_path) is None
    said = capsys.readouterr().err
    assert all(f"step_0000000{step} is damaged (ema.safetensors" in said for step in (1, 2, 3))


@pytest.mark.parametrize("keep", [1, 2])
def test_a_state_that_was_passed_over_does_not_displace_what_is_saved_after_it(tmp_path, keep):
    save_each(tmp_path, 6, keep)
    for saved in saved_states(tmp_path):
        flip_a_bit(saved / "denoiser.safetensors")
    run_of(3).save(tmp_path, keep)  # from the start again, since nothing is whole
    run_of(4).save(tmp_path, keep)
    assert latest_state(tmp_path).progress.step == 4
    assert [saved.name for saved in saved_states(tmp_path)] == ["step_00000004", "step_00000003"][:keep]


def test_a_damaged_state_of_the_same_step_is_replaced(tmp_path):
    run = save_each(tmp_path, 2)
    flip_a_bit(tmp_path / "step_00000002" / "denoiser.safetensors")
    run.save(tmp_path)
    assert latest_state(tmp_path).progress.step == 2


KILLED = """
import os, signal, sys
from collections import UserDict
from pathlib import Path
import torch
from perturbdiff.training.state import Progress, TENSOR_FILES, save_state

class Killed(UserDict):
    def keys(self):
        os.kill(os.getpid(), signal.SIGKILL)

tensors = {name: {"a": torch.ones(3)} for name in TENSOR_FILES}
save_state(Path(sys.argv[1]), Progress(step=3), {**tensors, TENSOR_FILES[int(sys.argv[2])]: Killed()}, 2)
"""


@pytest.mark.parametrize("at", [0, 3])
def test_a_kill_during_a_save_is_never_read_and_swept_up_by_the_next(tmp_path, capsys, at):
    run = save_each(tmp_path, 2)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(at)], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert len(left) == 1
    assert len(list(left[0].iterdir())) == at
    assert latest_state(tmp_path).progress.step == 2
    assert capsys.readouterr().err == ""
    run.step()
    run.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000003"]


def test_a_save_that_lacked_only_its_name_is_not_read(tmp_path):
    save_each(tmp_path, 2)
    shutil.copytree(tmp_path / "step_00000002", tmp_path / ".state-3")
    shutil.rmtree(tmp_path / "step_00000002")
    assert latest_state(tmp_path).progress.step == 1


def test_a_failed_save_leaves_the_earlier_state_and_no_rubbish(tmp_path, monkeypatch):
    run = save_each(tmp_path, 1, keep=1)
    run.step()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dumps", full)  # the last file of a state
    with pytest.raises(OSError, match="No space"):
        run.save(tmp_path, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]


def test_a_disk_that_is_full_leaves_the_earlier_state_and_takes_the_next_when_there_is_room(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mounted, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        run = save_each(disk / "states", 1)
        before = latest_state(disk / "states")
        run.step()
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        for left in (0, 8192, 24576):  # bytes: for no folder, for the first files
            (disk / "filler").write_bytes(bytes(free - left))
            with pytest.raises(OSError, match="No space left"):
                run.save(disk / "states")
            assert [p.name for p in (disk / "states").iterdir()] == ["step_00000001"]
            assert latest_state(disk / "states") == before
            (disk / "filler").unlink()
        run.save(disk / "states")
        assert latest_state(disk / "states").progress.step == 2
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


LIMITED = """
import resource, signal, sys
from pathlib import Path
import torch
from perturbdiff.training.state import Progress, TENSOR_FILES, latest_state, save_state

folder, tensors = Path(sys.argv[1]), {name: {"a": torch.zeros(100_000)} for name in TENSOR_FILES}
save_state(folder, Progress(step=1), tensors, 2)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit is an error then
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    save_state(folder, Progress(step=2), tensors, 2)
except OSError as error:
    print(error)
print(latest_state(folder).progress.step, *(path.name for path in folder.iterdir()))
"""


def test_a_file_that_may_not_grow_leaves_the_earlier_state(tmp_path):
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said, left = done.stdout.splitlines()
    assert "the state of step 2 could not be written" in said
    assert "File too large" in said
    assert left == "1 step_00000001"


@pytest.mark.parametrize("where", ["save_file", "Path.mkdir", "tempfile.mkdtemp"])
def test_a_failure_from_the_first_file_operation_on_leaves_nothing(tmp_path, monkeypatch, where):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"perturbdiff.training.state.{where}", full)
    with pytest.raises(OSError, match="No space left"):
        run_of(1).save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_state_is_saved_though_an_old_one_cannot_be_removed_which_then_goes_at_the_next_save(tmp_path, monkeypatch):
    run = save_each(tmp_path, 2, keep=1)

    def half(path):  # NFS keeps what somebody has open under a name of its own
        (path / "folder" / "state.json").unlink()
        raise OSError(39, "Directory not empty")

    run.step()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", half)
        with pytest.warns(UserWarning, match="no longer needed but could not be removed"):
            run.save(tmp_path, keep=1)
    assert [state.name for state in saved_states(tmp_path)] == ["step_00000003"]
    assert len(list(tmp_path.iterdir())) == 2
    run.step()
    run.save(tmp_path, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000004"]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="nothing says what is mapped")
def test_what_is_loaded_of_a_state_is_not_mapped(tmp_path):
    save_each(tmp_path, 1)
    loaded = latest_state(tmp_path).tensors("denoiser.safetensors")
    assert loaded
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_nothing_saved_is_nothing_loaded(tmp_path):
    assert latest_state(tmp_path / "states") is None
    assert saved_states(tmp_path / "states") == []
