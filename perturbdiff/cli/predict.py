"""Commands on what nobody measured: predict, calibrate."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from perturbdiff.cli.command import SETTINGS, add_command, add_settings, refuse_missing

if TYPE_CHECKING:
    from perturbdiff.model import PerturbDiff


def add_predict_commands(commands: Any) -> None:
    """Declare them."""
    predict = add_command(
        commands, "predict", _predict, "predict cells under a perturbation from control cells",
        "Predicts one cell for each control cell (or --n-cells) and writes log1p values as an .h5ad, or as Parquet if\n"
        "--out ends so. If the file also holds perturbed cells, its control cells are taken.\n"
        "With --requests, all predictions of a csv go into one file. Its columns: perturbation, and perhaps\n"
        "cell_type, batch, n_cells, n_populations, seed, whose empty fields mean what the options say. Each is\n"
        "written to OUT.parts/ as soon as it is done; the same command goes on where one was killed, and under\n"
        "accelerate launch or torchrun the processes share the work.\n"
        "With --with-controls the control cells are in the file too, for cell-eval run -ap OUT.h5ad -ar MEASURED.h5ad\n"
        "--pert-col perturbation --control-pert LABEL, where LABEL is the model's (data.control_label).",
        "examples:\n  perturbdiff predict runs/kang/model --controls kang.h5ad --perturbation IFN-beta "
        "--cell-type CD4T --out cd4t.h5ad\n"
        "  perturbdiff predict runs/kang/model --controls kang.h5ad --requests requests.csv --n-populations 5 "
        "--out all.parquet --summary genes.csv\n"
        "  torchrun --nproc-per-node 8 -m perturbdiff predict owner/name --controls c.h5ad --requests r.csv "
        "--out all.h5ad\n",
    )  # fmt: skip
    predict.add_argument("model", metavar="MODEL", help="model folder, name, or owner/name[@REVISION] on the Hub")
    predict.add_argument("--controls", required=True, metavar="FILE.h5ad", help="X raw counts or log1p")
    what = predict.add_mutually_exclusive_group(required=True)
    what.add_argument("--perturbation", metavar="NAME", help="or several: A+B")
    what.add_argument("--requests", metavar="FILE.csv", help="many predictions, one a line")
    predict.add_argument("--cell-type", metavar="NAME", help="only controls of this cell type (default: all)")
    predict.add_argument("--batch", metavar="NAME", help="only controls of this batch (default: all)")
    predict.add_argument("--out", required=True, metavar="FILE", help="FILE.h5ad or FILE.parquet to write")
    predict.add_argument("--summary", metavar="FILE.csv", help="also write mean, spread and interval of each gene")
    predict.add_argument("--overwrite", action="store_true", help="replace --out and --summary if they exist")
    predict.add_argument("--n-cells", type=int, metavar="N", help="cells to predict (default: one per control cell)")
    predict.add_argument("--n-populations", type=int, default=1, metavar="N", help="draws of the response distribution")
    predict.add_argument(
        "--average", action="store_true", help="of the mean over batches, not draws that differ as batches do"
    )
    predict.add_argument("--all-genes", action="store_true", help="keep genes of the model that the controls lack")
    predict.add_argument(
        "--with-controls", action="store_true", help="add the control cells to the file, as cell-eval wants them"
    )
    add_sampling(predict)
    add_columns(predict)

    calibrate = add_command(
        commands, "calibrate", _calibrate, "make a model's spread between populations into intervals",
        "Predicts the validation conditions of a split, compares their means with the measured ones, and puts what\n"
        "makes intervals of spreads into the model folder, for genes that respond apart. Coverage is measured on the\n"
        "test conditions of the split, or else on validation conditions left out in turn.",
        "example:\n  perturbdiff calibrate runs/kang/model --screen kang.h5ad\n"
        + SETTINGS,
    )  # fmt: skip
    calibrate.add_argument("model", metavar="FOLDER", help="model folder, which is replaced")
    calibrate.add_argument("--screen", required=True, metavar="FILE.h5ad", help="the measured cells and their controls")
    calibrate.add_argument("--split", metavar="split.json", help="of the run folder (default: the one in FOLDER)")
    calibrate.add_argument("--n-populations", type=int, default=5, metavar="N", help="(default: %(default)s)")
    calibrate.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same cells (default: 0)")
    add_settings(calibrate)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Features, the options of a sampler, and what predicting from control cells needs besides."""
    parser.add_argument(
        "--features", action="append", default=[], metavar="FILE",
        help="table of further perturbations, of the kind and file name the model was trained with",
    )  # fmt: skip
    parser.add_argument(
        "--guidance-scale", type=float, metavar="W", help="(1+W) cond - W uncond (default: the model's)"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="denoiser calls (default: the model's)")
    parser.add_argument("--layer", metavar="NAME", help="read the controls' X from this layer, or from .raw (raw)")
    parser.add_argument("--sampler", choices=("ddim", "ddpm"), help="(default: the model's)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same cells (default: 0)")
    parser.add_argument(
        "--min-gene-overlap", type=float, default=0.5, metavar="PART",
        help="refuse controls with fewer of the model's genes (default: %(default)s)",
    )  # fmt: skip


def sampling_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_sampling`, but for the seed."""
    return {name: getattr(arguments, name) for name in ("guidance_scale", "steps", "sampler", "min_gene_overlap")}


def add_columns(parser: argparse.ArgumentParser) -> None:
    """Settings of a file whose obs columns have other names than those of the training data."""
    parser.add_argument(
        "settings", nargs="*", metavar="key=value",
        help="columns and control labels of the file where training had others: data.cell_type_col=celltype, "
        "data.perturbation_col, data.batch_col, data.control_label, data.other_control_labels, data.library_size_col",
    )  # fmt: skip


def load_model(name: str, features: list[str], settings: list[str], file: str) -> PerturbDiff:
    """A model that knows what `features` describe, on the GPU of this process where a launcher started several.

    It reads the control cells of a file by the columns that `settings` name.
    """
    import torch

    from perturbdiff.config import given_columns
    from perturbdiff.data.h5ad import check_columns
    from perturbdiff.features.fingerprints import read_features
    from perturbdiff.model import PerturbDiff

    device = f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ and torch.cuda.is_available() else None
    model = PerturbDiff.from_pretrained(name, device=device)
    model.config.obs, model.preprocessing = given_columns(model.config.obs, model.preprocessing, settings)
    check_columns(file, settings)
    new = model.add_features([read_features(path) for path in features]) if features else []
    if new:
        print(f"features    {len(new):,} more perturbations known by {', '.join(features)}")
    return model


def _predict(arguments: argparse.Namespace) -> None:
    from perturbdiff.files import refuse_inputs
    from perturbdiff.inference.output import check_outputs

    refuse_inputs((arguments.out, arguments.summary), (arguments.controls, arguments.requests, *arguments.features))
    check_outputs(arguments.out, arguments.summary, arguments.overwrite)  # before the model is loaded
    refuse_missing(arguments.model)
    from perturbdiff.inference.predictions import predict_request, predict_requests
    from perturbdiff.inference.requests import Request, read_requests

    one = Request(
        arguments.perturbation or "", arguments.cell_type, arguments.batch, arguments.n_cells, arguments.n_populations,
        arguments.seed,
    )  # fmt: skip
    where = {name: getattr(arguments, name) for name in ("layer", "summary", "overwrite", "all_genes", "with_controls")}
    options = {**where, **sampling_of(arguments), "varied": not arguments.average}
    requests = None if arguments.requests is None else read_requests(arguments.requests, one)
    model = load_model(arguments.model, arguments.features, arguments.settings, arguments.controls)
    done = (
        predict_request(model, arguments.controls, one, arguments.out, **options)
        if requests is None
        else predict_requests(model, arguments.controls, requests, arguments.out, **options)
    )
    if done is not None:
        print(done.text())


def _calibrate(arguments: argparse.Namespace) -> None:
    from perturbdiff.hub.download import own_folder

    own_folder(arguments.model)  # before torch is imported, too
    from perturbdiff.evaluation.held_out import calibrate_model
    from perturbdiff.inference.intervals import covered

    found = calibrate_model(
        arguments.model,
        arguments.screen,
        arguments.split,
        arguments.n_populations,
        arguments.seed,
        overrides=arguments.settings,
    )
    print(f"conditions  {found.n_conditions}, held out for validation")
    kinds = [(f"genes predicted to change by {found.change:.3g} or more", found.responding), ("others", found.others)]
    for what, of in kinds if found.change else [("all genes", found.others)]:
        print(f"intervals   {of.factor:.3g} * sqrt(spread^2 + {of.floor:.3g}^2) around the mean, log1p: {what}")
    print(f"coverage    {covered(found.coverage)}, of {found.level:.0%} wanted")
    print(f"written     {arguments.model}")
