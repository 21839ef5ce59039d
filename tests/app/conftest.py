"""A tiny model whose labels are hostile to a page, the app as a process of its own, and a real browser."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import anndata
import pytest

from perturbdiff import PerturbDiff
from perturbdiff.training.loop import fit
from tests.processes import PATIENCE
from tests.screens import ROOT
from tests.simulated import tiny_config, write_screen

HOSTILE = '<img src=x onerror="alert(1)">{{1}}${alert(2)}$_a$'
CHROMIUM = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="session")
def screen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Simulated cells; one perturbation, one cell type and every gene have names that a page must escape."""
    folder = tmp_path_factory.mktemp("screen")
    adata = anndata.read_h5ad(write_screen(folder))
    for column, label in (("perturbation", "pert_2"), ("cell_type", "type_1")):
        adata.obs[column] = [HOSTILE if name == label else name for name in adata.obs[column].astype(str)]
    adata.var_names = [f"<b>{i}</b>$_a$" for i in range(adata.n_vars)]
    path = folder / "bundled.h5ad"
    adata.write_h5ad(path)
    return path


@pytest.fixture(scope="session")
def model_folder(screen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("space") / "run"
    return fit(tiny_config(screen, out, "training.n_steps=20", "optim.lr=0.01", hold_out=())).folder / "model"


@pytest.fixture(scope="session")
def model(model_folder: Path) -> PerturbDiff:
    return PerturbDiff.from_pretrained(model_folder, device="cpu")


@pytest.fixture(scope="session")
def chromium() -> str:
    found = shutil.which("chromium")
    if found is None:
        pytest.skip("no chromium here: the app is not tried in a browser; install it (apt-get install chromium)")
    return found


class App:
    """A running app: its address and the folder where it keeps files."""

    def __init__(self, folder: Path, *words: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}/"
        self.files, self.log = folder / "files", folder / "log"
        self.files.mkdir()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(self.files), "OMP_NUM_THREADS": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "perturbdiff", "app", *words, "--port", str(port)],
                env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        line = self.process.stdout.readline()
        assert line.startswith("serving"), self.log.read_text()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        finally:
            self.process.stdout.close()

    def kept(self) -> list[str]:
        """Names of the files that it keeps on disk."""
        return sorted(path.name for path in self.files.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def app(chromium: str, model_folder: Path, screen: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    """The app with controls of its own; its log must stay free of errors."""
    words = (str(model_folder), "--controls", str(screen), "--max-cells", "1000", "--max-upload", "1")
    app = App(tmp_path_factory.mktemp("app"), *words)
    try:
        yield app
    finally:
        app.stop()
    assert "Traceback" not in app.log.read_text()
    assert app.kept() == []
