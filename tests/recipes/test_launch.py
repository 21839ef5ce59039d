"""Launch files and job scripts: what they start, and what becomes of signals. Cluster commands are stand-ins."""

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.utils import DistributedType

from tests.processes import PATIENCE
from tests.screens import ROOT

pytestmark = pytest.mark.slow

LAUNCH = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
SCRIPTS = sorted((ROOT / "recipes" / "slurm").glob("*.sbatch"))
PRETRAIN = ROOT / "recipes" / "slurm" / "pretrain.sbatch"
BIN = Path(sys.executable).parent
USR1, TERM = signal.SIGUSR1, signal.SIGTERM


def named(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


def test_there_is_a_launch_file_for_every_engine():
    engines = ["ddp", "zero1", "zero2", "zero3"]
    expected = {*(f"cpu_{name}" for name in engines), "1x8_ddp", *(f"8x8_{name}" for name in engines)}
    assert {path.stem for path in LAUNCH} == expected


@named(LAUNCH)
def test_a_launch_file_says_in_accelerates_words_what_its_name_and_first_line_do(path):
    config = load_config_from_file(str(path))  # refuses unknown keys
    assert isinstance(config, ClusterConfig)
    size, engine = path.stem.split("_")
    nodes, on_each = (1, 2) if size == "cpu" else map(int, size.split("x"))
    assert (config.num_machines, config.num_processes) == (nodes, nodes * on_each)
    first = path.read_text().splitlines()[0]
    hardware = "Two CPU processes" if size == "cpu" else f"{nodes} node{'s' * (nodes > 1)} x {on_each} GPUs"
    assert first.startswith(f"# {hardware}")
    if engine == "ddp":
        assert config.distributed_type == DistributedType.MULTI_GPU
        assert not config.deepspeed_config
        assert "DDP" in first
    else:
        assert config.distributed_type == DistributedType.DEEPSPEED
        # Clipping, accumulation, precision and a whole configuration of DeepSpeed's would contradict the recipe.
        assert set(config.deepspeed_config) == {"zero_stage", "zero3_init_flag", "deepspeed_multinode_launcher"}
        assert config.deepspeed_config["zero_stage"] == int(engine.removeprefix("zero"))
        assert config.deepspeed_config["deepspeed_multinode_launcher"] == "standard"
        assert f"ZeRO-{engine[-1]}" in first
    assert config.mixed_precision == "no"
    assert not config.dynamo_config
    assert not config.use_cpu  # with it, accelerate starts one process


PROBE = """
import json, os, pathlib, sys
names = ("RANK", "WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_ZERO_STAGE", "ACCELERATE_USE_CPU",
         "ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_CLIPPING", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
seen = {name: os.environ.get(name) for name in names} | {"arguments": sys.argv[1:]}
pathlib.Path(f"rank{os.environ.get('RANK')}.json").write_text(json.dumps(seen))
"""


@named([path for path in LAUNCH if path.stem.startswith("cpu_")])
def test_a_launch_file_for_cpus_starts_two_processes_of_its_engine_without_a_question(path, tmp_path):
    if "zero" in path.stem and find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    (tmp_path / "probe.py").write_text(PROBE)
    done = subprocess.run(
        [BIN / "accelerate", "launch", "--config_file", path, "-m", "probe", "RECIPE.yaml", "out=runs/x"],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "defaults used instead" not in done.stderr
    seen = [json.loads(found.read_text()) for found in sorted(tmp_path.glob("rank*.json"))]
    assert [process["RANK"] for process in seen] == ["0", "1"]
    stage = path.stem[-1] if "zero" in path.stem else None
    for process in seen:
        assert process["WORLD_SIZE"] == "2"
        assert process["ACCELERATE_USE_DEEPSPEED"] == (None if stage is None else "true")
        assert process["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == stage
        assert process["ACCELERATE_MIXED_PRECISION"] == "no"
        assert process["ACCELERATE_GRADIENT_CLIPPING"] is process["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] is None
        assert process["ACCELERATE_USE_CPU"] is None
        assert process["arguments"] == ["RECIPE.yaml", "out=runs/x"]


@named(SCRIPTS)
def test_bash_understands_a_job_script_and_it_stops_at_the_first_error(path):
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    assert "\nset -euo pipefail\n" in path.read_text()


def test_the_job_has_time_to_save_before_it_is_killed():
    text = PRETRAIN.read_text()
    warning = int(re.search(r"^#SBATCH --signal=B:USR1@(\d+)$", text, re.MULTILINE)[1])
    patience = int(re.search(r"^export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)$", text, re.MULTILINE)[1])
    assert 30 < patience < warning
    for option in ("--requeue", "--open-mode=append", "--ntasks-per-node=1"):
        assert f"\n#SBATCH {option}\n" in text


# srun starts its command once a node and passes signals on to it, as Slurm's.
SRUN = """#!{python}
import os, signal, subprocess, sys
tasks = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: [task.send_signal(number) for task in tasks])
command = sys.argv[sys.argv.index("bash"):]
for node in range(int(os.environ["SLURM_JOB_NUM_NODES"])):
    tasks.append(subprocess.Popen(command, env={{**os.environ, "SLURM_NODEID": str(node)}}))
sys.exit(max(code if code >= 0 else 128 - code for code in [task.wait() for task in tasks]))
"""
SCONTROL = """#!{python}
import os, sys
if sys.argv[1:] == ["show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]:
    print("127.0.0.1", *(f"node{{i}}" for i in range(2, 2000)), sep="\\n")
else:
    open("scontrol", "a").write(" ".join(sys.argv[1:]) + "\\n")
"""
# Says what it was given and that it is ready, takes SIGNALS in turn, saying so, writes MARKER and exits with CODE.
ACCELERATE = """#!{python}
import json, os, pathlib, signal, sys
both = (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP)
signal.pthread_sigmask(signal.SIG_BLOCK, both)
names = ("OMP_NUM_THREADS", "PET_SIGNALS_TO_HANDLE", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "TORCHINDUCTOR_CACHE_DIR",
         "TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR")
if "EARLY" in os.environ:  # it has no handlers yet
    signal.pthread_sigmask(signal.SIG_UNBLOCK, both)
    pathlib.Path("said").open("w").write("ready")
    signal.pause()
seen = {{name: os.environ.get(name) for name in names}} | {{"arguments": sys.argv[1:]}}
pathlib.Path(f"node{{os.environ['SLURM_NODEID']}}.json").write_text(json.dumps(seen))
pathlib.Path(f"pid{{os.getpid()}}").touch()
for i in range(int(os.environ.get("SIGNALS", "0"))):
    pathlib.Path("said").open("w").write("ready")
    open("got", "a").write(signal.Signals(signal.sigwait(both)).name + " ")
if "MARKER" in os.environ:
    pathlib.Path(os.environ["MARKER"]).write_text("{{}}")
sys.exit(int(os.environ["CODE"]))
"""


@pytest.fixture
def cluster(tmp_path):
    """A folder to run in, with the commands of a cluster in bin/, a recipe, and a pipe that the job speaks through."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "tiny.yaml").write_text("out: runs/of_recipe\ndata: {atlases: [{path: atlas}]}\n")
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("accelerate", ACCELERATE)):
        command = tmp_path / "bin" / name
        command.write_text(text.format(python=sys.executable))
        command.chmod(0o755)
    os.mkfifo(tmp_path / "said")
    return tmp_path


def start(folder, *words, nodes=1, gpus=8, job=123456, path=None, **environment):
    allotted = {
        "SLURM_JOB_ID": str(job),
        "SLURM_JOB_NODELIST": "node[1-1999]",
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_GPUS_ON_NODE": str(gpus),
        "SLURM_CPUS_PER_TASK": "64",
    }
    own = ("OMP_NUM_THREADS", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")  # torch sets two where it has compiled
    inherited = {name: value for name, value in os.environ.items() if name not in own}
    path = path or f"{folder / 'bin'}{os.pathsep}{BIN}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        ["bash", PRETRAIN, *map(str, words)],
        cwd=folder,
        env={**inherited, **allotted, "PATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(job):
    output, _ = job.communicate(timeout=PATIENCE)
    return job.returncode, output


def assert_ready(folder):
    """Wait until a process of the job has said so."""
    pipe = os.open(folder / "said", os.O_RDWR)  # so that opening waits for nobody
    try:
        assert select.select([pipe], [], [], PATIENCE)[0], "the job said nothing"
        assert os.read(pipe, 5) == b"ready"
    finally:
        os.close(pipe)


def job_with_a_free_port():
    """The job's number gives the port."""
    for port in range(20000, 30000):
        with socket.socket() as free:
            if free.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("no port is free")


def pids_of(folder):
    """The launchers that run there."""
    return [int(path.name.removeprefix("pid")) for path in folder.glob("pid*")]


def requeued(folder):
    return (folder / "scontrol").read_text().splitlines() if (folder / "scontrol").exists() else []


def run_folder(folder, name="runs/of_recipe"):
    (folder / name).mkdir(parents=True)
    return str(folder / name / "stopped.json")


WORDS = ("launch.yaml", "tiny.yaml")


def test_a_job_gives_every_node_its_rank_and_all_of_them_one_address(cluster):
    words = (*WORDS, "training.n_steps=9", "split.hold_out=[A B]")
    code, output = finish(start(cluster, *words, nodes=3, CODE="0"))
    assert code == 0, output
    for node in range(3):
        seen = json.loads((cluster / f"node{node}.json").read_text())
        program_at = seen["arguments"].index("-m")
        launched, program = seen["arguments"][:program_at], seen["arguments"][program_at:]
        assert launched[0] == "launch"
        assert dict(zip(launched[1::2], launched[2::2], strict=True)) == {
            "--machine_rank": str(node),
            "--config_file": "launch.yaml",
            "--num_machines": "3",
            "--num_processes": "24",
            "--rdzv_backend": "static",
            "--main_process_ip": "127.0.0.1",
            "--main_process_port": "23456",
        }
        assert program == ["-m", "perturbdiff", "pretrain", WORDS[1], "out=runs/of_recipe", *words[2:]]
        assert seen["OMP_NUM_THREADS"] == "8"
        handled = {getattr(signal, name) for name in seen["PET_SIGNALS_TO_HANDLE"].split(",")}
        assert {USR1, TERM, signal.SIGINT} <= handled
        caches = [seen["TORCHINDUCTOR_CACHE_DIR"], seen["TRITON_CACHE_DIR"], seen["TORCH_EXTENSIONS_DIR"]]
        assert all(cache.startswith("/tmp/perturbdiff_") for cache in caches)
    assert requeued(cluster) == []


@pytest.mark.parametrize("missing", [(), ("launch.yaml",)])
def test_a_job_without_a_launch_file_or_a_recipe_says_what_to_give(cluster, missing):
    code, output = finish(start(cluster, *missing, CODE="0"))
    assert code != 0
    assert "recipe" in output


@pytest.mark.parametrize("code", [0, 7])
def test_a_run_that_ends_by_itself_gives_the_job_its_code_and_does_not_queue_again(cluster, code):
    marker = Path(run_folder(cluster))
    marker.write_text("{}")  # of an earlier job
    assert finish(start(cluster, *WORDS, CODE=str(code)))[0] == code
    assert requeued(cluster) == []
    assert not marker.exists()


@pytest.mark.parametrize("words", [(), ("out=elsewhere/run",)])
def test_a_warning_reaches_the_run_and_the_job_queues_again_once_all_is_saved(cluster, words):
    marker = run_folder(cluster, words[0].removeprefix("out=") if words else "runs/of_recipe")
    job = start(cluster, *WORDS, *words, CODE="1", SIGNALS="1", MARKER=marker)
    assert_ready(cluster)
    job.send_signal(USR1)
    assert finish(job)[0] == 0
    assert requeued(cluster) == ["requeue 123456"]


@pytest.mark.parametrize("later", [USR1, TERM])
def test_only_the_first_signal_is_passed_on(cluster, later):
    job = start(cluster, *WORDS, CODE="1", SIGNALS="2", MARKER=run_folder(cluster))
    assert_ready(cluster)
    job.send_signal(USR1)
    assert_ready(cluster)
    for _ in range(2):
        job.send_signal(later)
    while "SigPnd:\t0000000000000000" not in (pending := Path(f"/proc/{job.pid}/status").read_text()):
        assert job.poll() is None, pending
    [launcher] = pids_of(cluster)
    os.kill(launcher, signal.SIGHUP)  # the second that it waits for
    assert finish(job)[0] == 0
    assert (cluster / "got").read_text().split() == ["SIGUSR1", "SIGHUP"]
    assert requeued(cluster) == ["requeue 123456"]


def test_a_warning_that_kills_the_launcher_before_it_knows_signals_queues_the_job_again(cluster):
    job = start(cluster, *WORDS, CODE="1", EARLY="1")
    assert_ready(cluster)
    job.send_signal(USR1)
    assert finish(job)[0] == 0
    assert requeued(cluster) == ["requeue 123456"]


def test_jobs_that_bring_a_run_no_further_queue_again_three_times(cluster):
    def one_more():
        job = start(cluster, *WORDS, CODE="1", EARLY="1")
        assert_ready(cluster)
        job.send_signal(USR1)
        return finish(job)

    states = cluster / "runs" / "of_recipe" / "states"
    (states / "step_00000004").mkdir(parents=True)
    assert [one_more()[0] for _ in range(2)] == [0, 0]
    (states / "step_00000008").mkdir()
    assert [one_more()[0] for _ in range(3)] == [0, 0, 0]
    code, output = one_more()
    assert code == 1
    assert "three jobs brought the run no further (step_00000008); not queued again" in output
    assert len(requeued(cluster)) == 5


def test_a_run_that_could_not_save_after_the_warning_gives_its_code_and_does_not_queue_again(cluster):
    Path(run_folder(cluster)).write_text("{}")  # of an earlier job
    job = start(cluster, *WORDS, CODE="5", SIGNALS="1")
    assert_ready(cluster)
    job.send_signal(USR1)
    assert finish(job)[0] == 5
    assert requeued(cluster) == []


def test_a_cancelled_run_saves_but_does_not_queue_again(cluster):
    job = start(cluster, *WORDS, CODE="1", SIGNALS="1", MARKER=run_folder(cluster))
    assert_ready(cluster)
    job.send_signal(TERM)
    assert finish(job)[0] == 1
    assert requeued(cluster) == []


# In place of the program: meets the other processes, then waits for a signal, as each must get one.
MEETING = """
import pathlib, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])  # before torch starts threads that would not wait for it
import torch
from torch import distributed
distributed.init_process_group("gloo")
rank = torch.tensor([float(distributed.get_rank() + 1)])
distributed.all_reduce(rank)
pathlib.Path(f"met{distributed.get_rank()}").write_text(f"{rank.item():g} of {distributed.get_world_size()}")
distributed.barrier()
if distributed.get_rank() == 0:
    pathlib.Path("said").open("w").write("ready")
signal.sigwait([signal.SIGUSR1])
distributed.barrier()
[out] = [word.removeprefix("out=") for word in sys.argv if word.startswith("out=")]
pathlib.Path(out, "stopped.json").write_text("{}")
"""


@pytest.mark.parametrize("launch", ["cpu_ddp", "cpu_zero2"])
def test_processes_on_two_nodes_meet_and_all_of_them_hear_the_warning(cluster, launch):
    if "zero" in launch and find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    (cluster / "bin" / "accelerate").unlink()  # the real one
    (cluster / "perturbdiff").mkdir()
    (cluster / "perturbdiff" / "__init__.py").touch()
    (cluster / "perturbdiff" / "__main__.py").write_text(MEETING)
    run_folder(cluster)
    job_id = job_with_a_free_port()
    launch_file = ROOT / "recipes" / "accelerate" / f"{launch}.yaml"
    job = start(cluster, launch_file, WORDS[1], nodes=2, gpus=1, job=job_id)
    assert_ready(cluster)
    job.send_signal(USR1)
    code, output = finish(job)
    assert code == 0, output
    assert [(cluster / f"met{rank}").read_text() for rank in (0, 1)] == ["3 of 2", "3 of 2"]
    assert requeued(cluster) == [f"requeue {job_id}"]
