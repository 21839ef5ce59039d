"""The denoiser: a diffusion transformer over the cells of a set and their controls (Yuan et al. 2026).

B = sets, S = cells per set, G = genes, D = width.
Two streams run side by side: the noisy perturbed cells `h` and their controls `hc`, of which pairs are the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from perturbdiff.config import DenoiserConfig, check_denoiser
from perturbdiff.data.vocab import Labels, Vocabularies
from perturbdiff.nn.conditioning import (
    CovariateEncoder,
    DoseEffect,
    LabelConditioning,
    ReferenceConditioning,
    VocabSizes,
)
from perturbdiff.nn.layers import MLP, Attention, Modulation, TimeEmbedding, modulate, norm

# Of a block: with gradient for two sizes of parts of a batch, and without for none, one or several sets; the first
# block, those between and the last are of their own each.
GRAPHS = 16


class PairedAttention(nn.Module):
    """The published attention: cell i and control i form one token, concatenated on the feature axis (2D wide)."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.attention = Attention(2 * width, n_heads)

    def forward(self, x: Tensor, control: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        out, out_control = self.attention(torch.cat([x, control], dim=-1), mask).chunk(2, dim=-1)
        return out, out_control


class Block(nn.Module):
    """adaLN-Zero block on both streams. In the last block of a denoiser the controls are only attended to."""

    def __init__(self, config: DenoiserConfig, is_last: bool) -> None:
        super().__init__()
        width = config.width
        self.parallel = config.parallel_block
        self.attention = PairedAttention(width, config.n_heads)
        self.modulation = Modulation(width, 6)
        self.mlp = MLP(width, config.mlp_ratio)
        self.control_modulation = Modulation(width, 2 if is_last else 6)
        self.control_mlp = None if is_last else MLP(width, config.mlp_ratio)

    def forward(self, h: Tensor, hc: Tensor, c: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        modulation, control_modulation = self.modulation(c), self.control_modulation(c)
        attended, control_attended = self.attention(
            modulate(norm(h), *modulation[:2]), modulate(norm(hc), *control_modulation[:2]), mask
        )
        h = self._residual(h, attended, self.mlp, modulation)
        if self.control_mlp is not None:
            hc = self._residual(hc, control_attended, self.control_mlp, control_modulation)
        return h, hc

    def _residual(self, h: Tensor, attended: Tensor, mlp: MLP, modulation: tuple[Tensor, ...]) -> Tensor:
        _, _, gate, mlp_shift, mlp_scale, mlp_gate = modulation
        after = h + gate * attended
        return after + mlp_gate * mlp(modulate(norm(h if self.parallel else after), mlp_shift, mlp_scale))


class Denoiser(nn.Module):
    """x_t, t, controls and condition -> x0_pred.

    Parameters
    ----------
    config
        Architecture.
    n_genes
        G.
    sizes
        Vocabulary sizes; None builds no label tables, `cov` is then given with every call.

    Notes
    -----
    The published code concatenates x_t with the self-conditioning estimate (controls with zeros) before one linear
    layer. Here the halves are layers of their own, so that a half that is zero costs nothing.
    """

    def __init__(self, config: DenoiserConfig, n_genes: int, sizes: VocabSizes | None) -> None:
        super().__init__()
        check_denoiser(config)
        self.config = config
        self.n_genes = n_genes
        width = config.width
        self.embed_x = nn.Linear(n_genes, width)
        self.embed_self_cond = nn.Linear(n_genes, width, bias=False)
        self.embed_control = nn.Linear(n_genes, width)
        self.embed_t = TimeEmbedding(width)
        self.conditioning: LabelConditioning | ReferenceConditioning
        if config.conditioning == "labels":
            if sizes is None:
                raise ValueError("denoiser.conditioning=labels needs the vocabulary sizes.")
            self.conditioning = LabelConditioning(sizes, width, config.interaction)
        else:
            encoder = None if sizes is None else CovariateEncoder(sizes, config, n_genes)
            self.conditioning = ReferenceConditioning(width, config.published_encoding.covariates or n_genes, encoder)
        self.blocks = nn.ModuleList(Block(config, is_last=i == config.depth - 1) for i in range(config.depth))
        self.final_modulation = Modulation(width, 2)
        self.head = nn.Linear(width, n_genes)
        self.effect = nn.Linear(width, n_genes, bias=False) if config.mean_effect else None
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Xavier for matrices, N(0, 0.5) for label rows; zero for gates (adaLN-Zero), residual head, dose effects."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                # Far apart from the start: at DiT's 0.02, 200 steps on 25 knock-outs gave Pearson delta 0.16 for 0.24.
                nn.init.normal_(module.weight, std=0.5)
        for module in self.modules():
            if isinstance(module, Modulation):
                nn.init.zeros_(module.linear.weight)
                nn.init.zeros_(module.linear.bias)
            elif isinstance(module, DoseEffect):
                nn.init.zeros_(module.fc2.weight)
        # A residual head starts at "no change". A direct head under a ReLU would never leave zero.
        if self.config.output == "control_residual":
            nn.init.zeros_(self.head.weight)
        if self.effect is not None:
            nn.init.zeros_(self.effect.weight)
        nn.init.normal_(self.conditioning.null, std=0.02)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        control: Tensor,
        cond: Labels | Tensor | None = None,
        self_cond: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Estimate x_0.

        Parameters
        ----------
        x_t
            (B, S, G) noisy cells, model units (log1p CP10k / 10).
        t
            (B,) timesteps, one per set.
        control
            (B, S, G) the control of each cell; zeros for a set without controls.
        cond
            Labels; or the covariate embedding (B, 1 or S, G) of the published code with conditioning=reference;
            None is the null condition.
        self_cond
            (B, S, G) an earlier estimate of x_0; None is the same as zeros.
        mask
            (B, S) True where a cell and its control are real; all real if None.

        Returns
        -------
        (B, S, G) x0_pred.

        Raises
        ------
        ValueError
            Another number of controls than of cells.
        """
        if x_t.shape != control.shape:
            raise ValueError(
                f"control {tuple(control.shape)} must have the shape of x_t {tuple(x_t.shape)}: one a cell."
            )
        c = self.embed_t(t) + self._embed_condition(cond)  # (B, 1 or S, D)
        h = self.embed_x(x_t)  # (B, S, D)
        if self_cond is not None:
            h = h + self.embed_self_cond(self_cond)
        hc = self.embed_control(control)  # (B, S, D)
        for block in self.blocks:
            h, hc = block(h, hc, c, mask)
        shift, scale = self.final_modulation(c)
        x0_pred = self.head(modulate(norm(h), shift, scale))  # (B, S, G)
        if self.config.output == "control_residual":
            x0_pred = torch.add(x0_pred, control, alpha=self.config.control_weight)
        if self.effect is not None and isinstance(cond, Labels):
            x0_pred = x0_pred + self._mean_effect(cond)
        # At exactly 0 its gradient is 1, that of F.relu 0: a residual on no control would never leave 0.
        return x0_pred.clamp_min(0) if self.config.out_activation == "relu" else x0_pred

    def _mean_effect(self, labels: Labels) -> Tensor:
        """(B, 1, G) what the perturbations do to every cell alike; nothing where the condition is hidden."""
        assert self.config.conditioning == "labels", "mean_effect is of label rows"  # of whatever class: peft wraps it
        shift = cast(nn.Linear, self.effect)(cast(LabelConditioning, self.conditioning).of_perturbations(labels))
        if labels.hidden is not None:
            shift = shift.masked_fill(labels.hidden[:, None], 0.0)
        return shift[:, None]

    def _embed_condition(self, cond: Labels | Tensor | None) -> Tensor:
        if cond is None:
            return self.conditioning.null
        if isinstance(cond, Labels):
            return self.conditioning(cond)
        if self.config.conditioning != "reference":
            raise ValueError("a covariate embedding was given; only denoiser.conditioning=reference takes one.")
        return cast(ReferenceConditioning, self.conditioning).from_covariates(cond)


def compile_blocks(denoiser: Denoiser, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile each block twice: with gradient for as many sets as it is given, and without for any number of them.

    A first estimate is made of other numbers of sets in each step. Left to find that out, torch would compile for the
    first ones it sees, so that a resumed run had other code than one that was not stopped, and give up after some.
    """
    torch._dynamo.config.recompile_limit = GRAPHS
    for block in denoiser.blocks:
        block.forward = _Compiled(block.forward, backend)


class _Compiled:
    def __init__(self, forward: Callable[..., Any], backend: str | Callable[..., Any]) -> None:
        self.with_gradient = torch.compile(forward, backend=backend, dynamic=False)
        self.without = torch.compile(forward, backend=backend, dynamic=True)

    def __call__(self, *args: Any) -> Any:
        return (self.with_gradient if torch.is_grad_enabled() else self.without)(*args)


def build_denoiser(config: DenoiserConfig, n_genes: int, vocabularies: Vocabularies) -> Denoiser:
    """A fresh denoiser for these genes and labels."""
    return Denoiser(config, n_genes, VocabSizes.from_vocabularies(vocabularies))
