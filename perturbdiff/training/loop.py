"""The training loop: batches -> loss -> optimizer, with validation, metrics, state and the model folder."""

from __future__ import annotations

import copy
import json
import os
import time
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from perturbdiff import __version__
from perturbdiff.config import Config, ModelConfig, ObsColumns, as_dict, load_config, save_config
from perturbdiff.data.batch import CellSetBatch
from perturbdiff.data.cellsets import CellSetSampler, StreamedSampler
from perturbdiff.data.screen import Screen
from perturbdiff.data.splits import write_split
from perturbdiff.data.stream import prefetched
from perturbdiff.data.training_set import IndexedCells, TrainingSet
from perturbdiff.diffusion.losses import DiffusionLoss, LossOutput, training_draws, validation_draws
from perturbdiff.pretrained import PerturbDiff, build_denoiser
from perturbdiff.progress import progress
from perturbdiff.training.ema import EMA
from perturbdiff.training.interrupt import StopRequest
from perturbdiff.training.optim import learning_rate, make_optimizer
from perturbdiff.training.state import Progress, TrainingState, load_latest, save_state, saved_states
from perturbdiff.training.tracking import MetricsFile

# Settings that may change between a run and its resumption: they move no number.
FREE_ON_RESUME = {"out", "data.prefetch", "training.log_every", "training.save_every", "training.keep_states"}


@dataclass(frozen=True)
class TrainingResult:
    """What a call of `train` leaves behind.

    model
        The EMA weights, at the best validation with early stopping.
    stopped_by
        None when training is complete; else the signal or limit that stopped it, and the same call resumes.
    """

    model: PerturbDiff
    folder: Path
    step: int
    stopped_by: str | None


def train(config: Config, screen: Screen | None = None, stop_at: int | None = None) -> TrainingResult:
    """Train on a screen, or go on where an earlier call with the same settings stopped.

    Writes into config.out: config.yaml, split.json, metrics.jsonl, states/, and model/ (the model folder).

    Parameters
    ----------
    screen
        What config.data.screen holds, if it is in memory already.
    stop_at
        Save and return after this many steps, as a signal would make it.

    Raises
    ------
    ValueError, KeyError, FileNotFoundError
        Bad settings or data; nothing is written then.
    FloatingPointError
        A loss is not finite; names step and conditions.
    """
    out = Path(config.out)
    config = _with_lanes(config, out)
    _check_resumable(out, config)
    if config.data.screen is None:
        data = TrainingSet.of_atlases(config)
    else:
        data = TrainingSet.of(screen or Screen.read(config.data.screen, config.data), config)
    _check_same_data(out, data)
    run = _Run(config, data)
    out.mkdir(parents=True, exist_ok=True)
    save_config(config, out / "config.yaml")
    write_split(data.split, data.origin, out / "split.json")
    print(f"{data.summary()}\n{run.summary()}", flush=True)
    return run.train(out, stop_at)


class _Run:
    """One process's part of a training run."""

    def __init__(self, config: Config, data: TrainingSet) -> None:
        self.config = config
        self.data = data
        AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
        self.accelerator = Accelerator(
            cpu=config.training.device == "cpu", mixed_precision=config.training.mixed_precision
        )
        if self.accelerator.num_processes > 1:
            raise ValueError(
                f"launched on {self.accelerator.num_processes} processes; this version trains in one. Start it without "
                "accelerate launch."
            )
        if config.training.device == "cuda" and self.accelerator.device.type != "cuda":
            raise ValueError("training.device=cuda, but there is no CUDA device here; set training.device=auto.")
        with torch.random.fork_rng():  # weights depend on the seed alone
            torch.manual_seed(config.training.seed)
            denoiser = build_denoiser(config.denoiser, len(data.cells.genes), data.vocabularies)
        denoiser.to(self.accelerator.device)
        self.ema = EMA(denoiser, config.optim.ema_decay)
        self.denoiser, self.optimizer = self.accelerator.prepare(denoiser, make_optimizer(denoiser, config.optim))
        self.loss = DiffusionLoss(config.diffusion)
        self.sampler = data.train.sampler(config)
        self.validation = None if data.validation is None else (data.validation, data.validation.sampler(config))
        self.state = TrainingState(self.accelerator.unwrap_model(self.denoiser), self.ema, self.optimizer, Progress())

    def summary(self) -> str:
        n_parameters = sum(p.numel() for p in self.ema.module.parameters())
        sampler, training = self.sampler, self.config.training
        return (
            f"denoiser    {n_parameters:,} parameters, on {self.accelerator.device}\n"
            f"training    {training.n_steps:,} steps of {sampler.sets_per_batch} sets of {sampler.set_size} cells, "
            f"{training.n_steps / sampler.steps_per_epoch:.1f} epochs of {sampler.steps_per_epoch} steps"
        )

    def train(self, out: Path, stop_at: int | None) -> TrainingResult:
        training = self.config.training
        if load_latest(out / "states", self.state):
            print(f"resuming    from step {self.state.progress.step} in {out}", flush=True)
        done = self.state.progress
        metrics = MetricsFile(out / "metrics.jsonl", done.step)
        stopped_by = None
        stop = StopRequest()
        batches = prefetched(
            self._batch,
            done.step,
            training.n_steps,
            self.config.data.prefetch,
            stopped=lambda: stop.signal_name is not None,
            give_up=self.data.train.close,
        )
        with (
            stop,
            closing(batches),
            progress(training.n_steps, "train", "step", initial=done.step) as bar,
        ):
            clock, cells_at = time.perf_counter(), done.cells_seen
            saved_at = done.step
            while done.step < training.n_steps and not self._converged():
                batch = next(batches, None)
                if batch is None:  # the signal came while data were waited for
                    stopped_by = stop.signal_name
                    self._save(out)
                    break
                values = self._step(done.step, *batch)
                done.step += 1
                for name, value in values.items():
                    done.window[name] = done.window.get(name, 0.0) + value
                bar.update()
                if done.step % training.log_every == 0 or done.step == training.n_steps:
                    seconds = max(time.perf_counter() - clock, 1e-9)
                    rate = (done.cells_seen - cells_at) / seconds
                    n_logged = done.window.pop("steps")
                    means = {name: value / n_logged for name, value in done.window.items()}
                    metrics.write(step=done.step, cells=done.cells_seen, cells_per_s=round(rate, 1), **means)
                    shown = f"loss {means['loss']:.4f} mmd {means['mmd']:.4f} {rate:,.0f} cells/s"
                    bar.set_postfix_str(shown, refresh=False)
                    done.window, clock, cells_at = {}, time.perf_counter(), done.cells_seen
                if self.validation is not None and done.step % training.validate_every == 0:
                    metrics.write(step=done.step, validation_loss=self._validate(*self.validation))
                if stop.signal_name is not None:
                    stopped_by = stop.signal_name
                elif stop_at is not None and done.step >= stop_at and done.step < training.n_steps:
                    stopped_by = f"stop_at={stop_at}"
                if done.step % training.save_every == 0 or stopped_by is not None:
                    self._save(out)
                    saved_at = done.step
                if stopped_by is not None:
                    break
            if stopped_by is None and (saved_at != done.step or not (out / "model").is_dir()):
                self._save(out)
        if stopped_by is not None:
            print(
                f"stopped     by {stopped_by} after step {done.step}; the same command goes on from there", flush=True
            )
        return TrainingResult(self._model(), out, done.step, stopped_by)

    def _step(self, step: int, batch: CellSetBatch, n_cells: int) -> dict[str, float]:
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, config.training.n_steps, config.optim)
        draws = training_draws(batch, config.diffusion, config.training.seed)
        self.denoiser.train()
        with self.accelerator.autocast():
            output = self.loss(self.denoiser, batch, draws)
        self._refuse_non_finite(output, batch, step)
        # Every cell of the global batch counts the same, whichever rank and set it is in; DDP averages over ranks.
        weight = batch.mask.sum(1) * (self.accelerator.num_processes / n_cells)  # (B,)
        loss = (output.total * weight).sum()
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.denoiser.parameters(), config.optim.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if (step + 1) % config.optim.ema_every == 0:
            self.ema.update(self.accelerator.unwrap_model(self.denoiser))
        self.state.progress.cells_seen += n_cells
        values = torch.stack([loss, (output.mse * weight).sum(), (output.mmd * weight).sum(), norm])
        loss_value, mse, mmd, grad_norm = values.detach().tolist()
        lr = self.optimizer.param_groups[0]["lr"]
        return {"loss": loss_value, "mse": mse, "mmd": mmd, "grad_norm": grad_norm, "lr": lr, "steps": 1}

    def _batch(self, step: int) -> tuple[CellSetBatch, int]:
        """This rank's part of a step, and the cells of the whole of it."""
        epoch, place = self.sampler.place(step)
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        batch = self.data.train.batch(self.sampler, epoch, place, rank, world_size)
        return batch.to(self.accelerator.device), self.sampler.n_cells(epoch, place)

    def _refuse_non_finite(self, output: LossOutput, batch: CellSetBatch, step: int) -> None:
        finite = output.total.isfinite()
        if finite.all():
            return
        index = self.data.train.index
        bad = sorted({index.labels(batch.conditions[b]) for b in (~finite).nonzero()[:, 0].tolist()})
        shown = "; ".join(f"perturbation {p!r}, cell type {c!r}, batch {b!r}" for p, c, b in bad[:3])
        raise FloatingPointError(
            f"the loss is not finite at step {step + 1} (rank {self.accelerator.process_index}) for {shown}"
            f"{', ...' if len(bad) > 3 else ''}; the last state is kept. Lower optim.lr or look at these cells."
        )

    @torch.no_grad()
    def _validate(self, cells: IndexedCells, sampler: CellSetSampler | StreamedSampler) -> float:
        """Loss of the EMA weights on the validation conditions with fixed t, noise and sets, and no dropout."""
        config = self.config
        total, n_cells = 0.0, 0
        for step in range(sampler.steps_per_epoch):
            batch = cells.batch(sampler, 0, step, rank=0, world_size=1).to(self.accelerator.device)
            output = self.loss(self.ema.module, batch, validation_draws(batch, config.diffusion, config.training.seed))
            counts = batch.mask.sum(1)
            total += float((output.total * counts).sum())
            n_cells += int(counts.sum())
        cells.release()
        loss, done = total / n_cells, self.state.progress
        if done.best_validation is None or loss < done.best_validation:
            done.best_validation, done.best_step = loss, done.step
            if config.training.early_stop_patience is not None:
                self.state.best = {name: t.detach().clone() for name, t in self.ema.module.state_dict().items()}
        return loss

    def _converged(self) -> bool:
        patience, done = self.config.training.early_stop_patience, self.state.progress
        if patience is None or done.best_validation is None:
            return False
        return done.step - done.best_step >= patience * self.config.training.validate_every

    def _save(self, out: Path) -> None:
        save_state(out / "states", self.state, self.config.training.keep_states)
        self._model().save_pretrained(out / "model")

    def _model(self) -> PerturbDiff:
        config, done = self.config, self.state.progress
        denoiser = copy.deepcopy(self.ema.module)
        if self.state.best is not None:
            denoiser.load_state_dict(self.state.best)
        obs = ObsColumns(
            config.data.perturbation_col, config.data.cell_type_col, config.data.batch_col, config.data.control_label
        )
        settings = as_dict(config)
        # No paths of this machine in what may be published.
        if config.data.screen is not None:
            settings["data"]["screen"] = Path(config.data.screen).name
        for atlas in settings["data"]["atlases"]:
            atlas["path"] = Path(atlas["path"]).name if Path(atlas["path"]).is_dir() else atlas["path"]
        del settings["out"]
        training = {
            "library_version": __version__,
            "screen": settings["data"]["screen"],
            "atlases": [
                {"name": atlas["path"], "commit": opened.commit, "sha256": opened.sha256}
                for atlas, opened in zip(settings["data"]["atlases"], self.data.atlases, strict=True)
            ],
            "steps": done.best_step if self.state.best is not None else done.step,
            "cells_seen": done.cells_seen,
            "control_match": self.data.match,
            "hold_out": list(config.split.hold_out),
            "settings": settings,
        }
        model_config = ModelConfig(config.denoiser, config.diffusion, config.sampling, obs, config.data.set_size)
        return PerturbDiff(
            denoiser,
            self.data.cells.genes,
            self.data.vocabularies,
            self.data.cells.preprocessing,
            model_config,
            training,
            name=str(Path(config.out) / "model"),
        )


def _with_lanes(config: Config, out: Path) -> Config:
    # A run keeps the lanes it was started with, so that more or fewer processes go on with the same sets.
    if not config.data.streamed or config.data.stream_lanes is not None:
        return config
    lanes = int(os.environ.get("WORLD_SIZE", "1"))
    if saved_states(out / "states"):
        lanes = load_config(out / "config.yaml").data.stream_lanes or lanes
    return replace(config, data=replace(config.data, stream_lanes=lanes))


def _check_resumable(out: Path, config: Config) -> None:
    # A folder with states belongs to the settings that made them.
    if not saved_states(out / "states"):
        if out.exists() and not out.is_dir():
            raise FileExistsError(f"out ({out}) is a file; choose another run folder.")
        return
    before, now = _flat(as_dict(load_config(out / "config.yaml"))), _flat(as_dict(config))
    changed = [key for key in now if key not in FREE_ON_RESUME and before.get(key) != now[key]]
    if changed:
        shown = "; ".join(f"{key} was {before.get(key)!r}, is {now[key]!r}" for key in changed[:3])
        raise ValueError(
            f"run folder {out} was made with other settings ({shown}); choose another --out, or give the same settings "
            "to go on."
        )


def _check_same_data(out: Path, data: TrainingSet) -> None:
    # The same settings may name a file or atlas that has changed since.
    if saved_states(out / "states") and (out / "split.json").is_file():
        before, now = json.loads((out / "split.json").read_text()), data.split.as_json(data.origin)
        if before["sha256"] != now["sha256"]:
            changed = [key for key in now if key != "sha256" and before.get(key) != now[key]]
            raise ValueError(
                f"the data of run folder {out} are not those it was started with ({', '.join(changed)} of split.json "
                "differ); choose another --out, or give the same data to go on."
            )


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat
