"""Values that counts can have: nothing between none and one.

B = sets, S = cells per set, G = genes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def with_whole_counts(x: Tensor, one: Tensor, uniform: Tensor) -> Tensor:
    """No cell holds less than one count: values v under it become one count or none, at random, their mean kept.

    Parameters
    ----------
    x
        (B, S, G) estimates, model units.
    one
        (B, S) one count in the control that each cell starts from; 0 where nobody knows, and values stay there.
    uniform
        (B, S, G) in 0..1.
    """
    one = one[..., None]
    return torch.where(x < one, torch.where(uniform * one < x, one, 0.0), x)
