"""The processes of a run: engine, and guards against silent fallbacks.

How many processes there are, and under which engine (DDP or DeepSpeed's ZeRO), is the launcher's business
(`accelerate launch`, recipes/accelerate/); the recipe says everything else.
"""

from __future__ import annotations

import os
import socket
import sys
import warnings
from collections.abc import Mapping
from datetime import timedelta
from importlib.util import find_spec

import torch
from accelerate import (
    Accelerator,
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
)
from accelerate.state import AcceleratorState
from torch import distributed as dist

from perturbdiff.config import Config, DataConfig, TrainingConfig
from perturbdiff.files import few, short

OTHER_ENGINES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
ZERO_BUCKET = 50_000_000  # elements in which DeepSpeed gathers gradients, taken whole whatever the model


def launch(config: Config) -> Accelerator:
    """This process's accelerator, as the launcher's environment asks and with the recipe's settings.

    Raises
    ------
    ValueError
        The launcher meant several processes, another engine or other settings than this process would get: a run that
        falls back in silence wastes a night. Or DeepSpeed is missing, or there is no such device.
    """
    training = config.training
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    _check_launcher(os.environ, config)
    # Never Apple's GPU, which Accelerate would take: it has no float64 and no uint16.
    on_cpu = training.device == "cpu" or (training.device == "auto" and not torch.cuda.is_available())
    expected, meeting = int(os.environ.get("WORLD_SIZE", "1")), None
    if expected > 1 and {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        meeting = _compare_devices(expected, on_cpu, training)  # until Accelerate has met there too
    # Ours comes first: it can name who is missing.
    group = InitProcessGroupKwargs(timeout=timedelta(seconds=2 * training.timeout + 60))
    # DDP orders its buckets anew after the first step, by arrival, and with that the sums of three or more processes: a
    # resumed run would differ in the last digits. Where it looks for unused parameters, it does not.
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True, find_unused_parameters=True)
    plugin = None
    if deepspeed:
        plugin = _deepspeed(config, on_cpu)
        if on_cpu:
            group.backend = "gloo"
    AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
    accelerator = Accelerator(
        cpu=on_cpu and not deepspeed,
        mixed_precision="no" if deepspeed else training.mixed_precision,
        gradient_accumulation_steps=training.accumulation_steps,
        deepspeed_plugin=plugin,
        kwargs_handlers=[group, ddp],
    )
    del meeting
    if accelerator.num_processes != expected:
        raise ValueError(
            f"the launcher started {expected} processes (WORLD_SIZE), but this one sees {accelerator.num_processes}: "
            "each would train by itself. Is training.device right, and does every process see a GPU?"
        )
    if training.device == "cuda" and accelerator.device.type != "cuda":
        raise ValueError("training.device=cuda, but there is no CUDA device here; set training.device=auto.")
    if deepspeed and accelerator.distributed_type != DistributedType.DEEPSPEED:
        raise ValueError(
            f"the launcher asked for DeepSpeed, but Accelerate chose {accelerator.distributed_type.value}; use a file "
            "of recipes/accelerate/."
        )
    return accelerator


def shares(data: DataConfig, n: int) -> tuple[int, int]:
    """Of `n` processes, how many have sets in a step, and how many sets one has at most."""
    lanes = min((data.n_streams or n) if data.streamed else data.sets_per_batch, data.sets_per_batch)
    return min(n, lanes), -(-lanes // n) * (data.sets_per_batch // lanes)


def idle_note(data: DataConfig, n: int) -> str | None:
    """Which of `n` processes would have nothing to do, and why; None where all have something."""
    busy, _ = shares(data, n)
    if busy == n:
        return None
    streams = f" in {data.n_streams} streams (data.n_streams)" if data.streamed and data.n_streams else ""
    return (
        f"{n - busy} of {n} processes have nothing to do: a step is {data.sets_per_batch} sets "
        f"(data.sets_per_batch){streams}; raise {'both' if streams else 'it'} to a multiple of {n}, or start {busy}"
    )


def engine(accelerator: Accelerator) -> str:
    """Its name, for a person."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"ZeRO-{accelerator.state.deepspeed_plugin.zero_stage}"
    return "DDP" if accelerator.num_processes > 1 else "one process"


def _compare_devices(world_size: int, on_cpu: bool, training: TrainingConfig) -> dist.Store:
    """Refuse processes of which some see a GPU and some do not: they would wait for each other in different libraries.

    And several that all see none, unless CPUs are asked for. Returns the store that they met in.
    """
    own_gpu = not on_cpu and int(os.environ["LOCAL_RANK"]) < torch.cuda.device_count()
    try:
        store, rank, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=training.timeout)))
        devices = dist.PrefixStore("devices", store)
        devices.set(str(rank), f"{'GPU' if own_gpu else 'CPU'} {socket.gethostname()}")
        seen = [devices.get(str(other)).decode().split(" ", 1) for other in range(world_size)]
    except dist.DistError as error:
        raise ConnectionError(
            f"not all of {world_size} processes began within {training.timeout:g} s (training.timeout): "
            f"{short(error)}. Look at what the others say."
        ) from error
    without = [f"rank {rank} ({host})" for rank, (device, host) in enumerate(seen) if device == "CPU"]
    if without and len(without) < world_size:
        raise ValueError(
            f"{few(without)} see{'s' * (len(without) == 1)} no GPU, the others do; look at CUDA_VISIBLE_DEVICES, the "
            "driver, and that a node is asked for as many GPUs as it has processes."
        )
    if without and training.device == "auto":
        raise ValueError(
            f"{world_size} processes were started, and none sees a GPU; give training.device=cpu if they are to train "
            "on CPUs."
        )
    return store


def _check_launcher(environment: Mapping[str, str], config: Config) -> None:
    for variable, name in OTHER_ENGINES.items():
        if environment.get(variable, "false").lower() == "true":
            raise ValueError(f"the launcher asks for {name}; the engines here are DDP and DeepSpeed's ZeRO-1, 2 and 3.")
    if "WORLD_SIZE" not in environment:
        if "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment:
            raise ValueError(
                "the launcher meant several processes (it set MASTER_ADDR), but started one: accelerate launch --cpu "
                "does that. Use --config_file recipes/accelerate/cpu_ddp.yaml, and training.device=cpu."
            )
        tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
        if tasks > 1:
            raise ValueError(
                f"srun started {tasks} tasks that know nothing of each other (no WORLD_SIZE); start one task a node, "
                "and accelerate launch in it, as recipes/slurm/pretrain.sbatch does."
            )
    training = config.training
    ours = {
        "ACCELERATE_MIXED_PRECISION": ("training.mixed_precision", training.mixed_precision, "no"),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
            "training.accumulation_steps",
            str(training.accumulation_steps),
            "1",
        ),
        "ACCELERATE_GRADIENT_CLIPPING": ("optim.grad_clip", str(config.optim.grad_clip), "auto"),
        "ACCELERATE_DYNAMO_BACKEND": ("training.compile, block by block", "NO", "NO"),
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": ("nothing: there is no offload here", "none", "none"),
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": ("nothing: there is no offload here", "none", "none"),
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": ("zero_stage of the launch file and our settings", "none", "none"),
    }
    for variable, (key, value, unset) in ours.items():
        asked = environment.get(variable, unset)
        if asked.lower() not in (value.lower(), unset.lower()):
            raise ValueError(
                f"the launcher sets {variable}={asked}, the recipe {key} ({value}); leave it out of the launch file: "
                "the recipe decides."
            )


def _deepspeed(config: Config, on_cpu: bool) -> DeepSpeedPlugin:
    # transformers: Accelerate's DeepSpeed integration and DeepSpeed's CPU accelerator import it.
    missing = [name for name in ("deepspeed", "transformers") if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"the launcher asks for DeepSpeed, but {' and '.join(missing)} cannot be imported; "
            "pip install 'perturbdiff[deepspeed]'."
        )
    # It calls collectives that torch 2.13 has renamed, several times a step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        # Its shared-memory all-reduce would be compiled for minutes, and a compilation that was killed leaves a lock
        # that hangs every later run. gloo does.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    plugin = DeepSpeedPlugin(
        gradient_accumulation_steps=config.training.accumulation_steps, gradient_clipping=config.optim.grad_clip
    )
    if plugin.zero_stage not in (1, 2, 3):
        raise ValueError(f"zero_stage ({plugin.zero_stage}) must be 1, 2 or 3; without sharding use DDP.")
    # By itself DeepSpeed takes 2 GB for it, more than the weights of most models here.
    plugin.hf_ds_config.config["zero_optimization"] |= dict.fromkeys(
        ("reduce_bucket_size", "allgather_bucket_size"), ZERO_BUCKET
    )
    plugin.hf_ds_config.config |= {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed only logs it
        "gradient_accumulation_steps": config.training.accumulation_steps,
        "gradient_clipping": config.optim.grad_clip,  # there, clip_grad_norm_ only reports
        "zero_allow_untested_optimizer": True,
        "steps_per_print": sys.maxsize,
        # As under DDP: float32 weights and sums of gradients, autocast in the forward pass.
        "torch_autocast": {
            "enabled": config.training.mixed_precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
    }
    return plugin
