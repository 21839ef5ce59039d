"""Properties of the denoiser that hold for any weights: symmetries, masks, options, gradients."""

from __future__ import annotations

import dataclasses
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from perturbdiff.config import DenoiserConfig
from perturbdiff.data.vocab import NULL, Labels
from perturbdiff.nn.conditioning import VocabSizes
from perturbdiff.nn.denoiser import Denoiser, compile_blocks

SIZES = VocabSizes(perturbations=5, cell_types=3, batches=4)
N_GENES = 9
OUTPUTS = ["direct", "control_residual"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(n_genes: int = N_GENES, sizes: VocabSizes | None = SIZES, **settings: object) -> Denoiser:
    """A small denoiser as it is initialised."""
    settings = {"width": 12, "depth": 2, "n_heads": 3, "out_activation": "none", **settings}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Denoiser(DenoiserConfig(**settings), n_genes, sizes)


def build_random(n_genes: int = N_GENES, sizes: VocabSizes | None = SIZES, **settings: object) -> Denoiser:
    """As trained: no gate and no head is zero."""
    denoiser = build(n_genes, sizes, **settings)
    generator = torch.Generator().manual_seed(1)
    for parameter in denoiser.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return denoiser.eval()


def labels(n_sets: int) -> Labels:
    number = torch.arange(n_sets)
    return Labels(torch.stack([number % 5, (number + 1) % 5], 1), number % 3, number % 4)


def inputs(n_sets: int = 3, n_cells: int = 5, n_genes: int = N_GENES) -> dict[str, Tensor | Labels]:
    return {
        "x_t": normal(n_sets, n_cells, n_genes),
        "t": torch.tensor([3, 400, 999])[:n_sets],
        "control": normal(n_sets, n_cells, n_genes, seed=1),
        "cond": labels(n_sets),
        "self_cond": normal(n_sets, n_cells, n_genes, seed=2),
    }


def replaced(given: dict[str, Tensor | Labels], **new: object) -> dict[str, object]:
    return {**given, **new}


def prefix_mask(*sizes: int) -> Tensor:
    return torch.arange(5)[None] < torch.tensor(sizes)[:, None]


MASK = prefix_mask(5, 3, 1)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def assert_different(actual: Tensor, expected: Tensor) -> None:
    assert (actual - expected).abs().max() > 1e-2


# Symmetries.


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("parallel_block", [True, False])
def test_paired_cells_and_controls_permuted_together_permute_the_output(output, parallel_block):
    denoiser, given = build_random(output=output, parallel_block=parallel_block), inputs()
    order = torch.tensor([3, 0, 4, 1, 2])
    permuted = {name: given[name][:, order] for name in ("x_t", "control", "self_cond")}
    assert_same(denoiser(**replaced(given, **permuted)), denoiser(**given)[:, order])
    # Cells and controls are pairs: controls permuted alone are other pairs.
    assert_different(denoiser(**replaced(given, control=permuted["control"])), denoiser(**given))


def test_sets_do_not_see_each_other():
    denoiser, given = build_random(), inputs()
    together = denoiser(**given)
    for b in range(3):
        one = slice(b, b + 1)
        alone = {name: v.select(one) if isinstance(v, Labels) else v[one] for name, v in given.items()}
        assert_same(denoiser(**alone), together[one])


@pytest.mark.parametrize("changed", ["x_t", "t", "control", "cond", "self_cond"])
def test_every_input_changes_the_output(changed):
    denoiser, given = build_random(output="direct"), inputs()
    other = {
        "x_t": given["x_t"].flip(-1),
        "t": torch.tensor([500, 999, 3]),
        "control": given["control"].flip(-1),
        "cond": labels(3).select(torch.tensor([1, 2, 0])),
        "self_cond": given["self_cond"].flip(-1),
    }
    assert_different(denoiser(**replaced(given, **{changed: other[changed]})), denoiser(**given))


def test_cells_of_a_set_see_each_other():
    denoiser, given = build_random(), inputs()
    other = given["x_t"].clone()
    other[:, 0] += 2
    assert_different(denoiser(**replaced(given, x_t=other))[:, 1:], denoiser(**given)[:, 1:])


def test_sequential_and_parallel_blocks_differ():
    given = inputs()
    one, other = build_random(parallel_block=True), build_random(parallel_block=False)
    assert one.state_dict().keys() == other.state_dict().keys()
    assert_different(one(**given), other(**given))


# Masks.


@pytest.mark.parametrize("output", OUTPUTS)
def test_padding_never_changes_the_output_of_real_cells(output):
    denoiser = build_random(output=output)
    given = inputs()
    expected = denoiser(**given, mask=MASK)
    junk = {
        "x_t": torch.where(MASK[..., None], given["x_t"], 50 * normal(3, 5, N_GENES, seed=5)),
        "self_cond": torch.where(MASK[..., None], given["self_cond"], -50.0),
        "control": torch.where(MASK[..., None], given["control"], 50.0),
    }
    for changed in (*({name: value} for name, value in junk.items()), junk):
        output_there = denoiser(**replaced(given, **changed), mask=MASK)
        assert_same(output_there[MASK], expected[MASK])
    # Without the masks the same padding does change it.
    assert_different(denoiser(**replaced(given, **junk))[MASK], denoiser(**given)[MASK])


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_padded_set_gives_what_its_real_cells_give_alone(output):
    denoiser = build_random(output=output)
    given = inputs()
    padded = denoiser(**given, mask=MASK)
    for b in range(3):
        alone = denoiser(
            given["x_t"][b : b + 1, MASK[b]],
            given["t"][b : b + 1],
            given["control"][b : b + 1, MASK[b]],
            given["cond"].select(slice(b, b + 1)),
            given["self_cond"][b : b + 1, MASK[b]],
        )
        assert_same(padded[b, MASK[b]], alone[0])


def test_full_masks_are_the_same_as_none():
    denoiser, given = build_random(), inputs()
    full = torch.ones(3, 5, dtype=torch.bool)
    assert_same(denoiser(**given, mask=full), denoiser(**given))


@pytest.mark.parametrize("output", OUTPUTS)
def test_empty_sets_give_finite_output_and_gradients(output):
    denoiser, given = build_random(output=output), inputs()
    out = denoiser(**given, mask=prefix_mask(0, 5, 2))
    out.square().sum().backward()
    assert out.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in denoiser.parameters() if parameter.grad is not None)


# Options.


@pytest.mark.parametrize("parallel_block", [True, False])
@pytest.mark.parametrize("depth", [1, 3])
def test_control_residual_starts_at_relu_of_control(parallel_block, depth):
    denoiser = build(parallel_block=parallel_block, depth=depth, out_activation="relu")
    given = inputs()
    assert (given["control"] < 0).any()
    assert torch.equal(denoiser(**given), given["control"].relu())


def test_a_residual_on_no_control_learns_from_the_start():
    # Marginal sets have controls of zeros: where a ReLU passes no gradient at exactly 0, they would teach nothing.
    denoiser, given = build(out_activation="relu"), inputs()
    out = denoiser(**replaced(given, control=torch.zeros_like(given["control"])))
    assert not out.any()
    (out * normal(3, 5, N_GENES, seed=4)).sum().backward()
    assert (denoiser.head.weight.grad != 0).all()
    assert (denoiser.head.bias.grad != 0).all()


def test_control_weight_is_the_part_of_the_controls_that_cells_start_from():
    given = inputs()
    denoiser = build(control_weight=0.75, out_activation="none")
    torch.testing.assert_close(denoiser(**given), 0.75 * given["control"])
    with pytest.raises(ValueError, match=r"control_weight \(1\.5\) must be between 0 and 1"):
        build(control_weight=1.5)


def test_mean_effect_starts_at_nothing_and_shifts_all_cells_of_a_set_alike():
    given = inputs()
    plain, effect = build_random(), build_random(mean_effect=True)
    effect.load_state_dict(plain.state_dict() | {"effect.weight": torch.zeros(N_GENES, 12)})
    assert torch.equal(effect(**given), plain(**given))
    nn.init.normal_(effect.effect.weight, generator=torch.Generator().manual_seed(0))
    shift = effect(**given) - plain(**given)
    expected = effect.conditioning.of_perturbations(given["cond"]) @ effect.effect.weight.T
    assert_same(shift, expected[:, None].expand_as(shift))
    hidden = dataclasses.replace(given["cond"], hidden=torch.tensor([True, False, True]))
    shift = effect(**replaced(given, cond=hidden)) - plain(**replaced(given, cond=hidden))
    assert_same(shift, expected[:, None] * torch.tensor([0.0, 1.0, 0.0])[:, None, None].expand_as(shift))
    assert torch.equal(effect(**replaced(given, cond=None)), plain(**replaced(given, cond=None)))


def test_direct_output_does_not_start_at_zero_or_at_control():
    denoiser, given = build(output="direct", out_activation="relu"), inputs()
    out = denoiser(**given)
    assert (out > 0).float().mean() > 0.1
    assert_different(out, given["control"].relu())


@pytest.mark.parametrize("output", OUTPUTS)
def test_relu_cuts_what_is_negative_and_none_leaves_it(output):
    given = inputs()
    raw = build_random(output=output, out_activation="none")(**given)
    assert (raw < -0.1).any()
    assert (raw > 0.1).any()
    torch.testing.assert_close(build_random(output=output, out_activation="relu")(**given), raw.clamp_min(0))


def test_no_self_conditioning_is_the_same_as_zeros():
    denoiser, given = build_random(), inputs()
    zeros = torch.zeros_like(given["x_t"])
    assert_same(denoiser(**replaced(given, self_cond=None)), denoiser(**replaced(given, self_cond=zeros)))


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize(("n_cells", "n_genes"), [(5, 1), (1, 9), (1, 1)])
def test_one_gene_and_one_cell_work(output, n_cells, n_genes):
    denoiser = build_random(n_genes, output=output, depth=1)
    given = inputs(n_cells=n_cells, n_genes=n_genes)
    out = denoiser(**given)
    assert out.shape == (3, n_cells, n_genes)
    assert out.isfinite().all()
    assert_different(denoiser(**replaced(given, x_t=given["x_t"] + 3)), out)


def test_depth_counts_the_blocks_and_each_matters():
    given = inputs()
    denoiser = build_random(depth=3)
    assert len(denoiser.blocks) == 3
    whole = denoiser(**given)
    for i in range(3):
        kept = nn.ModuleList(block for j, block in enumerate(denoiser.blocks) if j != i)
        blocks, denoiser.blocks = denoiser.blocks, kept
        assert_different(denoiser(**given), whole)
        denoiser.blocks = blocks


@pytest.mark.parametrize("output", OUTPUTS)
def test_modulation_once_a_set_equals_modulation_of_each_cell(output):
    denoiser = build_random(sizes=None, conditioning="reference", output=output)
    given, cov = inputs(), normal(3, 1, N_GENES, seed=7)
    once = denoiser(**replaced(given, cond=cov))
    assert_same(denoiser(**replaced(given, cond=cov.expand(3, 5, N_GENES).contiguous())), once)
    assert_different(denoiser(**replaced(given, cond=cov + 1)), once)


def test_bf16_autocast_is_close_to_float32():
    denoiser, given = build_random(), inputs()
    expected = denoiser(**given, mask=MASK)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = denoiser(**given, mask=MASK)
    error = (out.float() - expected).square().mean().sqrt() / expected.std()
    assert 0 < error < 0.03  # bf16 keeps 8 bits


@pytest.mark.filterwarnings("ignore")  # the compiler warns of itself
def test_compiled_blocks_hold_whatever_sets_they_are_given(monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    graphs, denoiser, compiled = [], build_random(depth=4), build_random(depth=4)

    def as_it_is(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compile_blocks(compiled, as_it_is)
    for n_sets in [3, 1, 0, 2, 3]:  # of a first estimate
        given = {name: of.select(slice(n_sets)) if name == "cond" else of[:n_sets] for name, of in inputs().items()}
        with torch.no_grad():
            assert_same(compiled(**given, mask=MASK[:n_sets]), denoiser(**given, mask=MASK[:n_sets]))
        if n_sets > 1:  # parts of a batch are of two sizes at most
            for made in (compiled, denoiser):
                made(**given, mask=MASK[:n_sets]).square().sum().backward()
            for name, p in compiled.named_parameters():
                assert_same(p.grad, denoiser.get_parameter(name).grad)
    assert graphs


# Conditions.


@pytest.mark.parametrize("conditioning", ["labels", "reference"])
def test_hidden_sets_are_the_same_as_no_condition(conditioning):
    denoiser, given = build_random(conditioning=conditioning, covariate_dim=4), inputs()
    one = labels(3)
    perturbation = one.perturbation[:, :1]
    hidden = Labels(perturbation, one.cell_type, one.batch, torch.tensor([True, False, True]))
    shown = Labels(perturbation, one.cell_type, one.batch)
    out, null = denoiser(**replaced(given, cond=hidden)), denoiser(**replaced(given, cond=None))
    assert_same(out[[0, 2]], null[[0, 2]])
    assert_same(out[1], denoiser(**replaced(given, cond=shown))[1])
    assert_different(out[1], null[1])


def test_a_set_without_any_label_differs_from_a_hidden_one():
    # "Nothing is known of it" is a row of each table; "unconditional" is a vector of its own.
    denoiser, given = build_random(), inputs()
    nothing = Labels(torch.full((3, 1), NULL), torch.full((3,), NULL), torch.full((3,), NULL))
    assert_different(denoiser(**replaced(given, cond=nothing)), denoiser(**replaced(given, cond=None)))


# Gradients.


@pytest.mark.parametrize(
    ("conditioning", "perturbation_encoding", "batch_encoding"),
    [("labels", "onehot", "onehot"), *(("reference", p, b) for p, b in product(["onehot", "none"], repeat=2))],
)
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("depth", [1, 2])
def test_every_parameter_is_used_and_gets_a_gradient(
    output, conditioning, perturbation_encoding, batch_encoding, depth
):
    # DDP waits for all gradients: a parameter without one stops it.
    settings = {
        "output": output,
        "depth": depth,
        "conditioning": conditioning,
        "perturbation_encoding": perturbation_encoding,
        "batch_encoding": batch_encoding,
        "covariate_dim": 4,
    }
    given, one = inputs(), labels(3)
    perturbation = torch.tensor([[1, 2], [-1, -1], [2, -1]])[:, : 2 if conditioning == "labels" else 1]
    hidden = Labels(perturbation, one.cell_type, one.batch, torch.tensor([False, False, True]))
    weights = normal(3, 5, N_GENES, seed=4)
    for denoiser in (build(**settings), build_random(**settings)):
        (denoiser(**replaced(given, cond=hidden)) * weights).sum().backward()
        assert [name for name, p in denoiser.named_parameters() if p.grad is None] == []
    assert [name for name, p in denoiser.named_parameters() if not p.grad.any()] == []


@pytest.mark.parametrize("conditioning", ["labels", "reference"])
def test_no_row_of_a_weight_is_computed_in_vain(conditioning):
    denoiser = build_random(conditioning=conditioning, covariate_dim=4)
    one = labels(3)
    cond = Labels(
        one.perturbation[:, : 2 if conditioning == "labels" else 1],
        one.cell_type,
        one.batch,
        torch.tensor([False, False, True]),
    )
    (denoiser(**replaced(inputs(), cond=cond)) * normal(3, 5, N_GENES, seed=4)).sum().backward()
    idle = {}
    for name, parameter in denoiser.named_parameters():
        rows = (parameter.grad.reshape(len(parameter), -1) == 0).all(1).nonzero()[:, 0].tolist()
        if rows and not isinstance(denoiser.get_submodule(name.rpartition(".")[0]), nn.Embedding):
            idle[name] = rows
    # The last block projects controls and cells with one matrix; nothing reads the controls' half.
    proj = "blocks.1.attention.attention.proj"
    controls = list(range(12, 24))
    assert idle == {f"{proj}.weight": controls, f"{proj}.bias": controls}


def test_all_parameters_are_used_where_no_set_drew_hiding_or_self_conditioning():
    denoiser, given, one = build(), inputs(), labels(3)
    shown = Labels(one.perturbation, one.cell_type, one.batch, torch.zeros(3, dtype=torch.bool))
    denoiser(**replaced(given, cond=shown, self_cond=torch.zeros_like(given["x_t"]))).sum().backward()
    assert [name for name, p in denoiser.named_parameters() if p.grad is None] == []


def test_gates_start_closed():
    # adaLN-Zero: at the start a block passes its input on, so depth does not matter.
    given = inputs()
    denoiser = build(output="direct", depth=3)
    whole = denoiser(**given)
    denoiser.blocks = denoiser.blocks[2:]
    assert torch.equal(denoiser(**given), whole)


# Errors.


def test_another_number_of_controls_than_of_cells_is_refused():
    with pytest.raises(ValueError, match=r"control \(3, 4, 9\) must have the shape of x_t \(3, 5, 9\)"):
        build()(**replaced(inputs(), control=normal(3, 4, N_GENES)))


def test_label_conditioning_refuses_a_covariate_embedding():
    with pytest.raises(ValueError, match=r"only denoiser.conditioning=reference takes one"):
        build()(**replaced(inputs(), cond=normal(3, 1, N_GENES)))


def test_label_conditioning_needs_the_vocabulary_sizes():
    with pytest.raises(ValueError, match=r"denoiser.conditioning=labels needs the vocabulary sizes"):
        build(sizes=None)


def test_heads_must_divide_twice_the_width():
    with pytest.raises(ValueError, match=r"denoiser.n_heads \(5\) must divide"):
        build(n_heads=5)
    assert build_random(n_heads=8)(**inputs()).isfinite().all()  # 24 = 2 x 12
