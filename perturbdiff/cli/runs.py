"""Commands on runs: demo, screen info, train, pretrain, finetune, plan, evaluate."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perturbdiff.cli.check import add_check_command
from perturbdiff.cli.command import SETTINGS, add_command, add_settings, refuse_missing
from perturbdiff.cli.predict import add_predict_commands
from perturbdiff.cli.rank import add_rank_command
from perturbdiff.cli.simulate import add_simulate_command
from perturbdiff.training.signals import StopRequest

if TYPE_CHECKING:
    from perturbdiff.config import Config
    from perturbdiff.evaluation.scores import Scores
    from perturbdiff.training.run import Run

SELECTORS = """
hold-out selectors:
  PERTURBATION                        in every context, at every dose; A+B in any order
  PERTURBATION:CELL_TYPE              in one cell type, every batch
  PERTURBATION:CELL_TYPE:BATCH        one condition; * is any
  A+*                                 everything that has A: A alone, A+B, ...
  COLUMN=VALUE                        by any obs column, as in batch=rep_3; also behind the others, as A:T:donor=7
All of a cell type but some: --hold-out '*:T' 'split.train=[A:T, B:T]'.
Control cells are not held out. Half of those of a context with held-out cells measures the truth and does not train.
"""


def add_run_commands(commands: Any) -> None:
    """Declare them."""
    demo = add_command(
        commands, "demo", _demo, "the whole way once: train, save, reload, predict what was held out, score",
        "Simulates a screen and holds one of its batches out (or takes yours, and what --hold-out says), trains,\n"
        "saves the model folder, reloads it, predicts the held-out cells from their controls and prints the scores\n"
        "beside simple methods and ceiling.",
        "examples:\n  perturbdiff demo\n"
        "  perturbdiff demo --screen kang.h5ad --hold-out IFN-beta:CD4T --out runs/kang\n" + SELECTORS + SETTINGS,
    )  # fmt: skip
    demo.add_argument("--screen", metavar="FILE.h5ad", help="your screen; without it one is simulated")
    _hold_out(demo)
    demo.add_argument("--out", default="runs/demo", metavar="DIR", help="run folder (default: %(default)s)")
    _recipe(demo)
    add_settings(demo)

    add_simulate_command(commands)

    about = "look at a screen, and choose what to screen next"
    screen = commands.add_parser("screen", help=about, description=f"{about[0].upper()}{about[1:]}.")
    screen_commands = screen.add_subparsers(title="commands", required=True, metavar="COMMAND")
    info = add_command(
        screen_commands, "info", _screen_info, "what an .h5ad holds and how it would be read",
        "Reads an .h5ad as training would and says what it found: kind of X, perturbations, cell types, batches,\n"
        "conditions. Columns other than perturbation, cell_type, batch, and a control label other than 'control',\n"
        "are settings.",
        "example:\n  perturbdiff screen info FILE.h5ad data.perturbation_col=gene data.control_label=non-targeting\n"
        + SETTINGS,
    )  # fmt: skip
    info.add_argument("file", metavar="FILE.h5ad", help="X raw counts or log1p")
    add_settings(info)
    add_rank_command(screen_commands)

    train = add_command(
        commands, "train", _train, "train on a screen or on atlases from scratch",
        "Trains on an .h5ad and writes a run folder: config.yaml, split.json, metrics.jsonl, states/ and model/.\n"
        "What is held out is predicted and scored beside baselines. Without --recipe one is chosen for it first, by\n"
        "training conditions that are left out (--budget); not with an atlas or on several processes.\n"
        "Ctrl-C, SIGTERM and SIGUSR1 save and stop; the same command goes on where it stopped.",
        "examples:\n  perturbdiff train --screen kang.h5ad --hold-out IFN-beta:CD4T --out runs/kang\n"
        "  perturbdiff train --screen kang.h5ad --out runs/ref --recipe reference\n"
        "  perturbdiff train --atlas atlases/pbmc --out runs/pbmc data.n_hvg=null\n"
        "Weights, marginal sets and revisions of several atlases are settings: data.atlases in a recipe.\n"
        + SELECTORS + SETTINGS,
    )  # fmt: skip
    _origin(train)
    _hold_out(train)
    _no_score(train)
    train.add_argument("--out", required=True, metavar="DIR", help="run folder")
    _recipe(train)
    _budget(train)
    add_settings(train)

    pretrain = add_command(
        commands, "pretrain", _pretrain, "train on atlases by a recipe, on one process or under accelerate launch",
        "Trains as `train` does, with everything in a recipe: marginal sets (unperturbed or perturbed cells, no\n"
        "controls), conditional ones, and mixtures of several atlases. One process, or many on one or more nodes:\n"
        "a launch file (`perturbdiff recipes` lists some) says how many, and under which engine: DDP, ZeRO-1, 2, 3.\n"
        "SIGTERM, SIGUSR1 and Ctrl-C save and stop; the same command goes on, also on another number of processes.",
        "examples:\n  perturbdiff pretrain tiny\n"
        "  perturbdiff recipes accelerate/1x8_ddp > 1x8_ddp.yaml\n"
        "  accelerate launch --config_file 1x8_ddp.yaml -m perturbdiff pretrain pbmc training.seed=1\n"
        "  perturbdiff recipes slurm/pretrain > pretrain.sbatch\n"
        "  sbatch --nodes=8 pretrain.sbatch 8x8_ddp.yaml tahoe100m\n" + SETTINGS,
    )  # fmt: skip
    pretrain.add_argument(
        "recipe", metavar="RECIPE", help="file, or name of `perturbdiff recipes`: atlases and settings"
    )
    pretrain.add_argument("--out", metavar="DIR", help="run folder (default: the recipe's out)")
    add_settings(pretrain)

    _finetune_command(commands)
    _plan_command(commands)

    add_check_command(commands)
    add_predict_commands(commands)

    evaluate = add_command(
        commands, "evaluate", _evaluate, "score predicted cells against measured ones, beside baselines",
        "Compares conditions that are in both files, over all measured genes, with real control cells on both sides.\n"
        "With the split.json of the run, simple methods know its training cells and only its held-out cells count.\n"
        "Predictions of any tool: X log1p, obs perturbation, cell_type and batch. A run folder: what it predicted. A\n"
        "model: its held-out conditions are predicted first, by its own split where --split gives none.",
        "examples:\n  perturbdiff evaluate cd4t.h5ad --screen kang.h5ad --split runs/kang/split.json --out scores\n"
        "  perturbdiff evaluate runs/kang\n"
        "  perturbdiff evaluate owner/kang@v1 --screen kang.h5ad --out scores\n"
        "  perturbdiff evaluate cd4t.h5ad --screen kang.h5ad --split runs/kang/split.json --model runs/kang/model\n"
        + SETTINGS,
    )  # fmt: skip
    evaluate.add_argument(
        "predictions", metavar="PREDICTED", help=".h5ad or .parquet; or a run folder; or a model folder, name or repo"
    )
    evaluate.add_argument("--screen", metavar="FILE.h5ad", help="the measured cells and their controls")
    evaluate.add_argument("--split", metavar="split.json", help="of the run folder")
    evaluate.add_argument(
        "--field",
        action="store_true",
        help="also ask cell-eval for all of its metrics (pip install 'perturbdiff[eval]')",
    )
    evaluate.add_argument("--out", metavar="DIR", help="write scores.parquet and scores.json there")
    evaluate.add_argument(
        "--model", metavar="FOLDER", help="the model folder that predicted: put the scores there and on its card"
    )
    add_settings(evaluate)


def _finetune_command(commands: Any) -> None:
    finetune = add_command(
        commands, "finetune", _finetune, "adapt a checkpoint to a new screen, train it on, score what is held out",
        "Matches genes and labels of a checkpoint and of the data by name, says what is shared, new and left out, and\n"
        "trains from there. Architecture, preprocessing, diffusion, sampling are the checkpoint's. What is held out\n"
        "is predicted and scored beside baselines. The model folder needs nothing else. Signals, several processes\n"
        "and the choice of a recipe as with train: the checkpoint as it is and training from scratch are tried too.",
        "examples:\n  perturbdiff finetune --screen kang.h5ad --init-from owner/name@v1 --out runs/kang --dry-run\n"
        "  perturbdiff finetune --screen kang.h5ad --init-from models/pbmc --hold-out IFN-beta:CD4T --out runs/kang\n"
        "  perturbdiff finetune --screen kang.h5ad --init-from models/pbmc --recipe lora\n"
        "With adapt.method=lora the run folder also has an adapter/, which `hub push` and `hub merge` take.\n"
        + SELECTORS + SETTINGS,
    )  # fmt: skip
    _origin(finetune)
    finetune.add_argument(
        "--init-from", metavar="MODEL", help="model folder, name or owner/name[@REVISION] (default: the recipe's)"
    )
    _hold_out(finetune)
    _no_score(finetune)
    finetune.add_argument("--out", default="runs/finetune", metavar="DIR", help="run folder (default: %(default)s)")
    finetune.add_argument("--dry-run", action="store_true", help="say what was found and would be done, and end")
    _recipe(finetune)
    _budget(finetune)
    add_settings(finetune)


def _plan_command(commands: Any) -> None:
    plan = add_command(
        commands, "plan", _plan, "what a recipe would take on so many GPUs: memory, FLOPs, cells/s, days",
        "Counts the parameters of a recipe and the memory of a step by part and engine, estimates cells/s and days,\n"
        "and says what limits them: memory, computing, data or network. Needs no GPU and reads no cells. Data are\n"
        "counted where the atlas is a folder here, and are data.atlases[].expected of the recipe otherwise.\n"
        "Times are the counts over peak FLOP/s times --efficiency, which is an assumption: a run prints its cells/s.",
        "examples:\n  perturbdiff plan tahoe100m --gpus 64 --gpu h200\n"
        "  perturbdiff plan tahoe100m --gpus 8 --gpu a100 training.accumulation_steps=4\n"
        "engines: DDP; ZeRO-1 shares the optimizer's state among the GPUs, ZeRO-2 the gradients too, ZeRO-3 the\n"
        "weights too.\n" + SETTINGS,
    )  # fmt: skip
    plan.add_argument("recipe", metavar="RECIPE", help="file, or name of `perturbdiff recipes`")
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
    add_settings(plan)


def _origin(parser: argparse.ArgumentParser) -> None:
    origin = parser.add_mutually_exclusive_group()
    origin.add_argument("--screen", metavar="FILE.h5ad", help="X raw counts or log1p")
    origin.add_argument(
        "--atlas",
        action="append",
        metavar="DIR_OR_REPO",
        help="an atlas instead of a screen; may be given several times",
    )


def _hold_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hold-out", action="append", metavar="SELECTOR", help="never train on these; may be given several times"
    )
    parser.add_argument(
        "--split",
        metavar="FILE",
        help="hold out and validate on what a file says: a .toml of cell-load, a .yaml of the reference, a split.json",
    )


def _no_score(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-score", action="store_true", help="end after the training")


def _budget(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--budget", type=float, metavar="MINUTES", help="for choosing a recipe (default: about two trainings)"
    )


def _recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", metavar="RECIPE", help="settings: a file, or a name of `perturbdiff recipes`")


def _noting_signals(run: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], None]:
    """From the first moment on, also while torch is imported; training acts on what came (`StopRequest`)."""

    def noting(arguments: argparse.Namespace) -> None:
        with StopRequest():
            run(arguments)

    return noting


@_noting_signals
def _demo(arguments: argparse.Namespace) -> None:
    from perturbdiff.training.run import demo

    words = {"hold_out": arguments.hold_out or (), "recipe": arguments.recipe, "overrides": _settings(arguments)}
    _print_run(demo(arguments.screen, arguments.out, **words))


def _screen_info(arguments: argparse.Namespace) -> None:
    from perturbdiff.data.conditions import control_note
    from perturbdiff.data.screen import Screen
    from perturbdiff.files import hanging

    config = _config(arguments, arguments.file, [], out="unused")
    screen = Screen.read(arguments.file, config.data)
    print(screen.summary())
    for note in filter(None, (screen.panel_note(), control_note(screen))):
        print(hanging(f"note        {note}", 12))
    print(f"train with  {screen.train_command()}")


@_noting_signals
def _train(arguments: argparse.Namespace) -> None:
    from perturbdiff.training.run import train

    _print_run(train(**_training_of(arguments), budget=arguments.budget))


@_noting_signals
def _pretrain(arguments: argparse.Namespace) -> None:
    from perturbdiff.config import find_recipe
    from perturbdiff.training.run import train

    recipe = find_recipe(arguments.recipe, "pretrain")
    _print_run(train(None, arguments.out, recipe=recipe, overrides=arguments.settings, score=False))


@_noting_signals
def _finetune(arguments: argparse.Namespace) -> None:
    if arguments.init_from is not None:
        refuse_missing(arguments.init_from)
    from perturbdiff.training.run import finetune, preview

    words = {**_training_of(arguments), "init_from": arguments.init_from}
    if not arguments.dry_run:
        _print_run(finetune(**words, budget=arguments.budget))
    elif rank() == 0:
        print(preview(**words))


def _training_of(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "screen": arguments.screen,
        "out": arguments.out,
        "atlases": arguments.atlas or (),
        "hold_out": arguments.hold_out or (),
        "recipe": arguments.recipe,
        "overrides": _settings(arguments),
        "score": not arguments.no_score,
    }


def _settings(arguments: argparse.Namespace) -> list[str]:
    return arguments.settings if arguments.split is None else [f"split.file={arguments.split}", *arguments.settings]


def _print_run(run: Run) -> None:
    from perturbdiff.files import printable

    if run.stopped_by is not None or rank() != 0:
        return
    if run.scores is not None:
        print(f"\n{run.scores.table()}")
    print(f"\nmodel       {run.folder / 'model'} (step {run.step})\nwritten:")
    print("\n".join(f"  {path}" for path in run.written))
    if perturbations := run.model.vocabularies.trained:
        of = perturbations[0] if run.scores is None else run.scores.conditions["perturbation"].iloc[0]
        words = ["perturbdiff", "predict", str(run.folder / "model"), "--controls", "CONTROLS.h5ad"]
        words += ["--perturbation", str(of), "--out", "predicted.h5ad"]
        print(f"next        {printable(shlex.join(words))}")


def _plan(arguments: argparse.Namespace) -> None:
    from perturbdiff.config import find_recipe
    from perturbdiff.training.estimate import Cluster, estimate

    cluster = Cluster(
        arguments.gpus,
        arguments.gpu,
        arguments.gpus_per_node,
        arguments.network * 1e9,
        arguments.efficiency,
        arguments.cores_per_gpu,
    )
    arguments.recipe = find_recipe(arguments.recipe, "pretrain")
    found = estimate(_config(arguments, None, [], out="unused"), cluster)
    print(json.dumps(asdict(found), indent=1) if arguments.json else found.text())


def _scores(arguments: argparse.Namespace) -> Scores:
    is_file = Path(arguments.predictions).suffix in (".h5ad", ".parquet")
    if not is_file and not Path(arguments.predictions).is_dir():
        refuse_missing(arguments.predictions)
    from perturbdiff.evaluation.held_out import RUN_FILES, evaluate_model, evaluate_run
    from perturbdiff.evaluation.scores import evaluate

    given, screen, split, words = arguments.predictions, arguments.screen, arguments.split, arguments.settings
    if split is None and all((Path(given) / name).is_file() for name in RUN_FILES):
        return evaluate_run(given, screen, field=arguments.field, overrides=words)
    if screen is None:
        run = Path(given).parent
        own = f"; scores of its run: perturbdiff evaluate {run}" if (run / "predicted.h5ad").is_file() else ""
        raise ValueError(f"--screen is missing: the measured cells and their controls{own}.")
    if is_file:
        return evaluate(given, screen, split, field=arguments.field, overrides=words)
    return evaluate_model(given, screen, split, field=arguments.field, overrides=words)


def _evaluate(arguments: argparse.Namespace) -> None:
    from perturbdiff.evaluation.scores import OTHER
    from perturbdiff.hub.download import own_folder

    folder = None if arguments.model is None else own_folder(arguments.model)
    if arguments.out is not None and Path(arguments.out).exists() and not Path(arguments.out).is_dir():
        raise FileExistsError(f"--out {arguments.out} is a file; give a folder.")
    scores = _scores(arguments)
    if folder is not None and scores.model == OTHER:
        raise ValueError(
            f"{arguments.predictions} does not say that a model of perturbdiff predicted it (uns['perturbdiff']), and "
            f"--model would put its scores on the card of {folder}; leave --model out."
        )
    print(scores.table())
    if folder is not None:
        from perturbdiff.model import PerturbDiff

        model = PerturbDiff.from_pretrained(folder, device="cpu")
        model.evaluation = scores.record()
        model.save_pretrained(folder)
        print(f"scores put into {folder}")
    if arguments.out is not None:
        out = Path(arguments.out)
        out.mkdir(parents=True, exist_ok=True)
        print("written: " + ", ".join(map(str, scores.save(out))))


def _config(
    arguments: argparse.Namespace, screen: str | Path | None, hold_out: Sequence[str], out: str | None = None
) -> Config:
    from perturbdiff.config import load_config

    given = _given(arguments, screen, hold_out, out)
    return load_config(getattr(arguments, "recipe", None), arguments.settings, given)


def _given(
    arguments: argparse.Namespace, screen: str | Path | None, hold_out: Sequence[str], out: str | None = None
) -> dict[str, Any]:
    given: dict[str, Any] = {"out": out or arguments.out, "data": {}}
    if screen is not None:
        given["data"]["screen"] = str(screen)
    if getattr(arguments, "atlas", None):
        given["data"]["atlases"] = [{"path": path} for path in arguments.atlas]
    if hold_out:
        given["split"] = {"hold_out": list(hold_out)}
    return given


def rank() -> int:
    return int(os.environ.get("RANK", "0"))  # of this process among those a launcher started
