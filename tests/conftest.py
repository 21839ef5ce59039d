"""Fixtures of more than one room."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from safetensors.torch import load_file
from torch import Tensor

from tests.processes import alive_with

# How long an example takes says how busy the machine is.
on_any_machine = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("whole", on_any_machine, max_examples=60)
settings.register_profile("fast", on_any_machine, max_examples=10)
settings.load_profile("whole")  # scripts/test.sh --fast asks for the other

# A shell starts what it puts into the background deaf to Ctrl-C, and so are the processes that it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
GOLDEN = Path(os.environ.get("PERTURBDIFF_GOLDEN", Path(__file__).parents[1] / "../shared/golden"))


@pytest.fixture(scope="session", autouse=True)
def nobody_left() -> Iterator[None]:
    """Processes that tests started and left behind are killed, and an error."""
    token = uuid.uuid4().hex
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STARTED_BY_TESTS", token)
        yield
    left = {}
    for pid in alive_with(f"STARTED_BY_TESTS={token}"):
        with suppress(OSError):
            left[pid] = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
            # These end with this process: they are its own libraries', and no test's.
            if any(own in left[pid] for own in ("multiprocessing.resource_tracker", "_inductor", "compile_worker")):
                del left[pid]
            else:
                os.kill(pid, signal.SIGKILL)
    assert left == {}


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, Tensor]]:
    """Reads a file of numbers that the published implementation gave."""
    if not GOLDEN.is_dir():
        pytest.skip(f"no golden numbers at {GOLDEN}; set PERTURBDIFF_GOLDEN to their folder")
    return lambda name: load_file(GOLDEN / f"{name}.safetensors")


@pytest.fixture
def agree(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Equality with golden numbers; the largest difference goes into the report (--junitxml)."""

    def check(actual: Tensor, golden: Tensor, what: str, rtol: float = 1e-4, atol: float = 1e-4) -> None:
        difference = (actual.detach().double() - golden.double()).abs().nan_to_num()
        largest = f"{difference.max().item():.1e} of {golden.double().abs().nan_to_num().max().item():.3g}"
        request.node.user_properties.append((what, largest))
        torch.testing.assert_close(actual.detach(), golden, rtol=rtol, atol=atol, equal_nan=True, check_dtype=False)

    return check
