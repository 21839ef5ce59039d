"""How a command is declared, and what several rooms of the command line say alike."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from perturbdiff.hub_client import name_and_revision as name_and_revision

if TYPE_CHECKING:
    from perturbdiff.hub.push import Publication

SETTINGS = """
settings:
  any number of key=value words, as in  training.n_steps=1000 denoiser.width=256 data.n_hvg=null
  `perturbdiff settings` prints every key with its default and what it means; a run's config.yaml has its values; a
  typo is an error that names the nearest key. `perturbdiff recipes` lists sets of them for common questions.
"""


def add_command(
    commands: Any, name: str, run: Any, short: str, description: str, epilog: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=short,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, parser=parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings, as training.n_steps=1000")


def add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("repo", metavar="OWNER/NAME", help="repo on the Hub, made where there is none")
    parser.add_argument("--private", action="store_true", default=None, help="of a repo that is made")
    parser.add_argument("--revision", metavar="BRANCH", help="push there (default: main)")
    parser.add_argument("--tag", metavar="TAG", help="name for this commit, as v1; set when all has passed")
    parser.add_argument("--message", metavar="TEXT", help="of the commit")


def print_publication(done: Publication) -> None:
    print(f"pushed      {done.url} at commit {done.commit}, pulled back and verified")
    print(f"tag         {done.tag}" if done.tag else "tag         none (--tag v1 names a commit for good)")
