"""What one process's part of a training step takes, found by running it without data: bytes and FLOPs.

The real loss runs forward and backward on tensors that have shapes and no storage (FakeTensorMode), so that the answer
stays true when the model changes. B = sets, S = cells per set, G = genes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from perturbdiff.config import Config, Preprocessing
from perturbdiff.data.batch import CellSetBatch, SparseCells
from perturbdiff.data.vocab import Labels
from perturbdiff.diffusion.draws import Draws
from perturbdiff.diffusion.losses import DiffusionLoss
from perturbdiff.nn.conditioning import VocabSizes
from perturbdiff.nn.denoiser import Denoiser


@dataclass(frozen=True)
class StepCost:
    """Of a forward and backward of B full sets on one process.

    activations
        Bytes at the fullest moment besides weights and their gradients: the dense batch, noise, what is saved for
        backward, autocast's copies of the weights, what is passing through. All sets see their first estimate.
    flops
        Matrix products and attention, by the type they run in ("bfloat16", "float32"), without the first estimate.
    self_cond_flops
        The same of the forward without gradients that gives the first estimate, were all sets to see theirs.
    traffic
        Bytes that operations read and write, each by itself as without torch.compile.
    kernels
        Operations that move any.
    """

    activations: int
    flops: Mapping[str, int]
    self_cond_flops: Mapping[str, int]
    traffic: int
    kernels: int


def measure_step(config: Config, n_genes: int, sizes: VocabSizes, n_sets: int) -> StepCost:
    """Cost of a step of `n_sets` full sets on a GPU, with the denoiser, loss and mixed precision of `config`."""
    shape = n_sets, config.data.set_size, n_genes
    with_first = config.diffusion.p_self_cond > 0
    in_bf16 = config.training.mixed_precision == "bf16"
    with FakeTensorMode():
        denoiser, loss = Denoiser(config.denoiser, n_genes, sizes), DiffusionLoss(config.diffusion, in_step=True)
        batch = _FakeBatch.of(*shape)
        t = torch.zeros(n_sets, dtype=torch.int64)
        with StepRecorder(denoiser.parameters()) as first, torch.no_grad(), autocast_of_a_gpu(in_bf16):
            denoiser(torch.empty(shape), t, torch.empty(shape), batch.labels, None, batch.mask, batch.mask)
        with StepRecorder(denoiser.parameters()) as step:
            # All sets see a first estimate, by number: which ones a mask chooses depends on values.
            draws = Draws(t, torch.empty(shape), torch.arange(n_sets), batch.labels)
            with autocast_of_a_gpu(in_bf16):
                output = loss(denoiser, batch, draws)
            output.total.sum().backward()
            gradients = [p.grad for p in denoiser.parameters() if p.grad is not None]
        flops = {kind: count - with_first * first.flops[kind] for kind, count in step.flops.items()}
        return StepCost(step.peak(besides=gradients), flops, dict(first.flops), step.traffic, step.kernels)


class StepRecorder(TorchDispatchMode):
    """Records the tensors that operations make, until they are freed, and the FLOPs of matrix products and attention.

    flops
        By the type of the result.
    traffic, kernels
        Bytes read and written by operations that are no mere views, and their number.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.flops: dict[str, int] = defaultdict(int)
        self.traffic = self.kernels = 0
        # A weak reference keeps the address of its storage from being used again, so addresses are identities.
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._alive: dict[int, StorageWeakRef] = {}
        self._freed: list[StorageWeakRef] = []
        self._events: list[tuple[int, int]] = []  # address, bytes made; 0 where it was freed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        outputs = [output for output in tree_flatten(result)[0] if isinstance(output, Tensor)]
        for output in outputs:
            storage = output.untyped_storage()
            if storage._cdata not in self._known and storage._cdata not in self._alive:
                self._forget_freed()
                self._alive[storage._cdata] = StorageWeakRef(storage)
                self._events.append((storage._cdata, storage.nbytes()))
        if not func.is_view and outputs:
            inputs = [given for given in tree_flatten((args, kwargs))[0] if isinstance(given, Tensor)]
            self.kernels += 1
            self.traffic += sum(_moved(tensor) for tensor in (*inputs, *outputs))
        if count := _FLOPS.get(func._overloadpacket):
            self.flops[str(outputs[0].dtype).removeprefix("torch.")] += count(*args, **kwargs, out_val=result)
        return result

    def peak(self, besides: Iterable[Tensor] = ()) -> int:
        """Bytes alive together at most, without those of `besides`."""
        left_out = {tensor.untyped_storage()._cdata for tensor in besides}
        alive: dict[int, int] = {}
        now = most = 0
        for address, n_bytes in self._events:
            if address not in left_out:
                now += n_bytes - alive.pop(address, 0)
                if n_bytes:
                    alive[address] = n_bytes
                most = max(most, now)
        return most

    def _forget_freed(self) -> None:
        expired = torch.UntypedStorage._expired
        for address in [address for address, ref in self._alive.items() if expired(ref.cdata)]:
            self._freed.append(self._alive.pop(address))
            self._events.append((address, 0))


def _moved(tensor: Tensor) -> int:
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())  # what is broadcast is read once


@contextmanager
def autocast_of_a_gpu(enabled: bool = True) -> Iterator[None]:
    """bf16 autocast by the rules of CUDA, and its fused kernels, for tensors that are on no GPU."""
    with _GpuKernels(enabled), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        yield


class _GpuKernels(TorchFunctionMode):
    # CPU autocast leaves these in bf16; on a GPU they run in float32 (torch's documentation, "CUDA Ops that can
    # autocast to float32"). Of that list, those that denoiser and loss call.
    IN_FLOAT32 = frozenset({F.layer_norm, F.rms_norm, F.softplus, Tensor.sum, torch.exp, torch.sum})

    def __init__(self, autocast: bool) -> None:
        super().__init__()
        self._autocast = autocast

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._autocast and func in self.IN_FLOAT32 and torch.is_autocast_enabled("cpu"):
            args = tuple(_float32(value) for value in args)
            kwargs = {name: _float32(value) for name, value in kwargs.items()}
        return (_fused_rms_norm if func is F.rms_norm else func)(*args, **kwargs)


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value


def _fused_rms_norm(x: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Any:
    if weight is None:
        return F.rms_norm(x, normalized_shape, weight, eps)
    return _FusedRMSNorm.apply(x, weight)


class _FusedRMSNorm(torch.autograd.Function):
    # On a GPU one kernel, which saves its input and one number a row; elsewhere torch writes it out step by step.
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight)


@dataclass(frozen=True)
class _FakeBatch(CellSetBatch):
    # Where the sparse values go depends on them, so the dense batch is made at once.
    @classmethod
    def of(cls, n_sets: int, set_size: int, n_genes: int) -> _FakeBatch:
        nothing = torch.empty(0)
        cells = SparseCells(nothing, nothing, nothing, nothing, nothing)
        ids = torch.zeros(n_sets, dtype=torch.int64)
        labels = Labels(ids[:, None], ids, ids, torch.zeros(n_sets, dtype=torch.bool))
        mask = torch.ones(n_sets, set_size, dtype=torch.bool)
        keys = tuple((0, number) for number in range(n_sets))
        how = Preprocessing("counts", 1e4, 10.0)
        return cls(cells, cells, mask, labels, n_genes, how, keys, (0,) * n_sets)

    def dense(self) -> tuple[Tensor, Tensor]:
        shape = *self.mask.shape, self.n_genes
        return torch.zeros(shape), torch.zeros(shape)


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _attention_backward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient.shape, q.shape, k.shape, v.shape)


# torch counts the attention of every device but this one.
_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def parameter_sizes(config: Config, n_genes: int, sizes: VocabSizes) -> list[int]:
    """Elements of each parameter of the denoiser; no memory is taken."""
    with torch.device("meta"):
        denoiser: nn.Module = Denoiser(config.denoiser, n_genes, sizes)
    return [p.numel() for p in denoiser.parameters()]
