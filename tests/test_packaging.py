import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
TEXTS = [
    *(ROOT / "perturbdiff").rglob("*.py"), *(ROOT / "recipes").rglob("*.*"), *(ROOT / "hub").rglob("*.*"),
    *(ROOT / "scripts").rglob("*.*"), *ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"),
]  # fmt: skip


SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
EXTRAS = SETUP["options.extras_require"]


def requirements(*extras):
    """What setup.cfg asks for, by name, with these extras and those that they name."""
    texts = [SETUP["options"]["install_requires"], *(EXTRAS[extra] for extra in extras)]
    asked = [Requirement(line) for text in texts for line in text.split("\n") if line]
    named = {extra for requirement in asked if requirement.name == "perturbdiff" for extra in requirement.extras}
    own = {canonicalize_name(asking.name): asking for asking in asked if asking.name != "perturbdiff"}
    return own | (requirements(*named) if named else {})


def pins(name):
    """Version by package of a file of constraints."""
    found = re.findall(r"^([\w-]+)==(\S+)$", (ROOT / name).read_text(), re.MULTILINE)
    return {canonicalize_name(package): Version(version) for package, version in found}


def test_every_extra_that_a_message_or_text_names_can_be_installed():
    found = re.findall(r"(?:perturbdiff|'\.|-e \.)\[([\w,]+)\]", "\n".join(path.read_text() for path in TEXTS))
    named = {extra for names in found for extra in names.split(",")}
    assert {"app", "chem", "deepspeed", "lora", "wandb"} <= named <= set(EXTRAS)


def test_the_table_of_extras_names_all():
    install = (ROOT / "docs" / "start.md").read_text().split("\n## ")[1]
    assert {*re.findall(r"^\| `(\w+)` \| ", install, re.MULTILINE), "test"} == set(EXTRAS)


def test_the_pinned_versions_are_allowed_and_pin_everything_that_the_suite_needs():
    pinned, needed = pins("constraints.txt"), requirements("test", "eval", "docs")
    assert set(needed) == set(pinned)
    assert [name for name, requirement in needed.items() if pinned[name] not in requirement.specifier] == []


def test_the_oldest_versions_are_the_lower_bounds_of_setup_cfg():
    asked = requirements(*set(EXTRAS) - {"test", "eval", "docs"})
    bounds = {name: [Version(s.version) for s in asked[name].specifier if s.operator == ">="] for name in asked}
    assert bounds == {name: [version] for name, version in pins("constraints-oldest.txt").items()}


def test_the_matrix_has_every_python_that_setup_cfg_names_and_both_bounds():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    named = re.findall(r"Python :: (3\.\d+)", SETUP["metadata"]["classifiers"])
    assert jobs["pinned"]["strategy"]["matrix"]["python"] == named
    bounds = {one["name"]: one for one in jobs["bounds"]["strategy"]["matrix"]["include"]}
    assert {name: (one["python"], one["constraints"]) for name, one in bounds.items()} == {
        "oldest": (named[0], "-c constraints-oldest.txt"),
        "newest": (named[-1], ""),
    }


def test_the_hooks_before_a_commit_are_the_checks_of_the_script():
    [repo] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = [hook["entry"].removesuffix(" --fix") for hook in repo["hooks"]]
    script = (ROOT / "scripts/test.sh").read_text().splitlines()
    checks = [line for line in script if line.startswith((".venv/bin/ruff", ".venv/bin/mypy"))]
    assert hooks == [re.sub(r"( --check)?( \.)?( &.*)?$", "", line) for line in checks]


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
