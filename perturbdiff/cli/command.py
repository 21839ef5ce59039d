"""How a command is declared, and what several rooms of the command line say alike."""

from __future__ import annotations

import argparse
import re
import textwrap
from typing import TYPE_CHECKING, Any

from perturbdiff.hub_client import name_and_revision as name_and_revision

if TYPE_CHECKING:
    from perturbdiff.hub.push import Publication

SETTINGS = """
settings:
  any number of key=value words, as training.n_steps=1000 or data.n_hvg=null.
  `perturbdiff settings` prints every key with its default and what it means; a run's config.yaml has its values; a
  typo is an error that names the nearest key. `perturbdiff recipes` lists sets of them for common questions.
"""


MAX_WIDTH = 100  # columns of a text to read, however wide the terminal is
COMMAND = re.compile(r" +(perturbdiff|torchrun|accelerate|sbatch) ")
KEPT = re.compile(r"--[a-z-]+ (?!-)('[^']*'|\S+)|'[^']*'")
NO_BREAK = "\0"  # in place of a space
ENTRY = re.compile(r"( *\S+(?: \S+)* {3,})\S")


class HelpText(argparse.HelpFormatter):
    """Help as wide as the terminal: lines of a paragraph flow, commands go on behind a backslash, columns stay."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines, flows = list[str](), False
        for line in text.strip("\n").split("\n"):
            alone = COMMAND.match(line) is not None or ENTRY.match(line) is not None
            if lines and lines[-1].endswith("\\"):
                lines[-1] = f"{lines[-1][:-1].rstrip()} {line.strip()}"
            elif flows and line and not alone and _margin(line) == _margin(lines[-1]):
                lines[-1] += f" {line.strip()}"
            else:
                lines.append(line)
                flows = not alone and line.strip() != "" and not line.endswith(":")
        return "\n".join(_filled(line, min(width, MAX_WIDTH)) for line in lines)


def _margin(line: str) -> int:
    return len(line) - len(line.lstrip())


def _filled(line: str, width: int) -> str:
    found, command = ENTRY.match(line), COMMAND.match(line) is not None
    margin = len(found[1]) if found else _margin(line) + (4 if command else 0)
    words, end = line.strip(), " \\\n" if command else "\n"
    own = " " * _margin(line)
    if command:  # an option stays with its value, and quoted words with each other
        words = KEPT.sub(lambda kept: kept[0].replace(" ", NO_BREAK), words)
    return end.join(
        textwrap.wrap(
            words, width - 2 * command, initial_indent=own, subsequent_indent=" " * margin,
            break_long_words=False, break_on_hyphens=False,
        )
    ).replace(NO_BREAK, " ")  # fmt: skip


def add_command(
    commands: Any, name: str, run: Any, short: str, description: str, epilog: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=short,
        description=description,
        epilog=epilog,
        formatter_class=HelpText,
    )
    parser.set_defaults(run=run, parser=parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "settings", nargs="*", default=[], metavar="key=value", help="settings, as training.n_steps=1000"
    )


def add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("repo", metavar="OWNER/NAME", help="repo on the Hub, made where there is none")
    parser.add_argument("--private", action="store_true", default=None, help="of a repo that is made")
    parser.add_argument("--revision", metavar="BRANCH", help="push there (default: main)")
    parser.add_argument("--tag", metavar="TAG", help="name for this commit, as v1; set when all has passed")
    parser.add_argument("--message", metavar="TEXT", help="of the commit")


def print_publication(done: Publication) -> None:
    print(f"pushed      {done.url} at commit {done.commit}, pulled back and verified")
    print(f"tag         {done.tag}" if done.tag else "tag         none (--tag v1 names a commit for good)")


def refuse_missing(model: str) -> None:
    """Raise as `find_model` where there is no such model: at once, before torch is imported."""
    from perturbdiff.hub.download import find_model

    find_model(model)
