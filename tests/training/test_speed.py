import json

import pytest
import torch

from perturbdiff.training import speed
from perturbdiff.training.loop import fit
from perturbdiff.training.speed import WARM_UP_STEPS, Pace, Trace
from tests.simulated import tiny_config, write_screen


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when told."""
    now = [50.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    return now


def wait(pace, clock, seconds):
    with pace.waiting():
        clock[0] += seconds


def test_cells_per_second_are_those_since_the_last_lap(clock):
    pace = Pace(cells_seen=1000)  # of a run that goes on
    clock[0] += 4
    assert pace.lap(1200) == {"cells_per_s": 50.0, "data_wait": 0.0}
    clock[0] += 2
    assert pace.lap(1201)["cells_per_s"] == 0.5


def test_validation_and_saving_do_not_count(clock):
    pace = Pace(0)
    clock[0] += 3
    with pace.paused():
        clock[0] += 1000
    clock[0] += 1
    assert pace.lap(100)["cells_per_s"] == 25.0
    with pace.paused():
        clock[0] += 1000
    clock[0] += 10
    assert pace.lap(200)["cells_per_s"] == 10.0


def test_the_share_of_waiting_is_that_of_the_slowest_process(clock):
    """Each waits by itself, and all for the slowest: what it waited is added in each step."""
    pace = Pace(0)
    for slowest in (0.5, 1.5):
        wait(pace, clock, 0.25)
        assert pace.waited == 0.25
        pace.add_wait(slowest)
        clock[0] += 3.75
    assert pace.lap(10)["data_wait"] == 0.25  # 2 of 8 seconds
    clock[0] += 1
    assert pace.lap(20)["data_wait"] == 0.0


def test_a_wait_is_that_of_one_step_only(clock):
    pace = Pace(0)
    wait(pace, clock, 2)
    wait(pace, clock, 0.5)
    assert pace.waited == 0.5


def test_no_share_is_above_one(clock):
    """Clocks of processes differ, and a wait may have begun before the lap."""
    pace = Pace(0)
    clock[0] += 1
    pace.add_wait(1.001)
    assert pace.lap(5)["data_wait"] == 1.0


def test_a_lap_of_no_time_is_a_number(clock):
    values = Pace(0).lap(5)
    assert values["cells_per_s"] > 0
    assert values["data_wait"] == 0.0


def steps_of(file):
    events = json.loads(file.read_text())["traceEvents"]
    return {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep#")}


@pytest.mark.parametrize(("n_wanted", "n_taken", "n_traced"), [(2, 7, 2), (1, 4, 1), (5, 5, 3)])
def test_a_trace_holds_the_steps_that_were_asked_for_or_were_taken(tmp_path, n_wanted, n_taken, n_traced):
    with Trace(tmp_path / "profile", 3, n_wanted) as trace:
        for _ in range(n_taken):
            torch.ones(3).add(1)
            trace.step()
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["rank_00003.json"]
    names = steps_of(tmp_path / "profile" / "rank_00003.json")
    assert names == {f"ProfilerStep#{WARM_UP_STEPS + n}" for n in range(n_traced)}
    assert "aten::add" in (tmp_path / "profile" / "rank_00003.json").read_text()


def test_no_trace_is_written_unless_asked_for(tmp_path):
    with Trace(tmp_path / "profile", 0, 0) as trace:
        trace.step()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_traces_the_steps_that_its_settings_ask_for(tmp_path):
    screen = write_screen(tmp_path)
    fit(tiny_config(screen, tmp_path / "run", "training.profile_steps=2"))
    assert [path.name for path in (tmp_path / "run" / "profile").iterdir()] == ["rank_00000.json"]
    file = tmp_path / "run" / "profile" / "rank_00000.json"
    assert len(steps_of(file)) == 2
    assert "fused_adamw" in file.read_text()
    fit(tiny_config(screen, tmp_path / "other"))
    assert not (tmp_path / "other" / "profile").exists()
