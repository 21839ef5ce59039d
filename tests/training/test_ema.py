import torch

from perturbdiff.config import DenoiserConfig
from perturbdiff.model.conditioning import VocabSizes
from perturbdiff.model.denoiser import Denoiser
from perturbdiff.training.ema import EMA


def test_ema_follows_the_recursion_with_warmed_up_decay():
    denoiser = Denoiser(DenoiserConfig(width=8, depth=1, n_heads=1), 3, VocabSizes(1, 1, 1))
    ema = EMA(denoiser, decay=0.5)
    expected = denoiser.head.bias.detach().clone().double()
    for n in range(12):
        with torch.no_grad():
            denoiser.head.bias.add_(torch.randn(3))
        ema.update(denoiser)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * denoiser.head.bias.detach().double()
    torch.testing.assert_close(ema.module.head.bias.double(), expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(ema.module.head.bias, denoiser.head.bias.detach())
    assert not any(p.requires_grad for p in ema.module.parameters())


def test_first_update_forgets_nine_tenths_of_the_random_start():
    denoiser = Denoiser(DenoiserConfig(width=8, depth=1, n_heads=1), 3, VocabSizes(1, 1, 1))
    ema = EMA(denoiser, decay=0.999)
    start = denoiser.embed_x.weight.detach().clone()
    with torch.no_grad():
        denoiser.embed_x.weight.zero_()
    ema.update(denoiser)
    torch.testing.assert_close(ema.module.embed_x.weight, 0.1 * start)
