"""The Hub's own client, led to a local Hub: in this process, and in processes of their own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from perturbdiff.cli.main import main
from tests.localhub.server import SIGNATURE, LocalHub
from tests.processes import PATIENCE

TOKEN = "hf_SecretSecretSecret"  # good for everything; nobody may read it
SECRETS = (TOKEN, "SecretSecret", SIGNATURE)
ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def led_to(hub: LocalHub, home: Path, token: str | None = TOKEN) -> Iterator[None]:
    """What the client of this process asks goes to the Hub, what it keeps to `home`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        patch.delenv("PERTURBDIFF_REGISTRY", raising=False)
        patch.delenv("HF_TOKEN", raising=False)
        if token is not None:
            patch.setenv("HF_TOKEN", token)
        huggingface_hub.close_session()
        yield
        huggingface_hub.close_session()


def environment(url: str, home: Path, **variables: str) -> dict[str, str]:
    """Of a process that knows this Hub only."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PERTURBDIFF_"))}
    own = {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
        "NO_PROXY": "127.0.0.1,localhost",
        "OMP_NUM_THREADS": "1",
    }
    return {**inherited, **own, **variables}


def start(url: str, home: Path, *argv: object, **variables: str) -> subprocess.Popen[str]:
    """A `perturbdiff` process."""
    return subprocess.Popen(
        [sys.executable, "-m", "perturbdiff", *map(str, argv)],
        cwd=ROOT,
        env=environment(url, home, **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    """What a process printed, which must end with this code and say no secret."""
    try:
        out, err = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    assert process.returncode == code, f"exit {process.returncode}\n{out}\n{err}"
    without_secrets(out + err)
    return out, err


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line of a command that must fail, and that says no secret, with --debug neither."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in argv])
    said = capsys.readouterr()
    without_secrets(said.out + said.err + "".join(traceback.format_exception(stop.value.__context__)))
    lines = [line for line in said.err.splitlines() if line.startswith("perturbdiff: ")]
    assert stop.value.code == 2
    assert said.err.endswith(f"{lines[0]}\n")
    assert len(lines) == 1
    assert lines[0].isprintable()
    return lines[0].removeprefix("perturbdiff: error: ")


def without_secrets(text: str | bytes) -> None:
    content = text.encode() if isinstance(text, str) else text
    for secret in SECRETS:
        assert secret.encode() not in content


def no_secrets_in(folder: Path) -> None:
    """Look into every file below a folder."""
    for path in folder.rglob("*"):
        assert not any(secret in str(path) for secret in SECRETS)
        if path.is_file():
            without_secrets(path.read_bytes())
