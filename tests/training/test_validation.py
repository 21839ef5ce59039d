import numpy as np
import pytest
import torch
from torch import nn

from perturbdiff.config import load_config
from perturbdiff.data.batch import make_batch
from perturbdiff.data.rng import torch_generator
from perturbdiff.data.samplers import CellSetSampler
from perturbdiff.data.screen import Screen
from perturbdiff.data.vocab import GeneVocab
from perturbdiff.diffusion.draws import validation_draws
from perturbdiff.diffusion.losses import DiffusionLoss
from perturbdiff.evaluation.metrics import pearson_delta, score_condition
from perturbdiff.nn.denoiser import build_denoiser
from perturbdiff.training.dataset import TrainingSet
from perturbdiff.training.validation import validate
from tests.atlases import atlas_of_screen, random_cells, write_atlas
from tests.simulated import TINY, tiny_config, write_screen

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
# 4 conditions (2 perturbed contexts of 2 batches) of 20 cells: 3 sets each, the last one of 4 cells.
VALIDATED = "split.validation=['pert_1:type_1','pert_2:type_0']"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        import datasets

        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    return write_screen(tmp_path_factory.mktemp("screen"))


@pytest.fixture(scope="module")
def read(screen):
    return Screen.read(screen, tiny_config(screen, screen).data)


@pytest.fixture
def case(screen, read):
    """Settings -> their config, validation cells and sampler."""

    def made(*words):
        config = tiny_config(screen, screen.parent / "run", VALIDATED, *words)
        cells = TrainingSet.from_screen(read, config).validation
        return config, cells, cells.sampler(config)

    return made


@pytest.fixture(scope="module")
def denoiser(screen, read):
    """A denoiser whose head and gates are not zero any more."""
    config = tiny_config(screen, screen.parent / "run", VALIDATED)
    data = TrainingSet.from_screen(read, config)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = build_denoiser(config.denoiser, len(data.cells.genes), data.vocabularies)
        for parameter in made.parameters():
            nn.init.normal_(parameter, std=0.1)
    return made.eval().requires_grad_(False)


def alone(denoiser, config, cells, sampler):
    return validate(denoiser, cells, sampler, config, 0, 1, CPU, lambda sums: sums)


def together(denoiser, config, cells, sampler, world_size):
    """What each of several processes gets: once to hear what each adds, once to give it the sum."""
    parts = []

    def hear(sums):
        parts.append(sums.clone())
        return sums

    for rank in range(world_size):
        validate(denoiser, cells, sampler, config, rank, world_size, CPU, hear)
    assert len(parts) == world_size  # one call each
    assert len({part.shape for part in parts}) == 1
    return [
        validate(denoiser, cells, sampler, config, rank, world_size, CPU, lambda sums: sum(parts))
        for rank in range(world_size)
    ]


def sets_looked_at(cells, sampler):
    """Labels, measured and control cells, log1p, of each set of epoch 0."""
    found = []
    for step in range(sampler.steps_per_epoch):
        for cell_set in sampler.batch(0, step):
            batch = make_batch([cell_set], sampler.set_size, cells.cells, cells.labels)
            measured, control = (x[batch.mask].double().numpy() * 10 for x in batch.dense())
            found.append((cells.index.labels(cell_set.condition), measured, control))
    return found


def energy(generated, measured):
    return score_condition(generated, measured, measured)["energy_distance"]


def expected_scores(sets, generate):
    """The three scores by loops over conditions and sets, with the metrics of `evaluation`, in float64."""
    energies, unchanged, pearsons = [], [], []
    for labels in sorted({labels for labels, _, _ in sets}):
        own = [(measured, control) for found, measured, control in sets if found == labels]
        pairs = [(generate(control), measured, control) for measured, control in own]
        weights = [len(measured) for _, measured, _ in pairs]
        energies.append(np.average([energy(g, m) for g, m, _ in pairs], weights=weights))
        unchanged.append(np.average([energy(c, m) for _, m, c in pairs], weights=weights))
        means = (np.concatenate(cells).mean(0) for cells in zip(*pairs, strict=True))
        pearsons.append(pearson_delta(*means))
    return np.mean(energies), np.mean(unchanged), np.nanmean(pearsons) if not np.isnan(pearsons).all() else np.nan


class FromControls(nn.Module):
    """Predicts a function of the control cells at whatever t."""

    def __init__(self, generate):
        super().__init__()
        self.generate = generate

    def forward(self, x_t, t, control, cond, self_cond, mask):
        # What stands at empty places must not count.
        return self.generate(control) + ~mask[..., None] * torch.arange(control.shape[-1])


class Oracle(nn.Module):
    """Knows the measured cells of each set by its controls."""

    def __init__(self, cells, sampler):
        super().__init__()
        self.known = {}
        for step in range(sampler.steps_per_epoch):
            x0, control = cells.batch(sampler, 0, step, 0, 1).dense()
            self.known |= {c.numpy().tobytes(): x for c, x in zip(control, x0, strict=True)}

    def forward(self, x_t, t, control, cond, self_cond, mask):
        found = [self.known[c.numpy().tobytes()] for c in control]
        return torch.stack(found) if found else control  # the loss also asks about no sets


def shifted(control):
    return control * 0.5 + 0.02  # model units


def values(scores):
    return [scores[f"validation_{name}"] for name in ("energy_distance", "energy_distance_no_change", "pearson_delta")]


def test_scores_are_those_of_evaluation_set_by_set(case):
    config, cells, sampler = case("sampling.whole_counts=false")
    sets = sets_looked_at(cells, sampler)
    assert sorted({len(measured) for _, measured, _ in sets}) == [4, 8]
    expected = expected_scores(sets, lambda control: shifted(control / 10) * 10)
    assert values(alone(FromControls(shifted), config, cells, sampler)) == pytest.approx(expected, rel=1e-4)


def test_values_under_one_count_of_the_control_are_scored_as_one_count_or_none(case):
    config, cells, sampler = case()
    sets, drawn = sets_looked_at(cells, sampler), {}
    cell_sets = [s for step in range(sampler.steps_per_epoch) for s in sampler.batch(0, step)]
    for cell_set, (_, _, control) in zip(cell_sets, sets, strict=True):
        generator = torch_generator(CPU, config.training.seed, "prediction counts", *cell_set.key)
        uniform = torch.rand(sampler.set_size, control.shape[1], generator=generator).numpy()[: len(control)]
        one = np.log1p(config.data.target_sum / cells.cells.take(cell_set.control_rows).library_size)[:, None]
        drawn[control.tobytes()] = one, uniform

    def generate(control):
        one, uniform = drawn[control.tobytes()]
        generated = shifted(control / 10) * 10
        assert (generated < one).any()
        return np.where(generated < one, one * (uniform < generated / one), generated)

    expected = expected_scores(sets, generate)
    assert values(alone(FromControls(shifted), config, cells, sampler)) == pytest.approx(expected, rel=1e-4)


def test_the_loss_is_the_mean_over_cells_of_each_sets_loss(case, denoiser):
    config, cells, sampler = case()
    loss, n_cells = 0.0, 0
    for step in range(sampler.steps_per_epoch):
        for cell_set in sampler.batch(0, step):
            batch = make_batch([cell_set], sampler.set_size, cells.cells, cells.labels)
            with torch.no_grad():
                output = DiffusionLoss(config.diffusion)(denoiser, batch, validation_draws(batch, config.diffusion, 0))
            loss += len(cell_set.rows) * float(output.total)
            n_cells += len(cell_set.rows)
    found = alone(denoiser, config, cells, sampler)["validation_loss"]
    assert found == pytest.approx(loss / n_cells, rel=5e-5)  # kernels of other shapes round otherwise


def test_the_measured_cells_themselves_have_no_distance_and_the_right_direction(case):
    config, cells, sampler = case("sampling.whole_counts=false")  # of the controls, which are of other depths
    distance, no_change, pearson = values(alone(Oracle(cells, sampler), config, cells, sampler))
    expected = np.mean([energy(m, m) for _, m, _ in sets_looked_at(cells, sampler) if len(m) == 8])
    assert distance < 0 < no_change  # a cell is at no distance from itself, and these pairs count
    assert distance == pytest.approx(expected, rel=0.5)
    assert pearson == pytest.approx(1)


def test_controls_as_prediction_give_the_figure_of_no_change_and_no_direction(case):
    config, cells, sampler = case()
    energy, no_change, pearson = values(alone(FromControls(lambda control: control), config, cells, sampler))
    assert energy == no_change
    assert np.isnan(pearson)


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("words", [(), ("sampling.eta=1.0", "sampling.guidance_scale=0.5"), ("sampling.sampler=ddpm",)])
def test_any_number_of_processes_gets_the_same_numbers(case, denoiser, world_size, words):
    config, cells, sampler = case(*words)  # of 5 processes one has no set in any step of 4
    expected = alone(denoiser, config, cells, sampler)
    found = together(denoiser, config, cells, sampler, world_size)
    assert all(scores == found[0] for scores in found)
    assert found[0] == pytest.approx(expected, rel=5e-5)


@pytest.mark.parametrize("n_sets", [1, 7, 12, 64])
@pytest.mark.parametrize(
    "words", [("data.sets_per_batch=5",), ("data.sets_per_batch=12",), ("training.accumulation_steps=3",)]
)
def test_the_same_sets_are_looked_at_in_batches_of_any_size(case, denoiser, n_sets, words):
    expected = alone(denoiser, *case(f"training.validate_sets={n_sets}"))
    assert alone(denoiser, *case(f"training.validate_sets={n_sets}", *words)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("world_size", "parts", "at_once"), [(1, 1, 4), (1, 2, 2), (3, 1, 2), (2, 3, 1)])
@pytest.mark.parametrize("n_sets", [1, 7, 64])
def test_so_many_sets_are_denoised_as_asked_for_and_never_more_at_once_than_trained_on(
    case, n_sets, world_size, parts, at_once
):
    words = (f"training.validate_sets={n_sets}", f"training.accumulation_steps={parts}", "sampling.n_steps=1")
    config, cells, sampler = case(*words)
    sizes = []

    def noted(control):
        sizes.append(len(control))
        return control

    for rank in range(world_size):
        validate(FromControls(noted), cells, sampler, config, rank, world_size, CPU, lambda sums: sums)
    assert sum(sizes) == 2 * min(n_sets, sampler.n_sets)  # for the loss, and to generate
    assert max(sizes) == min(at_once, n_sets)


def test_validation_is_repeatable_and_leaves_the_global_random_state_alone(case, denoiser):
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = alone(denoiser, *case("sampling.eta=0.5"))
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()
    torch.manual_seed(2)
    assert alone(denoiser, *case("sampling.eta=0.5")) == first
    assert alone(denoiser, *case("sampling.eta=0.5", "training.seed=1")) != first


def test_generated_cells_that_are_not_finite_show_in_the_scores(case):
    config, cells, sampler = case()
    broken = FromControls(lambda control: control * torch.nan)
    energy, no_change, pearson = values(alone(broken, config, cells, sampler))
    assert np.isnan(energy)
    assert np.isnan(pearson)
    assert no_change > 0
    calls = iter([1.0, torch.nan])  # of the first set: loss, and a sample in one step, which must not be left out
    config, cells, sampler = case("sampling.n_steps=1", "data.sets_per_batch=1")
    sometimes = FromControls(lambda control: control * next(calls, 0.5) if len(control) else control)
    energy, no_change, pearson = values(alone(sometimes, config, cells, sampler))
    assert np.isnan(energy)
    assert np.isnan(pearson)


def test_conditions_without_a_large_enough_set_leave_nothing_to_score(case, denoiser):
    config, cells, _ = case()
    sampler = CellSetSampler(cells.index, cells.pools, 60, 4, 0, min_set_size=25)
    assert sampler.n_sets == 0
    assert all(np.isnan(value) for value in alone(denoiser, config, cells, sampler).values())


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_streamed_condition_is_one_condition_over_its_shards(read, tmp_path, world_size):
    atlas = atlas_of_screen(tmp_path / "atlas", read, rows_per_shard=80)
    data = {"atlases": [{"path": str(atlas)}], "streamed": True, "n_streams": 2, "n_hvg": None}
    given = {"out": str(tmp_path / "run"), "data": data, "split": {"hold_out": ["pert_0:type_0"]}}
    config = load_config(None, [*TINY, VALIDATED, "sampling.whole_counts=false"], given)
    cells = TrainingSet.from_atlases(config).validation
    sampler = cells.sampler(config)
    found = together(FromControls(shifted), config, cells, sampler, world_size)
    assert cells.cells._open == {}
    cells.cells.open(range(len(cells.cells.borders)))
    sets = sets_looked_at(cells, sampler)
    conditions = {c for step in range(sampler.steps_per_epoch) for c in (s.condition for s in sampler.batch(0, step))}
    assert len(conditions) > len({labels for labels, _, _ in sets}) == 4  # some lie in two shards
    expected = expected_scores(sets, lambda control: shifted(control / 10) * 10)
    cells.close()
    assert values(found[0]) == pytest.approx(expected, rel=1e-4)


def test_genes_that_no_cell_measured_are_no_part_of_the_scores(tmp_path):
    rng = np.random.default_rng()
    conditions = [(p, c, "b", n) for c in ("T", "NK") for p, n in (("control", 20), ("A", 16), ("B", 12))]
    X, library = random_cells(96, 12, int(rng.integers(1 << 30))), rng.integers(50, 90, 96)
    kept = rng.permutation(12) < 8
    names = np.array([f"gene_{g}" for g in range(12)])
    whole = write_atlas(tmp_path / "whole", conditions, 12, cells=X, library_size=library, measured=kept[None])
    unmasked = write_atlas(tmp_path / "unmasked", conditions, 12, cells=X, library_size=library)
    cut = write_atlas(
        tmp_path / "cut", conditions, cells=X[:, np.flatnonzero(kept)], library_size=library,
        genes=GeneVocab(tuple(names[kept])),
    )  # fmt: skip

    def scores(folder):
        given = {
            "out": "unused",
            "data": {"atlases": [{"path": str(folder)}]},
            "split": {"validation": ["A:T", "B:NK"]},
        }
        words = [*TINY, "data.n_hvg=null", "sampling.whole_counts=false"]
        config = load_config(None, words, given)
        cells = TrainingSet.from_atlases(config).validation
        return values(alone(FromControls(shifted), config, cells, cells.sampler(config)))

    assert scores(whole) == pytest.approx(scores(cut), abs=1e-3)  # of distances in float32
    assert scores(unmasked) != pytest.approx(scores(cut), abs=1e-3)
