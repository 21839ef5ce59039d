"""Processes that tests start: how long they are waited for, and which are still there."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

PATIENCE = 600  # seconds until a test gives up waiting: a guard against hanging, never a measure of speed


def alive_with(variable: str) -> list[int]:
    """Those that were started with NAME=VALUE in their environment; none where there is no /proc."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile, or is another user's
            if variable.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found
