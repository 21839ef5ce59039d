import json

import pytest
import torch

from perturbdiff.config import DenoiserConfig, OptimConfig
from perturbdiff.model.conditioning import VocabSizes
from perturbdiff.model.denoiser import Denoiser
from perturbdiff.training.ema import EMA
from perturbdiff.training.optim import make_optimizer
from perturbdiff.training.state import Progress, TrainingState, load_latest, save_state, saved_states


def fresh_state(seed: int) -> TrainingState:
    torch.manual_seed(seed)
    denoiser = Denoiser(DenoiserConfig(width=8, depth=1, n_heads=1), 3, VocabSizes(1, 1, 1))
    return TrainingState(denoiser, EMA(denoiser, 0.9), make_optimizer(denoiser, OptimConfig()), Progress())


def take_step(state: TrainingState) -> None:
    generator = torch.Generator().manual_seed(state.progress.step)
    for parameter in state.denoiser.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    state.optimizer.step()
    state.ema.update(state.denoiser)
    state.progress.step += 1


def weights(state: TrainingState) -> list[torch.Tensor]:
    return [*state.denoiser.state_dict().values(), *state.ema.module.state_dict().values()]


def test_a_loaded_state_goes_on_bit_identically(tmp_path):
    straight, stopped, resumed = fresh_state(0), fresh_state(0), fresh_state(1)
    for _ in range(5):
        take_step(straight)
    for _ in range(3):
        take_step(stopped)
    stopped.progress.window = {"loss": 0.1 + 0.2}
    save_state(tmp_path, stopped, keep=2)
    assert load_latest(tmp_path, resumed)
    assert resumed.progress == Progress(step=3, ema_updates=3, window={"loss": 0.1 + 0.2})
    for _ in range(2):
        take_step(resumed)
    assert all(torch.equal(a, b) for a, b in zip(weights(straight), weights(resumed), strict=True))


def test_only_the_newest_states_are_kept(tmp_path):
    state = fresh_state(0)
    for _ in range(4):
        take_step(state)
        save_state(tmp_path, state, keep=2)
    assert [folder.name for folder in saved_states(tmp_path)] == ["step_00000004", "step_00000003"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000003", "step_00000004"]


@pytest.mark.parametrize("name", ["denoiser.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_newest_state_falls_back_to_the_one_before_and_says_so(tmp_path, capsys, name):
    state = fresh_state(0)
    for _ in range(2):
        take_step(state)
        save_state(tmp_path, state, keep=2)
    damaged = tmp_path / "step_00000002" / name
    damaged.write_bytes(damaged.read_bytes()[:-7])
    other = fresh_state(1)
    assert load_latest(tmp_path, other)
    assert other.progress.step == 1
    assert "step_00000002 is damaged" in capsys.readouterr().err


def test_a_failed_save_leaves_the_earlier_state_and_no_rubbish(tmp_path, monkeypatch):
    state = fresh_state(0)
    take_step(state)
    save_state(tmp_path, state, keep=1)
    take_step(state)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dumps", full)  # the last file of a state
    with pytest.raises(OSError, match="No space"):
        save_state(tmp_path, state, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]


def test_nothing_saved_is_nothing_loaded(tmp_path):
    assert not load_latest(tmp_path / "states", fresh_state(0))
