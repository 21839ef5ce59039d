"""The training loop: batches -> loss -> optimizer, with validation, metrics, state and the model folder."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch import distributed as dist

from perturbdiff.atlas.stream import prefetched
from perturbdiff.config import Config
from perturbdiff.data.batch import CellSetBatch
from perturbdiff.data.screen import Screen
from perturbdiff.diffusion.draws import Draws, training_draws
from perturbdiff.diffusion.losses import DiffusionLoss
from perturbdiff.files import progress
from perturbdiff.hub.model_folder import SPLIT, travelling_split
from perturbdiff.lock import Lock
from perturbdiff.model import PerturbDiff
from perturbdiff.nn.denoiser import Denoiser, build_denoiser, compile_blocks
from perturbdiff.nn.layers import shapes_only
from perturbdiff.training.dataset import TrainingSet
from perturbdiff.training.distributed import engine, idle_note, launch
from perturbdiff.training.ema import EMA
from perturbdiff.training.logging import Metrics, check_trackers
from perturbdiff.training.optim import learning_rate, make_optimizer
from perturbdiff.training.partition import full_moments, full_weights, load_moments, on_host
from perturbdiff.training.run_folder import (
    alone_in,
    begin_folder,
    check_resumable,
    check_same_data,
    data_record,
    leave_marker,
    model_config,
    training_record,
    with_commits,
    with_streams,
)
from perturbdiff.training.signals import SIGNALS, StopRequest
from perturbdiff.training.speed import Pace, Trace
from perturbdiff.training.start import Start, prepare, write_adaptation
from perturbdiff.training.state import (
    TENSOR_FILES,
    Progress,
    SavedState,
    keep_newest,
    latest_state,
    open_state,
    remove_left_over,
    save_state,
    saved_states,
)
from perturbdiff.training.validation import validate
from perturbdiff.training.watchdog import WAITING, Watchdog

Drawn = tuple[CellSetBatch, Draws]  # a batch, and all that is random in its loss


@dataclass(frozen=True)
class TrainingResult:
    """What a call of `fit` leaves behind.

    model
        The EMA weights, at the best validation with early stopping.
    stopped_by
        None when training is complete; else the signal or limit that stopped it, and the same call resumes.
    """

    model: PerturbDiff
    folder: Path
    step: int
    stopped_by: str | None


def fit(
    config: Config,
    screen: Screen | None = None,
    stop_at: int | None = None,
    check: Callable[[TrainingSet], None] | None = None,
) -> TrainingResult:
    """Train on a screen or on atlases, or go on where an earlier call with the same settings and data stopped.

    Under a launcher all processes call it; they may be more or fewer than before, or under another engine. Writes into
    config.out: config.yaml, split.json, data.json, metrics.jsonl, tensorboard/, states/, and model/ (the model folder);
    and stopped.json if it was stopped.

    Parameters
    ----------
    screen
        What config.data.screen holds, if it is in memory already.
    stop_at
        Save and return after this many steps, as a signal would make it.
    check
        Called with what was read before anything is written; what it raises ends the call.

    Raises
    ------
    ValueError, KeyError, FileNotFoundError
        Bad settings, data or launch; nothing is written then.
    FloatingPointError
        A loss is not finite; names step, rank and conditions.
    OSError
        A state could not be written, and those before are whole; another run is in the folder.
    """
    out = Path(config.out)
    if screen is None and config.data.screen is not None:
        screen = Screen.read(config.data.screen, config.data)
    if screen is not None:
        config = replace(config, data=screen.config)  # columns of a known kind of file filled in
    config = with_commits(with_streams(config, out), out)
    check_trackers(config.training.trackers)
    accelerator = launch(config)
    check_resumable(out, config)
    main = accelerator.is_main_process
    with _ended_by_others(accelerator, out):
        if main and saved_states(out / "states") and not (out / "model").exists():  # a kill amid a save took it away
            with alone_in(out):
                pass
        newest = saved_states(out / "states")[:1]
        saved = _latest_state(out, accelerator)
        start = prepare(config, screen, out, resuming=saved is not None)
        data = data_record(start.data)
        check_same_data(out, data)
        if check is not None:
            check(start.data)
        if saved is not None and saved.progress.finished:
            if not (out / "model").is_dir():
                raise FileNotFoundError(
                    f"training in {out} is done and its model is gone; put it back, or train anew in another --out."
                )
            result = TrainingResult(PerturbDiff.from_pretrained(out / "model"), out, saved.progress.step, None)
            if main:
                with alone_in(out):
                    keep_newest(out / "states", 1)  # a kill may have left others
                    remove_left_over(out / "states")
                print(f"{start.data.summary()}\ntraining    is done, since step {result.step:,}", flush=True)
        else:
            with alone_in(out) if main else nullcontext() as lock:
                if main and saved_states(out / "states")[:1] != newest:
                    raise FileExistsError(f"another process has trained in {out} meanwhile; give the command again.")
                run = _Run(config, start, accelerator, saved, lock)
                accelerator.wait_for_everyone()  # nobody looks at the run folder any more
                if main:
                    begin_folder(out, config, data)
                    write_adaptation(out, start)
                    print(f"{start.data.summary()}\n{run.summary()}", flush=True)
                result = run.train(stop_at)
    if accelerator.num_processes > 1:
        accelerator.end_training()  # the process group would complain of an end without it
    return result


class _Run:
    """One process's part of a training run."""

    def __init__(
        self, config: Config, start: Start, accelerator: Accelerator, saved: SavedState | None, lock: Lock | None
    ) -> None:
        self.config, self.start, self.accelerator, self.lock = config, start, accelerator, lock
        self.data = data = start.data
        self.out, self.device = Path(config.out), accelerator.device
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        self.module = start.denoiser
        self.n_parameters = sum(p.numel() for p in self.module.parameters())
        self.n_trained = sum(p.numel() for p in self.module.parameters() if p.requires_grad)
        if saved is not None:
            start.load(saved.tensors("denoiser.safetensors"))
        self.module.to(self.device)
        if config.training.compile:
            compile_blocks(self.module)
        self.ema = EMA(self.module, config.optim.ema_decay, self.rank, self.world_size)
        # `denoiser` is what the engine made of `module`, whose parameters keep their names, but perhaps only a stretch.
        optimizer = make_optimizer(self.module, config.optim, start.new_parts, config.adapt.lr_ratio)
        self.denoiser, self.optimizer = accelerator.prepare(self.module, optimizer)
        self.progress = Progress() if saved is None else saved.progress
        self.best: dict[str, Tensor] | None = None  # averaged weights at the best validation
        if saved is not None:
            self.ema.load(saved.tensors("ema.safetensors"), self.progress.ema_updates)
            load_moments(self.module, self.optimizer, saved.tensors("optimizer.safetensors"))
            self.best = saved.tensors("best.safetensors") or None
        self.saved_at, self.save_due = self.progress.step, False
        self.saving_at: int | None = None  # the step of a save that was begun and not waited for
        self.saving_since = time.monotonic()
        self.writer, self.written = ThreadPoolExecutor(1, "save"), False
        self.writing: Future[None] | None = None  # on rank 0
        self.loss = DiffusionLoss(config.diffusion, in_step=self.world_size > 1)
        self.sampler = data.train.sampler(config)
        self.validation = None if data.validation is None else (data.validation, data.validation.sampler(config))
        self.stop = StopRequest()
        self.watchdog = Watchdog(accelerator, config.training.timeout, lambda: _advice(_last_saved(self.out)))
        self.pace = Pace(self.progress.cells_seen)

    def summary(self) -> str:
        sampler, training = self.sampler, self.config.training
        processes = f", {self.world_size} processes under {engine(self.accelerator)}" if self.world_size > 1 else ""
        trained = f" ({self.n_trained:,} train)" if self.n_trained < self.n_parameters else ""
        lines = [
            *([self.start.summary] if self.start.summary else []),
            f"denoiser    {self.n_parameters:,} parameters{trained}, on {self.device}{processes}",
            f"training    {training.n_steps:,} steps of {sampler.sets_per_batch} sets of {sampler.set_size} cells, "
            f"{training.n_steps / sampler.steps_per_epoch:.1f} epochs of {sampler.steps_per_epoch} steps",
        ]
        if (falling := self.config.optim.schedule_steps or training.n_steps) < training.n_steps:
            last = learning_rate(training.n_steps - 1, falling, self.config.optim)
            lines.append(f"schedule    the learning rate falls over {falling:,} steps; it is {last:g} in the last one")
        if (idle := idle_note(self.config.data, self.world_size)) is not None:
            lines.append(f"idle        {idle}")
        if self.progress.step:
            lines.append(f"resuming    from step {self.progress.step} in {self.out}")
        return "\n".join(lines)

    def train(self, stop_at: int | None) -> TrainingResult:
        training, done, main = self.config.training, self.progress, self.accelerator.is_main_process
        stopped_by, failure, ended = None, None, False
        batches = prefetched(
            self._batches,
            done.step,
            training.n_steps,
            self.config.data.prefetch,
            stopped=lambda: self.stop.signal_name is not None,
            give_up=self.data.train.close,
        )
        with (
            self.stop,
            self.watchdog,
            closing(batches),
            Metrics(self.out, done.step, self.config) if main else nullcontext() as metrics,
            progress(training.n_steps, "train", "step", initial=done.step, shown=main) as bar,
            Trace(self.out / "profile", self.rank, training.profile_steps) as profiler,
            self.writer,  # a save that was begun ends, whatever happens
        ):
            if done.step == 0 and self.start.said is not None and training.early_stop_patience is not None:
                self._validated(metrics)  # fine-tuning may do worse than the checkpoint as it is
            while done.step < training.n_steps and not self._converged():
                self.watchdog.doing(f"waiting for the data of step {done.step + 1}")
                with self.pace.waiting():
                    try:
                        made = next(batches, None)
                    except Exception as error:  # raised once all have saved what they have
                        made, failure = None, error
                values, stopped_by = self._step(made)
                if values is None:  # the signal came while data were waited for, or those of one process failed
                    ended = stopped_by is None
                    break
                profiler.step()
                for name, value in values.items():
                    done.window[name] = done.window.get(name, 0.0) + value
                bar.update()
                if done.step % training.log_every == 0 or done.step == training.n_steps:
                    n_logged = done.window.pop("steps")
                    means = {name: value / n_logged for name, value in done.window.items()}
                    speed, done.window = self.pace.lap(done.cells_seen), {}
                    if metrics is not None:
                        metrics.write(step=done.step, cells=done.cells_seen, **speed, **means)
                    bar.set_postfix_str(_shown(means, speed), refresh=False)
                if done.step % training.validate_every == 0:
                    self._validated(metrics)
                if stopped_by is None and stop_at is not None and stop_at <= done.step < training.n_steps:
                    stopped_by = f"stop_at={stop_at}"
                if stopped_by is not None:
                    break
                if self.written:
                    self._saved()
                if done.step % training.save_every == 0 and self.save_due and done.step < training.n_steps:
                    self._save()
            self._saved()
            complete = done.step == training.n_steps or (stopped_by is None and failure is None and not ended)
            done.finished = complete and not training.keep_last_state
            saved = done.step == self.saved_at and (ended or (self.out / "model").is_dir())
            if not saved or done.finished:
                self._save()
                self._saved()
        if failure is not None:
            if main:
                print(_advice(self.saved_at), flush=True)
            raise failure
        if ended:
            raise OSError(f"another process could not read its data, and says why. {_advice(self.saved_at)}")
        if done.step == training.n_steps:
            stopped_by = None  # by a signal in the last step: nothing is left to go on with
        if stopped_by is not None and main:
            leave_marker(self.out, stopped_by, done.step)
            print(
                f"stopped     by {stopped_by} after step {done.step}; the same command goes on from there", flush=True
            )
        return TrainingResult(self._model(self.best or self.ema.full(), self.device), self.out, done.step, stopped_by)

    def _batches(self, step: int) -> tuple[list[Drawn], int]:
        """This process's part of a step, cut for accumulation, and the cells of the whole step; by a thread that is
        ahead of the training."""
        epoch, position = self.sampler.position(step)
        n_parts = self.config.training.accumulation_steps
        parts = self.data.train.batches(self.sampler, epoch, position, self.rank, self.world_size, n_parts)
        return [self._drawn(part.to(self.device)) for part in parts], self.sampler.n_cells(epoch, position)

    def _drawn(self, part: CellSetBatch) -> Drawn:
        with_features = bool(self.data.vocabularies.tables)
        return part, training_draws(part, self.config.diffusion, self.config.training.seed, with_features)

    def _nothing(self) -> tuple[list[Drawn], int]:
        """Empty batches, for a process without data: the others meet it in every pass through the denoiser."""
        empty = self.data.train.batch_of([], self.sampler).to(self.device)
        return [self._drawn(empty)] * self.config.training.accumulation_steps, 1

    def _step(self, made: tuple[list[Drawn], int] | None) -> tuple[dict[str, float] | None, str | None]:
        """One optimizer step: means over all its cells, and the signal that any process got.

        Where a signal kept one of them from waiting for its data, all leave the weights as they are: no means then.
        """
        config, done = self.config, self.progress
        lr = learning_rate(done.step, config.optim.schedule_steps or config.training.n_steps, config.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_ratio"]
        (*firsts, last), n_cells = made or self._nothing()
        self.denoiser.train()
        sums, totals = torch.zeros(3, device=self.device), list[tuple[CellSetBatch, Tensor]]()
        for part in firsts:
            with self.accelerator.accumulate(self.denoiser):
                self.accelerator.backward(self._loss(part, n_cells, sums, totals))
        with self.accelerator.accumulate(self.denoiser):
            loss = self._loss(last, n_cells, sums, totals)
            means, signal_name, abandoned = self._agree(sums, totals, abandoned=made is None)
            if abandoned:
                return None, signal_name
            self.watchdog.doing(f"in the backward pass of step {done.step + 1}")
            self.accelerator.backward(loss)
            norm = float(self.accelerator.clip_grad_norm_(self.denoiser.parameters(), config.optim.grad_clip))
            if not math.isfinite(norm):
                raise FloatingPointError(
                    f"the gradient is not finite at step {done.step + 1}, though the loss is; the last state is kept. "
                    "Lower optim.lr."
                )
            self.optimizer.step()
            self.optimizer.zero_grad()
        done.step += 1
        done.cells_seen += n_cells
        if done.step % config.optim.ema_every == 0:
            self.ema.update(self.module)
        return {**means, "grad_norm": norm, "lr": lr, "steps": 1}, signal_name

    def _loss(
        self,
        drawn: Drawn,
        n_cells: int,
        sums: Tensor,
        totals: list[tuple[CellSetBatch, Tensor]],
    ) -> Tensor:
        """The loss to go back from; adds loss, MSE and MMD to `sums`, and the losses of the sets to `totals`."""
        self.watchdog.doing(f"computing step {self.progress.step + 1}")
        part, draws = drawn
        output = self.loss(self.denoiser, part, draws)  # the denoiser under autocast, by its engine
        # Every cell of the step counts the same, whichever process, part and set it is in: gradients are averaged over
        # processes and parts.
        scale = self.world_size * self.config.training.accumulation_steps / n_cells
        weight = part.mask.sum(1) * scale  # (B,)
        sums += torch.stack([(of_sets * weight).sum() for of_sets in (output.total, output.mse, output.mmd)]).detach()
        totals.append((part, output.total.detach()))
        return (output.total * weight).sum()

    def _agree(
        self, sums: Tensor, totals: Sequence[tuple[CellSetBatch, Tensor]], abandoned: bool
    ) -> tuple[dict[str, float], str | None, bool]:
        """What all processes must know before any takes the step: its means, a signal, whether one gave up waiting.

        And whether it is time to save, or a save is written. Here the host waits for a device, once before the backward
        pass; nothing else of the losses may be read there.

        Raises FloatingPointError everywhere if a loss is not finite anywhere.
        """
        signals = [name == self.stop.signal_name for name in SIGNALS]
        self.watchdog.doing(WAITING)
        save_due = time.monotonic() - self.saving_since >= 60 * self.config.training.save_minutes
        written = self.writing is not None and self.writing.done()
        bad = ~torch.cat([of_sets for _, of_sets in totals]).isfinite().all()
        of_host = sums.new_tensor([self.pace.waited, abandoned, save_due, written, *signals])
        rows = self.accelerator.gather(torch.cat([sums, bad[None].to(sums), of_host])[None]).cpu()  # (N, 11)
        self.pace.add_wait(float(rows[:, 4].max()))
        if rows[:, 3].any():
            self._refuse_non_finite(totals, rows[:, 3].nonzero()[:, 0].tolist())
        n_shares = self.world_size * self.config.training.accumulation_steps
        means = dict(zip(("loss", "mse", "mmd"), (rows[:, :3].sum(0) / n_shares).tolist(), strict=True))
        got = [name for name, by in zip(SIGNALS, rows[:, 8:].any(0).tolist(), strict=True) if by]
        self.save_due, self.written = bool(rows[0, 6]), bool(rows[0, 7])  # as the one says that writes
        return means, got[0] if got else None, bool(rows[:, 5].any())

    def _refuse_non_finite(self, totals: Sequence[tuple[CellSetBatch, Tensor]], ranks: list[int]) -> None:
        where = f"at step {self.progress.step + 1} (rank {', '.join(map(str, ranks[:8]))})"
        labels = self.data.train.index.labels
        names = sorted(
            {
                "perturbation {!r}, cell type {!r}, batch {!r}".format(*labels(part.conditions[b]))
                for part, of_sets in totals
                for b in (~of_sets.isfinite()).nonzero()[:, 0].tolist()
            }
        )
        shown = f"for {'; '.join(names[:3])}{', ...' if len(names) > 3 else ''}" if names else "in conditions it names"
        raise FloatingPointError(
            f"the loss is not finite {where} {shown}; the last state is kept. Lower optim.lr or look at these cells."
        )

    @torch.no_grad()
    def _validated(self, metrics: Metrics | None) -> None:
        """Score the averaged weights on the validation conditions, if any; keeps the best ones for early stopping."""
        if self.validation is None:
            return
        cells, sampler = self.validation
        self.watchdog.doing(f"validating after step {self.progress.step}")
        weights = self.ema.full()
        with self.pace.paused():
            scores = validate(
                self._denoiser_with(weights, self.device),
                cells,
                sampler,
                self.config,
                self.rank,
                self.world_size,
                self.device,
                self._sum,
            )
        # Of generated cells: on small screens it is best long before the loss is.
        energy, done = scores["validation_energy_distance"], self.progress
        if math.isfinite(energy) and (done.best_energy_distance is None or energy < done.best_energy_distance):
            done.best_energy_distance, done.best_step = energy, done.step
            if self.config.training.early_stop_patience is not None:
                self.best = {name: weight.clone() for name, weight in weights.items()}
        if metrics is not None:
            metrics.write(step=done.step, **scores)

    def _sum(self, values: Tensor) -> Tensor:
        self.watchdog.doing(WAITING)
        return self.accelerator.reduce(values, "sum")

    def _converged(self) -> bool:
        patience, done = self.config.training.early_stop_patience, self.progress
        if patience is None or done.best_energy_distance is None:
            return False
        return done.step - done.best_step >= patience * self.config.training.validate_every

    def _save(self) -> None:
        """Begin a save: all gather, and a thread of rank 0 writes copies while training goes on; see `_saved`."""
        self._saved()
        done, main, finished = self.progress, self.accelerator.is_main_process, self.progress.finished
        self.watchdog.doing(f"saving step {done.step}")
        done.ema_updates = self.ema.n_updates
        self.saving_at, self.saving_since = done.step, time.monotonic()
        with self.pace.paused():
            averaged = self.ema.full()
            trained = {} if finished else full_weights(self.module, main)
            moments = {} if finished else full_moments(self.module, self.optimizer, main)
            if main:
                ema = {name: on_host(weight) for name, weight in averaged.items()}
                best = {name: weight.cpu() for name, weight in (self.best or {}).items()}
                weights = best or ema
                files = trained, ema, moments, best
                tensors = {} if finished else dict(zip(TENSOR_FILES, files, strict=True))
                model = self._model(weights, torch.device("cpu"))
                self.writing = self.writer.submit(self._write, deepcopy(done), tensors, model, weights)

    def _write(
        self,
        done: Progress,
        tensors: Mapping[str, Mapping[str, Tensor]],
        model: PerturbDiff,
        weights: Mapping[str, Tensor],
    ) -> None:
        """The model folder, then the state, so that a state never stands without its model."""
        if self.lock is not None:
            self.lock.check()
        model.save_pretrained(self.out / "model")
        self.start.save_adapter(self.out, weights)
        keep = self.config.training.keep_states if not done.finished else 1
        save_state(self.out / "states", done, tensors, keep)

    def _saved(self) -> None:
        """Wait until the save that was begun is on disk; raises on all processes where it could not be written."""
        if self.saving_at is None:
            return
        failure = None
        if self.writing is not None:
            self.watchdog.doing(f"saving step {self.saving_at}")
            with self.pace.paused():
                failure = self.writing.exception()
        step, self.saving_at, self.writing = self.saving_at, None, None
        self.watchdog.doing(WAITING)
        failed = self.accelerator.gather(torch.tensor([failure is not None], device=self.device))
        if isinstance(failure, OSError) and not isinstance(failure, FileExistsError):
            raise OSError(
                f"step {step} could not be saved ({failure}); step {self.saved_at} still is. Make room, and the "
                "same command goes on from there."
            ) from failure
        if failure is not None:  # the folder is another process's, not ours to write
            raise failure
        if failed.any():
            raise OSError(f"step {step} could not be saved by rank 0, which says why.")
        self.saved_at = step

    def _denoiser_with(self, weights: Mapping[str, Tensor], device: torch.device) -> Denoiser:
        with shapes_only():
            denoiser = build_denoiser(self.config.denoiser, len(self.data.cells.genes), self.data.vocabularies)
        denoiser.load_state_dict(self.start.own_weights(weights), assign=True)
        return denoiser.to(device).eval().requires_grad_(False)

    def _model(self, weights: Mapping[str, Tensor], device: torch.device) -> PerturbDiff:
        config, done = self.config, self.progress
        steps = done.best_step if self.best is not None else done.step
        return PerturbDiff(
            self._denoiser_with(weights, device).float(),  # an engine may hold what does not train as bf16
            self.data.cells.genes,
            self.data.vocabularies,
            self.data.cells.preprocessing,
            model_config(config),
            training_record(config, self.start, steps, done.cells_seen),
            means=self.data.means,
            split=travelling_split(self.out / SPLIT) if self.accelerator.is_main_process else None,
            name=str(Path(config.out) / "model"),
        )


def _latest_state(out: Path, accelerator: Accelerator) -> SavedState | None:
    """The newest state that is whole. One process looks; the others read the same one."""
    folder, rank_0 = out / "states", accelerator.is_main_process
    saved = latest_state(folder) if rank_0 else None
    steps = torch.tensor([-1 if saved is None else saved.progress.step], device=accelerator.device)
    step = int(accelerator.gather(steps)[0])
    if rank_0 or step < 0:
        return saved
    try:
        return open_state(folder, step)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"rank {accelerator.process_index} does not see {error.filename}, which rank 0 does; the run folder must "
            "be on a file system that all nodes share."
        ) from error


def _last_saved(out: Path) -> int:
    """By what is on disk: a save may be written and not yet waited for."""
    return int(states[0].name.removeprefix("step_")) if (states := saved_states(out / "states")) else 0


def _advice(saved_step: int) -> str:
    return f"The last saved step is {saved_step}; the same command goes on from there."


@contextmanager
def _ended_by_others(accelerator: Accelerator, out: Path) -> Iterator[None]:
    """What breaks here when another process ends, as one line: the reason is what that one says."""
    try:
        yield
    except RuntimeError as error:
        if accelerator.num_processes > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise ConnectionError(
                f"another process has ended; its message, or the launcher's, says why. {_advice(_last_saved(out))}"
            ) from error
        raise


def _shown(means: dict[str, float], speed: dict[str, float]) -> str:
    # What leaves the bar its room at 80 columns; metrics.jsonl has the rest.
    return f"loss {means['loss']:.4f} {speed['cells_per_s']:,.0f} cells/s"
