import json
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import wait
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import anndata
import numpy as np
import pytest
import torch

from perturbdiff.data.screen import Screen
from perturbdiff.hub.download import find_model
from perturbdiff.model import PerturbDiff
from perturbdiff.training import loop
from perturbdiff.training.dataset import IndexedCells
from perturbdiff.training.loop import fit
from tests.processes import PATIENCE
from tests.simulated import DEFAULTS, TINY, tiny_config, write_screen

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    return write_screen(tmp_path_factory.mktemp("screen"))


def losses(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("cells_per_s", "data_wait")} for line in lines]


def weights(folder):
    return dict(PerturbDiff.from_pretrained(folder, device="cpu").denoiser.state_dict())


def assert_same_weights(a, b):
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("words", [(), ("training.log_every=4", "diffusion.unbiased=true")])
def test_stopping_and_running_again_continues_bit_identically(screen, tmp_path, words):
    straight = fit(tiny_config(screen, tmp_path / "straight", *words))
    assert straight.stopped_by is None
    config = tiny_config(screen, tmp_path / "stopped", *words)
    first = fit(config, stop_at=3)
    assert (first.step, first.stopped_by) == (3, "stop_at=3")
    second = fit(config)
    assert (second.step, second.stopped_by) == (6, None)
    assert losses(tmp_path / "straight") == losses(tmp_path / "stopped")
    assert_same_weights(tmp_path / "straight" / "model", tmp_path / "stopped" / "model")


def test_another_seed_gives_other_losses(screen, tmp_path):
    fit(tiny_config(screen, tmp_path / "a"))
    fit(tiny_config(screen, tmp_path / "b", "training.seed=1"))
    assert losses(tmp_path / "a") != losses(tmp_path / "b")


def test_the_global_random_state_is_neither_read_nor_moved(screen, tmp_path):
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    fit(tiny_config(screen, tmp_path / "a"))
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()
    torch.manual_seed(2)
    fit(tiny_config(screen, tmp_path / "b"))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_a_finished_run_is_not_trained_again(screen, tmp_path):
    config = tiny_config(screen, tmp_path / "run")
    fit(config)
    before = losses(tmp_path / "run")
    assert fit(config).step == 6
    assert losses(tmp_path / "run") == before


def test_training_lowers_the_validation_loss(screen, tmp_path):
    # A condition whose perturbation is trained in the other batch of the same cell type.
    words = ("split.validation=['pert_1:type_1:batch_1']", "training.n_steps=60", "training.validate_every=20")
    fit(tiny_config(screen, tmp_path / "run", *words, "optim.lr=0.005"))
    values = [line["validation_loss"] for line in losses(tmp_path / "run") if "validation_loss" in line]
    assert len(values) == 3
    assert values[-1] < values[0]


def test_validation_does_not_change_training(screen, tmp_path):
    often = tiny_config(screen, tmp_path / "often", "split.validation=[pert_1:type_1]", "training.validate_every=1")
    seldom = tiny_config(screen, tmp_path / "seldom", "split.validation=[pert_1:type_1]", "training.validate_every=6")
    fit(often)
    fit(seldom)
    trained = [[line for line in losses(tmp_path / name) if "loss" in line] for name in ("often", "seldom")]
    assert trained[0] == trained[1]


def test_early_stopping_ends_the_run_and_keeps_the_weights_of_least_energy_distance(screen, tmp_path, monkeypatch):
    validate, losses_of = loop.validate, iter(range(100, 0, -1))  # a loss that falls: by it the last ones are the best
    monkeypatch.setattr(loop, "validate", lambda *given: validate(*given) | {"validation_loss": float(next(losses_of))})
    # A learning rate that ruins the weights: an early validation is the best one.
    words = (
        "split.validation=[pert_1:type_1]", "training.early_stop_patience=2", "optim.lr=0.3", "optim.warmup_steps=0",
        "training.n_steps=40", "optim.ema_decay=0.0",
    )  # fmt: skip
    result = fit(tiny_config(screen, tmp_path / "run", *words))
    lines = [line for line in losses(tmp_path / "run") if "validation_loss" in line]
    values = {line["step"]: line["validation_energy_distance"] for line in lines}
    best = min(values, key=values.get)
    assert result.step < 40
    assert result.step == best + 4  # two validations, two steps apart
    assert result.model.training.steps == best
    stopped_at_best = tiny_config(screen, tmp_path / "best", *words)
    fit(stopped_at_best, stop_at=best)
    assert_same_weights(tmp_path / "run" / "model", tmp_path / "best" / "model")


def test_the_split_travels_with_a_model_that_nobody_scored(screen, tmp_path):
    model = fit(tiny_config(screen, tmp_path / "run")).folder / "model"
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    assert split["cells"]["test"]
    assert PerturbDiff.from_pretrained(model, device="cpu").split == split


def test_early_stopping_resumes_bit_identically(screen, tmp_path):
    words = ("split.validation=[pert_1:type_1]", "training.early_stop_patience=50", "training.n_steps=8")
    fit(tiny_config(screen, tmp_path / "straight", *words))
    stopped = tiny_config(screen, tmp_path / "stopped", *words, "training.save_every=3")
    fit(stopped, stop_at=5)
    fit(stopped)
    assert losses(tmp_path / "straight") == losses(tmp_path / "stopped")
    assert_same_weights(tmp_path / "straight" / "model", tmp_path / "stopped" / "model")


def test_a_non_finite_loss_stops_with_step_and_condition_and_keeps_the_state(screen, tmp_path):
    config = tiny_config(screen, tmp_path / "run")
    fit(config, stop_at=2)
    poisoned = Screen.read(screen, config.data)
    held_out = json.loads((tmp_path / "run" / "split.json").read_text())["cells"]
    trained = ~poisoned.obs.index.isin([*held_out["test"], *held_out["validation"]])
    cells = (poisoned.obs["perturbation"] == "pert_2").to_numpy() & trained
    poisoned.expression.library_size[cells] = 1e-38  # counts over it are beyond float32
    (tmp_path / "run" / "data.json").unlink()  # or other data would be refused before the first step
    with pytest.raises(FloatingPointError, match=r"step [3-6] .*perturbation 'pert_2', cell type 'type_"):
        fit(config, screen=poisoned)
    assert PerturbDiff.from_pretrained(tmp_path / "run" / "model").training.steps == 2


@pytest.mark.parametrize(("minutes", "saved"), [(0, [2, 4, 6]), (1.5, [4, 6]), (60, [6])])
def test_saves_are_so_many_minutes_apart_and_at_the_end(screen, tmp_path, monkeypatch, minutes, saved):
    steps, now, save, agree = [], [0.0], loop.save_state, loop._Run._agree

    def noted(folder, progress, *rest):
        steps.append(progress.step)
        save(folder, progress, *rest)

    def agreed(run, *given, **more):
        now[0] += 30  # seconds, each step
        return agree(run, *given, **more)

    monkeypatch.setattr(loop, "save_state", noted)
    monkeypatch.setattr(loop._Run, "_agree", agreed)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: now[0]))
    fit(tiny_config(screen, tmp_path / "run", "training.save_every=2", f"training.save_minutes={minutes}"))
    assert steps == saved


def test_training_goes_on_while_a_save_is_written_and_the_bytes_are_those_of_a_save_that_waits(
    screen, tmp_path, monkeypatch
):
    words = (
        "training.save_every=2",
        "training.save_minutes=0",
        "training.keep_states=3",
        "training.keep_last_state=true",
    )
    save, write, agree = loop._Run._save, loop.save_state, loop._Run._agree
    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "_save", lambda run: (save(run), run._saved()))
        fit(tiny_config(screen, tmp_path / "waits", *words))
    step, further = [0], threading.Condition()

    def agreed(run, *given, **more):
        with further:
            step[0] = run.progress.step
            further.notify()
        return agree(run, *given, **more)

    def written(folder, progress, *rest):
        with further:  # the next step is taken, but of the last one
            assert progress.step == 6 or further.wait_for(lambda: step[0] > progress.step, PATIENCE)
        write(folder, progress, *rest)

    monkeypatch.setattr(loop, "save_state", written)
    monkeypatch.setattr(loop._Run, "_agree", agreed)
    fit(tiny_config(screen, tmp_path / "run", *words))
    files = sorted(path.relative_to(tmp_path / "run") for part in ("states", "model") for path in
                   (tmp_path / "run" / part).rglob("*") if path.is_file())  # fmt: skip
    assert len(files) > 3 * 5
    for file in files:
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "waits" / file).read_bytes(), file


def test_a_save_that_fails_ends_the_run_at_the_next_step(screen, tmp_path, monkeypatch):
    agree = loop._Run._agree

    def full(*_):
        raise OSError(28, "No space left on device")

    def agreed(run, *given, **more):
        if run.writing is not None:
            wait([run.writing], PATIENCE)
        return agree(run, *given, **more)

    monkeypatch.setattr(loop, "save_state", full)
    monkeypatch.setattr(loop._Run, "_agree", agreed)
    with pytest.raises(OSError, match=r"step 2 could not be saved .*No space.*; step 0 still is\."):
        fit(tiny_config(screen, tmp_path / "run", "training.save_every=2", "training.save_minutes=0"))
    assert [line["step"] for line in losses(tmp_path / "run") if "loss" in line] == [1, 2, 3]


def test_a_save_that_was_begun_is_finished_though_training_fails(screen, tmp_path, monkeypatch):
    write, step, failed = loop.save_state, loop._Run._step, threading.Event()

    def failing(run, made):
        if run.progress.step == 3:
            failed.set()
            raise FloatingPointError("not finite")
        return step(run, made)

    def written(*given):
        assert failed.wait(PATIENCE)
        write(*given)

    monkeypatch.setattr(loop, "save_state", written)
    monkeypatch.setattr(loop._Run, "_step", failing)
    with pytest.raises(FloatingPointError, match="not finite"):
        fit(tiny_config(screen, tmp_path / "run", "training.save_every=2", "training.save_minutes=0"))
    assert [path.name for path in (tmp_path / "run" / "states").iterdir()] == ["step_00000002"]


def test_data_that_fail_cost_no_step_that_was_taken(screen, tmp_path, monkeypatch):
    config, make = tiny_config(screen, tmp_path / "run"), IndexedCells.batches

    def failing(cells, sampler, epoch, position, *rest):
        if epoch * sampler.steps_per_epoch + position == 4:
            raise ValueError("shard 3 is damaged")
        return make(cells, sampler, epoch, position, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(IndexedCells, "batches", failing)
        with pytest.raises(ValueError, match="shard 3 is damaged"):
            fit(config)
    assert [path.name for path in (tmp_path / "run" / "states").iterdir()] == ["step_00000004"]
    assert PerturbDiff.from_pretrained(tmp_path / "run" / "model").training.steps == 4
    fit(config)
    fit(tiny_config(screen, tmp_path / "straight"))
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    assert_same_weights(tmp_path / "run" / "model", tmp_path / "straight" / "model")


def test_data_that_fail_from_the_start_leave_no_model(screen, tmp_path, monkeypatch):
    def failing(*given):
        raise ValueError("shard 3 is damaged")

    monkeypatch.setattr(IndexedCells, "batches", failing)
    with pytest.raises(ValueError, match="shard 3 is damaged"):
        fit(tiny_config(screen, tmp_path / "run"))
    assert not (tmp_path / "run" / "model").exists()


def test_other_settings_are_refused_in_a_run_folder_and_named(screen, tmp_path):
    fit(tiny_config(screen, tmp_path / "run"), stop_at=2)
    with pytest.raises(ValueError, match=r"optim\.lr was 0\.0005, is 0\.1"):
        fit(tiny_config(screen, tmp_path / "run", "optim.lr=0.1"))
    fit(tiny_config(screen, tmp_path / "run", "training.save_every=50"))  # moves no number


def test_a_second_run_is_kept_out_of_the_folder_while_the_first_lives(screen, tmp_path):
    hold = "import sys, pathlib\nfrom perturbdiff.training.run_folder import alone_in\n"
    hold += "with alone_in(pathlib.Path(sys.argv[1])):\n  print(1, flush=True)\n  input()"
    config = tiny_config(screen, tmp_path / "run")
    fit(config, stop_at=2)
    command = [sys.executable, "-c", hold, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(FileExistsError, match=rf"is training in .*: host .*, process {other.pid}, by .*run\.lock"):
            fit(config)
        other.kill()
    assert fit(config).step == 6


def test_bad_data_writes_nothing(screen, tmp_path):
    with pytest.raises(ValueError, match="pert_99"):
        fit(tiny_config(screen, tmp_path / "run", hold_out=("pert_99",)))
    assert not (tmp_path / "run").exists()


def assert_close_losses(a, b, rtol):
    assert [line.keys() for line in losses(a)] == [line.keys() for line in losses(b)]
    for first, second in zip(losses(a), losses(b), strict=True):
        for name in first.keys() - {"step", "cells"}:
            assert second[name] == pytest.approx(first[name], rel=rtol), (first["step"], name)


def assert_close_weights(a, b, atol):
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    worst = max(float((first[name] - second[name]).abs().max()) for name in first)
    assert worst <= atol


@pytest.mark.parametrize("n_parts", [2, 3, 6])  # of 4 sets: halves, parts that differ, more parts than sets
@pytest.mark.parametrize("words", [(), ("data.set_size=16", "data.min_set_size=4")])
def test_accumulation_changes_only_the_rounding(screen, tmp_path, n_parts, words):
    # Cells of a step count the same, also where sets are of different sizes.
    fit(tiny_config(screen, tmp_path / "whole", *words))
    fit(tiny_config(screen, tmp_path / "parts", f"training.accumulation_steps={n_parts}", *words))
    assert_close_losses(tmp_path / "whole", tmp_path / "parts", rtol=1e-4)
    assert_close_weights(tmp_path / "whole" / "model", tmp_path / "parts" / "model", atol=1e-5)


def test_a_run_goes_on_with_another_accumulation(screen, tmp_path):
    fit(tiny_config(screen, tmp_path / "whole"))
    fit(tiny_config(screen, tmp_path / "run"), stop_at=3)
    result = fit(tiny_config(screen, tmp_path / "run", "training.accumulation_steps=2"))
    assert result.stopped_by is None
    assert_close_losses(tmp_path / "whole", tmp_path / "run", rtol=1e-5)


@pytest.mark.filterwarnings("ignore")  # the compiler warns of itself
def test_compiled_blocks_give_the_same_losses(screen, tmp_path, monkeypatch):
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        pytest.skip("torch.compile finds no C++ compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)  # or its workers outlive the test
    words = ["denoiser.depth=1", "training.n_steps=4"]
    fit(tiny_config(screen, tmp_path / "plain", *words))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fit(tiny_config(screen, tmp_path / "compiled", "training.compile=true", *words))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert_close_losses(tmp_path / "plain", tmp_path / "compiled", rtol=1e-4)
    assert weights(tmp_path / "plain" / "model").keys() == weights(tmp_path / "compiled" / "model").keys()


def test_bf16_trains_close_to_fp32_and_keeps_fp32_weights(screen, tmp_path):
    words = ["split.validation=[pert_1:type_1]", "training.n_steps=20"]
    fit(tiny_config(screen, tmp_path / "fp32", *words))
    fit(tiny_config(screen, tmp_path / "bf16", "training.mixed_precision=bf16", *words))
    trained = [[line["loss"] for line in losses(tmp_path / name) if "loss" in line] for name in ("fp32", "bf16")]
    assert len(trained[1]) == 20
    assert np.isfinite(trained[1]).all()
    assert trained[0] != trained[1]
    np.testing.assert_allclose(trained[1], trained[0], rtol=0.02)
    assert all(weight.dtype == torch.float32 for weight in weights(tmp_path / "bf16" / "model").values())
    assert all(torch.isfinite(weight).all() for weight in weights(tmp_path / "bf16" / "model").values())


VALIDATED = ("loss", "energy_distance", "energy_distance_no_change", "pearson_delta")


def test_validation_is_logged_with_null_where_a_score_is_undefined(screen, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def without_pearson(*arguments):
        return {**validate(*arguments), "validation_pearson_delta": math.nan}

    validate, words = loop.validate, ["split.validation=[pert_1:type_1]"]
    fit(tiny_config(screen, tmp_path / "run", *words), stop_at=4)
    monkeypatch.setattr(loop, "validate", without_pearson)
    fit(tiny_config(screen, tmp_path / "run", *words))
    lines = [line for line in losses(tmp_path / "run") if "validation_loss" in line]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all(line.keys() == {"step", *(f"validation_{name}" for name in VALIDATED)} for line in lines)
    assert [line["validation_pearson_delta"] is None for line in lines] == [False, False, True]
    assert all(math.isfinite(line[f"validation_{name}"]) for line in lines for name in VALIDATED[:3])
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    for name in VALIDATED:
        shown = {event.step: event.value for event in events.Scalars(f"validation/{name}")}
        for line in lines:
            expected = line[f"validation_{name}"]
            assert shown[line["step"]] == pytest.approx(expected if expected is not None else math.nan, nan_ok=True)
    trained = {line["step"]: line["loss"] for line in losses(tmp_path / "run") if "loss" in line}
    assert {event.step: event.value for event in events.Scalars("train/loss")} == pytest.approx(trained)


def test_a_gradient_that_is_not_finite_stops_and_keeps_the_state(screen, tmp_path, monkeypatch):
    def poisoned(*arguments, **how):
        start = prepare(*arguments, **how)
        start.denoiser.head.bias.register_hook(lambda gradient: gradient * math.inf)
        return start

    prepare, config = loop.prepare, tiny_config(screen, tmp_path / "run")
    fit(config, stop_at=3)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "prepare", poisoned)
        with pytest.raises(FloatingPointError, match=r"gradient is not finite at step 4, .*Lower optim\.lr"):
            fit(config)
    assert [path.name for path in (tmp_path / "run" / "states").iterdir()] == ["step_00000003"]
    fit(config)
    fit(tiny_config(screen, tmp_path / "straight"))
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    assert_same_weights(tmp_path / "run" / "model", tmp_path / "straight" / "model")


@pytest.mark.parametrize(
    ("killed", "model_at"), [("PerturbDiff.save_pretrained", 2), ("save_state", 4)], ids=["before model", "after model"]
)
def test_a_kill_between_model_folder_and_state_leaves_no_state_without_its_model(
    screen, tmp_path, monkeypatch, killed, model_at
):
    def kill(*_, **__):
        raise KeyboardInterrupt

    config = tiny_config(screen, tmp_path / "run")
    fit(config, stop_at=2)
    with monkeypatch.context() as patch:
        patch.setattr(f"perturbdiff.training.loop.{killed}", kill)
        with pytest.raises(KeyboardInterrupt):
            fit(config, stop_at=4)
    assert [path.name for path in (tmp_path / "run" / "states").iterdir()] == ["step_00000002"]
    assert PerturbDiff.from_pretrained(tmp_path / "run" / "model").training.steps == model_at
    fit(config)
    fit(tiny_config(screen, tmp_path / "straight"))
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    assert_same_weights(tmp_path / "run" / "model", tmp_path / "straight" / "model")


def test_a_full_disk_ends_the_run_with_a_message_and_the_same_call_goes_on_when_there_is_room(screen, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        config = tiny_config(screen, disk / "run", "denoiser.width=32")
        fit(config, stop_at=2)
        model = (disk / "run" / "model" / "model.safetensors").stat().st_size
        assert model > 100_000
        filesystem = os.statvfs(disk)
        (disk / "filler").write_bytes(bytes(filesystem.f_bavail * filesystem.f_frsize - 90_000))  # metrics have room
        with pytest.raises(OSError, match=r"step 6 could not be saved .*; step 2 still is\. Make room"):
            fit(config)
        assert [path.name for path in (disk / "run" / "states").iterdir()] == ["step_00000002"]
        assert PerturbDiff.from_pretrained(disk / "run" / "model").training.steps == 2
        (disk / "filler").unlink()
        fit(config)
        fit(tiny_config(screen, tmp_path / "straight", "denoiser.width=32"))
        assert losses(disk / "run") == losses(tmp_path / "straight")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


SAVER = """
import sys
from dataclasses import replace

import torch
from perturbdiff import PerturbDiff

model = PerturbDiff.from_pretrained(sys.argv[1], device="cpu")
for number in range(1, int(sys.argv[2]) + 1):
    model.training = replace(model.training, steps=number)
    with torch.no_grad():
        model.denoiser.head.bias.fill_(number)
    model.save_pretrained(sys.argv[1])
    print(number, flush=True)
    sys.stdin.readline()
"""


def test_a_model_folder_can_be_opened_while_a_run_keeps_replacing_it(screen, tmp_path):
    """Another process replaces it during the reads; each reads one of them whole."""
    fit(tiny_config(screen, tmp_path / "run"))
    folder, n_saves, seen = tmp_path / "run" / "model", 100, []
    command = [sys.executable, "-c", SAVER, str(folder), str(n_saves)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as saver:
        for number in range(1, n_saves + 1):
            if number == 1:
                assert select.select([saver.stdout], [], [], PATIENCE)[0]  # it has started
            saved = False
            while not saved and saver.poll() is None:
                model = PerturbDiff.from_pretrained(folder, device="cpu")
                assert bool((model.denoiser.head.bias == model.training.steps).all())
                seen.append(model.training.steps)
                saved = bool(select.select([saver.stdout], [], [], 0)[0])
            assert saver.stdout.readline() == f"{number}\n"
            saver.stdin.write("\n")
            saver.stdin.flush()
    assert saver.returncode == 0
    assert seen == sorted(seen)
    assert len(set(seen)) > n_saves / 4
    assert [path.name for path in (tmp_path / "run").glob(".model-*")] == []


def test_a_model_folder_that_goes_between_two_looks_at_it_is_not_taken_for_a_repo(screen, tmp_path, monkeypatch):
    model = fit(tiny_config(screen, tmp_path / "run")).folder / "model"
    looks, last_seen, is_dir = [], 0, Path.is_dir

    def look(path):
        looks.extend([path] * (path == model))
        return is_dir(path) and (path != model or len(looks) <= last_seen)

    monkeypatch.setattr(Path, "is_dir", look)
    for n_seen in range(5):
        looks.clear()
        last_seen = n_seen
        with suppress(FileNotFoundError):  # which from_pretrained waits for and tries again
            assert find_model(model).folder == model


LONG = ["training.n_steps=400", "training.validate_every=50"]  # steps enough to be stopped amid them


@pytest.fixture(scope="module")
def straight(screen, tmp_path_factory):
    """A run of 400 steps that nothing stopped."""
    folder = tmp_path_factory.mktemp("straight")
    fit(tiny_config(screen, folder, *LONG))
    return folder


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_the_same_command_goes_on_bit_identically(screen, straight, tmp_path, number):
    command = [
        sys.executable, "-m", "perturbdiff", "train", "--screen", str(screen), "--hold-out", "pert_0:type_0",
        "--out", str(tmp_path / "stopped"), "--recipe", DEFAULTS, *TINY, *LONG,
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    deadline = time.monotonic() + PATIENCE
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 5):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=PATIENCE)
    assert f"stopped     by {number.name}" in stdout, stderr
    saved = sorted(p.name for p in (tmp_path / "stopped" / "states").iterdir())
    assert saved != ["step_00000400"]
    adata = anndata.read_h5ad(screen)
    adata.write_h5ad(tmp_path / "moved.h5ad")
    adata.X = adata.X.toarray()[::-1].copy()
    adata.write_h5ad(tmp_path / "reversed.h5ad")
    command[command.index(str(screen))] = "reversed.h5ad"
    other = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert other.returncode == 2
    assert other.stderr.startswith("perturbdiff: error: the data of run folder")
    assert "other X in reversed.h5ad than in" in other.stderr
    assert other.stderr.count("\n") == 1
    command[command.index("reversed.h5ad")] = "moved.h5ad"
    again = subprocess.run([*command, "training.validate_every=70"], capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "resuming    from step" in again.stdout
    trained = [[line for line in losses(folder) if "loss" in line] for folder in (straight, tmp_path / "stopped")]
    assert trained[0] == trained[1]
    assert_same_weights(straight / "model", tmp_path / "stopped" / "model")
