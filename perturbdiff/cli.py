"""Commands: parse, call, print."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perturbdiff import __version__

if TYPE_CHECKING:
    from perturbdiff.config import Config

USER_ERRORS = (ValueError, KeyError, OSError, FloatingPointError)

SELECTORS = """
hold-out selectors:
  PERTURBATION                        in every context
  PERTURBATION:CELL_TYPE              in one cell type, every batch
  PERTURBATION:CELL_TYPE:BATCH        one condition; * is any
  COLUMN=VALUE                        by any obs column, as in batch=rep_3
Control cells are never held out: they are what predictions start from.
"""

SETTINGS = """
settings:
  any number of key=value words, as in  training.n_steps=1000 denoiser.width=256 data.n_hvg=null
  a run's config.yaml lists every key with its value, perturbdiff/config.py what it means; a typo is an error that
  names the nearest key.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; exits 0, or 2 with one line on a user's mistake (--debug shows the traceback)."""
    # Before torch is imported. Its threads spin at every barrier: on quiet cores this makes no difference, but where
    # another process holds a core, steps take a half to a third of the time.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    # Likewise: DDP warns in every process that it looks for unused parameters, as training/distributed.py tells it to.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    arguments = _arguments(argv)
    try:
        arguments.run(arguments)
    except USER_ERRORS as error:
        if arguments.debug:
            raise
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        one_of_many = "RANK" in os.environ
        begin = f"\nperturbdiff: error (rank {_rank()})" if one_of_many else "perturbdiff: error"
        print(f"{begin}: {' '.join(str(message).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("perturbdiff: interrupted", file=sys.stderr)
        sys.exit(130)


def _demo(arguments: argparse.Namespace) -> None:
    from perturbdiff.demo import HELD_OUT_OF_SIMULATION, run_demo, simulated_screen

    simulated = arguments.screen is None
    hold_out = arguments.hold_out or (HELD_OUT_OF_SIMULATION if simulated else [])
    screen = Path(arguments.out) / "screen.h5ad" if simulated else arguments.screen
    config = _config(arguments, screen, hold_out)
    if simulated:
        simulated_screen(Path(arguments.out))
    result = run_demo(config)
    if result is not None:
        print(f"\n{result.report.table()}\n\nwritten:")
        print("\n".join(f"  {path}" for path in result.written))


def _screen_info(arguments: argparse.Namespace) -> None:
    from perturbdiff.data.screen import Screen

    config = _config(arguments, arguments.file, [], out="unused")
    print(Screen.read(arguments.file, config.data).summary())


def _atlas_info(arguments: argparse.Namespace) -> None:
    from perturbdiff.data.atlas import Atlas

    print(Atlas.open(arguments.atlas, arguments.revision).summary())


def _atlas_verify(arguments: argparse.Namespace) -> None:
    from perturbdiff.data.atlas import Atlas

    atlas = Atlas.open(arguments.atlas, arguments.revision)
    atlas.download()
    unlisted = atlas.verify()
    if unlisted:
        print(f"note        not of the atlas: {', '.join(unlisted[:5])}{', ...' if len(unlisted) > 5 else ''}")
    print(f"verified    {arguments.atlas}: {len(atlas.info.shards)} shards, {len(atlas):,} cells, every hash and row")


def _atlas_build(arguments: argparse.Namespace) -> None:
    from perturbdiff.config import load_build_config
    from perturbdiff.data.build import build

    given = {"out": arguments.out}
    if arguments.genes is not None:
        given["genes"] = arguments.genes
    paths = [word for word in arguments.inputs if "=" not in word or Path(word).exists()]
    settings = [word for word in arguments.inputs if word not in paths]
    config = load_build_config(paths, arguments.recipe, settings, given)
    build(config, arguments.max_memory, arguments.workers, arguments.task)


def _train(arguments: argparse.Namespace) -> None:
    _run_training(_config(arguments, arguments.screen, arguments.hold_out))


def _pretrain(arguments: argparse.Namespace) -> None:
    from perturbdiff.config import load_config

    given = {} if arguments.out is None else {"out": arguments.out}
    _run_training(load_config(arguments.recipe, arguments.settings, given))


def _run_training(config: Config) -> None:
    from perturbdiff.training.loop import train

    result = train(config)
    if result.stopped_by is None and _rank() == 0:
        print(f"model       {result.folder / 'model'} (step {result.step})")


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))  # of this process among those a launcher started


def _plan(arguments: argparse.Namespace) -> None:
    from perturbdiff.training.plan import Cluster, make_plan

    cluster = Cluster(
        arguments.gpus,
        arguments.gpu,
        arguments.gpus_per_node,
        arguments.network * 1e9,
        arguments.efficiency,
        arguments.cores_per_gpu,
    )
    plan = make_plan(_config(arguments, None, [], out="unused"), cluster)
    print(json.dumps(plan.as_json(), indent=1) if arguments.json else plan.text())


def _predict(arguments: argparse.Namespace) -> None:
    from perturbdiff.data.screen import control_cells, write_h5ad
    from perturbdiff.pretrained import PerturbDiff

    _refuse_existing(arguments.out, arguments.overwrite)
    model = PerturbDiff.from_pretrained(arguments.model)
    controls = control_cells(arguments.controls, model.config.obs, arguments.cell_type, arguments.batch)
    predicted = model.predict(
        controls,
        perturbation=arguments.perturbation,
        cell_type=arguments.cell_type,
        batch=arguments.batch,
        n_cells=arguments.n_cells,
        n_populations=arguments.n_populations,
        guidance_scale=arguments.guidance_scale,
        steps=arguments.steps,
        sampler=arguments.sampler,
        seed=arguments.seed,
        min_gene_overlap=arguments.min_gene_overlap,
    )
    write_h5ad(predicted, Path(arguments.out))
    said: dict[str, Any] = predicted.uns["perturbdiff"]
    print(f"genes       {said['n_genes_matched']:,} of {len(model.genes):,} matched by {said['genes_matched_by']}")
    if len(said["unseen"]):
        print(f"unseen      {', '.join(said['unseen'])}: predicted from the control cells alone")
    print(f"sampler     {said['sampler']}, {said['n_steps']} steps, guidance {said['guidance_scale']:g}")
    print(f"written     {arguments.out}: {predicted.n_obs:,} cells, {predicted.n_vars:,} genes")


def _evaluate(arguments: argparse.Namespace) -> None:
    from perturbdiff.evaluation.report import evaluate_file

    if arguments.out is not None and Path(arguments.out).exists() and not Path(arguments.out).is_dir():
        raise FileExistsError(f"--out {arguments.out} is a file; give a folder.")
    report = evaluate_file(arguments.predictions, arguments.screen, arguments.split, arguments.settings)
    print(report.table())
    if arguments.out is not None:
        out = Path(arguments.out)
        out.mkdir(parents=True, exist_ok=True)
        print("written: " + ", ".join(map(str, report.save(out))))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    # argparse reads positional words in one run only; key=value words may stand anywhere, before and after options.
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    words = "inputs" if hasattr(arguments, "inputs") else "settings"
    if rest and (not hasattr(arguments, words) or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        setattr(arguments, words, [*getattr(arguments, words), *rest])
    return arguments


def _config(
    arguments: argparse.Namespace, screen: str | Path | None, hold_out: Sequence[str], out: str | None = None
) -> Config:
    from perturbdiff.config import load_config

    given: dict[str, Any] = {"out": out or arguments.out, "data": {}}
    if screen is not None:
        given["data"]["screen"] = str(screen)
    if getattr(arguments, "atlas", None):
        given["data"]["atlases"] = [{"path": path} for path in arguments.atlas]
    if hold_out:
        given["split"] = {"hold_out": list(hold_out)}
    return load_config(getattr(arguments, "recipe", None), arguments.settings, given)


def _refuse_existing(path: str, overwrite: bool) -> None:
    if Path(path).exists() and not overwrite:
        raise FileExistsError(f"--out {path} exists; choose another name or give --overwrite.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="perturbdiff",
        description="Functional diffusion models of single-cell perturbation responses: train on a screen, predict\n"
        "the cells of conditions nobody measured, and score them beside honest baselines.",
        epilog="Start with: perturbdiff demo    (five minutes, no data needed)\n"
        "Then:       perturbdiff screen info FILE.h5ad",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"perturbdiff {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = _command(
        commands, "demo", _demo, "the whole way once: train, save, reload, predict what was held out, score",
        "Simulates a screen (or takes yours), holds conditions out, trains, saves the model folder, reloads it,\n"
        "predicts the held-out cells from their controls and prints the scores beside baselines and ceiling.",
        "examples:\n  perturbdiff demo\n"
        "  perturbdiff demo --screen kang.h5ad --hold-out IFN-beta:CD4T --out runs/kang\n" + SELECTORS + SETTINGS,
    )  # fmt: skip
    demo.add_argument("--screen", metavar="FILE.h5ad", help="your screen; without it one is simulated")
    _hold_out(demo)
    demo.add_argument("--out", default="runs/demo", metavar="DIR", help="run folder (default: %(default)s)")
    _recipe(demo)
    _settings(demo)

    screen = commands.add_parser("screen", help="look at a screen", description="Look at a screen.")
    screen_commands = screen.add_subparsers(title="commands", required=True, metavar="COMMAND")
    info = _command(
        screen_commands, "info", _screen_info, "what an .h5ad holds and how it would be read",
        "Reads an .h5ad as training would and says what it found: kind of X, perturbations, cell types, batches,\n"
        "conditions. Columns other than perturbation, cell_type, batch, and a control label other than 'control',\n"
        "are settings.",
        "example:\n  perturbdiff screen info FILE.h5ad data.perturbation_col=gene data.control_label=non-targeting\n"
        + SETTINGS,
    )  # fmt: skip
    info.add_argument("file", metavar="FILE.h5ad", help="X raw counts or log1p")
    _settings(info)

    _atlas_commands(commands)

    train = _command(
        commands, "train", _train, "train on a screen or on atlases from scratch",
        "Trains on an .h5ad and writes a run folder: config.yaml, split.json, metrics.jsonl, states/ and model/.\n"
        "Ctrl-C, SIGTERM and SIGUSR1 save and stop; the same command goes on where it stopped.",
        "examples:\n  perturbdiff train --screen kang.h5ad --hold-out IFN-beta:CD4T --out runs/kang\n"
        "  perturbdiff train --screen kang.h5ad --out runs/ref --recipe recipes/train/reference.yaml\n"
        "  perturbdiff train --atlas atlases/pbmc --out runs/pbmc data.n_hvg=null\n"
        "Weights, marginal sets and revisions of several atlases are settings: data.atlases in a recipe.\n"
        + SELECTORS + SETTINGS,
    )  # fmt: skip
    origin = train.add_mutually_exclusive_group()
    origin.add_argument("--screen", metavar="FILE.h5ad", help="X raw counts or log1p")
    origin.add_argument(
        "--atlas",
        action="append",
        metavar="DIR_OR_REPO",
        help="an atlas instead of a screen; may be given several times",
    )
    _hold_out(train)
    train.add_argument("--out", required=True, metavar="DIR", help="run folder")
    _recipe(train)
    _settings(train)

    pretrain = _command(
        commands, "pretrain", _pretrain, "train on atlases by a recipe, on one process or under accelerate launch",
        "Trains as `train` does, with everything in a recipe: marginal sets (unperturbed or perturbed cells, no\n"
        "controls), conditional ones, and mixtures of several atlases. One process, or many on one or more nodes:\n"
        "a launch file of recipes/accelerate/ says how many, and under which engine (DDP, ZeRO-1, 2, 3).\n"
        "SIGTERM, SIGUSR1 and Ctrl-C save and stop; the same command goes on, also on another number of processes.",
        "examples:\n  perturbdiff pretrain recipes/pretrain/tiny.yaml\n"
        "  accelerate launch --config_file recipes/accelerate/cpu_ddp.yaml -m perturbdiff pretrain "
        "recipes/pretrain/tiny.yaml\n"
        "  accelerate launch --config_file recipes/accelerate/1x8_ddp.yaml -m perturbdiff pretrain "
        "recipes/pretrain/pbmc.yaml training.seed=1\n"
        "  sbatch --nodes=8 recipes/slurm/pretrain.sbatch recipes/accelerate/8x8_ddp.yaml "
        "recipes/pretrain/tahoe100m.yaml\n" + SETTINGS,
    )  # fmt: skip
    pretrain.add_argument("recipe", metavar="RECIPE.yaml", help="atlases and settings; key=value words win over it")
    pretrain.add_argument("--out", metavar="DIR", help="run folder (default: the recipe's out)")
    _settings(pretrain)

    _plan_command(commands)

    predict = _command(
        commands, "predict", _predict, "predict cells under a perturbation from control cells",
        "Predicts one cell for each control cell (or --n-cells) and writes an .h5ad with log1p values. If the file\n"
        "also holds perturbed cells, its control cells are taken.",
        "example:\n  perturbdiff predict runs/kang/model --controls kang.h5ad --perturbation IFN-beta --cell-type CD4T "
        "--out cd4t.h5ad\n",
    )  # fmt: skip
    predict.add_argument("model", metavar="MODEL", help="model folder")
    predict.add_argument("--controls", required=True, metavar="FILE.h5ad", help="X raw counts or log1p")
    predict.add_argument("--perturbation", required=True, metavar="NAME", help="or several: A+B")
    predict.add_argument("--cell-type", metavar="NAME", help="only controls of this cell type (default: all)")
    predict.add_argument("--batch", metavar="NAME", help="only controls of this batch (default: all)")
    predict.add_argument("--out", required=True, metavar="FILE.h5ad", help="file to write")
    predict.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    predict.add_argument("--n-cells", type=int, metavar="N", help="cells to predict (default: one per control cell)")
    predict.add_argument("--n-populations", type=int, default=1, metavar="N", help="draws of the response distribution")
    predict.add_argument(
        "--guidance-scale", type=float, metavar="W", help="(1+W) cond - W uncond (default: the model's)"
    )
    predict.add_argument("--steps", type=int, metavar="N", help="denoiser calls (default: the model's)")
    predict.add_argument("--sampler", choices=("ddim", "ddpm"), help="(default: the model's)")
    predict.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same cells (default: 0)")
    predict.add_argument(
        "--min-gene-overlap", type=float, default=0.5, metavar="PART",
        help="refuse controls with fewer of the model's genes (default: %(default)s)",
    )  # fmt: skip

    evaluate = _command(
        commands, "evaluate", _evaluate, "score predicted cells against measured ones, beside baselines",
        "Compares conditions that are in both files, with the real control cells on both sides. With the split.json\n"
        "of the run, baselines are made from its training cells and only its held-out cells count.",
        "example:\n  perturbdiff evaluate cd4t.h5ad --screen kang.h5ad --split runs/kang/split.json --out scores\n"
        + SETTINGS,
    )  # fmt: skip
    evaluate.add_argument("predictions", metavar="PREDICTED.h5ad", help="X log1p, as perturbdiff predict writes it")
    evaluate.add_argument("--screen", required=True, metavar="FILE.h5ad", help="the measured cells and their controls")
    evaluate.add_argument("--split", metavar="split.json", help="of the run folder")
    evaluate.add_argument("--out", metavar="DIR", help="write scores.csv and scores.json there")
    _settings(evaluate)
    return parser


def _plan_command(commands: Any) -> None:
    plan = _command(
        commands, "plan", _plan, "what a recipe would take on so many GPUs: memory, FLOPs, bytes, days",
        "Counts the parameters of a recipe and the memory of a step by part and engine, estimates cells/s and days,\n"
        "and says where memory, data or network would not keep up. Needs no GPU and reads no cells. Sizes of the data\n"
        "are counted where the atlas is a folder here, and are data.atlases[].expected of the recipe otherwise.\n"
        "Times are the counts over peak FLOP/s times --efficiency, which is an assumption: a run prints its cells/s.",
        "examples:\n  perturbdiff plan recipes/pretrain/tahoe100m.yaml --gpus 64 --gpu h200\n"
        "  perturbdiff plan recipes/pretrain/tahoe100m.yaml --gpus 8 --gpu a100 training.accumulation_steps=4\n"
        "engines: DDP; ZeRO-1 shares the optimizer's state among the GPUs, ZeRO-2 the gradients too, ZeRO-3 the\n"
        "weights too.\n" + SETTINGS,
    )  # fmt: skip
    plan.add_argument("recipe", metavar="RECIPE", help="settings file; key=value words win over it")
    plan.add_argument("--gpus", type=int, required=True, metavar="N", help="over all nodes")
    plan.add_argument("--gpu", required=True, metavar="NAME", help="h100, h200, a100, ...; another is told the known")
    plan.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="(default: %(default)s)")
    plan.add_argument(
        "--network", type=float, default=50.0, metavar="GB/S",
        help="between nodes, for each GPU, one way (default: %(default)g, of 400 Gb/s adapters)",
    )  # fmt: skip
    plan.add_argument(
        "--efficiency", type=float, default=0.35, metavar="PART", help="of the peak FLOP/s (default: %(default)s)"
    )
    plan.add_argument(
        "--cores-per-gpu", type=float, default=1.0, metavar="N",
        help="CPU cores; one makes the batches, more do not help (default: %(default)g)",
    )  # fmt: skip
    plan.add_argument("--json", action="store_true", help="the numbers, bytes and seconds, instead of the text")
    _settings(plan)


def _atlas_commands(commands: Any) -> None:
    atlas = commands.add_parser("atlas", help="build and check atlases", description="Build and check atlases.")
    atlas_commands = atlas.add_subparsers(title="commands", required=True, metavar="COMMAND")
    build = _command(
        atlas_commands, "build", _atlas_build, "many .h5ad, Tahoe-schema Parquet or atlases -> one atlas",
        "Sorts the cells of all inputs by condition into Parquet shards that training streams and that plain\n"
        "datasets.load_dataset reads. Memory stays under --max-memory; a build that was stopped goes on with\n"
        "the same command; the same inputs, settings and seed give the same bytes.",
        "examples:\n"
        "  perturbdiff atlas build kang.h5ad norman.h5ad --out atlases/perturbed --genes union\n"
        "  perturbdiff atlas build a.h5ad --out atlases/a source.perturbation_col=gene source.control_label=NT\n"
        "  perturbdiff atlas build --recipe recipes/atlas/marginal.yaml --out atlases/marginal\n"
        "on a cluster (recipes/slurm/build_atlas.sbatch): the command with --task I/N in an array of N tasks,\n"
        "then once without --task, which merges what they left.\n"
        "\ngenes:\n"
        "  union                  every gene of any input, in order of appearance (the default)\n"
        "  intersection           genes of all inputs\n"
        "  FILE                   the names in a file, one a line, in its order; or another atlas's genes.parquet\n"
        "  merge-then-select:N    the N most variable genes of each input, then their union\n"
        "\nsettings:\n"
        "  source.KEY=value is of every input named here: perturbation_col, cell_type_col, batch_col (null: none),\n"
        "  control_label, library_size_col, cells=unperturbed, keep, drop, licence, ... Inputs that differ go into a\n"
        "  recipe. Others are licence, gene_table, count_type, seed. perturbdiff/config.py says what each means.\n",
    )  # fmt: skip
    build.add_argument("inputs", nargs="*", metavar="IN", help=".h5ad, folder or repo id; and key=value settings")
    build.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    build.add_argument("--recipe", metavar="FILE.yaml", help="sources and settings; key=value words win over it")
    build.add_argument("--genes", metavar="RULE", help="which genes the atlas has (below; default: union)")
    build.add_argument(
        "--max-memory", type=_bytes, default="4GB", metavar="SIZE", help="of all processes together (default: 4GB)"
    )
    build.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")
    build.add_argument("--task", type=_task, metavar="I/N", help="only the I-th of N parts of the partition, from 1")

    for name, run, short, description in (
        ("info", _atlas_info, "what an atlas holds", "Reads the manifest of an atlas and says what is in it."),
        (
            "verify", _atlas_verify, "read all of it and compare with its manifest",
            "Checks every file's size and sha256 and every row: labels, gene indices, values. Names the first problem.",
        ),
    ):  # fmt: skip
        command = _command(atlas_commands, name, run, short, description, f"example:\n  perturbdiff atlas {name} DIR\n")
        command.add_argument("atlas", metavar="DIR_OR_REPO", help="folder, or repo id of a data set on the Hub")
        command.add_argument("--revision", metavar="REV", help="branch, tag or commit of a repo")


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)i?B?", text, re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 800MB or 4GB.")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


def _task(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 1 <= I <= N, as 3/16.")
    return int(match[1]), int(match[2])


def _command(commands: Any, name: str, run: Any, short: str, description: str, epilog: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=short,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _hold_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hold-out", action="append", metavar="SELECTOR", help="never train on these; may be given several times"
    )


def _recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", metavar="FILE.yaml", help="settings file; key=value words win over it")


def _settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings, as training.n_steps=1000")
