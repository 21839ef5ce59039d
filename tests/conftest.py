"""Fixtures of more than one room."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(os.environ.get("PERTURBDIFF_GOLDEN", Path(__file__).parents[1] / "../shared/golden"))


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
