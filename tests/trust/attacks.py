"""What strangers do to a model folder, and a reader of folders with little memory and time."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from perturbdiff.hub.model_folder import (
    CONFIG,
    MEANS,
    MEANS_TENSORS,
    NOISE_TENSORS,
    OVERDISPERSION,
    WEIGHTS,
    config_hash,
)

MEMORY = 600 << 20  # bytes beyond those of a process that has imported the library
SECONDS = 20  # of CPU for one folder
TERABYTE = 1 << 40
NAME = "lab/model"
ESCAPES = "\x1b[2J\x1b]0;owned\x07\r\u202e"  # clears a terminal, renames it, writes over a line, turns text round
EVALUATION = {
    "format_version": 1, "library_version": "0.1.0", "model": "PerturbDiff", "ceiling": "ceiling", "data": "s.h5ad",
    "split": None, "n_conditions": 3, "metrics": {"pearson_delta": "higher"},
    "mean": {"PerturbDiff": {"pearson_delta": 0.9}}, "n_undefined": {"PerturbDiff": {"pearson_delta": 0}},
}  # fmt: skip

# Each request is answered by a fork, with limits, that also says which files were opened and modules imported.
READER = r"""
import contextlib, io, json, os, resource, signal, sys, traceback
from perturbdiff.cli.main import main
from perturbdiff.hub.download import find_model
from perturbdiff.features.fingerprints import morgan_table
from perturbdiff.features.tables import read_table
from perturbdiff.model import PerturbDiff
import importlib.util
import perturbdiff.hub.info
from huggingface_hub import HfApi, snapshot_download

PerturbDiff.from_pretrained(sys.argv[1], device="cpu")  # what is imported late is imported now
if importlib.util.find_spec("rdkit"):
    from rdkit import Chem, rdBase
    from rdkit.Chem import rdFingerprintGenerator

def table_of(path):
    try:
        table = (morgan_table if "drugs" in path else read_table)(path)
        return {"names": list(table.names), "shape": list(table.values.shape)}
    except ValueError as error:
        return {"mild": True, "text": str(error)}

def answer(request):
    said, noted = {"type": "done"}, []
    watched = request.get("watched") or "\0"
    sys.addaudithook(lambda event, arguments: noted.append(f"{event} {arguments[0]}")
                     if event in ("open", "exec", "os.system", "subprocess.Popen", "import")
                     and watched in str(arguments[0]) else None)
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    limit = pages * resource.getpagesize() + request["memory"]
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (request["seconds"], request["seconds"]))
    signal.alarm(600)  # of the clock: a guard against hanging
    if "registry" in request:
        os.environ["PERTURBDIFF_REGISTRY"] = request["registry"]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            if "command" in request:
                main(request["command"])
            elif "tables" in request:
                said["tables"] = [table_of(path) for path in request["tables"]]
            else:
                model = PerturbDiff.from_pretrained(**request["load"], device="cpu")
                said["sum"] = sum(float(t.double().abs().sum()) for t in model.denoiser.state_dict().values())
    except SystemExit as end:
        said["type"] = f"exit {end.code}"
    except BaseException as error:
        said |= {"type": type(error).__name__, "text": str(error), "trace": traceback.format_exc()[-3000:]}
        said["mild"] = isinstance(error, (ValueError, OSError))
    said["taken"] = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    return {**said, "out": out.getvalue(), "err": err.getvalue(), "noted": noted}

for line in sys.stdin:
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.close(reading)
        with os.fdopen(writing, "w") as pipe:
            pipe.write(json.dumps(answer(json.loads(line))))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(said if status == 0 else json.dumps({"type": f"status {status}", "text": ""}), flush=True)
"""


class Reader:
    """Loads models in processes with little memory and time."""

    def __init__(self, endpoint: str, home: Path, model: Path) -> None:
        own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1,localhost"}
        own |= {
            "OMP_NUM_THREADS": "1",
            "MALLOC_ARENA_MAX": "2",
            "ARROW_DEFAULT_MEMORY_POOL": "system",
        }  # less address space for threads
        own |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        inherited = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
        command = [sys.executable, "-W", "error", "-c", READER, str(model)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, env=inherited | own, text=True, **pipes)  # type: ignore[call-overload]

    def ask(self, **request: Any) -> dict[str, Any]:
        self.process.stdin.write(json.dumps({"memory": MEMORY, "seconds": SECONDS, **request}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def load(self, model: Path | str, **how: Any) -> dict[str, Any]:
        return self.ask(load={"path_or_repo_id": str(model), **how}, watched=str(model))

    def read_tables(self, *paths: Path, watched: str = "", most: int = MEMORY) -> list[dict[str, Any]]:
        """What comes of each file of features; none of them runs what is watched or takes more memory."""
        said = self.ask(tables=[str(path) for path in paths], watched=watched)
        assert (said["type"], said["noted"]) == ("done", []), said
        assert said["taken"] < most
        return [answer | {"taken": said["taken"]} for answer in said["tables"]]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def forge(folder: Path, change: Callable[[dict[str, Any]], Any] | None = None) -> None:
    """Make config.json agree with the files that it names, as a careful forger would."""
    config = json.loads((folder / CONFIG).read_text())
    for name in config["sha256"]:
        if name != CONFIG and (folder / name).is_file() and (folder / name).stat().st_size < 1 << 30:
            config["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    if change is not None:
        change(config)
    config["sha256"][CONFIG] = config_hash(config)
    (folder / CONFIG).write_text(json.dumps(config))


def put(name: str, content: bytes | str) -> Callable[[Path], None]:
    """The attack that replaces a file, hashes made to agree."""

    def attack(folder: Path) -> None:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        if name != CONFIG:
            forge(folder)

    return attack


def change_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: forge(folder, change)


def assert_refused(said: dict[str, Any], match: str = "") -> None:
    """One line that does nothing to a terminal, of a type that the command line catches."""
    assert said.get("mild"), said
    assert 10 < len(said["text"]) < 2000
    assert said["text"].isprintable(), said["text"][:300]
    assert match in said["text"], said["text"][:600]
    assert said["taken"] < MEMORY


def giant(key: str, value: Any, **also: Any) -> Callable[[Path], None]:
    part, _, name = key.partition(".")

    def change(config: dict[str, Any]) -> None:
        config[part] = value if not name else {**config[part], name: value, **also}

    return change_config(change)


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def load_bytes(content: bytes) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    return load(content)


def stating(*names: str, digest: Any = "0" * 64) -> Callable[[Path], None]:
    return change_config(lambda config: config["sha256"].update(dict.fromkeys(names, digest)))


def as_format_3(folder: Path) -> None:
    """The folder as version 3 wrote it, but for training.json."""
    perturbations = json.loads((folder / "perturbations.json").read_text())
    perturbations["n_described"] = perturbations.pop("n_by_features")
    del perturbations["control_labels"], perturbations["doses"], perturbations["dose_unit"]
    (folder / "perturbations.json").write_text(json.dumps(perturbations))
    genes = json.loads((folder / "genes.json").read_text())
    del genes["symbols"]
    (folder / "genes.json").write_text(json.dumps(genes))

    weights = load_file(folder / WEIGHTS)
    save_file(
        {name: weights[name] for name in weights.keys() - {*MEANS_TENSORS, *NOISE_TENSORS, OVERDISPERSION}},
        folder / WEIGHTS,
    )
    (folder / MEANS).unlink(missing_ok=True)

    def change(config: dict[str, Any]) -> None:
        config["sha256"].pop(MEANS, None)
        del config["obs"]["other_control_labels"], config["obs"]["dose"], config["obs"]["drop"]
        config["denoiser"]["attention"] = "paired"
        del config["diffusion"]["start"], config["sampling"]["network_weight"], config["sampling"]["draw_counts"]
        diffusion = config["diffusion"]
        diffusion |= {"kernel": "energy", "mean_weight": 0.0, "p_unlabelled": diffusion.pop("p_features_only")}
        config["format_version"] = 3

    forge(folder, change)
