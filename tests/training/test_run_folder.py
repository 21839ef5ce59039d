import json
import os

import pytest

from perturbdiff.training.loop import fit
from perturbdiff.training.run_folder import leave_marker
from tests.simulated import tiny_config, write_screen


def test_a_stopped_run_says_why_and_where_until_it_goes_on(tmp_path):
    config = tiny_config(write_screen(tmp_path), tmp_path / "run")
    fit(config, stop_at=2)
    marker = tmp_path / "run" / "stopped.json"
    assert json.loads(marker.read_text()) == {"stopped_by": "stop_at=2", "step": 2}
    (tmp_path / "run" / ".model-left").mkdir()  # by a kill during a save
    fit(config)
    assert not marker.exists()
    assert not (tmp_path / "run" / ".model-left").exists()


def test_a_marker_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    leave_marker(tmp_path, "SIGTERM", 3)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        leave_marker(tmp_path, "SIGUSR1", 9)
    assert json.loads((tmp_path / "stopped.json").read_text()) == {"stopped_by": "SIGTERM", "step": 3}
