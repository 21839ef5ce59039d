"""DDP, ZeRO-1, 2 and 3 train as one process does, given the same sets a step. Float32, real processes."""

import pytest

from perturbdiff.config import load_config
from perturbdiff.training.dataset import TrainingSet
from tests.distributed.launches import (
    ENGINES,
    LAST,
    NAMES,
    Held,
    Launch,
    alone,
    assert_close,
    assert_same,
    errors,
    finished,
    marker,
    steps,
)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_train_as_one(one, undisturbed, together, engine):
    run = undisturbed(engine)
    assert_close(run, one)
    output = (together / f"{engine}.txt").read_text()
    assert f"2 processes under {NAMES[engine]}\n" in output
    assert steps(run) == [8, 12]
    # What a user sees: one summary, one bar, nobody's warnings.
    assert output.count("denoiser    ") == 1
    assert "Warning" not in output
    assert "rank" not in output


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_gradients_accumulated_over_parts_of_a_step_are_those_of_the_step(one, undisturbed, engine):
    assert_close(undisturbed(engine, "training.accumulation_steps=2"), one)


def test_three_processes_train_as_one_and_go_on_bit_identically(recipe, tmp_path):
    # Large enough for several of the buckets in which DDP sums gradients: their order decides the last digits.
    wide = ["denoiser.width=144", "training.n_steps=9", "training.validate_every=9"]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    alone(recipe, tmp_path / "one", *wide)
    finished("ddp", recipe, straight, *wide, n=3)
    assert_close(straight, tmp_path / "one")
    held = Held(tmp_path / "held", 5)
    with Launch("ddp", recipe, stopped, *wide, n=3, fault=held.fault) as run:
        held.wait(run, n=3)
        run.launcher.terminate()
        assert run.ends() == 1
        assert errors(run.output()) == []
    assert marker(stopped) == {"stopped_by": "SIGTERM", "step": 5}
    finished("ddp", recipe, stopped, *wide, n=3)
    assert_same(stopped, straight)


@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_a_process_whose_lanes_have_no_shards_left_waits_and_all_train_as_one(recipe, tmp_path, engine):
    folder = recipe.parent
    words = [
        f"data.atlases=[{{path: {folder}/marginal, sets: marginal}}, {{path: {folder}/perturbed}}]",
        "data.streamed=true",
        "data.n_streams=4",
        "data.sets_per_batch=4",
    ]
    config = load_config(recipe, words, {"out": "unused"})
    sampler = TrainingSet.from_atlases(config).train.sampler(config)
    sizes = [[len(sampler.batch(*sampler.position(step), rank, 2)) for rank in (0, 1)] for step in range(LAST)]
    assert any(0 in of_ranks for of_ranks in sizes)
    alone(recipe, tmp_path / "one", *words)
    finished(engine, recipe, tmp_path / "run", *words)
    assert_close(tmp_path / "run", tmp_path / "one")
