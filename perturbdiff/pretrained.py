"""PerturbDiff, the class users hold: load, save, predict."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from torch import Tensor

from perturbdiff import __version__
from perturbdiff.config import (
    DenoiserConfig,
    DiffusionConfig,
    ModelConfig,
    ObsColumns,
    Preprocessing,
    SamplingConfig,
    as_dict,
    check_preprocessing,
    check_sampling,
    from_dict,
)
from perturbdiff.data.batch import Vocabularies
from perturbdiff.data.screen import expression_of
from perturbdiff.data.seeds import torch_generator
from perturbdiff.data.vocab import GeneVocab, LabelVocab
from perturbdiff.hub.card import write_card
from perturbdiff.hub.layout import (
    ModelFiles,
    check_golden,
    folder_identity,
    load_weights,
    make_golden,
    read_config,
    read_json_files,
    write_model_folder,
)
from perturbdiff.model.conditioning import VocabSizes
from perturbdiff.model.denoiser import Denoiser
from perturbdiff.prediction import Context, deal_sets, denoise_sets
from perturbdiff.progress import progress

if TYPE_CHECKING:
    from tqdm import tqdm

MAX_PREDICTED_CELLS = 50_000_000  # of one call: the answer is held in memory
READ_AGAIN = 5  # times, a folder that is replaced while it is read
CONFIG_KEYS = {
    "format_version", "library_version", "class", "denoiser", "diffusion", "sampling", "obs", "set_size", "sha256",
}  # fmt: skip


class PerturbDiff:
    """A trained model with everything it needs to predict.

    Attributes
    ----------
    denoiser
        The network, in eval mode.
    genes, vocabularies
        What its inputs and conditions are called.
    preprocessing
        How expression becomes model input.
    config
        Architecture, diffusion, sampling defaults, set size.
    training
        Where the weights come from (plain JSON values).
    """

    def __init__(
        self,
        denoiser: Denoiser,
        genes: GeneVocab,
        vocabularies: Vocabularies,
        preprocessing: Preprocessing,
        config: ModelConfig,
        training: dict[str, Any],
        name: str = "unsaved",
    ) -> None:
        self.denoiser = denoiser.eval()
        self.genes = genes
        self.vocabularies = vocabularies
        self.preprocessing = preprocessing
        self.config = config
        self.training = training
        self.name = name

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str | torch.device | None = None) -> PerturbDiff:
        """Load a model folder; every file's hash and the golden output are checked.

        Raises
        ------
        FileNotFoundError
            No such folder, or a file of it is missing.
        ValueError
            A file was truncated or changed, does not fit the others, or is of a newer format.

        Notes
        -----
        A folder that a run replaces while it is read is read again.
        """
        for _ in range(READ_AGAIN):
            identity = folder_identity(path)
            try:
                model = cls._read(path, device)
            except (OSError, RuntimeError, ValueError):  # RuntimeError: of torch, which maps the weights by their name
                time.sleep(0.1)  # for the moment between two renames
                if folder_identity(path) == identity:
                    raise
            else:
                if folder_identity(path) == identity:  # or its files may be of two models
                    return model
        raise ValueError(f"{path} is replaced again and again while it is read; open it when that has ended.")

    @classmethod
    def _read(cls, path: str | Path, device: str | torch.device | None) -> PerturbDiff:
        config = read_config(path)
        files = read_json_files(path, config)
        try:
            genes = GeneVocab(_strings(files["genes.json"]["names"]), _strings(files["genes.json"]["ensembl"]) or None)
            vocabularies = Vocabularies(
                LabelVocab("perturbation", _strings(files["perturbations.json"]["names"])),
                LabelVocab("cell_type", _strings(files["cell_types.json"]["names"])),
                LabelVocab("batch", _strings(files["batches.json"]["names"])),
                files["perturbations.json"]["combination_separator"],
            )
            preprocessing = from_dict(Preprocessing, files["preprocessing.json"])
            model_config = ModelConfig(
                from_dict(DenoiserConfig, config["denoiser"]),
                from_dict(DiffusionConfig, config["diffusion"]),
                from_dict(SamplingConfig, config["sampling"]),
                from_dict(ObsColumns, config["obs"]),
                config["set_size"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: a setting is missing or of the wrong kind ({error}).") from error
        check_preprocessing(preprocessing)
        _refuse_unbelievable(path, config, model_config)
        with torch.device("meta"):  # shapes only: no memory is taken before they were compared with the file's
            denoiser = build_denoiser(model_config.denoiser, len(genes), vocabularies)
        load_weights(path, denoiser)
        check_golden(path, denoiser.eval())
        model = cls(denoiser, genes, vocabularies, preprocessing, model_config, files["training.json"], Path(path).name)
        model.denoiser.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return model

    def save_pretrained(self, path: str | Path) -> None:
        """Write a model folder, whole or not at all; replaces an older one of that name.

        Raises
        ------
        FileExistsError
            `path` exists and is not a model folder.
        """
        config = {
            "library_version": __version__,
            "class": "PerturbDiff",
            "denoiser": as_dict(self.config.denoiser),
            "diffusion": as_dict(self.config.diffusion),
            "sampling": as_dict(self.config.sampling),
            "obs": vars(self.config.obs),
            "set_size": self.config.set_size,
        }
        vocabularies = self.vocabularies
        json_files: dict[str, dict[str, Any]] = {
            "genes.json": {"names": self.genes.names, "ensembl": self.genes.ensembl or ()},
            "perturbations.json": {
                "names": vocabularies.perturbations.names,
                "combination_separator": vocabularies.combination_separator,
            },
            "cell_types.json": {"names": vocabularies.cell_types.names},
            "batches.json": {"names": vocabularies.batches.names},
            "preprocessing.json": as_dict(self.preprocessing),
            "training.json": self.training,
        }
        weights = {name: tensor.detach().cpu() for name, tensor in self.denoiser.state_dict().items()}
        with torch.device("meta"):
            on_cpu = build_denoiser(self.config.denoiser, len(self.genes), vocabularies).eval()
        on_cpu.load_state_dict(weights, assign=True)  # the golden output is that of the CPU, wherever training ran
        n_parameters = sum(tensor.numel() for tensor in weights.values())
        card = write_card(config, json_files, n_parameters)
        golden = make_golden(on_cpu, self._golden_inputs())
        write_model_folder(path, ModelFiles(config, json_files, weights, golden, card))

    def predict(
        self,
        controls: AnnData,
        perturbation: str,
        cell_type: str | None = None,
        batch: str | None = None,
        n_cells: int | None = None,
        n_populations: int = 1,
        guidance_scale: float | None = None,
        steps: int | None = None,
        sampler: str | None = None,
        seed: int = 0,
        min_gene_overlap: float = 0.5,
        bar: tqdm[Any] | None = None,
    ) -> AnnData:
        """Predict cells under a perturbation from control cells.

        Parameters
        ----------
        controls
            Unperturbed cells, X raw counts or log1p values; genes are matched by name. All cells are used as controls.
        perturbation
            A known perturbation, or several joined with the model's separator ("A+B").
        cell_type, batch
            Condition on these; by default on each control cell's own obs columns. A label that training has not seen
            with a perturbation is the null label, and `uns` says so.
        n_cells
            Cells to predict in each population; one for each control cell by default.
        n_populations
            Independent draws of the response distribution.
        guidance_scale, steps, sampler
            w of (1 + w) cond - w uncond; denoiser calls; "ddim" or "ddpm". The model's own defaults if None.
        seed
            Same seed and arguments, same cells.
        min_gene_overlap
            Fewer of the model's genes in `controls` than this part are an error.
        bar
            Progress bar to move, of who makes many predictions; one of its own by default.

        Returns
        -------
        AnnData with X (cells, genes) log1p values as CSR, the model's gene names, obs `perturbation`, `cell_type`,
        `batch`, `source_control` (the control cell it was started from), `population`, and uns["perturbdiff"] with
        model, sampler, steps, guidance, seed and what was unseen.

        Raises
        ------
        KeyError
            An unknown perturbation, with the nearest known ones.
        ValueError
            X is neither counts nor log1p; too few genes match; no cells; a sampling setting that cannot be.
        """
        sampling = self._sampling(guidance_scale, steps, sampler)
        if n_cells is not None and n_cells < 1:
            raise ValueError(f"n_cells ({n_cells}) must be at least 1.")
        if n_populations < 1:
            raise ValueError(f"n_populations ({n_populations}) must be at least 1.")
        if (n_all := (n_cells or controls.n_obs) * n_populations) > MAX_PREDICTED_CELLS:
            raise ValueError(
                f"{n_all:,} cells asked for; one call predicts at most {MAX_PREDICTED_CELLS:,}: use several."
            )
        if controls.n_obs == 0:
            raise ValueError("controls has no cells; give the control cells of the context to predict.")
        self.vocabularies.encode([(perturbation, None, None)])  # an unknown perturbation fails before the work
        expression = expression_of(controls, self.preprocessing)
        alignment = self.genes.align(expression.genes, min_gene_overlap)
        expression = expression.with_genes(self.genes, alignment.columns)
        contexts = self._contexts(controls.obs, cell_type, batch)
        sets, conditions = deal_sets(contexts, n_cells, n_populations, self.config.set_size, seed)
        source = np.concatenate([s.rows for s in sets])  # the control each predicted cell starts from
        population = np.concatenate([np.full(len(s.rows), s.key[0]) for s in sets])
        labels = self.vocabularies.encode([(perturbation, *context) for context in conditions])
        with nullcontext(bar) if bar is not None else progress(len(source), "predict", "cell") as bar:
            X = denoise_sets(self.denoiser, sets, expression, labels, self.config, sampling, seed, bar)
        context = [contexts[i] for i in source]
        obs = pd.DataFrame(
            {
                "perturbation": pd.Categorical([perturbation] * len(source)),
                "cell_type": pd.Categorical([c if c is not None else "unknown" for c, _ in context]),
                "batch": pd.Categorical([b if b is not None else "unknown" for _, b in context]),
                "source_control": controls.obs_names.to_numpy()[source],
                "population": population,
            },
            index=pd.Index([f"predicted_{i}" for i in range(len(source))]),
        )
        var = pd.DataFrame(index=pd.Index(self.genes.names))
        if self.genes.ensembl is not None:
            var["ensembl_id"] = self.genes.ensembl
        uns = {
            "model": self.name,
            "library_version": __version__,
            "seed": seed,
            **{name: getattr(sampling, name) for name in ("sampler", "spacing", "guidance_scale", "eta")},
            "n_steps": sampling.n_steps if sampling.spacing == "strided" else sampling.start_time,
            "n_populations": n_populations,
            "x_kind": "log1p",
            "target_sum": self.preprocessing.target_sum,
            "library_size_col": self.preprocessing.library_size_col or "",
            "n_genes_matched": alignment.n_matched,
            "genes_matched_by": alignment.matched_by,
            "unseen": self._unseen(conditions),
        }
        return AnnData(X=X, obs=obs, var=var, uns={"perturbdiff": uns})

    def _sampling(self, guidance_scale: float | None, steps: int | None, sampler: str | None) -> SamplingConfig:
        given = {"guidance_scale": guidance_scale, "sampler": sampler}
        if steps is not None:
            given["n_steps" if self.config.sampling.spacing == "strided" else "start_time"] = steps
        chosen = {name: value for name, value in given.items() if value is not None}
        sampling = from_dict(SamplingConfig, {**as_dict(self.config.sampling), **chosen})
        check_sampling(sampling, self.config.diffusion)
        return sampling

    def _contexts(self, obs: pd.DataFrame, cell_type: str | None, batch: str | None) -> list[Context]:
        # (cell type, batch) of each control cell; None where nobody says.
        columns = []
        for given, name in ((cell_type, self.config.obs.cell_type), (batch, self.config.obs.batch)):
            if given is not None or name not in obs.columns:
                columns.append([given] * len(obs))
            else:
                columns.append([None if pd.isna(label) else str(label) for label in obs[name]])
        return list(zip(*columns, strict=True))

    def _unseen(self, conditions: list[Context]) -> list[str]:
        known = self.vocabularies
        cell_types = sorted({c or "unknown" for c, _ in conditions if c not in known.cell_types.ids})
        batches = sorted({b or "unknown" for _, b in conditions if b not in known.batches.ids})
        return [f"cell_type {name}" for name in cell_types] + [
            f"batch {name}" for name in batches if len(known.batches)
        ]

    def _golden_inputs(self) -> dict[str, Tensor]:
        # Two sets of three cells, one masked; known and null labels.
        generator = torch_generator("cpu", 0, "golden check")
        shape = (2, 3, len(self.genes))
        sizes = vocab_sizes(self.vocabularies)
        return {
            "x_t": torch.randn(shape, generator=generator),
            "t": torch.tensor([0, self.config.diffusion.n_timesteps - 1]),
            "control": torch.rand(shape, generator=generator),
            "self_cond": torch.rand(shape, generator=generator),
            "mask": torch.tensor([[True, True, True], [True, True, False]]),
            "perturbation": torch.tensor([[min(0, sizes.perturbations - 1)], [sizes.perturbations - 1]]),
            "cell_type": torch.tensor([sizes.cell_types - 1, -1]),
            "batch": torch.tensor([-1, sizes.batches - 1]),
        }


def _refuse_unbelievable(path: str | Path, config: dict[str, Any], model: ModelConfig) -> None:
    # Sizes from a foreign config.json: beyond these bounds even shapes without memory are a burden.
    if unknown := sorted(set(config) - CONFIG_KEYS):
        raise ValueError(f"{path}: config.json has unknown keys {unknown}; update perturbdiff or get the folder again.")
    if config.get("class") != "PerturbDiff":
        raise ValueError(f"{path}: config.json is of class {config.get('class')!r}; this reads 'PerturbDiff'.")
    if set(config["obs"]) != set(ObsColumns.__dataclass_fields__):
        raise ValueError(f"{path}: config.json's obs must have the keys {sorted(ObsColumns.__dataclass_fields__)}.")
    bounds: dict[str, tuple[Any, int]] = {
        "set_size": (model.set_size, 1 << 20),
        "denoiser.depth": (model.denoiser.depth, 1 << 10),
        "denoiser.width": (model.denoiser.width, 1 << 16),
        "denoiser.covariate_dim": (model.denoiser.covariate_dim, 1 << 16),
        "denoiser.mlp_ratio": (model.denoiser.mlp_ratio, 1 << 8),
        "diffusion.n_timesteps": (model.diffusion.n_timesteps, 1 << 20),
    }
    for key, (value, most) in bounds.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
            raise ValueError(f"{path}: {key} ({value!r}) must be greater than 0 and at most {most}.")
    if not isinstance(model.set_size, int):
        raise ValueError(f"{path}: set_size ({model.set_size!r}) must be a whole number.")
    check_sampling(model.sampling, model.diffusion)


def build_denoiser(config: DenoiserConfig, n_genes: int, vocabularies: Vocabularies) -> Denoiser:
    """A fresh denoiser for these genes and labels."""
    return Denoiser(config, n_genes, vocab_sizes(vocabularies))


def vocab_sizes(vocabularies: Vocabularies) -> VocabSizes:
    """How many labels of each kind there are."""
    return VocabSizes(len(vocabularies.perturbations), len(vocabularies.cell_types), len(vocabularies.batches))


def _strings(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError("names must be a list of strings")
    return tuple(values)
