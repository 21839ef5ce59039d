import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from perturbdiff.data.screen import Screen
from perturbdiff.pretrained import PerturbDiff
from perturbdiff.training.loop import train
from tests.simulated import TINY, tiny_config, write_screen


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    return write_screen(tmp_path_factory.mktemp("screen"))


def losses(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "cells_per_s"} for line in lines]


def weights(folder):
    return dict(PerturbDiff.from_pretrained(folder, device="cpu").denoiser.state_dict())


def assert_same_weights(a, b):
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("words", [(), ("training.log_every=4", "diffusion.kernel=rbf"), ("denoiser.attention=joint",)])
def test_stopping_and_running_again_continues_bit_identically(screen, tmp_path, words):
    straight = train(tiny_config(screen, tmp_path / "straight", *words))
    assert straight.stopped_by is None
    config = tiny_config(screen, tmp_path / "stopped", *words)
    first = train(config, stop_at=3)
    assert (first.step, first.stopped_by) == (3, "stop_at=3")
    second = train(config)
    assert (second.step, second.stopped_by) == (6, None)
    assert losses(tmp_path / "straight") == losses(tmp_path / "stopped")
    assert_same_weights(tmp_path / "straight" / "model", tmp_path / "stopped" / "model")


def test_another_seed_gives_other_losses(screen, tmp_path):
    train(tiny_config(screen, tmp_path / "a"))
    train(tiny_config(screen, tmp_path / "b", "training.seed=1"))
    assert losses(tmp_path / "a") != losses(tmp_path / "b")


def test_the_global_random_state_is_neither_read_nor_moved(screen, tmp_path):
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    train(tiny_config(screen, tmp_path / "a"))
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()
    torch.manual_seed(2)
    train(tiny_config(screen, tmp_path / "b"))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_a_finished_run_is_not_trained_again(screen, tmp_path):
    config = tiny_config(screen, tmp_path / "run")
    train(config)
    before = losses(tmp_path / "run")
    assert train(config).step == 6
    assert losses(tmp_path / "run") == before


def test_training_lowers_the_validation_loss(screen, tmp_path):
    # A condition whose perturbation is trained in the other batch of the same cell type.
    words = ("split.validation=['pert_1:type_1:batch_1']", "training.n_steps=60", "training.validate_every=20")
    train(tiny_config(screen, tmp_path / "run", *words, "optim.lr=0.005"))
    values = [line["validation_loss"] for line in losses(tmp_path / "run") if "validation_loss" in line]
    assert len(values) == 3
    assert values[-1] < values[0]


def test_validation_does_not_change_training(screen, tmp_path):
    often = tiny_config(screen, tmp_path / "often", "split.validation=[pert_1:type_1]", "training.validate_every=1")
    seldom = tiny_config(screen, tmp_path / "seldom", "split.validation=[pert_1:type_1]", "training.validate_every=6")
    train(often)
    train(seldom)
    trained = [[line for line in losses(tmp_path / name) if "loss" in line] for name in ("often", "seldom")]
    assert trained[0] == trained[1]


def test_early_stopping_ends_the_run_and_keeps_the_best_weights(screen, tmp_path):
    # A learning rate that ruins the weights: the first validation is the best one.
    words = (
        "split.validation=[pert_1:type_1]", "training.early_stop_patience=2", "optim.lr=0.3", "optim.warmup_steps=0",
        "training.n_steps=40", "optim.ema_decay=0.0",
    )  # fmt: skip
    result = train(tiny_config(screen, tmp_path / "run", *words))
    values = {line["step"]: line["validation_loss"] for line in losses(tmp_path / "run") if "validation_loss" in line}
    best = min(values, key=values.get)
    assert result.step < 40
    assert result.step == best + 4  # two validations, two steps apart
    assert result.model.training["steps"] == best
    stopped_at_best = tiny_config(screen, tmp_path / "best", *words)
    train(stopped_at_best, stop_at=best)
    assert_same_weights(tmp_path / "run" / "model", tmp_path / "best" / "model")


def test_early_stopping_resumes_bit_identically(screen, tmp_path):
    words = ("split.validation=[pert_1:type_1]", "training.early_stop_patience=50", "training.n_steps=8")
    train(tiny_config(screen, tmp_path / "straight", *words))
    stopped = tiny_config(screen, tmp_path / "stopped", *words, "training.save_every=3")
    train(stopped, stop_at=5)
    train(stopped)
    assert losses(tmp_path / "straight") == losses(tmp_path / "stopped")
    assert_same_weights(tmp_path / "straight" / "model", tmp_path / "stopped" / "model")


def test_a_non_finite_loss_stops_with_step_and_condition_and_keeps_the_state(screen, tmp_path):
    config = tiny_config(screen, tmp_path / "run")
    train(config, stop_at=2)
    poisoned = Screen.read(screen, config.data)
    cells = (poisoned.obs["perturbation"] == "pert_2").to_numpy()
    poisoned.expression.library_size[cells] = 1e-38  # counts over it are beyond float32
    with pytest.raises(FloatingPointError, match=r"step [3-6] .*perturbation 'pert_2', cell type 'type_"):
        train(config, screen=poisoned)
    assert PerturbDiff.from_pretrained(tmp_path / "run" / "model").training["steps"] == 2


def test_other_settings_are_refused_in_a_run_folder_and_named(screen, tmp_path):
    train(tiny_config(screen, tmp_path / "run"), stop_at=2)
    with pytest.raises(ValueError, match=r"optim\.lr was 0\.0005, is 0\.1"):
        train(tiny_config(screen, tmp_path / "run", "optim.lr=0.1"))
    train(tiny_config(screen, tmp_path / "run", "training.save_every=50"))  # moves no number


def test_bad_data_writes_nothing(screen, tmp_path):
    with pytest.raises(ValueError, match="pert_99"):
        train(tiny_config(screen, tmp_path / "run", hold_out=("pert_99",)))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_the_same_command_goes_on_bit_identically(screen, tmp_path, number):
    train(tiny_config(screen, tmp_path / "straight", "training.n_steps=400"))
    command = [
        sys.executable, "-m", "perturbdiff", "train", "--screen", str(screen), "--hold-out", "pert_0:type_0",
        "--out", str(tmp_path / "stopped"), *TINY, "training.n_steps=400",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 5):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=120)
    assert f"stopped     by {number.name}" in stdout, stderr
    saved = sorted(p.name for p in (tmp_path / "stopped" / "states").iterdir())
    assert saved != ["step_00000400"]
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "resuming    from step" in again.stdout
    assert losses(tmp_path / "straight") == losses(tmp_path / "stopped")
    assert_same_weights(tmp_path / "straight" / "model", tmp_path / "stopped" / "model")
