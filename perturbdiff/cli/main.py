"""Commands: parse, call, print."""

from __future__ import annotations

import argparse
import difflib
import faulthandler
import os
import re
import sys
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

from perturbdiff._version import __version__
from perturbdiff.cli.app import add_app_command
from perturbdiff.cli.atlas import add_atlas_commands
from perturbdiff.cli.command import HelpText
from perturbdiff.cli.features import add_features_commands
from perturbdiff.cli.hub import add_hub_commands
from perturbdiff.cli.interrupts import heard
from perturbdiff.cli.report import add_report_command
from perturbdiff.cli.runs import add_run_commands, rank
from perturbdiff.cli.settings import add_settings_commands
from perturbdiff.files import printable
from perturbdiff.hub_client import without_secrets

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
USER_ERRORS = (ValueError, KeyError, OSError, FloatingPointError)
# What a file of a stranger can still bring about where nobody foresaw it.
TOO_MUCH: dict[type[Exception], str] = {
    MemoryError: "there is not enough memory",
    OverflowError: "a number is too large",
    RecursionError: "what was read is nested too deeply",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; exits 0, or 2 with one line on a user's mistake (--debug shows the traceback)."""
    # Before torch is imported. Its threads spin at every barrier: on quiet cores this makes no difference, but where
    # another process holds a core, steps take a half to a third of the time.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    # Likewise: DDP warns in every process that it looks for unused parameters, as training/distributed.py tells it to.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    arguments = _arguments(argv)
    warnings.showwarning = _note
    _keep_memory()
    if not faulthandler.is_enabled():  # a library that crashes, as HDF5 on some damaged files, says where
        faulthandler.enable(2, all_threads=False)
    try:
        with (
            redirect_stdout(sys.stdout and _Shown(sys.stdout)),  # None where the caller closed it
            redirect_stderr(sys.stderr and _Lasting(sys.stderr)),
            heard(),
        ):
            arguments.run(arguments)
            print(end="", flush=True)  # a reader that is gone is noticed here, not when the interpreter ends
    except (*USER_ERRORS, MemoryError, OverflowError, RecursionError) as error:
        if arguments.debug:
            raise
        one_of_many = "RANK" in os.environ
        begin = f"\nperturbdiff: error (rank {rank()})" if one_of_many else "perturbdiff: error"
        print(f"{begin}: {_message(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("perturbdiff: interrupted", file=sys.stderr)
        sys.exit(130)


def _keep_memory() -> None:
    """Freed arrays are used again, where they would be given back: fresh pages are a fifth of a step on a CPU."""
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None  # of the GNU C library
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the most that it takes; larger arrays are given back
        mallopt(M_TRIM_THRESHOLD, 1 << 30)


class _Lasting:
    """A stream that may lose its reader (`| head`): what was begun is finished, as if somebody still read."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            return self._unread(len(text))

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._unread(0)

    def _unread(self, n: int) -> int:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())  # where what is still in its buffer goes too
        os.close(nowhere)
        return n

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Shown(_Lasting):
    """Standard output on which names of strangers do nothing to a terminal."""

    def write(self, text: str) -> int:
        return super().write("".join(c if c in "\n\t" else printable(c) for c in text))


def _message(error: Exception) -> str:
    message = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    if (what := TOO_MUCH.get(type(error))) is not None:  # --debug says where
        message = f"{what} ({message or type(error).__name__}); see what was given (--debug shows where)."
    return printable(without_secrets(" ".join(message.split())))


def _note(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    own = "perturbdiff" in Path(filename).parts and category is UserWarning
    text = printable(" ".join(str(message).split()))
    print(f"note        {text}" if own else f"{category.__name__}: {text}", file=sys.stderr)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    # argparse reads positional words in one run only; key=value words may stand anywhere, before and after options.
    parser = _parser()
    if not (sys.argv[1:] if argv is None else argv):
        parser.print_help()
        sys.exit(0)
    arguments, rest = parser.parse_known_args(argv)
    words = "inputs" if hasattr(arguments, "inputs") else "settings"
    if rest and (not hasattr(arguments, words) or any(word.startswith("-") for word in rest)):
        known = re.findall("--[a-z-]+", arguments.parser.format_help())
        options = [word.split("=")[0].replace("_", "-") for word in rest]
        near = [match for word in options for match in difflib.get_close_matches(word, known, 1)]
        meant = f"; did you mean {', '.join(near)}?" if near else ""
        arguments.parser.error(f"unrecognized arguments: {' '.join(rest)}{meant}")
    if rest:
        setattr(arguments, words, [*getattr(arguments, words), *rest])
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="perturbdiff",
        description="Functional diffusion models of single-cell perturbation responses: train on a screen, predict\n"
        "the cells of conditions nobody measured, and score them beside honest baselines.",
        epilog="Start with: perturbdiff demo    (five minutes, no data needed)\n"
        "By steps:   perturbdiff simulate screen.h5ad, which says the next one\n"
        "Then:       perturbdiff screen info FILE.h5ad",
        formatter_class=HelpText,
    )
    parser.add_argument("--version", action="version", version=f"perturbdiff {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    add_run_commands(commands)
    add_features_commands(commands)
    add_report_command(commands)
    add_atlas_commands(commands)
    add_hub_commands(commands)
    add_app_command(commands)
    add_settings_commands(commands)
    return parser
