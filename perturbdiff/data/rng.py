"""Random generators named by what they are for, so that no draw depends on what was drawn before it."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    import torch


def numpy_generator(seed: int, purpose: str, *key: int) -> np.random.Generator:
    """The generator of (seed, purpose, key), the same on every machine and in every process."""
    return np.random.Generator(np.random.Philox(_sequence(seed, purpose, key)))


def torch_generator(device: torch.device | str, seed: int, purpose: str, *key: int) -> torch.Generator:
    """As `numpy_generator`, on a device. Draws differ between kinds of device, not between runs on one."""
    import torch  # a second and 180 MB that the processes of a build do without

    state = int(_sequence(seed, purpose, key).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator(device=device).manual_seed(state)


SMALL = 1024  # permutations up to here are made whole
ROUNDS = 8


def permuted(n: int, positions: np.ndarray, seed: int, purpose: str, *key: int) -> np.ndarray:
    """What a keyed random permutation of 0..n-1 holds at `positions`, (len(positions),) int64.

    A large one is evaluated only there: a set of a billion cells is found without shuffling a billion.

    Notes
    -----
    A Feistel network over the next power of four, walked on until the value is under n (Black & Rogaway 2002,
    "Ciphers with arbitrary finite domains"); its round function is the finaliser of SplitMix64.
    """
    if n <= SMALL:
        return numpy_generator(seed, purpose, *key).permutation(n)[positions]
    half = np.uint64(((n - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << int(half)) - 1)
    keys = _sequence(seed, purpose, key).generate_state(ROUNDS, np.uint64)
    values = np.asarray(positions).astype(np.uint64)
    outside = np.arange(len(values))
    while len(outside):
        left, right = values[outside] >> half, values[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (_mixed(right + round_key) & mask)
        values[outside] = left << half | right
        outside = outside[values[outside] >= n]
    return values.astype(np.int64)


def uniform_at(positions: np.ndarray, seed: int, purpose: str, *key: int) -> np.ndarray:
    """What a keyed stream of uniform numbers in 0..1 holds at these positions, in any order, at a few ns each.

    Notes
    -----
    SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators"), whose state is a counter.
    """
    start = _sequence(seed, purpose, key).generate_state(1, np.uint64)[0]
    state = start + (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    return (_mixed(state) >> np.uint64(11)) * 2.0**-53


def _mixed(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def cell_order_key(names: np.ndarray, seed: int) -> np.ndarray:
    """(n,) uint64 by which the cells of a condition are ordered: a keyed hash (SipHash) of their names.

    The order is as good as random and depends on no other cell, so that a screen and an atlas built from it in any
    number of parts hold their cells in one order.
    """
    return pd.util.hash_array(np.asarray(names, dtype=object), hash_key=f"{seed:016d}", categorize=False)


def _sequence(seed: int, purpose: str, key: tuple[int, ...]) -> np.random.SeedSequence:
    if seed < 0:
        raise ValueError(f"seed ({seed}) must not be negative.")
    # With the key's length: a SeedSequence does not see trailing zeros.
    words = [seed, zlib.crc32(purpose.encode()), len(key), *key]
    # The same either way, but an array is read several times faster.
    return np.random.SeedSequence(np.array(words, np.uint32) if max(words) < 2**32 else words)
