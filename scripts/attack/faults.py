"""Kills the program at its file operations, gives the same command again, and compares with an undisturbed run.

    python scripts/attack/faults.py                                    every operation of every scene, both ways
    python scripts/attack/faults.py --only predict --how kill --every 5

A scene is a command as users type it, on a simulated screen. Each fault is a process of its own: at the n-th file
operation in its folder (open to write, rename, remove, make or remove a folder, flush) it is killed with SIGKILL, or
the operation fails with an input/output error, which must end in one line or a warning, never in a traceback. Then the
command is given again without a fault; it must succeed, and all files must have the bytes of the undisturbed run.
Where it only says that its output exists, that must be so.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: processes are forked

TRAINING = (
    "data.set_size=8", "data.sets_per_batch=4", "denoiser.width=16", "denoiser.depth=1", "denoiser.n_heads=2",
    "sampling.n_steps=2", "training.device=cpu", "training.n_steps=4", "training.log_every=1",
    "training.validate_every=2", "training.save_every=2", "training.save_minutes=0", "training.keep_states=1",
    "training.trackers=[]",
)  # fmt: skip
PREDICTION = (
    "predict",
    "{inputs}/model",
    "--controls",
    "{inputs}/screen.h5ad",
    "--steps",
    "2",
    "--summary",
    "genes.csv",
)
SCENES = {
    "train": ("train", "--screen", "{inputs}/screen.h5ad", "--out", "run", "--recipe", "{inputs}/recipe.yaml"),
    "finetune": (
        "finetune", "--screen", "{inputs}/screen.h5ad", "--init-from", "{inputs}/model", "--out", "run", "--recipe",
        "{inputs}/recipe.yaml", "--no-score",
    ),
    "lora": (
        "finetune", "--screen", "{inputs}/screen.h5ad", "--init-from", "{inputs}/model", "--out", "run", "--recipe",
        "{inputs}/recipe.yaml", "--no-score", "adapt.method=lora",
    ),
    "predict": (*PREDICTION, "--perturbation", "pert_1", "--out", "cells.h5ad"),
    "requests": (*PREDICTION, "--requests", "{inputs}/requests.csv", "--out", "cells.parquet"),
    "atlas": ("atlas", "build", "{inputs}/screen.h5ad", "--out", "atlas", "--workers", "1"),
}  # fmt: skip
WAYS = ("kill", "error")
SPEED = ("cells_per_s", "data_wait")  # of metrics.jsonl: they depend on the clock


class Ended(NamedTuple):
    """status: the exit status, negative of the signal that killed it. operations: those that were counted."""

    status: int
    said: str
    operations: list[str]


def run(words: tuple[str, ...], folder: Path, fault: tuple[int, str] | None = None) -> Ended:
    """`perturbdiff WORDS` in a folder, as a process of its own; `fault` is the number of an operation and what then."""
    with tempfile.NamedTemporaryFile("r", suffix=".said") as said, tempfile.NamedTemporaryFile("r") as counted:
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            _be_the_program(words, folder, fault, said.name, counted.name)
        _, status = os.waitpid(pid, 0)
        return Ended(os.waitstatus_to_exitcode(status), said.read(), counted.read().splitlines())


def _be_the_program(
    words: tuple[str, ...], folder: Path, fault: tuple[int, str] | None, said: str, counted: str
) -> None:
    code = 1
    try:
        os.chdir(folder)
        printed = os.open(said, os.O_WRONLY | os.O_APPEND)
        for descriptor in (1, 2):
            os.dup2(printed, descriptor)
        from perturbdiff.cli.main import main

        _count_operations(str(folder), os.open(counted, os.O_WRONLY | os.O_APPEND), fault)
        main(words)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _count_operations(folder: str, log: int, fault: tuple[int, str] | None) -> None:
    n = 0

    def happens(what: str, *paths: Any) -> None:
        nonlocal n
        n += 1
        names = " ".join(os.path.relpath(os.path.join(folder, os.fspath(path)), folder) for path in paths)
        os.write(log, f"{what} {names}\n".encode())
        if fault is not None and n == fault[0]:
            if fault[1] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.EIO, os.strerror(errno.EIO), names)

    def inside(path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and os.path.abspath(path).startswith(folder + os.sep)

    def hook(event: str, given: tuple[Any, ...]) -> None:
        if event == "open" and inside(given[0]) and given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            happens("open", given[0])
        elif event == "os.rename" and inside(given[1]):
            happens("rename", given[0], given[1])
        elif event in ("os.mkdir", "os.remove", "os.rmdir") and (inside(given[0]) or given[-1] != -1):
            happens(event.removeprefix("os."), given[0])

    sys.addaudithook(hook)
    flush: Callable[[int], None] = os.fsync

    def fsync(descriptor: int) -> None:
        happens("flush")
        flush(descriptor)

    os.fsync = fsync


def contents(folder: Path) -> dict[str, Any]:
    """What every file under a folder holds, by name, but for the clock's values, hidden files, locks, older states.

    Of a process that was killed those may be left, and nobody reads them.
    """
    found: dict[str, Any] = {}
    older = set(sorted(folder.glob("run/states/step_*"))[:-1])
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name, content = str(path.relative_to(folder)), path.read_bytes()
        if any(part.startswith(".") for part in path.relative_to(folder).parts) or path.name.endswith("lock"):
            continue
        if path.parent in older:
            continue
        if path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in content.splitlines()]
            found[name] = [{key: value for key, value in line.items() if key not in SPEED} for line in lines]
        else:
            found[name] = content
    return found


def judge(undisturbed: dict[str, Any], words: tuple[str, ...], folder: Path, fault: tuple[int, str]) -> str | None:
    """What is wrong after a fault and the same command again; None where nothing is."""
    first = run(words, folder, fault)
    if "Traceback" in first.said:
        return f"a traceback: {first.said[-1500:]}"
    again = run(words, folder)
    kept = again.status == 2 and " exists; " in again.said
    if again.status != 0 and not kept:
        return f"the same command ended with {again.status}: {again.said[-1500:]}"
    now = contents(folder)
    wrong = sorted(name for name in undisturbed.keys() | now.keys() if undisturbed.get(name) != now.get(name))
    return f"other contents of {', '.join(wrong)}" if wrong else None


def prepare(inputs: Path) -> None:
    """A screen, settings, a model and requests."""
    from perturbdiff.data.simulate import SimulationConfig, simulate

    inputs.mkdir()
    small = SimulationConfig(
        n_genes=30, n_cell_types=2, n_batches=2, n_perturbations=3, cells_per_condition=12,
        control_cells_per_context=20, n_effect_genes=8,
    )  # fmt: skip
    simulate(small, inputs / "screen.h5ad")
    (inputs / "recipe.yaml").write_text("split: {hold_out: ['pert_0:type_0'], validation: ['pert_1:type_1']}\n")
    (inputs / "requests.csv").write_text("perturbation,cell_type,n_cells\npert_1,type_0,9\npert_2,,5\n")
    made = run(_words("train", inputs), inputs)
    if made.status:
        sys.exit(f"faults: there is no model to begin with: {made.said}")
    (inputs / "run" / "model").rename(inputs / "model")
    shutil.rmtree(inputs / "run")


def _words(scene: str, inputs: Path) -> tuple[str, ...]:
    words = tuple(word.format(inputs=inputs) for word in SCENES[scene])
    return (*words, *TRAINING) if words[0] in ("train", "finetune") else words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SCENES, default=list(SCENES), help="(default: all)")
    parser.add_argument(
        "--how", nargs="+", choices=("kill", "error"), default=["kill", "error"], help="(default: both)"
    )
    parser.add_argument("--every", type=int, default=1, metavar="N", help="of N operations, one (default: %(default)s)")
    parser.add_argument("--first", type=int, default=1, metavar="N", help="operation to begin with (default: 1)")
    options = parser.parse_args()
    # What takes long to import, once; nothing is computed here, so that the processes can be forked.
    for module in ("torch._dynamo", "perturbdiff.atlas.build.run", "perturbdiff.training.run"):
        importlib.import_module(module)

    n_faults, failures = 0, []
    with tempfile.TemporaryDirectory() as base:
        inputs = Path(base).resolve() / "inputs"
        prepare(inputs)
        for scene in options.only:
            words = _words(scene, inputs)
            folders = [inputs.with_name(f"{scene}{i}") for i in (1, 2)]
            for folder in folders:
                folder.mkdir()
                done = run(words, folder)
                if done.status:
                    sys.exit(f"faults: {scene} fails undisturbed: {done.said}")
            undisturbed = contents(folders[0])
            if undisturbed != contents(folders[1]):
                sys.exit(f"faults: two undisturbed runs of {scene} differ; nothing can be compared.")
            numbers = range(options.first, len(done.operations) + 1, options.every)
            for how in options.how:
                for number in numbers:
                    folder = inputs.with_name("fault")
                    folder.mkdir()
                    n_faults += 1
                    if (wrong := judge(undisturbed, words, folder, (number, how))) is not None:
                        failures.append(f"{scene}, {how} at {number} ({done.operations[number - 1]}): {wrong}")
                        print(failures[-1], flush=True)
                    shutil.rmtree(folder)
            print(f"{scene}: {len(done.operations)} operations, {len(numbers) * len(options.how)} faults", flush=True)
    print(f"{n_faults} faults, {len(failures)} did harm")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
