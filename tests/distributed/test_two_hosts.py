"""Two hosts, as network namespaces: the numbers of one host, and a cable that is cut."""

import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.distributed.launches import Held, Launch, assert_same, errors, launch_file, steps
from tests.screens import ROOT

SCRIPT = ROOT / "scripts" / "two_hosts.sh"


def can_make_hosts():
    if os.getuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    return made and subprocess.run(["ip", "netns", "delete", name], capture_output=True).returncode == 0


needs_hosts = pytest.mark.skipif(not can_make_hosts(), reason="network namespaces (ip netns) are for root only")


@contextmanager
def two_hosts(engine, recipe, out, *words, fault=None):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    program = "perturbdiff" if fault is None else "tests.distributed.faulty"
    command = ["bash", SCRIPT, launch_file(engine)]
    with Launch(engine, recipe, out, *words, fault=fault, command=command, PATH=path, PROGRAM=program) as run:
        try:
            yield run
        finally:
            run.launcher.terminate()
            for host in names(run):  # left where the script was killed
                subprocess.run(["ip", "netns", "delete", host], capture_output=True)


def names(run):
    return [f"perturbdiff-{run.launcher.pid}-{rank}" for rank in (0, 1)]


def there(run):
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [host for host in names(run) if host in listed]


def test_it_says_how_it_is_used():
    done = subprocess.run(["bash", SCRIPT], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: bash scripts/two_hosts.sh LAUNCH_FILE RECIPE")


@needs_hosts
@pytest.mark.slow
def test_two_hosts_train_as_one_host_does(recipe, undisturbed, tmp_path):
    with two_hosts("ddp", recipe, tmp_path / "run") as run:
        assert run.ends() == 0, run.output()
        assert there(run) == []
    assert_same(tmp_path / "run", undisturbed("ddp"))


@needs_hosts
@pytest.mark.slow
def test_both_hosts_end_when_the_cable_is_cut_and_the_same_command_goes_on_bit_identically(
    recipe, undisturbed, tmp_path
):
    out = tmp_path / "run"
    held = Held(tmp_path / "held", 7)
    with two_hosts("zero2", recipe, out, "training.timeout=30", fault=held.fault) as run:
        held.wait(run)
        assert there(run) == names(run)
        subprocess.run(["ip", "-n", names(run)[0], "link", "set", "eth0", "down"], check=True)
        held.go()
        assert run.ends() == 1
    assert len(errors(run.output())) == 2
    assert steps(out) == [4]
    with two_hosts("zero2", recipe, out) as run:
        assert run.ends() == 0, run.output()
    assert f"resuming    from step 4 in {out}\n" in run.output()
    assert_same(out, undisturbed("zero2"))
