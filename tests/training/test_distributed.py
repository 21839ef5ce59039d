"""Guards against launches that would fall back in silence. Runs of several processes are tested elsewhere."""

import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from perturbdiff.config import load_config
from perturbdiff.training import distributed
from perturbdiff.training.distributed import idle_note, launch, shares
from tests.processes import PATIENCE
from tests.screens import ROOT
from tests.simulated import TINY, write_screen

pytestmark = pytest.mark.slow

ACCELERATE = Path(sys.executable).parent / "accelerate"
LAUNCHERS = ("ACCELERATE_", "SLURM_", "FSDP_", "MEGATRON_", "DEEPSPEED_")
RENDEZVOUS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def bare_environment():
    return {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS) and k not in RENDEZVOUS}


@pytest.fixture
def environment(monkeypatch):
    """Sets what a launcher would, in an environment without one."""
    for key in os.environ.keys() - bare_environment().keys():
        monkeypatch.delenv(key)
    return lambda variables: [monkeypatch.setenv(key, value) for key, value in variables.items()]


def config_of(*words):
    return load_config(None, ["training.device=cpu", *words], {"out": "unused", "data": {"screen": "unused.h5ad"}})


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"MASTER_ADDR": "127.0.0.1", "ACCELERATE_MIXED_PRECISION": "no"}, r"meant several processes .* started one"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, r"srun started 8 tasks that know nothing of each other"),
        ({"ACCELERATE_USE_FSDP": "true"}, "asks for FSDP; the engines here are DDP and DeepSpeed's ZeRO"),
        ({"ACCELERATE_USE_MEGATRON_LM": "True"}, "asks for Megatron-LM"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "asks for a parallelism config"),
    ],
)
def test_a_launch_that_means_something_else_is_refused(environment, variables, said):
    environment(variables)
    with pytest.raises(ValueError, match=said):
        launch(config_of())


@pytest.mark.parametrize(
    ("variable", "asked", "words", "key"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", [], "training.mixed_precision (no)"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", ["training.mixed_precision=bf16"], "training.mixed_precision (bf16)"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", [], "training.accumulation_steps (1)"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", ["training.accumulation_steps=2"], "accumulation_steps (2)"),
        ("ACCELERATE_GRADIENT_CLIPPING", "0.5", [], "optim.grad_clip (1.0)"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", [], "training.compile"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", ["training.compile=true"], "training.compile"),
        ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu", [], "there is no offload here"),
        ("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "nvme", [], "there is no offload here"),
        ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "ds.json", [], "zero_stage of the launch file"),
    ],
)
def test_a_launch_file_that_contradicts_the_recipe_is_refused_and_both_are_named(
    environment, variable, asked, words, key
):
    environment({variable: asked})
    with pytest.raises(ValueError, match=re.escape(f"sets {variable}={asked}, the recipe ") + ".*" + re.escape(key)):
        launch(config_of(*words))


@pytest.mark.parametrize("package", ["deepspeed", "transformers"])
def test_deepspeed_without_its_packages_is_refused_and_they_are_named(environment, monkeypatch, package):
    environment({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"})
    found = distributed.find_spec
    monkeypatch.setattr(distributed, "find_spec", lambda name: None if name == package else found(name) or object())
    with pytest.raises(ValueError, match=rf"DeepSpeed, but {package} cannot be imported; pip install"):
        launch(config_of())


LAUNCH = """
import sys
from perturbdiff.config import load_config
from perturbdiff.training.distributed import engine, launch

config = load_config(None, sys.argv[1:], {"out": "unused", "data": {"screen": "unused.h5ad"}})
try:
    accelerator = launch(config)
except ValueError as error:
    sys.exit(f"ValueError: {error}")
print(engine(accelerator), accelerator.mixed_precision, accelerator.gradient_accumulation_steps, accelerator.device)
"""


def launched(variables, *words):
    """`launch` in a process of its own: what it makes cannot be unmade."""
    return subprocess.run(
        [sys.executable, "-c", LAUNCH, *words],
        env={**bare_environment(), **variables},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


@pytest.mark.parametrize(
    ("variables", "words", "said"),
    [
        # Accelerate goes by LOCAL_RANK.
        (
            {"WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""},
            ["training.device=cuda"],
            r"started 2 processes \(WORLD_SIZE\), but this one sees 1: each would train by itself",
        ),
        ({"CUDA_VISIBLE_DEVICES": ""}, ["training.device=cuda"], "there is no CUDA device here; set training.device"),
    ],
    ids=["alone", "no cuda"],
)
def test_a_process_that_is_not_where_it_should_be_says_so(variables, words, said):
    done = launched(variables, *words)
    assert done.returncode == 1, done.stderr
    assert re.search(f"ValueError: .*{said}", done.stderr), done.stderr


@pytest.mark.parametrize(
    ("variables", "words", "made"),
    [
        ({}, ["training.mixed_precision=bf16", "training.accumulation_steps=3"], "one process bf16 3 cpu"),
        # What accelerate launch sets for one process, and an sbatch script without srun.
        ({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}, [], "one process no 1 cpu"),
        ({"SLURM_STEP_NUM_TASKS": "1"}, [], "one process no 1 cpu"),
        # The launch file may say what the recipe does.
        (
            {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"},
            ["training.mixed_precision=bf16", "training.accumulation_steps=2"],
            "one process bf16 2 cpu",
        ),
        ({"MASTER_ADDR": "127.0.0.1"}, [], "one process no 1 cpu"),
    ],
)
def test_one_process_trains_with_the_recipes_settings(variables, words, made):
    done = launched(variables, "training.device=cpu", *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == made


@pytest.mark.parametrize(("streams", "streamed"), [(None, False), (None, True), (2, True), (6, True), (12, True)])
@pytest.mark.parametrize("n", [1, 4, 6, 8, 24])
def test_shares_are_those_of_the_samplers(streams, streamed, n):
    if streamed and streams is None and 12 % n:
        pytest.skip("refused")
    data = replace(config_of("data.sets_per_batch=12").data, streamed=streamed, n_streams=streams)
    lanes = (streams or n) if streamed else 12
    # Streams, or sets, go around the processes; each stream has as many sets.
    counts = [len(range(rank, lanes, n)) * (12 // lanes) for rank in range(n)]
    assert shares(data, n) == (sum(count > 0 for count in counts), max(counts))
    note = idle_note(data, n)
    assert (note is None) == all(counts)
    assert note is None or note.startswith(f"{counts.count(0)} of {n} processes have nothing to do: a step is 12 sets")


GPUS = "import os, torch\ntorch.cuda.device_count = lambda: int(os.environ['GPUS'])\n"


@pytest.mark.parametrize(
    ("gpus", "word", "said"),
    [
        ((1, 0), "training.device=cuda", r"rank 1 \(.+\) sees no GPU, the others do; look at CUDA_VISIBLE_DEVICES"),
        ((0, 0), "training.device=auto", r"2 processes were started, and none sees a GPU; give training\.device=cpu"),
    ],
    ids=["some", "none"],
)
def test_processes_compare_their_devices_before_they_wait_for_each_other(gpus, word, said):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", GPUS + LAUNCH, word, "training.timeout=60"],
            env={**bare_environment(), **common, "CUDA_VISIBLE_DEVICES": "", "RANK": str(rank), "GPUS": str(n)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, n in enumerate(gpus)
    ]
    output = [process.communicate(timeout=PATIENCE)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], output
    assert re.search(f"ValueError: .*{said}", output[0]), output


@pytest.mark.parametrize("how", [["--cpu", "--num_processes", "2"], ["--num_processes", "2"]], ids=" ".join)
def test_accelerate_launch_that_starts_one_process_instead_of_two_ends_with_an_explanation(tmp_path, how):
    screen, out = write_screen(tmp_path), tmp_path / "run"
    done = subprocess.run(
        [str(ACCELERATE), "launch", *how, "-m", "perturbdiff", "train", "--screen", str(screen), "--out", str(out),
         *TINY],
        env=bare_environment() | {"HF_HOME": str(tmp_path / "no_default_config")},
        cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "perturbdiff: error: the launcher meant several processes" in done.stderr, done.stderr
    assert "Use --config_file recipes/accelerate/cpu_ddp.yaml" in done.stderr
    assert not out.exists()


def test_a_mac_trains_on_its_processor(environment, monkeypatch):
    """Its GPU has neither float64 nor uint16."""
    environment({})
    for what in ("is_available", "is_built"):
        monkeypatch.setattr(torch.backends.mps, what, lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert launch(config_of("training.device=auto")).device == torch.device("cpu")
