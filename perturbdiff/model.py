"""PerturbDiff, the class users hold: load, save, predict."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData, concat
from torch import Tensor

from perturbdiff._version import __version__
from perturbdiff.config import ModelConfig, Preprocessing, SamplingConfig, as_dict, check_sampling, from_dict
from perturbdiff.data.expression import ONE_COUNT, counts_of
from perturbdiff.data.h5ad import values_of
from perturbdiff.data.labels import ALL
from perturbdiff.data.rng import torch_generator
from perturbdiff.data.screen import (
    Expression,
    control_labels,
    dropped_cells,
    expression_of,
    warn_of_missing_columns,
)
from perturbdiff.data.space import SAME, totals
from perturbdiff.data.vocab import Alignment, GeneVocab, LabelVocab, Vocabularies, nearest
from perturbdiff.diffusion.generate import Context
from perturbdiff.features.tables import FeatureTable
from perturbdiff.files import few, printable, progress
from perturbdiff.generation import Generated, Generation, Wanted
from perturbdiff.hub.adapter import check_adapter, read_adapter
from perturbdiff.hub.card import check_card, eval_results_files, write_card
from perturbdiff.hub.download import READ_AGAIN, ModelSource, find_model, wait_while_replaced
from perturbdiff.hub.info import model_summary
from perturbdiff.hub.metadata import ModelMetadata, parse_metadata
from perturbdiff.hub.model_folder import (
    OWN_FILES,
    folder_identity,
    read_folder,
)
from perturbdiff.hub.push import Publication, publish
from perturbdiff.hub.records import EvaluationRecord, MeansRecord, TrainingRecord
from perturbdiff.hub.tensors import (
    check_golden,
    denoiser_of,
    load_weights,
    make_golden,
    max_tensor_bytes,
    take_means,
    with_means,
    write_model_folder,
)
from perturbdiff.means.training import TrainingMeans
from perturbdiff.means.trust import Trust
from perturbdiff.nn.conditioning import FeatureEmbedding, LabelConditioning, VocabSizes
from perturbdiff.nn.denoiser import Denoiser
from perturbdiff.nn.transfer import tables_of

if TYPE_CHECKING:
    from tqdm import tqdm

MAX_PREDICTED_CELLS = 50_000_000  # of one call: the answer is held in memory
MOST_GENES = 0.8  # of the genes of training; with fewer, library sizes are other sums


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
        Where the weights come from.
    evaluation
        Scores on held-out conditions, as `Scores.record` gives them; None if nobody measured any.
    means
        Of the training conditions of a screen; None of atlases and of models of earlier versions.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        genes: GeneVocab,
        vocabularies: Vocabularies,
        preprocessing: Preprocessing,
        config: ModelConfig,
        training: TrainingRecord,
        evaluation: EvaluationRecord | None = None,
        split: dict[str, Any] | None = None,
        means: TrainingMeans | None = None,
        name: str = "unsaved",
    ) -> None:
        self.denoiser = denoiser.eval()
        self.genes = genes
        self.vocabularies = vocabularies
        self.preprocessing = preprocessing
        self.config = config
        self.training = training
        self.evaluation = evaluation
        self.split = split
        self.means = self._told(means)
        self.name = name

    def __repr__(self) -> str:
        first = f"PerturbDiff {printable(self.name)}: {self.n_parameters:,} parameters on {self.device}"
        return f"{first}\n{model_summary(self._metadata())}"

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo_id: str | Path,
        revision: str | None = None,
        subfolder: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        golden_check: bool = True,
        base: str | Path | None = None,
    ) -> PerturbDiff:
        """Load a model folder or adapter, from here or from the Hub, every file's hash and the golden output checked.

        Parameters
        ----------
        path_or_repo_id
            Folder of a model or of a run, a name of the registry, or owner/name[@REVISION] of a repo on the Hub.
        revision
            Branch, tag or commit of a repo; all files come from the one commit that it means now.
        subfolder
            Where in the folder or repo the model is.
        cache_dir, local_files_only, token
            Of the Hub's client: where to keep files ($HF_HOME), never to ask the network, what to log in with. Without
            a network, and with HF_HUB_OFFLINE=1, what is in the cache is loaded.
        device
            The GPU if there is one, by default.
        dtype
            Of the weights and of the arithmetic of predictions; float32 by default.
        golden_check
            False skips the comparison of the stored output, not that of the hashes.
        base
            Of an adapter: folder, name or owner/name[@REVISION] of the model that it changes, by default where the
            adapter says, on the Hub. It must be the very one, by sha256; what is returned is the merged model.

        Raises
        ------
        FileNotFoundError
            No such folder, name, repo or revision, or a file of it is missing.
        PermissionError, ConnectionError
            The repo needs a token or another one; the Hub does not answer as it should.
        ValueError
            A file was truncated or changed, does not fit the others, or is of a newer format; another base.

        Notes
        -----
        A folder that a run replaces while it is read is read again.
        """
        source = find_model(path_or_repo_id, revision, subfolder, cache_dir, local_files_only, token)
        where = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls._load(source, golden_check, base).to(where, dtype)

    @classmethod
    def _load(cls, source: ModelSource, golden_check: bool, base: str | Path | None = None) -> PerturbDiff:
        if source.repo is not None:
            return cls._read(source, golden_check, base)
        for _ in range(READ_AGAIN):
            wait_while_replaced(source.folder)
            identity = folder_identity(source.folder)
            try:
                model = cls._read(source, golden_check, base)
            except (OSError, ValueError):
                wait_while_replaced(source.folder)
                if folder_identity(source.folder) == identity:
                    raise
            else:
                if folder_identity(source.folder) == identity:  # or its files may be of two models
                    return model
        raise ValueError(f"{source.folder} is replaced again and again while it is read; open it when that has ended.")

    @classmethod
    def from_reference(
        cls,
        checkpoint: str | Path,
        genes: Sequence[str] | None = None,
        dataset: str | None = None,
        weights: Literal["ema", "raw"] = "ema",
    ) -> PerturbDiff:
        """A published Lightning checkpoint as a model, on the CPU; nothing in the file is executed.

        Parameters and errors as `perturbdiff.reference.convert.convert_checkpoint`.
        """
        from perturbdiff.reference.convert import convert_checkpoint

        return cls(**vars(convert_checkpoint(checkpoint, genes, dataset, weights)), name=Path(checkpoint).stem)

    @classmethod
    def _read(cls, source: ModelSource, golden_check: bool, base: str | Path | None = None) -> PerturbDiff:
        folder, metadata = source.read()
        denoiser = denoiser_of(metadata)  # no memory is taken before its shapes were compared with the file's
        source.fetch_tensors(folder, max_tensor_bytes(denoiser))
        if folder.is_adapter:
            adapter = read_adapter(folder, metadata, denoiser)
            where = adapter.base_on_hub if base is None else base
            found = find_model(where, None, None, source.cache_dir, source.local_files_only, source.token)
            adapter.merge(denoiser, cls._load(adapter.check_base(found), golden_check).denoiser.state_dict())
        elif base is not None:
            raise ValueError(f"{source.name} is a whole model, not an adapter: it has no base; leave that out.")
        else:
            load_weights(folder, denoiser)
        means = take_means(denoiser, metadata)
        if golden_check:
            check_golden(folder, denoiser.eval())
        known = {name: value for name, value in vars(metadata).items() if name != "trained"}
        return cls(denoiser, **known, means=means, name=source.name)

    def save_pretrained(self, path: str | Path, max_shard_size: int | str = "5GB") -> None:
        """Write a model folder, whole or not at all; replaces an older one of that name. Weights keep their type.

        Parameters
        ----------
        max_shard_size
            Larger weights are cut into files of at most this size: bytes, or as "500MB".

        Raises
        ------
        FileExistsError
            `path` exists and is not a model folder.
        OSError
            It could not be written; an older one is as it was.
        """
        weights = {name: tensor.detach().cpu() for name, tensor in self.denoiser.state_dict().items()}
        weights = with_means(weights, self.means)
        metadata = self._metadata()
        on_cpu = denoiser_of(metadata).eval()
        # The golden output is that of the CPU in float32, as models are loaded, wherever training ran.
        on_cpu.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
        golden = make_golden(on_cpu, self._golden_inputs())
        card = write_card(metadata, self.n_parameters)
        write_model_folder(path, metadata, weights, golden, card, max_shard_size)

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        revision: str | None = None,
        tag: str | None = None,
        commit_message: str | None = None,
        token: str | bool | None = None,
        max_shard_size: int | str = "5GB",
    ) -> Publication:
        """Save, push as one commit, pull that back, verify hashes and golden output, tag last.

        Parameters
        ----------
        repo_id
            owner/name; made where there is none.
        private
            Of a repo that is made.
        revision
            Branch to push to, made where there is none; main by default.
        tag
            Set when what was pulled back has passed; a push that fails leaves none.

        Raises
        ------
        FileExistsError
            The tag is there already.
        PermissionError, ConnectionError
            The token may not; the Hub does not answer as it should.
        ValueError
            What came back is not what was pushed.
        """
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / repo_id.split("/")[-1]
            self.save_pretrained(folder, max_shard_size)
            return push_folder(folder, repo_id, private, revision, tag, commit_message, token)

    def predict(
        self,
        controls: AnnData,
        *,
        perturbation: str | Sequence[str],
        cell_type: str | None = None,
        batch: str | None = None,
        layer: str | None = None,
        n_cells: int | None = None,
        n_populations: int = 1,
        guidance_scale: float | None = None,
        steps: int | None = None,
        sampler: str | None = None,
        seed: int = 0,
        min_gene_overlap: float = 0.5,
        all_genes: bool = False,
        with_controls: bool = False,
        varied: bool = True,
    ) -> AnnData:
        """Predict cells under a perturbation from control cells.

        Parameters
        ----------
        controls
            Unperturbed cells, X raw counts or log1p values; genes are matched by name. Cells that their obs columns
            call perturbed are refused. `perturbdiff.data.screen.control_cells` takes those of an .h5ad.
        perturbation
            A known perturbation, or several joined with the model's separator ("A+B"); with a dose where the model was
            trained with doses ("A@0.5"). One that no training cell received is predicted from its features. Of a list,
            each is predicted by itself from the same controls, one after the other in the result.
        cell_type, batch
            Predict for this context: control cells with another label are left out; where `controls` have no such
            column, all of them are taken for cells of it, with a warning. By default each cell's own labels are its
            context. A label that training has not seen with a perturbation is predicted as an average one, with a
            warning.
        layer
            Expression from `controls.layers[layer]` in place of X; "raw" is `controls.raw`.
        n_cells
            Cells to predict in each population; one for each control cell by default. Fewer start from controls
            whose mean is that of all.
        n_populations
            Draws of the response distribution: each is of one batch, whose cells differ together from the mean over
            batches, where training saw several (`means.populations`). A single one is a draw too.
        guidance_scale, steps, sampler
            w of (1 + w) cond - w uncond; denoiser calls; "ddim" or "ddpm". The model's own defaults if None.
        seed
            Same seed and arguments, same cells.
        min_gene_overlap
            Fewer of the model's genes in `controls` than this part are an error.
        all_genes
            Keep the genes of the model that `controls` lack. The network takes them for zero there, and nobody knows
            what they were: by default they are left out, with a warning.
        with_controls
            Add the control cells of the context behind the predicted ones, as `control_rows`.
        varied
            False: every population is of the mean over batches.

        Returns
        -------
        AnnData with X (cells, genes) log1p values as CSR, layers["counts"] whole counts (of models that draw them), the
        model's gene names, var `measured` (whether the controls had the gene), obs `perturbation`, `cell_type`,
        `batch`, `source_control` (the control cell it was started from), `population`, `one_count` (the log1p value of
        a single count in it), and uns["perturbdiff"] with model, sampler, steps, guidance, seed, what was unseen,
        `genes_absent`, the genes that the controls lacked, and `trust`, whether the response can be told at all, of the
        context where it is known least (`means.trust.Trust`; its verdict is "" of models without training means;
        of several perturbations a list each).

        Raises
        ------
        TypeError
            `controls` is no AnnData.
        KeyError
            An unknown perturbation or layer, with the nearest known ones.
        ValueError
            Cells that are no controls; X is neither counts nor log1p; too few genes match; no cells, or none of the
            cell type or batch; a sampling setting that cannot be.
        """
        cells = self.controls_of(controls, layer, cell_type, batch)
        wanted = [perturbation] if isinstance(perturbation, str) else list(perturbation)
        if not wanted:
            raise ValueError("perturbation ([]) must name at least one; known: model.perturbations.")
        self.vocabularies.encode([(name, None, None) for name in wanted])  # unknown ones fail before the work
        total = (n_cells or cells.n_obs) * n_populations * len(wanted)
        _refuse_too_many(total)
        settings = (cell_type, batch, n_populations, guidance_scale, steps, sampler, seed, min_gene_overlap)
        with progress(total, "predict", "cell") as bar:
            each = [Wanted(name, n_cells) for name in wanted]
            made = list(self.generate_each(cells, each, *settings, all_genes, bar, varied))
        for i, part in enumerate(made):
            part.obs_names = [f"predicted_{i * part.n_obs + k}" for k in range(part.n_obs)]
        predicted = made[0] if len(made) == 1 else concat(made, merge="same", uns_merge="first")
        unseen = list(dict.fromkeys(label for part in made for label in part.uns["perturbdiff"]["unseen"]))
        predicted.uns["perturbdiff"]["unseen"] = unseen
        if len(made) > 1:
            of_each = [part.uns["perturbdiff"]["trust"] for part in made]
            predicted.uns["perturbdiff"]["trust"] = {
                "perturbation": wanted,
                "verdict": [of["verdict"] for of in of_each],
                "expected_pearson": [of.get("expected_pearson", np.nan) for of in of_each],
            }
        if with_controls:
            predicted = self.add_controls(predicted, cells, cell_type, batch)
        if absent := predicted.uns["perturbdiff"]["genes_absent"]:
            what = "kept, with var['measured'] False" if all_genes else "left out; all_genes=True keeps them"
            warnings.warn(
                f"the controls lack {len(absent):,} of the model's {len(self.genes):,} genes: {few(absent)}; they are "
                f"{what}.",
                UserWarning,
                stacklevel=2,
            )
        if unseen:
            warnings.warn(
                f"not seen in training: {few(unseen)}; extrapolated from features, other doses or the control cells. "
                "Known are model.perturbations and model.cell_types.",
                UserWarning,
                stacklevel=2,
            )
        return predicted

    def generate(
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
        all_genes: bool = False,
        bar: tqdm[Any] | None = None,
        varied: bool = True,
    ) -> AnnData:
        """`predict` from exactly these cells, whatever their labels say, without a warning; for those who chose them.

        `bar` is a progress bar to move, of who makes many predictions. Otherwise as `predict`.
        """
        settings = (cell_type, batch, n_populations, guidance_scale, steps, sampler, seed, min_gene_overlap)
        return next(self.generate_each(controls, [Wanted(perturbation, n_cells)], *settings, all_genes, bar, varied))

    def generate_each(
        self,
        controls: AnnData,
        wanted: Sequence[Wanted],
        cell_type: str | None = None,
        batch: str | None = None,
        n_populations: int = 1,
        guidance_scale: float | None = None,
        steps: int | None = None,
        sampler: str | None = None,
        seed: int = 0,
        min_gene_overlap: float = 0.5,
        all_genes: bool = False,
        bar: tqdm[Any] | None = None,
        varied: bool = True,
    ) -> Iterator[AnnData]:
        """`generate` several perturbations from the same controls, one after the other.

        They share what can be shared, and small ones are denoised together: each has the cells that it has alone, to
        rounding.
        """
        sampling = self._sampling(guidance_scale, steps, sampler)
        for of in wanted:
            if of.n_cells is not None and of.n_cells < 1:
                raise ValueError(f"n_cells ({of.n_cells}) must be at least 1.")
        if n_populations < 1:
            raise ValueError(f"n_populations ({n_populations}) must be at least 1.")
        if seed < 0:
            raise ValueError(f"seed ({seed}) must not be negative.")
        numbers = [(of.n_cells or controls.n_obs) * n_populations for of in wanted]
        _refuse_too_many(max(numbers))
        if controls.n_obs == 0:
            raise ValueError("controls has no cells; give the control cells of the context to predict.")
        self.vocabularies.encode([(of.perturbation, None, None) for of in wanted])  # unknown ones fail before the work
        expression, alignment = self.in_own_genes(controls, min_gene_overlap)
        measured = alignment.columns >= 0
        contexts = self._contexts(controls.obs, cell_type, batch)
        generation = Generation(
            self.denoiser, self.vocabularies, self.config, self.means, expression, contexts, measured, sampling,
            n_populations, seed, varied,
        )  # fmt: skip
        uns = {
            "model": self.name,
            "library_version": __version__,
            "seed": seed,
            **{name: getattr(sampling, name) for name in ("sampler", "spacing", "guidance_scale", "eta")},
            "n_steps": sampling.n_calls,
            "n_populations": n_populations,
            "x_kind": "log1p",
            "target_sum": self.preprocessing.target_sum or 0.0,  # 0: nobody knows
            "library_size_col": self.preprocessing.library_size_col or "",
            "dose_unit": self.vocabularies.dose_unit or "",
            "n_genes_matched": alignment.n_matched,
            "genes_matched_by": alignment.matched_by,
        }
        with nullcontext(bar) if bar is not None else progress(sum(numbers), "predict", "cell") as bar:
            for of, made in zip(wanted, generation.each(wanted, bar), strict=True):
                unseen = self._unseen(of.perturbation, sorted(set(contexts), key=str))
                about = {**uns, "populations_differ": made.differ, "unseen": unseen, "trust": made.trust}
                yield self._as_anndata(of.perturbation, made, controls, contexts, measured, about, all_genes)

    def _as_anndata(
        self,
        perturbation: str,
        made: Generated,
        controls: AnnData,
        contexts: Sequence[Context],
        measured: np.ndarray,
        uns: dict[str, Any],
        all_genes: bool,
    ) -> AnnData:
        X, source = made.X, made.source
        context = [contexts[i] for i in source]
        obs = pd.DataFrame(
            {
                "perturbation": pd.Categorical([self.vocabularies.notation.canonical(perturbation)] * len(source)),
                "cell_type": pd.Categorical([c if c is not None else "unknown" for c, _ in context]),
                "batch": pd.Categorical([b if b is not None else "unknown" for _, b in context]),
                "source_control": controls.obs_names.to_numpy()[source],
                "population": made.population,
            },
            index=pd.Index([f"predicted_{i}" for i in range(len(source))]),
        )
        if made.one is not None:
            obs[ONE_COUNT] = made.one
        var = pd.DataFrame(index=pd.Index(self.genes.names))
        if self.genes.ensembl is not None:
            var["ensembl_id"] = self.genes.ensembl
        if self.genes.symbols is not None:
            var["gene_symbol"] = self.genes.symbols
        var["measured"] = measured
        absent = var.index[~var["measured"]].tolist()
        if absent and not all_genes:
            X, var = X[:, measured], var[measured]
        layers = {} if made.one is None else {"counts": counts_of(X, made.one)}
        return AnnData(X=X, obs=obs, var=var, layers=layers, uns={"perturbdiff": {**uns, "genes_absent": absent}})

    def control_rows(
        self, controls: AnnData, predicted: AnnData, cell_type: str | None = None, batch: str | None = None
    ) -> AnnData:
        """Control cells as rows beside predicted ones: X log1p of the same genes in the same order, and their counts.

        obs has the columns of `predicted`: perturbation is the model's control label, source_control the cell's own
        name, population (and request) -1. `controls` are cells as `generate` takes them.
        """
        expression = expression_of(controls, self.preprocessing)
        columns = self.genes.align(expression.genes, min_overlap=0.0).columns
        X = expression.with_genes(self.genes, columns).log1p()
        X = X[:, pd.Index(self.genes.names).get_indexer(predicted.var_names)]
        X.sort_indices()
        contexts = self._contexts(controls.obs, cell_type, batch)
        values = {
            "perturbation": pd.Categorical([self.config.obs.control_label] * len(contexts)),
            "cell_type": pd.Categorical([c if c is not None else "unknown" for c, _ in contexts]),
            "batch": pd.Categorical([b if b is not None else "unknown" for _, b in contexts]),
            "source_control": controls.obs_names.to_numpy(),
        }
        one = expression.one_count(np.arange(len(expression)))
        values |= {ONE_COUNT: one}
        obs = pd.DataFrame({name: values.get(name, -1) for name in predicted.obs}, index=range(len(contexts)))
        obs.index = pd.Index([f"control-{cell}" for cell in range(len(obs))])
        layers = {"counts": counts_of(X, one)} if ONE_COUNT in obs else {}
        return AnnData(X=X, obs=obs, var=predicted.var, layers=layers, uns=predicted.uns)

    def add_controls(
        self, predicted: AnnData, controls: AnnData, cell_type: str | None = None, batch: str | None = None
    ) -> AnnData:
        """Predicted cells, then `control_rows`; uns["perturbdiff"] gets their `control_label` and `n_controls`."""
        both = concat(
            [predicted, self.control_rows(controls, predicted, cell_type, batch)], merge="same", uns_merge="first"
        )
        both.uns["perturbdiff"] |= {"control_label": self.config.obs.control_label, "n_controls": controls.n_obs}
        return both

    def _told(self, means: TrainingMeans | None) -> TrainingMeans | None:
        """Means with what is known of perturbations."""
        return None if means is None else replace(means, tables=self.feature_tables())

    def feature_tables(self) -> list[FeatureTable]:
        """What it knows of perturbations besides their names, as the tables that it was trained with."""
        names, made = np.array(self.vocabularies.perturbations.names, dtype=object), []
        for (name, _), embedding in zip(self.vocabularies.tables, tables_of(self.denoiser), strict=True):
            has = embedding.features.any(1)
            values = (embedding.features[has] / embedding.scale + embedding.centre).float().cpu().numpy()
            if len(values):
                made.append(FeatureTable(name, tuple(names[has.cpu().numpy()]), values))
        return made

    def add_features(self, tables: Sequence[FeatureTable]) -> list[str]:
        """Make perturbations known that were never trained, by features as those that the model was trained with.

        Parameters
        ----------
        tables
            Of the names and widths of `vocabularies.tables`; of other tables nothing was learned. Perturbations that
            are known already stay as they are.

        Returns
        -------
        The new ones, which `predict` then takes.

        Raises
        ------
        ValueError
            A table that the model was not trained with, or of another width.
        """
        widths = dict(self.vocabularies.tables)
        for table in tables:
            if widths.get(table.name) != table.values.shape[1]:
                raise ValueError(
                    f"table {table.name!r} of {table.values.shape[1]} features is not one of this model's, which were "
                    f"trained as {', '.join(f'{name!r} ({width})' for name, width in widths.items()) or 'none'}; give "
                    "the same features under the same name."
                )
        known = set(self.vocabularies.perturbations.names)
        new = list(dict.fromkeys(name for table in tables for name in table.names if name not in known))
        given = {table.name: table for table in tables}
        assert isinstance(self.denoiser.conditioning, LabelConditioning), "others have no tables"
        for (name, _), embedding in zip(self.vocabularies.tables, self.denoiser.conditioning.tables, strict=True):
            assert isinstance(embedding, FeatureEmbedding), "tables are such"
            embedding.append(given.get(name), new)
        perturbations = LabelVocab("perturbation", (*self.vocabularies.perturbations.names, *new))
        n_by_features = self.vocabularies.n_by_features + len(new)
        self.vocabularies = replace(self.vocabularies, perturbations=perturbations, n_by_features=n_by_features)
        self.means = self._told(self.means)
        return new

    @property
    def perturbations(self) -> tuple[str, ...]:
        """Names of the perturbations it can predict, alone or combined."""
        return self.vocabularies.perturbations.names

    @property
    def cell_types(self) -> tuple[str, ...]:
        """Names of the cell types that training saw perturbed."""
        return self.vocabularies.cell_types.names

    @property
    def gene_names(self) -> tuple[str, ...]:
        """Names of its genes, in the order of the columns of what it predicts from controls that have them all."""
        return self.genes.names

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.denoiser.parameters()).device

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> PerturbDiff:
        """Move the weights to a device, or to another floating point type; returns the model itself."""
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype ({dtype}) must be a floating point type, as torch.bfloat16.")
        self.denoiser.to(device=device, dtype=dtype)
        return self

    @property
    def n_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.denoiser.state_dict().values())

    def _metadata(self) -> ModelMetadata:
        return ModelMetadata(
            self.genes,
            self.vocabularies,
            self.preprocessing,
            self.config,
            self.training,
            self.evaluation,
            self.split,
            None if self.means is None else MeansRecord.of(self.means),
        )

    def _sampling(self, guidance_scale: float | None, steps: int | None, sampler: str | None) -> SamplingConfig:
        given = {"guidance_scale": guidance_scale, "sampler": sampler}
        if steps is not None:
            given["n_steps" if self.config.sampling.spacing == "strided" else "start_time"] = steps
        chosen = {name: value for name, value in given.items() if value is not None}
        own = self.config.sampling
        sampling = from_dict(SamplingConfig, {**as_dict(own), **chosen}) if chosen else own
        check_sampling(sampling, self.config.diffusion)
        return sampling

    def controls_of(self, controls: AnnData, layer: str | None, cell_type: str | None, batch: str | None) -> AnnData:
        """The cells that `predict` starts from: X of the layer in the model's space, those of the context.

        Refuses perturbed ones. Warns where X was in another space, or in one that nobody can know.
        """
        if not isinstance(controls, AnnData):
            raise TypeError(
                f"controls ({type(controls).__name__}) must be an AnnData of control cells; read a file with "
                "perturbdiff.data.screen.control_cells(path, model.config.obs), or anndata.read_h5ad(path)."
            )
        if layer is not None:
            X, var = values_of(controls, layer)
            controls = AnnData(X, obs=controls.obs, var=var)
        names = self.config.obs
        warn_of_missing_columns(controls.obs, names, cell_type, batch)
        if names.perturbation in controls.obs:
            labels = controls.obs[names.perturbation].astype(str)
            if (other := ~labels.isin(control_labels(labels.unique(), names))).any():
                raise ValueError(
                    f"{int(other.sum()):,} of {len(labels):,} cells are no controls: obs column {names.perturbation!r} "
                    f"calls them {few(sorted(set(labels[other])))}. Give adata[adata.obs[{names.perturbation!r}] == "
                    f"{names.control_label!r}]."
                )
        chosen = ~dropped_cells(controls.obs, names)
        for value, column in ((cell_type, names.cell_type), (batch, names.batch)):
            if value is not None and column is not None and column in controls.obs and controls.n_obs:
                labels = controls.obs[column].astype(str)
                if not (chosen & (labels == value)).any():
                    there = nearest(value, set(labels[chosen]))
                    raise ValueError(f"no control cell has {column} {value!r}; {there}.")
                chosen &= (labels == value).to_numpy()
        controls = self.in_own_space(controls)
        controls = controls if chosen.all() else controls[chosen].copy()
        if controls.n_obs and not controls.X.sum() > 0:
            warnings.warn(
                f"all {controls.n_obs:,} control cells are empty: X has no count; what is predicted from them is of no "
                "cell. Give cells with counts, or the layer that has them (layer=).",
                UserWarning,
                stacklevel=2,
            )
        return controls

    def in_own_space(self, cells: AnnData) -> AnnData:
        """Cells with X in the space the model was trained in.

        Warns where X was in another, or where nobody can know. What a file holds is found from many cells: give all
        that are at hand, and not those of one context.

        Raises
        ------
        ValueError
            As `expression_of`; the model's genes hold another part of the cells' counts than of its training controls':
            X is in another space, or library sizes are sums over other genes.
        """
        expression = expression_of(cells, self.preprocessing)
        for note in filter(None, (expression.note, self.compare_sums(expression))):
            warnings.warn(note, UserWarning, stacklevel=3)
        if not expression.note:
            return cells
        return AnnData(X=expression.X, obs=cells.obs, var=cells.var.loc[list(expression.genes.names)])

    def in_own_genes(self, cells: AnnData, min_gene_overlap: float) -> tuple[Expression, Alignment]:
        """Cells in the model's genes, those that they lack as zeros, and where each lies in them.

        Raises ValueError as `expression_of`, and where they have a smaller part of the model's genes.
        """
        expression = expression_of(cells, self.preprocessing)
        alignment = self.genes.align(expression.genes, min_gene_overlap)
        return expression.with_genes(self.genes, alignment.columns), alignment

    def sums_of(self, expression: Expression) -> np.ndarray:
        """(n_cells,) what the model's genes sum to in each cell, in normalised counts."""
        columns = self.genes.align(expression.genes, min_overlap=0.0).columns
        log1p = expression.with_genes(self.genes, columns).log1p()
        return totals(np.expm1(log1p.data.astype(np.float64)), log1p.indptr)

    def compare_sums(self, expression: Expression) -> str:
        """What is odd of `sums_of` cells beside those of the training controls; may be nothing. Raises ValueError as
        `in_own_space`."""
        quantiles, n_genes = self.training.control_sums, self.training.measured_genes
        alignment = self.genes.align(expression.genes, min_overlap=0.0)
        sums = self.sums_of(expression)
        if quantiles is None or n_genes is None or not (sums > 0).any():
            return ""
        low, *_, high = quantiles
        low *= alignment.overlap**2  # genes that are missing hold counts too, nobody knows how many
        n = expression.n_measured
        found, known = float(np.median(sums[sums > 0])), expression.preprocessing.target_sum is not None
        what = (
            f"the model's genes sum to {found:,.0f} normalised counts in the median cell, and to {low:,.0f} to "
            f"{high:,.0f} in its training controls"
        )
        if known and found > high * (1 + SAME) and n < MOST_GENES * n_genes:
            raise ValueError(
                f"{what}: X has {n:,} genes, and those of training had {n_genes:,}, over which a cell's counts are "
                "normalised. Give the cells with all their genes, or the obs column of their library sizes "
                "(data.library_size_col=NAME)."
            )
        if not low / 2 < found < high * 2:
            raise ValueError(f"{what}: X is normalised otherwise, or is of other genes. Give raw counts of all genes.")
        how = expression.preprocessing
        if how.input_kind == "counts" and how.library_size_col is None and n < MOST_GENES * n_genes:
            return (
                f"X has {n:,} genes, and those of training had {n_genes:,}: library sizes are sums over fewer genes, "
                "so values are too large; give the cells with all their genes, or data.library_size_col=NAME"
            )
        return "" if low <= found <= high * (1 + SAME) else f"{what}; another tissue or protocol?"

    def _contexts(self, obs: pd.DataFrame, cell_type: str | None, batch: str | None) -> list[Context]:
        # (cell type, batch) of each control cell; None where nobody says.
        columns = []
        for given, name in ((cell_type, self.config.obs.cell_type), (batch, self.config.obs.batch)):
            if given is not None or name is None or name not in obs.columns:
                columns.append([ALL if given is None and name is None else given] * len(obs))
            else:
                columns.append([None if pd.isna(label) else str(label) for label in obs[name]])
        return list(zip(*columns, strict=True))

    def outlook(
        self, controls: AnnData, perturbation: str, cell_type: str | None = None, batch: str | None = None
    ) -> tuple[list[str], Trust | None]:
        """What `generate` would say of its prediction from these cells, before it is made: what training never saw of
        it, and whether the response can be told; None of a model without training means.

        Raises as `generate`.
        """
        self.vocabularies.encode([(perturbation, None, None)])
        contexts = self._contexts(controls.obs, cell_type, batch)
        expression, alignment = self.in_own_genes(controls, 0.0)
        generation = Generation(
            self.denoiser, self.vocabularies, self.config, self.means, expression, contexts, alignment.columns >= 0,
            self.config.sampling, n_populations=1, seed=0, varied=False,
        )  # fmt: skip
        return self._unseen(perturbation, sorted(set(contexts), key=str)), generation.trust(perturbation)

    def _unseen(self, perturbation: str, conditions: list[Context]) -> list[str]:
        known = self.vocabularies
        cell_types = sorted({c or "unknown" for c, _ in conditions if c not in known.cell_types.ids})
        batches = sorted({b or "unknown" for _, b in conditions if b not in known.batches.ids})
        return [
            *known.extrapolated(perturbation),
            *(f"cell_type {name}" for name in cell_types),
            *(f"batch {name}" for name in batches if len(known.batches)),
        ]

    def _golden_inputs(self) -> dict[str, Tensor]:
        # Two sets of three cells, one masked; known and null labels.
        generator = torch_generator("cpu", 0, "golden check")
        shape = (2, 3, len(self.genes))
        sizes = VocabSizes.from_vocabularies(self.vocabularies)
        first, last = min(0, sizes.perturbations - 1), sizes.perturbations - 1
        several = self.config.denoiser.conditioning == "labels" and self.config.denoiser.interaction
        alone, together = [[first], [last]], [[first, -1], [last, len(self.vocabularies.perturbations) - 1]]
        return {
            "x_t": torch.randn(shape, generator=generator),
            "t": torch.tensor([0, self.config.diffusion.n_timesteps - 1]),
            "control": torch.rand(shape, generator=generator),
            "self_cond": torch.rand(shape, generator=generator),
            "mask": torch.tensor([[True, True, True], [True, True, False]]),
            "perturbation": torch.tensor(together if several else alone),
            "cell_type": torch.tensor([sizes.cell_types - 1, -1]),
            "batch": torch.tensor([-1, sizes.batches - 1]),
        }


def _refuse_too_many(n_cells: int) -> None:
    if n_cells > MAX_PREDICTED_CELLS:
        raise ValueError(
            f"{n_cells:,} cells asked for; one call predicts at most {MAX_PREDICTED_CELLS:,}: use several."
        )


def push_folder(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    commit_message: str | None = None,
    token: str | bool | None = None,
    benchmark: str | None = None,
) -> Publication:
    """Push a model folder or adapter as it is, but for the card: it gets to know its repo, and an owner's words stay.

    `benchmark` is the data set on the Hub that its evaluation is of, if there is one; the Hub then shows the scores
    there. Of an adapter everything is checked but the merging: its base may be elsewhere. Otherwise as
    `PerturbDiff.push_to_hub`.
    """
    content = read_folder(folder)  # first: a repo id is no folder
    metadata = parse_metadata(content)
    check = check_adapter if content.is_adapter else partial(PerturbDiff.from_pretrained, device="cpu")
    check(folder)
    n_parameters = sum(t.numel() for t in denoiser_of(metadata).state_dict().values())
    card = write_card(metadata, n_parameters, repo_id, content.is_adapter)
    check_card(card)
    texts: dict[str, str] = {}
    if benchmark is not None:
        if (evaluation := metadata.evaluation) is None:
            raise ValueError(
                f"{folder} has no evaluation to show with {benchmark}; run `perturbdiff evaluate --model`."
            )
        texts = eval_results_files(evaluation, benchmark, source_url=f"https://huggingface.co/{repo_id}")
    return publish(
        folder,
        content.files,
        repo_id,
        "model",
        own_files=OWN_FILES,
        check=check,
        pull_back=lambda path: True,
        card=card,
        private=private,
        revision=revision,
        tag=tag,
        commit_message=commit_message,
        texts=texts,
        token=token,
    )
