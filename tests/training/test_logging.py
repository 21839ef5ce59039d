import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from perturbdiff.config import load_config
from perturbdiff.training.logging import Metrics, MetricsFile, tag

WANDB = """
import json
calls = []
class Run:
    def define_metric(self, name, step_metric=None): calls.append(["define_metric", name, step_metric])
    def log(self, values): calls.append(["log", values])
    def finish(self): calls.append(["finish"])
def init(**settings):
    calls.append(["init", settings])
    return Run()
"""


def config_with(*trackers):
    return load_config(
        None, [f"training.trackers=[{','.join(trackers)}]"], {"out": "run", "data": {"screen": "screen.h5ad"}}
    )


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def scalars(folder):
    """Tag -> [(step, value)], as TensorBoard shows them."""
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A package that notes how it is called."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    import wandb

    yield wandb
    sys.modules.pop("wandb")


def test_resuming_forgets_lines_after_the_state_and_half_written_ones(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n\xff\x00\n[3]\n{"step": 3, "loss": 1.0}\n{"step": 4, "lo'
    )
    metrics = MetricsFile(path, resume_step=2)
    metrics.write(step=3, loss=1.5)
    assert lines(path) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 1.5}]


def test_a_fresh_run_starts_an_empty_file(tmp_path):
    MetricsFile(tmp_path / "metrics.jsonl", resume_step=0)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_values_that_are_not_finite_are_null_in_the_file_and_shown_in_trackers(tmp_path):
    with Metrics(tmp_path, 0, config_with("tensorboard")) as metrics:
        metrics.write(step=1, loss=float("nan"), lr=float("inf"), cells=7)
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": None, "lr": None, "cells": 7}]
    shown = scalars(tmp_path)
    assert str(shown["train/loss"]) == "[(1, nan)]"
    assert shown["train/lr"] == [(1, float("inf"))]


def test_tensorboard_groups_training_and_validation(tmp_path):
    with Metrics(tmp_path, 0, config_with("tensorboard")) as metrics:
        metrics.write(step=2, loss=0.5, grad_norm=2.0)
        metrics.write(step=2, validation_pearson_delta=0.25)
    assert scalars(tmp_path) == {
        "train/loss": [(2, 0.5)],
        "train/grad_norm": [(2, 2.0)],
        "validation/pearson_delta": [(2, 0.25)],
    }


def test_tensorboard_has_on_disk_what_was_written_when_a_run_is_killed(tmp_path):
    metrics = Metrics(tmp_path, 0, config_with("tensorboard"))
    for step in range(1, 4):
        metrics.write(step=step, loss=1.0)
    shown = scalars(tmp_path)
    metrics.close()
    assert shown == {"train/loss": [(1, 1.0), (2, 1.0), (3, 1.0)]}


def test_tensorboard_shows_a_step_once_after_a_resume(tmp_path):
    begun = int(time.time())
    with Metrics(tmp_path, 0, config_with("tensorboard")) as metrics:
        for step in range(1, 6):
            metrics.write(step=step, loss=float(step))
    while int(time.time()) == begun:  # files are in order by the second in their names, as those of any two processes
        time.sleep(0.01)
    with Metrics(tmp_path, 3, config_with("tensorboard")) as metrics:
        metrics.write(step=4, loss=40.0)
    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert scalars(tmp_path) == {"train/loss": expected}
    assert [(line["step"], line["loss"]) for line in lines(tmp_path / "metrics.jsonl")] == expected


@pytest.mark.parametrize("name", ["loss", "data_wait", "validation_loss", "validation_energy_distance_no_change"])
def test_no_two_names_share_a_tag(name):
    names = {"loss", "data_wait", "validation_loss", "validation_energy_distance_no_change"}
    assert tag(name) not in {tag(other) for other in names - {name}}
    assert tag(name).count("/") == 1


def test_a_tracker_that_fails_is_given_up_with_one_line_and_the_file_goes_on(tmp_path, monkeypatch, capsys):
    from torch.utils.tensorboard import SummaryWriter

    with Metrics(tmp_path, 0, config_with("tensorboard")) as metrics:
        metrics.write(step=1, loss=1.0)

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(SummaryWriter, "add_scalar", full)
        writer = metrics._trackers["tensorboard"]._writer
        for step in range(2, 5):
            metrics.write(step=step, loss=1.0)
    writer.close()
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "tensorboard is given up (OSError: [Errno 28] No space left on device); training goes on" in err
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_tracker_that_cannot_start_is_given_up(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    with Metrics(tmp_path, 0, config_with("tensorboard")) as metrics:
        metrics.write(step=1, loss=1.0)
    assert "warning: tensorboard is given up" in capsys.readouterr().err
    assert len(lines(tmp_path / "metrics.jsonl")) == 1


def test_a_metrics_file_that_fails_ends_the_run(tmp_path):
    with Metrics(tmp_path, 0, config_with("tensorboard")) as metrics:
        (tmp_path / "metrics.jsonl").unlink()
        (tmp_path / "metrics.jsonl").mkdir()
        with pytest.raises(IsADirectoryError):
            metrics.write(step=1, loss=1.0)


def test_without_trackers_only_the_file_is_written_and_nothing_is_imported(tmp_path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom perturbdiff.config import load_config\n"
        "from perturbdiff.training.logging import Metrics\n"
        "config = load_config(None, ['training.trackers=[]'], {'out': 'x', 'data': {'screen': 'x.h5ad'}})\n"
        f"with Metrics(Path({str(tmp_path)!r}), 0, config) as metrics: metrics.write(step=1, loss=1.0)\n"
        "assert not {'torch', 'tensorboard', 'wandb'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_wandb_keeps_its_run_over_resumptions_and_another_folder_has_another(tmp_path, wandb):
    config = config_with("wandb")
    for folder, resume_step in (("a", 0), ("a", 2), ("b", 0)):
        (tmp_path / folder).mkdir(exist_ok=True)
        with Metrics(tmp_path / folder, resume_step, config) as metrics:
            metrics.write(step=resume_step + 1, loss=0.5, validation_loss=0.25)
    given = [call[1] for call in wandb.calls if call[0] == "init"]
    assert given[0]["id"] == given[1]["id"] != given[2]["id"]
    assert {g["resume"] for g in given} == {"allow"}
    assert [g["name"] for g in given] == ["a", "a", "b"]
    assert {g["project"] for g in given} == {"perturbdiff"}
    assert given[0]["config"]["training"]["trackers"] == ["wandb"]
    assert Path(given[0]["dir"]) == tmp_path / "a"
    logged = [call[1] for call in wandb.calls if call[0] == "log"]
    assert logged[1] == {"step": 3, "train/loss": 0.5, "validation/loss": 0.25}
    assert [call[0] for call in wandb.calls].count("finish") == 3
    assert ["define_metric", "*", "step"] in wandb.calls


def test_an_id_that_a_kill_left_empty_is_made_anew(tmp_path, wandb):
    (tmp_path / "wandb_id").write_text("")
    Metrics(tmp_path, 0, config_with("wandb")).close()
    assert wandb.calls[0][1]["id"] == (tmp_path / "wandb_id").read_text().strip() != ""


@pytest.mark.parametrize("leftover", [False, True])
def test_a_missing_wandb_is_refused_before_anything_is_written(tmp_path, monkeypatch, leftover):
    monkeypatch.setattr(sys, "path", [str(tmp_path / "cwd")])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    (tmp_path / "cwd" / ("wandb" if leftover else "other")).mkdir(parents=True)  # runs that W&B left there
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match=r"training\.trackers wandb needs the wandb package; pip install 'pert"):
        Metrics(tmp_path / "run", 0, config_with("wandb"))
    assert not list((tmp_path / "run").iterdir())
