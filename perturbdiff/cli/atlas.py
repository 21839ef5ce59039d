"""Commands on atlases."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from perturbdiff.cli.command import add_command, add_target, print_publication


def add_atlas_commands(commands: Any) -> None:
    """Declare them."""
    atlas = commands.add_parser("atlas", help="build and check atlases", description="Build and check atlases.")
    atlas_commands = atlas.add_subparsers(title="commands", required=True, metavar="COMMAND")
    build = add_command(
        atlas_commands, "build", _atlas_build, "many .h5ad, Tahoe-schema Parquet or atlases -> one atlas",
        "Sorts the cells of all inputs by condition into Parquet shards that training streams and that plain\n"
        "datasets.load_dataset reads. Memory stays under --max-memory; a build that was stopped goes on with\n"
        "the same command; the same inputs, settings and seed give the same bytes.",
        "examples:\n"
        "  perturbdiff atlas build kang.h5ad norman.h5ad --out atlases/perturbed --genes union\n"
        "  perturbdiff atlas build a.h5ad --out atlases/a source.perturbation_col=gene source.control_label=NT\n"
        "  perturbdiff atlas build --recipe mine.yaml --out atlases/marginal\n"
        "on a cluster (`perturbdiff recipes slurm/build_atlas`): the command with --task I/N in an array of N tasks,\n"
        "then once without --task, which merges what they left.\n"
        "\ngenes:\n"
        "  union                  every gene of any input, in order of appearance (the default)\n"
        "  intersection           genes of all inputs\n"
        "  FILE                   the names in a file, one a line, in its order; or another atlas's genes.parquet\n"
        "  merge-then-select:N    the N most variable genes of each input, then their union\n"
        "\nsettings:\n"
        "  source.KEY=value is of every input named here: perturbation_col, cell_type_col, batch_col (null: none),\n"
        "  control_label, other_control_labels, dose_col, combination_separator, library_size_col, cells=unperturbed,\n"
        "  keep, drop, where=[COLUMN=VALUE], license, ... Inputs that differ go into a recipe. Others are license,\n"
        "  gene_table, count_type, seed. `perturbdiff settings atlas` prints all.\n",
    )  # fmt: skip
    build.add_argument("inputs", nargs="*", metavar="IN", help=".h5ad, folder or repo id; and key=value settings")
    build.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    build.add_argument("--recipe", metavar="RECIPE", help="file, or name of `perturbdiff recipes`")
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
        (
            "cache", _atlas_cache, "make ready what training maps into memory",
            "Makes the Arrow cache of an atlas in $HF_DATASETS_CACHE, after downloading it where it is on the Hub: a\n"
            "job on many GPUs then need not. With data.streamed=true nothing is cached.",
        ),
    ):  # fmt: skip
        command = add_command(
            atlas_commands, name, run, short, description, f"example:\n  perturbdiff atlas {name} DIR\n"
        )
        command.add_argument("atlas", metavar="DIR_OR_REPO", help="folder, or repo id of a data set on the Hub")
        command.add_argument("--revision", metavar="REV", help="branch, tag or commit of a repo")

    push = add_command(
        atlas_commands, "push", _atlas_push, "an atlas -> a data set on the Hub",
        "Verifies every row, pushes the atlas as one commit with its card, compares what the Hub then has; the tag\n"
        "is set last. A push that broke off goes on with the same command: shards that are there are not sent again.\n"
        "The Hub's viewer shows it, and training streams from the repo id.",
        "example:\n  perturbdiff atlas push atlases/perturbed owner/perturbed --tag v1\n",
    )  # fmt: skip
    push.add_argument("atlas", metavar="DIR", help="folder of an atlas")
    add_target(push)

    pull = add_command(
        atlas_commands, "pull", _atlas_pull, "a data set on the Hub -> a folder",
        "Downloads an atlas to a folder of its own and verifies every hash and row; interrupted, it goes on with the\n"
        "same command.",
        "example:\n  perturbdiff atlas pull owner/perturbed --revision v1 --out atlases/perturbed\n",
    )  # fmt: skip
    pull.add_argument("atlas", metavar="OWNER/NAME", help="repo id of a data set on the Hub")
    pull.add_argument("--revision", metavar="REV", help="branch, tag or commit")
    pull.add_argument("--out", required=True, metavar="DIR", help="folder to make")


def _atlas_build(arguments: argparse.Namespace) -> None:
    from perturbdiff.atlas.build.run import build
    from perturbdiff.config import load_build_config

    given = {"out": arguments.out}
    if arguments.genes is not None:
        given["genes"] = arguments.genes
    paths = [word for word in arguments.inputs if "=" not in word or Path(word).exists()]
    settings = [word for word in arguments.inputs if word not in paths]
    config = load_build_config(paths, arguments.recipe, settings, given)
    build(config, arguments.max_memory, arguments.workers, arguments.task)


def _atlas_info(arguments: argparse.Namespace) -> None:
    from perturbdiff.atlas.store import Atlas

    print(Atlas.open(arguments.atlas, arguments.revision).summary())


def _atlas_verify(arguments: argparse.Namespace) -> None:
    from perturbdiff.atlas.store import Atlas

    atlas = Atlas.open(arguments.atlas, arguments.revision)
    atlas.download()
    unlisted = atlas.verify()
    if unlisted:
        print(f"note        not of the atlas: {', '.join(unlisted[:5])}{', ...' if len(unlisted) > 5 else ''}")
    print(f"verified    {arguments.atlas}: {len(atlas.info.shards)} shards, {len(atlas):,} cells, every hash and row")


def _atlas_cache(arguments: argparse.Namespace) -> None:
    from perturbdiff.atlas.store import Atlas

    atlas = Atlas.open(arguments.atlas, arguments.revision)
    atlas.download()
    folders = [Path(builder.cache_dir) for builder in atlas.cache()]
    size = sum(path.stat().st_size for folder in folders for path in folder.rglob("*"))
    print(f"cached      {arguments.atlas}: {len(atlas):,} cells, {size / 1e9:.2f} GB in {folders[0].parents[1]}")


def _atlas_push(arguments: argparse.Namespace) -> None:
    from perturbdiff.hub.atlases import push_atlas

    done = push_atlas(
        arguments.atlas, arguments.repo, arguments.private, arguments.revision, arguments.tag, arguments.message
    )
    print_publication(done)


def _atlas_pull(arguments: argparse.Namespace) -> None:
    from perturbdiff.hub.atlases import pull_atlas

    atlas = pull_atlas(arguments.atlas, arguments.out, arguments.revision)
    print(f"pulled      {arguments.atlas}: {len(atlas.info.shards)} shards, {len(atlas):,} cells, every hash and row")
    print(f"written     {arguments.out}")


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
