import threading

import pytest
import torch

from perturbdiff.config import DenoiserConfig
from perturbdiff.nn.conditioning import VocabSizes
from perturbdiff.nn.denoiser import Denoiser
from perturbdiff.training import partition
from perturbdiff.training.ema import EMA
from tests.processes import PATIENCE


def tiny_denoiser(seed=0):
    torch.manual_seed(seed)
    return Denoiser(DenoiserConfig(width=8, depth=1, n_heads=1), 3, VocabSizes(1, 1, 1))


class FewNumbers(torch.nn.Module):
    """Parameters of one number, of a few, of none to spare, and of a matrix."""

    def __init__(self):
        super().__init__()
        shapes = {"one": (1,), "scalar": (), "two": (2,), "seven": (7,), "matrix": (3, 5)}
        for name, shape in shapes.items():
            self.register_parameter(name, torch.nn.Parameter(torch.randn(shape)))


def in_threads(call, items, monkeypatch):
    """What `call` gives of each item, each on a process of its own: a thread that gathers with the others."""
    n = len(items)
    barrier, own_rank = threading.Barrier(n, timeout=PATIENCE), threading.local()
    given, results = [None] * n, [None] * n

    def all_gather(pieces, own):
        given[own_rank.value] = own
        barrier.wait()
        for piece, other in zip(pieces, given, strict=True):
            piece.copy_(other)
        barrier.wait()

    def work(rank):
        own_rank.value = rank
        results[rank] = call(items[rank])

    monkeypatch.setattr(partition.dist, "all_gather", all_gather)
    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def step(module, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) and a[name].shape == b[name].shape for name in a)


def test_ema_follows_the_recursion_with_warmed_up_decay():
    denoiser = tiny_denoiser()
    ema = EMA(denoiser, decay=0.5)
    expected = denoiser.head.bias.detach().clone().double()
    for n in range(12):
        with torch.no_grad():
            denoiser.head.bias.add_(torch.randn(3))
        ema.update(denoiser)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * denoiser.head.bias.detach().double()
    averaged = ema.full()
    torch.testing.assert_close(averaged["head.bias"].double(), expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(averaged["head.bias"], denoiser.head.bias.detach())
    assert not any(weight.requires_grad for weight in averaged.values())
    assert averaged.keys() == denoiser.state_dict().keys()
    assert ema.n_updates == 12


def test_first_update_forgets_nine_tenths_of_the_random_start():
    denoiser = tiny_denoiser()
    ema = EMA(denoiser, decay=0.999)
    start = denoiser.embed_x.weight.detach().clone()
    with torch.no_grad():
        denoiser.embed_x.weight.zero_()
    ema.update(denoiser)
    torch.testing.assert_close(ema.full()["embed_x.weight"], 0.1 * start)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("make", [tiny_denoiser, FewNumbers])
def test_averages_kept_in_stretches_are_those_kept_whole(make, n, monkeypatch):
    module = make()
    whole, parts = EMA(module, 0.9), [EMA(module, 0.9, rank, n) for rank in range(n)]
    for seed in range(4):
        step(module, seed)
        for ema in [whole, *parts]:
            ema.update(module)
    for full in in_threads(lambda ema: ema.full(), parts, monkeypatch):
        assert_equal(full, whole.full())


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (3, 2), (2, 5), (5, 3)])
def test_averages_go_on_with_another_number_of_processes(before, after, monkeypatch):
    module = FewNumbers()
    whole, parts = EMA(module, 0.9), [EMA(module, 0.9, rank, before) for rank in range(before)]
    for seed in range(3):
        step(module, seed)
        for ema in [whole, *parts]:
            ema.update(module)
    saved = in_threads(lambda ema: ema.full(), parts, monkeypatch)[0]
    later = [EMA(FewNumbers(), 0.9, rank, after) for rank in range(after)]
    for ema in later:
        ema.load(saved, n_updates=3)
    step(module, 3)
    for ema in [whole, *later]:
        ema.update(module)
    for full in in_threads(lambda ema: ema.full(), later, monkeypatch):
        assert_equal(full, whole.full())


def test_weights_that_were_loaded_are_not_those_that_are_averaged():
    """A state that stays in memory must not move."""
    module = FewNumbers()
    saved = {name: torch.zeros(p.shape) for name, p in module.named_parameters()}
    ema = EMA(module, 0.5)
    ema.load(saved, n_updates=7)
    ema.update(module)
    assert not any(weight.any() for weight in saved.values())
    assert ema.n_updates == 8


def test_the_average_does_not_follow_the_weights_by_itself():
    module = FewNumbers()
    ema = EMA(module, 0.5)
    before = {name: weight.clone() for name, weight in ema.full().items()}
    step(module, 0)
    assert_equal(ema.full(), before)
