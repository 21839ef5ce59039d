"""Random generators named by what they are for, so that no draw depends on what was drawn before it."""

from __future__ import annotations

import zlib

import numpy as np
import torch


def numpy_generator(seed: int, purpose: str, *key: int) -> np.random.Generator:
    """The generator of (seed, purpose, key), the same on every machine and in every process."""
    return np.random.Generator(np.random.Philox(_sequence(seed, purpose, key)))


def torch_generator(device: torch.device | str, seed: int, purpose: str, *key: int) -> torch.Generator:
    """As `numpy_generator`, on a device. Draws differ between kinds of device, not between runs on one."""
    state = int(_sequence(seed, purpose, key).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator(device=device).manual_seed(state)


def _sequence(seed: int, purpose: str, key: tuple[int, ...]) -> np.random.SeedSequence:
    if seed < 0:
        raise ValueError(f"seed ({seed}) must not be negative.")
    # With the key's length: a SeedSequence does not see trailing zeros.
    return np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), len(key), *key])
