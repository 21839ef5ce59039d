"""A few of the faults of scripts/attack/faults.py: real processes, killed at some of their file operations."""

import importlib.util
import re
import subprocess
import sys

import pytest

from tests.processes import PATIENCE
from tests.screens import ROOT

pytestmark = pytest.mark.slow
SCRIPT = ROOT / "scripts" / "attack" / "faults.py"


@pytest.mark.parametrize(
    ("words", "n"),
    [
        (["--only", "predict", "--how", "kill", "--first", "4", "--every", "4"], 5),
        (["--only", "finetune", "--first", "9", "--every", "31"], 4),
    ],
    ids=["predict", "finetune"],
)
def test_the_same_command_after_a_fault_leaves_the_bytes_of_an_undisturbed_run(words, n):
    done = subprocess.run(
        [sys.executable, SCRIPT, *words], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    faults, harm = re.search(r"^(\d+) faults, (\d+) did harm$", done.stdout, re.MULTILINE).groups()
    assert int(faults) >= n
    assert harm == "0"


def test_harm_is_found(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("faults", SCRIPT)
    faults = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(faults)
    (tmp_path / "a").write_text("1")
    (tmp_path / ".a.host.1.partial").write_text("2")
    whole = faults.contents(tmp_path)
    ends = [faults.Ended(-9, "", []), faults.Ended(0, "", [])]

    def judged(*said, undisturbed=whole):
        left = list(said)
        monkeypatch.setattr(faults, "run", lambda *given: left.pop(0))
        return faults.judge(undisturbed, (), tmp_path, (1, "kill"))

    assert judged(*ends) is None
    assert "other contents of a" in judged(*ends, undisturbed={"a": b"2"})
    assert "other contents of a, b" in judged(*ends, undisturbed={"b": b"1"})
    assert "a traceback" in judged(faults.Ended(1, "Traceback (most", []), ends[1])
    assert "the same command ended with 2" in judged(ends[0], faults.Ended(2, "perturbdiff: error: no", []))
    assert judged(ends[0], faults.Ended(2, "perturbdiff: error: output a exists; choose", [])) is None
