"""How a command is declared, and what several rooms of the command line say alike."""

from __future__ import annotations

import argparse
from typing import Any

SETTINGS = """
settings:
  any number of key=value words, as in  training.n_steps=1000 denoiser.width=256 data.n_hvg=null
  a run's config.yaml lists every key with its value, perturbdiff/config.py what it means; a typo is an error that
  names the nearest key.
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
    parser.set_defaults(run=run)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings, as training.n_steps=1000")
