"""Signals stop a run of several processes in one step; the same command goes on, under other engines and sizes too."""

import os
import shutil
import signal

import pytest

from perturbdiff import PerturbDiff
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
# torchrun passes on SIGUSR1 only where it is told to.
HANDLED = {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"}


# How a run is told to stop, what it says of that, and the exit status of its launcher.
HOW = {
    "launcher": ("SIGTERM", lambda run, held: run.launcher.terminate(), 1),
    "warned": ("SIGUSR1", lambda run, held: run.launcher.send_signal(signal.SIGUSR1), 1),
    "terminal": ("SIGINT", lambda run, held: os.killpg(run.launcher.pid, signal.SIGINT), 1),  # as Ctrl-C does
    "one": ("SIGUSR1", lambda run, held: os.kill(held.pid(1), signal.SIGUSR1), 0),
}


def stopped(engine, recipe, out, folder, step, how, meanwhile=lambda: True):
    """A run that a signal stops after a step."""
    name, send, code = HOW[how]
    held = Held(folder, step)
    with Launch(engine, recipe, out, fault=held.fault, **HANDLED) as run:
        held.wait(run)
        run.until(meanwhile)
        send(run, held)
        if how == "one":
            run.until(lambda: (folder / "stopping1").exists())
            held.go()
        assert run.ends() == code
        output = run.output()
    assert errors(output) == []
    assert f"stopped     by {name} after step {step}; the same command goes on from there\n" in output
    assert marker(out) == {"stopped_by": name, "step": step}
    assert steps(out)[-1] == step


@pytest.mark.parametrize(
    ("engine", "how"), [("ddp", "launcher"), ("zero1", "warned"), ("zero2", "terminal"), ("zero3", "launcher")]
)
def test_a_signal_stops_all_in_one_step_and_the_same_command_goes_on_bit_identically(
    recipe, one, undisturbed, tmp_path, engine, how
):
    out = tmp_path / "run"

    def look():
        # Step 4 is saved beside the training, and the run goes on.
        return steps(out) == [4] and PerturbDiff.from_pretrained(out / "model").training.steps == 4

    stopped(engine, recipe, out, tmp_path / "held", 6, how, look)
    shutil.copytree(out, tmp_path / "on_one")
    output = finished(engine, recipe, out)
    assert f"resuming    from step 6 in {out}\n" in output
    assert marker(out) is None
    assert_same(out, undisturbed(engine))
    # From two processes to one.
    alone(recipe, tmp_path / "on_one")
    assert_close(tmp_path / "on_one", one)


def test_a_run_goes_on_on_more_processes_and_under_other_engines(recipe, one, tmp_path):
    out = tmp_path / "run"
    alone(recipe, out, stop_at=2)
    stopped("zero3", recipe, out, tmp_path / "first", 4, "one")
    stopped("ddp", recipe, out, tmp_path / "second", 7, "launcher")
    finished("zero1", recipe, out)
    assert_close(out, one)
