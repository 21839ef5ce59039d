"""Fine-tuning on several processes, under every engine: the run of one, and it goes on bit for bit."""

import shutil

import pytest

from perturbdiff.model import PerturbDiff
from tests.distributed.launches import alone, assert_close, assert_same, finished

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("engine", "method"), [("ddp", "lora"), ("zero1", "frozen"), ("zero3", "lora")])
def test_a_checkpoint_is_tuned_as_on_one_process_and_goes_on_bit_identically(recipe, one, tmp_path, engine, method):
    tuning = recipe.parent / f"{engine}_{method}.yaml"  # beside the atlases' cache
    adapt = f"adapt: {{init_from: {one / 'model'}, method: {method}, lr_ratio: 0.5}}\n"
    tuning.write_text(recipe.read_text().replace("n_hvg: null", "n_hvg: 15") + adapt)  # of 20 genes
    alone(tuning, tmp_path / "alone")
    said = finished(engine, tuning, tmp_path / "many")
    assert "init from   model (config.json" in said
    assert_close(tmp_path / "alone", tmp_path / "many")
    shutil.copytree(tmp_path / "many", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "states" / "step_00000012")
    assert "resuming    from step 8" in finished(engine, tuning, tmp_path / "again")
    assert_same(tmp_path / "many", tmp_path / "again")
    if method == "lora":
        adapter = tmp_path / "again" / "adapter"
        merged = PerturbDiff.from_pretrained(adapter, base=one / "model", device="cpu").denoiser.state_dict()
        own = PerturbDiff.from_pretrained(tmp_path / "again" / "model", device="cpu").denoiser.state_dict()
        assert all((merged[name] - own[name]).abs().max() < 1e-5 for name in own)
