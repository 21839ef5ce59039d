import torch

from perturbdiff.nn.lora import inject_lora, merged
from tests.untrained import untrained


def test_injection_changes_no_output_and_merging_is_what_the_layers_compute():
    denoiser, plain = untrained().denoiser, untrained().denoiser
    x, t, control = torch.randn(2, 3, 12), torch.tensor([1, 5]), torch.rand(2, 3, 12)
    with torch.no_grad():
        before = denoiser(x, t, control)
        inject_lora(denoiser, 2, 8.0)
        torch.testing.assert_close(denoiser(x, t, control), before, rtol=0, atol=0)
        for name, p in denoiser.named_parameters():
            if "lora_" in name:
                p.normal_()
        plain.load_state_dict(merged(denoiser.state_dict(), 4.0))
        torch.testing.assert_close(plain(x, t, control), denoiser(x, t, control), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(plain(x, t, control), before, atol=1e-3)
