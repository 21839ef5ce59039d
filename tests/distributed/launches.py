"""Training runs under a launcher: a recipe of two small atlases, real processes, and what they leave behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file

from perturbdiff.config import load_config
from perturbdiff.training.loop import fit
from tests.atlases import write_atlas
from tests.processes import PATIENCE, alive_with
from tests.screens import ROOT

ENGINES = ("ddp", "zero1", "zero2", "zero3")
NAMES = {"ddp": "DDP", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
LAST = 12  # the last step
RECIPE = """
data:
  n_hvg: null
  set_size: 8
  sets_per_batch: 6
  atlases:
  - {path: ATLASES/marginal, sets: marginal, weight: 1}
  - {path: ATLASES/perturbed, weight: 2}
split: {hold_out: ["A:NK"], validation: ["B:NK"]}
denoiser: {width: 16, depth: 2, n_heads: 2}
diffusion: {p_drop_label: 0.2}
sampling: {n_steps: 3}
optim: {lr: 2.0e-3, warmup_steps: 2}
training:
  {device: cpu, n_steps: 12, log_every: 1, validate_every: 6, save_every: 4, save_minutes: 0, timeout: 500,
   trackers: [], keep_last_state: true}
"""


def write_recipe(folder: Path) -> Path:
    """Unperturbed cells and a screen, 6 sets of 8 cells a step, in `folder`."""
    sizes = {"control": 24, "A": 30, "B": 13}
    perturbed = [(p, c, b, n) for p, n in sizes.items() for c in ("NK", "T") for b in ("b1", "b2")]
    write_atlas(folder / "perturbed", perturbed, rows_per_shard=40, seed=1)
    unperturbed = [("control", c, b, 17) for c in ("NK", "T", "B") for b in ("m1", "m2")]
    write_atlas(folder / "marginal", unperturbed, rows_per_shard=40, seed=2)
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.replace("ATLASES", str(folder)))
    return recipe


class Launch:
    """`accelerate launch` of a training run; its processes are known by a word in their environment."""

    def __init__(self, engine, recipe, out, *words, fault=None, n=2, log=None, options=(), command=None, **environment):
        self.token = uuid.uuid4().hex
        self.log = Path(log or f"{out}.{self.token[:6]}.log")
        module = "perturbdiff" if fault is None else "tests.distributed.faulty"
        launcher = [sys.executable, "-m", "accelerate.commands.launch", *options]
        if engine is not None:
            launcher += [f"--config_file={launch_file(engine)}", f"--num_processes={n}"]
        command = command or [*launcher, "-m", module, "pretrain"]
        inherited = {name: value for name, value in os.environ.items() if name not in ("FAULT", "RANK", "WORLD_SIZE")}
        with self.log.open("w") as printed:
            self.launcher = subprocess.Popen(
                [*map(str, command), str(recipe), "--out", str(out), *words],
                cwd=ROOT,
                env={
                    **inherited,
                    "HF_DATASETS_CACHE": str(Path(recipe).parent / "cache"),
                    "OMP_NUM_THREADS": "1",
                    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(PATIENCE // 2),
                    "LAUNCH": self.token,
                    **({} if fault is None else {"FAULT": json.dumps(fault)}),
                    **environment,
                },
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.launcher.wait()

    def output(self):
        return self.log.read_text()

    def processes(self):
        """Those that live, the launcher among them."""
        return alive_with(f"LAUNCH={self.token}")

    def until(self, happened):
        """Wait for something to become true while the run goes on."""
        deadline = time.monotonic() + PATIENCE
        while not happened():
            assert self.launcher.poll() is None, self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.02)

    def ends(self):
        """The exit status, and that nobody is left behind."""
        try:
            code = self.launcher.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.output()) from None
        assert self.processes() == []
        return code


def launch_file(engine):
    return ROOT / "recipes" / "accelerate" / f"cpu_{engine}.yaml"


def alone(recipe, out, *words, stop_at=None):
    """The run of one process, this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(recipe).parent / "cache")
        return fit(load_config(recipe, words, {"out": str(out)}), stop_at=stop_at)


def finished(engine, recipe, out, *words, **more):
    """A run that goes through; what it printed."""
    with Launch(engine, recipe, out, *words, **more) as run:
        assert run.ends() == 0, run.output()
        return run.output()


class Held:
    """A fault that makes all processes wait before a step, and their pids."""

    def __init__(self, folder, step):
        folder.mkdir()
        self.folder, self.fault = folder, {"name": "hold", "folder": str(folder), "step": step}

    def wait(self, run, n=2):
        run.until(lambda: all((self.folder / f"pid{rank}").exists() for rank in range(n)))

    def pid(self, rank):
        return int((self.folder / f"pid{rank}").read_text())

    def go(self):
        (self.folder / "go").touch()


def lines(out):
    """What was logged, without what depends on the clock."""
    logged = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("cells_per_s", "data_wait")} for line in logged]


def steps(out):
    """Those of the states."""
    return sorted(int(path.name.removeprefix("step_")) for path in (Path(out) / "states").glob("step_*"))


def weights(out):
    return load_file(Path(out) / "model" / "model.safetensors")


def marker(out):
    path = Path(out) / "stopped.json"
    return json.loads(path.read_text()) if path.exists() else None


def assert_same(run, undisturbed):
    """Every logged number and every bit of the model."""
    assert lines(run) == lines(undisturbed)
    ours, theirs = weights(run), weights(undisturbed)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def assert_close(run, other, rtol=1e-4, scores_rtol=1e-3, rms=1e-4):
    """Logged numbers to rtol, scores of generated cells and norms of gradients to scores_rtol; root mean square
    difference of each weight. A gradient jumps where an output is 0 but for rounding.

    Weights of twelve steps differ by up to 0.02 from where they started. Not each number of them is compared: where a
    gradient is nothing but rounding, AdamW takes whole steps along it.
    """
    ours, theirs = lines(run), lines(other)
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for our, their in zip(ours, theirs, strict=True):
        for name, value in their.items():
            tolerance = scores_rtol if name.startswith("validation_") or name == "grad_norm" else rtol
            assert abs(our[name] - value) <= tolerance * abs(value), (name, our, their)
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - theirs[name]).square().mean().sqrt() for name in theirs) < rms


def errors(output):
    """What the program says of why it ends, sorted by rank; never a traceback of its own."""
    assert f'File "{ROOT / "perturbdiff"}' not in output
    return sorted(
        line[line.index("perturbdiff: error") :] for line in output.splitlines() if "perturbdiff: error" in line
    )
