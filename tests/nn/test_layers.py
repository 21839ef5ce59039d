"""Pieces of the denoiser against their formulas, written out in numpy."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from perturbdiff.nn.layers import MLP, Attention, Modulation, TimeEmbedding, modulate, norm


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return module


def array(x: Tensor) -> np.ndarray:
    return x.detach().double().numpy()


def linear(x: np.ndarray, layer: nn.Linear) -> np.ndarray:
    return x @ array(layer.weight).T + array(layer.bias)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def rms_norm(x: np.ndarray, weight: Tensor) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * array(weight)


def softmax_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """One head of one set, token by token."""
    rows = []
    for one in q:
        score = np.exp([one @ other / math.sqrt(len(one)) for other in k])
        rows.append(score / score.sum() @ v)
    return np.array(rows)


def test_time_embedding_is_cosines_then_sines_then_an_mlp():
    embedding = randomized(TimeEmbedding(12))
    t = torch.tensor([0, 1, 450, 999])
    frequencies = [10_000 ** (-i / 128) for i in range(128)]
    waves = np.array([[math.cos(s * f) for f in frequencies] + [math.sin(s * f) for f in frequencies] for s in t])
    expected = linear(silu(linear(waves, embedding.mlp[0])), embedding.mlp[2])
    assert embedding(t).shape == (4, 1, 12)
    np.testing.assert_allclose(array(embedding(t))[:, 0], expected, atol=1e-3)


def test_all_timesteps_have_their_own_embedding():
    embedded = randomized(TimeEmbedding(16))(torch.arange(1000))[:, 0]
    distances = torch.cdist(embedded, embedded) + torch.eye(1000) * 1e6
    assert distances.min() > 1e-3


@pytest.mark.parametrize("n", [2, 6])
def test_modulation_is_a_linear_layer_of_the_silu_cut_in_n(n):
    modulation, c = randomized(Modulation(5, n)), normal(3, 1, 5)
    expected = linear(silu(array(c)), modulation.linear)
    vectors = modulation(c)
    assert len(vectors) == n
    for i, vector in enumerate(vectors):
        np.testing.assert_allclose(array(vector), expected[..., 5 * i : 5 * i + 5], atol=1e-5)


def test_norm_gives_mean_0_and_variance_1_over_the_width():
    x = 3 + 2 * normal(4, 6, 32)
    expected = (array(x) - array(x).mean(-1, keepdims=True)) / array(x).std(-1, keepdims=True)
    np.testing.assert_allclose(array(norm(x)), expected, atol=1e-5)
    assert not norm(torch.full((1, 2, 8), 5.0)).any()


def test_modulate_scales_by_one_plus_scale_and_shifts():
    x, shift, scale = normal(2, 3, 4), normal(2, 1, 4, seed=1), normal(2, 1, 4, seed=2)
    np.testing.assert_allclose(
        array(modulate(x, shift, scale)), array(x) * (1 + array(scale)) + array(shift), atol=1e-6
    )
    assert torch.equal(modulate(x, torch.zeros(1), torch.zeros(1)), x)


def test_mlp_is_two_layers_around_a_tanh_gelu():
    mlp, x = randomized(MLP(6, 4.0)), normal(2, 3, 6)
    hidden = linear(array(x), mlp.fc1)
    gelu = 0.5 * hidden * (1 + np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    assert hidden.shape[-1] == 24
    np.testing.assert_allclose(array(mlp(x)), linear(gelu, mlp.fc2), atol=1e-4)


@pytest.mark.parametrize(("width", "hidden"), [(7, 61), (7, 122), (13, 115), (512, 1382)])
def test_mlp_has_the_hidden_width_its_ratio_came_from(width, hidden):
    assert MLP(width, hidden / width).fc1.out_features == hidden


@pytest.mark.parametrize("n_heads", [1, 2, 4])
def test_attention_equals_the_loop_over_queries_and_keys(n_heads):
    attention, x = randomized(Attention(8, n_heads)), normal(3, 5, 8)
    qkv = linear(array(x), attention.qkv).reshape(3, 5, 3, n_heads, 8 // n_heads)
    out = np.empty((3, 5, n_heads, 8 // n_heads))
    for b in range(3):
        for head in range(n_heads):
            q, k, v = (qkv[b, :, i, head] for i in range(3))
            q, k = rms_norm(q, attention.q_norm.weight), rms_norm(k, attention.k_norm.weight)
            out[b, :, head] = softmax_attention(q, k, v)
    expected = linear(out.reshape(3, 5, 8), attention.proj)
    np.testing.assert_allclose(array(attention(x, None)), expected, atol=1e-4)


def test_masked_attention_equals_attention_to_the_real_cells_alone():
    attention, x = randomized(Attention(8, 2)), normal(3, 7, 8)
    mask = torch.tensor([[1, 0, 1, 1, 0, 0, 1], [0, 0, 0, 0, 1, 0, 0], [1] * 7], dtype=torch.bool)
    out = attention(x, mask)
    for b in range(3):
        torch.testing.assert_close(out[b, mask[b]], attention(x[b : b + 1, mask[b]], None)[0], rtol=1e-4, atol=1e-5)


def test_an_empty_set_attends_to_all_its_cells_with_finite_gradients():
    x = normal(2, 5, 8).requires_grad_()
    attention = randomized(Attention(8, 2))
    mask = torch.tensor([[False] * 5, [True] * 4 + [False]])
    out = attention(x, mask)
    out.sum().backward()
    torch.testing.assert_close(out[0], attention(x, None)[0])
    assert x.grad.isfinite().all()


def test_attention_gradients_pass_gradcheck():
    attention = randomized(Attention(4, 2)).double()
    x, mask = normal(2, 3, 4).double().requires_grad_(), torch.tensor([[True, False, True], [True, True, True]])
    assert torch.autograd.gradcheck(lambda x: attention(x, mask), x)


def test_shapes_are_known_without_values_and_without_the_compiler():
    """Which takes two seconds to import: a process of its own sees whether it was."""
    code = """
import sys, torch
from perturbdiff.config import DenoiserConfig
from perturbdiff.nn.conditioning import VocabSizes
from perturbdiff.nn.denoiser import Denoiser
from perturbdiff.nn.layers import shapes_only
sizes = VocabSizes(perturbations=3, cell_types=2, batches=2)
config = DenoiserConfig(width=8, depth=2, n_heads=2, conditioning="labels", interaction=True)
with shapes_only():
    denoiser = Denoiser(config, 5, sizes)
assert all(tensor.is_meta for tensor in denoiser.state_dict().values())
shapes = {name: tensor.shape for name, tensor in Denoiser(config, 5, sizes).state_dict().items()}
assert {name: tensor.shape for name, tensor in denoiser.state_dict().items()} == shapes
assert torch.nn.Linear(3, 3).weight.abs().sum() > 0
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
