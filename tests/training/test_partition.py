import threading
from types import SimpleNamespace

import pytest
import torch

from perturbdiff.training import partition
from perturbdiff.training.partition import full_moments, full_weights, load_moments, own_stretch, stretch
from tests.processes import PATIENCE

SHAPES = {"one": (1,), "scalar": (), "matrix": (3, 5), "seven": (7,), "empty": (0,)}


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_stretches_cover_every_number_once_and_in_order(shape, n):
    whole = torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape)
    parts = [stretch(whole, rank, n) for rank in range(n)]
    assert torch.equal(torch.cat(parts), whole.reshape(-1))
    lengths = [len(part) for part in parts]
    assert lengths == sorted(lengths, reverse=True)
    assert max(lengths) == -(-whole.numel() // n)


def test_a_stretch_is_a_view():
    whole = torch.zeros(3, 5)
    stretch(whole, 1, 2).fill_(1)
    assert whole.sum() == 7


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [1, 2, 7, 15])
def test_what_zero3_holds_of_a_parameter_is_its_stretch_without_the_padding(size, n):
    whole = torch.arange(1.0, size + 1)
    length = -(-size // n)
    padded = torch.cat([whole, torch.full((length * n - size,), -9.0)])
    for rank in range(n):
        held = SimpleNamespace(ds_tensor=padded[rank * length : (rank + 1) * length], ds_numel=size)
        assert torch.equal(own_stretch(held, rank, n), stretch(whole, rank, n))


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("one", "scalar", "matrix", "seven"):
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(SHAPES[name])))


def moments_of_model(step=4.0):
    generator = torch.Generator().manual_seed(0)
    moments = {f"{m}.{name}": torch.rand(p.shape, generator=generator) for m in partition.MOMENTS
               for name, p in Model().named_parameters()}  # fmt: skip
    return {"step": torch.tensor(step), **moments}


def plain(model):
    return SimpleNamespace(optimizer=torch.optim.AdamW(model.parameters()))


def zero(model, rank, n):
    """As DeepSpeed's ZeRO-1 and 2 hold them: each group flat and padded, of which rank r has the r-th part."""
    groups = [[model.matrix, model.one], [model.seven, model.scalar]]
    flats = []
    for group in groups:
        size = sum(p.numel() for p in group)
        length = -(-size // n)
        first, last = rank * length, (rank + 1) * length
        start = 0
        for p in group:
            begin, end = max(start, first), min(start + p.numel(), last)
            p._hp_mapping = None
            if begin < end:
                address = SimpleNamespace(start=begin - first, numel=end - begin)
                p._hp_mapping = SimpleNamespace(
                    lp_fragment_address=SimpleNamespace(start=begin - start, numel=end - begin),
                    get_hp_fragment_address=lambda address=address: address,
                )
            start += p.numel()
        flats.append(torch.nn.Parameter(torch.zeros(length)))
    adamw = torch.optim.AdamW([{"params": [flat]} for flat in flats])
    return SimpleNamespace(
        optimizer=SimpleNamespace(optimizer=adamw, single_partition_of_fp32_groups=flats, bit16_groups=groups)
    )


def gathered(models, optimizers, monkeypatch):
    """full_moments on each process, threads in their place."""
    n = len(models)
    barrier, own_rank = threading.Barrier(n, timeout=PATIENCE), threading.local()
    given, results = [None] * n, [None] * n

    def all_reduce(own):
        given[own_rank.value] = own.clone()
        barrier.wait()
        own.copy_(torch.stack(given).sum(0))
        barrier.wait()

    def work(rank):
        own_rank.value = rank
        results[rank] = full_moments(models[rank], optimizers[rank])

    monkeypatch.setattr(partition.dist, "all_reduce", all_reduce)
    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) and a[name].shape == b[name].shape for name in a)


def test_moments_of_one_process_come_back():
    model, moments = Model(), moments_of_model()
    optimizer = plain(model)
    load_moments(model, optimizer, moments)
    assert_equal(full_moments(model, optimizer), moments)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_moments_held_in_flat_stretches_are_written_whole(n, monkeypatch):
    models, moments = [Model() for _ in range(n)], moments_of_model()
    optimizers = [zero(model, rank, n) for rank, model in enumerate(models)]
    for model, optimizer in zip(models, optimizers, strict=True):
        load_moments(model, optimizer, moments)
    for whole in gathered(models, optimizers, monkeypatch):
        assert_equal(whole, moments)


def test_no_number_of_a_flat_stretch_belongs_to_two_moments():
    model, moments = Model(), moments_of_model()
    optimizer = zero(model, 1, 2)
    load_moments(model, optimizer, moments)
    states = optimizer.optimizer.optimizer.state
    flats = optimizer.optimizer.single_partition_of_fp32_groups
    assert list(states) == flats
    # The second half of (matrix, one) and of (seven, scalar).
    expected = torch.cat([moments["exp_avg.matrix"].view(-1)[8:], moments["exp_avg.one"]])
    assert torch.equal(states[flats[0]]["exp_avg"], expected)
    expected = torch.cat([moments["exp_avg_sq.seven"][4:], moments["exp_avg_sq.scalar"].view(1)])
    assert torch.equal(states[flats[1]]["exp_avg_sq"], expected)
    assert [float(states[flat]["step"]) for flat in flats] == [4.0, 4.0]
    assert states[flats[0]]["step"] is not states[flats[1]]["step"]


def test_before_the_first_step_there_are_no_moments():
    model = Model()
    optimizer = plain(model)
    assert full_moments(model, optimizer) == {}
    load_moments(model, optimizer, {})
    assert len(optimizer.optimizer.state) == 0


def test_weights_are_given_by_name_and_need_no_gradient():
    model = Model()
    weights = full_weights(model)
    assert list(weights) == list(model.state_dict())
    assert not any(weight.requires_grad for weight in weights.values())


def test_moments_of_another_model_are_refused():
    model, moments = Model(), moments_of_model()
    del moments["exp_avg_sq.seven"]
    with pytest.raises(KeyError, match=r"exp_avg_sq\.seven"):
        load_moments(model, plain(model), moments)
