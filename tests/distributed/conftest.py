"""Runs that several tests compare with, made once for all workers."""

from __future__ import annotations

import os

import pytest
from filelock import FileLock

from tests.distributed.launches import alone, finished, write_recipe


@pytest.fixture(scope="session")
def together(tmp_path_factory):
    """A folder that the workers of a test session share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "distributed"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def recipe(together):
    with FileLock(together / "recipe.lock"):
        if not (together / "one.txt").exists():
            alone(write_recipe(together), together / "one")
            (together / "one.txt").touch()
    return together / "recipe.yaml"


@pytest.fixture(scope="session")
def one(recipe, together):
    """The run of one process."""
    return together / "one"


@pytest.fixture(scope="session")
def undisturbed(recipe, together):
    """The run of two processes under an engine, without a fault."""

    def of(engine, *words):
        name = "_".join([engine, *words])
        with FileLock(together / f"{name}.lock"):
            said = together / f"{name}.txt"
            if not said.exists():
                said.write_text(finished(engine, recipe, together / name, *words))
            return together / name

    return of
