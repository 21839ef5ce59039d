"""Weights and AdamW's moments as whole tensors by name, whatever part of them a process holds under its engine.

DDP holds everything everywhere. ZeRO-1 and 2 hold a stretch of each group of moments, flattened into one tensor. ZeRO-3
holds a stretch of each parameter and of its moments. What is written whole goes on under any engine and on any number
of processes. Functions that return whole tensors must be called by all processes; where they are not `wanted`, they are
dropped one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

MOMENTS = ("exp_avg", "exp_avg_sq")


def stretch(whole: Tensor, rank: int, world_size: int) -> Tensor:
    """The `rank`-th of equal stretches of a tensor, flat; the last ones may be shorter or empty. A view."""
    flat = whole.reshape(-1)
    length = -(-len(flat) // world_size)
    return flat[rank * length : (rank + 1) * length]


def own_stretch(parameter: Any, rank: int, world_size: int) -> Tensor:
    """`stretch` of a parameter, of which ZeRO-3 holds no more than that."""
    if not hasattr(parameter, "ds_tensor"):
        return stretch(parameter.detach(), rank, world_size)
    held, start = parameter.ds_tensor.detach(), rank * parameter.ds_tensor.numel()
    return held[: max(parameter.ds_numel - start, 0)]  # without the padding


def joined(own: Tensor, shape: torch.Size, world_size: int) -> Tensor:
    """The whole of which each process gives its `stretch`; on one process a view."""
    if world_size == 1:
        return own.view(shape)
    padded = torch.zeros(-(-shape.numel() // world_size), dtype=own.dtype, device=own.device)
    padded[: len(own)] = own
    whole = torch.empty(len(padded) * world_size, dtype=own.dtype, device=own.device)
    dist.all_gather(list(whole.split(len(padded))), padded)
    return whole[: shape.numel()].view(shape)


def on_host(tensor: Tensor) -> Tensor:
    """A copy in the memory of this machine, contiguous: what trains on does not change it."""
    return tensor.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)


def full_weights(denoiser: nn.Module, wanted: bool = True) -> dict[str, Tensor]:
    """The weights by name, `on_host`."""
    weights = {}
    for name, p in denoiser.named_parameters():
        whole = _full_zero3(p, None) if hasattr(p, "ds_id") else p.detach()
        if wanted:
            weights[name] = on_host(whole)
    return weights


def full_moments(denoiser: nn.Module, optimizer: Any, wanted: bool = True) -> dict[str, Tensor]:
    """`step`, and exp_avg and exp_avg_sq by moment and name of what trains, `on_host`; empty before the first step.

    `optimizer` is what Accelerate prepared.
    """
    states = _adamw(optimizer).state
    if not states:
        return {}
    flat_of, moments = _flat_of(optimizer), {"step": on_host(next(iter(states.values()))["step"])}
    for name, p in _trained(denoiser):
        for moment in MOMENTS:
            if hasattr(p, "ds_id"):
                whole = _full_zero3(p, moment)
            elif p in flat_of:
                whole = torch.zeros(p.numel(), device=p.device)
                ours, flats = _fragment(p, whole, states[flat_of[p]][moment])
                ours.copy_(flats)
                dist.all_reduce(whole)  # of each number one process has the value, the others 0
                whole = whole.view_as(p)
            else:
                whole = states[p][moment].detach()
            if wanted:
                moments[f"{moment}.{name}"] = on_host(whole)
    return moments if wanted else {}


def load_moments(denoiser: nn.Module, optimizer: Any, moments: Mapping[str, Tensor]) -> None:
    """Take up what `full_moments` gave, before the first step of this process."""
    if not moments:
        return
    states, flat_of = _adamw(optimizer).state, _flat_of(optimizer)
    zero3 = getattr(optimizer.optimizer, "fp32_partitioned_groups_flat", [])
    for flat in [*zero3, *{id(flat): flat for flat in flat_of.values()}.values()]:
        states[flat] = {"step": _step_of(moments, flat), **{m: torch.zeros_like(flat) for m in MOMENTS}}
    for name, p in _trained(denoiser):
        for moment in MOMENTS:
            whole = moments[f"{moment}.{name}"].to(p.device)
            if hasattr(p, "ds_id"):
                _set_zero3(p, whole, moment)
            elif p in flat_of:
                ours, flats = _fragment(p, whole.view(-1), states[flat_of[p]][moment])
                flats.copy_(ours)
            else:
                states[p] |= {"step": _step_of(moments, p), moment: whole}


def _trained(denoiser: nn.Module) -> list[tuple[str, Any]]:
    return [(name, p) for name, p in denoiser.named_parameters() if p.requires_grad]


def _adamw(optimizer: Any) -> torch.optim.AdamW:
    while not isinstance(optimizer, torch.optim.AdamW):
        optimizer = optimizer.optimizer
    return optimizer


def _step_of(moments: Mapping[str, Tensor], held: Tensor) -> Tensor:
    return moments["step"].to(held.device, copy=True)  # each counts its own up


def _flat_of(optimizer: Any) -> dict[Any, Tensor]:
    """ZeRO-1 and 2: this process's stretch of the group that a parameter is of."""
    zero = optimizer.optimizer
    flats = getattr(zero, "single_partition_of_fp32_groups", [])
    return {p: flat for flat, group in zip(flats, getattr(zero, "bit16_groups", []), strict=True) for p in group}


def _fragment(p: Any, whole: Tensor, flat: Tensor) -> tuple[Tensor, Tensor]:
    """The same numbers in a whole moment of `p` and in this process's stretch of its group; none if they don't meet.

    Where they lie is known from the start; what DeepSpeed itself says of moments is wrong with several groups.
    """
    if p._hp_mapping is None:
        return whole[:0], flat[:0]
    ours, theirs = p._hp_mapping.lp_fragment_address, p._hp_mapping.get_hp_fragment_address()
    return whole[ours.start : ours.start + ours.numel], flat[theirs.start : theirs.start + theirs.numel]


def _full_zero3(p: Any, moment: str | None) -> Tensor:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if not p.requires_grad:  # of which its optimizer knows nothing
        rank, world_size = dist.get_rank(p.ds_process_group), dist.get_world_size(p.ds_process_group)
        return joined(own_stretch(p, rank, world_size), p.ds_shape, world_size)
    return safe_get_full_fp32_param(p) if moment is None else safe_get_full_optimizer_state(p, moment)


def _set_zero3(p: Any, whole: Tensor, moment: str) -> None:
    from deepspeed.utils import safe_set_local_optimizer_state

    padded = torch.zeros_like(p.ds_tensor)
    own = stretch(whole, dist.get_rank(p.ds_process_group), dist.get_world_size(p.ds_process_group))
    padded[: len(own)] = own
    safe_set_local_optimizer_state(p, padded, moment)
