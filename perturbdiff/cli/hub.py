"""Commands on the Hub: push, pull, list, info, verify, diff, merge; and convert, which makes a model folder to push."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perturbdiff.cli.command import add_command, add_settings, add_target, print_publication, refuse_missing

if TYPE_CHECKING:
    from perturbdiff.hub.download import ModelSource

WHERE = """
MODEL is a folder, a name that `perturbdiff hub list` shows, or owner/name of a repo on the Hub; of a repo,
owner/name@REVISION is a branch, tag or commit. HF_TOKEN or `hf auth login` opens private repos; HF_ENDPOINT names a
mirror; HF_HUB_OFFLINE=1 takes everything from the cache.
"""


def add_hub_commands(commands: Any) -> None:
    """Declare them."""
    hub = commands.add_parser(
        "hub", help="publish, find and check models", description="Publish, find and check models."
    )
    hub_commands = hub.add_subparsers(title="commands", required=True, metavar="COMMAND")
    push = add_command(
        hub_commands, "push", _push, "a model folder -> a repo on the Hub",
        "Checks the folder, writes its card, pushes it as one commit, pulls that back, compares every hash and runs\n"
        "the golden check; the tag is set last, so that a push that failed leaves none.",
        "examples:\n  perturbdiff hub push runs/kang/model owner/kang --tag v1 --license mit\n"
        "  perturbdiff hub push runs/kang/model owner/kang --private --revision trial\n"
        "Prints the lines by which a registry names what was pushed.",
    )  # fmt: skip
    push.add_argument("model", metavar="FOLDER", help="model folder")
    add_target(push)
    push.add_argument("--license", metavar="ID", help="of the weights; kept in the folder's training.json and its card")
    push.add_argument(
        "--benchmark", metavar="OWNER/NAME", help="the data set on the Hub that its evaluation is of, to be shown there"
    )

    pull = add_command(
        hub_commands, "pull", _pull, "a repo on the Hub -> a model folder",
        "Downloads a model to a folder of its own, every hash and the golden output checked; interrupted, it goes on\n"
        "with the same command. Such a folder works wherever a repo id does.",
        "example:\n  perturbdiff hub pull owner/kang@v1 --out models/kang\n" + WHERE,
    )  # fmt: skip
    pull.add_argument("model", metavar="MODEL", help="name or repo")
    pull.add_argument("--out", required=True, metavar="DIR", help="folder to make")

    again = add_command(
        hub_commands, "reproduce", _reproduce, "the scores of a model's card, made again",
        "Predicts the held-out conditions that the model's own split.json names, scores them, and compares the scores\n"
        "with those of the card. The screen must have the very cells, by name and by content. Exits 0 where the\n"
        "scores agree, and 2 where they do not.",
        "example:\n  perturbdiff hub reproduce owner/kang@v1 --screen kang.h5ad\n" + WHERE,
    )  # fmt: skip
    again.add_argument("model", metavar="MODEL", help="folder, name or repo")
    again.add_argument("--screen", required=True, metavar="FILE.h5ad", help="the measured cells and their controls")
    add_settings(again)

    listing = add_command(
        hub_commands, "list", _list, "known checkpoints, and models on the Hub",
        "Lists the registry, and the models on the Hub that say they are of this library.",
        "examples:\n  perturbdiff hub list\n  perturbdiff hub list --owner owner\n"
        "PERTURBDIFF_REGISTRY names another registry than the one of the package.",
    )  # fmt: skip
    listing.add_argument("--owner", metavar="NAME", help="only models of this user or organisation")
    listing.add_argument("--search", metavar="WORD", help="only models with this word in their name")

    info = add_command(
        hub_commands, "info", _info, "what a model expects: genes, X, labels, license, scores",
        "Reads the JSON files of a model and says what it expects and where it comes from; loads no weights.",
        "examples:\n  perturbdiff hub info runs/kang/model\n  perturbdiff hub info owner/kang@v1\n" + WHERE,
    )  # fmt: skip
    info.add_argument("model", metavar="MODEL", help="folder, name or repo")

    verify = add_command(
        hub_commands, "verify", _verify, "every hash and the golden output",
        "Loads a model as `predict` would and says what was checked. Names the first problem. The card is text for\n"
        "people, which their edits may change; it is not looked at.",
        "example:\n  perturbdiff hub verify owner/kang@v1\n" + WHERE,
    )  # fmt: skip
    verify.add_argument("model", metavar="MODEL", help="folder, name or repo")

    diff = add_command(
        hub_commands, "diff", _diff, "how two models differ",
        "Compares settings, vocabularies, training, scores and the hashes of the weights; loads no weights.",
        "example:\n  perturbdiff hub diff owner/kang@v1 runs/kang/model\n" + WHERE,
    )  # fmt: skip
    diff.add_argument("model", metavar="MODEL", help="folder, name or repo")
    diff.add_argument("other", metavar="OTHER", help="the same")

    merge = add_command(
        hub_commands, "merge", _merge, "an adapter and its base -> a model folder",
        "Adds the low-rank changes of an adapter to the checkpoint it was trained on, which must be the very same\n"
        "(by sha256), and writes a model folder that needs neither.",
        "examples:\n  perturbdiff hub merge owner/kang-lora --out models/kang\n"
        "  perturbdiff hub merge runs/kang/adapter --base models/pbmc --out models/kang",
    )  # fmt: skip
    merge.add_argument("adapter", metavar="ADAPTER", help="folder or repo")
    merge.add_argument("--base", metavar="MODEL", help="folder, name or repo (default: where the adapter says)")
    merge.add_argument("--out", required=True, metavar="DIR", help="folder to make")

    convert = add_command(
        commands, "convert", _convert, "a published Lightning checkpoint -> a model folder",
        "Reads a checkpoint of the published implementation without executing anything in it, and writes a model\n"
        "folder with its weights, vocabularies, frozen tables and settings; outputs are those of the published code.",
        "examples:\n  perturbdiff convert pbmc.ckpt --genes genes.txt --out models/pbmc\n"
        "  perturbdiff convert all.ckpt --genes genes.txt --dataset tahoe100m --out models/tahoe",
    )  # fmt: skip
    convert.add_argument("checkpoint", metavar="FILE.ckpt")
    convert.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    convert.add_argument(
        "--genes", metavar="FILE", help="names in the model's order, one a line; the file does not hold them"
    )
    convert.add_argument("--dataset", metavar="NAME", help="whose embedders to take, of a model with one for each")
    convert.add_argument(
        "--weights", choices=("ema", "raw"), default="ema", help="averaged or last (default: %(default)s)"
    )
    convert.add_argument("--license", metavar="ID", help="of the weights, for the card")


def _push(arguments: argparse.Namespace) -> None:
    from perturbdiff.hub.download import own_folder

    path = own_folder(arguments.model)  # before torch is imported: a mistyped path is told at once
    from perturbdiff.hub.metadata import parse_metadata
    from perturbdiff.hub.model_folder import read_folder
    from perturbdiff.hub.registry import entry_of
    from perturbdiff.model import PerturbDiff, push_folder

    with tempfile.TemporaryDirectory() as copies:
        pushed = path
        if arguments.license is not None:  # in a copy: a push that fails changes nothing
            if read_folder(path).is_adapter:
                raise ValueError("an adapter has no license of its own; leave --license out.")
            model = PerturbDiff.from_pretrained(path, device="cpu")
            model.training = replace(model.training, license=arguments.license)
            pushed = shutil.copytree(path, Path(copies) / path.name)  # with its card, of which the owner's words stay
            model.save_pretrained(pushed)
        done = push_folder(
            pushed,
            arguments.repo,
            private=arguments.private,
            revision=arguments.revision,
            tag=arguments.tag,
            commit_message=arguments.message,
            benchmark=arguments.benchmark,
        )
    if pushed != path:
        model.save_pretrained(path)
    print_publication(done)
    folder = read_folder(path)
    evaluation = parse_metadata(folder).evaluation
    metrics = {name: round(value, 4) for name, value in evaluation.scores.items()} if evaluation else {}
    name = arguments.repo.rsplit("/", 1)[-1]
    print("\nfor a registry:")
    print(entry_of(name, done.repo, done.tag or done.commit, folder.sha256, None, metrics), end="")


def _pull(arguments: argparse.Namespace) -> None:
    from perturbdiff.hub.download import pull_model

    source = _find(arguments.model)
    from perturbdiff.model import PerturbDiff

    pull_model(source, arguments.out, check=lambda folder: PerturbDiff.from_pretrained(folder, device="cpu"))
    print(f"pulled      {source.name} at commit {source.commit}: every hash and the golden output checked")
    print(f"written     {arguments.out}")


def _reproduce(arguments: argparse.Namespace) -> None:
    refuse_missing(arguments.model)
    from perturbdiff.evaluation.held_out import reproduce

    found = reproduce(arguments.model, arguments.screen, overrides=arguments.settings)
    print(found.now.table())
    if differing := found.differing():
        said = ", ".join(f"{name} {then:.4g} on the card and {now:.4g} now" for name, (then, now) in differing.items())
        raise ValueError(f"the scores of {arguments.model} are not those of its card: {said}.")
    print(f"reproduced  all {len(found.then.scores)} scores of the card")


def _list(arguments: argparse.Namespace) -> None:
    from perturbdiff.hub.download import list_models
    from perturbdiff.hub.registry import read_registry

    known = read_registry()
    print(f"registered  {len(known)}")
    for entry in known.values():
        scores = ", ".join(f"{name} {value:g}" for name, value in list(entry.metrics.items())[:3])
        where = f"{entry.repo}@{entry.revision}" if entry.revision else "a folder"
        print(f"  {entry.name:<24}{where}  {scores}")
    try:
        found = list_models(arguments.owner, arguments.search)
    except OSError as error:  # what is registered may be folders, or in the cache
        print(f"on the Hub  not reached: {error}")
        return
    print(f"on the Hub  {len(found)}")
    for line in found:
        print(f"  {line}")


def _info(arguments: argparse.Namespace) -> None:
    from perturbdiff.hub.info import model_info

    print(model_info(_find(arguments.model)))


def _verify(arguments: argparse.Namespace) -> None:
    refuse_missing(arguments.model)
    from perturbdiff.model import PerturbDiff

    model = PerturbDiff.from_pretrained(arguments.model, device="cpu")
    print(f"verified    {arguments.model}: {model.n_parameters:,} parameters; every hash and the golden output")


def _diff(arguments: argparse.Namespace) -> None:
    from perturbdiff.hub.info import difference

    print(difference(_find(arguments.model), _find(arguments.other)))


def _convert(arguments: argparse.Namespace) -> None:
    from perturbdiff.model import PerturbDiff

    genes = None
    if arguments.genes is not None:
        genes = [
            line.strip() for line in Path(arguments.genes).read_text(encoding="utf-8").splitlines() if line.strip()
        ]
    model = PerturbDiff.from_reference(arguments.checkpoint, genes, arguments.dataset, arguments.weights)
    if arguments.license is not None:
        model.training = replace(model.training, license=arguments.license)
    if Path(arguments.out).exists():
        raise FileExistsError(f"--out {arguments.out} exists; choose another name or remove it.")
    model.save_pretrained(arguments.out)
    if genes is None:
        print(
            f"note        the checkpoint does not name its genes: they are called {model.genes.names[0]}, ... here, and"
        )
        print("            controls must name them so; --genes gives the names, in the order of training")
    print(f"weights     {arguments.weights}, {model.n_parameters:,} parameters, {len(model.genes):,} genes")
    print(f"written     {arguments.out}")


def _merge(arguments: argparse.Namespace) -> None:
    if Path(arguments.out).exists():
        raise FileExistsError(f"--out {arguments.out} exists; choose another name or remove it.")
    refuse_missing(arguments.adapter)
    from perturbdiff.model import PerturbDiff

    if not _find(arguments.adapter).read()[0].is_adapter:
        raise ValueError(f"{arguments.adapter} is a whole model, not an adapter: there is nothing to merge.")
    model = PerturbDiff.from_pretrained(arguments.adapter, device="cpu", base=arguments.base)
    model.save_pretrained(arguments.out)
    print(f"merged      {arguments.adapter}: {model.n_parameters:,} parameters, its golden output checked")
    print(f"written     {arguments.out}")


def _find(text: str) -> ModelSource:
    from perturbdiff.hub.download import find_model

    return find_model(text)
