import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of what builds one, so that nothing of an earlier build is in it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("perturbdiff", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", out]
    done = subprocess.run([*command, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = out.iterdir()
    return path


@pytest.mark.slow
def test_a_wheel_has_every_file_of_the_package_and_every_recipe_and_nothing_else(wheel):
    files = [path for name in ("perturbdiff", "recipes") for path in (ROOT / name).rglob("*") if path.is_file()]
    files = [path.relative_to(ROOT) for path in files if "__pycache__" not in path.parts]
    expected = {("perturbdiff" / path if path.parts[0] == "recipes" else path): path for path in files}
    with zipfile.ZipFile(wheel) as archive:
        found = {Path(name): archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
    assert len(expected) > 100
    assert found == {name: (ROOT / path).read_bytes() for name, path in expected.items()}


@pytest.mark.slow
def test_recipes_are_found_in_an_installed_wheel_away_from_the_repository(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-m", "perturbdiff", "recipes"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "train/cross_cell_type" in done.stdout, done.stderr
    assert str(tmp_path / "site" / "perturbdiff" / "recipes") in done.stdout
