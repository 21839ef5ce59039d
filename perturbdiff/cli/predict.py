"""Commands on what nobody measured: predict, calibrate."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perturbdiff.cli.command import SETTINGS, add_command, add_settings

if TYPE_CHECKING:
    from perturbdiff.inference.answers import Answers
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
        "accelerate launch or torchrun the processes share the work.",
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
    add_sampling(predict)

    calibrate = add_command(
        commands, "calibrate", _calibrate, "make a model's spread between populations into intervals",
        "Predicts the validation conditions of a split, compares their means with the measured ones, and puts the\n"
        "factor that makes intervals of spreads into the model folder. Coverage is measured on conditions left out.",
        "example:\n  perturbdiff calibrate runs/kang/model --screen kang.h5ad --split runs/kang/split.json\n"
        + SETTINGS,
    )  # fmt: skip
    calibrate.add_argument("model", metavar="FOLDER", help="model folder, which is replaced")
    calibrate.add_argument("--screen", required=True, metavar="FILE.h5ad", help="the measured cells and their controls")
    calibrate.add_argument("--split", required=True, metavar="split.json", help="of the run folder")
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
    parser.add_argument("--sampler", choices=("ddim", "ddpm"), help="(default: the model's)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same cells (default: 0)")
    parser.add_argument(
        "--min-gene-overlap", type=float, default=0.5, metavar="PART",
        help="refuse controls with fewer of the model's genes (default: %(default)s)",
    )  # fmt: skip


def sampling_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_sampling`, but for the seed."""
    return {name: getattr(arguments, name) for name in ("guidance_scale", "steps", "sampler", "min_gene_overlap")}


def refuse_existing(option: str, path: str | None, overwrite: bool) -> None:
    if path is not None and Path(path).exists() and not overwrite:
        raise FileExistsError(f"{option} {path} exists; choose another name or give --overwrite.")


def load_model(name: str, features: list[str]) -> PerturbDiff:
    """A model that knows what `features` describe, on the GPU of this process where a launcher started several."""
    import torch

    from perturbdiff.features.fingerprints import read_features
    from perturbdiff.model import PerturbDiff

    device = f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ and torch.cuda.is_available() else None
    model = PerturbDiff.from_pretrained(name, device=device)
    new = model.add_features([read_features(path) for path in features]) if features else []
    if new:
        print(f"features    {len(new):,} more perturbations known by {', '.join(features)}")
    return model


def _predict(arguments: argparse.Namespace) -> None:
    refuse_existing("--out", arguments.out, arguments.overwrite)
    refuse_existing("--summary", arguments.summary, arguments.overwrite)
    if arguments.requests is None:
        _predict_one(arguments)
    else:
        _predict_requests(arguments)


def _predict_one(arguments: argparse.Namespace) -> None:
    from perturbdiff.data.screen import control_cells, write_h5ad
    from perturbdiff.files import write_whole
    from perturbdiff.inference.intervals import mean_expression, median_width, population_summary
    from perturbdiff.inference.output import write_parquet

    model = load_model(arguments.model, arguments.features)
    calibration = model.training.calibration
    controls = control_cells(arguments.controls, model.config.obs, arguments.cell_type, arguments.batch)
    predicted = model.generate(
        controls,
        perturbation=arguments.perturbation,
        cell_type=arguments.cell_type,
        batch=arguments.batch,
        n_cells=arguments.n_cells,
        n_populations=arguments.n_populations,
        seed=arguments.seed,
        **sampling_of(arguments),
    )
    summary = population_summary(predicted, mean_expression(model, controls), calibration)
    out = Path(arguments.out)
    (write_parquet if out.suffix == ".parquet" else write_h5ad)(predicted, out)
    if arguments.summary is not None:
        write_whole(Path(arguments.summary), lambda temporary: summary.to_csv(temporary, index=False))
    said: dict[str, Any] = predicted.uns["perturbdiff"]
    _print_genes(said, model)
    if len(said["unseen"]):
        print(f"unseen      {', '.join(said['unseen'])}: predicted from features or control cells alone")
    print(f"sampler     {said['sampler']}, {said['n_steps']} steps, guidance {said['guidance_scale']:g}")
    _print_certainty(model, [median_width(summary)])
    _print_written(arguments, f"{predicted.n_obs:,} cells, {predicted.n_vars:,} genes")


def _predict_requests(arguments: argparse.Namespace) -> None:
    from perturbdiff.data.screen import control_cells
    from perturbdiff.inference.answers import predict_requests
    from perturbdiff.inference.requests import Request, read_requests

    default = Request(
        "", arguments.cell_type, arguments.batch, arguments.n_cells, arguments.n_populations, arguments.seed
    )
    requests = read_requests(arguments.requests, default)
    model = load_model(arguments.model, arguments.features)
    controls = control_cells(arguments.controls, model.config.obs, None, None)
    answers = predict_requests(
        model,
        controls,
        requests,
        arguments.out,
        summary=arguments.summary,
        overwrite=arguments.overwrite,
        **sampling_of(arguments),
    )
    if answers is not None:
        _print_answers(arguments, model, answers)


def _print_answers(arguments: argparse.Namespace, model: PerturbDiff, answers: Answers) -> None:
    said = answers.said
    found = f", {answers.n_found:,} of them done before" if answers.n_found else ""
    print(f"requests    {answers.n_requests:,}{found}")
    _print_genes(said, model)
    for label, numbers in sorted(answers.unseen.items()):
        shown = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
        print(f"unseen      {label}, in {len(numbers):,} requests (number {shown})")
    print(f"sampler     {said['sampler']}, {said['n_steps']} steps, guidance {said['guidance_scale']:g}")
    _print_certainty(model, answers.widths.tolist())
    _print_written(arguments, f"{answers.n_cells:,} cells, {len(model.genes):,} genes")


def _print_genes(said: dict[str, Any], model: PerturbDiff) -> None:
    print(f"genes       {said['n_genes_matched']:,} of {len(model.genes):,} matched by {said['genes_matched_by']}")


def _print_certainty(model: PerturbDiff, widths: list[float]) -> None:
    import numpy as np

    calibration = model.training.calibration
    if calibration is None:
        print("certainty   not calibrated: perturbdiff calibrate makes intervals of the spread between populations")
        return
    known = np.array(widths)[np.isfinite(widths)]
    measured = f"{calibration.coverage:.0%} of means covered on {calibration.n_conditions} conditions left out"
    if len(known) == 0:
        print(f"certainty   unknown: intervals need --n-populations 2 or more ({measured})")
        return
    spread = f"{known.min():.3g} to {known.max():.3g}" if len(known) > 1 else f"{known[0]:.3g}"
    print(f"certainty   {calibration.level:.0%} intervals of gene means: median width {spread} (log1p); {measured}")


def _print_written(arguments: argparse.Namespace, what: str) -> None:
    print(f"written     {arguments.out}: {what}")
    if arguments.summary is not None:
        print(f"            {arguments.summary}: mean, spread and interval of each gene")


def _calibrate(arguments: argparse.Namespace) -> None:
    import numpy as np

    from perturbdiff.config import load_config
    from perturbdiff.data.conditions import ConditionIndex, resolve_control_match
    from perturbdiff.data.screen import Screen
    from perturbdiff.data.splits import read_split
    from perturbdiff.inference.intervals import calibrate
    from perturbdiff.model import PerturbDiff

    model = PerturbDiff.from_pretrained(arguments.model)
    obs, how = model.config.obs, model.preprocessing
    data = {
        "screen": arguments.screen, "target_sum": how.target_sum, "library_size_col": how.library_size_col,
        "perturbation_col": obs.perturbation, "cell_type_col": obs.cell_type, "batch_col": obs.batch,
        "control_label": obs.control_label,
    }  # fmt: skip
    config = load_config(None, arguments.settings, {"out": "unused", "data": data})
    screen = Screen.read(arguments.screen, config.data)
    split = read_split(arguments.split, screen)
    everything = ConditionIndex.build(screen, np.ones(len(screen), dtype=bool))
    match = model.training.control_match or resolve_control_match(everything, config.data.control_match)
    found = calibrate(model, screen, split.validation, match, arguments.n_populations, seed=arguments.seed)
    model.save_pretrained(arguments.model)
    print(f"conditions  {found.n_conditions}, held out for validation")
    print(f"intervals   {found.factor:.3g} * sqrt(spread^2 + {found.floor:.3g}^2) around the mean, log1p")
    print(f"coverage    {found.coverage:.1%} on conditions left out in turn, of {found.level:.0%} wanted")
    print(f"written     {arguments.model}")
