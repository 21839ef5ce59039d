"""Pieces of the denoiser: time embedding, modulation, MLP, attention over the cells of a set.

B = sets, S = cells per set, D = width. Conditioning vectors are (B, 1, D): computed once per set and broadcast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

TIME_FREQUENCIES = 128
INITIALISED_BY = ("normal_", "uniform_", "fill_", "zero_")


@contextmanager
def shapes_only() -> Iterator[None]:
    """Modules that are made within have names and shapes, on the meta device, and no values."""
    with _NotInitialised(), torch.device("meta"):
        yield


class _NotInitialised(TorchFunctionMode):
    # To draw numbers that nobody keeps, torch imports its compiler: two seconds.
    def __torch_function__(
        self, function: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init" or function.__name__ in INITIALISED_BY:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


class TimeEmbedding(nn.Module):
    """t -> (B, 1, D): cosines and sines of t at 128 frequencies from 1 to 1/10000, then an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * TIME_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        i = torch.arange(TIME_FREQUENCIES, dtype=torch.float32, device=t.device)
        frequencies = torch.exp(-math.log(10_000) * i / TIME_FREQUENCIES)
        angles = t[:, None].float() * frequencies  # (B, 128)
        embedded = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(embedded.to(next(self.mlp.parameters()).dtype))[:, None]  # (B, 1, D)


class Modulation(nn.Module):
    """adaLN: n vectors of width D from the conditioning vector, (B, 1, D) -> n x (B, 1, D)."""

    def __init__(self, width: int, n: int) -> None:
        super().__init__()
        self.n = n
        self.linear = nn.Linear(width, n * width)

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(c)).chunk(self.n, dim=-1)


def norm(x: Tensor) -> Tensor:
    """LayerNorm without parameters; adaLN brings scale and shift."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class MLP(nn.Module):
    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        hidden = round(width * ratio)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class RMSNorm(nn.RMSNorm):
    """With the weight in the input's type: under autocast torch would warn and leave its fused kernel."""

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


class Attention(nn.Module):
    """Softmax attention over the tokens of each set; RMS-normalised queries and keys (Henry et al. 2020)."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = RMSNorm(width // n_heads, eps=1e-6)
        self.k_norm = RMSNorm(width // n_heads, eps=1e-6)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, S, D) -> (B, S, D); `mask` is (B, S), True where a token is a real cell.

        A set without any (padding of the last batch) attends to all its tokens instead: its output is never read, and
        a softmax over nothing is NaN.
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, S, D / heads)
        allowed = None if mask is None else (mask | ~mask.any(-1, keepdim=True))[:, None, None, :]  # (B, 1, 1, S)
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, attn_mask=allowed)
        return self.proj(out.transpose(1, 2).flatten(-2))
