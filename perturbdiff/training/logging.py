"""What a run tells about itself: metrics.jsonl always, TensorBoard and Weights & Biases besides."""

from __future__ import annotations

import importlib.util
import json
import math
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from perturbdiff.config import Config, as_dict
from perturbdiff.files import write_text


class Metrics:
    """All that is logged, for the process of rank 0; metrics.jsonl, TensorBoard and W&B in the run folder.

    A value that metrics.jsonl cannot take ends the run. A tracker that fails is given up with a line on stderr: neither
    a server nor a log that nobody may read is worth a training run.

    Parameters
    ----------
    folder
        The run folder, which must exist.
    resume_step
        Step of the state that the run goes on from; what was logged after it is forgotten.

    Raises
    ------
    ValueError
        As `check_trackers`.
    """

    def __init__(self, folder: Path, resume_step: int, config: Config) -> None:
        check_trackers(config.training.trackers)
        self._file = MetricsFile(folder / "metrics.jsonl", resume_step)
        self._trackers: dict[str, Tracker] = {}
        for name in config.training.trackers:
            self._attempt(name, self._start, name, folder, resume_step, config)

    def write(self, *, step: int, **values: float) -> None:
        """Log the values of a step under flat names; in trackers as `tag` groups them."""
        self._file.write(step=step, **values)
        tagged = {tag(name): value for name, value in values.items()}
        for name, tracker in list(self._trackers.items()):
            self._attempt(name, tracker.write, step, tagged)

    def close(self) -> None:
        """Hand everything over. Nothing is written afterwards."""
        for name, tracker in list(self._trackers.items()):
            self._attempt(name, tracker.close)
        self._trackers = {}

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _start(self, name: str, folder: Path, resume_step: int, config: Config) -> None:
        self._trackers[name] = TensorBoard(folder, resume_step) if name == "tensorboard" else WandB(folder, config)

    def _attempt(self, name: str, action: Callable[..., None], *arguments: Any) -> None:
        try:
            action(*arguments)
        except Exception as error:
            self._trackers.pop(name, None)
            print(
                f"warning: {name} is given up ({type(error).__name__}: {error}); training goes on, and metrics.jsonl "
                "holds what is logged.",
                file=sys.stderr,
                flush=True,
            )


def check_trackers(trackers: Sequence[str]) -> None:
    """Refuse trackers whose package is missing. Raises ValueError."""
    spec = importlib.util.find_spec("wandb") if "wandb" in trackers else None
    # Without an origin it is a folder wandb/, in which W&B itself leaves runs.
    if "wandb" in trackers and (spec is None or spec.origin is None):
        raise ValueError("training.trackers wandb needs the wandb package; pip install 'perturbdiff[wandb]'.")


def tag(name: str) -> str:
    """loss -> train/loss, validation_loss -> validation/loss."""
    return name.replace("_", "/", 1) if name.startswith("validation_") else f"train/{name}"


class MetricsFile:
    """Appends lines to metrics.jsonl, one a logged step; a resumed run first forgets what came after its state."""

    def __init__(self, path: Path, resume_step: int) -> None:
        self.path = path
        kept = []
        if path.exists():
            for line in path.read_text(errors="replace").splitlines():
                try:
                    if json.loads(line)["step"] <= resume_step:
                        kept.append(line)
                except (ValueError, KeyError, TypeError):
                    continue  # a line that a kill cut short
        write_text(path, "".join(f"{line}\n" for line in kept))

    def write(self, **values: Any) -> None:
        """Append a line; values that are not finite become null, since JSON has no NaN."""
        finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}
        with open(self.path, "a") as file:
            file.write(json.dumps(finite, allow_nan=False) + "\n")


class Tracker(Protocol):
    """Where values are shown; `values` are by tag."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run's folder tensorboard/."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What an earlier process logged after the state is still in its file; viewers drop it from this step on.
        self._writer = SummaryWriter(folder / "tensorboard", purge_step=resume_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # or a kill loses two minutes, also of steps that a state holds and nobody takes again

    def close(self) -> None:
        self._writer.close()


class WandB:
    """One W&B run for all resumptions of a run folder, by the id in its wandb_id.

    The id is drawn at random: the path of a folder is neither unique over machines nor over time.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        import wandb

        path = folder / "wandb_id"
        run_id = path.read_text().strip() if path.exists() else ""
        if not run_id:
            run_id = secrets.token_hex(4)
            write_text(path, f"{run_id}\n")
        self._run = wandb.init(
            project="perturbdiff",
            id=run_id,
            name=folder.resolve().name,
            dir=folder,
            resume="allow",
            config=as_dict(config),
            allow_val_change=True,  # a few settings may change between a run and its resumption
        )
        # W&B's own step may not go back, as it does after a kill; an axis of ours may.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()
