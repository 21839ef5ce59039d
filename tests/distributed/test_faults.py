"""Faults of real processes: each ends with a line that says what happened, nobody is left, and the run goes on."""

import os
import shutil
import signal
import subprocess
from contextlib import contextmanager

import pytest

from perturbdiff import PerturbDiff
from perturbdiff.training.state import latest_state
from tests.distributed.launches import (
    Held,
    Launch,
    alone,
    assert_close,
    assert_same,
    errors,
    finished,
    marker,
    steps,
)

pytestmark = pytest.mark.slow


def test_kills_and_a_damaged_state_cost_only_the_steps_since_the_last_save(recipe, undisturbed, tmp_path):
    out = tmp_path / "run"
    held = Held(tmp_path / "held", 7)
    with Launch("ddp", recipe, out, fault=held.fault) as run:  # kill -9 of a process
        held.wait(run)
        os.kill(held.pid(1), signal.SIGKILL)
        assert run.ends() == 1
    [error] = errors(run.output())
    assert "(rank 0): another process has ended; its message, or the launcher's, says why." in error
    assert "The last saved step is 4; the same command goes on from there." in error
    assert steps(out) == [4]

    kill = {"name": "killed_in_save", "file": "optimizer.safetensors"}
    with Launch("ddp", recipe, out, fault=kill) as run:  # and of the one that writes, while it does
        assert run.ends() == 1
    assert f"resuming    from step 4 in {out}\n" in run.output()
    assert all("The last saved step is 4; " in error for error in errors(run.output()))
    assert steps(out) == [4]
    assert list((out / "states").glob(".state-*"))
    assert PerturbDiff.from_pretrained(out / "model").training.steps == 8

    held = Held(tmp_path / "again", 10)
    with Launch("ddp", recipe, out, fault=held.fault) as run:
        held.wait(run)
        run.until(lambda: steps(out) == [4, 8])
        os.kill(held.pid(0), signal.SIGKILL)
        assert run.ends() == 1
    assert steps(out) == [4, 8]
    newest = out / "states" / "step_00000008" / "ema.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    output = finished("ddp", recipe, out)
    said = "state step_00000008 is damaged (ema.safetensors changed); trying the one before."
    assert output.count(said) == 1
    assert f"resuming    from step 4 in {out}\n" in output
    assert_same(out, undisturbed("ddp"))


@contextmanager
def small_disk(folder, size):
    """A file system of `size` kB."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", folder]
    if os.getuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system can be mounted by root only")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def size_of(folder):
    return sum(path.stat().st_blocks // 2 for path in folder.rglob("*"))


def test_a_full_disk_ends_all_and_leaves_the_state_before(recipe, one, undisturbed, tmp_path):
    room = size_of(undisturbed("ddp") / "model") * 2 + 1.5 * size_of(undisturbed("ddp") / "states" / "step_00000012")
    with small_disk(tmp_path / "disk", int(room)) as disk:
        out = disk / "run"
        with Launch("ddp", recipe, out, log=tmp_path / "log") as run:
            assert run.ends() == 1
        says, follows = errors(run.output())
        assert says.startswith("perturbdiff: error (rank 0): step 8 could not be saved (")
        assert says.endswith("step 4 still is. Make room, and the same command goes on from there.")
        assert "No space left on device" in says
        assert follows == "perturbdiff: error (rank 1): step 8 could not be saved by rank 0, which says why."
        assert latest_state(out / "states").progress.step == 4
        assert PerturbDiff.from_pretrained(out / "model").training.steps in (4, 8)
        shutil.copytree(out, tmp_path / "elsewhere")
    alone(recipe, tmp_path / "elsewhere")
    assert_close(tmp_path / "elsewhere", one)


def test_nan_in_one_process_stops_all_with_step_and_rank_and_keeps_the_state(recipe, tmp_path):
    poison = {"name": "poisoned", "step": 6, "rank": 1}
    with Launch("zero3", recipe, tmp_path / "run", fault=poison) as run:
        assert run.ends() == 1
    of_0, of_1 = errors(run.output())
    assert of_0.startswith("perturbdiff: error (rank 0): the loss is not finite at step 6 (rank 1) ")
    assert " at step 6 (rank 1) for perturbation " in of_1
    assert steps(tmp_path / "run") == [4]


def test_a_process_that_stands_still_is_named_and_all_end(recipe, tmp_path):
    held = Held(tmp_path / "held", 7)
    with Launch("ddp", recipe, tmp_path / "run", "training.timeout=30", fault=held.fault) as run:
        held.wait(run)
        os.kill(held.pid(1), signal.SIGSTOP)
        held.go()
        assert run.ends() == 1
    [error] = errors(run.output())
    assert "no progress for 30 s (training.timeout): rank 1 (" in error
    assert "has fallen silent" in error
    assert error.endswith("The last saved step is 4; the same command goes on from there.")
    assert steps(tmp_path / "run") == [4]


def test_a_process_that_waits_for_its_data_is_named_with_that(recipe, tmp_path):
    stuck = {"name": "without_data", "step": 6, "rank": 1}
    with Launch("zero2", recipe, tmp_path / "run", "training.timeout=30", fault=stuck) as run:
        assert run.ends() == 1
    [error] = errors(run.output())
    assert "rank 1 (" in error
    assert "is waiting for the data of step 6" in error
    assert "rank 0 (" not in error


def test_a_warning_that_comes_while_data_are_read_ends_all_in_order(recipe, tmp_path):
    fault = {"name": "reading", "folder": str(tmp_path)}
    with Launch("ddp", recipe, tmp_path / "run", fault=fault, PET_SIGNALS_TO_HANDLE="SIGTERM,SIGUSR1") as run:
        run.until(lambda: all((tmp_path / f"reading{rank}").exists() for rank in range(2)))
        run.launcher.send_signal(signal.SIGUSR1)
        run.ends()
        assert errors(run.output()) == []
        assert run.output().count("stopped     by SIGUSR1 outside of training; the same command goes on\n") == 1
    assert marker(tmp_path / "run") == {"stopped_by": "SIGUSR1", "step": 0}


def test_data_that_one_process_cannot_read_end_all_with_the_steps_that_were_taken_saved(recipe, undisturbed, tmp_path):
    out = tmp_path / "run"
    with Launch("ddp", recipe, out, fault={"name": "broken_data", "step": 7, "rank": 1}) as run:
        assert run.ends() == 1
    of_0, of_1 = errors(run.output())
    assert of_0.endswith(
        "(rank 0): another process could not read its data, and says why. The last saved step is 6; the same command "
        "goes on from there."
    )
    assert of_1 == "perturbdiff: error (rank 1): shard 3 cannot be read"
    assert steps(out) == [4, 6]
    finished("ddp", recipe, out)
    assert_same(out, undisturbed("ddp"))


def test_a_launcher_that_starts_one_process_where_two_were_meant_is_refused(recipe, tmp_path):
    with Launch(None, recipe, tmp_path / "run", options=["--cpu", "--num_processes=2"]) as run:
        assert run.ends() != 0
    [error] = errors(run.output())
    assert "meant several processes" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("missing", "says"),
    [("deepspeed", "DeepSpeed is not installed"), ("transformers", "pip install 'perturbdiff[deepspeed]'")],
)
def test_zero_without_its_packages_is_refused_with_what_to_install(recipe, tmp_path, missing, says):
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{missing!r}] = None\n")
    with Launch("zero2", recipe, tmp_path / "run", PYTHONPATH=str(tmp_path)) as run:
        assert run.ends() != 0
    assert says in run.output()
    assert not (tmp_path / "run").exists()
